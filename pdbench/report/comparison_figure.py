"""Several deployments side by side: verdicts, distributions of the three latencies, then speed, power and energy.

Try: python compare_performance.py
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.ticker import NullLocator

from pdbench.analysis import verdicts
from pdbench.analysis.compare import Comparison, compare
from pdbench.analysis.metrics import Array, Measured, measure
from pdbench.analysis.run_analysis import analyze
from pdbench.analysis.summary import summarize
from pdbench.records import Run
from pdbench.report import panels
from pdbench.report.language import say
from pdbench.report.palette import BAD, GOOD, INK, MUTED, colours
from pdbench.report.rows import figure

Summary = dict[str, Any]


def draw(runs: Sequence[Run], comparison: Comparison | None = None, language: str = "en") -> Figure:
    """The picture of these runs (1600 wide); the first is the baseline of the verdicts, which two runs alone have."""
    measured = [measure(run) for run in runs]
    summaries = [summarize(run, one) for run, one in zip(runs, measured, strict=True)]
    shades = colours([run.name for run in runs])
    if comparison is None and len(runs) == 2:
        comparison = compare(analyze(runs[0]), analyze(runs[1]), anyway=True)
    names = _names(runs)
    picture = Figure(figsize=(16, 14 if comparison else 10.5))
    grid = picture.add_gridspec(
        3 if comparison else 2, 12, hspace=0.30, wspace=1.0, left=0.055, right=0.985, top=1 - 1.33 / picture.get_figheight(),
        bottom=0.055,
        height_ratios=(1.25, 1.2, 0.95) if comparison else (1.25, 1.0),
    )  # fmt: skip
    title = say("against", language).format(a=names[0], b=names[1]) if len(names) == 2 else " · ".join(names[:5])
    reasons = {one["energy"]["not_measured"] for one in summaries if one["energy"]["not_measured"]}
    note = f"{say('power and energy not measured', language)}: {'; '.join(sorted(reasons))}" if reasons else ""
    panels.heading(picture, title, dict(zip(names, runs, strict=True)), language, note=note)
    row = 0
    if comparison:
        cells = GridSpecFromSubplotSpec(1, 3, grid[0, :], width_ratios=_WIDTHS, wspace=0)
        _verdicts(picture.add_subplot(cells[1]), comparison, language)
        row = 1
    for place, (heading, pick) in enumerate(_DISTRIBUTIONS.items()):
        axis = picture.add_subplot(grid[row, place * 4 : place * 4 + 4])
        _distribution(axis, heading, [pick(one) for one in measured], names, shades, place == 0, language)
    heights = {heading: [pick(one) for one in summaries] for heading, pick in _BARS.items()}
    known = {heading: values for heading, values in heights.items() if any(value is not None for value in values)}
    width = 12 // max(min(len(known), 4), 1)
    for place, (heading, values) in enumerate(list(known.items())[:4]):
        axis = picture.add_subplot(grid[row + 1, place * width : (place + 1) * width])
        _bars(axis, say(heading, language), values, names, shades, language)
    return picture


_WIDTHS = (2.55, 2.3, 3.1)
_LEFT = -_WIDTHS[0] / _WIDTHS[1]
_DISTRIBUTIONS: dict[str, Callable[[Measured], Array]] = {
    "TTFT, ms": lambda one: one.ttft_ms,
    "TBT, every gap, ms": lambda one: one.tbt_ms,
    "E2E, ms": lambda one: one.e2e_ms,
}
_BARS: dict[str, Callable[[Summary], float | None]] = {
    "Output tokens a second": lambda one: one["throughput"]["output_tokens_per_s"],
    "… a second and GPU": lambda one: one["throughput"]["output_tokens_per_s_per_device"],
    "Mean power, W": lambda one: one["energy"]["mean_power_w"],
    "Energy per output token, J": lambda one: one["energy"]["j_per_output_token"],
    "Requests a second that met the SLO": lambda one: one["goodput"]["requests_per_s"],
    "Requests a second": lambda one: one["throughput"]["requests_per_s"],
}
"""The first four that were measured are drawn."""


def _names(runs: Sequence[Run]) -> list[str]:
    """Each run's deployment, numbered where two share a name."""
    plain = [run.name for run in runs]
    return [f"{name} {i + 1}" if plain.count(name) > 1 else name for i, name in enumerate(plain)]


