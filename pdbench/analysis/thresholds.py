"""The gate for CI: conditions such as `tbt_p99_ms > +5%` on a comparison; each fails, passes, or is uncertain."""

import re
from dataclasses import astuple, dataclass
from typing import Literal

from pdbench.analysis.compare import COUNTED_BY, Comparison, Difference
from pdbench.analysis.metrics import METRICS
from pdbench.analysis.significance import ConfidenceInterval
from pdbench.errors import OptionError, UserError

Outcome = Literal["fails", "passes", "uncertain"]
FAILED, UNCERTAIN = 1, 3
_SHAPE = re.compile(r"\s*(\w+)\s*(>|<)\s*([+-])\s*(\d+(?:\.\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Condition:
    """What must not be: a metric whose change (in per cent or in its unit) lies above or below a limit."""

    text: str
    metric: str
    above: bool
    limit: float
    relative: bool


@dataclass(frozen=True)
class ThresholdResult:
    """A condition's outcome. `change` is what was compared with its limit, in its unit; None: no interval."""

    condition: Condition
    outcome: Outcome
    change: ConfidenceInterval | None
    difference: Difference


def check_metric(name: str | None, option: str) -> None:
    """Raises OptionError for a metric that does not exist."""
    if name is not None and name not in METRICS:
        raise OptionError(f"{option}: no metric {name}; there are {', '.join(METRICS)}")


def parse_width(text: str) -> tuple[str, float]:
    """(metric, relative half-width) of `METRIC<5%` (--until). Raises OptionError when it is none."""
    match = re.fullmatch(r"\s*(\w+)\s*<\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or float(match[2]) <= 0:
        raise OptionError(f'--until "{text}": write METRIC<PER CENT, as in "tbt_p99_ms<5%"')
    check_metric(match[1], "--until")
    return match[1], float(match[2]) / 100


def narrow_enough(comparison: Comparison, metric: str, width: float) -> bool:
    """Is the metric's interval at most `width` to each side? A metric that cannot be judged never is."""
    return any(
        line.metric.name == metric and line.effect is not None and line.effect.width <= width
        for line in comparison.differences
    )


def parse(text: str) -> Condition:
    """`METRIC > +5%`, `METRIC < -5%`, `METRIC > +3` (in its unit). Raises UserError when it is none of these."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        word = re.match(r"\s*(\w*)", text)
        known = "" if word and word[1] in METRICS else f"; METRIC is one of {', '.join(METRICS)}"
        raise UserError(
            f'--fail-if "{text}" is not a condition: write METRIC, > or <, a signed change in % or in the metric\'s unit, '
            f'as in "tbt_p99_ms > +5%"{known}'
        )
    check_metric(match[1], "--fail-if")
    limit = float(match[3] + match[4])
    return Condition(text.strip(), match[1], match[2] == ">", limit, bool(match[5]))


def evaluate(comparison: Comparison, conditions: list[Condition]) -> list[ThresholdResult]:
    """Each condition against the comparison. Raises UserError for a metric that the comparison does not have."""
    lines = {line.metric.name: line for line in comparison.differences}
    results = []
    for condition in conditions:
        if condition.metric not in lines:
            noted = "; ".join(str(mismatch) for mismatch in comparison.mismatches if mismatch.what == COUNTED_BY)
            why = f"not compared ({noted})" if noted else "not measured in both runs"
            raise UserError(f"--fail-if: {condition.metric} is {why}; there are {', '.join(lines)}")
        line = lines[condition.metric]
        change = line.ratio if condition.relative else line.difference
        if condition.relative and change:
            change = ConfidenceInterval(*(100 * (bound - 1) for bound in astuple(change)))
        bounds = (change.low, change.high) if change else ()
        beyond = {bound > condition.limit if condition.above else bound < condition.limit for bound in bounds}
        outcome: Outcome = "uncertain" if len(beyond) != 1 else "fails" if True in beyond else "passes"
        results.append(ThresholdResult(condition, outcome, change, line))
    return results


def exit_code(results: list[ThresholdResult]) -> int:
    """0 when all pass, 1 when one fails, 3 when none fails but one is uncertain."""
    outcomes = {result.outcome for result in results}
    return FAILED if "fails" in outcomes else UNCERTAIN if "uncertain" in outcomes else 0
