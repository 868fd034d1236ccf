"""The project's own environment: a command that was started with another Python goes on in it.

Try: /usr/bin/python3 compare_performance.py
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

_TRIED = "PDBENCH_PYTHON_TRIED"


def use() -> None:
    """Go on in $PDBENCH_PYTHON or .venv where this Python lacks pdbench's packages; where there is none, end with one line."""
    if find_spec("cyclopts"):
        return
    own = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
    python = shutil.which(os.environ.get("PDBENCH_PYTHON", str(own)))
    if python is None or _TRIED in os.environ:
        sys.exit(
            f"pdbench: {os.environ.get(_TRIED, sys.executable)} lacks pdbench's packages: run requirements/setup.sh once, "
            "or set PDBENCH_PYTHON=/path/to/python of an environment that has them"
        )
    os.environ[_TRIED] = python
    os.execv(python, [python, *sys.orig_argv[1:]])
