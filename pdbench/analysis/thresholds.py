"""The CI gate: conditions such as `tbt_p99_ms > +5%` on a comparison; each fails, passes, or cannot be told.

Try: pdbench compare single_results disaggregated_results --fail-if "tbt_p99_ms > +5%"
"""

import re
from dataclasses import dataclass
from typing import Literal

from pdbench.analysis.compare import METRICS, Comparison, Difference
from pdbench.analysis.statistics import Interval
from pdbench.analysis.verdicts import number
from pdbench.errors import UserError

Outcome = Literal["fails", "passes", "uncertain"]
FAILED, UNCERTAIN = 1, 3
_SHAPE = re.compile(r"\s*(\w+)\s*(>|<)\s*([+-]?)\s*(\d+(?:\.\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Condition:
    """What must not be: a metric whose change (in per cent or in its unit) lies above or below a limit."""

    text: str
    metric: str
    above: bool
    limit: float
    relative: bool


@dataclass(frozen=True)
class Ruling:
    """A condition's outcome with the reason in one line."""

    condition: Condition
    outcome: Outcome
    reason: str


def parse(text: str) -> Condition:
    """`METRIC > +5%`, `METRIC < -5%`, `METRIC > +3` (in its unit). Raises UserError with the shape, or the metrics, when it is none of these."""
    match = _SHAPE.fullmatch(text)
    if match is None or not match[3]:
        raise UserError(
            f'--fail-if "{text}" is not a condition: write METRIC, > or <, a signed change in % or in the metric\'s unit, '
            'as in "tbt_p99_ms > +5%"'
        )
    if match[1] not in METRICS:
        raise UserError(f"--fail-if: no metric {match[1]}; there are {', '.join(METRICS)}")
    limit = float(match[3] + match[4])
    return Condition(text.strip(), match[1], match[2] == ">", limit, bool(match[5]))


def rule(comparison: Comparison, conditions: list[Condition]) -> list[Ruling]:
    """Each condition against the comparison. Raises UserError for a metric that the comparison does not have."""
    lines = {line.metric.name: line for line in comparison.differences}
    for condition in conditions:
        if condition.metric not in lines:
            raise UserError(f"--fail-if: {condition.metric} is not measured in both runs; there are {', '.join(lines)}")
    return [_rule(lines[condition.metric], condition) for condition in conditions]


def exit_code(rulings: list[Ruling]) -> int:
    """0 when all pass, 1 when one fails, 3 when none fails but one cannot be told."""
    outcomes = {ruling.outcome for ruling in rulings}
    return FAILED if "fails" in outcomes else UNCERTAIN if "uncertain" in outcomes else 0


def _rule(line: Difference, condition: Condition) -> Ruling:
    change = _in_per_cent(line.ratio) if condition.relative else line.difference
    unit = "%" if condition.relative else line.metric.unit
    if change is None:
        return Ruling(condition, "uncertain", f"{condition.text}: {line.words}")
    beyond = [(bound > condition.limit) == condition.above for bound in (change.low, change.high)]
    outcome: Outcome = "fails" if all(beyond) else "uncertain" if any(beyond) else "passes"
    span = f"{_signed(change.value)} {unit}, 95 % {_signed(change.low)} to {_signed(change.high)}"
    return Ruling(condition, outcome, f"{condition.text}: {span}")


def _in_per_cent(ratio: Interval | None) -> Interval | None:
    return ratio and Interval(*(100 * (bound - 1) for bound in (ratio.value, ratio.low, ratio.high)))


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"
