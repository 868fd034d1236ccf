"""A sweep: its table, and its curves with the knee marked; kept up to date while its points are measured."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from rich.console import Console

from pdbench.analysis.compare import check_alike, mismatches_of
from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.config import DeploymentKind
from pdbench.errors import UserError
from pdbench.files import write_whole
from pdbench.report import commands, mpl, tables, text
from pdbench.report.chart_types import BAD, Axis, Chart, Panel, Series, shades
from pdbench.report.charts import ttft_parts
from pdbench.report.text import translate as _
from pdbench.validation import check_other_runs

CURVES, TABLE = "sweep_curves.png", "sweep_summary.csv"
Row = tuple[Mapping[str, Any], RunAnalysis]
"""One run of a sweep with the varied options' values."""
COLUMNS = (
    "succeeded", "failed", "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "mean_tbt_p50_ms", "mean_tbt_p99_ms",
    "e2e_p50_ms", "output_tokens_per_s", "output_tokens_per_s_per_device", "requests_per_s", "goodput_requests_per_s",
    "slo_met_pct", "j_per_output_token",
)  # fmt: skip


def present(
    measured: Iterable[tuple[Mapping[str, Any], Sequence[Path]]], out: Path, console: Console, progress: Console
) -> list[Row]:
    """Take (varied options, results folders) as they come; show and draw each once, keep table and curves in `out` up to date, show
    these at the end. Raises UserError for a point that was not measured as the first was."""
    rows: list[Row] = []
    first: tuple[Path, Row] | None = None
    due_s = 0.0
    try:
        for varied, folders in measured:
            analyses = {folder: load_analysis(folder) for folder in folders}
            for folder, analysis in analyses.items():
                first = first or (folder, (varied, analysis))
                _check_points(first, (folder, (varied, analysis)))
            rows += [(varied, analysis) for analysis in analyses.values()]
            for folder, analysis in analyses.items():
                if not commands.picture_of(folder, analysis.name).exists():
                    commands.present({folder: analysis}, folder.parent, progress)
            write_whole(out / TABLE, csv_of(rows).encode())
            begin_s = time.monotonic()
            if begin_s >= due_s:  # points that were measured before come at once
                _draw(rows, out)
                due_s = time.monotonic() + 10 * (time.monotonic() - begin_s)
    finally:
        if rows:
            show(rows, out, console)
    return rows


def show(rows: Sequence[Row], out: Path, console: Console) -> None:
    """Table and curves of runs that are saved, the files in `out`."""
    write_whole(out / TABLE, csv_of(rows).encode())
    console.print(tables.Terminal(table(rows)))
    _draw(rows, out)
    tables.say(console, _("curves: {0}  table: {1}", out / CURVES, out / TABLE))


def missing(rows: Sequence[Row]) -> list[str]:
    """A line for each deployment that lacks points which another of the rows has, none where there are the same of all."""
    rows = _with_short_names(rows)
    points = {
        name: [varied for varied, run in rows if run.name == name]
        for name in dict.fromkeys(run.name for _varied, run in rows)
    }
    every = [varied for varied, _run in rows]
    lines = []
    for name, own in points.items():
        lacking = dict.fromkeys(", ".join(_settings(varied)) for varied in every if varied not in own)
        if lacking:
            lines.append(_("not measured of {0}: {1}", name, "; ".join(lacking)))
    return lines


def _draw(rows: Sequence[Row], out: Path) -> None:
    write_whole(out / CURVES, mpl.chart_picture(lambda: curves(rows), 16, lambda lines: 5 * lines))


