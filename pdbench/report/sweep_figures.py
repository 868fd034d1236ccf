"""A sweep's summary: one row a point and deployment, as a table, as CSV, and as curves with the knee marked.

Try: pdbench sweep recipes/cpu-1p1d.toml --vary concurrency=1,2,4,8 --against single --out sweep
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from pdbench.analysis.summary import summarize
from pdbench.records import Run, load_run, write_whole
from pdbench.report.figures import STYLE
from pdbench.report.palette import BAD, INK, MUTED, colour

_FIGURES = {
    "requests": ("requests", "succeeded"),
    "failed": ("requests", "failed"),
    "ttft_p50_ms": ("ttft_ms", "p50"),
    "ttft_p99_ms": ("ttft_ms", "p99"),
    "tbt_p50_ms": ("mean_tbt_ms", "p50"),
    "tbt_p99_ms": ("mean_tbt_ms", "p99"),
    "e2e_p50_ms": ("e2e_ms", "p50"),
    "output_tokens_per_s": ("throughput", "output_tokens_per_s"),
    "output_tokens_per_s_per_device": ("throughput", "output_tokens_per_s_per_device"),
    "requests_per_s": ("throughput", "requests_per_s"),
    "goodput_per_s": ("goodput", "requests_per_s"),
    "slo_met_pct": ("goodput", "met_pct"),
    "j_per_output_token": ("energy", "j_per_output_token"),
}
_COLUMNS = {
    "TTFT p50/p99": ("ttft_p50_ms", "ttft_p99_ms"),
    "TBT p50/p99": ("tbt_p50_ms", "tbt_p99_ms"),
    "tok/s": ("output_tokens_per_s",),
    "goodput/s": ("goodput_per_s",),
    "J/tok": ("j_per_output_token",),
}


@dataclass(frozen=True)
class Row:
    """One run of a sweep: its deployment, the varied options' values, its figures (None: not measured), its flags."""

    deployment: str
    varied: dict[str, Any]
    figures: dict[str, float | None]
    flags: list[str]

    @property
    def series(self) -> str:
        """What tells its curve from the others: the deployment and every varied option but the first."""
        return " ".join([self.deployment, *(f"{key}={value}" for key, value in list(self.varied.items())[1:])])


def row_of(run: Run, varied: dict[str, Any]) -> Row:
    """The row of one saved run."""
    summary = run.summary or summarize(run)
    figures = {name: (summary.get(section) or {}).get(key) for name, (section, key) in _FIGURES.items()}
    return Row(run.name, varied, figures, [flag.name for flag in run.flags])


