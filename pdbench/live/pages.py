"""What the viewer sends to browsers: the page, its charts (described as the report's are), its status, and the report at the end."""

import re
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pdbench.analysis.compare import comparisons
from pdbench.analysis.curves import SERVER_FIELDS
from pdbench.analysis.energy import why_not_measured
from pdbench.analysis.run_analysis import load_analysis
from pdbench.live.state import DEVICE_FIELDS, WINDOW_S, State
from pdbench.report import commands, page, tables, text
from pdbench.report.chart_types import Axis, Chart, Panel, Series, shades
from pdbench.report.charts import device_lines
from pdbench.report.text import translate as _

LOG_LINES = 50
WAITING = "No curves yet: they begin with the first reading of a device or server, or the first request; until then servers start."
_SPEED = {
    "output_tokens_per_s": "Output tokens/s",
    "in_flight": "Requests in flight",
    "j_per_output_token": "Energy per output token",
}
_INSTANCES = {"running": "Requests running", "waiting": "Requests waiting", "kv_used": "KV cache in use"}
_templates = page.environment("pdbench.live")

DrawnChart = tuple[Chart, list[tuple[str, str]]]
"""A chart with the keys of its lines in `State.lines`, in the order of its series."""


@cache
def live_page(language: str) -> str:
    with text.language(language):
        words = {
            "lost": _("The connection is lost; trying again."),
            "killed": _("The measurement was killed: it ended without a word. This is what it had shown until then."),
            "report": _("show the report"),
            "no_report": _("The report could not be made: read the terminal."),
        }
        return _templates.get_template("live.html.j2").render(words=words)


@cache
def report(folders: tuple[str, ...], language: str) -> str:
    with text.language(language):
        paths = [*map(Path, folders)]
        analyses = [load_analysis(path) for path in paths]
        runs = dict(zip(commands.names_of(analyses, paths), analyses, strict=True))
        return page.page(runs, comparisons(runs), tables.side_by_side(runs))


def charts(state: State) -> list[DrawnChart]:
    """Each chart that has something to draw; every series is a growing line of the state."""
    coloured = {*tables.LATENCIES, *_SPEED, *_INSTANCES}
    drawn = [(figure in SERVER_FIELDS, _name_of(of)) for figure, of in state.lines if figure in coloured]
    colours: dict[str, str] = {}
    for servers in (False, True):  # each group by its own: a server has the colour of its role
        names = [name for is_server, name in dict.fromkeys(drawn) if is_server == servers and name not in colours]
        colours |= zip(names, shades([re.sub(r"-\d+$", "", name) for name in names]), strict=True)
    seconds = int(WINDOW_S)
    window = _("over the last {0} s, of requests that ended in them" if state.turn else "over the last {0} s", seconds)
    latencies = {name: text.title(name) for name in tables.LATENCIES}
    speed = _("Tokens and energy per token over the last {0} s.", seconds)
    if not any(figure == "power_w" for figure, _of in state.lines):
        reason = why_not_measured([*state.devices.values()], ("power_w",))
        speed = _("Tokens over the last {0} s; energy not measured: {1}.", seconds, _(reason))
    described = [
        _chart("latency", _("Latency"), _("p99 (solid) and p50 (dotted), {0}.", window), latencies, state, colours),
        _chart("speed", _("Throughput and energy"), speed, _SPEED, state, colours),
        _chart("instances", _("Servers"), _("What the servers' own metrics say."), _INSTANCES, state, colours),
        _devices(state),
    ]
    return [(chart, keys) for chart, keys in described if chart.drawable]


def _chart(
    key: str, title: str, caption: str, figures: Mapping[str, str], state: State, colours: Mapping[str, str]
) -> DrawnChart:
    """Panels beside each other, one per figure (with its title) that has a line."""
    panels, keys = [], []
    for figure, words in figures.items():
        series = []
        for (known, of), line in state.lines.items():
            if known == figure:
                name = _name_of(of)
                dash, shown = "dot" if of.endswith(" p50") else "solid", _(name) + of[len(name) :]
                series.append(Series(name=shown, x=line.x, y=line.y, shade=colours[name], dash=dash))
                keys.append((figure, of))
        label = text.label(figure) if figure in text.METRICS else _(words) + (", %" if figure == "kv_used" else "")
        panels.append(Panel(title=_(words), series=series, x=_seconds(), y=Axis(label=label, low=0)))
    return Chart(key=key, title=title, panels=panels, caption=caption), keys


