"""What `pdbench compare` and `pdbench report` do: find saved runs, judge, print, write the files.

Try: pdbench report single_results disaggregated_results --out report
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pdbench.analysis import gate
from pdbench.analysis.compare import compare
from pdbench.errors import UserError
from pdbench.records import load_run
from pdbench.report import figures, tables

DEFAULT_FOLDERS = (Path("single_results"), Path("disaggregated_results"))


def compare_folders(
    folders: Sequence[Path],
    fail_if: Sequence[str],
    anyway: bool,
    language: str,
    picture: Path | None,
    console: Console,
) -> int:
    """Compare two saved runs (none named: those of the main job); returns the exit code that the conditions give."""
    conditions = [gate.parse(text) for text in fail_if]
    if folders and len(folders) != 2:
        raise UserError(
            f"compare takes two results folders, {len(folders)} were given: `pdbench compare A B`", exit_code=2
        )
    paths = list(folders) or list(DEFAULT_FOLDERS)
    missing = [path for path in paths if not any(path.glob("*_results.json"))]
    if missing:
        where = " and ".join(str(path) for path in missing)
        raise UserError(f"nothing measured in {where}: run `./run_disaggregated_test.sh` (or `pdbench run`) first")
    a, b = (load_run(path) for path in paths)
    comparison = compare(a, b, anyway, None if a.name != b.name else (str(paths[0]), str(paths[1])))
    console.print(tables.verdict_table(comparison, language))
    if picture is not None:
        figures.comparison([a, b], picture)
        console.print(f"picture: {picture}", highlight=False)
    rulings = gate.rule(comparison, conditions)
    for ruling in rulings:
        style = {"fails": "bold red", "passes": "green", "uncertain": "yellow"}[ruling.outcome]
        console.print(f"[{style}]{ruling.outcome}[/{style}] {escape(ruling.reason)}", highlight=False)
    return gate.exit_code(rulings)
