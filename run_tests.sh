#!/usr/bin/env bash
# Set up if need be, then ruff, mypy, and all tests except those marked gpu or slow (real vLLM on CPU included).
#   ./run_tests.sh [OPTIONS of pytest]
# Without options and with pytest-xdist installed, three processes: one takes the tests that share vLLM servers or a cluster, one after
# the other, the others the other files, which mostly wait (tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")"
python=$(requirements/setup.sh dev ray otlp)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
parallel=()
if [ $# -eq 0 ] && "$python" -c "import xdist" 2>/dev/null; then
    parallel=(-n 3 --dist loadscope --no-loadscope-reorder)
fi
# Three processes on two cores: numpy's own threads would spin while they wait, and take the cores from the other processes.
export OPENBLAS_NUM_THREADS=1
# Its first import makes matplotlib's list of fonts and says so where that takes long: not in output that a test compares.
"$python" -c "import matplotlib.font_manager"
exec "$python" -m pytest -m "not gpu and not slow" "${parallel[@]}" "$@"