def joined(
    sweeps: Mapping[Path, Sequence[tuple[Mapping[str, Any], Sequence[Path]]]],
) -> tuple[list[Row], list[tables.Differing]]:
    """The runs of all points of saved sweeps, by the sweeps' folders, each sweep's by deployment and values; deployments of one name in several of
    them get their instances' number (2P2D) or the folder's name. And what else differs between the first sweep and another.

    Raises UserError where the sweeps vary other options, or their requests, GPUs, hosts or models are not the same, also within one.
    """
    rows: dict[Path, list[Row]] = {}
    for sweep, points in sweeps.items():
        read = [(folder, (varied, load_analysis(folder))) for varied, folders in points for folder in folders]
        for point in read:
            _check_points(read[0], point)
        rows[sweep] = [row for _folder, row in read]
    kinds = [*get_args(DeploymentKind)]
    for of in rows.values():
        of.sort(
            key=lambda row: (
                kinds.index(row[1].name) if row[1].name in kinds else len(kinds),
                [*map(_order, row[0].values())],
            )
        )
    check_other_runs((run.run_id, sweep) for sweep, of in rows.items() for _varied, run in of if run.run_id)
    differing: list[tables.Differing] = []
    first, *others = rows
    for other in others:
        a, b = rows[first][0], rows[other][0]
        if {*a[0]} != {*b[0]}:
            raise UserError(f"{first} varies {', '.join(a[0])} and {other} {', '.join(b[0])}: report them apart")
        b = next((row for row in rows[other] if row[0] == a[0]), b)
        differing += [(first, other, each) for each in check_alike((first, a[1]), (other, b[1]), a[0])]
    layouts: dict[tuple[Path, str], set[str | None]] = {}
    for sweep, of in rows.items():
        for _varied, run in of:
            layouts.setdefault((sweep, run.name), set()).add(text.layout(run))
    unlike = len({sweep.resolve().name for sweep in rows}) == len(rows)
    names = text.told_apart(
        [name for _sweep, name in layouts],
        [next(iter(each)) if len(each) == 1 else None for each in layouts.values()],
        [f"{name} {sweep.resolve().name if unlike else sweep}" for sweep, name in layouts],
    )
    called, keys = dict(zip(layouts, names, strict=True)), [*rows[first][0][0]]
    return [
        ({key: varied[key] for key in keys}, msgspec.structs.replace(run, name=called[sweep, run.name]))
        for sweep, of in rows.items()
        for varied, run in of
    ], differing


def _check_points(a: tuple[Path, Row], b: tuple[Path, Row]) -> None:
    """Raises UserError for runs of one sweep that were not measured alike, but for what it varies."""
    (left, (varied, run)), (right, (_varied, other)) = a, b
    # Warm-up and requests are counted when a load begins, by what is varied; a calibration varies the load as a whole.
    may_differ = {"warmup", "requests", *(key.rpartition(".")[2] for key in varied)}
    if any(gpu.get("uuid") for gpu in run.host.get("gpus") or ()):
        may_differ.add("host")  # a container's name may change; its GPUs are compared
    others = [
        str(each)
        for each in mismatches_of(run, other)
        if (each.refused or each.what.startswith("load, slo_")) and may_differ.isdisjoint(each.what.split(", "))
    ]
    if others:
        raise UserError(
            f"{left} and {right} of one sweep were not measured alike ({'; '.join(others)}): report them apart, or delete the wrong "
            "point's folder and repeat the sweep's command"
        )


def table(rows: Sequence[Row]) -> tables.Table:
    """A row per point and deployment for the terminal; `csv_of` has all figures."""
    rows = _with_short_names(rows)
    keys = [*rows[0][0]]
    columns = {
        "TTFT ms\np50/p99": ("ttft_p50_ms", "ttft_p99_ms"),
        "TBT ms\np50/p99": ("tbt_p50_ms", "tbt_p99_ms"),
        "tok\n/s": ("output_tokens_per_s",),
        "goodput\n/s": ("goodput_requests_per_s",),
        "J/\ntok": ("j_per_output_token",),
    }
    cells: list[list[tables.Value]] = []
    for varied, run in rows:
        figures = ["/".join(text.number(text.value(run, metric)) for metric in group) for group in columns.values()]
        cells.append([*(text.option_value(varied[key]) for key in keys), _with_gpus(run.name, [run], rows), *figures])
    notes = []
    if all(text.value(run, "goodput_requests_per_s") is None for _varied, run in rows):
        notes.append(_("goodput {0}", _(text.NEEDS_SLO)))
    marked = [bool(run.flags or run.summary.requests.failed) for _varied, run in rows]
    if any(marked):
        flags = sorted({flag.name for _varied, run in rows for flag in run.flags})
        notes.append(_("red: failed requests, or flags ({0}); the CSV says which", ", ".join(flags) or _("none")))
    return tables.Table(
        title=_("Sweep over {0}", ", ".join(map(text.option, keys))),
        header=[*(text.option(key).replace(" ", "\n") for key in keys), _("deployment"), *map(_, columns)],
        rows=cells,
        left=range(len(keys) + 1),
        styles=["worse" if mark else "" for mark in marked],
        note="\n".join(notes),
    )


