"""The live page's charts, described as the report's are; every series is a growing line of the state."""

import re
from collections.abc import Sequence

from pdbench.analysis.curves import SERVER_FIELDS
from pdbench.analysis.energy import why_not_measured
from pdbench.live.state import LATENCIES, State, device_id
from pdbench.report import text
from pdbench.report.chart_types import Axis, Chart, Panel, Series, shades
from pdbench.report.charts import device_lines
from pdbench.report.text import translate as _


def charts(state: State) -> list[tuple[Chart, list[tuple[str, str]]]]:
    """Each chart that has something to draw, with the keys of its lines in the order of its series."""
    drawn = [(figure in SERVER_FIELDS, name_of(of)) for figure, of in state.lines if figure in _COLOURED]
    colour: dict[str, str] = {}
    for servers in (False, True):  # each group by its own: a server has the colour of its role
        names = [name for is_server, name in dict.fromkeys(drawn) if is_server == servers and name not in colour]
        colour |= zip(names, shades([re.sub(r"-\d+$", "", name) for name in names]), strict=True)
    window = (
        _("over the last {0} s, of requests that ended in them", 10) if state.turn else _("over the last {0} s", 10)
    )
    latencies = _("p99 (solid) and p50 (dotted), {0}.", window)
    described = [
        _chart("latency", _("Latency"), latencies, [(name, text.title(name)) for name in LATENCIES], state, colour),
        _chart("speed", _("Throughput and energy"), _of_speed(state), _SPEED, state, colour),
        _chart("instances", _("Servers"), _("What the servers' own metrics say."), _INSTANCES, state, colour),
        _devices(state),
    ]
    return [(chart, keys) for chart, keys in described if chart.drawable]


_SPEED = (
    ("output_tokens_per_s", "Output tokens/s"),
    ("in_flight", "Requests in flight"),
    ("j_per_output_token", "Energy per output token"),
)
_INSTANCES = (("running", "Requests running"), ("waiting", "Requests waiting"), ("kv_used", "KV cache in use"))
_COLOURED = (*LATENCIES, *(figure for figure, _title in (*_SPEED, *_INSTANCES)))
_DEVICES = (
    ("power_w", "Power of each device"),
    ("gpu_utilization_pct", "Utilisation"),
    ("cpu_utilization_pct", "CPU use of each role's processes"),
    ("sm_clock_mhz", "Clocks"),
    ("cpu_clock_mhz", "CPU clock"),
    ("temperature_c", "Temperature"),
)


def _chart(
    key: str, title: str, caption: str, figures: Sequence[tuple[str, str]], state: State, colour: dict[str, str]
) -> tuple[Chart, list[tuple[str, str]]]:
    """Panels beside each other, one per figure that has a line."""
    panels, keys = [], []
    for figure, words in figures:
        series = []
        for (known, of), line in state.lines.items():
            if known == figure:
                name = name_of(of)
                style = "dot" if of.endswith(" p50") else "solid"
                series.append(
                    Series(name=_(name) + of[len(name) :], x=line.x, y=line.y, shade=colour[name], dash=style)
                )
                keys.append((figure, of))
        label = text.label(figure) if figure in text.METRICS else _(words) + (", %" if figure == "kv_used" else "")
        panels.append(Panel(title=_(words), series=series, x=_seconds(), y=Axis(label=label, low=0)))
    return Chart(key=key, title=title, panels=panels, caption=caption), keys


def _of_speed(state: State) -> str:
    if any(figure == "power_w" for figure, _of in state.lines):
        return _("Tokens and energy per token over the last {0} s.", 10)
    reason = why_not_measured([*state.devices.values()], ("power_w",))
    return _("Tokens over the last {0} s; energy not measured: {1}.", 10, _(reason))


def _seconds() -> Axis:
    """From the first point on: servers start before it, for minutes."""
    return Axis(label=_("seconds since the start"))


def name_of(of: str) -> str:
    """Whose quantile it is."""
    return of.removesuffix(" p50").removesuffix(" p99")


def _devices(state: State) -> tuple[Chart, list[tuple[str, str]]]:
    panels, keys = [], []
    for figure, words in _DEVICES:
        lines = [(state.devices[of], of, line) for (known, of), line in state.lines.items() if known == figure]
        keys += [(figure, of) for _device, of, _line in lines]
        series = device_lines(
            figure, [(device_id(device), device.role, device.kind, line) for device, _of, line in lines]
        )
        y = Axis(label=text.label(figure), low=0)
        panels.append(
            Panel(title=_(words), series=series, x=_seconds(), y=y, height=3.0 if figure == "power_w" else 2.0)
        )
    title = _("Devices")
    return Chart(
        key="devices", title=title, panels=panels, shared_x=True, caption=_("What each device reported last.")
    ), keys
