"""When a search's load may end, by its requests' progress; what loads it may send, and in what time."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from pdbench import slo_search
from pdbench.analysis.run_analysis import analyze
from pdbench.config import LoadConfig, Options
from pdbench.errors import UserError
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.records import RequestRecord, Run, load_run
from pdbench.report.search_sentence import sentence
from pdbench.search.document import Held, Point
from pdbench.search.rates import Answer, Search
from pdbench.slo_loads import LoadJudge, settle_s
from pdbench.slo_search import Goal
from tests.test_slo_search import Law, search

LOAD = LoadConfig(slo_ttft_ms=300.0, slo_tbt_ms=50.0, output_tokens=4, requests=300, nonce="n")


def test_load_whose_time_is_up_ends_only_once_a_request_has_ended() -> None:
    judge = LoadJudge(Search(0.05, 5.0), LOAD, until_s=0.0)
    assert judge.decided() is None
    record = RequestRecord(id="x-0-000000", planned_s=0.1, sent_s=0.1, token_s=[0.2], end_s=0.2)
    judge.on_progress(Progress(1, None, 0, 0, [record], 0.2))
    assert judge.decided() == "the time is up"


def test_judge_counts_requests_in_the_order_of_arrival() -> None:
    load = dataclasses.replace(LOAD, rate=2.0)
    judge = LoadJudge(Search(0.05, 2.0), load, float("inf"))
    arrivals = [at_s or 0.0 for at_s in plan.planned_instants(load, 0)]

    def record(index: int, ttft_s: float) -> RequestRecord:
        at_s = arrivals[index]
        token_s = [at_s + ttft_s]
        return RequestRecord(id=f"x-0-{index:06d}", planned_s=at_s, sent_s=at_s, token_s=token_s, end_s=token_s[0])

    judge.on_progress(Progress(1, None, 1, 0, [record(1, 0.1)], arrivals[1] + 0.1))
    assert judge._known == 0  # the first one is still in flight, and may miss
    judge.on_progress(Progress(2, None, 0, 0, [record(0, 0.4)], arrivals[1] + 0.2))
    assert (judge._known, judge._missed) == (2, 1)
    judge.on_progress(Progress(2, None, 1, 0, [], arrivals[2] + 0.5))
    late = sum(arrivals[2] + 0.5 - at_s > 0.45 for at_s in arrivals[2:])  # older than 300 ms and three gaps of 50 ms
    assert late and (judge._known, judge._missed) == (2 + late, 1 + late)


def test_request_is_overdue_only_by_a_limit_of_tokens_that_is_sent() -> None:
    record = RequestRecord(id="x-0-000001", planned_s=0.1, sent_s=0.1, token_s=[0.2], end_s=0.2)
    for extra_body, is_overdue in (("", True), ('{"max_tokens": 500}', False)):
        judge = LoadJudge(Search(0.05, 5.0), dataclasses.replace(LOAD, rate=5.0, extra_body=extra_body), until_s=100.0)
        judge.on_progress(Progress(1, None, 1, 0, [record], 1.1))  # the first has no answer yet
        assert (judge._missed > 0) == is_overdue


def test_load_that_begins_on_idle_servers_is_no_overload_while_its_answers_may_still_take_longer() -> None:
    load = dataclasses.replace(LOAD, rate=20.0, slo_tbt_ms=15.0, output_tokens=128)  # 2.2 s within the SLO
    judge = LoadJudge(Search(0.05, 20.0), load, float("inf"))
    arrivals = [at_s or 0.0 for at_s in plan.planned_instants(load, 0)][:8]
    quick = [
        RequestRecord(id=f"x-0-{index:06d}", planned_s=at_s, sent_s=at_s, token_s=[at_s + 0.1], end_s=at_s + 0.5)
        for index, at_s in enumerate(arrivals)
    ]
    judge.on_progress(Progress(8, None, 2, 0, quick, 1.1))
    judge.on_progress(Progress(8, None, 32, 0, [], 2.2))
    assert judge.held is None
    judge.on_progress(Progress(8, None, 99, 0, [], 4.5))
    assert judge.held is False


def test_several_client_processes_are_for_loads_with_several_requests_at_once(tmp_path: Path) -> None:
    law, load = Law(), dataclasses.replace(LOAD, client_processes=2)
    assert search(tmp_path, law, load=load, goal=Goal(0.95, 0.5)).deployments[0].rate_per_s
    assert [load.client_processes for load in law.loads[:2]] == [1, 2]
    for each in slo_search.kinds_of_loads(load):
        plan.check(each)


def test_time_that_loads_take_before_they_begin_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law, prepared_s = Law(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: law.spent_s + prepared_s)
    measure = law.measure

    def measure_prepared(options: Options, folder: Path, judge: LoadJudge | None) -> Run:
        nonlocal prepared_s
        prepared_s += 15.0
        return measure(options, folder, judge)

    law.measure = measure_prepared  # type: ignore[method-assign]
    for until_s in (100, 140, 180):
        begin_s = time.monotonic()
        goal = Goal(0.95, 0.005, until_s=begin_s + until_s)
        (entry,) = search(tmp_path / str(until_s), law, goal=goal).deployments
        assert entry.run and time.monotonic() - begin_s < until_s + 15


def test_run_at_the_rate_found_lasts_until_idle_servers_are_busy(tmp_path: Path) -> None:
    law, load = Law(prefill_s=0.01, itl_s=1.0), dataclasses.replace(LOAD, slo_tbt_ms=1200.0, requests=40)
    (entry,) = search(tmp_path, law, load=load, goal=Goal(0.95, 0.3)).deployments
    last = law.loads[-1]
    assert entry.rate_per_s == pytest.approx(last.rate, rel=1e-3)
    assert last.requests / last.rate >= settle_s(load, 3.0) > 15 > 40 / last.rate


class InChunks(Law):
    """Every `every`-th answer comes in two chunks 60 ms apart, and nobody says of how many tokens: the mean TBT is 60 ms or less."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def send(self, records: list[RequestRecord], judge: LoadJudge | None) -> float:
        for record in records[:: self.every]:
            record.token_s, record.counted_by = record.token_s[::3], "chunks"
        return super().send(records, judge)


