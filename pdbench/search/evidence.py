"""One load's outcome as evidence on the share of requests that miss the SLO: chance in the arrivals taken out, correlation counted.

Requests under load come in good and bad spells, so n of them say as much as n / inflation independent ones. Much of a spell is the
arrivals' doing, and those are known: a control variate (Lavenberg and Welch 1981) compares what a virtual queue does with the arrivals
that were sent to what it does with very many like them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
USUAL_INFLATION, USUAL_REQUESTS = 4.0, 60.0
"""Before anything is known: the inflation, which counts as much as so many requests that missed."""
MOST_WORTH = 8.0
"""Independent requests that one whose arrivals are accounted for can be worth at most: which queue follows the scores best is uncertain too."""
HIGHEST = 3.0
"""Scores count up to this when a queue is sought: failed requests have none, and overloads would outweigh the rest."""
SERVERS, ALIKE = (1, 2, 3, 4, 6, 8, 12, 16), 0.1
"""So many at once are tried where works differ by at most this share of their mean: elsewhere, whose turn it is need not be free."""
ROUGH, FINE = 60, 40
"""Services tried: one pass over all that are possible, a second around the best of it."""
FULL = 0.99
"""A queue busier than that is overloaded: its waits grow without end."""
LEAST_EXPLAINED = 0.2
"""Of the misses' variance, for a queue to be followed."""
GROWN_DEVIATIONS = 4.0
"""Of as many arrivals by chance: what is beyond is a queue's growth."""
PARTS = 8
SETTLE = 0.05
"""So much of very many arrivals comes before the queue is as it stays."""
LEAST_MISSED = 8
LEAST_REQUESTS = 20
"""With fewer, nothing is decided; an overload tells as much as so many requests that missed."""
WITHIN_TAU = 4.0
"""Autocorrelations count up to so many correlation times (Sokal 1997, who takes 4 to 6)."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one load at a rate came to: requests in the order of arrival, `score` their worst figure over its limit (over 1:
    missed; inf: failed or overdue).

    `held` is what stopped it: the rate was surely held (True) or not (False); None where it came to its end. `overload`: its queue
    grew until it was stopped, though hardly any of its requests had missed yet. `settled` False: it was stopped as not held before it could
    become steady.
    """

    rate: float
    arrival_s: Array
    work: Array
    score: Array
    held: bool | None = None
    overload: bool = False
    settled: bool = True

    @property
    def missed(self) -> NDArray[np.bool_]:
        return ~(self.score <= 1.0)

    @property
    def share_missed(self) -> float:
        """Of an overload 1; NaN without any request, which is neither more nor less than a limit."""
        return 1.0 if self.overload else float(self.missed.mean()) if len(self.score) else nan


@dataclass(frozen=True)
class Evidence:
    """The share missed at a rate, `at_least` or just so much, as if seen on so many independent requests."""

    rate: float
    missed: float
    requests: float
    at_least: bool = False


def inflation(residuals: Sequence[Array]) -> float:
    """How much larger the variance of a mean is than that of independent values: the sum of autocorrelations, of all series together."""
    series = [each - each.mean() for each in residuals if len(each) > 1]
    power = sum(float(each @ each) for each in series)
    if not power:
        return USUAL_INFLATION
    tau, lag, longest = 1.0, 1, max(map(len, series)) // 3
    while lag <= min(longest, WITHIN_TAU * tau):
        tau += 2 * sum(float(each[lag:] @ each[:-lag]) for each in series if len(each) > lag) / power
        lag += 1
    # The series' own means were taken out, which hides part of the correlation.
    tau = max(1.0, tau) / max(0.5, 1 - tau * len(series) / sum(map(len, series)))
    return (tau * power + USUAL_INFLATION * USUAL_REQUESTS) / (power + USUAL_REQUESTS)


def waits(arrival_s: Array, service_s: Array, servers: int = 1) -> Array:
    """Waiting times of a queue whose servers take turns (Lindley 1952); where all services are equal, whoever is free would be next."""
    waited = np.empty_like(arrival_s)
    for turn in range(servers):
        arrivals, before = arrival_s[turn::servers], np.cumsum(service_s[turn::servers]) - service_s[turn::servers]
        waited[turn::servers] = np.maximum.accumulate(arrivals - before) + before - arrivals
    return waited


