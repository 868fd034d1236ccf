"""Two runs to their differences: each metric of B against A with intervals and a verdict.

Try: pdbench compare single_results disaggregated_results
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pdbench.analysis import differences, statistics, verdicts
from pdbench.analysis.differences import Mismatch
from pdbench.analysis.metrics import Array, Measured, measure
from pdbench.analysis.rates import rates
from pdbench.analysis.statistics import Estimate, Interval
from pdbench.records import Flag, Run

Verdict = Literal["better", "worse", "same", "unclear", "unjudged"]
QUANTILES = (0.5, 0.9, 0.99)
BEYOND_QUANTILE = 4
_NOTABLE = 1 + statistics.TO_SHOW


@dataclass(frozen=True)
class Metric:
    """A figure that runs are compared by: its name (as --fail-if takes it), title, unit and which way is better."""

    name: str
    title: str
    unit: str
    lower_is_better: bool


@dataclass(frozen=True)
class Difference:
    """One metric of both runs; `ratio` is B / A, `difference` B - A. `trials_needed` would show a change of 5 %."""

    metric: Metric
    a: Estimate
    b: Estimate
    ratio: Interval | None
    difference: Interval | None
    verdict: Verdict
    trials_needed: int | None

    @property
    def one_trial(self) -> bool:
        """Is there no interval because a run has a single trial?"""
        return "one-trial" in (self.a.unjudged, self.b.unjudged)

    @property
    def change(self) -> float | None:
        """B / A as it was seen, whether or not an interval can be drawn; None where either is not positive."""
        return self.b.value / self.a.value if self.a.value > 0 and self.b.value > 0 else None

    @property
    def leaning(self) -> Verdict:
        """What one trial hints at: better or worse when it changed by more than 5 %, else the same."""
        change = self.change
        if change is None or 1 / _NOTABLE <= change <= _NOTABLE:
            return "same"
        return "better" if (change < 1) == self.metric.lower_is_better else "worse"

    @property
    def words(self) -> str:
        """The verdict as one English line; `verdicts.line` has the other languages."""
        return verdicts.line(self)


@dataclass(frozen=True)
class Comparison:
    """All metrics that both runs have, what else differs between them, and what a reader must know of either."""

    names: tuple[str, str]
    differences: list[Difference]
    mismatches: list[Mismatch]
    flags: tuple[list[Flag], list[Flag]]

    @property
    def one_trial(self) -> bool:
        """Is there no interval because a run has a single trial?"""
        return any(line.one_trial for line in self.differences)


LATENCIES: dict[str, tuple[str, Callable[[Measured], tuple[Array, "np.ndarray[tuple[int], np.dtype[np.int64]]"]]]] = {
    "ttft": ("TTFT", lambda one: _requests(one, one.ttft_ms)),
    "tbt": ("TBT", lambda one: (one.tbt_ms, one.tbt_owner)),
    "e2e": ("E2E", lambda one: _requests(one, one.e2e_ms)),
}
RATES = (
    Metric("output_tokens_per_s", "Output tokens/s", "", False),
    Metric("output_tokens_per_s_per_device", "Tokens/s per GPU", "", False),
    Metric("goodput_requests_per_s", "Goodput", "requests/s", False),
    Metric("j_per_output_token", "Energy per token", "J", True),
    Metric("mean_power_w", "Mean power", "W", True),
)
METRICS = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{key}_p{share * 100:.0f}_ms", f"{title} p{share * 100:.0f}", "ms", True)
            for key, (title, _) in LATENCIES.items()
            for share in QUANTILES
        ),
        *RATES,
    )
}


def compare(a: Run, b: Run, anyway: bool = False, names: tuple[str, str] | None = None) -> Comparison:
    """B against A. Raises UserError when they were not measured alike (unless `anyway`) or share no metric."""
    names = names or ((a.name, b.name) if a.name != b.name else (f"{a.name} A", f"{b.name} B"))
    if not anyway:
        differences.refuse(a, b, names)
    return compare_estimates(estimates(a), estimates(b), names, differences.find(a, b), (flags_of(a), flags_of(b)))


def compare_estimates(
    a: dict[Metric, Estimate],
    b: dict[Metric, Estimate],
    names: tuple[str, str],
    mismatches: Sequence[Mismatch] = (),
    flags: tuple[list[Flag], list[Flag]] = ([], []),
) -> Comparison:
    """The same from estimates made before, so that many runs are each read once."""
    lines = [judge(metric, a[metric], b[metric]) for metric in a if metric in b]
    return Comparison(names, lines, list(mismatches), flags)


def judge(metric: Metric, a: Estimate, b: Estimate) -> Difference:
    """Better or worse when the ratio's interval excludes 1; the same when it lies within 5 % of it; else unclear."""
    drawable = a.unjudged is None and b.unjudged is None
    ratio, difference = (statistics.ratio(a, b), statistics.difference(a, b)) if drawable else (None, None)
    verdict: Verdict = "unjudged"
    if ratio:
        verdict = "unclear"
        if not ratio.low <= 1 <= ratio.high:
            verdict = "better" if (ratio.value < 1) == metric.lower_is_better else "worse"
        elif ratio.low >= 1 / _NOTABLE and ratio.high <= _NOTABLE:
            verdict = "same"
    return Difference(metric, a, b, ratio, difference, verdict, statistics.trials_to_show(a, b) if drawable else None)


def estimates(run: Run, measured: Measured | None = None) -> dict[Metric, Estimate]:
    """Every metric that the run has, with its variance."""
    measured = measured or measure(run)
    found: dict[Metric, Estimate] = {}
    in_trial = measured.trial >= 0
    place, trial = np.cumsum(in_trial) - 1, measured.trial[in_trial]
    resampling = statistics.Resampling(trial, statistics.blocks_of(trial))
    for key, (_, pick) in LATENCIES.items():
        values, owner = pick(measured)
        values, owner = values[in_trial[owner]], place[owner[in_trial[owner]]]
        if not len(values):
            continue
        drawn = statistics.quantiles(values, owner, resampling, QUANTILES)
        for share, estimate in zip(QUANTILES, drawn, strict=True):
            metric = METRICS[f"{key}_p{share * 100:.0f}_ms"]
            found[metric] = _with_reason(estimate, len(values), share)
    once = rates(run, measured)
    found |= {metric: _with_reason(once[metric.name]) for metric in RATES if metric.name in once}
    return found


def flags_of(run: Run) -> list[Flag]:
    """What a reader must know wherever the run's figures appear: its own flags, and a failed gate."""
    failed = run.gate is not None and not run.gate.passed and all(flag.name != "gate-failed" for flag in run.flags)
    return list(dict.fromkeys(run.flags)) + ([Flag("gate-failed", run.gate.detail)] if failed and run.gate else [])


def _with_reason(estimate: Estimate, values: int | None = None, share: float = 0.0) -> Estimate:
    reason = None
    needed = round(BEYOND_QUANTILE / (1 - share))
    if estimate.trials < 2:
        reason = "one-trial"
    elif values is not None and values < needed:
        reason = f"few-values:{values}:{needed}"
    return Estimate(estimate.value, estimate.variance, estimate.log_variance, estimate.trials, reason)


def _requests(one: Measured, values: Array) -> "tuple[Array, np.ndarray[tuple[int], np.dtype[np.int64]]]":
    owner = np.flatnonzero(np.isfinite(values))
    return values[owner], owner
