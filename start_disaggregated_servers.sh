#!/usr/bin/env bash
# Prefill on :8100, decode on :8200, the proxy on :8000, until Ctrl-C.
#   ./start_disaggregated_servers.sh [RECIPE.toml] [OPTIONS of `pdbench serve`]
set -euo pipefail
cd "$(dirname "$0")"
python=$(requirements/setup.sh)
exec "$python" -m pdbench serve "$@"