def test_answers_that_nobody_can_judge_are_counted_as_missed_and_the_search_goes_on(tmp_path: Path) -> None:
    (entry,) = (document := search(tmp_path, InChunks(10), goal=Goal(0.8, 0.2))).deployments
    assert entry.low > 0 and entry.attained_pct is not None and 70 < entry.attained_pct <= 90
    alone, confirmed = document.points[0], document.points[-1]
    assert (alone.requests, alone.attained_pct) == (8, 87.5) and confirmed.attained_pct == entry.attained_pct


def test_share_within_the_slo_is_that_of_the_search_and_of_goodput(tmp_path: Path) -> None:
    """One of 30 answers cannot be judged, so that goodput is given: as what it is at least, like the share."""
    document = search(tmp_path, InChunks(30), goal=Goal(0.8, 0.2))
    point = document.points[-1]
    run = load_run(tmp_path / point.run)
    goodput = analyze(run).summary.goodput
    assert point.attained_pct == goodput.met_pct < 100
    assert len(run.requests) == point.requests
    good = goodput.requests_per_s * (run.trials[0].end_s - run.trials[0].start_s)
    assert good == pytest.approx(goodput.met_pct / 100 * len(run.requests))


class InChunksUnderLoad(InChunks):
    """No answer of a load faster than `rate` can be judged: the server sends several tokens at a time once it is busy."""

    def __init__(self, rate: float) -> None:
        super().__init__(1)
        self.rate = rate

    def send(self, records: list[RequestRecord], judge: LoadJudge | None) -> float:
        self.every = 1 if (self.loads[-1].rate or 0.0) > self.rate else len(records) + 1
        return super().send(records, judge)


def test_overload_of_which_nothing_can_be_judged_is_missed_and_the_search_goes_on(tmp_path: Path) -> None:
    """It had ended the search, though lower rates were held."""
    law, load = InChunksUnderLoad(3.0), dataclasses.replace(LOAD, rate=2.0)
    document = search(tmp_path, law, load=load, goal=Goal(0.95, 0.2))
    (entry,) = document.deployments
    undecided = [point for point in document.points if point.undecided_pct == 100.0]
    assert undecided and all(point.held is not True and (point.rate_per_s or 0) > 3 for point in undecided)
    assert entry.rate_per_s is not None and entry.rate_per_s < 3.5 and entry.high is not None
    assert "d0 may carry more: answers of which nobody knows" in sentence(document)


def test_load_of_which_nothing_can_be_judged_ends_the_search_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no request of .*one-at-a-time could be judged: .* chunks hold several tokens"
    ):
        search(tmp_path, InChunks(1))


def test_closest_load_is_one_that_counts() -> None:
    def point(rate: float, attained_pct: float, **more: bool | None) -> Point:
        of_client: dict[str, Any] = {"client_limited": False, "held": False, **more}
        named: dict[str, Any] = {
            "deployment": "single",
            "run": f"{rate}",
            "slo_used": None,
            "limited_by": "slo_ttft_ms",
        }
        return Point(rate_per_s=rate, attained_pct=attained_pct, requests=8, load_s=1.0, **named, **of_client)

    entry = Held(name="single")
    lagged = point(4.0, 96.0, client_limited=True, held=None)
    slo_search._enter(entry, Answer(rate=3.0, low=0.0, high=9.0), [lagged, point(8.0, 90.0)])
    assert entry.closest and entry.closest.attained_pct == 90.0
    assert entry.loads == 2
