"""`pdbench search`: the highest rate that each deployment holds within an SLO: loads, one folder each, then a run at the rate found.

What is known is in search.json after every load, always a valid answer; the same command goes on from there.
"""

import dataclasses
import json
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pdbench.analysis.metrics import SLO, Timings, timings_of, timings_of_requests
from pdbench.config import LoadConfig, Options
from pdbench.errors import UserError
from pdbench.failures import INTERRUPTED
from pdbench.files import check_writable, write_whole
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.records import Run, load_run
from pdbench.search.evidence import Array, Outcome
from pdbench.search.rates import Answer, Search
from pdbench.turns import duration

FILE = "search.json"
REQUESTS, PROBE = 500, 8
"""Per load, and of the first one, one at a time, which says where to begin."""
MOST_LOADS = 30
LONG = 200_000
QUIET = 0.02
"""At this share of the rate of one request at a time, a request has the servers for itself: where that misses, every rate does."""
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0)
SCALE_WIDTH = 0.25
"""What is said of the SLO at another scale must be known this well."""
GROWN_SHARE = 0.25
"""Overload: this share of what arrived in the second half of a load was added to the requests in flight."""


@dataclass(frozen=True)
class Deployment:
    """What is searched: `measure(options, folder, judge)` sends one load and returns the run that it saved."""

    name: str
    options: Options
    measure: Callable[[Options, Path, "LoadJudge | None"], Run]


@dataclass(frozen=True)
class Goal:
    """`attain`: the share of requests that must meet the SLO. `precision`: the interval's half-width to reach. `until_s`: when
    to stop (time.monotonic)."""

    attain: float
    precision: float
    until_s: float = inf


class LoadJudge:
    """Ends a load once its rate is surely held or surely not, or the time is up.

    A request in flight that is older than the SLO allows has missed it: an overload shows as its queue grows, not when answers come.
    """

    def __init__(self, search: Search, rate: float, load: LoadConfig, until_s: float, settle_s: float = 0.0) -> None:
        """`settle_s` into the load a rate may be called held: servers that were idle meet every SLO at first."""
        self._search, self._rate, self._load, self._until_s = search, rate, load, until_s
        self._settle_s, self._longest_s = settle_s, _longest_s(load)
        self._arrivals = [*islice(plan.planned_instants(load, None, 0), load.requests)]  # constant ones never end
        self._good: dict[int, bool] = {}
        self._known = self._missed = 0
        self._begin_s: float | None = None
        self._flight: list[tuple[float, int]] = []
        self._answers_s: list[float] = []
        self.held: bool | None = None
        self.reason: str | None = None

    def on_progress(self, progress: Progress, now_s: float) -> None:
        ended = [each for each in progress.ended if not each.warmup]
        if ended and self.reason is None:
            timings = timings_of_requests(ended, dataclasses.asdict(self._load))
            good = timings.in_slo if timings.in_slo is not None else np.zeros(len(ended), dtype=bool)
            self._good |= {_index(name): bool(met) for name, met in zip(timings.requests.id, good, strict=True)}
            first = ended[0]
            self._begin_s = first.planned_s - (self._arrivals[_index(first.id)] or 0.0)
            if len(self._answers_s) < 2 * PROBE:
                self._answers_s += [e.end_s - e.sent_s for e in ended if e.end_s and e.sent_s and not e.error]
        if self._begin_s is not None and self.reason is None:
            self._decide(now_s - self._begin_s, progress.in_flight)

    def _decide(self, now_s: float, in_flight: int) -> None:
        while self._known < len(
            self._arrivals
        ):  # in the order of arrival: long answers, which may have missed, come late
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
        if len(self._answers_s) < PROBE or now_s < 4 * statistics.median(self._answers_s[:PROBE]):
            return False
        arrived = self._rate * now_s / 2
        before = next(count for at_s, count in self._flight if at_s >= now_s / 2)
        return in_flight - before > max(GROWN_SHARE * arrived, 4 * arrived**0.5, 10)

    def decided(self) -> str | None:
        if self.reason is None and time.monotonic() > self._until_s:
            self.reason = "the time is up"
        return self.reason


