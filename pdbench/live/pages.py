"""What the viewer sends to browsers: the page, its status, figures, and the report at the end."""

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from plotly.offline import get_plotlyjs

from pdbench.analysis.compare import comparisons
from pdbench.analysis.run_analysis import load_analysis
from pdbench.live.state import LATENCIES, State
from pdbench.report import commands, page, tables, text
from pdbench.report.chart_types import Chart
from pdbench.report.text import translate as _

LOG_LINES = 50
_environment = Environment(
    loader=ChoiceLoader([PackageLoader("pdbench.live", "."), PackageLoader("pdbench.report", ".")]),
    autoescape=True,
    trim_blocks=True,
)
_environment.globals["_"] = _


def live_page() -> str:
    return _live_page(text.LANGUAGE.get())


@cache
def _live_page(language: str) -> str:
    words = {
        "lost": _("The connection is lost; trying again."),
        "killed": _("The measurement was killed: it ended without a word. This is what it had shown until then."),
        "report": _("show the report"),
        "no_report": _("The report could not be made: read the terminal."),
    }
    return _environment.get_template("live.html.j2").render(
        lang="zh-Hans" if language == "zh" else "en",
        words=words,
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def figure(chart: Chart) -> dict[str, Any]:
    return {"key": chart.key, "title": chart.title, "caption": chart.caption, "plot": page.plotly_figure(chart)}


def report(folders: Sequence[str]) -> str:
    """The report's page of what was saved."""
    return _report(tuple(map(Path, folders)), text.LANGUAGE.get())


@cache
def _report(folders: tuple[Path, ...], language: str) -> str:
    analyses = [load_analysis(folder) for folder in folders]
    runs = dict(zip(commands.names_of(analyses, folders), analyses, strict=True))
    return page.page(runs, comparisons(runs), tables.side_by_side(runs, None))


def status(state: State) -> dict[str, Any]:
    """The status as HTML and, when it is over, how it ended."""
    log = [(clock(at_s), _(line.words, *map(_, line.values)), line.is_problem) for at_s, line in state.log[-LOG_LINES:]]
    flags = [(f"{run}, {flag.name}" if run else flag.name, _(flag.detail)) for run, flag in state.flags]
    for run, kinds in state.failed.items():
        flags.append((f"{run}, {_('failed requests')}", ", ".join(f"{kind} {count}" for kind, count in kinds.items())))
    times = [_("{0} since the start", _duration(state.now_s - state.began_s))]
    if state.left:
        told_s, seconds = state.left
        times.append(_("about {0} left", _duration(max(0.0, seconds - (state.now_s - told_s)))))
    html = _environment.get_template("status.html.j2").render(
        stage=log[-1][1] if log else "", times=" · ".join(times), flags=flags, tiles=tiles(state), log=log[::-1]
    )
    end = state.end and {
        "words": _("ended: {0}", state.end.problem) if state.end.problem else _("It has ended."),
        "problem": bool(state.end.problem),
        "report": bool(state.end.folders),
    }
    return {"html": html, "lost": state.lost, "end": end}


def tiles(state: State) -> list[tuple[str, str, str]]:
    """(name, value, what belongs to it) of what is known now."""
    shown = []
    if state.turn:
        done = state.progress
        shown.append((_("Deployment"), state.deployment, _("trial {0}", state.turn.trial + 1)))
        count = _("{0} of {1}", done.done, done.total or "?") if done else _("warm-up")
        shown.append((_("Requests"), count, _("{0} failed", state.failed_now) if state.failed_now else ""))
    for figure, of in state.latest:
        value = text.number(state.latest[figure, of])
        if figure in LATENCIES and of.endswith(" p50"):
            name = of.removesuffix(" p50")
            rest = f"p99 {text.number(state.latest.get((figure, f'{name} p99')))}"
            shown.append((_of(text.label(figure).replace(", ", " p50, "), name, state), value, rest))
        elif figure == "in_flight":
            shown.append((_("Requests in flight"), f"{state.latest[figure, of]:.0f}", ""))
        elif figure in ("output_tokens_per_s", "j_per_output_token"):
            shown.append((_of(text.label(figure), of, state), value, ""))
        elif figure == "running":
            waiting, kv = (state.latest.get((name, of)) for name in ("waiting", "kv_used"))
            rest = _("running, {0} waiting, KV {1} %", "–" if waiting is None else f"{waiting:.0f}", text.number(kv))
            shown.append((of, f"{state.latest[figure, of]:.0f}", rest))
        elif figure == "power_w":
            shown.append((_of(text.title(figure), of, None), f"{value} W", ""))
    return shown


def _of(title: str, name: str, state: State | None) -> str:
    """A title with the name of what it is of, where that is not clear."""
    return title if state and state.turn else f"{title}: {_(name)}"


def clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - time.monotonic() + at_s))


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02d}:{int(seconds) % 60:02d}"
