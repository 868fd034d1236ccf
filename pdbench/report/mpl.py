"""Charts and tables as pictures (PNG), drawn by matplotlib."""

import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.cells import cell_len
from rich.console import Console

from pdbench.analysis.compare import Comparison
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import charts, servers, tables, text
from pdbench.report.chart_types import BAD, FAINT, GOOD, INK, MUTED, PAPER, Axis, Chart, Panel, Series
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
HALO = [withStroke(linewidth=3, foreground=PAPER)]
OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "path_effects": HALO}
CHINESE = re.compile(
    r"cjk|han ?sans|noto ?sans ?[st]c|wen ?quan ?yi|wqy|droid ?sans ?fallback|ya ?hei|msyh|sim ?hei|pingfang|heiti"
    r"|hiragino ?sans ?gb|arial ?unicode|uming|ukai",
    re.IGNORECASE,
)


@cache
def chinese_font() -> str | None:
    """A font family with Chinese characters on this machine, None when there is none."""
    for path in findSystemFonts():  # matplotlib's own list may be older than the font
        if CHINESE.search(Path(path).stem.replace("-", " ")):
            fontManager.addfont(path)
    # Otherwise every bold text warns that the font has no bold cut.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # Such fonts come in a cut per language; simplified Chinese is preferred.
    families = [entry.name for entry in fontManager.ttflist if CHINESE.search(entry.name)]
    return min(families, key=lambda name: (not name.endswith("SC"), name), default=None)


def say_when_english(console: Console) -> None:
    """Say why pictures are in English where the rest is not."""
    if text.LANGUAGE.get() == "zh" and chinese_font() is None:
        words = "no font with Chinese characters was found, so the pictures are in English: install one, such as fonts-noto-cjk"
        tables.say(console, _(words))


