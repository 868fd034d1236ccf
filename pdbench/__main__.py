"""The `pdbench` command, also as `python -m pdbench`: Ctrl-C is one line, in the second that the imports take as well."""

import sys

from pdbench import environment


def main(arguments: list[str] | None = None) -> None:
    """Run one command of pdbench/cli.py; `arguments` are those of the command line if None."""
    try:
        environment.use()
        from pdbench import cli

        cli.main(arguments)
    except KeyboardInterrupt:
        print("pdbench: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
