#!/usr/bin/env bash
# Set up if need be, then every check: ruff, mypy, and all tests that need no GPU (real vLLM on CPU included).
#   ./run_tests.sh [OPTIONS of pytest]
# Without options, tests that start no vLLM and no cluster run two files at a time, where pytest-xdist is installed.
set -euo pipefail
cd "$(dirname "$0")"
python=$(requirements/setup.sh dev ray otlp)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
if [ $# -gt 0 ] || ! "$python" -c "import xdist" 2>/dev/null; then
    exec "$python" -m pytest -m "not gpu and not slow" "$@"
fi
failed=0
"$python" -m pytest -n 2 --dist loadfile -m "not (gpu or slow or vllm or cluster)" || failed=$?
"$python" -m pytest -m "(vllm or cluster) and not (gpu or slow)" || failed=$?
exit "$failed"
