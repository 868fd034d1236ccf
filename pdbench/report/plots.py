"""The report's interactive figures as plain plotly dictionaries ({data, layout}), made from digests.

Colours of text, grid and paper are the page's, so that dark mode changes them all. Try: pdbench report single_results
"""

from collections.abc import Sequence
from typing import Any

from pdbench.analysis.metrics import TTFT_PHASES
from pdbench.report import energy_tables
from pdbench.report.digest import Digest, Points
from pdbench.report.language import say
from pdbench.report.palette import MUTED, ORANGE, colour, colours

Plot = dict[str, Any]
UNITS = {
    "power_w": "W",
    "cpu_utilization_pct": "%",
    "sm_clock_mhz": "MHz",
    "cpu_clock_mhz": "MHz",
    "temperature_c": "°C",
}
DASHES = ("solid", "dash", "dot", "dashdot")
ENERGY_RUNS = 8
LOG_TICKS = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]
LOG_AXIS = {"type": "log", "tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
ENERGY_SHADES: dict[str, dict[str, Any]] = {
    "active": {"color": ORANGE},
    "idle": {"color": "rgba(120,130,140,0.75)"},
    "waiting": {"color": "rgba(120,130,140,0.28)", "pattern": {"shape": "/", "size": 6, "solidity": 0.25}},
}


def distributions(runs: Sequence[Digest], names: Sequence[str], language: str) -> Plot:
    """Share of values at or below each height, for TTFT, TBT and E2E: steeper and further left is better."""
    data: list[dict[str, Any]] = []
    for place, key in enumerate(("ttft", "tbt", "e2e"), start=1):
        for number, (run, name, shade) in enumerate(zip(runs, names, _shades(runs), strict=True)):
            x, y = run.distributions[key]
            line = {"color": shade, "width": 2, "dash": _dash(number)}
            hover = f"{name}<br>%{{y:.1f}} % ≤ %{{x:.4g}} ms<extra>{say(key + '_ms', language)}</extra>"
            data.append(_line(x, y, name, line, place, hover) | {"legendgroup": str(number), "showlegend": place == 1})
    axes: dict[str, Any] = {}
    for place, key in enumerate(("ttft", "tbt", "e2e"), start=1):
        left = (place - 1) * 0.345
        axes[_axis("xaxis", place)] = {
            "title": {"text": f"{say(key + '_ms', language)}, ms"},
            "domain": [left, left + 0.31],
            "anchor": f"y{'' if place == 1 else place}",
        } | (LOG_AXIS if _wide([run.distributions[key] for run in runs]) else {})
        axes[_axis("yaxis", place)] = {
            "anchor": f"x{'' if place == 1 else place}",
            "range": [0, 101],
            "tickvals": [0, 50, 90, 99],
            "ticktext": ["0", "p50", "p90", "p99"],
        }
    return {"data": data, "layout": {**axes, "height": 430}}


def ttft_parts(runs: Sequence[Digest], names: Sequence[str], language: str) -> Plot | None:
    """The mean TTFT of each run taken apart, stacked; None when no run was told apart."""
    known = [(run.parts_ms, name) for run, name in zip(runs, names, strict=True) if run.parts_ms]
    keys = [key for key in (*TTFT_PHASES, "other") if any(key in p for p, _ in known)]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": say(f"part_{key}", language),
            "y": [name for _, name in known],
            "x": [round(parts.get(key, 0.0), 4) for parts, _ in known],
            "marker": {"color": colour(key), "line": {"color": MUTED, "width": 0.4}},
            "hovertemplate": "%{y}: %{x:.4g} ms<extra>" + say(f"part_{key}", language) + "</extra>",
        }
        for key in keys
    ]
    layout = {
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "height": 170 + 34 * len(known),
        "xaxis": {"title": {"text": say("mean TTFT, ms", language)}},
        "yaxis": {"automargin": True, "autorange": "reversed"},
    }
    return {"data": data, "layout": layout} if known else None


