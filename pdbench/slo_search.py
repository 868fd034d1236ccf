"""`pdbench search`: the highest rate that each deployment holds within an SLO: loads, one folder each, then a run at the rate found.

With --tune also the clocks and power caps of its GPUs that keep the SLO with the least energy. What is known is in search.json after every
load, always a valid answer; the same command goes on from there.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from rich.console import Console

from pdbench import documents, identity, sweep
from pdbench.analysis.metrics import Timings
from pdbench.analysis.run_analysis import load_analysis
from pdbench.analysis.slo import SLO
from pdbench.config import CLOCK_OPTIONS, LoadConfig, Options, flag_of
from pdbench.errors import OptionError, UserError, span
from pdbench.files import check_writable
from pdbench.load import plan
from pdbench.report import search_files, tables, text
from pdbench.search.clocks import axes
from pdbench.search.document import FILE, Closest, Document, Held, Point, Scaled, keeps
from pdbench.search.evidence import LEAST_REQUESTS, Array
from pdbench.search.rates import Answer, Search
from pdbench.slo_clocks import tune
from pdbench.slo_loads import PROBE, TIME_UP, Deployment, LoadJudge, Loads, settle_s

REQUESTS = 500  # per load
MOST_LOADS = 30
MOST_LIMITED = 2
"""Loads in a row that say nothing, as the client was the limit or they do not count: one may be by what else the host does."""
CONFIRMED_SHARE = 0.25
"""Of a deployment's time, where that is limited, at most so much is for the run at the rate found."""
LONG = 200_000
QUIET = 0.02
"""At this share of the rate of one request at a time, a request has the servers for itself: where that misses, every rate does."""
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0)
SCALE_WIDTH = 0.25
"""What is said of the SLO at another scale must be known this well."""


@dataclass(frozen=True)
class Goal:
    """`attain`: the share of requests that must meet the SLO. `precision`: the interval's half-width to reach. `until_s`: when
    to stop (time.monotonic). `tune_rate`: where clocks are compared; None: at the rate that each deployment surely holds."""

    attain: float
    precision: float
    until_s: float = inf
    tune_rate: float | None = None


def goal(attain: str, precision: str, until_s: float, tune_rate: float | None = None) -> Goal:
    """Of the options' texts. Raises UserError naming the one that is wrong."""
    shares = {}
    for name, given, low, high in (("--attain", attain, 50, 99.9), ("--precision", precision, 0.5, 50)):
        try:
            percent = float(given.strip().removesuffix("%"))
        except ValueError:
            percent = inf
        if not low <= percent <= high:
            raise OptionError(f"{name} {given}: give {low:g}% to {high:g}%")
        shares[name] = percent / 100
    return Goal(shares["--attain"], shares["--precision"], until_s, tune_rate)


def tuning(options: Options, tune: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, list[int | None]]]:
    """Of --tune KEY=V1,V2,...: for each deployment the options of its roles, from slowest to fastest. Raises UserError for what fits nowhere,
    and for a deployment that would stay as it is beside tuned ones."""
    values: dict[str, list[int | None]] = {}
    for given in tune:
        for point in sweep.points(options, [given], "--tune"):
            for key, value in point.varied.items():
                if key not in CLOCK_OPTIONS:
                    raise OptionError(
                        f"--tune {given}: only clocks and power caps can be tuned, {', '.join(CLOCK_OPTIONS)}"
                    )
                values.setdefault(key, []).append(value)
    found = {}
    for kind in kinds:
        roles: tuple[str, ...] = ("prefill", "decode") if kind == "disaggregated" else ("single",)
        roles = ("single", "prefill", "decode") if kind == "bench" else roles
        own = {key: each for key, each in values.items() if key.startswith(roles)}
        if tune and not own:
            raise UserError(f"--tune: nothing of it is for {kind}: add {roles[0]}_clock=V1,V2,...")
        found[kind] = axes(own, {key: getattr(options.power, key) for key in own})
    if unused := values.keys() - {key for own in found.values() for key in own}:
        raise UserError(f"--tune {min(unused)}: no deployment here has such GPUs ({', '.join(kinds)})")
    return found