def _verdicts(axis: Axes, comparison: Comparison, language: str) -> None:
    """A row a metric: its change with the 95 % interval on a logarithmic scale, and the verdict in words beside it."""
    lines = comparison.differences
    axis.set_title(verdicts.advice(comparison, language) or say("change and 95 % interval", language), x=_LEFT)
    widest = 1.25
    for number, line in enumerate(lines):
        shade = {"better": GOOD, "worse": BAD}.get(line.verdict, MUTED)
        ink = INK if line.verdict in ("better", "worse", "same") or line.unjudged == "one-trial" else MUTED
        mark = say(line.verdict, language) if line.verdict in ("better", "worse") else ""
        beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 10}
        axis.text(_LEFT, number, verdicts.title(line, language), color=INK, fontweight="bold", **beside)
        axis.text(-0.03, number, verdicts.values(line), color=ink, ha="right", **beside)
        axis.text(1.03, number, mark, color=shade, fontweight="bold", **beside)
        axis.text(1.03 + (0.13 if mark else 0), number, verdicts.judgement(line, language), color=ink, **beside)
        if line.ratio:
            ends = [line.ratio.low, line.ratio.high]
            axis.plot(ends, [number] * 2, color=shade, lw=3, solid_capstyle="butt", alpha=0.55)
            axis.plot(line.ratio.value, number, "o", color=shade, ms=6)
            widest = max(widest, line.ratio.high, 1 / line.ratio.low)
        elif line.change:
            axis.plot(line.change, number, "o", color=shade, ms=6, markerfacecolor="none")
            widest = max(widest, line.change, 1 / line.change)
    axis.axvline(1, color=INK, lw=1)
    axis.set_xscale("log")
    axis.set_xlim(1 / widest**1.05, widest**1.05)
    steps = [step for step in (1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if step <= widest**1.05]
    steps = [steps[-4], steps[-1]] if len(steps) > 4 and widest > 10 else steps[-2:]
    axis.set_xticks(
        [*(1 / s for s in reversed(steps)), 1, *steps],
        [*(f"÷{s:g}" for s in reversed(steps)), "1", *(f"×{s:g}" for s in steps)],
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    axis.set_yticks([])
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)


def _distribution(
    axis: Axes,
    heading: str,
    values: Sequence[Array],
    names: Sequence[str],
    shades: Sequence[str],
    legend: bool,
    language: str,
) -> None:
    """Share of values at or below each height, with p50, p90 and p99 marked; logarithmic where they span a decade."""
    known = [one[np.isfinite(one)] for one in values]
    axis.set_title(say(heading, language))
    if not any(len(one) for one in known):
        panels.not_measured(axis, "no request succeeded", language)
        return
    for one, name, shade in zip(known, names, shades, strict=True):
        if not len(one):
            continue
        rising = np.sort(one)
        thin = np.unique(np.linspace(0, len(rising) - 1, min(len(rising), 4000)).astype(int))
        axis.step(rising[thin], 100 * (thin + 1) / len(rising), where="post", color=shade, lw=2, label=name)
        marks = np.percentile(rising, (50, 90, 99))
        axis.scatter(marks, (50, 90, 99), color=shade, s=26, zorder=3, linewidths=0)
    everything = np.concatenate(known)
    positive = everything[everything > 0]
    if len(positive) and np.percentile(positive, 99.9) > 8 * np.percentile(positive, 1):
        axis.set_xscale("log")
        axis.set_xlim(np.percentile(positive, 0.5) * 0.8, everything.max() * 1.1)
        panels.log_ticks(axis)
    else:
        axis.set_xlim(left=0)
    axis.set_yticks([0, 50, 90, 99], ["0", "p50", "p90", "p99"])
    axis.set_ylim(0, 103)
    axis.set_ylabel(say("% of all at or below", language))
    if legend:
        axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=4, columnspacing=1.2, handlelength=1.4)


def _bars(
    axis: Axes,
    heading: str,
    heights: Sequence[float | None],
    names: Sequence[str],
    shades: Sequence[str],
    language: str,
) -> None:
    """One bar a deployment with its number; where one was not measured, it says so."""
    axis.set_title(heading)
    places = np.arange(len(names))
    bars = axis.bar(places, [height or 0.0 for height in heights], color=list(shades), width=0.6)
    axis.bar_label(
        bars,
        [say("not measured", language) if h is None else figure(h) for h in heights],
        padding=3,
        fontsize=10,
        color=INK,
    )
    axis.set_xticks(places, [name.replace("-", "-\n") for name in names])
    axis.set_ylim(0, max(height or 0.0 for height in heights) * 1.18 or 1)
    axis.grid(axis="x", visible=False)