def tbt_over_time(runs: Sequence[Digest], names: Sequence[str], language: str) -> Plot | None:
    """p50 and p99 of the gaps between tokens as a run goes on."""
    data = []
    for number, (run, name, shade) in enumerate(zip(runs, names, _shades(runs), strict=True)):
        for quantile, dash in (("p99", "solid"), ("p50", "dot")):
            x, y = run.tbt_over_time[quantile]
            hover = f"{name} {quantile}<br>%{{x:.1f}} s: %{{y:.4g}} ms<extra></extra>"
            line = {"color": shade, "width": 1.6, "dash": dash}
            data.append(_line(x, y, f"{name} {quantile}", line, 1, hover) | {"legendgroup": str(number)})
    layout = {
        "height": 360,
        "xaxis": {"title": {"text": say("seconds of load, pauses left out", language)}},
        "yaxis": {"title": {"text": f"{say('tbt_ms', language)}, ms"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout} if any(one["x"] for one in data) else None


def devices(run: Digest, language: str) -> Plot | None:
    """One run's power (or CPU use), clock and temperature, one above the other, with the requests' spans behind."""
    rows = [
        next((k for k in keys if k in run.curves), None)
        for keys in (("power_w", "cpu_utilization_pct"), ("sm_clock_mhz", "cpu_clock_mhz"), ("temperature_c",))
    ]
    drawn = [key for key in rows if key is not None]
    if not drawn:
        return None
    data = _spans(run, language)
    heights = [3.0, *([1.5] * (len(drawn) - 1))]
    layout: dict[str, Any] = {
        "height": 150 + 95 * int(sum(heights)),
        "yaxis9": {"overlaying": "y", "visible": False, "fixedrange": True},
    }
    bottom, gap = 1.0, 0.06
    for place, (key, height) in enumerate(zip(drawn, heights, strict=True), start=1):
        size = (1 - gap * (len(drawn) - 1)) * height / sum(heights)
        title = {"text": f"{say(key, language)}"}
        layout[_axis("yaxis", place)] = {
            "domain": [max(bottom - size, 0), bottom],
            "title": title,
            "rangemode": "tozero",
        }
        bottom -= size + gap
        for number, (label, (role, (x, y))) in enumerate(run.curves[key].items()):
            line = {
                "color": colour(role, number),
                "width": 1.5,
                "dash": _dash(_same_role_before(run.curves[key], label)),
            }
            trace = _line(x, y, label, line, 1, f"{label}<br>%{{x:.2f}} s: %{{y:.4g}} {UNITS[key]}<extra></extra>")
            trace |= {"yaxis": f"y{'' if place == 1 else place}", "legendgroup": label, "showlegend": place == 1}
            data.append(trace | {"connectgaps": False})
    layout["xaxis"] = {
        "title": {"text": say("seconds since the start of each trial", language)},
        "tickvals": run.ticks[0],
        "ticktext": run.ticks[1],
        "anchor": f"y{'' if len(drawn) == 1 else len(drawn)}",
    }
    return {"data": data, "layout": layout}


def energy(runs: Sequence[Digest], names: Sequence[str], language: str) -> Plot | None:
    """Left: each role's joules in what it did with them; right: joules per output token by role. None without a meter."""
    shown = list(zip(runs, names, strict=True))[:ENERGY_RUNS]
    parts = {
        role if role == name or len(names) == 1 else f"{name}<br>{role}": energy_tables.parts_j(one)
        for run, name in shown
        for role, one in energy_tables.roles_of(run.summary).items()
    }
    data = [
        _bar(say(part, language), list(parts), [one.get(part) for one in parts.values()], shade, "x", "J")
        for part, shade in ENERGY_SHADES.items()
        if any(one.get(part) for one in parts.values())
    ]
    per_token = {name: _by_role_j_per_token(run) for run, name in zip(runs, names, strict=True)}
    for role in dict.fromkeys(role for one in per_token.values() for role in one):
        heights = [one.get(role) for one in per_token.values()]
        data.append(_bar(role, list(per_token), heights, colour(role), "x2" if parts else "x", "J"))
    left = {"domain": [0, 0.52]} if parts else {}
    layout = {
        "barmode": "stack",
        "height": 400,
        "xaxis": {**left, "anchor": "y"},
        "yaxis": {"title": {"text": say("total_j" if parts else "j_per_output_token", language)}},
        "xaxis2": {"domain": [0.62, 1], "anchor": "y2"},
        "yaxis2": {"title": {"text": say("j_per_output_token", language)}, "anchor": "x2"},
    }
    if not parts:
        del layout["xaxis2"], layout["yaxis2"]
    return {"data": data, "layout": layout} if data else None


def _by_role_j_per_token(run: Digest) -> dict[str, float]:
    """Each role's share of the joules per output token."""
    energy = run.summary["energy"]
    total_j, per_token = energy["total_j"], energy["j_per_output_token"]
    if not total_j or not per_token:
        return {}
    return {role: round(joules / total_j * per_token, 5) for role, joules in energy["by_role_j"].items() if joules}


def _bar(
    name: str, x: list[str], y: list[float | None], shade: dict[str, Any] | str, axis: str, unit: str
) -> dict[str, Any]:
    marker = {"color": shade} if isinstance(shade, str) else shade
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "marker": marker,
        "xaxis": axis,
        "yaxis": axis.replace("x", "y"),
        "hovertemplate": f"%{{x}}: %{{y:.4g}} {unit}<extra>{name}</extra>",
    }


def trade_off(runs: Sequence[Digest], names: Sequence[str], language: str) -> Plot | None:
    """Throughput against TBT p99, a point a run; its size is the energy per token where that was measured."""
    joules = [run.summary["energy"]["j_per_output_token"] for run in runs]
    most = max((value for value in joules if value), default=None)
    data = []
    for run, name, shade, energy_j in zip(runs, names, _shades(runs), joules, strict=True):
        spread, speed = run.summary["tbt_ms"], run.summary["throughput"]["output_tokens_per_s"]
        if spread is None or speed is None:
            continue
        size = 14 if energy_j is None or most is None else 8 + 24 * (energy_j / most) ** 0.5
        more = "" if energy_j is None else f"<br>{energy_j:.4g} J"
        hover = (
            f"{name}<br>%{{x:.4g}} {say('output_tokens_per_s', language)}<br>TBT p99 %{{y:.4g}} ms{more}<extra></extra>"
        )
        marker = {"color": shade, "size": size, "opacity": 0.85}
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [speed],
                "y": [spread["p99"]],
                "marker": marker,
                "hovertemplate": hover,
            }
        )
    layout = {
        "height": 400,
        "xaxis": {"title": {"text": say("output_tokens_per_s", language)}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "TBT p99, ms"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout} if data else None


def _spans(run: Digest, language: str) -> list[dict[str, Any]]:
    """Requests as pale boxes (until the first token, then decoding), or how many were in flight when there are many."""
    shared = {
        "type": "scatter",
        "mode": "lines",
        "yaxis": "y9",
        "xaxis": "x",
        "hoverinfo": "skip",
        "line": {"width": 0},
    }
    if run.in_flight[0]:
        name, fill = say("requests in flight", language), {"fill": "tozeroy", "fillcolor": "rgba(120,130,140,0.22)"}
        return [shared | fill | {"name": name, "x": run.in_flight[0], "y": run.in_flight[1]}]
    traces = []
    for name, shade, begin in (
        ("until the first token", "rgba(213,94,0,0.26)", 0),
        ("decoding", "rgba(0,114,178,0.13)", 1),
    ):
        x: list[float | None] = []
        y: list[float | None] = []
        for span in run.spans:
            start, end, low, high = span[begin], span[begin + 1], span.row + 0.06, span.row + 0.94
            x += [start, end, end, start, start, None]
            y += [low, low, high, high, low, None]
        traces.append(shared | {"name": say(name, language), "x": x, "y": y, "fill": "toself", "fillcolor": shade})
    return traces if run.spans else []


def _line(x: Any, y: Any, name: str, line: dict[str, Any], place: int, hover: str) -> dict[str, Any]:
    suffix = "" if place == 1 else str(place)
    trace = {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": line, "hovertemplate": hover}
    return trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def _axis(name: str, place: int) -> str:
    return name if place == 1 else f"{name}{place}"


def _shades(runs: Sequence[Digest]) -> list[str]:
    return colours([run.name for run in runs]) if len(runs) > 1 else [colour(run.name) for run in runs]


def _dash(number: int) -> str:
    return DASHES[number // 7 % len(DASHES)] if number >= 7 else "solid"


def _same_role_before(curves: dict[str, tuple[str, Points]], label: str) -> int:
    labels = [other for other, (role, _) in curves.items() if role == curves[label][0]]
    return 7 * labels.index(label)


def _wide(curves: Sequence[Points]) -> bool:
    """Do the values span more than a factor of eight, their lowest and highest hundredth left out?"""
    heights = sorted(value for x, _ in curves for value in x if value)
    return bool(heights) and heights[int(0.99 * (len(heights) - 1))] > 8 * heights[int(0.01 * len(heights))]