def check(load: LoadConfig, varied: Iterable[str] = ()) -> None:
    """Raises UserError for a load whose rate cannot be searched, and where --vary would give deployments of one answer other limits."""
    if limit := next((name for name in varied if name in SLO), None):
        raise UserError(
            f"--vary {limit}: one search has one SLO, which its answer names: search within each, with an --out of its own"
        )
    if not any(getattr(load, name) for name in SLO):
        raise UserError("a search needs limits: --slo ttft=300,tbt=15")
    # With a cap on streams, requests would wait in the client, where no limit sees them.
    names = ("trace", "stages", "ramp_to", "duration_s", "steady_s", "concurrency", "phase")
    if fixed := load.given(names):
        raise UserError(f"{flag_of(fixed[0])}: a search scales the rate of arrivals itself; leave it out")
    if (load.requests or REQUESTS) < LEAST_REQUESTS:
        raise UserError(
            f"--requests {load.requests}: so few tell nothing of a rate: leave it out ({REQUESTS}), or give at least {LEAST_REQUESTS}"
        )


def kinds_of_loads(load: LoadConfig) -> list[LoadConfig]:
    """What a search sends: one request at a time, then loads at a rate, which differ in numbers alone."""
    alone = replace(load, rate=None, concurrency=1, client_processes=1, requests=PROBE, warmup=2)
    return [alone, replace(load, rate=load.rate or 1.0, requests=load.requests or REQUESTS)]


def start(out: Path, command: Mapping[str, Any], goal: Goal, load: LoadConfig) -> tuple[Document, list[Point]]:
    """The document of a search that begins, or goes on, and the saved loads of the same command.

    Raises UserError where `out` has those of another, or a search.json that cannot be read.
    """
    slo = {name: limit for name in SLO if (limit := getattr(load, name)) is not None}
    document = Document(command=documents.as_read_back(command), slo=slo, attain_pct=100 * goal.attain)
    try:
        saved = search_files.load(out)
    except FileNotFoundError:
        return document, []
    saved.command.setdefault("machine", document.command.get("machine"))  # before it was recorded
    measured = [each.command.get("measured") or [] for each in (saved, document)]
    saved.command |= {"measured": measured[1]} if measured[1] else {}  # it is compared below
    before, now = ({key: getattr(each, key) for key in ("command", "slo", "attain_pct")} for each in (saved, document))
    if saved.points and (differs := sweep.differences(before, now)):
        raise UserError(
            f"{out} holds a search with other options or on another machine ({differs}): repeat its command, or give another --out"
        )
    if saved.points and (other := next(filter(None, map(identity.changed, *measured)), "")):
        raise UserError(f"{out} {other}, or give another --out")
    return document, saved.points


def saved(out: Path) -> str:
    """What a search that was interrupted leaves, for its last line."""
    known = f"what is known is in {out / FILE}, the same command goes on"
    return known if (out / FILE).exists() else sweep.cut_short(out, "*/*/*_results")


def find(
    deployments: Sequence[Deployment],
    goal: Goal,
    out: Path,
    console: Console,
    document: Document,
    earlier: Sequence[Point] = (),
) -> None:
    """Search each deployment; `document` is kept in search.json. `earlier` are loads that need not be sent again.

    On Ctrl-C what is known is saved, and the exception propagates. Raises UserError when nothing can be measured.
    """
    check_writable(out)
    nonce = secrets.token_hex(4)
    try:
        for number, deployment in enumerate(deployments):
            share_s = (goal.until_s - time.monotonic()) / (len(deployments) - number)
            if number and share_s <= 0:
                console.print(f"[bold]{deployment.name}[/bold]: not searched, {TIME_UP}")
                continue
            entry = Held(name=deployment.name)
            document.deployments.append(entry)

            def keep() -> None:
                walked = {point.run for point in document.points}
                points = document.points + [point for point in earlier if point.run not in walked]
                search_files.save(structs.replace(document, points=points), out)

            console.print(f"[bold]{deployment.name}[/bold]: search")
            load = deployment.options.load
            load = replace(load, requests=load.requests or REQUESTS, nonce=load.nonce or nonce)
            deployment = replace(deployment, options=replace(deployment.options, load=load))
            mine = [point for point in earlier if point.deployment == deployment.name]
            own = replace(goal, until_s=time.monotonic() + share_s)
            loads = Loads(deployment, goal.attain, out, console, document.points, mine)
            _search_one(loads, own, entry, keep)
    finally:  # what an earlier command measured of those that this one did not come to
        begun = {entry.name for entry in document.deployments}
        document.points += [point for point in earlier if point.deployment not in begun]


