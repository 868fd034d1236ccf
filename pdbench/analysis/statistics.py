"""How sure a figure is: nested bootstrap over trials and requests, ratios and differences with 95 % intervals, trial counts.

docs/statistics.md gives the reasons and the formulas' sources. Pure functions of arrays; nothing here knows a run.
Try: pdbench compare single_results disaggregated_results
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
REPLICATES = 1000
BLOCKS = 100
BINS = 2048
TO_SHOW = 0.05
POWER = 0.8
MOST_TRIALS = 1000
PILOT_CONFIDENCE = 0.8


@dataclass(frozen=True)
class Estimate:
    """A figure of one run with its variance, on its own scale and of its logarithm (NaN where it is not positive).

    `trials` repetitions stand behind it. `unjudged` says why no interval may be drawn from it; None when one may.
    """

    value: float
    variance: float
    log_variance: float
    trials: int
    unjudged: str | None = None


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bounds."""

    value: float
    low: float
    high: float


def quantiles(
    values: Array, trial: NDArray[np.int64], block: NDArray[np.int64], shares: Sequence[float], seed: int = 0
) -> list[Estimate]:
    """Quantiles (0 < share < 1) of pooled values and their variances by a nested bootstrap.

    `trial` and `block` name each value's repetition and resampling unit. Trials are resampled, then blocks within each.
    A bootstrap of both levels counts the blocks' variance twice and k trials' by (k-1)/k: with w the variance when blocks
    alone are resampled and n the nested one, the estimate is max(w, k/(k-1) (n - w)) (after Davison & Hinkley 1997, 3.8).
    """
    names, place = np.unique(trial, return_inverse=True)
    units, unit = np.unique(place * (int(block.max(initial=0)) + 1) + block, return_inverse=True)
    unit_trial = units // (int(block.max(initial=0)) + 1)
    levels = np.unique(values)
    if len(levels) > BINS:
        levels = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:], method="higher").astype(np.float64))
    level = np.minimum(np.searchsorted(levels, values), len(levels) - 1)
    counts = np.zeros((len(units), len(levels)), dtype=np.float32)
    np.add.at(counts, (unit, level), 1.0)
    random = np.random.default_rng(seed)
    within = _weighted_quantiles(_weights(random, unit_trial, len(names), nested=False) @ counts, levels, shares)
    nested = _weighted_quantiles(_weights(random, unit_trial, len(names), nested=True) @ counts, levels, shares)
    estimates = []
    for number, share in enumerate(shares):
        scales = []
        for scale in (np.asarray, _log):
            w, n = float(np.var(scale(within[:, number]))), float(np.var(scale(nested[:, number])))
            scales.append(max(w, len(names) / (len(names) - 1) * (n - w)) if len(names) > 1 else w)
        estimates.append(Estimate(float(np.quantile(values, share)), scales[0], scales[1], len(names)))
    return estimates


def mean_of_trials(values: Sequence[float]) -> Estimate:
    """A figure that each trial has once (throughput, energy a token): its mean and that mean's variance."""
    each = np.asarray(values, dtype=float)
    if len(each) < 2:
        return Estimate(float(each.mean()), np.nan, np.nan, len(each))
    logs = float(np.var(np.log(each), ddof=1)) if (each > 0).all() else np.nan
    return Estimate(float(each.mean()), float(each.var(ddof=1)) / len(each), logs / len(each), len(each))


def ratio(a: Estimate, b: Estimate) -> Interval | None:
    """b / a with its 95 % interval, symmetric on the log scale; None when it cannot be drawn."""
    spread = a.log_variance + b.log_variance
    if min(a.trials, b.trials) < 2 or a.value <= 0 or b.value <= 0 or not np.isfinite(spread):
        return None
    centre, reach = log(b.value / a.value), _reach(a.log_variance, b.log_variance, a.trials, b.trials)
    return Interval(exp(centre), exp(centre - reach), exp(centre + reach))


