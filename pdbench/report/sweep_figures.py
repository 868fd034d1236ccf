"""A sweep's summary: one row per point and deployment, as a table, as CSV, and as curves with the knee marked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.records import write_whole
from pdbench.report import mpl, tables, text
from pdbench.report.charts import BAD, Axis, Chart, Panel, Series, shade
from pdbench.report.tables import Table, Value

METRICS = {
    "requests": lambda run: run.summary.requests.succeeded,
    "failed": lambda run: run.summary.requests.failed,
    "ttft_p50_ms": lambda run: _value(run, "ttft_p50_ms"),
    "ttft_p99_ms": lambda run: _value(run, "ttft_p99_ms"),
    "tbt_p50_ms": lambda run: _value(run, "tbt_p50_ms"),
    "tbt_p99_ms": lambda run: _value(run, "tbt_p99_ms"),
    "mean_tbt_p50_ms": lambda run: run.summary.mean_tbt_ms and run.summary.mean_tbt_ms.p50,
    "mean_tbt_p99_ms": lambda run: run.summary.mean_tbt_ms and run.summary.mean_tbt_ms.p99,
    "e2e_p50_ms": lambda run: _value(run, "e2e_p50_ms"),
    "output_tokens_per_s": lambda run: run.summary.throughput.output_tokens_per_s,
    "output_tokens_per_s_per_device": lambda run: run.summary.throughput.output_tokens_per_s_per_device,
    "requests_per_s": lambda run: run.summary.throughput.requests_per_s,
    "goodput_per_s": lambda run: run.summary.goodput.requests_per_s,
    "slo_met_pct": lambda run: run.summary.goodput.met_pct,
    "j_per_output_token": lambda run: run.summary.energy.j_per_output_token,
}
NEEDS_SLO = "needs --slo-ttft-ms or --slo-tbt-ms"


@dataclass(frozen=True)
class Row:
    """One run of a sweep with the varied options' values."""

    varied: Mapping[str, Any]
    run: RunAnalysis

    def value(self, metric: str) -> float | None:
        found: float | None = METRICS[metric](self.run)
        return found

    @property
    def series(self) -> str:
        """The name of its curve: the deployment and every varied option but the first."""
        return " ".join([self.run.name, *(f"{_short(key)} {value}" for key, value in list(self.varied.items())[1:])])


def _value(run: RunAnalysis, metric: str) -> float | None:
    return run.figures[metric].value if metric in run.figures else None


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
    keys = list(rows[0].varied) if rows else []
    columns = {
        "TTFT ms\np50/p99": ("ttft_p50_ms", "ttft_p99_ms"),
        "TBT ms\np50/p99": ("tbt_p50_ms", "tbt_p99_ms"),
        "tok\n/s": ("output_tokens_per_s",),
        "goodput\n/s": ("goodput_per_s",),
        "J/\ntok": ("j_per_output_token",),
    }
    cells: list[list[Value]] = [
        [
            *(str(row.varied[key]) for key in keys),
            row.run.name,
            *("/".join(text.number(row.value(metric)) for metric in group) for group in columns.values()),
        ]
        for row in rows
    ]
    marked = [bool(row.run.flags or row.value("failed")) for row in rows]
    notes = []
    if all(row.value("goodput_per_s") is None for row in rows):
        notes.append(f"goodput {NEEDS_SLO}")
    if any(marked):
        flags = sorted({flag.name for row in rows for flag in row.run.flags})
        notes.append(f"red: failed requests, or flags ({', '.join(flags) or 'none'}); the CSV says which")
    return Table(
        title=f"Sweep over {', '.join(map(_short, keys))}",
        header=[*(_short(key).replace(" ", "\n") for key in keys), "deployment", *columns],
        rows=cells,
        left=tuple(range(len(keys) + 1)),
        styles=["worse" if mark else "" for mark in marked],
        note="\n".join(notes),
    )


def summary_csv(rows: Sequence[Row]) -> str:
    """All rows with full precision."""
    keys = list(rows[0].varied) if rows else []
    cells = [
        [
            *(row.varied[key] for key in keys),
            row.run.name,
            *map(row.value, METRICS),
            " ".join(f.name for f in row.run.flags),
        ]
        for row in rows
    ]
    return tables.csv_text(Table(title="", header=[*keys, "deployment", *METRICS, "flags"], rows=cells))


