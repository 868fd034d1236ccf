"""The report as one HTML file that opens offline: verdicts first, then interactive charts, tables, configuration."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from pdbench.analysis.compare import Comparison
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import charts, tables, text
from pdbench.report.chart_types import MUTED, Axis, Chart, Panel, Series
from pdbench.report.text import translate as _

DEVICE_CHARTS, COMPARED, BOXES = 8, 8, 300
LOG_TICKS = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]


def page(
    analyses: Sequence[RunAnalysis], names: Sequence[str], comparisons: Sequence[Comparison], side_by_side: tables.Table
) -> str:
    """The page for these runs; `comparisons` are of the first run with the next ones."""
    some, some_names = analyses[:COMPARED], names[:COMPARED]
    drawn = [
        *(charts.verdicts(compared) for compared in comparisons if len(comparisons) == 1),
        charts.latency_distributions(analyses, names),
        charts.ttft_parts(analyses, names),
        charts.tbt_over_time(analyses, names),
        *(
            charts.device_curves(analysis, name, f"devices-{number}", BOXES)
            for number, (analysis, name) in enumerate(zip(analyses[:DEVICE_CHARTS], names, strict=False))
        ),
        charts.trade_off(analyses, names),
        charts.energy_parts(some, some_names),
    ]
    drawn = [chart for chart in drawn if chart.drawable]
    environment = Environment(loader=PackageLoader("pdbench.report", "."), autoescape=True, trim_blocks=True)
    environment.globals.update(_=_, text=text)
    differing, same = tables.configuration(some, some_names)
    data = json.dumps({chart.key: plotly_figure(chart) for chart in drawn}, separators=(",", ":"))
    return environment.get_template("page.html.j2").render(
        lang="zh-Hans" if text.LANGUAGE.get() == "zh" else "en",
        title=text.against(names),
        runs=list(zip(names, analyses, strict=True)),
        gates=text.gates(analyses, names),
        load=text.loads(analyses, names),
        machine=text.machines(analyses, names),
        comparisons=[(compared, tables.comparison(compared)) for compared in comparisons],
        side_by_side=side_by_side,
        charts=drawn,
        energy=tables.energy(some, some_names),
        differing=differing,
        same=same,
        plots=data.replace("<", "\\u003c"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


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
    gap = 0.06 if chart.shared_x else 0.18 if below or bars else 0.05
    for place, (panel, height) in enumerate(zip(panels, heights, strict=True), 1):
        size = (1 - gap * (len(panels) - 1)) * height / sum(heights)
        domain = [1 - reached - size, 1 - reached] if below else [reached, reached + size]
        x_place = 1 if chart.shared_x else place
        x, y = _axis(panel.x), _axis(panel.y) | {"anchor": _ref("x", x_place)}
        (y if below else x)["domain"] = [max(domain[0], 0.0), domain[1]]
        layout[_ref("xaxis", x_place)] = x | {"anchor": _ref("y", len(panels) if chart.shared_x else place)}
        layout[_ref("yaxis", place)] = y
        layout[f"yaxis{place + 10}"] = {"overlaying": _ref("y", place), "visible": False, "fixedrange": True}
        lines = [(start + end) / 2 for start, end in panel.pauses if place == 1] + [1.0] * bool(panel.rows)
        shapes += [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x} for x in lines]
        reached += size + gap
    for shape in shapes:
        shape["line"] = {"color": MUTED, "width": 1, "dash": "dot"}
    each = 130 + 32 * bars if bars else 380
    height = 130 + 95 * sum(heights) if chart.shared_x else each * (len(panels) if below else 1)
    return layout | {"height": height, "barmode": "stack", "shapes": shapes, "legend": {"traceorder": "normal"}}


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    colour = series.shade if isinstance(series.shade, str) else list(series.shade)
    marker = {"color": colour, "size": series.size, "opacity": series.opacity}
    if series.kind in ("area", "boxes"):
        x, y = series.x, series.y
        if series.kind == "boxes":  # one outline of all boxes, broken between them
            x = [at for start, end in x for at in (start, end, end, start, start, np.nan)]
            y = [row + height for row in y for height in (0.06, 0.06, 0.94, 0.94, 0.06, np.nan)]
        rgb = ",".join(str(int(str(colour)[place : place + 2], 16)) for place in (1, 3, 5))
        look = {
            "fillcolor": f"rgba({rgb},{series.opacity})",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "mode": "lines",
        }
        return {
            "type": "scatter",
            "x": _plain(x),
            "y": _plain(y),
            "fill": "toself" if x is not series.x else "tozeroy",
        } | look
    trace: dict[str, Any] = {"type": "scatter", "x": _plain(series.x), "y": _plain(series.y)}
    trace["hovertemplate"] = f"%{{x:.4g}} ({panel.x.label}), %{{y:.4g}} ({panel.y.label})<extra>{series.name}</extra>"
    if series.kind == "line":
        line = {"color": colour, "width": series.width, "dash": series.dash}
        return trace | {"mode": "lines", "line": line}
    if series.kind == "points":
        return trace | {"mode": "markers", "marker": marker}
    if series.kind == "interval":
        middle, low, high = (np.array(values, dtype=float) for values in (series.x, series.low, series.high))
        error = {"type": "data", "symmetric": False, "array": _plain(high - middle), "arrayminus": _plain(middle - low)}
        more = {
            "error_x": error | {"color": MUTED, "thickness": 2},
            "hovertext": [": ".join(row[1:]) for row in panel.rows],
        }
        hover = "%{y}: %{hovertext}<extra></extra>"
        return (
            trace
            | {"mode": "markers", "y": list(panel.y.names), "marker": marker | {"size": 9}, "hovertemplate": hover}
            | more
        )
    hover = f"%{{y}}: %{{x:.4g}} ({panel.x.label})<extra>{series.name}</extra>"
    fill = {
        "color": colour,
        "line": {"color": MUTED, "width": 0.4},
        "pattern": {"shape": series.hatch, "solidity": 0.25},
    }
    words = {"text": list(series.labels), "textposition": "outside", "cliponaxis": False} if series.labels else {}
    return trace | {"type": "bar", "orientation": "h", "marker": fill, "hovertemplate": hover} | words


def _axis(axis: Axis) -> dict[str, Any]:
    shown: dict[str, Any] = {"title": {"text": axis.label}, "automargin": True}
    if axis.log:
        shown |= {"type": "log", "tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
    if axis.low is not None and axis.high is not None:
        shown["range"] = np.log10([axis.low, axis.high]).tolist() if axis.log else [axis.low, axis.high]
    elif axis.low == 0:
        shown["rangemode"] = "tozero"
    if axis.ticks:
        shown |= {"tickvals": _plain(axis.ticks[0]), "ticktext": list(axis.ticks[1])}
    if axis.names:
        shown |= {
            "type": "category",
            "categoryarray": list(axis.names),
            "categoryorder": "array",
            "autorange": "reversed",
        }
    return shown


def _ref(name: str, place: int) -> str:
    return name if place == 1 else f"{name}{place}"


def _plain(values: Any) -> list[Any]:
    """Numbers with six significant digits for JSON; NaN, which JSON lacks, as None."""
    return [v if isinstance(v, str) else None if v != v else float(f"{v:.6g}") for v in values]
