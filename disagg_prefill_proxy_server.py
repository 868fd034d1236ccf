#!/usr/bin/env python3
"""The proxy alone: `pdbench proxy`, with prefill on :8100 and decode on :8200 where neither options nor a recipe name instances.

Usage: python disagg_prefill_proxy_server.py [RECIPE.toml] [--connector builtin-p2p-nccl] [OPTIONS of `pdbench proxy`]
"""

import sys

from pdbench.__main__ import main

if __name__ == "__main__":
    given = sys.argv[1:]
    named = {word.partition("=")[0] for word in given}
    if not named & {"--prefill", "--decode", "--help"} and not any(word.endswith(".toml") for word in given):
        given += ["--prefill", "http://127.0.0.1:8100", "--decode", "http://127.0.0.1:8200"]
    main(["proxy", *given])
