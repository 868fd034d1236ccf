#!/usr/bin/env python3
"""The proxy alone: `pdbench proxy` with its defaults (:8000, prefill :8100, decode :8200).

Usage: python disagg_prefill_proxy_server.py [--connector builtin-p2p-nccl] [OPTIONS of `pdbench proxy`]
"""

import sys

from pdbench.__main__ import main

if __name__ == "__main__":
    given = sys.argv[1:]
    prefill = [] if "--prefill" in given else ["--prefill", "http://127.0.0.1:8100"]
    decode = [] if "--decode" in given else ["--decode", "http://127.0.0.1:8200"]
    main(["proxy", *prefill, *decode, *given])