def csv_of(rows: Sequence[Row]) -> str:
    lines: list[list[Any]] = [[*rows[0][0], "deployment", "gpus", *COLUMNS, "flags"]]
    for varied, run in rows:
        figures = (text.value(run, metric) for metric in COLUMNS)
        lines.append([*varied.values(), run.name, run.gpus, *figures, " ".join(text.flag_names(run))])
    return tables.csv_text(lines)


def curves(rows: Sequence[Row]) -> Chart:
    """Latencies against throughput with their knees; goodput and energy (tokens/s without a meter) against the first option; TTFT's parts
    at every point. Where the first option's values have no order, no line joins its points."""
    rows = _with_short_names(rows)
    metered = any(text.value(run, "j_per_output_token") is not None for _varied, run in rows)
    cost = "j_per_output_token" if metered else "output_tokens_per_s"
    load = rows[0][1].config.get("load") or {}
    limits = text.slo({name: limit for name, limit in load.items() if name not in rows[0][0]})
    within = _(" and ").join(f"{_(name)} ≤ {limit:g} ms" for name, limit in limits.items())
    goodput = _("Goodput: requests/s with {0}", within or _("the SLO met"))
    spent = text.title(cost) if metered else _("{0} (energy is not measured)", text.title(cost))
    panels = [
        _panel(rows, "ttft_p99_ms", _("TTFT p99 against throughput")),
        _panel(rows, "tbt_p99_ms", _("TBT p99 (every gap) against throughput")),
        _panel(rows, "goodput_requests_per_s", goodput, by_option=True),
        _panel(rows, cost, spent, by_option=True),
    ]
    names = [run.name for _varied, run in rows]
    by_deployment = sorted(rows, key=lambda row: names.index(row[1].name))
    parts = ttft_parts({", ".join([run.name, *_settings(varied)]): run for varied, run in by_deployment}).panels[0]
    panels += [parts] if parts.series else []
    keys = [*map(text.option, rows[0][0])]
    words = "numbers at the points: {0}" if _in_order(rows) else "names at the points: {0}"
    caption = _(words, text.option_label(next(iter(rows[0][0]))))
    return Chart(key="sweep", title=_("Sweep over {0}", ", ".join(keys)), panels=panels, caption=caption)


def _with_short_names(rows: Sequence[Row]) -> list[Row]:
    """The rows with the short names of files."""
    names = {
        key: text.file_names([*{varied[key]: None for varied, _run in rows if isinstance(varied[key], str)}])
        for key in rows[0][0]
        if key.rsplit(".", 1)[-1] in text.FILE_OPTIONS
    }
    return [
        ({key: names[key].get(value, value) if key in names else value for key, value in varied.items()}, run)
        for varied, run in rows
    ]


def _settings(varied: Mapping[str, Any]) -> list[str]:
    """`rate 16` of each varied option."""
    return [f"{text.option(key)} {text.option_value(value)}" for key, value in varied.items()]


