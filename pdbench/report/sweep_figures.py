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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

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
    "TTFT ms\np50/p99": ("ttft_p50_ms", "ttft_p99_ms"),
    "TBT ms\np50/p99": ("tbt_p50_ms", "tbt_p99_ms"),
    "tok\n/s": ("output_tokens_per_s",),
    "goodput\n/s": ("goodput_per_s",),
    "J/\ntok": ("j_per_output_token",),
}

NEEDS_SLO = "needs --slo-ttft-ms or --slo-tbt-ms"


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
        return " ".join([self.deployment, *(f"{_short(key)} {value}" for key, value in list(self.varied.items())[1:])])


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


def table(rows: Sequence[Row]) -> Group:
    """The summary for the terminal; the CSV has all of it."""
    keys = list(rows[0].varied) if rows else []
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in (*map(_short, keys), "deployment"):
        made.add_column(name.replace(" ", "\n"), no_wrap=True)
    for name in _COLUMNS:
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = ["/".join(_in_short(row.figures[figure]) for figure in figures) for figures in _COLUMNS.values()]
        style = "red" if row.flags or row.figures["failed"] else ""
        made.add_row(*(str(row.varied[key]) for key in keys), row.deployment, *cells, style=style)
    notes = []
    if all(row.figures["goodput_per_s"] is None for row in rows):
        notes.append(f"goodput {NEEDS_SLO}")
    if any(row.flags or row.figures["failed"] for row in rows):
        flags = sorted({flag for row in rows for flag in row.flags})
        notes.append(f"red: failed requests, or flags ({', '.join(flags) or 'none'}); the CSV says which")
    return Group(
        Text(f"Sweep over {', '.join(map(_short, keys))}", style="bold"), made, Text("\n".join(notes), style="dim")
    )


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
    keys = list(rows[0].varied) if rows else [""]
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(16, 10), layout=ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.97), hspace=0.06))
        axes = picture.subplots(2, 2)
        picture.suptitle(
            f"Sweep over {', '.join(map(_short, keys))}", fontsize=17, fontweight="bold", color=INK, y=0.985
        )
        speed = next((key for key in _SPEEDS if any(row.figures[key] is not None for row in rows)), next(iter(_SPEEDS)))
        for place, (name, group) in enumerate(_grouped(rows).items()):
            shade = colour(name if name == group[0].deployment else "", place)
            _against_throughput(axes[0][0], group, "ttft_p99_ms", name, shade)
            _against_throughput(axes[0][1], group, "tbt_p99_ms", name, shade)
            _by_option(axes[1][0], group, keys[0], "goodput_per_s", name, shade)
            _by_option(axes[1][1], group, keys[0], speed, name, shade)
        numbers = f"numbers: {_short(keys[0])}"
        _finish(axes[0][0], f"TTFT p99 against throughput ({numbers})", "output tokens/s", "TTFT p99, ms")
        _finish(axes[0][1], f"Mean TBT p99 against throughput ({numbers})", "output tokens/s", "mean TBT p99, ms")
        _finish(axes[1][0], "Goodput: requests/s within the SLO", _short(keys[0]), "requests/s", NEEDS_SLO)
        _finish(axes[1][1], _SPEEDS[speed], _short(keys[0]), "output tokens/s")
        data = io.BytesIO()
        picture.savefig(data, format="png", dpi=100)
    write_whole(path, data.getvalue())
    return path


_SPEEDS = {
    "output_tokens_per_s_per_device": "Output tokens/s per GPU",
    "output_tokens_per_s": "Output tokens/s (no GPU on this host)",
}


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


def _finish(panel: Axes, title: str, below: str, beside: str, otherwise: str = "not measured") -> None:
    """Title and axes, from 0 with room for the topmost label; `otherwise` where there is nothing to draw."""
    panel.set(title=title, xlabel=below, ylabel=beside)
    panel.margins(x=0.09, y=0.12)
    if panel.get_legend_handles_labels()[0]:
        panel.set_ylim(bottom=0)
        panel.legend()
    else:
        panel.text(0.5, 0.5, otherwise, transform=panel.transAxes, ha="center", color=MUTED, fontsize=12)
        panel.set(xticks=[], yticks=[])


def _short(key: str) -> str:
    """An option's name without its section."""
    return key.rsplit(".", 1)[-1].replace("_", " ")


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
