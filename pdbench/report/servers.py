"""What the servers of a run counted: a chart of queues and KV caches below each request's TTFT, and a table."""

import numpy as np

from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import chart_types as colours
from pdbench.report import charts, text
from pdbench.report.chart_types import SHADES, SPARE, Axis, Chart, Panel, Series
from pdbench.report.tables import Table, Value
from pdbench.report.text import translate as _

POINTS = 2000
MARKS = (colours.VERMILLION, colours.PURPLE, colours.ORANGE, colours.YELLOW)
COLUMNS = {
    "running_mean": "running",
    "waiting_mean": "waiting",
    "waiting_max": "most waiting",
    "queue_ms": "queue, ms",
    "kv_used_max_pct": "KV used, most %",
    "preemptions": "preempted",
    "cached_pct": "cached, %",
    "accepted_pct": "accepted, %",
    "external_tokens": "external KV",
}


def curves(analysis: RunAnalysis, name: str, key: str = "servers") -> Chart:
    """TTFT of each request when it was sent, marks where servers said something, requests running and waiting, KV caches."""
    counted, axis, requests = analysis.curves.servers, analysis.curves.axis, analysis.requests
    chosen = np.linspace(0, len(requests.id) - 1, min(len(requests.id), POINTS)).astype(int)
    ttft = Series(
        kind="points", x=axis.place(requests.sent_s)[chosen], y=requests.ttft_ms[chosen], size=4, shade=colours.GREY
    )
    marks = [
        Series(kind="points", name=flag, x=x, y=np.zeros(len(x)), marker="x", size=8, shade=MARKS[place % len(MARKS)])
        for place, (flag, x) in enumerate(analysis.curves.server_marks.items())
    ]
    waiting = [
        *_lines(analysis, "running", _("{0} running"), "dot"),
        *_lines(analysis, "waiting", _("{0} waiting"), "solid"),
    ]
    used, x = _lines(analysis, "kv_used", "{0}", "solid"), charts.run_time(axis)
    panels = [
        Panel(title=title, series=series, x=x, y=y, lines=axis.joints, pauses=axis.pauses, height=2.0)
        for title, series, y in (
            (_("TTFT by the instant of sending"), [ttft, *marks], Axis(label=text.label("ttft_ms"), low=0)),
            (_("Requests running (dotted) and waiting"), waiting, Axis(label=_("requests"), low=0)),
            ("", used, Axis(label=_("KV cache in use") + ", %", low=0, high=105)),
        )
    ]
    caption = _(
        "What each server counted, warm-up included, below the TTFT of each request: a queue, a full KV cache or a mark under a slow one is its reason."
    )
    return Chart(
        key=key, title=_("Servers: {0}", name), panels=panels if counted else [], caption=caption, shared_x=True
    )


def _lines(analysis: RunAnalysis, field: str, name: str, dash: str) -> list[Series]:
    """A line per server in its role's colour; further ones of a role in others."""
    lines, servers, taken = [], analysis.summary.servers, list[str]()
    for place, (server, curve) in enumerate(analysis.curves.servers.get(field, {}).items()):
        shade = SHADES.get(servers[server].role, SPARE[place % len(SPARE)])
        shade = next((spare for spare in SPARE if spare not in taken), shade) if shade in taken else shade
        taken.append(shade)
        lines.append(Series(name=name.format(server), x=curve.x, y=curve.y, shade=shade, dash=dash))
    return lines


def table(runs: text.Runs) -> list[Table]:
    """A row per server over all loads; only columns that a server tells."""
    rows = {
        (name, server): summary.loads
        for name, analysis in runs.items()
        for server, summary in analysis.summary.servers.items()
    }
    shown = [column for column in COLUMNS if any(getattr(figures, column) is not None for figures in rows.values())]
    cells: list[list[Value]] = [
        [server if len(runs) == 1 else f"{name}, {server}", *(getattr(figures, column) for column in shown)]
        for (name, server), figures in rows.items()
    ]
    header = [_("server"), *(_(COLUMNS[column]) for column in shown)]
    title = _("Servers during the loads, by their own counters")
    return [Table(title=title, header=header, rows=cells)] if shown else []
