"""`python -m pdbench` is the `pdbench` command."""

from pdbench.cli import main

main()
