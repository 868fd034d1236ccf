#!/usr/bin/env python3
"""The load and the measurement against servers that run: `pdbench bench` with its defaults.

Usage: python test_disaggregated_performance.py [--url http://127.0.0.1:8000] [OPTIONS of `pdbench bench`]
"""

import sys

from pdbench.__main__ import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