def difference(a: Estimate, b: Estimate) -> Interval | None:
    """b - a with its 95 % interval, in the figure's unit; None when it cannot be drawn."""
    if min(a.trials, b.trials) < 2 or not np.isfinite(a.variance + b.variance):
        return None
    centre, reach = b.value - a.value, _reach(a.variance, b.variance, a.trials, b.trials)
    return Interval(centre, centre - reach, centre + reach)


def trials_to_show(a: Estimate, b: Estimate, change: float = TO_SHOW) -> int | None:
    """Trials of each run after which a true relative `change` is found with 80 % power; None above 1,000 or unknown.

    Power of the two-sided t test (noncentral t). The variance of a few trials is itself uncertain, so its upper 80 %
    confidence bound is used (Browne 1995): a plan from the bare estimate would fall short half of the time.
    """
    each = a.log_variance * a.trials + b.log_variance * b.trials
    pilot = a.trials + b.trials - 2
    if min(a.trials, b.trials) < 2 or not np.isfinite(each):
        return None
    each *= pilot / stats.chi2.ppf(1 - PILOT_CONFIDENCE, pilot)
    trials = np.arange(2, MOST_TRIALS + 1)
    freedom = 2 * (trials - 1)
    shift = log(1 + change) / np.sqrt(max(each, 1e-18) / trials)
    enough = 1 - stats.nct.cdf(stats.t.ppf(0.975, freedom), freedom, np.minimum(shift, 30.0)) >= POWER
    return int(trials[np.argmax(enough)]) if enough.any() else None


def smallest_shown(a: Estimate, b: Estimate) -> float | None:
    """The relative change that these trials could have shown (half the interval's width, as a share); None if unknown."""
    drawn = ratio(a, b)
    return None if drawn is None else sqrt(drawn.high / drawn.low) - 1


def blocks_of(trial: NDArray[np.int64]) -> NDArray[np.int64]:
    """A block for each request (sorted by sending): neighbours in time together, at most 100 blocks a trial.

    Requests that wait in one queue share their luck; blocks of neighbours keep that together when they are resampled.
    """
    block = np.zeros(len(trial), dtype=np.int64)
    for name in np.unique(trial):
        inside = np.flatnonzero(trial == name)
        block[inside] = np.arange(len(inside)) * min(BLOCKS, len(inside)) // len(inside)
    return block


def _weights(
    random: np.random.Generator, unit_trial: NDArray[np.int64], trials: int, nested: bool
) -> NDArray[np.float32]:
    """How often each unit is drawn in each replicate, shape (replicates, units)."""
    times = np.ones((REPLICATES, trials), dtype=np.int64)
    if nested:
        times = random.multinomial(trials, np.full(trials, 1 / trials), size=REPLICATES)
    weights = np.empty((REPLICATES, len(unit_trial)), dtype=np.float32)
    for number in range(trials):
        inside = np.flatnonzero(unit_trial == number)
        weights[:, inside] = random.multinomial(times[:, number] * len(inside), np.full(len(inside), 1 / len(inside)))
    return weights


def _weighted_quantiles(counts: NDArray[np.float32], levels: Array, shares: Sequence[float]) -> Array:
    """Quantiles of each replicate from how often it holds each level, shape (replicates, shares)."""
    rising = np.cumsum(counts, axis=1, dtype=np.float64)
    total = rising[:, -1:]
    places = [np.argmax(rising >= share * total - 1e-6, axis=1) for share in shares]
    return np.stack([levels[place] for place in places], axis=1)


def _reach(variance_a: float, variance_b: float, trials_a: int, trials_b: int) -> float:
    """Half the width of the 95 % interval: Student's t with Welch's degrees of freedom, counted in trials alone."""
    both = variance_a + variance_b
    if both <= 0:
        return 0.0
    freedom = both**2 / (variance_a**2 / (trials_a - 1) + variance_b**2 / (trials_b - 1))
    return float(stats.t.ppf(0.975, freedom) * sqrt(both))


def _log(values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    return logs if np.isfinite(logs).all() else np.full_like(logs, np.nan)
