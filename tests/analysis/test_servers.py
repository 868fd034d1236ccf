"""What servers counted during loads: counts without warm-ups, and flags that name server, instant and number; none for what is usual."""

import re

import numpy as np
import pytest

from pdbench.analysis.run_analysis import analyze
from pdbench.analysis.servers import server_flags
from pdbench.events import LogLine, ServerSeries
from pdbench.records import RequestRecord, Run, load_run
from tests.analysis.test_golden import ROOT
from tests.support.runs import build_run

NAMES = {"preempted", "kv-full", "queue-grows", "compiled-under-load"}


def spans(run: Run) -> list[tuple[float, float]]:
    requests = [[each for each in run.requests if each.trial == trial.index] for trial in run.trials]
    return [(each[0].sent_s, max(request.end_s for request in each)) for each in requests]  # type: ignore[misc]


def warm_up(run: Run, trial: int, seconds: float = 2.0) -> None:
    """One request that ends just before the trial's first."""
    start_s = spans(run)[trial][0]
    run.requests.append(
        RequestRecord(
            id=f"w{trial}", planned_s=0, sent_s=start_s - seconds, end_s=start_s - 0.1, trial=trial, warmup=True
        )
    )


def with_series(run: Run, values: dict[str, list[float | None]], t_s: list[float], server: str = "single-0") -> Run:
    run.servers.append(ServerSeries(server=server, role="single", t_s=t_s, values=values))
    return run


def flags(run: Run) -> dict[str, str]:
    """Name -> detail of the first flag of this name."""
    return {flag.name: flag.detail for flag in reversed(analyze(run).flags) if flag.name in NAMES}


def test_counts_are_those_of_the_loads_without_warm_ups_and_pauses() -> None:
    run = build_run("single", trials=2)
    (a, b), (c, d) = spans(run)
    warm_up(run, 0)
    warm_up(run, 1)
    t_s = [a - 1, a - 0.05, (a + b) / 2, b + 0.1, c - 1, c - 0.05, (c + d) / 2, d + 0.1]
    with_series(
        run,
        {
            "preemptions": [5, 7, 8, 10, 20, 30, 30, 31],
            "queued": [0, 4, 8, 24, 24, 26, 30, 36],
            "queued_s": [0, 1, 2, 3, 3, 4, 5, 6],
            "cache_queries": [0, 100, 200, 300, 300, 400, 500, 600],
            "cache_hits": [None, None, None, 50, 60, 60, 60, 110],
            "waiting": [9, 9, 3, 9, 9, 9, 1, 9],
            "kv_used": [1, 1, 0.5, 1, 1, 1, 0.25, 1],
        },
        t_s,
    )
    server = analyze(run).summary.servers["single-0"]
    assert {trial: each.preemptions for trial, each in server.trials.items()} == {0: 3, 1: 1}
    assert server.loads.preemptions == 4 and server.loads.readings == 2
    assert server.loads.queue_ms == pytest.approx(1e3 * 4 / 30) and server.trials[0].queue_ms == 100
    assert server.loads.cached_pct == pytest.approx(25)
    assert (server.loads.waiting_mean, server.loads.waiting_max, server.loads.kv_used_max_pct) == (2, 3, 50)
    assert server.loads.accepted_pct is None and server.loads.kv_transfers is None
    assert flags(run)["preempted"].startswith(f"single-0: 4 preemptions, first seen {(b - a) / 2:.1f} s into trial 1: ")


@pytest.mark.parametrize(
    ("times", "counts"),
    [((-1.0, 0.5, 2.0), (0, 3, 5)), ((-0.05, 0.5, 2.0), (9, 0, 1)), ((0.2, 0.5, 2.0), (0, 3, 5))],
    ids=["warm-up's reading", "started again", "no reading before"],
)
def test_what_is_not_known_is_no_count(times: tuple[float, ...], counts: tuple[int, ...]) -> None:
    run = build_run("single", trials=1)
    ((start_s, end_s),) = spans(run)
    warm_up(run, 0)
    t_s = [start_s + at * (end_s - start_s) if at > 0 else start_s + at for at in times]
    with_series(run, {"preemptions": list(counts)}, t_s)
    assert analyze(run).summary.servers["single-0"].loads.preemptions is None and flags(run) == {}


def test_counts_without_a_reading_after_the_load_are_not_known() -> None:
    run = build_run("single", trials=1)
    ((start_s, end_s),) = spans(run)
    t_s = [start_s - 0.05, start_s + 0.1, (start_s + end_s) / 2]
    with_series(run, {"preemptions": [0, 1, 2], "output_tokens": [0, 100, 500]}, t_s)
    loads = analyze(run).summary.servers["single-0"].loads
    assert loads.readings == 2 and loads.preemptions is None and loads.output_tokens is None
    assert "2 preemptions" in flags(run)["preempted"]


def test_full_kv_cache_is_flagged_with_its_share() -> None:
    run = build_run("single", trials=1)
    ((start_s, end_s),) = spans(run)
    t_s = np.linspace(start_s, end_s, 10).tolist()
    with_series(run, {"kv_used": [0.5] * 8 + [0.96, 0.99]}, t_s)
    assert flags(run)["kv-full"].startswith(
        "single-0: KV cache up to 99 % full, in 20 % of the readings over 95 %, first seen "
        f"{t_s[8] - start_s:.1f} s into trial 1: "
    )
    run.servers[0].values["kv_used"] = [0.94] * 10
    assert flags(run) == {}


def names(run: Run) -> list[str]:
    return [flag.name for flag in server_flags(run)]


