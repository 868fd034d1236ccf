#!/usr/bin/env bash
# Set up if need be, then the whole comparison: one vLLM instance against prefill + decode + proxy, under the same load.
#   ./run_disaggregated_test.sh [RECIPE.toml] [OPTIONS of `pdbench run`]
set -euo pipefail
cd "$(dirname "$0")"
python=$(requirements/setup.sh)
exec "$python" -m pdbench run "$@"