def _search_one(loads: Loads, goal: Goal, entry: Held, keep: Callable[[], None]) -> None:
    """One deployment: a load with one request at a time, the highest rate, the cheapest clocks."""
    deployment, load = loads.deployment, loads.deployment.options.load
    probe = kinds_of_loads(load)[0]
    alone_s, first_rate = _pace(loads.send("one-at-a-time", probe).timings)
    if deployment.tune:  # whether clocks can be set is known before anything takes long
        slowest = {key: values[0] for key, values in deployment.tune.items()}
        point = loads.send("one-at-a-time-slowest", probe, setting=slowest).point
        if reason := load_analysis(loads.out / point.run).summary.energy.not_measured:
            raise UserError(f"--tune compares energy, which is not measured for {deployment.name}: {reason}")
    if goal.tune_rate is None or not deployment.tune:
        half_s = (goal.until_s - time.monotonic()) / 2
        own = replace(goal, until_s=time.monotonic() + half_s) if deployment.tune else goal
        search = Search(1 - goal.attain, load.rate or first_rate, _unit_arrivals(load))
        _search_rate(loads, search, own, alone_s, entry, keep)
    rate = goal.tune_rate or entry.low
    if deployment.tune and rate:
        rate = float(f"{rate:.4g}")
        requests = max(load.requests or REQUESTS, ceil(2 * settle_s(load, alone_s) * rate))
        load = replace(load, rate=rate, requests=requests, seed=load.seed + MOST_LOADS + 1)
        tune(loads, goal.attain, goal.until_s, load, entry, keep)
        keep()


def _search_rate(
    loads: Loads, search: Search, goal: Goal, alone_s: float, entry: Held, keep: Callable[[], None]
) -> None:
    """Loads at rates, a run at the rate found."""
    load = loads.deployment.options.load
    number, limited, least_s, begin_s = 0, 0, settle_s(load, alone_s), time.monotonic()
    try:
        while number < MOST_LOADS:
            answer, rate = search.answer(), float(f"{search.next_rate():.4g}")
            lost = [each for each in search.outcomes if each.held is False]
            found = _confirmed(load, answer.rate if answer.low > 0 else rate, goal.until_s - begin_s, least_s)
            takes_s = loads.beside_s + (found.requests or 0) / (found.rate or inf) + alone_s
            until_s = goal.until_s - (takes_s if search.outcomes else 0.0)
            entry.none_holds = answer.low == 0 and bool(lost) and rate < QUIET / alone_s
            if search.found(goal.precision) or entry.none_holds:
                break
            if time.monotonic() + loads.beside_s >= until_s:
                but = " but for the run at the rate found" if answer.low > 0 else ""
                words = f"  {TIME_UP}{but}; the same command goes on from here"
                loads.console.print(words, soft_wrap=True)
                break
            # The n-th load of every deployment has the same arrivals, scaled to its rate.
            requests = max(load.requests or REQUESTS, ceil(2 * least_s * rate))
            changed = replace(load, rate=rate, requests=requests, seed=load.seed + number)
            # The warm-up counts too; one load that is hard to decide must not take all of the time.
            left_s = until_s - time.monotonic()
            end_s = until_s - min(left_s / 2, max(0.0, left_s - 3 * least_s))
            judge = LoadJudge(search, changed, end_s, least_s)
            sent = loads.send(f"load-{number + 1:02d}", changed, judge)
            point = sent.point
            number += 1
            if judge.reason == TIME_UP and point.load_s < least_s:  # servers that were idle meet every SLO at first
                loads.points.pop()
                continue
            if not point.counts:
                limited += 1
                is_last = limited == MOST_LIMITED
                words = "higher rates need more --client-processes" if is_last else "it does not count, another follows"
                tables.say(loads.console, f"  {point.void or f'the client was the limit: {words}'}")
                if is_last:
                    entry.client_limited = not point.void
                    break
                continue
            limited = 0
            search.add(replace(sent.outcome, settled=point.load_s >= least_s))
            _enter(entry, search.answer(), loads.points)
            keep()
            _say(loads.console, point, search.answer(), goal)
        if search.answer().low > 0:
            found = _confirmed(load, search.answer().rate, goal.until_s - begin_s, least_s)
            point = loads.send("confirmed", found, least_s=least_s).point
            entry.attained_pct, entry.run = point.attained_pct, point.run
        entry.slo_scale = _scales(search)
    finally:
        _enter(entry, search.answer(), loads.points)
        keep()


