"""The `pdbench` command, also as `python -m pdbench`, in the environment that has its packages."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

_TRIED = "PDBENCH_PYTHON_TRIED"


def main(arguments: list[str] | None = None) -> None:
    """Run one command of pdbench/cli; `arguments` are those of the command line if None."""
    try:
        _use_environment()
        from pdbench import cli

        cli.main(arguments)
    except KeyboardInterrupt:  # also in the second that the imports take
        print("pdbench: interrupted", file=sys.stderr)
        sys.exit(130)


def _use_environment() -> None:
    """Start again in $PDBENCH_PYTHON or .venv where this Python lacks pdbench's packages; without one, end with one line."""
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


if __name__ == "__main__":
    main()
