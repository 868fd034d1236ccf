"""The report as one HTML file that opens offline: verdicts first, then interactive charts, tables, configuration."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader
from plotly.offline import get_plotlyjs

from pdbench.analysis.compare import Comparison
from pdbench.report import answer, charts, servers, tables, text
from pdbench.report.chart_types import MUTED, Axis, Chart, Panel, Series
from pdbench.report.text import translate as _

MOST_RUNS, MOST_BOXES = 8, 300
"""Of charts and tables that have a part for each run; of a device chart's requests, which are counted where there are more."""


def page(runs: text.Runs, comparisons: Sequence[Comparison], side_by_side: tables.Table) -> str:
    """The page for these runs; `comparisons` are of the first run with the next ones."""
    some = dict(islice(runs.items(), MOST_RUNS))
    drawn = [
        *(replace(charts.verdicts(compared), key=f"verdicts-{i}") for i, compared in enumerate(comparisons[:3])),
        charts.latency_distributions(runs),
        charts.ttft_parts(runs),
        charts.tbt_over_time(runs),
        *(charts.device_curves(run, name, f"devices-{i}", MOST_BOXES) for i, (name, run) in enumerate(some.items())),
        *(servers.curves(run, name, f"servers-{i}") for i, (name, run) in enumerate(some.items())),
        charts.trade_off(runs),
        charts.energy_parts(some),
    ]
    drawn = [chart for chart in drawn if chart.drawable]
    plots = json.dumps({chart.key: plotly_figure(chart) for chart in drawn}, separators=(",", ":"))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            runs=runs,
            comparisons=comparisons,
            side_by_side=side_by_side,
            charts=drawn,
            energy=tables.energy(some),
            configuration=tables.configuration(some),
            plots=plots.replace("<", "\\u003c"),
        )
    )


@cache
def environment(*packages: str) -> Environment:
    """Of the report's templates and those of other packages."""
    loader = ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "pdbench.report")])
    found = Environment(loader=loader, autoescape=True, trim_blocks=True)
    found.globals.update(_=_, answer=answer, servers=servers, text=text, tables=tables)
    found.globals["lang"] = lambda: "zh-Hans" if text.LANGUAGE.get() == "zh" else "en"
    found.globals["plotly"] = lambda: get_plotlyjs().replace("</script", "<\\/script")
    return found


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """plotly's data with two layouts, for a wide window and for a narrow one, where panels are below each other.

    Colours of text, grid and paper are the page's own, so that dark mode changes them.
    """
    data: list[dict[str, Any]] = []
    names: set[str] = set()
    for place, panel in enumerate(chart.drawable, 1):
        for series in panel.series:
            # A series without name marks the one before, and is hidden with it.
            group = series.name or (data[-1]["legendgroup"] if data else "")
            axes = {"xaxis": _ref("x", 1 if chart.shared_x else place), "yaxis": _ref("y", place + 10 * series.behind)}
            legend = {"name": series.name, "legendgroup": group, "showlegend": bool(series.name) and group not in names}
            data.append(_trace(series, panel) | axes | legend)
            names.add(group)
    return {"data": data, "wide": _layout(chart, chart.shared_x), "narrow": _layout(chart, True)}