class VirtualQueue:
    """The queue whose waiting times follow the scores best: `servers` take turns, so that together they need `seconds` per request of
    mean work."""

    def __init__(self, outcomes: Sequence[Outcome], unit_s: Array) -> None:
        """`unit_s` are very many arrivals of the same kind, 1 per second."""
        seen = np.concatenate([each.work for each in outcomes])
        self.outcomes = [replace(each, work=each.work / seen.mean()) for each in outcomes]
        # Arrivals in parts, and works of other requests in each: how much the parts differ says how well all of them tell.
        random, size = np.random.default_rng(0), len(unit_s) // PARTS
        self._parts = [
            (
                unit_s[part * size : (part + 1) * size] - unit_s[part * size],
                random.choice(seen[part % len(seen) :: PARTS], size) / seen.mean(),
            )
            for part in range(PARTS)
        ]
        self._scores = [np.minimum(each.score, HIGHEST) for each in outcomes]
        self._capped = sum(int((each.score > HIGHEST).sum()) for each in outcomes)
        slowest, fastest = min(each.rate for each in outcomes), max(each.rate for each in outcomes)
        rough = np.geomspace(0.1 / fastest, 1.2 / slowest, ROUGH)
        servers = SERVERS if seen.std() <= ALIKE * seen.mean() else SERVERS[:1]
        best, self.servers = max(itertools.product(rough, servers), key=lambda queue: self._follows(*queue))
        step = rough[1] / rough[0]
        best = max(
            np.geomspace(best / step, best * step, FINE), key=lambda seconds: self._follows(seconds, self.servers)
        )
        self.seconds = float(best) if self._follows(best, self.servers) > 0 else 0.0

    def _follows(self, seconds: float, servers: int) -> float:
        """The correlation, within the loads, of a queue's waits with the scores."""
        virtual = [waits(each.arrival_s, seconds * servers * each.work, servers) for each in self.outcomes]
        if self._capped:  # scores have a cap: so have the waits
            longest = np.partition(np.concatenate(virtual), -self._capped)[-self._capped]
            virtual = [np.minimum(each, longest) for each in virtual]
        flat = np.concatenate([each - each.mean() for each in virtual])
        centred = np.concatenate([each - each.mean() for each in self._scores])
        power = float(flat @ flat) * float(centred @ centred)
        return float(flat @ centred) / power**0.5 if power else 0.0

    def evidence(self) -> list[Evidence] | None:
        """Of each outcome; None where no queue follows the scores, or only one that grew in a load which was held all the same."""
        missed = [each.missed.astype(float) for each in self.outcomes]
        total = int(sum(each.sum() for each in missed))
        if not self.seconds or total < LEAST_MISSED or self._is_refuted():
            return None
        service_s = self.seconds * self.servers
        virtual = [waits(each.arrival_s, service_s * each.work, self.servers) for each in self.outcomes]
        rising = np.sort(np.concatenate(virtual))
        limit_s = (rising[-total] + rising[-total - 1]) / 2
        late = [(wait > limit_s).astype(float) for wait in virtual]
        flat = [each - each.mean() for each in late]
        centred = [each - each.mean() for each in missed]
        power = sum(float(each @ each) for each in flat)
        if not limit_s > 0 or not power:
            return None
        factor = sum(float(a @ b) for a, b in zip(flat, centred, strict=True)) / power
        if factor**2 * power < LEAST_EXPLAINED * sum(float(each @ each) for each in centred):
            return None  # it would predict misses from what hardly explains those that were seen
        residuals = [b - factor * a for a, b in zip(flat, centred, strict=True)]
        grown = inflation(residuals)
        alone = 1 / inflation(missed)
        found, requests = [], sum(map(len, missed))
        for outcome, misses, lates, residual in zip(self.outcomes, missed, late, residuals, strict=True):
            often, blur = self._often(outcome.rate, float(limit_s))
            n = len(misses)
            share = float(np.clip(misses.mean() - factor * (lates.mean() - often), 0.0, 1.0))
            # At least what the pooled residuals say: a load without a residual has not shown that it has none.
            noise = max(
                float(residual @ residual) / n, 0.5 * sum(float(r @ r) for r in residuals) / sum(map(len, residuals))
            )
            spread = max(share * (1 - share), 0.2 / n)  # none was missed: a few more might have been
            # Nor do they say less of it than without a queue: where much was missed, there is more to explain.
            noise = min(noise * grown, spread / alone)
            noise = max(noise + factor**2 * blur * requests, spread / MOST_WORTH)
            worth = spread / noise if self.seconds * outcome.rate <= FULL else min(spread / noise, alone)
            found.append(Evidence(outcome.rate, share, n * worth))
        return found

    def _is_refuted(self) -> bool:
        """Is it overloaded in the slowest load, which missed nothing, or did more requests come to wait in it than chance explains, of a
        load that was held or missed nothing? Scores rise while idle servers fill, as if such a queue grew."""
        slowest = min(self.outcomes, key=lambda each: each.rate)
        if self.seconds * slowest.rate > FULL and not slowest.missed.any():
            return True
        calm = [each for each in self.outcomes if each.held or not each.missed.any()]
        waiting = [(len(each.score), len(each.score) - each.arrival_s[-1] / self.seconds) for each in calm]
        return any(more > GROWN_DEVIATIONS * count**0.5 for count, more in waiting)

    def _often(self, rate: float, limit_s: float) -> tuple[float, float]:
        """The share of waits over a limit among very many arrivals at a rate, and the variance of its error."""
        if self.seconds * rate > FULL:
            return 1.0, 0.0
        shares, service_s = [], self.seconds * self.servers
        for unit_s, work in self._parts:
            virtual = waits(unit_s / rate, service_s * work, self.servers)[int(SETTLE * len(unit_s)) :]
            shares.append((virtual > limit_s).mean())
        return float(np.mean(shares)), float(np.var(shares, ddof=1)) / PARTS


def plain(outcomes: Sequence[Outcome]) -> list[Evidence]:
    """The shares as they were seen, with what correlation leaves of the requests."""
    grown = inflation([each.missed.astype(float) for each in outcomes if each.held is None])
    return [
        Evidence(
            each.rate,
            each.share_missed,
            (LEAST_REQUESTS if each.overload else len(each.score)) / grown,
            not each.settled,
        )
        for each in outcomes
    ]
