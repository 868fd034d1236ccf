#!/usr/bin/env bash
# Set up if need be, then every check: ruff, mypy, and all tests that need no GPU (real vLLM on CPU included).
#   ./run_tests.sh [OPTIONS of pytest]
set -euo pipefail
cd "$(dirname "$0")"
python=$(requirements/setup.sh dev ray)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest -m "not gpu and not slow" "$@"
