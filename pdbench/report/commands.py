"""What `pdbench compare` and `pdbench report` do: find saved runs, judge, print, write the files.

Try: pdbench report single_results disaggregated_results --out report
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pdbench.analysis import thresholds, verdicts
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from pdbench.errors import UserError
from pdbench.records import load_run, write_whole
from pdbench.report import energy_tables, html, tables
from pdbench.report.digest import Digest, digests
from pdbench.report.export import COLUMNS

PICTURES = 4
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
    conditions = [thresholds.parse(text) for text in fail_if]
    if folders and len(folders) != 2:
        raise UserError(f"compare takes two results folders, {len(folders)} were given: `pdbench compare A B`")
    paths = list(folders) or list(DEFAULT_FOLDERS)
    missing = [path for path in paths if not any(path.glob("*_results.json"))]
    if missing:
        where = " and ".join(str(path) for path in missing)
        raise UserError(f"nothing measured in {where}: run `./run_disaggregated_test.sh` (or `pdbench run`) first")
    a, b = (load_run(path) for path in paths)
    comparison = compare(analyze(a), analyze(b), anyway, None if a.name != b.name else (str(paths[0]), str(paths[1])))
    rulings = thresholds.evaluate(comparison, conditions)
    console.print(tables.verdict_table(comparison, language))
    if picture is not None:
        from pdbench.report import figures

        figures.comparison([a, b], picture, _drawable(language, console))
        console.print(f"picture: {picture}", highlight=False)
    for ruling in rulings:
        style = {"fails": "bold red", "passes": "green", "uncertain": "yellow"}[ruling.outcome]
        console.print(f"[{style}]{ruling.outcome}[/{style}] {escape(verdicts.threshold(ruling))}", highlight=False)
    return thresholds.exit_code(rulings)


def report(folders: Sequence[Path], out: Path, sort_by: str | None, language: str, console: Console) -> None:
    """Write report.html, report.md, requests.csv and the pictures of saved runs into `out`."""
    folders = list(folders) or [path for path in DEFAULT_FOLDERS if any(path.glob("*_results.json"))]
    if not folders:
        raise UserError(
            "nothing measured here: run `./run_disaggregated_test.sh` first, or name results folders: `pdbench report DIR...`"
        )
    with tempfile.TemporaryDirectory() as scratch:
        parts = [Path(scratch) / f"{place}.csv" for place in range(len(folders))]
        runs = digests(folders, html.DEVICE_FIGURES, html.COMPARED + 1, parts, language)
        names = names_of(runs)
        write_whole(out / "report.html", html.page(runs, names, sort_by, language).encode())
        write_whole(
            out / "requests.csv", b"".join([",".join(COLUMNS).encode() + b"\n", *(part.read_bytes() for part in parts)])
        )
    write_whole(out / "report.md", _markdown(runs, names, sort_by, language).encode())
    made = ["report.html", "report.md", "requests.csv"]
    if len(folders) <= PICTURES:
        from pdbench.report import figures  # matplotlib, most of the start-up, for pictures alone

        drawn = _drawable(language, console)
        loaded = [load_run(folder) for folder in folders]
        for run, name in zip(loaded, names, strict=True):
            made.append(figures.performance_analysis(run, out / f"{name}_performance_analysis.png", drawn).name)
        if len(loaded) > 1:
            made.append(figures.comparison(loaded, out / "performance_comparison.png", drawn).name)
    beside = ", ".join(made[1:])
    console.print(f"report: {out / made[0]}", highlight=False, soft_wrap=True)
    console.print(f"beside it: {beside}", highlight=False)


def _drawable(language: str, console: Console) -> str:
    """The language of the pictures; says so where this machine has no font for the one asked for."""
    from pdbench.report import fonts

    drawn = fonts.language_of_pictures(language)
    if drawn != language:
        console.print(fonts.NO_FONT, highlight=False, soft_wrap=True)
    return drawn


def names_of(runs: Sequence[Digest]) -> list[str]:
    """Each run's deployment; where two share it, their folders (below the one that holds them all) tell them apart."""
    plain = [run.name for run in runs]
    folders = [Path(run.folder).absolute() for run in runs]
    above = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [
        name if plain.count(name) == 1 else "_".join(folder.relative_to(above).parts)
        for folder, name in zip(folders, plain, strict=True)
    ]


def _markdown(runs: Sequence[Digest], names: Sequence[str], sort_by: str | None, language: str) -> str:
    parts = [f"# {' · '.join(names)}\n\n{runs[0].load}\n\n{runs[0].machine}\n"]
    for run, name in zip(runs, names, strict=True):
        parts += [f"- **{name}, {flag.name}**: {flag.detail}" for flag in run.skeleton.flags]
    for run, name in zip(runs[1 : html.COMPARED + 1], names[1:], strict=False):
        parts.append(
            tables.markdown(tables.comparison_rows(html.compare_digests(runs[0], run, (names[0], name)), language))
        )
    parts.append(tables.markdown(tables.digest_rows(runs, names, sort_by, language)))
    parts += map(tables.markdown, energy_tables.both(*html.energy_of(runs, names), language))
    return "\n".join(parts)
