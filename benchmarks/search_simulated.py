"""What `pdbench search` decides on known laws, in simulated time: its error, its load, what it called held.

The laws are those of search_accuracy.py, and one engine that computes prompts in the steps of decoding.

The search's own code (rates, when a load ends, what it counted) sends its loads to the law as a function, which takes seconds per search instead of
minutes and has no machine in it. Printed are, per server, over all seeds: how many searches were within 3 %, how many intervals
cover the truth, and how many loads were called held at a rate above the truth (not held at one below).
Try: python benchmarks/search_simulated.py --searches 200 --processes 2
"""

import argparse
import json
import math
import multiprocessing
import sys
from collections import deque
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from search_accuracy import ATTAIN, REQUESTS, SERVERS, TOKENS, Server

sys.path.insert(0, str(Path(__file__).parents[1]))
from pdbench import slo_loads, slo_search
from pdbench.analysis.metrics import timings_of
from pdbench.config import LoadConfig, Options
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.records import Clock, RequestError, RequestRecord, Run
from pdbench.search.document import Held, Point
from pdbench.search.rates import Search
from pdbench.slo_loads import Deployment, LoadJudge, Loads, Sent, outcome_of


class SimulatedTime:
    """What the search takes for the time."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


slo_search.SCALES = ()  # not looked at here, and slow
TIME = slo_search.time = slo_loads.time = SimulatedTime()  # type: ignore[assignment]
PROGRESS_S = 0.25
PRECISION = 0.03


@dataclass(frozen=True)
class Engine:
    """A single instance whose steps give every running request a token, and take longer by each request and by each prompt in them. While prompts
    queue, every step has some: from a burst of arrivals on, mean TBT stays above its limit for hundreds of requests."""

    name: str
    itl_ms: float
    request_ms: float
    prefill_ms: float
    tokens: int
    ttft_ms: float
    tbt_ms: float
    prompts = 4
    """At most, in one step."""

    def token_s(self, arrival_s: list[float]) -> list[list[float]]:
        """The instants of each request's tokens."""
        step_s: list[float] = []
        first: list[int] = []
        last: deque[int] = deque()
        now_s = 0.0
        while len(first) < len(arrival_s) or last:
            while last and last[0] < len(step_s):
                last.popleft()
            if not last and len(first) < len(arrival_s):
                now_s = max(now_s, arrival_s[len(first)])
            prompts = 0
            while prompts < self.prompts and len(first) < len(arrival_s) and arrival_s[len(first)] <= now_s:
                first.append(len(step_s))
                last.append(len(step_s) + self.tokens - 1)
                prompts += 1
            now_s += (self.itl_ms + self.request_ms * len(last) + self.prefill_ms * prompts) / 1e3
            step_s.append(now_s)
        return [step_s[each : each + self.tokens] for each in first]

    def truth(self) -> float:
        """The highest rate, to 0.1 %, by simulations of 400,000 requests."""
        unit_s, low, high = np.cumsum(np.random.default_rng(1).exponential(size=400_000)), 1.0, 1e3 / self.prefill_ms
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            arrival_s = (unit_s / middle).tolist()
            ends = [(token_s[0], token_s[-1]) for token_s in self.token_s(arrival_s)]
            first_s, last_s = np.array(ends).T
            good = (first_s - arrival_s <= self.ttft_ms / 1e3) & (
                last_s - first_s <= self.tbt_ms / 1e3 * (self.tokens - 1)
            )
            low, high = (middle, high) if good[5_000:].mean() >= ATTAIN else (low, middle)
        return low


LAWS: tuple[Server | Engine, ...] = (*SERVERS, Engine("engine, prompts in its steps", 3.5, 0.2, 25.0, 128, 300.0, 15.0))


def records_of(server: Server | Engine, load: LoadConfig) -> list[RequestRecord]:
    """What the law answers, all requests to their end."""
    arrivals = [at_s or 0.0 for at_s in plan.planned_instants(load, 0)]
    answers = server.token_s(arrivals) if isinstance(server, Engine) else queued(server, arrivals)
    return [
        RequestRecord(
            id=f"x-0-{index:06d}", planned_s=at_s, due_s=at_s, sent_s=at_s, token_s=token_s, end_s=token_s[-1]
        )
        for index, (at_s, token_s) in enumerate(zip(arrivals, answers, strict=True))
    ]