def _layout(chart: Chart, below: bool) -> dict[str, Any]:
    """`below`: panels below each other, else beside each other."""
    panels, layout, shapes, reached = chart.drawable, {}, [], 0.0
    heights = [panel.height if below else 1.0 for panel in panels]
    bars = max(len(panel.y.names) for panel in panels)
    gap = 0.06 if chart.shared_x else 0.18 if below or bars else 0.09
    for place, (panel, height) in enumerate(zip(panels, heights, strict=True), 1):
        size = (1 - gap * (len(panels) - 1)) * height / sum(heights)
        domain = [1 - reached - size, 1 - reached] if below else [reached, reached + size]
        x_place = 1 if chart.shared_x else place
        x, y = _axis(panel.x), _axis(panel.y) | {"anchor": _ref("x", x_place)}
        (y if below else x)["domain"] = [max(domain[0], 0.0), min(domain[1], 1.0)]
        layout[_ref("xaxis", x_place)] = x | {"anchor": _ref("y", len(panels) if chart.shared_x else place)}
        layout[_ref("yaxis", place)] = y
        layout[f"yaxis{place + 10}"] = {"overlaying": _ref("y", place), "visible": False, "fixedrange": True}
        lines = [*panel.lines, *((start + end) / 2 for start, end in panel.pauses)] if place == 1 else []
        lines += [1.0] * bool(panel.rows)
        shapes += [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x} for x in lines]
        reached += size + gap
    for shape in shapes:
        shape["line"] = {"color": MUTED, "width": 1, "dash": "dot"}
    each = 130 + 32 * bars if bars else 380
    height = 130 + 95 * sum(heights) if chart.shared_x else each * (len(panels) if below else 1)
    return layout | {"height": height, "barmode": "stack", "shapes": shapes, "legend": {"traceorder": "normal"}}


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    shade = series.shade if isinstance(series.shade, str) else list(series.shade)
    x, y = series.x, series.y
    marker: dict[str, Any] = {"color": shade, "size": series.size, "opacity": series.opacity}
    marker |= {"symbol": series.marker} if series.marker else {}
    hover = f"%{{x:.4g}} ({panel.x.label}), %{{y:.4g}} ({panel.y.label})<extra>{series.name}</extra>"
    look: dict[str, Any]
    if series.kind == "line":
        look = {"mode": "lines", "line": {"color": shade, "width": series.width, "dash": series.dash}}
    elif series.kind == "points":
        look = {"mode": "markers", "marker": marker}
    elif series.kind in ("area", "boxes"):
        rgb = ",".join(map(str, bytes.fromhex(str(shade)[1:])))  # the trace's own opacity leaves some fills opaque
        look = {"mode": "lines", "line": {"width": 0}, "fillcolor": f"rgba({rgb},{series.opacity})"}
        look |= {"fill": "tozeroy" if series.kind == "area" else "toself", "hoverinfo": "skip"}
        if series.kind == "boxes":  # one outline of all boxes, broken between them
            x = [at for start, end in x for at in (start, end, end, start, start, np.nan)]
            y = [row + height for row in y for height in (0.06, 0.06, 0.94, 0.94, 0.06, np.nan)]
    elif series.kind == "interval":
        middle, low, high = (np.array(values, dtype=float) for values in (x, series.low, series.high))
        error = {"type": "data", "symmetric": False, "array": _plain(high - middle), "arrayminus": _plain(middle - low)}
        look = {"mode": "markers", "marker": marker | {"size": 9}, "error_x": error | {"color": MUTED, "thickness": 2}}
        look["hovertext"] = [": ".join(row) for row in panel.rows]
        hover = "%{y}: %{hovertext}<extra></extra>"
    else:
        pattern = {"shape": series.hatch, "solidity": 0.25}
        marker = {"color": shade, "line": {"color": MUTED, "width": 0.4}, "pattern": pattern}
        look = {"type": "bar", "orientation": "h", "marker": marker}
        if series.labels:
            look |= {"text": list(series.labels), "textposition": "outside", "cliponaxis": False}
        hover = f"%{{y}}: %{{x:.4g}} ({panel.x.label})<extra>{series.name}</extra>"
    return {"type": "scatter", "x": _plain(x), "y": _plain(y), "hovertemplate": hover} | look


def _axis(axis: Axis) -> dict[str, Any]:
    shown: dict[str, Any] = {"title": {"text": axis.label}, "automargin": True}
    if axis.log:
        shown["type"] = "log"
    if axis.low is not None and axis.high is not None:
        shown["range"] = np.log10([axis.low, axis.high]).tolist() if axis.log else [axis.low, axis.high]
    elif axis.low == 0:
        shown["rangemode"] = "tozero"
    if axis.ticks:
        shown |= {"tickvals": _plain(axis.ticks[0]), "ticktext": list(axis.ticks[1])}
    if axis.names:
        shown |= {"type": "category", "categoryarray": list(axis.names), "categoryorder": "array"}
        shown["autorange"] = "reversed"
    return shown


def _ref(name: str, place: int) -> str:
    return name if place == 1 else f"{name}{place}"


def _plain(values: Any) -> list[Any]:
    """Numbers with six significant digits for JSON; NaN, which JSON lacks, as None."""
    return [v if isinstance(v, str) else None if v != v else float(f"{v:.6g}") for v in values]
