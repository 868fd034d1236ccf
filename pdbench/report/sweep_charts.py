"""A sweep's summary: one row per point and deployment, as a table, as CSV, and as curves with the knee marked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.records import write_whole
from pdbench.report import mpl, tables, text
from pdbench.report.chart_types import BAD, Axis, Chart, Panel, Series, shades
from pdbench.report.tables import Table, Value

COLUMNS = (
    "requests", "failed", "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "mean_tbt_p50_ms", "mean_tbt_p99_ms",
    "e2e_p50_ms", "output_tokens_per_s", "output_tokens_per_s_per_device", "requests_per_s", "goodput_requests_per_s",
    "slo_met_pct", "j_per_output_token",
)  # fmt: skip
NEEDS_SLO = "needs --slo-ttft-ms or --slo-tbt-ms"


@dataclass(frozen=True)
class Row:
    """One run of a sweep with the varied options' values."""

    varied: Mapping[str, Any]
    run: RunAnalysis

    @property
    def curve(self) -> str:
        """The name of its curve: the deployment and every varied option but the first."""
        return " ".join([self.run.name, *(f"{_short(key)} {value}" for key, value in [*self.varied.items()][1:])])

    @property
    def flags(self) -> list[str]:
        return list(dict.fromkeys(flag.name for flag in self.run.flags))


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


def table(rows: Sequence[Row]) -> Table:
    """The summary for the terminal; the CSV has all of it."""
    keys = [*rows[0].varied]
    columns = {
        "TTFT ms\np50/p99": ("ttft_p50_ms", "ttft_p99_ms"),
        "TBT ms\np50/p99": ("tbt_p50_ms", "tbt_p99_ms"),
        "tok\n/s": ("output_tokens_per_s",),
        "goodput\n/s": ("goodput_requests_per_s",),
        "J/\ntok": ("j_per_output_token",),
    }
    cells: list[list[Value]] = []
    for row in rows:
        figures = ["/".join(text.number(text.value(row.run, metric)) for metric in group) for group in columns.values()]
        cells.append([*(str(row.varied[key]) for key in keys), row.run.name, *figures])
    marked = [bool(row.flags or row.run.summary.requests.failed) for row in rows]
    notes = (
        []
        if any(text.value(row.run, "goodput_requests_per_s") is not None for row in rows)
        else [f"goodput {NEEDS_SLO}"]
    )
    if any(marked):
        flags = sorted({flag for row in rows for flag in row.flags})
        notes.append(f"red: failed requests, or flags ({', '.join(flags) or 'none'}); the CSV says which")
    return Table(
        title=f"Sweep over {', '.join(map(_short, keys))}",
        header=[*(_short(key).replace(" ", "\n") for key in keys), "deployment", *columns],
        rows=cells,
        left=range(len(keys) + 1),
        styles=["worse" if mark else "" for mark in marked],
        note="\n".join(notes),
    )


def summary_csv(rows: Sequence[Row]) -> str:
    """All rows with full precision."""
    cells = [
        [*row.varied.values(), row.run.name, *(text.value(row.run, metric) for metric in COLUMNS), " ".join(row.flags)]
        for row in rows
    ]
    return tables.csv_text(Table(title="", header=[*rows[0].varied, "deployment", *COLUMNS, "flags"], rows=cells))


def curves(rows: Sequence[Row]) -> Chart:
    """Latencies against throughput with their knees; goodput and tokens per device against the first option."""
    keys = [*rows[0].varied]
    per_device = any(text.value(row.run, "output_tokens_per_s_per_device") is not None for row in rows)
    speed = "output_tokens_per_s_per_device" if per_device else "output_tokens_per_s"
    slo = rows[0].run.summary.goodput
    limits = {"TTFT": slo.slo_ttft_ms, "mean TBT": slo.slo_tbt_ms}
    within = " and ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None)
    panels = [
        _panel(rows, "ttft_p99_ms", "TTFT p99 against throughput"),
        _panel(rows, "tbt_p99_ms", "TBT p99 (every gap) against throughput"),
        _panel(rows, "goodput_requests_per_s", f"Goodput: requests/s with {within or 'the SLO met'}", keys[0]),
        _panel(rows, speed, "Output tokens/s" + (" per GPU" if per_device else " (no GPU on this host)"), keys[0]),
    ]
    title, caption = f"Sweep over {', '.join(map(_short, keys))}", f"numbers at the points: {_short(keys[0])}"
    return Chart(key="sweep", title=title, panels=panels, caption=caption)


def _panel(rows: Sequence[Row], metric: str, title: str, key: str = "") -> Panel:
    """`metric` of each curve against the option `key`, or against throughput."""
    option, drawn = next(iter(rows[0].varied)), []
    groups: dict[str, list[tuple[Any, float, str]]] = {}
    for row in rows:
        at = row.varied[key] if key else text.value(row.run, "output_tokens_per_s")
        value = text.value(row.run, metric)
        if at is not None and value is not None:
            groups.setdefault(row.curve, []).append((at, value, str(row.varied[option])))
    knees: list[tuple[float, float]] = []
    for (name, points), shade in zip(groups.items(), shades([*groups]), strict=True):
        x, y, labels = zip(*points, strict=True)
        if not all(isinstance(at, int | float) and not isinstance(at, bool) for at in x):
            x = tuple(map(str, x))
        drawn.append(Series(name=name, x=x, y=y, shade=shade, marker="o", labels=() if key else labels))
        bend = None if key else knee(x, y)
        if bend is not None:
            knees.append((x[bend], y[bend]))
    if knees:
        x, y = zip(*knees, strict=True)
        drawn.append(Series(kind="points", name="knee", x=x, y=y, shade=BAD, size=15, hollow=True))
    integer = all(isinstance(point[0], int) for points in groups.values() for point in points)
    high = max((1.15 * value for points in groups.values() for _at, value, _label in points), default=None)
    return Panel(
        title=title,
        series=drawn,
        x=Axis(label=_short(key) if key else text.label("output_tokens_per_s"), integer=integer),
        y=Axis(label=text.label(metric), low=0, high=high or None),
        not_measured=NEEDS_SLO if metric.startswith("goodput") else "",
    )


def _short(key: str) -> str:
    """An option's name without its section."""
    return key.rsplit(".", 1)[-1].replace("_", " ")


def present(measured: Iterable[tuple[Mapping[str, Any], Sequence[Path]]], out: Path, console: Console) -> list[Row]:
    """Take (varied options, results folders) as they come; keep table and curves in `out` up to date; show them at the end."""
    rows: list[Row] = []
    try:
        for varied, folders in measured:
            rows += [Row(varied, load_analysis(folder)) for folder in folders]
            write_whole(out / "sweep_summary.csv", summary_csv(rows).encode())
            write_whole(out / "sweep_curves.png", mpl.picture(mpl.chart, curves(rows), 16, 10))
    finally:
        if rows:
            console.print(tables.terminal(table(rows)))
            line = f"curves: {out / 'sweep_curves.png'}  table: {out / 'sweep_summary.csv'}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return rows
