#!/usr/bin/env bash
# Make .venv with the pinned packages and print the path of its Python; a second call finds it done. Messages go to stderr.
#   python=$(requirements/setup.sh)          what serving and measuring need (vLLM for CUDA where nvidia-smi works, else for CPU)
#   python=$(requirements/setup.sh dev ray)  the same and the checks of ./run_tests.sh, and Ray for --cluster
# PDBENCH_PYTHON=/path/to/python skips all of it and uses that environment.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${PDBENCH_PYTHON:-}" ]; then
    command -v "$PDBENCH_PYTHON" || { echo "pdbench: PDBENCH_PYTHON=$PDBENCH_PYTHON is not a program: give the path of a Python" >&2; exit 1; }
    exit
fi
say() { echo "pdbench set-up: $*" >&2; }
exec 9>.venv.lock
flock 9

kind=cpu
nvidia-smi -L >/dev/null 2>&1 && kind=gpu
sets=(base "$kind" "$@")
files=("${sets[@]/%/.txt}")
files=("${files[@]/#/requirements/}")
stamp=$(cat pyproject.toml "${files[@]}" | sha256sum | cut -c1-16)
log=.venv/setup.log
if [ -e ".venv/done-$stamp" ]; then
    echo "$PWD/.venv/bin/python"
    exit
fi

base=$(command -v python3.11 || command -v python3) || { say "no python3 found: install Python 3.11"; exit 1; }
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "$base is older than 3.11: install Python 3.11"; exit 1; }
say "first time here: a virtual environment in .venv with ${sets[*]} packages (2 - 4 minutes; log: $log)"
[ -x .venv/bin/python ] || "$base" -m venv .venv
install() { # WHAT ARGUMENTS...: run pip, count packages as they come, show the log's end when it fails
    local what=$1 begin=$SECONDS
    shift
    if ! .venv/bin/python -m pip install --disable-pip-version-check --no-compile "$@" 2>&1 | tee -a "$log" |
        awk -v what="$what" -v tty="$([ -t 2 ] && echo 1)" '
            /^(Collecting|Processing|Obtaining) / { n++; if (tty) printf "\r  %s: %d packages found  ", what, n > "/dev/stderr" }
            /^Installing collected/ { if (tty) printf "\r"; printf "  %s: installing %d packages ...\n", what, n > "/dev/stderr" }'; then
        tail -n 5 "$log" >&2
        say "pip could not install $what (above; whole log: $log): check the network and run this again"
        exit 1
    fi
    say "$what done in $((SECONDS - begin)) s"
}
pinned=(-r requirements/base.txt)
[ "$kind" = cpu ] && pinned+=(-r requirements/cpu.txt)
for set in "$@"; do pinned+=(-r "requirements/$set.txt"); done
install "pinned packages" --no-deps "${pinned[@]}"
[ "$kind" = gpu ] && install "vLLM for CUDA" -r requirements/gpu.txt -c requirements/base.txt
install "pdbench itself" --no-deps -e .
# pip would compile one file after the other: on all cores it takes a minute less. A package may hold files of another Python.
.venv/bin/python -m compileall -q -j 0 .venv/lib >>"$log" 2>&1 || true
touch ".venv/done-$stamp"
echo "$PWD/.venv/bin/python"
