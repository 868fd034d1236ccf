"""How sure a figure is: nested bootstrap over trials and requests, ratios and differences with 95 % intervals, trial counts.

docs/statistics.md gives the reasons and the formulas' sources. Pure functions of arrays; nothing here knows a run.
Try: pdbench compare single_results disaggregated_results
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.sparse import csr_array

Array = NDArray[np.float64]
REPLICATES = 1000
BLOCKS = 100
ALL_BLOCKS = 600
SMALL = 20_000
TO_SHOW = 0.05
POWER = 0.8
MOST_TRIALS = 1000
PILOT_CONFIDENCE = 0.7
_RANKS = np.union1d(np.linspace(0, 1, 257)[1:], np.linspace(0.97, 1, 257))


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


class Resampling:
    """How often each block of requests is drawn in each of 1,000 bootstrap replicates; one for all figures of a run.

    `trial` and `block` name each request's repetition and resampling unit. `within` resamples blocks inside their trials,
    `nested` trials first and then blocks inside each; both have the shape (replicates, blocks). `unit` is each request's row.
    """

    def __init__(self, trial: NDArray[np.int64], block: NDArray[np.int64], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        names, place = np.unique(trial, return_inverse=True)
        width = int(block.max(initial=0)) + 1
        units, self.unit = np.unique(place * width + block, return_inverse=True)
        sizes = np.bincount(units // width, minlength=len(names))
        every: NDArray[np.int64] = np.broadcast_to(np.arange(len(names)), (REPLICATES, len(names)))
        drawn: NDArray[np.int64] = random.integers(0, max(len(names), 1), size=(REPLICATES, len(names)))
        self.trials = len(names)
        self.within = _draw(random, every, sizes)
        self.nested = _draw(random, drawn, sizes)


def quantiles(
    values: Array, owner: NDArray[np.int64], resampling: Resampling, shares: Sequence[float]
) -> list[Estimate]:
    """Quantiles (0 < share < 1) of pooled values, each owned by a request, with variances by the nested bootstrap.

    A bootstrap of both levels counts the blocks' variance twice and that of k trials by (k-1)/k: with w the variance when
    blocks alone are resampled and n the nested one, the estimate is max(w, k/(k-1) (n - w)); docs/statistics.md derives it.
    """
    rising = np.sort(values)
    levels = rising[np.append(True, rising[1:] > rising[:-1])]
    if len(levels) > len(_RANKS):
        levels = np.unique(rising[np.ceil(_RANKS * (len(rising) - 1)).astype(np.int64)])
    level = np.minimum(np.searchsorted(levels, values), len(levels) - 1)
    shape = (resampling.within.shape[1], len(levels))
    counts = np.bincount(resampling.unit[owner] * shape[1] + level, minlength=shape[0] * shape[1])
    held = counts.reshape(shape).astype(np.float32)
    within = _weighted_quantiles(_times(resampling.within, held), levels, shares)
    nested = _weighted_quantiles(_times(resampling.nested, held), levels, shares)
    k, estimates = resampling.trials, []
    for number, value in enumerate(np.quantile(rising, shares)):
        scales = []
        for scale in (np.asarray, _log):
            w, n = float(np.nanvar(scale(within[:, number]))), float(np.nanvar(scale(nested[:, number])))
            scales.append(max(w, k / (k - 1) * (n - w)) if k > 1 else w)
        estimates.append(Estimate(float(value), scales[0], scales[1], k))
    return estimates


def of_trials(value: float, each: Sequence[float] | Array, within: float = 0.0) -> Estimate:
    """A figure that `each` trial has once (throughput, energy a token): `value` over all of them, the trials' variance.

    Three trials that happen to agree would promise too much, so the variance is never below `within` (of the logarithm).
    """
    known = np.asarray(each, dtype=float)
    if len(known) < 2:
        return Estimate(value, np.nan, np.nan, len(known))
    logs = float(np.var(np.log(known), ddof=1)) / len(known) if (known > 0).all() else np.nan
    variance = float(known.var(ddof=1)) / len(known)
    return Estimate(value, max(variance, within * value**2), max(logs, within), len(known))


def of_parts(top: Array, bottom: Array) -> float:
    """Variance of the logarithm of sum(top) / sum(bottom) that the trials' parts show, both of shape (trials, parts).

    The variance of a ratio of sums to first order, parts taken as batches of their trial; 0 where it cannot be told.
    """
    total, parts = float(top.sum()), top.shape[1]
    if not total > 0:
        return 0.0
    rest = top / total - bottom / bottom.sum()
    known = parts / (parts - 1) * float(((rest - rest.mean(axis=1, keepdims=True)) ** 2).sum())
    return known if np.isfinite(known) else 0.0


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

    Power of the two-sided t test (noncentral t). The variance of a few trials is itself uncertain, so its upper 70 %
    confidence bound is used (after Browne 1995): a plan from the bare estimate falls short too often.
    """
    each = a.log_variance * a.trials + b.log_variance * b.trials
    pilot = a.trials + b.trials - 2
    if min(a.trials, b.trials) < 2 or not np.isfinite(each):
        return None
    each *= pilot / special.chdtri(pilot, PILOT_CONFIDENCE)

    def power(trials: int) -> float:
        shift, freedom = log(1 + change) / sqrt(max(each, 1e-18) / trials), 2 * (trials - 1)
        return float(1 - special.nctdtr(freedom, min(shift, 20.0), special.stdtrit(freedom, 0.975)))

    enough = bisect_left(range(2, MOST_TRIALS + 1), POWER, key=power) + 2
    return enough if enough <= MOST_TRIALS else None


