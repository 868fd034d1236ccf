"""How long the requests of checked runs took, predicted and measured, as curves."""

from collections.abc import Sequence
from dataclasses import replace

from pdbench.plan.records import Check
from pdbench.plan.seconds import SHARES
from pdbench.report.chart_types import INK, SHADES, Axis, Chart, Panel, Series
from pdbench.report.plan import interval_bars
from pdbench.report.text import translate as _

MOST_CHECKS = 4
"""Of more checks only the quantiles are drawn, in one picture (`checks_chart`)."""
PLACES = {"p50": 50, "p90": 90, "p99": 99}


def distributions_chart(checks: Sequence[Check]) -> Chart:
    """A panel per run and figure: which share took at most so long; bars are the intervals of its quantiles."""
    known = [each for each in checks if each.predicted.distributions_ms and each.distributions_ms]
    if len(known) > MOST_CHECKS:
        known = []
    panels = [_curves(each, name) for each in known for name in ("ttft", "tbt", "e2e") if name in each.distributions_ms]
    caption = _("Shares of the requests, of TBT of the gaps between tokens. Predicted: from arrivals alone.")
    caption += " " + _("Bars are 90 % intervals of p50, p90 and p99.")
    return Chart(key="distributions", title=_("Measured and predicted distributions"), panels=panels, caption=caption)


def _curves(check: Check, name: str) -> Panel:
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
    title = f"{name.upper()}, {check.predicted.layout.name}: {check.path}"
    return Panel(title=title, series=series, x=Axis(label="ms", low=0, high=high), y=Axis(label="%", low=0, high=100))
