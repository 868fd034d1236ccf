"""Student's t on trials' figures: how large a change is, how sure it is, and how many pairs would show it.

Nothing inside a trial stands in for trials: intervals from blocks of requests are several times too narrow on a machine whose speed
varies from minute to minute (docs/statistics.md).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Literal

import numpy as np
from scipy import special

from pdbench.analysis.metrics import Array

Design = Literal["pairs", "joined", "apart"]
"""Pairs of trials that are independent of each other; pairs whose neighbours share a server start; trials that do not pair."""
NOTABLE = 0.05
"""A change of 5 % counts."""
POWER = 0.8
MOST_TRIALS = 1000
PILOT_CONFIDENCE = 0.7
LEAST_PAIRS = 5
STOPPING_CONFIDENCE = 0.97
"""Of the interval whose width ends a run: with 5 pairs or more it covers 95 % although it was looked at after every pair."""


@dataclass(frozen=True)
class ConfidenceInterval:
    """A change with its bounds, of 95 % confidence unless named."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """mean(b) - mean(a): its variance on `freedom` degrees, and the variance of one pair (of one trial of each, apart)."""

    value: float
    variance: float
    freedom: float
    variance_of_pair: float
    pilot: int
    paired: bool

    def interval(self, confidence: float = 0.95) -> ConfidenceInterval:
        reach = float(special.stdtrit(self.freedom, (1 + confidence) / 2)) * sqrt(self.variance)
        return ConfidenceInterval(self.value, self.value - reach, self.value + reach)

    @property
    def p(self) -> float:
        """Two-sided p of no change."""
        if not self.variance:
            return 0.0 if self.value else 1.0
        return float(2 * special.stdtr(self.freedom, -abs(self.value) / sqrt(self.variance)))

    def pairs_to_show(self, change: float) -> int | None:
        """Pairs (trials of each, apart) that find a true relative `change` of logarithms with 80 % power; None above 1,000.

        Power of the two-sided t test (noncentral t). The variance of a few trials is itself uncertain, so its upper 70 %
        confidence bound is used (after Browne 1995): a plan from the bare estimate falls short too often.
        """
        variance = self.variance_of_pair * self.pilot / float(special.chdtri(self.pilot, PILOT_CONFIDENCE))

        def power(pairs: int) -> float:
            freedom = (pairs - 1) * (1 if self.paired else 2)
            shift = min(abs(log(change)) / sqrt(max(variance, 1e-18) / pairs), 20.0)
            return float(1 - special.nctdtr(freedom, shift, special.stdtrit(freedom, 0.975)))

        enough = bisect_left(range(2, MOST_TRIALS + 1), POWER, key=power) + 2
        return enough if enough <= MOST_TRIALS else None

    @property
    def width(self) -> float:
        """Half the interval of logarithms that --until looks at, as a relative change; infinite with fewer than 5 pairs."""
        if self.pilot + 1 < LEAST_PAIRS:
            return inf
        bounds = self.interval(STOPPING_CONFIDENCE)
        return float(np.expm1((bounds.high - bounds.low) / 2))


def effect(a: Array, b: Array, design: Design) -> Effect:
    """The change from `a` to `b`, two values or more on each side; of the same length unless they are apart.

    Pairs: Student's paired t (Student 1908). Joined: of neighbouring pairs one side shares a server start, so the variance of the
    mean is at most (2k - 1) / k^2 times the mean squared step from pair to pair, whatever part of it the starts make (after
    von Neumann 1941). Apart: Welch's t (Welch 1947), on at most the degrees of two sides as short as the shorter: with 2 trials against 10
    Welch's own gave 10 % false alarms, so 3 % (simulated, normal and equally varied; docs/statistics.md).
    """
    value = float(np.mean(b) - np.mean(a))
    if design == "apart":
        of_a, of_b = (float(np.var(side, ddof=1)) / len(side) for side in (a, b))
        total = of_a + of_b
        freedom = total**2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)) if total else 1.0
        freedom = min(freedom, 2.0 * (min(len(a), len(b)) - 1))
        pair = float(np.var(a, ddof=1) + np.var(b, ddof=1))
        return Effect(value, total, freedom, pair, len(a) + len(b) - 2, paired=False)
    pairs, changes = len(a), b - a
    if design == "joined":
        step = float(np.mean(np.diff(changes) ** 2))
        return Effect(value, step * (2 * pairs - 1) / pairs**2, pairs - 1, step, pairs - 1, paired=True)
    variance = float(np.var(changes, ddof=1))
    return Effect(value, variance / pairs, pairs - 1, variance, pairs - 1, paired=True)


def holm(p: Sequence[float]) -> list[float]:
    """p of several metrics, adjusted so that any false alarm among all of them has at most the level (Holm 1979)."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    steps = values[order] * (len(values) - np.arange(len(values)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(values) else steps
    return [float(value) for value in adjusted]