def queue(load: float, seed: int, requests: int = 400, rate: float = 20.0, readings_s: float = 0.5) -> Run:
    """One server with a fixed time per request at this load (1: it keeps up exactly), Poisson arrivals, and its queue as read."""
    random = np.random.default_rng(seed)
    arrivals = 2 + np.cumsum(random.exponential(1 / rate, requests))
    begun, free_s = np.empty(requests), 0.0
    for number, at in enumerate(arrivals):
        begun[number] = max(at, free_s)
        free_s = begun[number] + load / rate
    t_s = np.arange(2.0, free_s, readings_s)
    waiting = np.searchsorted(arrivals, t_s) - np.searchsorted(begun, t_s)
    run = build_run("single", trials=1, requests=1, load={"rate": rate, "requests": requests}, gpu=False)
    run.requests = [
        RequestRecord(id=str(number), planned_s=at, sent_s=at, token_s=[begin + load / rate], end_s=begin + load / rate)
        for number, (at, begin) in enumerate(zip(arrivals.tolist(), begun.tolist(), strict=True))
    ]
    run.trials[0].start_s, run.trials[0].end_s = 2.0, free_s
    return with_series(run, {"waiting": waiting.tolist()}, t_s.tolist())


def test_queue_that_grows_is_flagged_and_a_steady_one_is_not() -> None:
    flagged = {
        load: sum("queue-grows" in names(queue(load, seed)) for seed in range(50)) for load in (0.8, 0.95, 1.0, 1.4)
    }
    assert flagged[0.8] == flagged[0.95] == 0 and flagged[1.0] <= 3 and flagged[1.4] == 50
    detail = flags(queue(1.4, 1))["queue-grows"]
    words = re.fullmatch(
        r"single-0: its queue grew from (\d+) to (\d+) requests, past half of that (\S+) s into trial 1: of (\S+) requests/s that came, "
        r"(\S+) were left over; .*",
        detail,
    )
    assert words
    at_first, at_last, half_s, came, left_over = map(float, words.groups())
    assert at_first < 30 < at_last < 120 and 5 < half_s < 15 and came == pytest.approx(20, rel=0.2)
    assert left_over == pytest.approx(20 * (1 - 1 / 1.4), rel=0.3)


def test_queue_is_not_judged_where_the_load_is_not_steady() -> None:
    run = queue(1.4, 1)
    for options in ({"concurrency": 200}, {"rate": 20.0, "ramp_to": 40.0}, {"rate": 20.0, "stages": "20:10"}):
        run.config["load"] = options
        assert names(run) == []


def test_lines_of_logs_are_flagged_with_their_instant_within_loads_alone() -> None:
    run = build_run("single", trials=2)
    (_, _), (c, _) = spans(run)

    def line(t_s: float, text: str) -> LogLine:
        return LogLine(t_s=t_s, flag="compiled-under-load", text=text, meaning="raise --warmup")

    with_series(run, {}, [])
    warm_up(run, 1)
    run.servers[0].lines = [line(c - 1, "in the warm-up"), line(c + 0.5, "kernel a; b"), line(c + 0.6, "kernel b")]
    detail = 'single-0: "kernel a, b" and 1 more in its log, first seen 0.5 s into trial 2: raise --warmup'
    assert flags(run) == {"compiled-under-load": detail}


def test_prompts_that_decode_computed_are_flagged_by_trial_unless_it_may_compute_them() -> None:
    run = build_run("disaggregated", trials=2)
    requests = len(run.requests) // 2
    (a, b), (c, d) = spans(run)
    warm_up(run, 0)
    warm_up(run, 1)
    series = ServerSeries(server="decode-0", role="decode", t_s=[a - 0.05, b + 0.05, c - 0.05, d + 0.05])
    series.values = {
        "prompt_tokens": [100, 5100, 5200, 10200],
        "external_tokens": [100, 5100 - requests, 5200, 9700],  # it may compute one token of each prompt
        "cache_hits": [None, None, None, 300],
    }
    run.servers = [series]
    (flag,) = server_flags(run)
    assert (flag.name, flag.detail.partition(",")[0]) == (
        "kv-not-external", "trial 2: decode computed 200 of 5000 prompt tokens itself"
    )  # fmt: skip
    run.config["serve"] = {"disaggregate_above": 64}
    assert not list(server_flags(run))


@pytest.mark.parametrize(("more", "flagged"), [(0, False), (200, False), (400, True)])
def test_servers_that_somebody_else_uses_are_flagged(more: int, flagged: bool) -> None:
    run = build_run("single", trials=2)
    (a, b), (c, d) = spans(run)
    warm_up(run, 0)
    warm_up(run, 1)
    ours = [sum(each.output_tokens or 0 for each in run.requests if each.trial == trial) for trial in (0, 1)]
    counts = [50.0, 50 + ours[0], 90 + ours[0], 90 + sum(ours) + more]
    run.servers = [
        ServerSeries(
            server="single-0",
            role="single",
            t_s=[a - 0.05, b + 0.05, c - 0.05, d + 0.05],
            values={"output_tokens": counts},
        )
    ]
    found = [flag.detail for flag in server_flags(run) if flag.name == "other-traffic"]
    assert [detail.startswith("trial 2: the servers generated") for detail in found] == [True] * flagged


def test_runs_saved_before_servers_were_recorded_have_none(tmp_path) -> None:
    (tmp_path / "single_results.json").write_bytes((ROOT / "tests/data/recorded_single_cpu_results.json").read_bytes())
    analysis = analyze(load_run(tmp_path))
    assert analysis.summary.servers == {} and analysis.curves.servers == {}
