"""What `pdbench compare`, `report` and `plot` do, and what follows a measurement: analyze, print, draw, write the report."""

import csv
import gc
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from pdbench.analysis import thresholds
from pdbench.analysis.compare import Comparison, compare, comparisons
from pdbench.analysis.run_analysis import RunAnalysis, analyze, load_analysis, save_analysis
from pdbench.errors import OptionError, UserError, WriteError
from pdbench.files import device_files, read_whole, results_files, write_all, write_whole
from pdbench.records import Clock, DeviceRecord, DeviceSample, Run, load_devices, load_run, save_run
from pdbench.report import answer, llmd, servers, tables, text
from pdbench.report.text import translate as _
from pdbench.validation import check_devices, check_other_runs, problem

PICTURES, COMPARISON = 4, "performance_comparison.png"
DEFAULT_FOLDERS = (Path("single_results"), Path("replicas_results"), Path("disaggregated_results"))


def finish(runs: Mapping[Path, Run], out: Path, console: Console) -> list[RunAnalysis]:
    """Analyze, show and draw runs that were just measured and saved into their folders; compare them in `out`."""
    analyses = {folder: keep(run, folder) for folder, run in runs.items()}
    present(analyses, out, console)
    return [*analyses.values()]


def present(analyses: Mapping[Path, RunAnalysis], out: Path, console: Console) -> None:
    """Show and draw runs by their folders; compare them in `out`."""
    from pdbench.report import mpl

    drawn = []
    for folder, analysis in analyses.items():
        name = analysis.name
        shown = [*tables.run_summary(analysis), *servers.table({name: analysis})]
        console.print(*map(tables.Terminal, shown), *tables.warnings(name, analysis), sep="\n")
        tables.say(console, f"results: {folder}/")
        drawn.append(mpl.picture(mpl.performance_analysis, analysis, name))
        write_whole(picture_of(folder, name), drawn[-1])  # last: a disk that is full costs no table
    if len(analyses) > 1:
        named = dict(zip(names_of([*analyses.values()], [*analyses]), analyses.values(), strict=True))
        compared, files = _write_report(
            named, list(map(tables.requests_csv, analyses.values())), out / "report", None, drawn
        )
        for each in compared:
            _print_comparison(each, named, console)
        write_whole(out / COMPARISON, files[COMPARISON])
        tables.say(console, f"picture: {out / COMPARISON}")
        tables.say(console, f"report: {out / 'report' / 'report.html'}")


def picture_of(folder: Path, name: str) -> Path:
    return folder / f"{name}_performance_analysis.png"


def keep(run: Run, folder: Path) -> RunAnalysis:
    """Analyze a run that was just measured; summary and flags go into its results, the analysis beside them."""
    analysis = analyze(run)
    run.summary, run.flags = msgspec.to_builtins(analysis.summary), analysis.flags
    try:
        save_run(run, folder)
        save_analysis(analysis, folder)
    except WriteError as error:
        raise WriteError(f"{error}; the requests are saved: then `pdbench report {folder}` shows them") from None
    return analysis


def narrow_enough(runs: Mapping[Path, Run], until: tuple[str, float]) -> bool:
    """Is the interval of --until's metric narrow in every comparison of these runs? Not where there is none to compare.

    Raises UserError where the metric is not measured: no number of pairs would do.
    """
    compared = comparisons({run.name: analyze(run) for run in runs.values()})
    measured = [line.metric.name for each in compared for line in each.differences]
    if compared and until[0] not in measured:
        raise UserError(f"--until: {until[0]} is not measured here; there are {', '.join(dict.fromkeys(measured))}")
    return bool(compared) and all(thresholds.narrow_enough(each, *until) for each in compared)


def _print_comparison(compared: Comparison, runs: text.Runs, console: Console) -> None:
    """The answer in a sentence, the table, what differs."""
    console.print(Text(answer.headline(compared, runs), style="bold"), soft_wrap=False)
    console.print(tables.Terminal(tables.comparison(compared)), *tables.mismatches(compared), sep="\n")


def exit_on_flags(analyses: Sequence[RunAnalysis], where: str = "", *, overload: bool = False) -> None:
    """Raises UserError when a run's figures do not count; `where` it was measured, as a point of a sweep."""
    for analysis in analyses:
        if why := analysis.void(overload=overload):
            raise UserError(f"{': '.join(filter(None, (where, analysis.name)))}: {why}")