def queued(server: Server, arrivals: list[float]) -> list[list[float]]:
    """The instants of each request's tokens: one prefill at a time, then a slot of decode."""
    answers, prefill_free_s, slot_free_s = [], 0.0, [0.0] * server.slots
    itl_s = server.itl_ms / 1e3
    for index, at_s in enumerate(arrivals):
        first_s = prefill_free_s = max(at_s, prefill_free_s) + server.prefill_ms / 1e3
        # Equal durations in the order of arrival: the slots take turns.
        decode_s = max(first_s, slot_free_s[index % server.slots])
        slot_free_s[index % server.slots] = decode_s + (TOKENS - 1) * itl_s
        answers.append([first_s, *(decode_s + itl_s * place for place in range(1, TOKENS))])
    return answers


def sent(records: list[RequestRecord], judge: LoadJudge | None) -> tuple[list[RequestRecord], float]:
    """The records as the client leaves them, and when the load ended."""
    begin_s, ends = TIME.now_s, sorted(records, key=lambda record: record.end_s or 0.0)
    last_s, now_s, place = ends[-1].end_s or 0.0, 0.0, 0
    while judge and now_s < last_s:
        now_s += PROGRESS_S
        TIME.now_s = begin_s + now_s
        first = place
        while place < len(ends) and (ends[place].end_s or 0.0) <= now_s:
            place += 1
        arrived = int(np.searchsorted([each.planned_s for each in records], now_s, side="right"))
        judge.on_progress(Progress(0, None, arrived - place, 0, ends[first:place], now_s))
        if judge.decided():
            for record in records:
                if (record.end_s or 0.0) > now_s:  # cut off
                    record.token_s = [at_s for at_s in record.token_s if at_s <= now_s]
                    record.end_s, record.error = now_s, RequestError("interrupted", "the load was stopped")
            return [each for each in records if each.planned_s <= now_s], now_s
    TIME.now_s = begin_s + last_s
    return records, last_s


class LawLoads(Loads):
    """Loads sent to a law; nothing is saved."""

    def __init__(self, server: Server | Engine, load: LoadConfig) -> None:
        deployment = Deployment(
            "law", Options(load=load), lambda options, folder, judge: Run("", Clock(0, 0), {}, {}, {})
        )
        super().__init__(deployment, ATTAIN, Path(), Console(quiet=True), [], [])
        self.server = server

    def send(self, name: str, load: LoadConfig, judge: LoadJudge | None = None, setting: Any = None) -> Sent:
        records, end_s = sent(records_of(self.server, load), judge)
        run = Run(name="law", clock=Clock(0, 0), config={"load": asdict(load)}, host={}, versions={}, requests=records)
        timings = timings_of(run)
        outcome = outcome_of(timings, load.rate or 0.0, judge.held if judge else None)
        share = float(outcome.missed.mean()) if len(outcome.missed) else 0.0
        point = Point(
            deployment="law",
            run=f"{name}/run",
            rate_per_s=load.rate,
            requests=len(outcome.missed),
            attained_pct=100 * (1 - share),
            held=judge.held if judge else None,
            slo_used=None,
            limited_by=None,
            client_limited=False,
            load_s=end_s - records[0].planned_s,
        )
        self.points.append(point)
        return Sent(run, timings, outcome, point)


