"""Charts and tables as pictures (PNG), drawn by matplotlib."""

import io
import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pdbench.analysis.compare import Comparison
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import run_charts, tables, text
from pdbench.report.charts import BAD, FAINT, GOOD, INK, MUTED, PAPER, Chart, Panel, Series
from pdbench.report.charts import Axis as AxisDescription
from pdbench.report.tables import Table
from pdbench.report.text import translate as _

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#b8c0ca",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": PAPER,
    "text.parse_math": False,
}
LEFT, RIGHT = 0.055, 0.985
WIDTHS = (2.45, 2.15, 3.4)
"""Of an interval panel's names and values, its intervals, its judgements."""
LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
CHINESE = re.compile(
    r"cjk|han ?sans|noto ?sans ?[st]c|wen ?quan ?yi|wqy|droid ?sans ?fallback|ya ?hei|msyh|sim ?hei|pingfang|heiti"
    r"|hiragino ?sans ?gb|arial ?unicode|uming|ukai",
    re.IGNORECASE,
)
NO_FONT = (
    "no font with Chinese characters was found, so the pictures are in English: install one, such as fonts-noto-cjk"
)


@cache
def chinese_font() -> str | None:
    """A font family with Chinese characters on this machine, None when there is none."""

    def families() -> list[str]:
        return [entry.name for entry in fontManager.ttflist if CHINESE.search(entry.name)]

    if not families():
        for path in findSystemFonts():  # fonts installed after matplotlib made its list
            if CHINESE.search(Path(path).stem.replace("-", " ")):
                fontManager.addfont(path)
    # Otherwise every bold text warns that the font has no bold cut.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # Such fonts come in a cut per language; simplified Chinese is preferred.
    return min(families(), key=lambda name: (not name.endswith("SC"), name), default=None)


def picture(draw: Callable[..., Figure], *arguments: object) -> bytes:
    """The PNG at 100 dots per inch of what `draw` makes of `arguments`; in English where this machine has no font for the language."""
    font = chinese_font() if text.LANGUAGE.get() == "zh" else None
    style = STYLE | {"font.family": [*STYLE["font.family"], font]} if font else STYLE
    with text.language("zh" if font else "en"), matplotlib.rc_context(style):  # type: ignore[arg-type]
        data = io.BytesIO()
        FigureCanvasAgg(draw(*arguments)).print_figure(data, format="png", dpi=100)
    return data.getvalue()


def performance_analysis(analysis: RunAnalysis, name: str) -> Figure:
    """One run, 1600 x 1500: devices over time, every request's latencies, the parts of TTFT and energy, statistics."""
    figure = Figure(figsize=(16, 15))
    grid = figure.add_gridspec(
        3, 1, height_ratios=(4.7, 2.7, 2.8), hspace=0.24, left=LEFT, right=RIGHT, top=0.905, bottom=0.04
    )
    note = text.power_missing(analysis)
    _heading(figure, _("{0}: performance and power", name), [analysis], [name], note)
    rows = GridSpecFromSubplotSpec(2, 1, grid[0], height_ratios=(1.8, 1), hspace=0.22)
    for place, panel in enumerate(run_charts.device_curves(analysis, analysis.name).panels[:2]):
        draw_panel(figure.add_subplot(rows[place]), panel, x_labels=place == 1, legend="above")
    cells = GridSpecFromSubplotSpec(1, 3, grid[1], wspace=0.16)
    for place, panel in enumerate(run_charts.every_request(analysis).panels):
        beside = GridSpecFromSubplotSpec(1, 3, cells[place], width_ratios=(4, 0.9, 0.6), wspace=0.03)
        axis = figure.add_subplot(beside[0])
        draw_panel(axis, panel, legend="")
        if panel.series:
            _histogram(figure.add_subplot(beside[1], sharey=axis), panel)
    _parts_and_statistics(figure, grid[2], analysis)
    return figure


