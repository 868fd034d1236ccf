"""One load of a search: sent and saved in a folder of its own, ended once it is decided, and what it came to."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from pdbench import failures
from pdbench.analysis.metrics import Timings, timings_of, timings_of_requests
from pdbench.config import LoadConfig, Options, most_output_tokens
from pdbench.errors import UserError
from pdbench.files import begin_again
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.records import Run, load_run
from pdbench.search.clocks import Setting
from pdbench.search.document import Point
from pdbench.search.evidence import Outcome
from pdbench.search.rates import Search

PROBE = 8
"""Requests of the first load, one at a time, which says where to begin."""
TIME_UP = "the time is up"
GROWN_SHARE = 0.25
"""Overload: this share of what arrived in the second half of a load was added to the requests in flight."""
RAMP = 8
"""A load lasts as many times as long as its first answers before its requests in flight are judged."""


@dataclass(frozen=True)
class Deployment:
    """What is searched: `measure(options, folder, judge)` sends one load and returns the run that it saved. `tune`: the clocks and power
    caps whose cheapest are sought, each from slowest to fastest."""

    name: str
    options: Options
    measure: Callable[[Options, Path, "LoadJudge | None"], Run]
    tune: Mapping[str, list[int | None]] = field(default_factory=dict)


class LoadJudge:
    """Ends a load once its rate is surely held or surely not, or the time is up.

    A request in flight that is older than the SLO allows has missed it: an overload shows as its queue grows, not when answers come.
    Times are the client's, so that an answer that it has not reported yet is not taken for late.
    """

    def __init__(self, search: Search, load: LoadConfig, until_s: float, settle_s: float = 0.0) -> None:
        """`settle_s` into the load a rate may be called held: servers that were idle meet every SLO at first."""
        self._search, self._rate, self._load, self._until_s = search, load.rate or 0.0, load, until_s
        self._settle_s, self._longest_s = settle_s, _longest_s(load)
        self._arrivals = [*islice(plan.planned_instants(load, 0), load.requests)]  # constant ones never end
        self._good: dict[int, bool] = {}
        self._known = self._missed = 0
        self._begin_s: float | None = None
        self._flight: list[tuple[float, int]] = []
        self._answers_s: list[float] = []
        self.held: bool | None = None
        self.reason: str | None = None

    def on_progress(self, progress: Progress) -> None:
        ended = [each for each in progress.ended if not each.warmup]
        if ended and self.reason is None:
            timings = timings_of_requests(ended, dataclasses.asdict(self._load))
            good = timings.slo.in_slo if timings.slo.in_slo is not None else np.zeros(len(ended), dtype=bool)
            self._good |= {_index(name): bool(met) for name, met in zip(timings.requests.id, good, strict=True)}
            first = ended[0]
            self._begin_s = first.planned_s - (self._arrivals[_index(first.id)] or 0.0)
            if len(self._answers_s) < 2 * PROBE:
                self._answers_s += [e.end_s - e.sent_s for e in ended if e.end_s and e.sent_s and not e.error]
        if self._begin_s is not None and self.reason is None:
            self._decide(progress.at_s - self._begin_s, progress.in_flight)

    def _decide(self, now_s: float, in_flight: int) -> None:
        # In the order of arrival: long answers, which may have missed, come late.
        while self._known < len(self._arrivals):
            good = self._good.get(self._known)
            if good is None:
                if now_s - (self._arrivals[self._known] or 0.0) <= self._longest_s:
                    break
                good = False
            self._missed += not good
            self._known += 1
        self._flight.append((now_s, in_flight))
        self.held = self._search.decided(self._rate, self._missed, self._known)
        if self.held is not False and self._grows(now_s, in_flight):
            self.held = False
        if self.held and now_s < self._settle_s:
            self.held = None
        if self.held is not None:
            self.reason = f"{'held' if self.held else 'not held'}, by {self._known} requests"

    def _grows(self, now_s: float, in_flight: int) -> bool:
        """Did the second half of the load add more to the requests in flight than chance and its own answers explain?"""
        # Where a limit says how long a request may take, those that are overdue have missed: no need to guess.
        if isfinite(self._longest_s) or len(self._answers_s) < PROBE:
            return False
        # On servers that were idle, ever more are in flight until answers take as long as they do under this load.
        if now_s < RAMP * statistics.median(self._answers_s[:PROBE]):
            return False
        arrived = sum(now_s / 2 < (at_s or 0.0) <= now_s for at_s in self._arrivals)
        before = next(count for at_s, count in self._flight if at_s >= now_s / 2)
        return in_flight - before > max(GROWN_SHARE * arrived, 4 * arrived**0.5, 10)

    def decided(self) -> str | None:
        # A load that ended before its first answer would have measured nothing.
        if self.reason is None and self._begin_s is not None and time.monotonic() > self._until_s:
            self.reason = TIME_UP
        return self.reason


class Sent(NamedTuple):
    """A load that was sent, now or before, and what it came to."""

    run: Run
    timings: Timings
    outcome: Outcome
    point: Point


@dataclass
class Loads:
    """Sends the loads of a deployment; those in `saved` are not sent again. Each is entered in `points`."""

    deployment: Deployment
    attain: float
    out: Path
    console: Console
    points: list[Point]
    saved: Sequence[Point]
    sent: int = 0
    beside_s: float = 0.0  # what the last load took beside itself: prompts, reference answers, checks, saving

    def send(
        self,
        name: str,
        load: LoadConfig,
        judge: LoadJudge | None = None,
        setting: Setting | None = None,
        least_s: float = 0.0,
    ) -> Sent:
        """A saved load is sent again if it does not count, or lasted neither `least_s` nor as long as this one would.

        Raises UserError for a load that cannot be judged, but after one that could: it is one that missed then, as each of its requests is.
        """
        deployment, options = self.deployment, self.deployment.options
        folder = self.out / deployment.name / name
        point = next((each for each in self.saved if Path(each.run).parent == Path(deployment.name, name)), None)
        long_s = min(least_s, (load.requests or 0) / (load.rate or inf))
        if point is not None and point.rate_per_s == load.rate and not point.void and point.load_s >= long_s:
            self.console.print(f"  {name}: already measured")
            self.points.append(point)
            run = load_run(self.out / point.run)
            timings = timings_of(run)
            return Sent(run, timings, outcome_of(timings, load.rate or 0.0, point.held), point)
        begin_again(folder.parent, folder)
        # Other deployments get the same prompts; other loads on the same servers do not.
        parts = (load.nonce, deployment.name.partition(",")[2], name)
        changed: dict[str, Any] = dict(setting or {})
        power = replace(options.power, **changed)
        options = replace(options, load=replace(load, nonce="/".join(filter(None, parts))), power=power)
        begin_s = time.monotonic()
        run = deployment.measure(options, folder, judge)
        took_s = time.monotonic() - begin_s
        timings = timings_of(run)
        slo = timings.slo
        judged = any(each.deployment == deployment.name and each.undecided_pct != 100.0 for each in self.points)
        if slo.in_slo is None or (slo.nothing_judged and not judged):
            why = "each may be within the limits of TBT or not, as its chunks hold several tokens (slo-undecided, docs/metrics.md)"
            raise UserError(
                f"no request of {folder} could be judged: {why if slo.undecided.any() else 'there is no SLO'}"
            )
        if "refused" in timings.requests.error:
            raise UserError(
                f"connections were refused during {folder}, which is not counted: do the servers still run?"
            )
        held, counted = judge.held if judge else None, int(slo.counted.sum())
        outcome = outcome_of(timings, load.rate or 0.0, held)
        used = float(np.quantile(outcome.score, self.attain, method="inverted_cdf")) if len(outcome.score) else inf
        point = Point(
            deployment=deployment.name,
            run=str((folder / f"{run.name}_results").relative_to(self.out)),
            rate_per_s=load.rate,
            setting=setting,
            requests=counted,
            attained_pct=slo.met_pct or 0.0,
            undecided_pct=100 * float(slo.undecided.sum() / max(1, counted)),
            slo_used=used if isfinite(used) else None,
            held=held,
            limited_by=_limit(timings),
            client_limited=any(flag.name == "client-limited" for flag in run.flags),
            void=failures.void(run.flags, None, 0),
            flags=sorted({flag.name for flag in run.flags}),
            load_s=max(each.end_s or 0.0 for each in run.requests) - min(each.planned_s for each in run.requests),
        )
        if self.sent:  # servers may start for the first one
            self.beside_s = max(0.0, took_s - point.load_s)
        self.sent += 1
        self.points.append(point)
        return Sent(run, timings, outcome, point)


def outcome_of(timings: Timings, rate: float, held: bool | None) -> Outcome:
    """What a load came to, up to the first request that was cut off before it had missed. One that nobody can judge has missed."""
    slo, ok = timings.slo, timings.requests.ok & ~timings.slo.undecided
    unknown = np.flatnonzero(~slo.counted)
    end = int(unknown[0]) if len(unknown) else len(slo.counted)
    worst = np.max([np.nan_to_num(ratio, nan=0.0) for ratio in slo.ratios.values()], axis=0)
    score = np.where(ok | timings.requests.cut, worst, inf)[:end]
    tokens = timings.requests.prompt_tokens
    work = np.where(np.isnan(tokens), np.nanmean(tokens) if np.isfinite(tokens).any() else 1.0, tokens)
    sent_s = timings.requests.sent_s
    return Outcome(rate, np.nan_to_num(sent_s - np.nanmin(sent_s))[:end], work[:end], score, held)


def _longest_s(load: LoadConfig) -> float:
    """A request that meets the SLO takes at most this long; infinite where its limits do not say."""
    limits = [inf]
    if load.slo_e2e_ms:
        limits.append(load.slo_e2e_ms)
    most = most_output_tokens(dataclasses.asdict(load))
    if load.slo_ttft_ms and load.slo_tbt_ms and most:
        limits.append(load.slo_ttft_ms + load.slo_tbt_ms * (most - 1))
    return min(limits) / 1e3


def settle_s(load: LoadConfig, alone_s: float) -> float:
    """How long a load must last for a small overload to show: ten TTFT limits, four of the longest requests that meet the SLO."""
    longest_s = _longest_s(load)
    return max(10 * (load.slo_ttft_ms or 0.0) / 1e3, 4 * (longest_s if isfinite(longest_s) else 2 * alone_s))


def _limit(timings: Timings) -> str | None:
    """The option that most requests missed; None where none was missed."""
    misses = {name: int(np.count_nonzero(ratio > 1)) for name, ratio in timings.slo.ratios.items()}
    name = max(misses, key=lambda name: misses[name], default=None)
    return name if name and misses[name] else None


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])