def goal(attain: str, precision: str, until_s: float) -> Goal:
    """Of the options' texts. Raises UserError naming the one that is wrong."""
    shares = {}
    for name, given, low, high in (("--attain", attain, 50, 99.9), ("--precision", precision, 0.5, 50)):
        try:
            percent = float(given.strip().removesuffix("%"))
        except ValueError:
            percent = inf
        if not low <= percent <= high:
            raise UserError(f"{name} {given}: give {low:g}% to {high:g}%")
        shares[name] = percent / 100
    return Goal(shares["--attain"], shares["--precision"], until_s)


def check(load: LoadConfig) -> None:
    """Raises UserError for a load whose rate cannot be searched."""
    if not any(getattr(load, name) for name in SLO):
        raise UserError("a search needs limits: --slo ttft=300,tbt=15")
    names = ("trace", "stages", "ramp_to", "duration_s", "steady_s")
    fixed = [name for name in names if getattr(load, name)] + (["phase"] if load.phase != "both" else [])
    if fixed:
        raise UserError(f"--{fixed[0].replace('_', '-')}: a search scales the rate of arrivals itself; leave it out")


def start(out: Path, command: Mapping[str, Any], goal: Goal, load: LoadConfig) -> dict[str, Any]:
    """The document of a search that begins, or goes on: with the saved loads of the same command."""
    slo = {name: limit for name in SLO if (limit := getattr(load, name)) is not None}
    document = {"command": json.loads(json.dumps(command)), "slo": slo, "attain_pct": 100 * goal.attain}
    saved: dict[str, Any] = {}
    try:
        saved = json.loads((out / FILE).read_bytes())
    except (OSError, ValueError):
        pass
    same = isinstance(saved, dict) and all(saved.get(key) == value for key, value in document.items())
    return document | {"deployments": [], "points": [], "saved": saved["points"] if same else []}


def saved(out: Path) -> str:
    """What a search that was interrupted leaves, for its last line."""
    return f"what is known is in {out / FILE}, the same command goes on" if (out / FILE).exists() else ""


def find(deployments: Sequence[Deployment], goal: Goal, out: Path, console: Console, document: dict[str, Any]) -> None:
    """Search each deployment; `document` is kept in search.json.

    On Ctrl-C what is known is saved, and the exception propagates. Raises UserError when nothing can be measured.
    """
    check_writable(out)
    earlier: list[dict[str, Any]] = document.pop("saved")
    nonce = secrets.token_hex(4)
    for number, deployment in enumerate(deployments):
        share_s = (goal.until_s - time.monotonic()) / (len(deployments) - number)
        entry: dict[str, Any] = {"name": deployment.name}
        document["deployments"].append(entry)

        def keep() -> None:
            walked = {point["run"] for point in document["points"]}
            points = document["points"] + [point for point in earlier if point["run"] not in walked]
            write_whole(out / FILE, json.dumps(document | {"points": points}, indent=1).encode())

        console.print(f"[bold]{deployment.name}[/bold]: search", highlight=False)
        load = deployment.options.load
        load = replace(load, requests=load.requests or REQUESTS, nonce=load.nonce or nonce)
        deployment = replace(deployment, options=replace(deployment.options, load=load))
        mine = [point for point in earlier if point["deployment"] == deployment.name]
        own = replace(goal, until_s=time.monotonic() + share_s)
        _search_one(deployment, own, out, console, entry, document["points"], mine, keep)