def _parts_and_statistics(figure: Figure, place: Any, analysis: RunAnalysis) -> None:
    cells = GridSpecFromSubplotSpec(1, 5, place, width_ratios=(0.27, 0.85, 0.13, 1.0, 1.25), wspace=0.14)
    panels = [run_charts.ttft_parts([analysis], [analysis.name]).panels[0]]
    panels += run_charts.energy_parts([analysis], [analysis.name]).panels[:1]
    halves = GridSpecFromSubplotSpec(len(panels), 1, cells[1], hspace=0.75, height_ratios=(1.5, 1)[: len(panels)])
    for number, panel in enumerate(panels):
        axis = figure.add_subplot(halves[number])
        draw_panel(axis, panel, legend="below" if number else "")
        axis.set_title(panel.title, x=-0.33)
    _draw_table(figure.add_subplot(cells[3]), tables.times(analysis), (2.4, 1, 1, 1, 1))
    _draw_table(figure.add_subplot(cells[4]), tables.windows(analysis), (3.2, 1, 1, 1, 1.2))


def comparison(analyses: Sequence[RunAnalysis], names: Sequence[str], comparisons: Sequence[Comparison]) -> Figure:
    """Runs side by side, 1600 wide: verdicts (of two runs), latency distributions, speed, power and energy."""
    compared = comparisons[0] if len(comparisons) == 1 else None
    rows = 3 if compared else 2
    figure = Figure(figsize=(16, 14 if compared else 10.5))
    grid = figure.add_gridspec(
        rows, 12, hspace=0.30, wspace=1.0, left=LEFT, right=RIGHT, top=1 - 1.33 / figure.get_figheight(), bottom=0.055,
        height_ratios=(1.25, 1.2, 0.95)[-rows:] if compared else (1.25, 1.0),
    )  # fmt: skip
    notes = dict.fromkeys(filter(None, map(text.energy_missing, analyses)))
    _heading(figure, text.against(names), analyses, names, "; ".join(notes))
    if compared:
        cells = GridSpecFromSubplotSpec(1, 3, grid[0, :], width_ratios=WIDTHS, wspace=0)
        draw_panel(figure.add_subplot(cells[1]), run_charts.verdicts(compared).panels[0])
    for place, panel in enumerate(run_charts.latency_distributions(analyses, names).panels):
        axis = figure.add_subplot(grid[rows - 2, place * 4 : place * 4 + 4])
        draw_panel(axis, panel, legend="above" if place == 0 else "")
    bars = run_charts.side_by_side(analyses, names).panels
    width = 12 // max(len(bars), 1)
    for place, panel in enumerate(bars):
        draw_panel(figure.add_subplot(grid[rows - 1, place * width : (place + 1) * width]), panel)
    return figure


