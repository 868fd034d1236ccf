"""After a measurement: summaries into the saved results, tables on the screen, pictures beside them, the exit code.

It reads what was saved and nothing else. Try: pdbench report disaggregated_results
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pdbench.analysis.flags import device_flags
from pdbench.analysis.summary import summarize
from pdbench.errors import UserError
from pdbench.records import load_run, save_run
from pdbench.report import commands, figures, tables

SERIOUS = ("gate-failed",)
"""Flags with which a run's figures do not count: the command ends with exit code 1."""


def finish(folder: Path, console: Console) -> None:
    """Summarize, draw and show a run that was just saved."""
    run = load_run(folder)
    run.summary = summarize(run)
    run.flags += [flag for flag in device_flags(run) if flag not in run.flags]
    save_run(run, folder)
    figures.performance_analysis(run, folder / f"{run.name}_performance_analysis.png")
    console.print(tables.summary_table(run))
    console.print(f"results: {folder}/", highlight=False)


def side_by_side(folders: Sequence[Path], out: Path, console: Console) -> None:
    """Compare the first run with each of the others, on the screen, as a picture and as a page in `out/report`."""
    runs = [load_run(folder) for folder in folders]
    if len(runs) > 1:
        for other in runs[1:]:
            console.print(tables.comparison_table(runs[0], other))
        console.print(f"picture: {figures.comparison(runs, out / 'performance_comparison.png')}", highlight=False)
        commands.report(folders, out / "report", None, "en", console)


def exit_on_flags(folders: Sequence[Path]) -> None:
    """Raises UserError when a run's figures do not count."""
    for folder in folders:
        for flag in load_run(folder).flags:
            if flag.name in SERIOUS:
                raise UserError(f"{folder}: {flag.name}: {flag.detail}; its figures do not count")