def searched(server: Server | Engine, seed: int, most_s: float) -> dict[str, Any]:
    """One search: what it found, and its loads."""
    tokens = server.tokens if isinstance(server, Engine) else TOKENS
    load = LoadConfig(
        slo_ttft_ms=server.ttft_ms,
        slo_tbt_ms=server.tbt_ms,
        output_tokens=tokens,
        requests=REQUESTS,
        seed=seed,
        nonce="n",
    )
    loads, entry = LawLoads(server, load), Held(name="law")
    alone_s = (server.prefill_ms + server.itl_ms * (tokens - 1)) / 1e3
    # As if the request that is alone had taken a little less or more: no search is to depend on where the first rate happens to lie.
    first_rate = 0.5 / (server.prefill_ms / 1e3) * 2 ** np.random.default_rng(seed).uniform(-0.5, 0.5)
    unit_s = slo_search._unit_arrivals(load)
    search = Search(1 - ATTAIN, first_rate, unit_s)
    goal = slo_search.Goal(ATTAIN, PRECISION, TIME.now_s + most_s)
    slo_search._search_rate(loads, search, goal, load, alone_s, entry, lambda: None)
    points = [[p.rate_per_s, p.held, p.requests, p.attained_pct, p.load_s] for p in loads.points]
    return {
        "seed": seed,
        "rate": entry.rate_per_s,
        "low": entry.low,
        "high": entry.high,
        "load_s": entry.load_s,
        "requests": entry.requests,
        "loads": len(search.outcomes),
        "confirmed_pct": entry.attained_pct,
        "points": points,
    }


def _job(job: tuple[Server | Engine, int, float]) -> tuple[str, dict[str, Any]]:
    return job[0].name, searched(*job)


def row(server: Server | Engine, truth: float, searches: list[dict[str, Any]]) -> str:
    """The table's."""
    errors = 100 * np.abs([(each["rate"] or 0.0) / truth - 1 for each in searches])
    width = np.median([((each["high"] or inf) / each["low"]) ** 0.5 - 1 if each["low"] else inf for each in searches])
    covers = sum(each["low"] <= truth <= (each["high"] or inf) for each in searches)
    load_s, requests = ([each[key] for each in searches] for key in ("load_s", "requests"))
    judged = [point for each in searches for point in each["points"][:-1] if point[1] is not None]
    held = [point[0] for point in judged if point[1]]
    lost = [point[0] for point in judged if not point[1]]
    wrong_held = [rate for rate in held if rate > truth]
    wrong_lost = [rate for rate in lost if rate < truth]
    span = " ".join(f"{value:.0f}" for value in np.quantile(load_s, (0.5, 0.9, 1.0)))
    return (
        f"| {server.name} | {len(searches)} | {(errors <= 3).sum()} | {np.median(errors):.1f} {np.quantile(errors, 0.9):.1f} {errors.max():.1f}"
        f" | {covers}, ±{100 * width:.1f} % | {span} | {np.median(requests):.0f} | {np.median([each['loads'] for each in searches]):.0f} {max(each['loads'] for each in searches)}"
        f" | {len(wrong_held)} of {len(held)}, {sum(rate > 1.03 * truth for rate in wrong_held)} by 3 %"
        f" | {len(wrong_lost)} of {len(lost)}, {sum(rate < 0.97 * truth for rate in wrong_lost)} by 3 % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=200, help="of each server")
    parser.add_argument("--first", type=int, default=1, help="the first seed's number")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--load-s", type=float, default=inf, help="the time that a search has")
    parser.add_argument(
        "--server", choices=[server.name.split(",")[0] for server in LAWS], help="one server by its law"
    )
    parser.add_argument("--out", type=Path, help="file for every search and its loads, as JSON")
    options = parser.parse_args()
    servers = [server for server in LAWS if server.name.startswith(options.server or "")]
    numbers = range(options.first, options.first + options.searches)
    # Seeds of loads and searches must not meet.
    jobs = [(server, 100 * number, options.load_s) for number in numbers for server in servers]
    found: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    with multiprocessing.Pool(options.processes) as pool:
        for name, each in pool.imap(_job, jobs):
            found[name].append(each)
            if options.out:
                options.out.write_text(json.dumps(found) + "\n")
    print(
        "| server | searches | within 3 % | error %: median, 90 %, largest | intervals that cover, median width | load s: median, 90 %, longest | requests | loads: median, most | held above the truth | not held below it |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for server in servers:
        print(row(server, server.truth(), found[server.name]))


if __name__ == "__main__":
    main()