def chart(described: Chart, size: tuple[float, float]) -> Figure:
    """A chart alone: its panels in two columns, title and caption above."""
    figure = Figure(figsize=size)
    columns = min(len(described.panels), 2)
    rows = -(-len(described.panels) // columns)
    top = 1 - 1.2 / size[1]
    grid = figure.add_gridspec(rows, columns, left=LEFT, right=0.975, top=top, bottom=0.06, hspace=0.28, wspace=0.22)
    figure.text(LEFT, 1 - 0.3 / size[1], described.title, fontsize=17, fontweight="bold", color=INK, va="top")
    figure.text(LEFT, 1 - 0.6 / size[1], described.caption, fontsize=10, color=MUTED, va="top")
    for place, panel in enumerate(described.panels):
        draw_panel(figure.add_subplot(grid[place // columns, place % columns]), panel)
    return figure


def _heading(figure: Figure, title: str, analyses: Sequence[RunAnalysis], names: Sequence[str], note: str = "") -> None:
    """Title, load and machine; at the right the result of the correctness check, flags and a note."""
    top, middle, bottom = (1 - inches / figure.get_figheight() for inches in (0.26, 0.60, 0.84))
    figure.text(LEFT, top, title, fontsize=19, fontweight="bold", color=INK, va="top")
    figure.text(LEFT, middle, "; ".join(text.each(text.load, analyses, names)), fontsize=11, color=INK, va="top")
    figure.text(LEFT, bottom, "; ".join(text.each(text.machine, analyses, names)), fontsize=10, color=MUTED, va="top")
    bold: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "ha": "right", "va": "top"}
    gates = [analysis.gate for analysis in analyses if analysis.gate is not None]
    if gates:
        passed = all(gate.passed for gate in gates)
        words = _("Correctness check passed") if passed else _("CORRECTNESS CHECK FAILED")
        figure.text(RIGHT, top, words, color=GOOD if passed else BAD, **bold)
    flags = {
        name: ", ".join(dict.fromkeys(flag.name for flag in analysis.flags))
        for name, analysis in zip(names, analyses, strict=True)
        if analysis.flags
    }
    if flags:
        words = "; ".join(f"{name}: {each}" if len(analyses) > 1 else each for name, each in flags.items())
        figure.text(RIGHT, middle, _("warnings: {0}", words), color=BAD, **bold)
    figure.text(RIGHT, bottom, note, fontsize=10, color=MUTED, ha="right", va="top")


def draw_panel(axis: Axes, panel: Panel, x_labels: bool = True, legend: str = "inside") -> None:
    """Draw a panel into `axis`; `legend` is inside, above, below or empty for none."""
    axis.set_title(panel.title)
    if not panel.series:
        width = max(int(axis.get_window_extent().width / 8), 20)
        words = fill(_("not measured: {0}", panel.not_measured), width)
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=MUTED)
        axis.set(xticks=[], yticks=[])
        return
    behind = axis.twinx() if any(series.behind for series in panel.series) else axis
    if behind is not axis:
        behind.set_zorder(axis.get_zorder() - 1)
        axis.patch.set_visible(False)
        behind.grid(visible=False)
    ends: dict[str, float] = {}
    for series in panel.series:
        _draw_series(behind if series.behind else axis, series, ends if panel.stacked else {})
    _set_axis(axis, "x", panel.x)
    _set_axis(axis, "y", panel.y)
    if panel.behind is not None:
        _set_axis(behind, "y", panel.behind)
    elif behind is not axis:
        behind.axis("off")
        behind.set_ylim(bottom=0)
    for start, end in panel.pauses:
        axis.axvspan(start, end, color=PAPER, zorder=5, lw=0)
        axis.axvline((start + end) / 2, color=MUTED, lw=0.8, ls=":", zorder=6)
    for at in panel.lines:
        axis.axvline(at, color=MUTED, lw=0.8, ls=":")
    if panel.rows:
        _draw_rows(axis, panel)
    if not x_labels:
        axis.set_xlabel("")
        axis.set_xticklabels([])
    names = axis.get_legend_handles_labels()[1]
    if names and legend:
        places = {
            "inside": {"loc": "best"},
            "above": {"loc": "lower right", "bbox_to_anchor": (1.0, 0.985), "ncols": 8, "columnspacing": 1.2},
            "below": {"loc": "upper left", "bbox_to_anchor": (-0.35, -0.42), "ncols": 1, "handlelength": 1.2},
        }
        axis.legend(**places[legend])


def _draw_series(axis: Axes, series: Series, ends: dict[str, float]) -> None:
    """`ends` holds where the bar of each name has come to, for stacks."""
    x, y, name = series.x, series.y, series.name or None
    style: dict[str, Any] = {"color": series.shade, "alpha": series.opacity, "label": name}
    if series.kind in ("line", "step"):
        drawstyle = "steps-post" if series.kind == "step" else "default"
        axis.plot(
            x, y, lw=series.width, ls=LINES[series.dash], drawstyle=drawstyle, marker=series.marker, ms=5, **style
        )
    elif series.kind == "points":
        style |= {"facecolors": "none", "edgecolors": style.pop("color")} if series.hollow else {}
        style |= {"s": series.size**2, "linewidths": 1.5 if series.hollow or series.marker else 0}
        axis.scatter(x, y, marker=series.marker or "o", zorder=3 if series.size > 2 else 2, **style)
    elif series.kind == "area":
        axis.fill_between(x, y, linewidth=0, **style)
    elif series.kind == "boxes":
        boxes = [
            [(start, row + 0.06), (start, row + 0.94), (end, row + 0.94), (end, row + 0.06)]
            for (start, end), row in zip(x, y, strict=True)
        ]
        axis.add_collection(PolyCollection(boxes, facecolors=series.shade, alpha=series.opacity, linewidths=0))
        axis.autoscale_view()
    elif series.kind == "interval":
        for number, (value, low, high, colour) in enumerate(zip(x, series.low, series.high, series.shade, strict=True)):
            axis.plot([low, high], [number] * 2, color=colour, lw=3, solid_capstyle="butt", alpha=0.55)
            axis.plot(value, number, "o", color=colour, ms=6, markerfacecolor=colour if low < high else "none")
    elif series.kind == "bar":
        bars = axis.bar(list(x), y, width=0.6, **style)
        axis.bar_label(bars, series.labels, padding=3, fontsize=10, color=INK)
    else:
        starts = [ends.get(row, 0.0) for row in y]
        bars = axis.barh(
            list(y), x, left=starts, height=0.62, hatch=series.hatch * 3, edgecolor=PAPER, linewidth=0.5, **style
        )
        ends.update({row: start + value for row, start, value in zip(y, starts, x, strict=True)})
        if series.labels:
            axis.bar_label(bars, [f" {label}" for label in series.labels], fontsize=9, color=INK)
        axis.margins(x=0.2)
        axis.grid(visible=False)
    if series.labels and series.kind in ("line", "points"):
        for label, point in zip(series.labels, zip(x, y, strict=True), strict=True):
            axis.annotate(label, point, (5, 5), textcoords="offset points", fontsize=8.5, color=MUTED)


def _set_axis(axis: Axes, which: str, described: AxisDescription) -> None:
    side, limit = (axis.xaxis, axis.set_xlim) if which == "x" else (axis.yaxis, axis.set_ylim)
    side.set_label_text(described.label)
    if described.log:
        side._set_axes_scale("log")
    if described.low is not None or described.high is not None:
        limit(described.low, described.high)
    if described.names:
        if which == "y":
            axis.invert_yaxis()
        else:
            side.set_ticks(range(len(described.names)), [name.replace("-", "-\n") for name in described.names])
            axis.grid(axis="x", visible=False)
    elif described.ticks:
        side.set_ticks(described.ticks[0], described.ticks[1])
        side.set_minor_locator(NullLocator())
    elif described.log:
        low, high = side.get_view_interval()
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=12))
        side.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
        side.set_minor_locator(NullLocator())
    elif described.integer:
        side.set_major_locator(MaxNLocator(integer=True))


