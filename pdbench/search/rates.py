"""Which rate to load next, when a load has told enough, and what all loads together say of the highest rate that is held.

The share of missed requests rises with the rate: its log odds are taken as linear in the log of the rate near the rate where it equals
what may be missed. Both, that rate and the slope, are unknown, and every load is evidence on them (Bayes on a grid). So is how much that
rate varies from load to load. A load is Wald's sequential test: it ends as soon as its rate is surely held or surely not (`SURE`), or with its last request.
"""

from dataclasses import dataclass, field, replace
from math import exp, log

import numpy as np
from scipy import special

from pdbench.search.evidence import (
    LEAST_REQUESTS,
    USUAL_INFLATION,
    Array,
    Evidence,
    Outcome,
    VirtualQueue,
    inflation,
    plain,
)

SURE = 0.98
INTERVAL = 0.97
"""Of what is possible lies in an interval that covers 95 %: it is looked at after every load, which stops when it is narrow."""
FACTOR = 2.0
"""From rate to rate, until one was held and one was not."""
REACH = FACTOR**2
"""A rate is judged among those so near. All that lie above are the prior's: they would call the first rate held by a few good requests."""
SIDES = (0.15, 0.85)
"""Loads run at these quantiles of what is possible in turns: two rates tell the slope, one never does."""
CELLS, DECADES = 300, 9.0
SLOPES = np.geomspace(1.0, 250.0, 16)
USUAL_SLOPE, SLOPE_SPREAD = 10.0, 1.2
VARIATIONS = (0.0, 0.03, 0.1, 0.3)
"""Standard deviations, from load to load, of the log of the rate that is held; each is believed to be e**LESS_LIKELY times less likely than the one before."""
LESS_LIKELY = 1.5
NEAR, NEAR_LOADS = 3.0, 2
"""No rate is found before so many loads ran within so many times the precision of it: from farther away, the curve is only believed."""
NEAR_SHARE = 0.5
"""Loads in which more was missed have no steady state that a virtual queue could follow."""