def curves(rows: Sequence[Row]) -> Chart:
    """Latencies against throughput with their knees; goodput and tokens per device against the first option."""
    keys = list(rows[0].varied) if rows else [""]
    option = _short(keys[0])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.series, []).append(row)
    per_device = any(row.value("output_tokens_per_s_per_device") is not None for row in rows)
    speed = "output_tokens_per_s_per_device" if per_device else "output_tokens_per_s"
    slo = next((row.run.summary.goodput for row in rows), None)
    limits = [("TTFT", slo and slo.slo_ttft_ms), ("mean TBT", slo and slo.slo_tbt_ms)]
    within = " and ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit is not None)
    numbers = f"(numbers: {option})"
    panels = [
        _panel(groups, "ttft_p99_ms", f"TTFT p99 against throughput {numbers}", "TTFT p99, ms", ""),
        _panel(groups, "tbt_p99_ms", f"TBT p99 (every gap) against throughput {numbers}", "TBT p99, ms", ""),
        _panel(
            groups,
            "goodput_per_s",
            f"Goodput: requests/s with {within or 'an SLO met'}",
            "requests/s",
            keys[0],
            NEEDS_SLO,
        ),
        _panel(
            groups,
            speed,
            f"Output tokens/s{' per GPU' if per_device else ' (no GPU on this host)'}",
            "output tokens/s",
            keys[0],
        ),
    ]
    return Chart(key="sweep", title=f"Sweep over {', '.join(map(_short, keys))}", panels=panels)


def _panel(groups: Mapping[str, list[Row]], metric: str, title: str, label: str, key: str, missing: str = "") -> Panel:
    """`metric` of each group against the option `key`, or against throughput where that is empty."""
    drawn, names, integer = [], [], False
    for place, (name, rows) in enumerate(groups.items()):
        option = next(iter(rows[0].varied))
        known = [
            (at, value, row.varied[option])
            for row in rows
            if (value := row.value(metric)) is not None
            and (at := row.varied[key] if key else row.value("output_tokens_per_s")) is not None
        ]
        if not known:
            continue
        x, y, options = zip(*known, strict=True)
        if not all(isinstance(at, int | float) and not isinstance(at, bool) for at in x):
            x = tuple(map(str, x))
        integer = integer or all(isinstance(at, int) for at in x)
        colour = shade(name if name == rows[0].run.name else "", place)
        labels = [] if key else list(map(str, options))
        drawn.append(Series(name=name, x=x, y=y, shade=colour, marker="o", labels=labels))
        bend = None if key else knee(x, y)
        if bend is not None:
            ring = Series(
                kind="points",
                name="knee" if "knee" not in names else "",
                x=[x[bend]],
                y=[y[bend]],
                shade=BAD,
                marker="o",
                size=15,
                hollow=True,
            )
            drawn.append(ring)
            names.append("knee")
    x_label = _short(key) if key else "output tokens/s"
    return Panel(
        title=title, series=drawn, x=Axis(label=x_label, integer=integer and bool(key)), y=Axis(label=label, low=0), not_measured=missing,
    )  # fmt: skip


def _short(key: str) -> str:
    """An option's name without its section."""
    return key.rsplit(".", 1)[-1].replace("_", " ")


def present(measured: Iterable[tuple[dict[str, Any], Sequence[RunAnalysis]]], out: Path, console: Console) -> list[Row]:
    """Take (varied options, analyses) as they come; keep table and curves in `out` up to date; show them at the end."""
    rows: list[Row] = []
    try:
        for varied, analyses in measured:
            rows += [Row(varied, analysis) for analysis in analyses]
            write_whole(out / "sweep_summary.csv", summary_csv(rows).encode())
            write_whole(out / "sweep_curves.png", mpl.picture(mpl.chart, curves(rows), (16, 10)))
    finally:
        if rows:
            console.print(tables.terminal(table(rows)))
            line = f"curves: {out / 'sweep_curves.png'}  table: {out / 'sweep_summary.csv'}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return rows