def knee(throughput: Sequence[float], latency: Sequence[float]) -> int | None:
    """The place of a curve's knee: the inner point farthest below the diagonal of both axes scaled to 0..1; None without.

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
    made = Table(box=box.SIMPLE_HEAD, title="sweep")
    keys = list(rows[0].varied) if rows else []
    for name in (*keys, "deployment"):
        made.add_column(name.replace("_", " "))
    for name in _COLUMNS:
        made.add_column(name, justify="right")
    for row in rows:
        cells = [" / ".join(_in_short(row.figures[figure]) for figure in figures) for figures in _COLUMNS.values()]
        style = "red" if row.flags or row.figures["failed"] else ""
        made.add_row(*(str(row.varied[key]) for key in keys), row.deployment, *cells, style=style)
    flags = sorted({flag for row in rows for flag in row.flags})
    made.caption = f"red: failed requests, or flags ({', '.join(flags) or 'none'}); the CSV says which"
    return made


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """All rows with full precision; an empty field was not measured."""
    text = io.StringIO()
    keys = list(rows[0].varied) if rows else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "deployment", *_FIGURES, "flags"])
    for row in rows:
        figures = ["" if value is None else value for value in row.figures.values()]
        writer.writerow([*(row.varied[key] for key in keys), row.deployment, *figures, " ".join(row.flags)])
    write_whole(path, text.getvalue().encode())
    return path


def curves(rows: Sequence[Row], path: Path) -> Path:
    """Draw `path` (PNG, 1600 x 1000): latencies against throughput with their knees; goodput and tokens a device by option."""
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(16, 10), layout="constrained")
        axes = picture.subplots(2, 2)
        key = next(iter(rows[0].varied)) if rows else ""
        picture.suptitle(
            f"Sweep over {', '.join(rows[0].varied) if rows else ''}", fontsize=17, fontweight="bold", color=INK
        )
        for place, (name, group) in enumerate(_grouped(rows).items()):
            shade = colour(name if name == group[0].deployment else "", place)
            _against_throughput(axes[0][0], group, "ttft_p99_ms", name, shade)
            _against_throughput(axes[0][1], group, "tbt_p99_ms", name, shade)
            _by_option(axes[1][0], group, key, "goodput_per_s", name, shade)
            _by_option(axes[1][1], group, key, "output_tokens_per_s_per_device", name, shade)
        titles = (
            "TTFT p99 against throughput",
            "Mean TBT p99 against throughput",
            "Goodput under the SLO",
            "Tokens a device",
        )
        for panel, title in zip(axes.flat, titles, strict=True):
            panel.set_title(title)
        for panel, label in zip(axes[0], ("TTFT p99 [ms]", "TBT p99 [ms]"), strict=True):
            panel.set(xlabel="output tokens/s", ylabel=label, ylim=(0, None))
        for panel, label in zip(axes[1], ("requests/s that met it", "output tokens/s a device"), strict=True):
            panel.set(xlabel=key, ylabel=label, ylim=(0, None))
        for panel in axes.flat:
            _finish(panel)
        data = io.BytesIO()
        picture.savefig(data, format="png", dpi=100)
    write_whole(path, data.getvalue())
    return path


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.series, []).append(row)
    return groups


def _against_throughput(panel: Axes, rows: list[Row], figure: str, name: str, shade: str) -> None:
    known = [
        (speed, latency, next(iter(row.varied.values())))
        for row in rows
        if (speed := row.figures["output_tokens_per_s"]) is not None and (latency := row.figures[figure]) is not None
    ]
    if not known:
        return
    x, y = [point[0] for point in known], [point[1] for point in known]
    panel.plot(x, y, "o-", color=shade, label=name)
    for speed, latency, value in known:
        panel.annotate(str(value), (speed, latency), (5, 5), textcoords="offset points", fontsize=8.5, color=MUTED)
    place = knee(x, y)
    if place is not None:
        panel.plot(x[place], y[place], "o", markersize=15, markerfacecolor="none", color=BAD)
        panel.annotate("knee", (x[place], y[place]), (9, -14), textcoords="offset points", fontsize=9.5, color=BAD)


def _by_option(panel: Axes, rows: list[Row], key: str, figure: str, name: str, shade: str) -> None:
    known = [(row.varied[key], value) for row in rows if (value := row.figures[figure]) is not None]
    if not known:
        return
    labels, values = [point[0] for point in known], [point[1] for point in known]
    numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    panel.plot(labels if numbers else [str(label) for label in labels], values, "o-", color=shade, label=name)


def _finish(panel: Axes) -> None:
    panel.margins(x=0.09)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", color=MUTED, fontsize=12)


def _in_short(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def present(measured: Iterable[tuple[dict[str, Any], list[Path]]], out: Path, console: Console) -> list[Row]:
    """Take (varied options, results folders) as they come; keep table and curves in `out` up to date; show them at the end."""
    rows: list[Row] = []
    try:
        for varied, folders in measured:
            rows += [row_of(load_run(folder), varied) for folder in folders]
            write_csv(rows, out / "sweep_summary.csv")
            curves(rows, out / "sweep_curves.png")
    finally:
        if rows:
            console.print(table(rows))
            console.print(f"curves: {out / 'sweep_curves.png'}  table: {out / 'sweep_summary.csv'}", highlight=False)
    return rows