def _pace(timings: Timings) -> tuple[float, float]:
    """(seconds of one request that is alone, the rate to begin with): half of what one prefill at a time could do."""
    requests = timings.requests
    if not requests.ok.any():
        raise UserError("no request of the first load succeeded: read the servers' logs")
    e2e_s, ttft_s = (float(np.nanmedian(values)) / 1e3 for values in (requests.e2e_ms, requests.ttft_ms))
    return e2e_s, float(f"{0.5 / ttft_s:.4g}")


def _unit_arrivals(load: LoadConfig) -> Array | None:
    if load.arrival == "constant":
        return None
    unit = replace(load, rate=1.0, requests=LONG, duration_s=None)
    return np.array([at_s or 0.0 for at_s in plan.planned_instants(unit, -1)])


def _confirmed(load: LoadConfig, rate: float, span_s: float, least_s: float) -> LoadConfig:
    """The run at the rate found: so long that servers that were idle show what they do, but for a share of the time that the search has."""
    rate = float(f"{rate:.4g}")
    most = max(LEAST_REQUESTS, CONFIRMED_SHARE * span_s * rate)
    requests = min(max(load.requests or REQUESTS, ceil(least_s * rate)), most)
    return replace(load, rate=rate, requests=int(requests), seed=load.seed + MOST_LOADS)


def _enter(entry: Held, answer: Answer, points: Sequence[Point]) -> None:
    """The part of an answer that loads alone give. Without a rate that is held: the closest load."""
    mine = [point for point in points if point.deployment == entry.name and not point.setting and not point.void]
    judged = [point for point in mine if point.counts]
    above = [point for point in judged if point.limited_by and (point.rate_per_s or 0) >= answer.rate]
    breaking = min(above, key=lambda point: point.rate_per_s or 0, default=None)
    closest = max(judged, key=lambda point: point.attained_pct, default=None)
    limiting = breaking or closest
    entry.rate_per_s, entry.low = answer.rate if answer.low > 0 else None, answer.low
    entry.high = answer.high if isfinite(answer.high) else None
    entry.limited_by = limiting.limited_by if limiting else None
    entry.loads, entry.load_s = len(mine), sum(point.load_s for point in mine)
    entry.requests, entry.closest = sum(point.requests for point in mine), None
    if answer.low == 0 and closest:
        entry.closest = Closest(rate_per_s=closest.rate_per_s, attained_pct=closest.attained_pct, run=closest.run)


def _scales(search: Search) -> list[Scaled]:
    """The highest rate for the SLO with all limits scaled, where these loads tell."""
    answers = {scale: search.at_scale(scale) for scale in SCALES} if search.outcomes else {}
    return [
        Scaled(scale=scale, rate_per_s=answer.rate, low=answer.low, high=answer.high)
        for scale, answer in answers.items()
        if answer.low > 0 and answer.width <= SCALE_WIDTH
    ]


def _say(console: Console, point: Point, answer: Answer, goal: Goal) -> None:
    low, high = f"{answer.low:.3g}", f"{answer.high:.3g}"
    known = f"{low} to {high}" if answer.low > 0 else f"below {high}"
    if not isfinite(answer.high):
        known = f"{low} or more" if answer.low > 0 else "unknown"
    held = {True: "held", False: "not held", None: "undecided"}[point.held]
    if point.held is False and keeps(point.attained_pct, 100 * goal.attain):
        held += ", as ever more were in flight"
    left_s = max(0, round(goal.until_s - time.monotonic())) if isfinite(goal.until_s) else None
    left = "" if left_s is None else f", at most {span(left_s)} left"
    console.print(
        f"  {point.rate_per_s:.3g} requests/s: {text.attained(point.attained_pct, 100 * goal.attain)} % of {point.requests} within the SLO, {held}; "
        f"highest rate {known}{left}",
        soft_wrap=True,
    )
