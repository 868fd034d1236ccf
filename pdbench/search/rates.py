"""Which rate to load next, when a load has told enough, and what all loads together say of the highest rate that is held.

The share of missed requests rises with the rate: its log odds are taken as linear in the log of the rate near the rate where it equals
what may be missed. Both, that rate and the slope, are unknown, and every load is evidence on them (Bayes on a grid). A load is Wald's
sequential test: it ends as soon as its rate is surely held or surely not (`SURE`), or with its last request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

import numpy as np
from scipy import special

from pdbench.search.evidence import LEAST_REQUESTS, USUAL_INFLATION, Array, Evidence, Outcome, VirtualQueue, plain

SURE = 0.98
INTERVAL = 0.97
"""Of what is possible lies in an interval that covers 95 %: it is looked at after every load, which stops when it is narrow."""
FACTOR = 2.0
"""From rate to rate, until one was held and one was not."""
REACH = FACTOR**2
"""A rate is judged among those so near. All that lie above are the prior's: they would call the first rate held by a few good requests."""
SIDES = (0.15, 0.85)
"""Loads run at these quantiles of what is possible in turns: two rates tell the slope, one never does."""
CELLS, DECADES = 500, 9.0
SLOPES = np.geomspace(1.0, 250.0, 24)
USUAL_SLOPE, SLOPE_SPREAD = 10.0, 1.2
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
        self._prior = -0.5 * ((np.log(SLOPES) - log(USUAL_SLOPE)) / SLOPE_SPREAD) ** 2
        self._inflation = USUAL_INFLATION
        self._learn()

    def add(self, outcome: Outcome) -> None:
        ended_by_queue = outcome.held is False and not outcome.share_missed > self.may_miss
        self.outcomes.append(replace(outcome, overload=ended_by_queue))
        self._learn()

    def _learn(self) -> None:
        """From all loads; where they contradict each other, as on a machine with moods, each says less (Birge 1932)."""
        evidence = self.evidence()
        self._update(evidence)
        row, column = np.unravel_index(int(self._weights.argmax()), self._weights.shape)
        excess, loads = 0.0, 0
        for each in evidence:
            if each.missed < NEAR_SHARE:
                odds = special.logit(self.may_miss) + SLOPES[column] * (log(each.rate) - self._logs[row])
                expected = float(np.clip(special.expit(odds), 1e-4, 1 - 1e-4))
                excess += each.requests * (each.missed - expected) ** 2 / (expected * (1 - expected))
                loads += 1
        ratio = excess / max(1, loads - 2)
        if loads > 2 and ratio > 1:
            self._inflation *= ratio
            self._update([replace(each, requests=each.requests / ratio) for each in evidence])

    def next_rate(self) -> float:
        """The rate that tells most: a little below and above what is most likely, once one rate was held and one was not."""
        held = [each.rate for each in self.outcomes if each.held]
        lost = [each.rate for each in self.outcomes if each.held is False]
        if not self.outcomes:
            return self.first_rate
        if any(each.held is None for each in self.outcomes) or (held and lost):
            sent = [each.rate for each in self.outcomes]
            likely = self._quantile(SIDES[len(self.outcomes) % len(SIDES)])
            # What is far from all loads is only believed.
            return min(max(likely, min(sent) / FACTOR), max(sent) * FACTOR)
        return max(held) * FACTOR if held else min(lost) / FACTOR

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
        if not any(each.held is not True and each.share_missed >= self.may_miss for each in self.outcomes):
            # What is believed above the highest rate that was sent is no measurement.
            low = max((each.rate for each in self.outcomes if each.share_missed <= self.may_miss), default=0.0)
            return Answer(low, low, np.inf)
        return Answer(self._quantile(0.5), low, high)

    def at_scale(self, scale: float) -> Answer:
        """What the same loads say of the SLO with all its limits times `scale`."""
        scaled = [replace(each, score=each.score / scale) for each in self.outcomes]
        # What was decided, was decided of the SLO as it is; an overload stays one.
        scaled = [replace(e, held=False if e.held is False and e.share_missed >= NEAR_SHARE else None) for e in scaled]
        return Search(self.may_miss, self.first_rate, self.unit_s, scaled).answer()

    def evidence(self) -> list[Evidence]:
        """What each load says; near the rate that is sought, with luck in the arrivals taken out."""
        near = [each for each in self.outcomes if each.share_missed < NEAR_SHARE]
        far = [each for each in self.outcomes if each.share_missed >= NEAR_SHARE]
        without = plain(near) if near else []
        if without:
            self._inflation = len(near[0].score) / without[0].requests
        adjusted = VirtualQueue(near, self.unit_s).evidence() if self.unit_s is not None and near else None
        return (adjusted or without) + plain(far)

    def _update(self, evidence: Sequence[Evidence]) -> None:
        """Log weights of every (log rate, slope), on a grid as fine as what is known."""
        low, high = log(self.first_rate) - DECADES, log(self.first_rate) + DECADES
        for _ in range(3):
            self._logs = np.linspace(low, high, CELLS)
            weights = np.broadcast_to(self._prior, (CELLS, len(SLOPES))).copy()
            for each in evidence:
                weights += self._of(each)
            self._weights = weights - weights.max()
            step, possible = self._logs[1] - self._logs[0], np.flatnonzero(self._weights.max(axis=1) > -14)
            low, high = self._logs[possible[0]] - step, self._logs[possible[-1]] + step

    def _of(self, each: Evidence) -> Array:
        """Log likelihood of one load; of one that was overloaded, of at least so many misses: it never became steady."""
        odds = special.logit(self.may_miss) + SLOPES * (log(each.rate) - self._logs[:, None])
        odds = np.clip(odds, -14, 14)
        if each.missed >= NEAR_SHARE:
            missed = NEAR_SHARE * each.requests
            chance = special.betainc(max(missed, 0.5), each.requests - missed + 1, special.expit(odds))
            return np.log(np.maximum(chance, 1e-12))
        return each.requests * (each.missed * special.log_expit(odds) + (1 - each.missed) * special.log_expit(-odds))

    def _held(self, weights: Array, rate: float) -> float:
        distance = abs(self._logs - log(rate))
        near = distance <= max(log(REACH), distance.min())  # where all that is possible is farther, the nearest of it
        mass = np.exp(weights[near] - weights[near].max()).sum(axis=1)
        return float(mass[self._logs[near] >= log(rate)].sum() / mass.sum())

    def _quantile(self, share: float) -> float:
        mass = np.exp(self._weights).sum(axis=1).cumsum()
        return exp(float(np.interp(share * mass[-1], mass, self._logs)))
