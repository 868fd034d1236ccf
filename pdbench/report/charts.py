"""The charts of runs and of devices; several runs share a chart, each with its colour."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdbench.analysis.compare import Comparison
from pdbench.analysis.curves import TimeAxis
from pdbench.analysis.metrics import PHASES
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.records import DeviceRecord
from pdbench.report import answer, tables, text
from pdbench.report import chart_types as colours
from pdbench.report.chart_types import DASHES, SHADES, SPARE, Axis, Chart, Panel, Series, log_axis, shades
from pdbench.report.text import translate as _

VERDICTS = {"better": colours.GOOD, "worse": colours.BAD}
ENERGY_PARTS = {
    "active_j": ("active", colours.ORANGE, ""),
    "idle_j": ("idle draw", colours.GREY, ""),
    "waiting_j": ("waiting", colours.FAINT, "/"),
    "other_j": ("unknown", colours.FAINT, ""),
}
FEW_GAPS = 2000


def latency_distributions(runs: text.Runs) -> Chart:
    """Share of values at or below each latency, with p50, p90 and p99 marked; logarithmic where they span a decade."""
    panels = []
    titles = {"ttft": "Time to first token", "tbt": "Time between tokens, every gap", "e2e": "The whole request"}
    for key, title in titles.items():
        drawn, curves = [], [run.curves.quantiles[key] for run in runs.values()]
        for number, (name, curve, shade) in enumerate(zip(runs, curves, _shades(runs), strict=True)):
            spread = getattr(runs[name].summary, f"{key}_ms")
            if spread is not None:
                style = DASHES[number // len(SPARE) % len(DASHES)]  # as the palette repeats
                drawn.append(Series(name=name, x=curve.x, y=curve.y, shade=shade, dash=style, width=2))
                drawn.append(Series(kind="points", x=[spread.p50, spread.p90, spread.p99], y=[50, 90, 99], shade=shade))
        x = np.sort(np.concatenate([curve.x for curve in curves] or [np.array([])]))
        x = x[x > 0] if len(x) and x[-1] > 0 else np.array([1.0])
        low, high = x[int(0.01 * (len(x) - 1))], x[int(0.99 * (len(x) - 1))]
        label, right = text.label(f"{key}_ms"), 1.05 * float(x[-1])
        across = Axis(label=label, low=0, high=right)
        if high > 8 * low:
            across = log_axis(label, 0.8 * float(low), right, (1, 2, 5) if right < 160 * low else (1,))
        up = Axis(label=_("% at or below"), low=0, high=103, ticks=([0, 50, 90, 99], ["0", "p50", "p90", "p99"]))
        panels.append(Panel(title=_(title), series=drawn, x=across, y=up, not_measured=_("no request succeeded")))
    caption = _("Share of values at or below each time: a curve further left is faster. Click a name to hide it.")
    return Chart(key="distributions", title=_("Latency distributions"), panels=panels, caption=caption)


def ttft_parts(runs: text.Runs) -> Chart:
    """The mean TTFT of each run split by the reported instants: a bar per part of one run, a stacked bar per run of several."""
    known = {name: parts for name, run in runs.items() if (parts := run.curves.ttft_parts_ms)}
    drawn = []
    for key in (*PHASES, "other"):
        if any(parts.get(key) for parts in known.values()):
            values = [parts.get(key, 0.0) for parts in known.values()]
            part = _("Unattributed") if key == "other" else text.title(f"{key}_ms")
            y, labels = (list(known), []) if len(runs) > 1 else ([part], [f"{text.number(values[0])} ms"])
            drawn.append(Series(kind="hbar", name=part, x=values, y=y, labels=labels, shade=SHADES[key]))
    title, rows = _("Where TTFT goes"), list(dict.fromkeys(row for bars in drawn for row in bars.y))
    missing = _("no proxy and no server reported this deployment's phases")
    x = _bar_axis(_("mean TTFT, ms"), drawn)
    panel = Panel(title=title, series=drawn, x=x, y=Axis(names=rows), not_measured=missing)
    caption = _(
        "Mean TTFT, split by what client, proxy and servers reported; a part is 0 in requests without it, "
        "and a deployment that reported nothing is absent."
    )
    return Chart(key="ttft", title=title, panels=[panel], caption=caption)


def tbt_over_time(runs: text.Runs) -> Chart:
    """p50 and p99 of the gaps between tokens as the load goes on; every gap of a run that has few."""
    drawn = []
    for (name, run), shade in zip(runs.items(), _shades(runs), strict=True):
        gaps = run.curves.gaps
        if 0 < len(gaps.ms) <= FEW_GAPS:
            drawn.append(Series(kind="points", name=name, x=gaps.x, y=gaps.ms, shade=shade, size=4, opacity=0.6))
            continue
        for quantile, style in (("p99", "solid"), ("p50", "dot")):
            curve = run.curves.tbt_over_time[quantile]
            if np.isfinite(curve.y).any():
                drawn.append(Series(name=f"{name} {quantile}", x=curve.x, y=curve.y, shade=shade, dash=style))
    x = Axis(label=_("seconds of load, pauses left out"), low=0)
    panel = Panel(title="", series=drawn, x=x, y=Axis(label=text.label("tbt_ms"), low=0))
    caption = _(
        "p99 (solid) and p50 (dotted) of the gaps between tokens as the load went on; every gap (dots) where there are few."
    )
    return Chart(key="tbt", title=_("TBT over time"), panels=[panel], caption=caption)


def device_curves(analysis: RunAnalysis, name: str, key: str = "devices", most_boxes: int = 3000) -> Chart:
    """Power (or CPU use), clocks and temperature of each device, with the requests behind: `most_boxes` at most, else a count."""
    curves, axis, x = analysis.curves, analysis.curves.axis, run_time(analysis.curves.axis)
    power = (_("Power of each device"), ["power_w"])
    if "power_w" not in curves.devices and "cpu_utilization_pct" in curves.devices:
        of_roles = any(device.role for device in analysis.summary.devices.values())
        power = (_("CPU use of each role's processes" if of_roles else "CPU use"), ["cpu_utilization_pct"])
    clocks = (_("Clocks (graphics solid, memory dashed)"), ["sm_clock_mhz", "memory_clock_mhz"])
    if "sm_clock_mhz" not in curves.devices:
        clocks = (_("CPU clock"), ["cpu_clock_mhz"])
    panels: list[Panel] = []
    for title, fields in (power, clocks, (_("Temperature"), ["temperature_c"])):
        lines = [line for field in fields for line in _device_lines(analysis, field)]
        behind = _requests_behind(analysis, most_boxes) if lines and not panels else []
        title = _("{0}, requests behind (darker until the first token)", title) if behind else title
        top = max((float(np.nanmax(line.y)) for line in lines), default=0.0) * 1.15 or 1.0
        panel = Panel(
            title=title,
            series=[*behind, *lines],
            x=x,
            y=Axis(label=text.label(fields[0]), low=0, high=top),
            lines=axis.joints,
            pauses=axis.pauses,
            not_measured=_(curves.not_measured.get(fields[0], "")),
            height=1.5 if panels else 3.0,
        )
        panels.append(panel)
    caption = _(
        "Device curves with the requests behind, warm-up included: darker until the first token, paler while decoding."
    )
    if curves.spans is None or len(curves.spans.row) > most_boxes:
        caption = _("Device curves with the number of requests in flight behind (grey), warm-up included.")
    if "power_w" in curves.not_measured:
        caption += " " + _("(power not measured: {0})", _(curves.not_measured["power_w"]))
    return Chart(key=key, title=_("Devices: {0}", name), panels=panels, caption=caption, shared_x=True)


def run_time(axis: TimeAxis) -> Axis:
    label = _("seconds of each trial, pauses left out") if len(axis.stretches) > 1 or axis.joints else _("seconds")
    return Axis(label=label, low=0, high=axis.length_s, ticks=(axis.ticks, axis.tick_labels))


def _device_lines(analysis: RunAnalysis, field: str) -> list[Series]:
    curves, devices = analysis.curves.devices.get(field, {}), analysis.summary.devices
    return device_lines(field, [(name, devices[name].role, devices[name].kind, curves[name]) for name in curves])


def device_lines(field: str, devices: Sequence[tuple[str, str | None, str, Any]]) -> list[Series]:
    """A line per device (id, role, kind, curve); the id is in its name where devices share a role. Memory clocks are dashed."""
    roles = [role or kind for _, role, kind, _ in devices]
    lines = []
    for number, ((device, known_role, _kind, curve), role) in enumerate(zip(devices, roles, strict=True)):
        name = role if known_role and roles.count(role) == 1 else f"{role} ({device})"
        style, width = DASHES[roles[:number].count(role) % len(DASHES)], 1.5
        if field == "memory_clock_mhz":
            name, style, width = _("{0}, memory", name), "dash", 1.0
        shade = SHADES.get(role, SPARE[number % len(SPARE)])
        lines.append(Series(name=name, x=curve.x, y=curve.y, shade=shade, dash=style, width=width))
    return lines


def _requests_behind(analysis: RunAnalysis, most_boxes: int) -> list[Series]:
    spans, flying = analysis.curves.spans, analysis.curves.in_flight
    if spans is None or len(spans.row) > most_boxes:
        name = _("requests in flight")
        return [Series(kind="area", name=name, x=flying.x, y=flying.y, shade=colours.GREY, opacity=0.25)]
    boxes = []
    for name, start, end, which, shade, opacity in (
        (_("until the first token"), spans.sent_s, spans.first_s, ~spans.failed, colours.VERMILLION, 0.30),
        (_("decoding"), spans.first_s, spans.end_s, ~spans.failed, colours.BLUE, 0.13),
        (_("failed requests"), spans.sent_s, spans.end_s, spans.failed, colours.BAD, 0.35),
    ):
        if which.any():
            x, y = np.stack([start, end], axis=1)[which], spans.row[which]
            boxes.append(Series(kind="boxes", name=name, x=x, y=y, shade=shade, opacity=opacity))
    return boxes


def energy_parts(runs: text.Runs) -> Chart:
    """What each role did with its joules, then joules per output token by role; no panel for what no run has."""
    labelled = tables.energy_roles(runs)
    every = {
        label: {part: joules for part, joules in tables.energy_parts(energy).items() if joules}
        for label, energy in labelled.items()
    }
    roles = {label: parts for label, parts in every.items() if parts}
    per_token: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        for role, energy in run.summary.energy.roles.items():
            if energy.j_per_output_token is not None:
                per_token.setdefault(role, {})[name] = energy.j_per_output_token
    used = []
    for part, (title, shade, hatch) in ENERGY_PARTS.items():
        rows = [row for row, parts in roles.items() if part in parts]
        labels = [text.number(sum(roles[row].values())) if part == [*roles[row]][-1] else "" for row in rows]
        joules = [roles[row][part] for row in rows]
        if rows:
            used.append(Series(kind="hbar", name=_(title), x=joules, y=rows, labels=labels, shade=shade, hatch=hatch))
    tokens = [
        Series(kind="hbar", name=role, x=[*joules.values()], y=[*joules], shade=shade)
        for (role, joules), shade in zip(per_token.items(), shades([*per_token]), strict=True)
    ]
    known = [name for name in runs if any(name in joules for joules in per_token.values())]
    x = _bar_axis(text.label("j_per_output_token"), tokens)
    panels = [
        Panel(title=_("Energy by role, J"), series=used, x=_bar_axis(_("energy, J"), used), y=Axis(names=list(roles))),
        Panel(title=text.title("j_per_output_token"), series=tokens, x=x, y=Axis(names=known)),
    ]
    caption = _(
        "The measured windows, failed requests' energy included. Active: above the idle draw, with requests in the role's phase; "
        "waiting: all it drew with none; unknown: readings of power are too far apart to tell. Beside it: J per output token."
    )
    drawn = [panel for panel in panels if panel.series]
    return Chart(key="energy", title=_("Energy"), panels=drawn, caption=caption)


def trade_off(runs: text.Runs) -> Chart:
    """Throughput against TBT p99, a point per run; the more energy per token, the larger."""
    joules = [text.value(run, "j_per_output_token") for run in runs.values()]
    most = max((value for value in joules if value), default=0.0)
    drawn = []
    for (name, run), shade, energy in zip(runs.items(), _shades(runs), joules, strict=True):
        speed, latency = (text.value(run, metric) for metric in ("output_tokens_per_s", "tbt_p99_ms"))
        if latency is not None and speed is not None:
            size = 8 + 24 * (energy / most) ** 0.5 if energy and most else 14
            drawn.append(Series(kind="points", name=name, x=[speed], y=[latency], shade=shade, size=size, opacity=0.85))
    x, y = (Axis(label=text.label(metric), low=0) for metric in ("output_tokens_per_s", "tbt_p99_ms"))
    caption = _(
        "Lower and further right is better; a larger dot costs more energy per token (equal dots: not measured)."
    )
    panel = Panel(title="", series=drawn, x=x, y=y)
    return Chart(key="trade-off", title=_("Throughput against latency"), panels=[panel], caption=caption)


def verdicts(compared: Comparison) -> Chart:
    """A row per metric: its change with the 95 % interval on a logarithmic scale, its values and its verdict."""
    bounds = [
        (line.ratio.value, line.ratio.low, line.ratio.high) if line.ratio else (line.change or np.nan,) * 3
        for line in compared.differences
    ]
    shown = [bound for bound, line in zip(bounds, compared.differences, strict=True) if not answer.too_wide(line.ratio)]
    reach = float(np.nanmax([1.25, *(max(high, 1 / low) for _value, low, high in shown)])) ** 1.05
    steps = [step for step in (1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if step <= reach]
    steps = [steps[-4], steps[-1]] if len(steps) > 4 and reach > 10 else steps[-2:]
    ticks = [*(1 / step for step in reversed(steps)), 1.0, *steps]
    labels = [*(f"÷{step:g}" for step in reversed(steps)), "1", *(f"×{step:g}" for step in steps)]
    names = [text.title(line.metric.name) for line in compared.differences]
    decided = ["" if line.alone else line.verdict for line in compared.differences]
    colour = [VERDICTS.get(verdict, colours.MUTED) for verdict in decided]
    each = [(ratio, name) for line, name in zip(compared.differences, names, strict=True) for ratio in line.pairs]
    ratios, rows = [ratio for ratio, _name in each], [name for _ratio, name in each]
    pairs = Series(kind="points", x=ratios, y=rows, shade=colours.MUTED, size=3.5)
    value, low, high = zip(*bounds, strict=True) if bounds else ((), (), ())
    intervals = Series(kind="interval", x=value, y=names, low=low, high=high, shade=colour)
    panel = Panel(
        title=answer.advice(compared) or _("change and 95 % interval"),
        series=[intervals, *([pairs] if each else [])] if bounds else [],
        x=Axis(log=True, low=1 / reach, high=reach, ticks=(ticks, labels)),
        y=Axis(names=names),
        rows=[(answer.values(line), answer.verdict(line)) for line in compared.differences],
        not_measured=_("These runs share no metric."),
    )
    sure = any(line.ratio for line in compared.differences)
    caption = _(
        "Change and its 95 % interval, each pair as a dot; {0} is 1."
        if sure
        else "Change, without an interval; {0} is 1.",
        compared.names[0],
    )
    title = f"{text.against(compared.names)}: {_('change of each metric')}"
    return Chart(key="verdicts", title=title, panels=[panel], caption=caption)


def side_by_side(runs: text.Runs, comparisons: Sequence[Comparison]) -> list[Panel]:
    """Bars of up to four figures of each run: the first that were measured, as the comparisons have them."""
    compared = {
        (name, line.metric.name): value
        for each in reversed(comparisons)
        for line in each.differences
        for name, value in zip(each.names, (line.a, line.b), strict=True)
    }
    panels = []
    first = ("goodput_requests_per_s", "output_tokens_per_s", "mean_power_w", "j_per_output_token")
    for metric in (*first, "output_tokens_per_s_per_device", "requests_per_s"):
        values = [compared.get((name, metric), text.value(run, metric)) for name, run in runs.items()]
        if any(value is not None for value in values):
            labels = [_("not measured") if value is None else text.number(value) for value in values]
            heights = [value or 0.0 for value in values]
            bars = Series(kind="bar", x=[*runs], y=heights, labels=labels, shade=_shades(runs))
            y = Axis(low=0, high=max(heights) * 1.18 or 1.0)
            panels.append(Panel(title=text.label(metric), series=[bars], x=Axis(names=[*runs]), y=y))
    return panels[:4]


def every_request(analysis: RunAnalysis) -> list[Panel]:
    """TTFT, TBT and E2E of every request in the order of sending; failed ones as crosses at the bottom, gaps pale behind."""
    requests, gaps = analysis.requests, analysis.curves.gaps
    numbers = np.arange(1, len(requests.id) + 1)
    panels = []
    for key, title, values, shade in (
        ("ttft_ms", _("TTFT, time to first token"), requests.ttft_ms, colours.BLUE),
        ("tbt_ms", _("TBT, between tokens: every gap, and means"), requests.mean_tbt_ms, colours.GREEN),
        ("e2e_ms", _("E2E, the whole request"), requests.e2e_ms, colours.PURPLE),
    ):
        spread, known, drawn = getattr(analysis.summary, key), values[np.isfinite(values)], []
        if key == "tbt_ms" and spread is not None:
            known = np.minimum(gaps.ms, 3 * spread.p99)
            drawn = [Series(kind="points", x=gaps.request + 1, y=gaps.ms, size=2, shade=shade, opacity=0.22)]
        high = 1.12 * (float(known.max()) if len(known) else 0.0) or 1.0
        size = 5 if len(values) <= 200 else 2.5
        drawn.append(Series(kind="points", x=numbers, y=values, size=size, shade=shade, opacity=0.9))
        failed = numbers[~requests.ok]
        bottom = np.full(len(failed), 0.02 * high)
        drawn.append(Series(kind="points", x=failed, y=bottom, marker="x", shade=colours.BAD))
        panels.append(
            Panel(
                title=title,
                series=drawn if spread is not None else [],
                x=Axis(label=_("request, in the order of sending"), integer=True),
                y=Axis(label="ms", low=0, high=high),
                lines=(np.flatnonzero(np.diff(requests.trial)) + 1.5).tolist(),
                spread=gaps.ms if key == "tbt_ms" else known,
                marks={} if spread is None else {"p50": spread.p50, "p90": spread.p90, "p99": spread.p99},
                not_measured=_("no request succeeded"),
            )
        )
    return panels


def monitored(analysis: RunAnalysis, devices: Sequence[DeviceRecord]) -> Chart:
    """Devices alone: power, clocks, temperature, utilisation, and power against utilisation; those that were measured."""
    panels, axis = device_curves(analysis, analysis.name).drawable, analysis.curves.axis
    lines, use = _device_lines(analysis, "gpu_utilization_pct"), Axis(label=text.label("gpu_utilization_pct"), low=0)
    panels.append(
        Panel(title=_("Utilisation"), series=lines, x=run_time(axis), y=use, lines=axis.joints, pauses=axis.pauses)
    )
    points = []
    for device in devices:
        # Utilisation is a mean over about 1 s, so power's own 1 s mean goes with it where there is one.
        watts = [s.power_w if s.power_average_w is None else s.power_average_w for s in device.samples]
        pairs = [(s.gpu_utilization_pct, w) for s, w in zip(device.samples, watts, strict=True)]
        x, y = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2).T
        look: dict[str, Any] = {"name": device.role or device.id, "shade": SHADES.get(device.role or "", colours.BLUE)}
        points += [Series(kind="points", x=x, y=y, opacity=0.45, size=3.7, **look)] if len(x) else []
    power = Axis(label=text.label("power_w"), low=0)
    panels.append(Panel(title=_("Power against utilisation"), series=points, x=use, y=power))
    parts = list(dict.fromkeys(_(device.name) for device in devices))
    for key, words in (("p50_ms", "samples every {0} ms"), ("fine_interval_ms", "power curve every {0} ms")):
        known = [value for device in devices if (value := device.sampling.get(key)) is not None]
        parts += [_(words, f"{np.median(known):.0f}")] if known else []
    missing = analysis.curves.not_measured
    parts += [
        _("{0} not measured: {1}", text.title(f), _(missing[f])) for f in ("power_w", "temperature_c") if f in missing
    ]
    title = _("Devices of {0}", analysis.name)
    return Chart(key="monitor", title=title, panels=[p for p in panels if p.series], caption=" · ".join(parts))


def _bar_axis(label: str, bars: Sequence[Series]) -> Axis:
    """The axis of horizontal stacks, with room for their labels."""
    ends: Counter[str] = Counter()
    for series in bars:
        ends.update(dict(zip(series.y, series.x, strict=True)))
    return Axis(label=label, low=0, high=1.25 * max(ends.values(), default=0.0) or 1.0)


def _shades(runs: text.Runs) -> list[str]:
    return shades([run.name for run in runs.values()])