def _draw_rows(axis: Axes, panel: Panel) -> None:
    """The texts of an interval panel: names and values left of it, the judgement at the right in its colour."""
    left = -WIDTHS[0] / WIDTHS[1]
    beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 10}
    for number, ((name, values, judgement), colour) in enumerate(zip(panel.rows, panel.series[0].shade, strict=True)):
        axis.text(left, number, name, color=INK, fontweight="bold", **beside)
        axis.text(-0.03, number, values, color=INK if colour != MUTED else MUTED, ha="right", **beside)
        axis.text(1.03, number, judgement, color=colour, **beside)
    axis.axvline(1, color=INK, lw=1)
    axis.set_ylim(max(len(panel.rows), 1) - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_title(panel.title, x=left)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)


def _histogram(axis: Axes, panel: Panel) -> None:
    """How often each height occurs, lying beside the points, with the quantiles marked and named without overlap."""
    low, high = axis.get_ylim()
    bins = np.linspace(low, high, 41).tolist()
    axis.hist(panel.spread, bins=bins, orientation="horizontal", color=panel.series[-1].shade, alpha=0.45)
    apart = 0.075 * (high - low)
    places = spread_apart(list(panel.marks.values()), apart, high - apart / 2)
    for (name, mark), place, dash in zip(panel.marks.items(), places, ("-", "--", ":"), strict=True):
        axis.axhline(mark, color=INK, lw=0.8, ls=dash)
        beside = axis.get_yaxis_transform()
        axis.text(1.04, place, f"{name} {text.number(mark)}", transform=beside, va="center", fontsize=9, color=INK)
    axis.set_ylim(low, high)
    axis.axis("off")


def spread_apart(places: Sequence[float], apart: float, highest: float) -> list[float]:
    """The same rising places, moved as little as keeps neighbours `apart` and all at or below `highest`."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + apart)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], highest - (len(moved) - 1 - i) * apart)
    return moved


def _draw_table(axis: Axes, table: Table, widths: Sequence[float]) -> None:
    """A table as text: words left, numbers right, a line under the header."""
    axis.set_title(table.title)
    axis.axis("off")
    edges = np.cumsum(widths) / sum(widths)
    rows = [table.header, *table.cells]
    step = min(1.0 / len(rows), 0.16)
    for number, row in enumerate(rows):
        for place, word in enumerate(row):
            x, side = (0.0, "left") if place == 0 else (edges[place], "right")
            look = {"color": INK if number else MUTED, "fontweight": "bold" if place == 0 and number else "normal"}
            height = 1 - (number + 0.5) * step
            axis.text(x, height, word, ha=side, va="center", fontsize=9.5, transform=axis.transAxes, **look)
    axis.plot([0, 1], [1 - step] * 2, color=FAINT, lw=1, transform=axis.transAxes, clip_on=False)