def compare_folders(
    folders: Sequence[Path],
    fail_if: Sequence[str],
    anyway: bool,
    picture: Path,
    console: Console,
    primary: str | None = None,
) -> int:
    """Compare two saved runs (default: those of the main job); returns the exit code of the conditions."""
    conditions = [thresholds.parse(condition) for condition in fail_if]
    thresholds.check_metric(primary, "--primary")
    if folders and len(folders) != 2:
        raise UserError(f"compare takes two results folders, not {len(folders)}: `pdbench compare A B`")
    _check_png(picture)
    measured = [path for path in DEFAULT_FOLDERS if results_files(path)]
    paths = list(folders) or (measured if len(measured) == 2 else [DEFAULT_FOLDERS[0], DEFAULT_FOLDERS[-1]])
    missing = [path for path in paths if not results_files(path)]
    if missing:
        where = " and ".join(map(str, missing))
        raise UserError(f"nothing measured in {where}: run `./run_disaggregated_test.sh` (or `pdbench run`) first")
    a, b = map(load_analysis, paths)
    check_other_runs([(a.run_id, paths[0]), (b.run_id, paths[1])])
    first, second = names_of((a, b), paths)
    runs = {first: a, second: b}
    for name, run in runs.items() if conditions and not anyway else ():
        if why := run.void():
            raise UserError(f"--fail-if: {name}: {why}: measure again, or judge it with --anyway")
    compared = compare(a, b, anyway, (first, second), primary)
    results = thresholds.evaluate(compared, conditions)
    warnings = [line for name, run in runs.items() for line in tables.warnings(name, run)]
    _print_comparison(compared, runs, console)
    tables.say(console, *warnings)
    for result in results:
        style = {"fails": "bold red", "passes": "green", "uncertain": "yellow"}[result.outcome]
        console.print(Text.assemble((_(result.outcome), style), " ", answer.threshold(result)), soft_wrap=True)
    from pdbench.report import mpl  # matplotlib is most of the start-up

    mpl.say_when_english(console)
    try:
        write_whole(picture, mpl.picture(mpl.comparison, runs, [compared]))
        tables.say(console, _("picture: {0}", picture))
    except WriteError as error:
        if not results:
            raise
        tables.say(
            console, _("no picture: {0}", error)
        )  # what the conditions came to is known, and the exit code says it
    return thresholds.exit_code(results)


def report(
    folders: Sequence[Path],
    out: Path,
    sort_by: str | None,
    console: Console,
    *,
    llm_d: bool = False,
    otlp: str | None = None,
) -> None:
    """Write report.html, report.md, requests.csv and (up to four runs) the pictures of saved runs into `out`; with `llm_d`, each run as
    a benchmark report of llm-d too; with `otlp`, send each as traces to that address."""
    folders = list(folders) or [path for path in DEFAULT_FOLDERS if results_files(path)]
    if not folders:
        raise UserError(
            "nothing measured here: run `./run_disaggregated_test.sh` first, or name results folders: `pdbench report DIR...`"
        )
    if otlp:
        from pdbench.report import otlp as traces  # of an extra, which not everybody has

        collector = traces.Collector(otlp)
    workers = min(os.cpu_count() or 1, len(folders))
    if workers < 2 or len(folders) < 8:
        loaded = [_load(folder) for folder in folders]
    else:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the processes fill the cores already
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
            loaded = list(pool.map(_load, folders))
    analyses, rows = zip(*loaded, strict=True)
    check_other_runs((analysis.run_id, folder) for analysis, folder in zip(analyses, folders, strict=True))
    if len(folders) <= PICTURES:
        from pdbench.report import mpl

        mpl.say_when_english(console)
    runs = dict(zip(names_of(analyses, folders), analyses, strict=True))
    files = [*_write_report(runs, rows, out, sort_by, [], llm_d=llm_d)[1]]
    tables.say(console, _("report: {0}", out / "report.html"))
    tables.say(console, _("beside it: {0}", ", ".join(files[1:])))
    for folder, analysis in zip(folders, analyses, strict=True) if otlp else ():
        sent = collector.send(traces.spans(load_run(folder), analysis))
        tables.say(console, _("sent to {0}: {1} spans of {2}", otlp, sent, folder))


def _check_png(picture: Path) -> None:
    if picture.suffix.lower() != ".png":
        raise OptionError(f"--picture {picture}: pictures are PNG files: give a name that ends in .png")


def _load(folder: Path) -> tuple[RunAnalysis, str]:
    analysis = load_analysis(folder)
    return analysis, tables.requests_csv(analysis)


def _write_report(
    runs: text.Runs, rows: Sequence[str], out: Path, sort_by: str | None, drawn: list[bytes], *, llm_d: bool = False
) -> tuple[list[Comparison], dict[str, bytes]]:
    """Write all files about these runs into `out`, in the place of an earlier call's; returns the comparisons of the first nine, and the files.

    `rows` are theirs of requests.csv, `drawn` their pictures where those are there already; more than four runs have none.
    """
    from pdbench.report.page import page

    compared = comparisons(runs)
    side_by_side = tables.side_by_side(runs, sort_by)
    files = {
        "report.html": page(runs, compared, side_by_side).encode(),
        "report.md": _markdown(runs, compared, side_by_side).encode(),
        "requests.csv": "".join([",".join(tables.REQUEST_COLUMNS) + "\n", *map(tables.of_run, runs, rows)]).encode(),
    }
    if len(runs) <= PICTURES:
        from pdbench.report import mpl

        drawn = drawn or [mpl.picture(mpl.performance_analysis, run, name) for name, run in runs.items()]
        pictures = zip(_file_names(runs), drawn, strict=True)
        files |= {f"{name}_performance_analysis.png": picture for name, picture in pictures}
        if len(runs) > 1:
            files[COMPARISON] = mpl.picture(mpl.comparison, runs, compared)
    for name, run in zip(_file_names(runs), runs.values(), strict=True) if llm_d else ():
        files[f"{name}_llm-d.json"] = json.dumps(llmd.report(run), indent=1).encode()
    write_all(out, "report", files)
    return compared, files


