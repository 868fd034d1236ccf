"""Curves of `pdbench plan`: calibrated steps, and how long the requests of checked runs took."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pdbench.analysis.arrivals import Array, IntArray
from pdbench.plan.engine import Costs
from pdbench.plan.records import Calibration, Check
from pdbench.plan.seconds import SHARES
from pdbench.report.chart_types import FAINT, INK, SHADES, Axis, Chart, Panel, Series
from pdbench.report.plan import BEST, apart, interval_bars
from pdbench.report.text import translate as _

MOST_CHECKS = 4
"""Of more checks only the quantiles are drawn, in one picture (`checks_chart`)."""
PLACES = {"p50": 50, "p90": 90, "p99": 99}


def distributions_chart(checks: Sequence[Check]) -> Chart:
    """A panel per run and figure: which share took at most so long; bars are the intervals of its quantiles."""
    named = zip(checks, apart(checks), strict=True)
    known = [(each, of) for each, of in named if each.predicted.distributions_ms and each.distributions_ms]
    if len(known) > MOST_CHECKS:
        known = []
    panels = [
        _curves(each, name, of)
        for each, of in known
        for name in ("ttft", "tbt", "e2e")
        if name in each.distributions_ms
    ]
    caption = _("Shares of the requests, of TBT of the gaps between tokens. Predicted: from arrivals alone.")
    caption += " " + _(BEST)
    caption += " " + _("Bars are 90 % intervals of p50, p90 and p99.")
    return Chart(key="distributions", title=_("Measured and predicted distributions"), panels=panels, caption=caption)


def _curves(check: Check, name: str, of: str) -> Panel:
    percent = [100 * share for share in SHARES]
    measured, predicted = check.distributions_ms[name], check.predicted.distributions_ms.get(name, [])
    shade = SHADES["decode"]
    figures = {
        place: figure
        for part, place in PLACES.items()
        if (figure := check.predicted.figures.get(f"{name}_{part}_ms")) is not None
    }
    upright = interval_bars([*figures], [*figures.values()], shade)
    bars = replace(upright, x=upright.y, y=upright.x, width=5, opacity=0.3)
    series = [bars, Series(name=_("measured"), x=measured, y=percent, shade=INK, width=2)]
    series += [Series(name=_("predicted"), x=predicted, y=percent, shade=shade, width=2)] if predicted else []
    # To the end of p99's interval, unless that is so wide that the curves would be a line at the left.
    most = max([measured[-1], *predicted[-1:], *(figure.high for figure in figures.values())])
    high = 1.05 * min(most, 3 * max([measured[-1], *predicted[-1:]]))
    return Panel(
        title=f"{name.upper()}: {of}",
        series=series,
        x=Axis(label="ms", low=0, high=high),
        y=Axis(label="%", low=0, high=100),
    )


def steps_chart(found: Calibration) -> Chart:
    """GPU time of decode steps against their sequences, and a prompt's step, alone and beside a running stream, against its tokens, with what
    the runs reached shaded."""
    panels = []
    for name, role in found.roles.items():
        costs, box = role.engine.costs, role.engine.box
        if name != "prefill":
            context = box.context_tokens / max(box.sequences, 1)
            n = np.arange(1, 2 * box.sequences + 1)
            sizes = Axis(label=_("sequences in the step"), low=0, integer=True)
            title = _("{0}: a decode step, {1} tokens of context each", _(name), f"{context:,.0f}")
            lines = {"": partial(_decode_s, costs, context)}
            panels.append(_reached(title, n, lines, box.sequences, sizes, role.decode_ratios))
        if role.computes:
            p = np.arange(1, 2 * box.prompt_tokens, max(1, box.prompt_tokens // 200))
            step_s = partial(costs.prompt_step_s, captured=role.engine.limits.captured)
            tokens = Axis(label=_("prompt tokens in the step"), low=0)
            lines = {_("alone"): step_s}
            if name != "prefill":  # most steps that were measured are such
                lines[_("beside a running stream")] = partial(step_s, streams=1)
            title = _("{0}: a prompt's step", _(name))
            panels.append(_reached(title, p, lines, box.prompt_tokens, tokens, role.prompt_ratios))
    caption = _("What one step takes. Shaded: what the runs reached; beyond it a prediction is refused.")
    words = "Points: as far from the line (beside a running stream, where there are two) as the median of the measured steps."
    caption += " " + _(words)
    return Chart(key="steps", title=_("Calibrated steps"), panels=panels, caption=caption)


def _decode_s(costs: Costs, context: float, n: Array | IntArray) -> Array:
    """Steps of so many sequences with so much context each."""
    return costs.gpu_step_s(n.astype(int), np.asarray(context * n, dtype=float))


def _reached(
    title: str,
    x: IntArray,
    lines: Mapping[str, Callable[[IntArray], Array]],
    reached: float,
    axis: Axis,
    ratios: Sequence[tuple[float, float]],
) -> Panel:
    """`lines` by their names; the measured steps' `ratios` are to the last one."""
    high = 1.1e3 * max(float(step_s(x).max()) for step_s in lines.values())
    at, ratio = np.array([*ratios]).reshape(-1, 2).T
    points = Series(kind="points", x=at.tolist(), y=(1e3 * ratio * [*lines.values()][-1](at)).tolist(), shade=INK)
    shaded = Series(kind="area", x=[0, reached], y=[high, high], shade=FAINT, opacity=0.6)
    drawn = [
        Series(name=name, x=x.tolist(), y=(1e3 * step_s(x)).tolist(), shade=shade, width=2)
        for (name, step_s), shade in zip(lines.items(), (SHADES["decode"], SHADES["prefill"]), strict=False)
    ]
    return Panel(title=title, series=[shaded, *drawn, points], x=axis, y=Axis(label="ms", low=0, high=high))