def picture(draw: Callable[..., Figure], *arguments: object) -> bytes:
    """The PNG at 100 dots per inch of what `draw` makes of `arguments`; in English where this machine has no font for the language."""
    font = chinese_font() if text.LANGUAGE.get() == "zh" else None
    style = STYLE | {"font.family": [*STYLE["font.family"], font]} if font else STYLE
    data = io.BytesIO()
    with (
        text.language("zh" if font else "en"),
        matplotlib.rc_context(style),  # type: ignore[arg-type]
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a model's name; a box stands there
        FigureCanvasAgg(draw(*arguments)).print_figure(data, format="png", dpi=100)
    return data.getvalue()


def chart_picture(describe: Callable[[], Chart], width: float, height: Callable[[int], float]) -> bytes:
    """The PNG of a chart alone, with a height for its number of rows. It is described here: the picture may have to be in English."""

    def draw() -> Figure:
        described = describe()
        return chart(described, width, height(-(-len(described.panels) // 2)))

    return picture(draw)


def performance_analysis(analysis: RunAnalysis, name: str) -> Figure:
    """One run, 1600 x 1500: devices over time, every request's latencies, the parts of TTFT and energy, statistics."""
    figure = Figure(figsize=(16, 15))
    ratios = {"height_ratios": (4.7, 2.7, 2.8), "hspace": 0.24}
    rows = figure.add_gridspec(3, 1, left=LEFT, right=RIGHT, top=0.905, bottom=0.04, **ratios)
    _heading(figure, _("{0}: performance and power", name), {name: analysis})
    panels = [*charts.device_curves(analysis, name).panels[:2], *servers.curves(analysis, name).panels[1:2]]
    cells = rows[0].subgridspec(len(panels), 1, height_ratios=(1.8, 1, 1)[: len(panels)], hspace=0.22)
    for place, panel in enumerate(panels):
        draw_panel(figure.add_subplot(cells[place]), panel, "above", x_labels=place == len(panels) - 1)
    cells = rows[1].subgridspec(1, 3, wspace=0.16)
    for place, panel in enumerate(charts.every_request(analysis)):
        beside = cells[place].subgridspec(1, 3, width_ratios=(4, 0.9, 0.6), wspace=0.03)
        axis = figure.add_subplot(beside[0])
        draw_panel(axis, panel, "")
        if panel.series:
            _histogram(figure.add_subplot(beside[1], sharey=axis), panel)
    cells = rows[2].subgridspec(1, 5, width_ratios=(0.27, 0.85, 0.13, 1.0, 1.25), wspace=0.14)
    panels = [*charts.ttft_parts({name: analysis}).panels, *charts.energy_parts({name: analysis}).panels[:1]]
    rows_of_ttft = max(1.5, 0.27 * len(panels[0].y.names))
    halves = cells[1].subgridspec(len(panels), 1, hspace=0.62, height_ratios=(rows_of_ttft, 1)[: len(panels)])
    for place, panel in enumerate(panels):
        draw_panel(figure.add_subplot(halves[place]), panel, "above" if place else "", title_x=-0.33)
    times = tables.times(analysis)
    if len(times.rows) > len(tables.LATENCIES) and panels[0].series:
        note = _(
            "Phases: whole, of the requests that have them. Where TTFT goes: before the first token, of all requests."
        )
        times = replace(times, note=note)
    _draw_table(figure.add_subplot(cells[3]), times, (2.4, 1, 1, 1, 1))
    _draw_table(figure.add_subplot(cells[4]), tables.windows(analysis), (3.2, 1, 1, 1, 1.2))
    return figure


def comparison(runs: text.Runs, comparisons: Sequence[Comparison]) -> Figure:
    """Runs side by side, 1600 wide: verdicts (the first comparison's, on equal hardware where there is one), latency
    distributions, speed, power and energy."""
    ratios, height = ((1.25, 1.2, 0.95), 14) if comparisons else ((1.25, 1.0), 10.5)
    figure = Figure(figsize=(16, height))
    edges = {"left": LEFT, "right": RIGHT, "top": 1 - 1.5 / height, "bottom": 0.055}
    rows = figure.add_gridspec(len(ratios), 12, hspace=0.32, wspace=1.0, height_ratios=ratios, **edges)
    _heading(figure, text.against([*runs]), runs)
    if comparisons:
        cells = rows[0, :].subgridspec(1, 3, width_ratios=WIDTHS, wspace=0)
        panel = charts.verdicts(comparisons[0]).panels[0]
        if len(comparisons) > 1:
            panel = replace(panel, title=f"{tables.title(comparisons[0])}: {panel.title}")
        draw_panel(figure.add_subplot(cells[1]), panel)
    for place, panel in enumerate(charts.latency_distributions(runs).panels):
        cell = rows[len(ratios) - 2, place * 4 : place * 4 + 4]
        legend = "" if place else "above" if len(runs) < 3 else "inside"
        draw_panel(figure.add_subplot(cell), panel, legend)
    bars = charts.side_by_side(runs, comparisons)
    for place, panel in enumerate(bars):
        width = 12 // len(bars)
        draw_panel(figure.add_subplot(rows[len(ratios) - 1, place * width : (place + 1) * width]), panel)
    return figure


def chart(described: Chart, width: float, height: float) -> Figure:
    """A chart alone: its panels in two columns, the last across both if their number is odd; title and caption above."""
    caption = text.wrapped(described.caption, 11 * int(width))
    figure = Figure(figsize=(width, height))
    columns = min(len(described.panels), 2)
    rows = -(-len(described.panels) // columns)
    top = 1 - (1.2 + 0.17 * caption.count("\n")) / height
    edges = {"left": LEFT, "right": 0.975, "top": top, "bottom": max(0.06, 0.55 / height)}
    grid = figure.add_gridspec(rows, columns, hspace=0.28, wspace=0.22, **edges)
    figure.text(LEFT, 1 - 0.3 / height, described.title, fontsize=17, fontweight="bold", color=INK, va="top")
    figure.text(LEFT, 1 - 0.62 / height, caption, fontsize=10, color=MUTED, va="top")
    for place, panel in enumerate(described.panels):
        row, column = divmod(place, columns)
        alone = column == 0 and place == len(described.panels) - 1
        axis = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        if panel.y.names:
            box, inches = axis.get_position(), 0.075 * max(map(cell_len, panel.y.names)) - 0.6
            axis.set_position((box.x0 + inches / width, box.y0, box.width - inches / width, box.height))
        draw_panel(axis, panel)
    return figure


def _heading(figure: Figure, title: str, runs: text.Runs) -> None:
    """Title, load and machine; at the right the result of the correctness check, a note and the names of flags."""
    rows = [1 - inches / figure.get_figheight() for inches in (0.26, 0.60, 0.84, 1.01)]
    at_right: dict[str, Any] = {"x": RIGHT, "ha": "right", "va": "top"}
    load = text.loads(runs)
    figure.text(LEFT, rows[0], title, fontsize=19, fontweight="bold", color=INK, va="top")
    figure.text(LEFT, rows[1], load, fontsize=11, color=INK, va="top")
    figure.text(LEFT, rows[2], text.machines(runs), fontsize=10, color=MUTED, va="top")
    gates = [run.gate.passed for run in runs.values() if run.gate is not None]
    if gates:
        words = _("Correctness check passed") if all(gates) else _("CORRECTNESS CHECK FAILED")
        colour = GOOD if all(gates) else BAD
        figure.text(y=rows[0], s=words, fontsize=11, color=colour, fontweight="bold", **at_right)
    reasons = [reason for run in runs.values() if (reason := run.summary.energy.not_measured) is not None]
    notes = dict.fromkeys(_("energy not measured: {0}", _(reason)) for reason in reasons)
    figure.text(y=rows[2], s="; ".join(notes), fontsize=10, color=MUTED, **at_right)
    flags = {name: ", ".join(text.flag_names(run)) for name, run in runs.items()}
    found = [f"{name}: {flag}" if len(runs) > 1 else flag for name, flag in flags.items() if flag]
    if found:
        words = _("warnings: {0}", "; ".join(found))
        row = rows[1] if cell_len(load) + cell_len(words) < 175 else rows[3]
        size = min(11.0, 11.0 * 175 / cell_len(words))  # 175 letters fill the width
        figure.text(y=row, s=words, fontsize=size, color=BAD, fontweight="bold", **at_right)


def draw_panel(axis: Axes, panel: Panel, legend: str = "inside", x_labels: bool = True, title_x: float = 0.0) -> None:
    """Draw a panel; `legend` is inside, above, or empty for none."""
    axis.set_title(panel.title, x=title_x)
    if not panel.series:
        words = text.wrapped(_("not measured: {0}", panel.not_measured), int(axis.get_window_extent().width / 8))
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=MUTED)
        axis.set(xticks=[], yticks=[])
        return
    behind = axis
    if any(series.behind for series in panel.series):
        behind = axis.twinx()
        behind.set_zorder(axis.get_zorder() - 1)
        behind.grid(visible=False)
        axis.patch.set_visible(False)
    ends: Counter[str] = Counter()
    for series in panel.series:
        if panel.rows and series.kind == "points":
            series = replace(series, y=[panel.y.names.index(name) for name in series.y])
        _draw_series(behind if series.behind else axis, series, ends)
    _set_axis(axis, "x", panel.x)
    _set_axis(axis, "y", panel.y)
    if behind is not axis:
        behind.axis("off")
        behind.set_ylim(bottom=0)
    for start, end in panel.pauses:
        axis.axvspan(start, end, color=PAPER, zorder=5, lw=0)
    for at in [*panel.lines, *((start + end) / 2 for start, end in panel.pauses)]:
        axis.axvline(at, color=MUTED, lw=0.8, ls=":", zorder=6)
    if panel.rows:
        _draw_rows(axis, panel)
    _name_points(axis, [series for series in panel.series if series.kind == "line" and series.labels])
    if not x_labels:
        axis.set(xlabel="", xticklabels=[])
    names = axis.get_legend_handles_labels()[1] if legend else []
    if names and legend == "above":
        # Where the title begins left of the panel, there is room at its right; beside a title there is room for 150 letters.
        place, size = (1.0 - 0.75 * title_x, 0.985), min(9.5, 9.5 * 150 / sum(cell_len(name) + 5 for name in names))
        axis.legend(
            loc="lower right", bbox_to_anchor=place, fontsize=size, ncols=8, columnspacing=1.1, handlelength=1.4
        )
    elif names:
        axis.legend()


def _draw_series(axis: Axes, series: Series, ends: Counter[str]) -> None:
    """`ends` holds where the horizontal bar of each name has come to, for stacks."""
    x, y = series.x, series.y
    style: dict[str, Any] = {"color": series.shade, "alpha": series.opacity, "label": series.name or None}
    if series.kind == "line":
        axis.plot(x, y, lw=series.width, ls=LINES[series.dash], marker=series.marker, ms=5, **style)
    elif series.kind == "points":
        style |= {"facecolors": "none", "edgecolors": style.pop("color")} if series.hollow else {}
        style |= {"s": series.size**2, "linewidths": 1.5 if series.hollow or series.marker else 0}
        axis.scatter(x, y, marker=series.marker or "o", zorder=3 if series.size > 2 else 2, **style)
    elif series.kind == "area":
        axis.fill_between(x, y, linewidth=0, **style)
    elif series.kind == "boxes":
        rows = [(start, end, row + 0.06, row + 0.94) for (start, end), row in zip(x, y, strict=True)]
        boxes = [[(start, low), (start, high), (end, high), (end, low)] for start, end, low, high in rows]
        axis.add_collection(PolyCollection(boxes, facecolors=series.shade, alpha=series.opacity, linewidths=0))
        axis.autoscale_view()
    elif series.kind == "interval":
        for row, (value, low, high, shade) in enumerate(zip(x, series.low, series.high, series.shade, strict=True)):
            axis.plot([low, high], [row, row], color=shade, lw=3, solid_capstyle="butt", alpha=0.55)
            axis.plot(value, row, "o", color=shade, ms=6, markerfacecolor=shade if low < high else "none")
    elif series.kind == "bar":
        axis.bar_label(axis.bar(x, y, width=0.6, **style), series.labels, padding=3, fontsize=10, color=INK)
    else:
        style |= {"height": 0.62, "hatch": series.hatch * 3, "edgecolor": PAPER, "linewidth": 0.5}
        bars = axis.barh(y, x, left=[ends[row] for row in y], **style)
        axis.bar_label(bars, [f" {label}" for label in series.labels or [""] * len(x)], fontsize=9, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(visible=False)
        ends.update(dict(zip(y, x, strict=True)))
    if series.kind == "points":  # bars have their labels at their ends, lines get theirs later
        for label, at, value in zip(series.labels, x, y, strict=False):
            below = series.size / 2 + 2 + 11 * len(axis.texts)  # a line lower than the one before, which may be near
            look: dict[str, Any] = {"color": series.shade, "fontweight": "bold", "ha": "center", "va": "top"}
            axis.annotate(label, (at, value), xytext=(0, -below), zorder=4, **OFFSET, **look)


def _name_points(axis: Axes, lines: Sequence[Series]) -> None:
    """The labels of lines' points, each at the first place beside its point where it hides no other label and no point."""
    if not lines:
        return
    pixels = axis.figure.dpi / 72
    known = [(series, axis.convert_xunits(series.x), axis.convert_yunits(series.y)) for series in lines]
    points = [tuple(at) for _, x, y in known for at in axis.transData.transform(np.column_stack([x, y]).astype(float))]
    taken = [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in points]
    inside = axis.get_window_extent()
    named = [
        (*axis.transData.transform((float(at), float(value))), at, value, label, series.shade)
        for series, x, y in known
        for label, at, value in zip(series.labels, x, y, strict=False)
    ]
    for left, base, at, value, label, shade in sorted(named, key=lambda each: -each[1]):  # above a lower one's
        width, height, best = 5.6 * len(label) * pixels, 9 * pixels, None
        for side, up in ((1, 5), (1, -13), (-1, 5), (-1, -13), (1, 16), (-1, 16), (1, -24), (-1, -24)):
            begin = left + 5 * pixels if side > 0 else left - 5 * pixels - width
            box = begin, base + up * pixels, begin + width, base + up * pixels + height
            hidden = sum(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            ) + 9 * (box[0] < inside.x0 or box[2] > inside.x1)
            if best is None or hidden < best[0]:
                best = hidden, side, up, box
        assert best is not None
        _hidden, side, up, box = best
        taken.append(box)
        align = "left" if side > 0 else "right"
        axis.annotate(label, (at, value), xytext=(5 * side, up), ha=align, color=shade, **OFFSET)


def _set_axis(axis: Axes, which: str, described: Axis) -> None:
    side, limit = (axis.xaxis, axis.set_xlim) if which == "x" else (axis.yaxis, axis.set_ylim)
    side.set_label_text(described.label)
    if described.log:
        axis.set(**{f"{which}scale": "log"})
        side.set_minor_locator(NullLocator())
    elif described.integer:
        side.set_major_locator(MaxNLocator("auto", integer=True))
    if described.names and which == "y":
        axis.invert_yaxis()
    elif described.names:
        side.set_ticks(range(len(described.names)), [name.replace("-", "-\n") for name in described.names])
        axis.grid(axis="x", visible=False)
    if described.ticks:
        side.set_ticks(*described.ticks)
    if described.low is not None or described.high is not None:
        limit(described.low, described.high)


def _draw_rows(axis: Axes, panel: Panel) -> None:
    """The texts of an interval panel: names and values at its left, verdicts at its right in their colours."""
    left = -WIDTHS[0] / WIDTHS[1]
    beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 10}
    rows = zip(panel.y.names, panel.rows, panel.series[0].shade, strict=True)
    for number, (name, (values, verdict), shade) in enumerate(rows):
        axis.text(left, number, name, color=INK, fontweight="bold", **beside)
        axis.text(-0.03, number, values, color=MUTED if shade == MUTED else INK, ha="right", **beside)
        size = min(10.0, 700 / max(len(verdict), 1))  # a long one would be cut off
        axis.text(1.03, number, verdict, color=shade, **beside | {"fontsize": size})
    axis.axvline(1, color=INK, lw=1)
    axis.set(ylim=(len(panel.rows) - 0.5, -0.5), yticks=[])
    axis.set_title(panel.title, x=left)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)


def _histogram(axis: Axes, panel: Panel) -> None:
    """How often each height occurs, lying beside the points, with the quantiles marked and named without overlap."""
    low, high = panel.y.low or 0.0, panel.y.high or 1.0
    bins, shade = np.linspace(low, high, 41).tolist(), panel.series[0].shade
    axis.hist(panel.spread, bins=bins, orientation="horizontal", color=shade, alpha=0.45)
    apart, places = 0.075 * (high - low), list(panel.marks.values())
    for i in range(1, len(places)):  # moved as little as keeps the names apart and below the top
        places[i] = max(places[i], places[i - 1] + apart)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high - (len(places) - i - 0.5) * apart)
    for (name, mark), place, dash in zip(panel.marks.items(), places, ("-", "--", ":"), strict=True):
        axis.axhline(mark, color=INK, lw=0.8, ls=dash)
        words, beside = f"{name} {text.number(mark)}", axis.get_yaxis_transform()
        axis.text(1.04, place, words, transform=beside, va="center", fontsize=9, color=INK)
    axis.set_ylim(low, high)
    axis.axis("off")


def _draw_table(axis: Axes, table: tables.Table, widths: Sequence[float]) -> None:
    """A table as text: words left, numbers right, a line under the header."""
    axis.set_title(table.title)
    axis.axis("off")
    edges, rows = np.cumsum(widths) / sum(widths), [table.header, *table.cells]
    step = min(1.0 / (len(rows) + bool(table.note)), 0.16)
    for number, row in enumerate(rows):
        for place, word in enumerate(row):
            look: dict[str, Any] = {"color": INK if number else MUTED, "ha": "right" if place else "left"}
            look |= {"fontweight": "normal" if place else "bold", "va": "center", "fontsize": 9.5}
            x, y = edges[place] if place else 0.0, 1 - (number + 0.5) * step
            axis.text(x, y, word, transform=axis.transAxes, **look)
    note = text.wrapped(table.note, int(axis.get_window_extent().width / 6.3))
    axis.text(0, 1 - (len(rows) + 0.2) * step, note, transform=axis.transAxes, color=MUTED, va="top", fontsize=8.5)
    axis.plot([0, 1], [1 - step] * 2, color=FAINT, lw=1, transform=axis.transAxes, clip_on=False)
