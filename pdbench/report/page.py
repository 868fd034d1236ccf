"""The report as one HTML file that opens offline: verdicts first, then interactive charts, tables, configuration."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from pdbench.analysis.compare import Comparison
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import run_charts, tables, text
from pdbench.report.charts import MUTED, Axis, Chart, Panel, Series
from pdbench.report.text import translate as _

DEVICE_CHARTS, COMPARED, SPANS = 8, 8, 300
LOG_TICKS = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]
GAP = 0.07


def page(
    analyses: Sequence[RunAnalysis],
    names: Sequence[str],
    comparisons: Sequence[Comparison],
    side_by_side: tables.Table,
) -> str:
    """The page for these runs; the first is the baseline, `comparisons` are of it with the next ones."""
    charts = [
        *(run_charts.verdicts(comparisons[0]) for _only in comparisons[:1] if len(comparisons) == 1),
        run_charts.latency_distributions(analyses, names),
        run_charts.ttft_parts(analyses, names),
        run_charts.tbt_over_time(analyses, names),
        *(
            run_charts.device_curves(analysis, name, f"devices-{number}", SPANS)
            for number, (analysis, name) in enumerate(zip(analyses[:DEVICE_CHARTS], names, strict=False))
        ),
        run_charts.trade_off(analyses, names),
        run_charts.energy_parts(analyses[:COMPARED], names[:COMPARED]),
    ]
    drawn = [chart for chart in charts if chart.drawable]
    data = json.dumps({chart.key: plotly_figure(chart) for chart in drawn}, separators=(",", ":"))
    environment = Environment(
        loader=PackageLoader("pdbench.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(_=_, text=text)
    differing, equal = tables.configuration(analyses[:COMPARED], names[:COMPARED])
    return environment.get_template("page.html.j2").render(
        lang="zh-Hans" if text.LANGUAGE.get() == "zh" else "en",
        title=text.against(names),
        runs=list(zip(names, analyses, strict=True)),
        loads=text.each(text.load, analyses, names),
        machines=text.each(text.machine, analyses, names),
        comparisons=[(compared, tables.comparison(compared)) for compared in comparisons],
        side_by_side=side_by_side,
        charts=drawn,
        energy=tables.energy(analyses[:COMPARED], names[:COMPARED]),
        differing=differing,
        equal=equal,
        plots=data.replace("<", "\\u003c"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """plotly's data with two layouts: panels beside each other in a wide window, below each other in a narrow one.

    Colours of text, grid and paper are the page's own, so that dark mode changes them.
    """
    panels = [panel for panel in chart.panels if panel.series]
    named: set[str] = set()
    data = []
    for place, panel in enumerate(panels, 1):
        for series in panel.series:
            trace = _trace(series, panel) | {"xaxis": _ref("x", 1 if chart.below else place)}
            trace["yaxis"] = f"y{10 + place}" if series.behind else _ref("y", place)
            if series.name:
                trace |= {"name": series.name, "legendgroup": series.name, "showlegend": series.name not in named}
                named.add(series.name)
            else:  # marks of the series before, hidden with it
                trace |= {"showlegend": False, "legendgroup": data[-1].get("legendgroup", "") if data else ""}
            data.append(trace)
    below = chart.below or len(panels) == 1
    return {
        "data": data,
        "wide": _layout(chart, panels, below),
        "narrow": _layout(chart, panels, True),
    }


def _layout(chart: Chart, panels: Sequence[Panel], below: bool) -> dict[str, Any]:
    layout: dict[str, Any] = {}
    total = sum(panel.height for panel in panels)
    gap = GAP if chart.below else 0.16 if below else 0.05
    top = 1.0
    shapes = []
    for place, panel in enumerate(panels, 1):
        x, y = _axis(panel.x), _axis(panel.y)
        if below:
            size = (1 - gap * (len(panels) - 1)) * panel.height / total
            y["domain"] = [max(top - size, 0.0), top]
            top -= size + gap
        else:
            size = (1 - gap * (len(panels) - 1)) / len(panels)
            x["domain"] = [(place - 1) * (size + gap), (place - 1) * (size + gap) + size]
        y["anchor"] = _ref("x", 1 if chart.below else place)
        x["anchor"] = _ref("y", len(panels) if chart.below else place)
        layout[_ref("yaxis", place)] = y
        if not chart.below or place == len(panels):
            layout[_ref("xaxis", 1 if chart.below else place)] = x
        if any(series.behind for series in panel.series):
            layout[f"yaxis{10 + place}"] = {
                "overlaying": y["anchor"] and _ref("y", place),
                "visible": False,
                "fixedrange": True,
            }
        line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": MUTED, "width": 1, "dash": "dot"}}
        if place == 1:
            shapes += [line | {"x0": (a + b) / 2, "x1": (a + b) / 2} for a, b in panel.pauses]
        if panel.rows:
            shapes.append(line | {"x0": 1, "x1": 1, "line": {"color": MUTED, "width": 1}})
    rows = max((len(panel.y.names) for panel in panels), default=0)
    each = 120 + 30 * rows if rows else 330
    height = 130 + 95 * total if chart.below else each * len(panels) if below else max(each, 330 if not rows else 0)
    return layout | {"height": height, "barmode": "stack", "shapes": shapes, "legend": {"traceorder": "normal"}}


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    x, y = _numbers(series.x), _numbers(series.y)
    unit = panel.y.label if not panel.y.names else panel.x.label
    of = f"<extra>{series.name}</extra>"
    hover = f"%{{x:.4g}}, %{{y:.4g}} ({unit}){of}"
    colour = series.shade if isinstance(series.shade, str) else list(series.shade)
    if series.kind in ("line", "step"):
        line = {"color": colour, "width": series.width, "dash": series.dash}
        shape = {"shape": "hv"} if series.kind == "step" else {}
        return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line | shape, "hovertemplate": hover}
    if series.kind == "points":
        marker = {"color": colour, "size": series.size, "opacity": series.opacity}
        return {"type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker, "hovertemplate": hover}
    if series.kind in ("bar", "hbar"):
        marker = {
            "color": colour,
            "line": {"color": MUTED, "width": 0.4},
            "pattern": {"shape": series.hatch, "solidity": 0.25},
        }
        orientation = "h" if series.kind == "hbar" else "v"
        hover = f"%{{y}}: %{{x:.4g}} ({unit}){of}" if series.kind == "hbar" else f"%{{x}}: %{{y:.4g}}{of}"
        words = {"text": list(series.labels), "textposition": "outside", "cliponaxis": False} if series.labels else {}
        return {
            "type": "bar",
            "orientation": orientation,
            "x": x,
            "y": y,
            "marker": marker,
            "hovertemplate": hover,
        } | words
    if series.kind == "interval":
        center = np.asarray(series.x, dtype=float)
        error = {
            "array": _numbers(np.asarray(series.high) - center),
            "arrayminus": _numbers(center - np.asarray(series.low)),
        }
        rows = [f"{name}: {values}, {judgement}" for name, values, judgement in panel.rows]
        return {
            "type": "scatter", "mode": "markers", "x": x, "y": list(panel.y.names), "marker": {"color": colour, "size": 9},
            "error_x": error | {"type": "data", "symmetric": False, "color": MUTED, "thickness": 2},
            "hovertext": rows, "hovertemplate": "%{hovertext}<extra></extra>",
        }  # fmt: skip
    fill = {
        "type": "scatter",
        "mode": "lines",
        "hoverinfo": "skip",
        "line": {"width": 0},
        "fillcolor": _rgba(colour, series.opacity),
    }
    if series.kind == "area":
        return fill | {"fill": "tozeroy", "x": x, "y": y}
    corners: tuple[list[Any], list[Any]] = ([], [])
    for (start, end), row in zip(series.x, series.y, strict=True):
        low, high = float(row) + 0.06, float(row) + 0.94
        corners[0].extend([*_numbers([start, end, end, start, start]), None])
        corners[1].extend([low, low, high, high, low, None])
    return fill | {"fill": "toself", "x": corners[0], "y": corners[1]}


def _axis(axis: Axis) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": axis.label}}
    if axis.log:
        found |= {"type": "log", "tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
    if axis.low == 0 and axis.high is None:
        found["rangemode"] = "tozero"
    elif axis.low is not None and axis.high is not None:
        found["range"] = np.log10([axis.low, axis.high]).tolist() if axis.log else [axis.low, axis.high]
    if axis.ticks:
        found |= {"tickvals": _numbers(axis.ticks[0]), "ticktext": list(axis.ticks[1])}
    if axis.names:
        found |= {"type": "category", "categoryorder": "array", "categoryarray": list(axis.names), "automargin": True}
        found |= {"autorange": "reversed"}
    if axis.integer:
        found["tickformat"] = "d"
    return found


def _ref(name: str, place: int) -> str:
    return name if place == 1 else f"{name}{place}"


def _numbers(values: Any) -> list[Any]:
    """Plain numbers with five significant digits for JSON; NaN, which JSON lacks, as None."""
    return [
        value if isinstance(value, str) else None if value != value else float(f"{value:.6g}")
        for value in (values.tolist() if isinstance(values, np.ndarray) else values)
    ]


def _rgba(colour: Any, opacity: float) -> str:
    red, green, blue = (int(str(colour)[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