def _panel(rows: Sequence[Row], metric: str, title: str, by_option: bool = False) -> Panel:
    """`metric` against throughput with each curve's knee, or against the first option. A curve per deployment and other options, without
    the points whose figures do not count. Values without an order are rows, with points alone."""
    option, *others = rows[0][0]
    in_order = _in_order(rows)
    names = [] if in_order or not by_option else [*dict.fromkeys(str(varied[option]) for varied, _run in rows)]
    groups: dict[str, list[tuple[Any, float, str]]] = {}
    runs: dict[str, list[RunAnalysis]] = {}
    void: list[tuple[Any, float]] = []
    for varied, run in sorted(rows, key=lambda row: _order(row[0][option])):
        at = varied[option] if by_option else text.value(run, "output_tokens_per_s")
        value = text.value(run, metric)
        if at is None or value is None:
            continue
        if run.void():
            void.append((at, value))
            continue
        name = " ".join([run.name, *_settings({key: varied[key] for key in others})])
        groups.setdefault(name, []).append((at, value, text.option_value(varied[option])))
        runs.setdefault(name, []).append(run)
    drawn: list[Series] = []
    knees: list[tuple[float, float]] = []
    for number, ((name, points), shade) in enumerate(zip(groups.items(), shades([*groups]), strict=True)):
        x, y, labels = zip(*points, strict=True)
        x = _places(x)
        if names:  # equal points of several deployments would hide each other
            x, y = y, tuple(names.index(word) + 0.6 * ((number + 0.5) / len(groups) - 0.5) for word in x)
        drawn.append(
            Series(
                name=_with_gpus(name, runs[name], rows),
                x=x,
                y=y,
                shade=shade,
                width=1.5 if in_order else 0,
                marker="o",
                labels=() if by_option else labels,
            )
        )
        bend = knee(x, y) if in_order and not by_option else None
        knees += [] if bend is None else [(x[bend], y[bend])]
    if void:
        x, y = zip(*void, strict=True)
        x, y = (y, tuple(names.index(str(word)) for word in x)) if names else (_places(x), y)
        drawn.append(Series(kind="points", name=_("does not count"), x=x, y=y, shade=BAD, size=6))
    if knees:
        x, y = zip(*knees, strict=True)
        drawn.append(Series(kind="points", name=_("knee"), x=x, y=y, shade=BAD, size=15, hollow=True))
    integer = all(isinstance(at, int) for points in groups.values() for at, _value, _label in points)
    high = max((1.15 * value for points in groups.values() for _at, value, _label in points), default=None)
    across = Axis(label=text.option_label(option) if by_option else text.label("output_tokens_per_s"), integer=integer)
    up = Axis(label=text.label(metric), low=0, high=high or None)
    if names:
        across, up = up, Axis(names=names, ticks=(range(len(names)), names))
    return Panel(
        title=title,
        series=drawn,
        x=across,
        y=up,
        not_measured=_(text.NEEDS_SLO) if metric.startswith("goodput") else "",
    )


def _with_gpus(name: str, runs: Sequence[RunAnalysis], rows: Sequence[Row]) -> str:
    """With their number of GPUs where that is not the same in all rows."""
    number, *others = {run.gpus for run in runs}
    if len({run.gpus for _varied, run in rows}) == 1 or others or number is None:
        return name
    return text.with_gpus(name, number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_order(rows: Sequence[Row]) -> bool:
    """Are there numbers among the first option's values? Words have no order."""
    return any(_is_number(next(iter(varied.values()))) for varied, _run in rows)


def _order(value: Any) -> tuple[bool, float]:
    """Numbers rise along a curve; other values stay in the order in which they were given."""
    return not _is_number(value), float(value) if _is_number(value) else 0.0


def _places(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """On an axis: numbers, else words."""
    return values if all(map(_is_number, values)) else tuple(map(str, values))


def knee(throughput: Sequence[float], latency: Sequence[float]) -> int | None:
    """The index of a curve's knee: the inner point farthest below the diagonal of both axes scaled to 0..1; None without.

    Source: Satopaa and others, "Finding a Kneedle in a Haystack" (2011), for one convex curve without smoothing.
    """
    x, y = np.asarray(throughput, dtype=float), np.asarray(latency, dtype=float)
    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or not np.ptp(x) or not np.ptp(y):
        return None
    below = (x - x.min()) / np.ptp(x) - (y - y.min()) / np.ptp(y)
    place = int(below.argmax())
    return place if below[place] > 0 and 0 < place < len(x) - 1 else None