def _search_one(
    deployment: Deployment,
    goal: Goal,
    out: Path,
    console: Console,
    entry: dict[str, Any],
    points: list[dict[str, Any]],
    saved: Sequence[dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """One deployment: a load with one request at a time, loads at rates, a run at the rate found."""
    options, load = deployment.options, deployment.options.load
    reuse = {point["run"]: point for point in saved}

    def send(name: str, changed: LoadConfig, judge: LoadJudge | None) -> tuple[Run, dict[str, Any]]:
        folder = out / deployment.name / name
        point = next((point for run, point in reuse.items() if Path(run).parent == Path(deployment.name) / name), None)
        if point is not None and point["rate_per_s"] == changed.rate:
            console.print(f"  {name}: already measured", highlight=False)
            return load_run(out / point["run"]), point
        if folder.exists():
            shutil.rmtree(folder)
        # Other deployments get the same prompts; other loads on the same servers do not.
        parts = (changed.nonce, deployment.name.partition(",")[2], name)
        changed = replace(changed, nonce="/".join(filter(None, parts)))
        run = deployment.measure(replace(options, load=changed), folder, judge)
        timings = timings_of(run)
        if timings.in_slo is None:
            raise UserError(
                f"{deployment.name}: tokens could not be counted, so nobody knows what meets the SLO (docs/load.md)"
            )
        if "refused" in timings.requests.error:
            raise UserError(
                f"connections were refused during {folder}, which is not counted: do the servers still run?"
            )
        known = timings.slo_known
        point = {
            "deployment": deployment.name,
            "run": str((folder / f"{run.name}_results").relative_to(out)),
            "rate_per_s": changed.rate,
            "requests": int(known.sum()),
            "attained_pct": 100 * float(timings.in_slo.sum() / max(1, known.sum())),
            "held": judge.held if judge else None,
            "limited_by": _limit(timings),
            "client_limited": any(flag.name == "client-limited" for flag in run.flags),
            "load_s": max(each.end_s or 0.0 for each in run.requests) - min(each.planned_s for each in run.requests),
        }
        return run, point

    probe = replace(load, rate=None, concurrency=1, requests=PROBE, warmup=2)
    run, point = send("one-at-a-time", probe, None)
    alone_s, first_rate = _pace(run)
    points.append(point)
    search = Search(1 - goal.attain, load.rate or first_rate, _unit_arrivals(load))
    number, limited, settle_s = 0, False, _settle_s(load, alone_s)
    try:
        while number < MOST_LOADS and time.monotonic() < goal.until_s - (search_s := _confirming_s(search, load)):
            answer, rate = search.answer(), float(f"{search.next_rate():.4g}")
            lost = [each for each in search.outcomes if each.held is False]
            if answer.width <= goal.precision or (answer.low == 0 and lost and rate < QUIET / alone_s):
                break
            name = f"load-{number + 1:02d}"
            # The n-th load of every deployment has the same arrivals, scaled to its rate.
            requests = max(load.requests or REQUESTS, ceil(2 * settle_s * rate))
            changed = replace(load, rate=rate, requests=requests, seed=load.seed + number)
            judge = LoadJudge(search, rate, changed, goal.until_s - search_s, settle_s)
            run, point = send(name, changed, judge)
            number += 1
            points.append(point)
            if point["client_limited"] and point["held"] is not False:
                limited = True
                console.print("  the client was the limit: higher rates need more --client-processes", highlight=False)
                break
            search.add(outcome_of(run, rate, point["held"]))
            entry |= _known(search.answer(), points, deployment.name)
            keep()
            _say(console, point, search.answer(), goal)
        if search.answer().low > 0:
            rate = float(f"{search.answer().rate:.4g}")
            run, point = send("confirmed", replace(load, rate=rate, seed=load.seed + MOST_LOADS), None)
            points.append(point)
            entry |= {"attained_pct": point["attained_pct"], "run": point["run"]}
        entry["slo_scale"] = _scales(search)
    finally:
        entry |= _known(search.answer(), points, deployment.name) | {"client_limited": limited}
        keep()


def outcome_of(run: Run, rate: float, held: bool | None) -> Outcome:
    """What a load came to, up to the first request that was cut off before it had missed."""
    timings = timings_of(run)
    unknown = np.flatnonzero(~timings.slo_known)
    end = int(unknown[0]) if len(unknown) else len(timings.slo_known)
    cut = np.array([kind == INTERRUPTED for kind in timings.requests.error], dtype=bool)
    worst = np.max([np.nan_to_num(ratio, nan=0.0) for ratio in timings.slo_ratios.values()], axis=0)
    score = np.where(timings.requests.ok | cut, worst, inf)[:end]
    work = np.nan_to_num(timings.requests.prompt_tokens, nan=1.0)
    sent_s = timings.requests.sent_s
    return Outcome(rate, np.nan_to_num(sent_s - np.nanmin(sent_s))[:end], (work / work.mean())[:end], score, held)


def _pace(run: Run) -> tuple[float, float]:
    """(seconds of one request that is alone, the rate to begin with): half of what one prefill at a time could do."""
    requests = timings_of(run).requests
    if not requests.ok.any():
        raise UserError("no request of the first load succeeded: read the servers' logs")
    e2e_s, ttft_s = (float(np.nanmedian(values)) / 1e3 for values in (requests.e2e_ms, requests.ttft_ms))
    return e2e_s, float(f"{0.5 / ttft_s:.4g}")


def _longest_s(load: LoadConfig) -> float:
    """A request that meets the SLO takes at most this long; infinite where its limits do not say."""
    limits = [inf]
    if load.slo_e2e_ms:
        limits.append(load.slo_e2e_ms)
    if load.slo_ttft_ms and load.slo_tbt_ms and load.output_distribution == "fixed" and not load.reply_lengths:
        limits.append(load.slo_ttft_ms + load.slo_tbt_ms * (load.output_tokens - 1))
    return min(limits) / 1e3


def _settle_s(load: LoadConfig, alone_s: float) -> float:
    """How long a load must last for a small overload to show: ten TTFT limits, four of the longest requests that meet the SLO."""
    longest_s = _longest_s(load)
    return max(10 * (load.slo_ttft_ms or 0.0) / 1e3, 4 * (longest_s if isfinite(longest_s) else 2 * alone_s))


def _unit_arrivals(load: LoadConfig) -> Array | None:
    if load.arrival == "constant":
        return None
    unit = replace(load, rate=1.0, requests=LONG, duration_s=None)
    return np.array([at_s or 0.0 for at_s in plan.planned_instants(unit, None, -1)])


def _confirming_s(search: Search, load: LoadConfig) -> float:
    """What the run at the rate found will take."""
    return (load.requests or REQUESTS) / search.answer().rate if search.outcomes else 0.0


def _limit(timings: Timings) -> str | None:
    """The option that most requests missed; None where none was missed."""
    misses = {name: int(np.count_nonzero(ratio > 1)) for name, ratio in timings.slo_ratios.items()}
    name = max(misses, key=lambda name: misses[name], default=None)
    return name if name and misses[name] else None


def _known(answer: Answer, points: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The part of an answer that loads alone give. Without a rate that is held: the closest load."""
    mine = [point for point in points if point["deployment"] == name]
    above = [point for point in mine if point["limited_by"] and (point["rate_per_s"] or 0) >= answer.rate]
    breaking = min(above, key=lambda point: point["rate_per_s"] or 0, default=None)
    closest = max(mine, key=lambda point: point["attained_pct"], default=None)
    found = {
        "rate_per_s": answer.rate if answer.low > 0 else None,
        "low": answer.low,
        "high": answer.high if isfinite(answer.high) else None,
        "limited_by": (breaking or closest or {}).get("limited_by"),
        "loads": len(mine),
        "load_s": sum(point["load_s"] for point in mine),
        "requests": sum(point["requests"] for point in mine),
    }
    if answer.low == 0 and closest:
        found["closest"] = {key: closest[key] for key in ("rate_per_s", "attained_pct", "run")}
    return found


def _scales(search: Search) -> list[dict[str, float]]:
    """The highest rate for the SLO with all limits scaled, where these loads tell."""
    answers = {scale: search.at_scale(scale) for scale in SCALES} if search.outcomes else {}
    return [
        {"scale": scale, "rate_per_s": answer.rate, "low": answer.low, "high": answer.high}
        for scale, answer in answers.items()
        if answer.low > 0 and answer.width <= SCALE_WIDTH
    ]


def _say(console: Console, point: Mapping[str, Any], answer: Answer, goal: Goal) -> None:
    high = f"{answer.high:.3g}" if isfinite(answer.high) else "?"
    held = {True: "held", False: "not held", None: "near the limit"}[point["held"]]
    left = f", at most {duration(goal.until_s - time.monotonic())} left" if isfinite(goal.until_s) else ""
    console.print(
        f"  {point['rate_per_s']:.3g} requests/s: {point['attained_pct']:.1f} % of {point['requests']} within the SLO, {held}; "
        f"highest rate {answer.low:.3g} to {high}{left}",
        highlight=False,
    )


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])
