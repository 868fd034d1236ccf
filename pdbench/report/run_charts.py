"""The charts of runs, built from `RunAnalysis`; several runs share a chart, each with its colour."""

from collections.abc import Sequence

import numpy as np

from pdbench.analysis.compare import Comparison
from pdbench.analysis.curves import DeviceCurve
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.report import tables, text
from pdbench.report.charts import (
    BAD, BLUE, FAINT, GOOD, GREEN, GREY, MUTED, ORANGE, PURPLE, SPARE, VERMILLION, Axis, Chart, Panel, Series, dash, shade, shades,
)  # fmt: skip
from pdbench.report.text import translate as _

VERDICTS = {"better": GOOD, "worse": BAD}
ENERGY_PARTS = {
    "active_j": ("active: above idle, in its phase", ORANGE, ""),
    "idle_j": ("idle draw during its phase", GREY, ""),
    "waiting_j": ("waiting: no request in its phase", FAINT, "/"),
}
TTFT_PARTS = {
    "queue": "queue",
    "prefill": "prefill",
    "kv_transfer": "KV transfer",
    "decode": "decode's first step",
    "other": "unattributed",
}
SPANS_DRAWN = 3000


def latency_distributions(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """Share of values at or below each latency, with p50, p90 and p99 marked; logarithmic where they span a decade."""
    panels = []
    for key, title in (("ttft", "TTFT, ms"), ("tbt", "TBT, every gap, ms"), ("e2e", "E2E, ms")):
        curves = [analysis.curves.quantiles[key] for analysis in analyses]
        drawn = []
        for number, (analysis, curve, colour) in enumerate(zip(analyses, curves, _shades(analyses), strict=True)):
            spread = getattr(analysis.summary, f"{key}_ms")
            if spread is not None:
                line = {"name": names[number], "shade": colour, "dash": dash(number)}
                drawn.append(Series(kind="step", x=curve.x, y=curve.y, width=2, **line))
                drawn.append(
                    Series(kind="points", x=[spread.p50, spread.p90, spread.p99], y=[50, 90, 99], shade=colour)
                )
        everything = np.sort(np.concatenate([curve.x for curve in curves]))
        positive = everything[everything > 0]
        log = len(positive) > 0 and positive[int(0.99 * (len(positive) - 1))] > 8 * positive[int(0.01 * len(positive))]
        low = float(positive[int(0.005 * len(positive))]) * 0.8 if log else 0.0
        panels.append(
            Panel(
                title=_(title),
                series=drawn,
                x=Axis(label=_(title), log=log, low=low, high=float(everything[-1]) * 1.05 if len(everything) else 1.0),
                y=Axis(label=_("% at or below"), low=0, high=103, ticks=([0, 50, 90, 99], ["0", "p50", "p90", "p99"])),
                not_measured=_("no request succeeded"),
            )
        )
    caption = _("Share of values at or below each time: a curve further left is faster. Click a name to hide it.")
    return Chart(key="distributions", title=_("Latency distributions"), panels=panels, caption=caption)


def ttft_parts(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """The mean TTFT of each run split by the reported instants: a bar per part of one run, a stacked bar per run of several."""
    known = [
        (name, parts)
        for name, analysis in zip(names, analyses, strict=True)
        if (parts := analysis.curves.ttft_parts_ms)
    ]
    keys = [key for key in TTFT_PARTS if any(key in parts for _name, parts in known)]
    single = len(analyses) == 1
    drawn = []
    for key in keys:
        values = [parts.get(key, 0.0) for _name, parts in known]
        labels = [f"{text.number(value)} ms" for value in values] if single else ()
        rows = [_(TTFT_PARTS[key])] if single else [name for name, _parts in known]
        drawn.append(Series(kind="hbar", name=_(TTFT_PARTS[key]), x=values, y=rows, labels=labels, shade=shade(key)))
    rows = [_(TTFT_PARTS[key]) for key in keys] if single else [name for name, _parts in known]
    panel = Panel(
        title=_("Where TTFT goes"),
        series=drawn,
        x=Axis(label=_("mean TTFT, ms"), low=0),
        y=Axis(names=rows),
        stacked=not single,
        not_measured=_("no proxy and no connector reported this deployment's phases"),
    )
    caption = _(
        "Mean TTFT, split by the instants that client, proxy and connector reported; a deployment that reported none is absent."
    )
    return Chart(key="ttft", title=_("Where TTFT goes"), panels=[panel], caption=caption)


def tbt_over_time(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """p50 and p99 of the gaps between tokens as the load goes on; every gap where there are few."""
    drawn = []
    for name, analysis, colour in zip(names, analyses, _shades(analyses), strict=True):
        for quantile, style in (("p99", "solid"), ("p50", "dot")):
            curve = analysis.curves.tbt_over_time[quantile]
            if np.isfinite(curve.y).any():
                drawn.append(
                    Series(name=f"{name} {quantile}", x=curve.x, y=curve.y, shade=colour, dash=style, width=1.6)
                )
        # TODO gaps
    panel = Panel(
        title=_("TBT over time"),
        series=drawn,
        x=Axis(label=_("seconds of load, pauses left out")),
        y=Axis(label=_("TBT, ms"), low=0),
    )
    caption = _("p99 (solid) and p50 (dotted) of the gaps between tokens as the load went on.")
    return Chart(key="tbt", title=_("TBT over time"), panels=[panel], caption=caption)


def device_curves(analysis: RunAnalysis, name: str, key: str = "devices", spans: int = SPANS_DRAWN) -> Chart:
    """Power (or CPU use), clocks and temperature of each device, with the requests behind: boxes up to `spans`, else a count."""
    curves, axis = analysis.curves, analysis.curves.axis
    several = len(axis.stretches) > 1
    seconds = _("seconds since the start of each trial, pauses left out") if several else _("seconds")
    x = Axis(label=seconds, low=0, high=axis.length_s, ticks=(axis.ticks, axis.tick_labels))
    if "power_w" in curves.devices or "cpu_utilization_pct" not in curves.devices:
        first, title = "power_w", _("Power of each device, requests behind (darker until the first token)")
    else:
        first = "cpu_utilization_pct"
        title = _("CPU use of each role's processes, requests behind (darker until the first token)")
    gpus = "sm_clock_mhz" in curves.devices
    clock = _("Clocks (graphics solid, memory dashed)") if gpus else _("CPU clock")
    layout = (
        (title, (first,), 3.0),
        (clock, ("sm_clock_mhz", "memory_clock_mhz") if gpus else ("cpu_clock_mhz",), 1.5),
        (_("Temperature"), ("temperature_c",), 1.5),
    )
    panels = []
    for place, (title, fields, height) in enumerate(layout):
        drawn = [
            line
            for number, field_name in enumerate(fields)
            for line in _device_lines(curves.devices.get(field_name, []), memory=number == 1)
        ]
        highest = max((float(np.nanmax(line.y)) for line in drawn), default=1.0)
        behind = _requests_behind(analysis, spans) if place == 0 and drawn else []
        panels.append(
            Panel(
                title=title,
                series=[*behind, *drawn],
                x=x,
                y=Axis(label=text.label(fields[0]), low=0, high=highest * 1.15 or 1),
                pauses=axis.pauses,
                not_measured=text.reasons(curves.not_measured.get(fields[0], "")),
                height=height,
            )
        )
    caption = _(
        "Device curves with the requests behind, warm-up included: darker until the first token, paler while decoding."
    )
    if curves.spans is None or len(curves.spans.row) > spans:
        caption = _("Device curves with the number of requests under way behind (grey), warm-up included.")
    if "power_w" in curves.not_measured:
        caption += f" ({text.power_missing(analysis)})"
    return Chart(key=key, title=_("Devices: {0}", name), panels=panels, caption=caption, below=True)


def _device_lines(curves: Sequence[DeviceCurve], memory: bool) -> list[Series]:
    roles = [curve.role or curve.kind for curve in curves]
    lines = []
    for number, curve in enumerate(curves):
        role = roles[number]
        name = f"{role} ({curve.device})" if roles.count(role) > 1 or not curve.role else role
        lines.append(
            Series(
                name=_("{0}, memory", name) if memory else name,
                x=curve.curve.x,
                y=curve.curve.y,
                shade=shade(role, number),
                dash="dash" if memory else dash(len(SPARE) * roles[:number].count(role)),
                width=1.0 if memory else 1.5,
            )
        )
    return lines


def _requests_behind(analysis: RunAnalysis, most: int) -> list[Series]:
    spans, flying = analysis.curves.spans, analysis.curves.in_flight
    if spans is None or len(spans.row) > most:
        name = _("requests in flight")
        return [Series(kind="area", name=name, x=flying.x, y=flying.y, shade=GREY, opacity=0.25, behind=True)]
    parts = (
        (_("requests until their first token"), spans.sent_s, spans.first_s, ~spans.failed, VERMILLION, 0.30),
        (_("requests decoding"), spans.first_s, spans.end_s, ~spans.failed, BLUE, 0.11),
        (_("failed requests"), spans.sent_s, spans.end_s, spans.failed, BAD, 0.35),
    )
    return [
        Series(
            kind="boxes",
            name=name,
            x=np.stack([start[which], end[which]], axis=1),
            y=spans.row[which],
            shade=colour,
            opacity=opacity,
            behind=True,
        )
        for name, start, end, which, colour, opacity in parts
        if which.any()
    ]


def energy_parts(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """What each role did with its joules, then joules per output token by role; no panel for what no run has."""
    roles, per_token = {}, {}
    for name, analysis in zip(names, analyses, strict=True):
        for role, energy in analysis.summary.energy.roles.items():
            if energy.total_j is not None:
                roles[role if role == name or len(names) == 1 else f"{name}, {role}"] = energy
            if energy.j_per_output_token is not None:
                per_token.setdefault(role, {})[name] = energy.j_per_output_token
    parts = {row: tables.energy_parts(energy) for row, energy in roles.items()}
    totals = {row: sum(values.values()) for row, values in parts.items()}
    drawn = []
    for part, (title, colour, hatch) in ENERGY_PARTS.items():
        rows = [row for row in parts if part in parts[row]]
        labels = [text.number(totals[row]) if part == list(parts[row])[-1] else "" for row in rows]
        joules = [parts[row][part] for row in rows]
        if rows:
            drawn.append(Series(kind="hbar", name=_(title), x=joules, y=rows, labels=labels, shade=colour, hatch=hatch))
    used = Panel(
        title=_("Where each role's energy goes"),
        series=drawn,
        x=Axis(label=_("energy, J"), low=0),
        y=Axis(names=list(parts)),
        stacked=True,
    )
    bars = [
        Series(kind="hbar", name=role, x=list(values.values()), y=list(values), shade=shade(role))
        for role, values in per_token.items()
    ]
    token = Panel(
        title=_("Energy per output token"),
        series=bars,
        x=Axis(label=text.label("j_per_output_token"), low=0),
        y=Axis(names=[name for name in names if any(name in values for values in per_token.values())]),
        stacked=True,
    )
    caption = _(
        "The measured windows, failed requests' energy included: what each role did with its joules, and J per output token."
    )
    return Chart(
        key="energy", title=_("Energy"), panels=[panel for panel in (used, token) if panel.series], caption=caption
    )


def trade_off(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """Throughput against TBT p99, a point per run; the more energy per token, the larger."""
    joules = [analysis.summary.energy.j_per_output_token for analysis in analyses]
    most = max((value for value in joules if value), default=0.0)
    drawn = []
    for name, analysis, colour, energy in zip(names, analyses, _shades(analyses), joules, strict=True):
        spread, speed = analysis.summary.tbt_ms, analysis.summary.throughput.output_tokens_per_s
        if spread is not None and speed is not None:
            size = 8 + 24 * (energy / most) ** 0.5 if energy and most else 14
            drawn.append(
                Series(kind="points", name=name, x=[speed], y=[spread.p99], shade=colour, size=size, opacity=0.85)
            )
    panel = Panel(
        title=_("Throughput against latency"),
        series=drawn,
        x=Axis(label=text.label("output_tokens_per_s"), low=0),
        y=Axis(label=text.label("tbt_p99_ms"), low=0),
    )
    caption = _(
        "Lower and further right is better; a larger dot costs more energy per token (equal dots: not measured)."
    )
    return Chart(key="trade-off", title=_("Throughput against latency"), panels=[panel], caption=caption)


def verdicts(comparison: Comparison) -> Chart:
    """A row per metric: its change with the 95 % interval on a logarithmic scale, its values and its verdict."""
    lines, widest = comparison.differences, 1.25
    x, low, high, colours, rows = [], [], [], [], []
    for line in lines:
        bounds = (line.ratio.value, line.ratio.low, line.ratio.high) if line.ratio else (line.change or np.nan,) * 3
        for values, value in zip((x, low, high), bounds, strict=True):
            values.append(value)
        colours.append(VERDICTS.get(line.verdict, MUTED))
        rows.append((text.title(line.metric.name), text.values(line), text.judgement(line)))
        if not text.too_wide(line.ratio):
            widest = np.nanmax([widest, bounds[2], 1 / bounds[1]])
    reach = float(widest) ** 1.05
    steps = [step for step in (1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if step <= reach]
    steps = [steps[-4], steps[-1]] if len(steps) > 4 and reach > 10 else steps[-2:]
    ticks = [*(1 / step for step in reversed(steps)), 1, *steps]
    labels = [*(f"÷{step:g}" for step in reversed(steps)), "1", *(f"×{step:g}" for step in steps)]
    drawn = (
        [Series(kind="interval", x=x, y=list(range(len(lines))), low=low, high=high, shade=colours)] if lines else []
    )
    panel = Panel(
        title=text.advice(comparison) or _("change and 95 % interval"),
        series=drawn,
        x=Axis(log=True, low=1 / reach, high=reach, ticks=(ticks, labels)),
        y=Axis(names=[title for title, _values, _judgement in rows]),
        rows=rows,
        not_measured=_("these runs share no metric"),
    )
    title = _("{0} against {1}", comparison.names[1], comparison.names[0])
    return Chart(
        key="verdicts",
        title=title,
        panels=[panel],
        caption=_("Change and its 95 % interval, {0} being 1.", comparison.names[0]),
    )


def side_by_side(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> Chart:
    """Up to four figures of each run as bars: the first that were measured of speed, power, energy, goodput."""
    figures = {
        "output_tokens_per_s": lambda summary: summary.throughput.output_tokens_per_s,
        "output_tokens_per_s_per_device": lambda summary: summary.throughput.output_tokens_per_s_per_device,
        "mean_power_w": lambda summary: summary.energy.mean_power_w,
        "j_per_output_token": lambda summary: summary.energy.j_per_output_token,
        "goodput_requests_per_s": lambda summary: summary.goodput.requests_per_s,
        "requests_per_s": lambda summary: summary.throughput.requests_per_s,
    }
    panels = []
    for metric, pick in figures.items():
        values = [pick(analysis.summary) for analysis in analyses]
        if any(value is not None for value in values) and len(panels) < 4:
            labels = [_("not measured") if value is None else text.number(value) for value in values]
            heights = [value or 0.0 for value in values]
            colours = _shades(analyses)
            bars = Series(kind="bar", x=list(names), y=heights, labels=labels, shade=colours)
            top = max(heights) * 1.18 or 1.0
            panels.append(Panel(title=text.label(metric), series=[bars], x=Axis(names=names), y=Axis(low=0, high=top)))
    return Chart(key="bars", title=_("Side by side"), panels=panels)


def every_request(analysis: RunAnalysis) -> Chart:
    """TTFT, TBT and E2E of every request in the order of sending; failed ones as crosses at the bottom, gaps pale behind."""
    requests, curves, summary = analysis.requests, analysis.curves, analysis.summary
    numbers = np.arange(1, len(requests.id) + 1)
    failed = numbers[~requests.ok]
    gaps = curves.gaps.ms
    panels = []
    for key, title, values, colour in (
        ("ttft_ms", _("TTFT, time to first token"), requests.ttft_ms, BLUE),
        ("tbt_ms", _("TBT, between tokens: every gap, and means"), requests.mean_tbt_ms, GREEN),
        ("e2e_ms", _("E2E, the whole request"), requests.e2e_ms, PURPLE),
    ):
        spread = getattr(summary, key)
        everything, behind = values[np.isfinite(values)], []
        if key == "tbt_ms" and spread is not None:
            behind = [Series(kind="points", x=curves.gaps.request + 1, y=gaps, size=2, shade=colour, opacity=0.22)]
            everything = np.minimum(gaps, 3 * spread.p99)
        low, high = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
        pad = 0.12 * (high - low) or 0.1 * high or 1.0
        low = low - pad if low - pad > 0.5 * high else 0.0
        drawn = [
            *behind,
            Series(
                kind="points", x=numbers, y=values, size=5 if len(values) <= 200 else 2.5, shade=colour, opacity=0.9
            ),
        ]
        if len(failed):
            at_bottom = np.full(len(failed), low + 0.02 * (high + pad - low))
            drawn.append(Series(kind="points", name=_("failed"), x=failed, y=at_bottom, marker="x", shade=BAD))
        panels.append(
            Panel(
                title=title,
                series=drawn if spread is not None else [],
                x=Axis(label=_("request, in the order of sending"), integer=True),
                y=Axis(label="ms", low=low, high=high + pad),
                lines=(np.flatnonzero(np.diff(requests.trial)) + 1.5).tolist(),
                spread=gaps if behind else values[np.isfinite(values)],
                marks={} if spread is None else {"p50": spread.p50, "p90": spread.p90, "p99": spread.p99},
                not_measured=_("no request succeeded"),
            )
        )
    return Chart(key="requests", title=_("Every request"), panels=panels)


def _shades(analyses: Sequence[RunAnalysis]) -> list[str]:
    return shades([analysis.name for analysis in analyses])
