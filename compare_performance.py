#!/usr/bin/env python3
"""Single against disaggregated, from saved results: `pdbench compare` with its defaults.

Usage: python compare_performance.py [DIR_A DIR_B] [OPTIONS of `pdbench compare`]
"""

import sys

from pdbench.__main__ import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