def _file_names(runs: Iterable[str]) -> list[str]:
    """Names come from folders and from results files, which may be somebody else's."""
    return _distinct([re.sub(r"[^\w .,=+-]", "_", name)[:60] for name in runs])


def _markdown(runs: text.Runs, found: Sequence[Comparison], side_by_side: tables.Table) -> str:
    parts = [f"# {text.against([*runs])}", text.loads(runs), text.machines(runs)]
    parts += [line for _result, line in text.gates(runs)]
    warnings = [(name, *warning) for name, run in runs.items() for warning in text.warnings(run)]
    parts.append("\n".join(f"- **{name}, {flag}**: {detail}" for name, flag, detail in warnings))
    for compared in found:
        parts += [f"**{answer.headline(compared, runs)}**", tables.markdown(tables.comparison(compared))]
        parts.append("\n".join(f"- **{_('differs: ').strip()}** {_(str(each))}" for each in compared.mismatches))
    shown = [side_by_side, *tables.first_tokens(runs), *servers.table(runs), *tables.energy(runs)]
    parts += map(tables.markdown, shown)
    return "\n\n".join(filter(None, parts)) + "\n"


def names_of(analyses: Sequence[RunAnalysis], folders: Sequence[Path]) -> list[str]:
    """Each run's deployment; where runs share it, their instances (2P2D); where these repeat too, their folders below the one that holds
    them all, with numbers where those repeat."""
    paths = [folder.absolute() for folder in folders]
    above = os.path.commonpath([path.parent for path in paths])
    places = ["_".join(path.relative_to(above).parts) for path in paths]
    names = [analysis.name for analysis in analyses]
    return _distinct(text.told_apart(names, list(map(text.layout, analyses)), places))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbers behind those that repeat."""
    taken = set(names)
    distinct = []
    for place, name in enumerate(names):
        number = names[: place + 1].count(name)
        while names.count(name) > 1 and f"{name} {number}" in taken:
            number += 1
        distinct.append(f"{name} {number}" if names.count(name) > 1 else name)
        taken.add(distinct[-1])
    return distinct


def plot(source: Path, picture: Path | None, console: Console) -> None:
    """Draw the devices of a file (.json or .csv) or a run's folder into a PNG, by default beside it."""
    from pdbench.report import charts, mpl

    if picture:
        _check_png(picture)
    devices = [device for device in read_devices(source) if device.samples]
    if results_files(source):
        analysis = load_analysis(source)
    else:
        analysis = analyze(Run(name=source.name, clock=Clock(0, 0), config={}, host={}, versions={}, devices=devices))
    if not charts.monitored(analysis, devices).drawable:
        raise UserError(f"{source} has no samples to draw: it was measured where no device could be read")
    picture = picture or (source / "devices.png" if source.is_dir() else source.with_suffix(".png"))
    write_whole(picture, mpl.chart_picture(lambda: charts.monitored(analysis, devices), 15, lambda rows: 10))
    tables.say(console, f"drawn: {picture}")


def read_devices(source: Path) -> list[DeviceRecord]:
    """The devices of monitor's file or of a run's folder. Raises UserError when it holds none."""
    if source.is_dir():
        files = device_files(source)
        if not files:
            raise UserError(f"no *_gpu_data.json in {source}: name a results folder of a run that sampled its devices")
        if results_files(source):
            return load_run(source).devices  # all of one run
        return [device for file in files for device in load_devices(file)]
    if source.suffix.lower() != ".csv":
        return load_devices(source)
    devices: dict[str, DeviceRecord] = {}
    try:
        rows = csv.DictReader(read_whole(source).decode("utf-8-sig").splitlines())
        if missing := {"device", "kind", "name", "t_s"}.difference(rows.fieldnames or ()):
            raise ValueError(f"no column {' or '.join(sorted(missing))}, commas between columns")
        for row in rows:
            cells: dict[str, Any] = {k: v for k, v in row.items() if k in DeviceSample.__struct_fields__ and v}
            if "throttle" in cells:
                cells["throttle"] = cells["throttle"].split()
            device = DeviceRecord(id=row["device"], kind=row["kind"], name=row["name"])
            samples = devices.setdefault(row["device"], device).samples
            try:
                samples.append(msgspec.convert(cells, DeviceSample, strict=False))
            except msgspec.ValidationError as error:
                words = ": ".join(filter(None, problem(cells, error)))
                raise ValueError(f"device {row['device']}, row {len(samples) + 1}: {words}") from None
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(
            f"{source} is not monitor's CSV ({error}): restore it, or name one that `pdbench monitor` wrote"
        ) from None
    check_devices([*devices.values()], source)
    return [*devices.values()]
