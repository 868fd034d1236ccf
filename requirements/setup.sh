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
[ -x .venv/bin/python ] || "$base" -m venv --without-pip .venv
if ! .venv/bin/python -m pip --version >>"$log" 2>&1; then
    # A newer pip than Python's own takes half the time to read the index's pages, and the base Python's pip need not be unpacked first.
    "$base" -m pip --python .venv/bin/python install --disable-pip-version-check -q --no-compile pip==26.3 >>"$log" 2>&1 ||
        .venv/bin/python -m ensurepip >>"$log" 2>&1 ||
        { say "$base has neither pip nor ensurepip: install them (Debian: python3-venv)"; exit 1; }
fi
pip_install=(.venv/bin/python -m pip install --disable-pip-version-check --no-compile)
quiet_install() { # WHAT COMMAND...: run pips, count packages as they come
    local what=$1 begin=$SECONDS
    shift
    "$@" 2>&1 | tee -a "$log" |
        awk -v what="$what" -v tty="$([ -t 2 ] && echo 1)" '
            /^(Collecting|Processing|Obtaining) / { found++; shown = 0 }
            /^Successfully installed / { installed += NF - 2; shown = 0 }
            tty && !shown++ { printf "\r  %s: %d packages found, %d installed  ", what, found, installed > "/dev/stderr" }
            !tty && /^Installing collected/ && !begun++ { printf "  %s: installing ...\n", what > "/dev/stderr" }
            END { if (tty) printf "\n" > "/dev/stderr" }' || return
    say "$what done in $((SECONDS - begin)) s"
}
install() { # WHAT ARGUMENTS...: run one pip, and show the log's end when it fails
    quiet_install "$1" "${pip_install[@]}" "${@:2}" && return
    tail -n 5 "$log" >&2
    say "pip could not install $1 (above; whole log: $log): check the network and run this again"
    exit 1
}
# A pip uses one core: as many as there are cores (at most 4) share the pinned packages, and one installs pdbench itself meanwhile.
pinned=(requirements/base.txt)
[ "$kind" = cpu ] && pinned+=(requirements/cpu.txt)
for set in "$@"; do pinned+=("requirements/$set.txt"); done
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
sed 's/[[:space:]]*#.*//; /^$/d' "${pinned[@]}" | sort -ru >"$parts/all"
cores=$(nproc)
pips=$((cores < 4 ? cores : 4))
echo "-e ." >"$parts/0-pdbench"
split -n "r/$((2 * pips))" "$parts/all" "$parts/part-" # more than pips: packages differ in size
printf '%s\n' "$parts"/0-pdbench "$parts"/part-* >"$parts/list"
if ! quiet_install "pinned packages" xargs -a "$parts/list" -P $((pips + 1)) -n 1 "${pip_install[@]}" --no-deps -r; then
    say "once more, with one pip" # which skips what is installed
    install "pinned packages" --no-deps -r "$parts/all" -e .
fi
[ "$kind" = gpu ] && install "vLLM for CUDA" -r requirements/gpu.txt -c requirements/base.txt
# pip would compile one file after the other: this takes all cores, and leaves out what is hardly ever imported (Python compiles it then).
# A package may hold files of another Python.
rarely='/(tests|pip|lexers|openai/resources|plotly/graph_objs|sympy/physics|torch/testing/_internal|transformers/models/(?!auto/|deepseek)[^/]+)/'
.venv/bin/python -m compileall -q -j 0 -x "$rarely" .venv/lib >>"$log" 2>&1 || true
touch ".venv/done-$stamp"
echo "$PWD/.venv/bin/python"
