"""Searches of real GPUs (H100, vLLM 0.33, TTFT 300 ms, TBT 15 ms), from the counts of their loads."""

import numpy as np
import pytest

from pdbench.config import LoadConfig
from pdbench.load.generator import Progress
from pdbench.records import RequestRecord
from pdbench.search.evidence import Outcome
from pdbench.search.rates import Search
from pdbench.slo_loads import LoadJudge

SINGLE = [  # rate, known requests, missed, held, did it last until a load is steady
    (6.0, 102, 0, True, True), (12.0, 79, 0, True, True), (24.0, 19, 19, False, False), (19.35, 49, 5, False, False),
    (15.33, 131, 0, True, True), (19.55, 25, 17, False, False), (16.47, 43, 31, False, False), (15.85, 64, 30, False, False),
]  # fmt: skip


def searched(loads: list[tuple[float, int, int, bool, bool]]) -> Search:
    search = Search(0.05, loads[0][0])
    for rate, known, missed, held, settled in loads:
        score = np.where(np.arange(known) < known - missed, 0.5, 1.2)  # a queue that grows: the last ones missed
        search.add(Outcome(rate, np.arange(known) / rate, np.ones(known), score, held, settled=settled))
    return search


def test_loads_that_contradict_each_other_near_the_rate_leave_far_ones_as_they_were() -> None:
    search = searched(SINGLE)
    answer = search.answer()
    assert 9.0 < answer.low < 15.33 and 15.33 < answer.high < 19.0
    assert search.next_rate() > 12.0 and search.decided(7.012, 0, 283) is True


def test_rate_that_was_held_is_not_sent_again() -> None:
    search = searched([(20.0, 153, 0, True, True), (40.0, 172, 74, False, False)])
    assert search.answer().low > 18.0 and search.next_rate() > 21.0


FILLING = [  # four replicas, 512 tokens in and out: rate, requests, held, scores of the first and the other parts
    (38.0, 1003, True, (0.67, 0.74, 0.76, 0.77, 0.77, 0.77)), (76.0, 249, False, (0.78, 0.89, 0.94, 0.96, 0.99, 1.02)),
    (46.83, 1202, True, (0.69, 0.80, 0.83, 0.84, 0.84, 0.82)), (69.75, 1401, False, (0.79, 0.92, 0.935, 0.945, 0.975, 1.015)),
]  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.15], ids=["as long as measured", "short"])
def test_queue_that_grew_in_loads_which_were_held_is_not_that_of_the_servers(share: float) -> None:
    # Scores rise while idle servers fill, as if a queue grew in every load: by that one no rate at all was held.
    unit_s = np.cumsum(np.random.default_rng(7).exponential(size=60_000))
    search = Search(0.05, 38.0, unit_s)
    for seed, (rate, measured, held, parts) in enumerate(FILLING, start=10):
        generator, count = np.random.default_rng(seed), measured if rate == 76.0 else int(share * measured)
        score = np.interp(np.linspace(0, 5, count), np.arange(6), parts) + generator.normal(0, 0.006, count)
        arrival_s = np.cumsum(generator.exponential(size=count)) / rate
        search.add(Outcome(rate, arrival_s, np.ones(count), score, held, settled=rate != 76.0))
    answer = search.answer()
    assert 46.83 < answer.low < answer.rate < answer.high < 76.0


def test_requests_in_flight_that_grow_while_none_is_overdue_are_no_overload() -> None:
    # 28/s: few arrivals, then many; answers take up to 1.9 s of the 2.2 s that the limits leave.
    load = LoadConfig(rate=28.0, requests=400, output_tokens=128, slo_ttft_ms=300.0, slo_tbt_ms=15.0)
    judge = LoadJudge(Search(0.05, 28.0), load, float("inf"), settle_s=100.0)
    arrivals = [at_s or 0.0 for at_s in judge._arrivals]
    ended = [
        RequestRecord(
            id=f"x-0-{index:06d}", planned_s=at_s, due_s=at_s, sent_s=at_s, end_s=at_s + 1.9,
            token_s=[float(at) for at in np.linspace(at_s + 0.1, at_s + 1.9, 128)],
        )
        for index, at_s in enumerate(arrivals)
    ]  # fmt: skip
    told = 0
    for now_s, in_flight in ((2.5, 8), (4.0, 21), (6.0, 31), (8.0, 64), (10.0, 100)):
        ends = [each for each in ended[told:] if (each.end_s or 0.0) <= now_s]
        told += len(ends)
        judge.on_progress(Progress(0, None, in_flight, 0, ends, now_s))
        assert judge.held is None
