"""The panels of the pictures: each draws one thing into one matplotlib axis. `figures` arranges them.

Try: pdbench report single_results
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pdbench.analysis.metrics import Array, Measured, mean_ttft_parts_ms
from pdbench.records import Run
from pdbench.report.curves import curves_of, reasons, series
from pdbench.report.energy_tables import parts_j, roles_of
from pdbench.report.language import say
from pdbench.report.palette import BAD, FAINT, GOOD, INK, MUTED, ORANGE, PAPER, colour
from pdbench.report.rows import figure
from pdbench.report.timeline import Timeline, in_flight, spans
from pdbench.report.words import devices_in_words, load_in_words, machine_in_words

SPANS_DRAWN, IN_FLIGHT_POINTS = 3000, 2000


def heading(
    picture: Figure, title: str, runs: Mapping[str, Run], language: str, counts: str = "", note: str = ""
) -> None:
    """A picture's first lines: title, load and machine; at the right the gate's verdict, flags, a note."""
    first, left, right = next(iter(runs.values())), 0.055, 0.985
    top, middle, bottom = (1 - inches / picture.get_figheight() for inches in (0.26, 0.60, 0.84))
    bold: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "ha": "right", "va": "top"}
    load = "  ·  ".join(filter(None, (load_in_words(first, language), counts)))
    picture.text(left, top, title, fontsize=19, fontweight="bold", color=INK, va="top")
    picture.text(left, middle, load, fontsize=11, color=INK, va="top")
    devices = {name: devices_in_words(run, language) for name, run in runs.items()}
    told_apart = (
        "; ".join(f"{name}: {words}" for name, words in devices.items()) if len({*devices.values()}) > 1 else ""
    )
    machine = machine_in_words(first, language, told_apart)
    picture.text(left, bottom, machine, fontsize=10, color=MUTED, va="top")
    gates = [run.gate for run in runs.values() if run.gate is not None]
    if gates:
        passed = all(gate.passed for gate in gates)
        words, shade = ("gate passed", GOOD) if passed else ("gate failed", BAD)
        picture.text(right, top, say(words, language), color=shade, **bold)
    flags = {name: ", ".join(dict.fromkeys(flag.name for flag in run.flags)) for name, run in runs.items() if run.flags}
    if flags:
        names = "; ".join(f"{name}: {each}" if len(runs) > 1 else each for name, each in flags.items())
        picture.text(right, middle, f"{say('mind', language)}: {names}", color=BAD, **bold)
    picture.text(right, bottom, note, fontsize=10, color=MUTED, ha="right", va="top")


def request_spans(axis: Axes, run: Run, timeline: Timeline) -> None:
    """Every request behind the curves: pale until its first token, paler while it decodes; when many, how many at once."""
    behind = axis.twinx()
    behind.set_zorder(axis.get_zorder() - 1)
    axis.patch.set_visible(False)
    behind.axis("off")
    if len(run.requests) > SPANS_DRAWN:
        behind.fill_between(*in_flight(run, timeline, IN_FLIGHT_POINTS), color=MUTED, alpha=0.2, linewidth=0)
        behind.set_ylim(bottom=0)
        return
    boxes: dict[str, list[Any]] = {"prefill": [], "decode": [], "failed": []}
    drawn = spans(run, timeline)
    for span in drawn:
        low, high = span.row + 0.06, span.row + 0.94
        for name, start, end in (("prefill", span.sent, span.first), ("decode", span.first, span.end)):
            boxes["failed" if span.failed else name].append([(start, low), (start, high), (end, high), (end, low)])
    for name, alpha in (("prefill", 0.30), ("decode", 0.11), ("failed", 0.35)):
        shade = BAD if name == "failed" else colour(name)
        behind.add_collection(PolyCollection(boxes[name], facecolors=shade, alpha=alpha, linewidths=0))
    behind.set_ylim(0, max((span.row for span in drawn), default=0) + 1)


def device_curves(axis: Axes, run: Run, timeline: Timeline, fields: Sequence[str], unit: str, language: str) -> bool:
    """One line a device for the first of `fields` that it has; False, with the reason written, when none has any."""
    drawn: list[float] = []
    for device in curves_of(run):
        for style, field in zip(("-", "--"), fields, strict=False):
            instants, values = series(device, field)
            if not len(instants):
                continue
            x, y = timeline.curve(instants, values)
            name = (
                device.role
                if field == fields[0] or field == "cpu_clock_mhz"
                else f"{device.role}, {say('memory', language)}"
            )
            same = sum(other.role == device.role and other.kind == device.kind for other in run.devices) > 1
            label = f"{name} ({device.id})" if same else str(name)
            width = 1.5 if style == "-" else 1.0
            axis.plot(x, y, style, color=colour(device.role or "host", len(drawn)), lw=width, label=label)
            drawn.append(float(np.nanmax(values)))
    if not drawn:
        not_measured(axis, reasons(run, fields[0]), language)
        return False
    axis.set_ylim(0, max(drawn) * 1.18 or 1)
    axis.set_ylabel(say(unit, language))
    return True


def not_measured(axis: Axes, reason: str, language: str) -> None:
    """Say so in the middle of an empty panel."""
    width = max(int(axis.get_window_extent().width / 8), 20)
    words = fill(f"{say('not measured', language)}: {say(reason, language)}", width)
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set_yticks([])
    axis.grid(False)


def time_axis(axis: Axes, timeline: Timeline, label: bool, language: str) -> None:
    """Seconds since each stretch's start; stretches are told apart by white gaps and their trial's name."""
    places, labels = timeline.ticks()
    axis.set_xlim(0, timeline.length_s)
    axis.set_xticks(places, labels if label else [""] * len(labels))
    for at in timeline.starts[1:]:
        axis.axvspan(at - timeline.gap_s, at, color=PAPER, zorder=5, lw=0)
        axis.axvline(at - timeline.gap_s / 2, color=MUTED, lw=0.8, ls=":", zorder=6)
    if label:
        several = len(timeline.stretches) > 1
        words = "seconds since the start of each trial (pauses left out)" if several else "seconds"
        axis.set_xlabel(say(words, language))


def scatter(
    axis: Axes, values: Array, measured: Measured, shade: str, language: str, gaps: Array | None = None
) -> None:
    """One dot a request in the order of sending, failed ones as crosses at the bottom; a thin line between trials.

    `gaps` (one value for each of `measured.tbt_owner`) are drawn pale behind. The axis begins at 0 unless all lie far above.
    """
    numbers = np.arange(1, len(values) + 1)
    small = 24 if len(values) <= 200 else 6
    everything = values[np.isfinite(values)]
    if gaps is not None and len(gaps):
        shown = np.linspace(0, len(gaps) - 1, min(len(gaps), 20_000)).astype(int)
        axis.scatter(measured.tbt_owner[shown] + 1, gaps[shown], s=4, color=shade, alpha=0.22, linewidths=0)
        everything = np.minimum(gaps, 3 * np.percentile(gaps, 99))
    axis.scatter(numbers, values, s=small, color=shade, alpha=0.9, linewidths=0)
    failed = numbers[~measured.ok]
    if len(failed):
        axis.scatter(
            failed, np.full(len(failed), 0.02), marker="x", s=26, color=BAD, transform=axis.get_xaxis_transform()
        )
    for edge in np.flatnonzero(np.diff(measured.trial)) + 1:
        axis.axvline(edge + 0.5, color=MUTED, lw=0.8, ls=":")
    if len(everything):
        low, high = float(everything.min()), float(everything.max())
        pad = 0.12 * (high - low) or 0.1 * high or 1.0
        axis.set_ylim(low - pad if low - pad > 0.5 * high else 0.0, high + pad)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(say("request, in the order of sending", language))
    axis.set_ylabel("ms")


def distribution(axis: Axes, values: Array, shade: str) -> None:
    """How often each height occurs, lying beside the scatter, with p50, p90 and p99 marked and named without overlap."""
    known = values[np.isfinite(values)]
    if not len(known):
        return
    low, high = axis.get_ylim()
    axis.hist(known, bins=np.linspace(low, high, 41).tolist(), orientation="horizontal", color=shade, alpha=0.45)
    marks = np.percentile(known, (50, 90, 99))
    apart = 0.075 * (high - low)
    places = spread_apart(marks, apart, high - apart / 2)
    for name, mark, place in zip(("p50", "p90", "p99"), marks, places, strict=True):
        axis.axhline(mark, color=INK, lw=0.8, ls={"p50": "-", "p90": "--", "p99": ":"}[name])
        text = f"{name} {figure(float(mark))}"
        axis.text(1.04, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9, color=INK)
    axis.set_ylim(low, high)
    axis.axis("off")


def spread_apart(places: Sequence[float] | Array, apart: float, highest: float) -> list[float]:
    """The same rising places, moved as little as keeps neighbours `apart` and all at or below `highest`."""
    moved = list(map(float, places))
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + apart)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], highest - (len(moved) - 1 - i) * apart)
    return moved


def phase_bars(axis: Axes, measured: Measured, language: str) -> None:
    """The mean TTFT taken apart by the instants that proxy, connector and client reported."""
    parts = mean_ttft_parts_ms(measured)
    if parts is None:
        not_measured(axis, "no proxy and no connector reported this deployment's phases", language)
        axis.set_xticks([])
        return
    names, means = list(parts), list(parts.values())
    labels = [say(f"part_{name}", language) for name in names]
    bars = axis.barh(labels, means, color=[colour(name) for name in names], height=0.62, edgecolor=MUTED, linewidth=0.3)
    axis.bar_label(bars, [f" {figure(mean)} ms" for mean in means], fontsize=9, color=INK)
    axis.set_xlim(0, max(means) * 1.35 or 1)
    axis.invert_yaxis()
    axis.set_xlabel(say("mean ms of TTFT", language))
    axis.grid(False)


def energy_bars(axis: Axes, summary: dict[str, Any], language: str) -> None:
    """Each role's joules in the measured windows, told apart by what it did with them."""
    roles = roles_of(summary)
    for place, one in enumerate(roles.values()):
        left = 0.0
        for part, joules in parts_j(one).items():
            shade, hatch = _ENERGY[part]
            axis.barh(place, joules, left=left, color=shade, height=0.6, hatch=hatch, edgecolor=PAPER, linewidth=0.5)
            left += joules
        axis.text(left, place, f"  {figure(left)}", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(roles)), list(roles))
    axis.invert_yaxis()
    axis.set_xlim(0, max(sum(parts_j(one).values()) for one in roles.values()) * 1.22)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel(say("J: above idle in its phase (orange), idle draw (grey), waiting (hatched)", language))
    axis.grid(False)


_ENERGY = {"active": (ORANGE, ""), "idle": ("#9aa5b1", ""), "waiting": (FAINT, "///")}


def table(axis: Axes, rows: Sequence[Sequence[str]], header: Sequence[str], widths: Sequence[float]) -> None:
    """A table of text: the first column left, the others right, a line under the header."""
    axis.axis("off")
    edges = np.cumsum(widths) / sum(widths)
    step = min(1.0 / (len(rows) + 1), 0.16)
    for number, row in enumerate([header, *rows]):
        height = 1 - (number + 0.5) * step
        for place, text in enumerate(row):
            x, side = (0.0, "left") if place == 0 else (edges[place], "right")
            ink = INK if number else MUTED
            weight = "bold" if place == 0 and number else "normal"
            axis.text(
                x,
                height,
                text,
                ha=side,
                va="center",
                fontsize=9.5,
                fontweight=weight,
                color=ink,
                transform=axis.transAxes,
            )
    axis.plot([0, 1], [1 - step] * 2, color=FAINT, lw=1, transform=axis.transAxes, clip_on=False)


def log_ticks(axis: Axes) -> None:
    """Plain numbers on a logarithmic horizontal axis."""
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