def _devices(state: State) -> DrawnChart:
    panels, keys = [], []
    for figure, words in DEVICE_FIELDS.items():
        lines = {of: line for (known, of), line in state.lines.items() if known == figure}
        keys += [(figure, of) for of in lines]
        devices = [(state.devices[of].label, state.devices[of], line) for of, line in lines.items()]
        series = device_lines(figure, [(name, device.role, device.kind, line) for name, device, line in devices])
        y, height = Axis(label=text.label(figure), low=0), 3.0 if figure == "power_w" else 2.0
        panels.append(Panel(title=_(words), series=series, x=_seconds(), y=y, height=height))
    caption = _("What each device reported last.")
    return Chart(key="devices", title=_("Devices"), panels=panels, shared_x=True, caption=caption), keys


def _seconds() -> Axis:
    """From the first point on: servers start before it, for minutes."""
    return Axis(label=_("seconds since the start"))


def _name_of(of: str) -> str:
    """Whose quantile it is."""
    return of.removesuffix(" p50").removesuffix(" p99")


def figure(chart: Chart) -> dict[str, Any]:
    return {"key": chart.key, "title": chart.title, "caption": chart.caption, "plot": page.plotly_figure(chart)}


def status(state: State) -> dict[str, Any]:
    """As HTML and, when it is over, how it ended."""
    zero_s = time.time() - time.monotonic()
    log = [
        (time.strftime("%H:%M:%S", time.localtime(zero_s + at_s)), _(line.words, *map(_, line.values)), line.is_problem)
        for at_s, line in state.log[-LOG_LINES:]
    ]
    flags = [(f"{run}, {flag.name}" if run else flag.name, _(flag.detail)) for run, flag in state.flags]
    for run, kinds in state.failed.items():
        flags.append((f"{run}, {_('failed requests')}", ", ".join(f"{kind} {count}" for kind, count in kinds.items())))
    times = [_("{0} since the start", _duration(state.now_s - state.began_s))]
    if state.left:
        told_s, seconds = state.left
        times.append(_("about {0} left", _duration(max(0.0, seconds - (state.now_s - told_s)))))
    waiting = "" if state.lines or state.end or state.lost else _(WAITING)
    html = _templates.get_template("status.html.j2").render(
        stage=log[-1][1] if log else _("Waiting for the measurement to report."),
        times=" · ".join(times),
        waiting=waiting,
        flags=flags,
        tiles=tiles(state),
        log=log[::-1],
    )
    end = state.end and {
        "words": _("ended: {0}", state.end.problem) if state.end.problem else _("It has ended."),
        "problem": bool(state.end.problem),
        "report": bool(state.end.folders),
    }
    return {"html": html, "lost": state.lost, "end": end}


def tiles(state: State) -> list[tuple[str, str, str]]:
    """(name, value, what belongs to it) of what is known now."""

    def named(title: str, of: str) -> str:
        """With what it is of, where that is not clear."""
        return title if state.turn else f"{title}: {_(of)}"

    shown = []
    if state.turn:
        done = state.progress
        shown.append((_("Deployment"), state.deployment, _("trial {0}", state.turn.trial + 1)))
        count = _("{0} of {1}", done.done, done.total or "?") if done else _("warm-up")
        shown.append((_("Requests"), count, _("{0} failed", state.failed_now) if state.failed_now else ""))
    for (figure, of), value in state.latest.items():
        if figure in tables.LATENCIES and of.endswith(" p50"):
            name = of.removesuffix(" p50")
            rest = f"p99 {text.number(state.latest.get((figure, f'{name} p99')))}"
            shown.append((named(text.label(figure).replace(", ", " p50, "), name), text.number(value), rest))
        elif figure == "in_flight":
            shown.append((_("Requests in flight"), f"{value:.0f}", ""))
        elif figure in ("output_tokens_per_s", "j_per_output_token"):
            shown.append((named(text.label(figure), of), text.number(value), ""))
        elif figure == "running":
            waiting, kv = (state.latest.get((name, of)) for name in ("waiting", "kv_used"))
            rest = _("running, {0} waiting, KV {1} %", "–" if waiting is None else f"{waiting:.0f}", text.number(kv))
            shown.append((of, f"{value:.0f}", rest))
        elif figure == "power_w":
            shown.append((f"{text.title(figure)}: {_(of)}", f"{text.number(value)} W", ""))
    return shown


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02d}:{int(seconds) % 60:02d}"