def smallest_shown(a: Estimate, b: Estimate) -> float | None:
    """The relative change that these trials could have shown (half the interval's width, as a share); None if unknown."""
    drawn = ratio(a, b)
    return None if drawn is None else sqrt(drawn.high / drawn.low) - 1


def blocks_of(trial: NDArray[np.int64]) -> NDArray[np.int64]:
    """A block for each request (sorted by sending): neighbours in time together, at most 100 a trial and about 600 in all.

    Requests that wait in one queue share their luck; blocks of neighbours keep that together when they are resampled.
    """
    block = np.zeros(len(trial), dtype=np.int64)
    names = np.unique(trial)
    most = max(min(BLOCKS, ALL_BLOCKS // max(len(names), 1)), 1)
    for name in names:
        inside = np.flatnonzero(trial == name)
        block[inside] = np.arange(len(inside)) * min(most, len(inside)) // len(inside)
    return block


def _draw(random: np.random.Generator, trials: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Weights of all blocks when each replicate (row) draws as many blocks from each of its trials as that trial has."""
    firsts, blocks = np.concatenate([[0], np.cumsum(sizes)]), int(sizes.sum())
    weights = np.zeros(len(trials) * blocks, dtype=np.int64)
    rows = np.arange(len(trials))[:, None] * blocks
    for column in trials.T:
        size = sizes[column][:, None]
        picked = (random.random((len(column), int(sizes.max()))) * size).astype(np.int64)
        inside = np.arange(picked.shape[1]) < size
        weights += np.bincount((rows + firsts[column][:, None] + picked)[inside], minlength=len(weights))
    return weights.reshape(len(trials), blocks).astype(np.float32)


def _times(weights: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Their matrix product; a sparse one while small, because waking BLAS's threads costs more than the sum."""
    if counts.size > SMALL:
        return weights @ counts
    product: NDArray[np.float32] = (csr_array(counts.T) @ weights.T).T
    return product


def _weighted_quantiles(counts: NDArray[np.float32], levels: Array, shares: Sequence[float]) -> Array:
    """Quantiles of each replicate from how often it holds each level, shape (replicates, shares); NaN for an empty one."""
    rising = np.cumsum(counts, axis=1)
    total = rising[:, -1:]
    found = [levels[np.argmax(rising >= share * total * (1 - 1e-6), axis=1)] for share in shares]
    return np.where(total > 0, np.stack(found, axis=1), np.nan)


def _reach(variance_a: float, variance_b: float, trials_a: int, trials_b: int) -> float:
    """Half the width of the 95 % interval: Student's t with Welch's degrees of freedom, counted in trials alone."""
    both = variance_a + variance_b
    if both <= 0:
        return 0.0
    freedom = both**2 / (variance_a**2 / (trials_a - 1) + variance_b**2 / (trials_b - 1))
    return float(special.stdtrit(freedom, 0.975) * sqrt(both))


def _log(values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    return np.full_like(logs, np.nan) if np.isneginf(logs).any() else logs