@dataclass(frozen=True)
class Answer:
    """The highest rate held, with its 95 % interval; `low` 0: no rate was held, `high` inf: none was missed."""

    rate: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Half the interval, as a relative change."""
        return (self.high / self.low) ** 0.5 - 1 if self.low > 0 else np.inf


@dataclass
class Search:
    """The loads at one deployment. `may_miss` is the share of requests that may miss the SLO, `unit_s` very many arrivals as they are
    sent, at 1 per second (None: they are not random)."""

    may_miss: float
    first_rate: float
    unit_s: Array | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        slopes = -0.5 * ((np.log(SLOPES) - log(USUAL_SLOPE)) / SLOPE_SPREAD) ** 2
        self._prior = np.concatenate([slopes - LESS_LIKELY * place for place in range(len(VARIATIONS))])
        self._inflation = USUAL_INFLATION
        self._update()

    def add(self, outcome: Outcome) -> None:
        ended_by_queue = outcome.held is False and not outcome.share_missed > self.may_miss
        self.outcomes.append(replace(outcome, overload=ended_by_queue))
        self._update()

    def next_rate(self) -> float:
        """The rate that tells most: a little below and above what is most likely, once one rate was held and one was not."""
        if not self.outcomes:
            return self.first_rate
        sent = [each.rate for each in self.outcomes]
        held = [each.rate for each in self.outcomes if each.held]
        lost = [each.rate for each in self.outcomes if each.held is False]
        if not any(each.held is None for each in self.outcomes) and not (held and lost):
            return max(held) * FACTOR if held else min(lost) / FACTOR
        side = SIDES[len(self.outcomes) % len(SIDES)]
        # What is far from all loads is only believed.
        rate = min(max(self._quantile(side), min(sent) / FACTOR), max(sent) * FACTOR)
        # Nor is what is known already sent again, unless other loads have made it doubtful.
        middle = self._quantile(0.5)
        low = max((each for each in held if each < middle), default=min(rate, middle))
        high = min((each for each in lost if each > middle), default=max(rate, middle))
        first, last = (low * (high / low) ** share for share in SIDES)
        return min(max(rate, first), last)

    def decided(self, rate: float, missed: int, known: int) -> bool | None:
        """Is this rate surely held, or surely not, by what is known of its load so far and by all loads before?"""
        if known < LEAST_REQUESTS:
            return None
        worth = known / self._inflation
        weights = self._weights + self._of(Evidence(rate, missed / known, worth))
        share = self._held(weights, rate)
        return True if share > SURE else False if share < 1 - SURE else None

    def found(self, precision: float) -> bool:
        """Is the rate known this well, and by loads near it?"""
        answer = self.answer()
        if answer.width > precision:
            return False
        reach = NEAR * precision
        near = [abs(log(each.rate / answer.rate)) <= reach and each.share_missed < NEAR_SHARE for each in self.outcomes]
        return sum(near) >= NEAR_LOADS

    def answer(self) -> Answer:
        tail = (1 - INTERVAL) / 2
        low, high = (self._quantile(share) for share in (tail, 1 - tail))
        # Only loads bound the answer, never what was believed before them.
        if not any(each.held is not False and each.share_missed <= self.may_miss for each in self.outcomes):
            low = 0.0
        # A rate that was missed bounds nothing once higher ones were held.
        if not any(
            each.held is not True and each.share_missed >= self.may_miss and each.rate >= low for each in self.outcomes
        ):
            # What is believed above the highest rate that was sent is no measurement.
            low = max((each.rate for each in self.outcomes if each.share_missed <= self.may_miss), default=0.0)
            return Answer(low, low, np.inf)
        # Nor is what is believed far above a rate that was surely missed.
        lost = [each.rate for each in self.outcomes if each.held is False and each.rate >= low]
        return Answer(self._quantile(0.5), low, min([high, *(REACH * rate for rate in lost)]))

    def at_scale(self, scale: float) -> Answer:
        """What the same loads say of the SLO with all its limits times `scale`."""
        scaled = [replace(each, score=each.score / scale) for each in self.outcomes]
        # What was decided, was decided of the SLO as it is; an overload stays one.
        scaled = [replace(e, held=False if e.held is False and e.share_missed >= NEAR_SHARE else None) for e in scaled]
        return Search(self.may_miss, self.first_rate, self.unit_s, scaled).answer()

    def evidence(self) -> list[Evidence]:
        """What each load says; near the rate that is sought, with chance in the arrivals taken out."""
        near = [each for each in self.outcomes if each.share_missed < NEAR_SHARE and each.settled]
        far = [each for each in self.outcomes if not (each.share_missed < NEAR_SHARE and each.settled)]
        without = plain(near) if near else []
        adjusted = VirtualQueue(near, self.unit_s).evidence() if self.unit_s is not None and near else None
        return (adjusted or without) + plain(far)

    def _update(self) -> None:
        """Log weights of every (log rate, variation and slope), by all loads, on a grid as fine as what is known."""
        evidence = self.evidence()
        settled = [each.missed.astype(float) for each in self.outcomes if each.held is None]
        self._inflation = inflation(settled)
        low, high = log(self.first_rate) - DECADES, log(self.first_rate) + DECADES
        for _ in range(3):
            self._logs = np.linspace(low, high, CELLS)
            distance = self._logs[:, None] - self._logs
            self._shifts = [np.exp(-0.5 * (distance / spread) ** 2) for spread in VARIATIONS if spread]
            self._shifts = [shift / shift.sum(axis=1, keepdims=True) for shift in self._shifts]
            weights = np.broadcast_to(self._prior, (CELLS, len(self._prior))).copy()
            for each in evidence:
                weights += self._of(each)
            self._weights = weights - weights.max()
            step, possible = self._logs[1] - self._logs[0], np.flatnonzero(self._weights.max(axis=1) > -10)
            low, high = self._logs[possible[0]] - step, self._logs[possible[-1]] + step

    def _of(self, each: Evidence) -> Array:
        """Log likelihood of one load; of one that never became steady, of at least so many misses."""
        odds = special.logit(self.may_miss) + SLOPES * (log(each.rate) - self._logs[:, None])
        odds = np.clip(odds, -14, 14)
        if each.at_least or each.missed >= NEAR_SHARE:
            missed = min(each.missed, NEAR_SHARE) * each.requests
            chance = special.betainc(max(missed, 0.5), each.requests - missed + 1, special.expit(odds))
            likely = np.log(np.maximum(chance, 1e-12))
        else:
            likely = each.missed * special.log_expit(odds) + (1 - each.missed) * special.log_expit(-odds)
            likely *= each.requests
        # The load may have had another rate than the usual one, as far from it as rates vary.
        chance, most = np.exp(likely - likely.max()), likely.max()
        return np.hstack([likely, *(np.log(np.maximum(shift @ chance, 1e-300)) + most for shift in self._shifts)])

    def _held(self, weights: Array, rate: float) -> float:
        distance = abs(self._logs - log(rate))
        near = distance <= max(log(REACH), distance.min())  # where all that is possible is farther, the nearest of it
        mass = np.exp(weights[near] - weights[near].max()).sum(axis=1)
        return float(mass[self._logs[near] >= log(rate)].sum() / mass.sum())

    def _quantile(self, share: float) -> float:
        mass = np.exp(self._weights).sum(axis=1)
        below = mass.cumsum() - mass / 2
        return exp(float(np.interp(share * mass.sum(), below, self._logs)))
