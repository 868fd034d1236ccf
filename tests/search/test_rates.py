"""The statistics of a search, on virtual servers whose highest rate is known."""

import numpy as np
import pytest

from pdbench.search.evidence import Array, Evidence, Outcome, VirtualQueue, inflation, plain, waits
from pdbench.search.rates import Search

UNIT_S = np.cumsum(np.random.default_rng(7).exponential(size=60_000))
SERVICE_S, LIMIT_S, TRUTH = 0.1, 0.3, 4.924
"""Of an M/D/1 queue 95 % of the requests wait at most 0.2 s at this rate (Crommelin 1932)."""
LONG_LIMIT_S, LONG_TRUTH = 1.0, 8.482
"""The same for waits of 0.9 s: queues that miss it last for hundreds of requests."""
SLOTS, SLOTS_LIMIT_S, SLOTS_TRUTH = 4, 0.64, 6.04
"""Four at once that take 0.4 s each; 95 % wait at most 0.24 s (0.1 %, a simulation of a million)."""


def load(
    rate: float, seed: int, count: int = 500, held: bool | None = None, limit_s: float = LIMIT_S, servers: int = 1
) -> Outcome:
    unit = np.cumsum(np.random.default_rng(seed).exponential(size=count + 1))
    arrival_s = unit[:-1] * count / unit[-1] / rate
    service_s = servers * SERVICE_S
    ttft_s = waits(arrival_s, np.full(count, service_s), servers) + service_s
    return Outcome(rate, arrival_s, np.ones(count), ttft_s / limit_s, held)


def plain_load(rate: float, missed: int) -> Outcome:
    """500 requests, of which those that missed lie evenly among the others."""
    score = np.full(500, 0.5)
    score[np.linspace(0, 499, missed).astype(int)] = 2.0
    return Outcome(rate, np.arange(500.0), np.ones(500), score)


def search_through(
    seed: int,
    first_rate: float,
    unit_s: Array | None = UNIT_S,
    loads: int = 12,
    limit_s: float = LIMIT_S,
    servers: int = 1,
) -> Search:
    search = Search(0.05, first_rate, unit_s)
    for number in range(loads):
        if search.found(0.03):
            break
        whole = load(search.next_rate(), 1000 * seed + number, limit_s=limit_s, servers=servers)
        end, held = len(whole.score), None
        for known in range(20, end, 10):
            held = search.decided(whole.rate, int(whole.missed[:known].sum()), known)
            if held is not None:
                end = known
                break
        search.add(Outcome(whole.rate, whole.arrival_s[:end], whole.work[:end], whole.score[:end], held))
    return search


def test_waits_are_those_of_a_queue_served_one_by_one() -> None:
    generator = np.random.default_rng(1)
    arrival_s, service_s = np.cumsum(generator.exponential(size=300)), generator.uniform(0.2, 1.4, 300)
    free_s, expected = 0.0, []
    for at_s, takes_s in zip(arrival_s, service_s, strict=True):
        expected.append(max(0.0, free_s - at_s))
        free_s = max(free_s, at_s) + takes_s
    assert waits(arrival_s, service_s) == pytest.approx(expected, abs=1e-9)


def test_waits_for_whichever_of_several_servers_is_free_where_services_are_equal() -> None:
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(size=301))
    free_s, expected = [0.0] * 3, []
    for at_s in arrival_s:
        expected.append(max(0.0, min(free_s) - at_s))
        free_s[free_s.index(min(free_s))] = at_s + expected[-1] + 2.5
    assert waits(arrival_s, np.full(301, 2.5), 3) == pytest.approx(expected, abs=1e-9)


def test_inflation_is_that_of_correlated_values() -> None:
    generator = np.random.default_rng(2)
    series = []
    for _ in range(8):
        values = [0.0]
        for noise in generator.normal(size=4000):
            values.append(0.8 * values[-1] + noise)
        series.append(np.array(values))
    assert inflation(series) == pytest.approx(9.0, rel=0.25)  # (1 + 0.8) / (1 - 0.8)
    assert inflation([generator.normal(size=4000)]) < 1.5
    assert inflation([np.zeros(10)]) == 4.0


def test_found_rate_is_the_true_one_and_its_interval_covers_it() -> None:
    answers = [search_through(seed, first).answer() for seed, first in enumerate((0.5, 2.0, 7.0, 20.0, 4.0))]
    assert sum(abs(answer.rate / TRUTH - 1) < 0.03 for answer in answers) >= 4
    assert sum(answer.low <= TRUTH <= answer.high for answer in answers) >= 4
    assert all(answer.width < 0.1 for answer in answers)


def test_rate_is_found_where_queues_last_for_hundreds_of_requests() -> None:
    searches = [search_through(seed, 5.0, limit_s=LONG_LIMIT_S) for seed in range(5)]
    answers = [each.answer() for each in searches]
    assert sum(abs(answer.rate / LONG_TRUTH - 1) < 0.03 for answer in answers) >= 4
    assert sum(answer.low <= LONG_TRUTH <= answer.high for answer in answers) >= 4
    assert np.median([sum(len(load.score) for load in each.outcomes) for each in searches]) < 2000


def test_rate_is_found_by_few_requests_where_several_are_served_at_once() -> None:
    searches = [search_through(seed, 12.0, loads=30, limit_s=SLOTS_LIMIT_S, servers=SLOTS) for seed in range(10)]
    answers = [each.answer() for each in searches]
    assert sum(abs(answer.rate / SLOTS_TRUTH - 1) < 0.03 for answer in answers) >= 9
    assert sum(answer.low <= SLOTS_TRUTH <= answer.high for answer in answers) >= 9
    assert np.median([sum(len(load.score) for load in each.outcomes) for each in searches]) < 2500


def test_virtual_queue_has_as_many_servers_as_the_law() -> None:
    queue = VirtualQueue([load(6.0, seed, limit_s=SLOTS_LIMIT_S, servers=SLOTS) for seed in range(2)], UNIT_S)
    assert queue.servers == SLOTS and queue.seconds == pytest.approx(SERVICE_S, rel=0.01)


@pytest.mark.parametrize(("spread", "servers"), [(0.05, SLOTS), (0.7, 1)])
def test_virtual_queue_has_several_servers_only_where_works_are_alike(spread: float, servers: int) -> None:
    loads = []
    for seed in range(2):
        equal = load(6.0, seed)
        work = np.random.default_rng(seed).gamma(1 / spread**2, spread**2, 500)
        service_s = SLOTS * SERVICE_S * work
        score = (waits(equal.arrival_s, service_s, SLOTS) + service_s) / 1.6
        loads.append(Outcome(6.0, equal.arrival_s, 1000 * work, score))
    assert VirtualQueue(loads, UNIT_S).servers == servers


def test_virtual_queue_is_found_among_overloads() -> None:
    loads = [
        load(rate, seed, count, limit_s=LONG_LIMIT_S)
        for seed, (rate, count) in enumerate([(20.0, 28), (8.3, 500), (9.5, 300)])
    ]
    queue = VirtualQueue(loads, UNIT_S)
    assert queue.seconds == pytest.approx(SERVICE_S, rel=0.01)
    evidence = queue.evidence()
    assert evidence is not None and evidence[0].missed > 0.5 and evidence[0].requests < 28


def test_virtual_queue_takes_out_the_luck_in_the_arrivals() -> None:
    loads = [load(TRUTH, seed) for seed in range(24)]
    seen = [each.missed.mean() for each in loads]
    adjusted = []
    for first in range(0, 24, 4):
        evidence = VirtualQueue(loads[first : first + 4], UNIT_S).evidence()
        assert evidence is not None
        adjusted += [each.missed for each in evidence]
    assert np.std(adjusted) < 0.4 * np.std(seen)
    assert np.mean(adjusted) == pytest.approx(0.05, abs=0.006)
    assert evidence[0].requests > 4 * plain(loads)[0].requests


def test_prompts_of_many_lengths_tell_less_as_few_of_them_were_seen() -> None:
    worth = []
    for spread in (0.0, 0.7):
        loads = []
        for seed in range(3):
            equal = load(6.0, seed)
            work = np.random.default_rng(seed).gamma(1 / spread**2, spread**2, 500) if spread else equal.work
            service_s = SERVICE_S * work
            score = (waits(equal.arrival_s, service_s) + service_s) / 0.4
            loads.append(Outcome(6.0, equal.arrival_s, 1000 * work, score))
        evidence = VirtualQueue(loads, UNIT_S).evidence()
        assert evidence is not None
        worth.append(sum(each.requests for each in evidence))
    assert worth[1] < 0.5 * worth[0]


def test_queue_that_misses_follow_loosely_predicts_none() -> None:
    # Rare misses of a machine whose speed varies; arrivals at 5/s that happen to suit a queue of 0.24 s in part.
    arrival_s = np.cumsum(np.random.default_rng(3).exponential(size=200)) / 5
    moody = np.where(np.random.default_rng(4).random(200) < 0.12, 1.5, 0.5)
    late = waits(arrival_s, np.full(200, 0.24)) > 5.0
    outcome = Outcome(5.0, arrival_s, np.ones(200), moody + 0.3 * late)
    assert VirtualQueue([outcome], UNIT_S).evidence() is None
    search = Search(0.05, 5.0, UNIT_S)
    search.add(outcome)
    assert search.evidence()[0].missed == outcome.missed.mean()


def test_next_rate_is_within_a_step_of_those_that_were_sent() -> None:
    search = Search(0.05, 8.0)
    for rate, missed, held in ((8.0, 15, False), (4.0, 0, True), (5.0, 30, False), (2.1, 12, None)):
        score = np.full(60, 0.5)
        score[:missed] = 2.0
        search.add(Outcome(rate, np.arange(60.0), np.ones(60), score, held))
    assert search.next_rate() >= 2.1 / 2


def test_load_of_three_requests_needs_no_virtual_queue() -> None:
    assert VirtualQueue([load(5.0, 1, 3)], UNIT_S).evidence() is None


def test_overload_is_decided_by_few_requests_and_an_idle_server_is_held() -> None:
    search = Search(0.05, 5.0, UNIT_S)
    assert search.decided(5.0, 0, 10) is None
    assert search.decided(5.0, 20, 24) is False
    assert search.decided(5.0, 0, 300) is True


def test_first_rate_is_not_called_held_by_a_few_good_requests() -> None:
    called_held = 0
    for seed in range(25):
        above = load(1.2 * TRUTH, seed)
        verdicts = (Search(0.05, above.rate).decided(above.rate, above.missed[:n].sum(), n) for n in range(20, 500, 10))
        called_held += next((verdict for verdict in verdicts if verdict is not None), None) is True
    assert called_held <= 2  # 2 % of wrong verdicts are allowed


def test_rate_is_not_found_by_loads_far_from_it_alone() -> None:
    search = Search(0.05, 5.0)
    for _ in range(20):
        search.add(plain_load(4.0, missed=5))
        search.add(plain_load(6.5, missed=200))
    rate = search.answer().rate
    assert search.answer().width < 0.03 and 4.4 < rate < 5.9 and not search.found(0.03)
    search.add(plain_load(rate, missed=25))
    assert not search.found(0.03)
    search.add(plain_load(rate, missed=25))
    assert search.found(0.03)


def test_rate_far_from_all_that_is_possible_is_decided() -> None:
    search = Search(0.05, 5.0)
    for _ in range(4):
        search.add(plain_load(5.0, missed=25))
    assert search.decided(500.0, 0, 30) is False and search.decided(0.05, 0, 30) is True


def test_without_a_rate_that_is_held_there_is_no_lower_bound() -> None:
    search = Search(0.05, 8.0, UNIT_S)
    assert search.next_rate() == 8.0
    for number in range(3):
        search.add(Outcome(search.next_rate(), np.arange(30.0), np.ones(30), np.full(30, 2.0), held=False))
        assert search.answer().low == 0.0 and search.next_rate() < 8.0 / 1.9 ** (number + 1)


def test_without_a_rate_that_is_missed_there_is_no_upper_bound() -> None:
    search = Search(0.05, 8.0, UNIT_S)
    search.add(Outcome(8.0, np.arange(90.0), np.ones(90), np.full(90, 0.5), held=True))
    assert search.answer().high == np.inf and search.answer().low > 0 and search.next_rate() == 16.0


def test_few_requests_of_a_rate_that_was_missed_bound_the_answer_all_the_same() -> None:
    search = Search(0.05, 50.0, UNIT_S)
    for rate, known, missed, held in ((50.0, 398, 0, True), (100.0, 6, 2, False)):
        score = np.where(np.arange(known) < known - missed, 0.5, 1.2)
        search.add(Outcome(rate, np.arange(known) / rate, np.ones(known), score, held, settled=held))
    answer = search.answer()
    assert 50.0 < answer.low < answer.rate < answer.high <= 400.0


@pytest.mark.parametrize("known", [0, 30])
def test_load_ended_by_its_growing_queue_bounds_the_rate_before_anything_missed(known: int) -> None:
    search = Search(0.05, 8.0, UNIT_S)
    search.add(Outcome(8.0, np.arange(90.0), np.ones(90), np.full(90, 0.5), held=True))
    search.add(Outcome(16.0, np.arange(float(known)), np.ones(known), np.full(known, 0.5), held=False))
    assert search.answer().low < 16.0 and search.answer().high < 24.0
    assert search.at_scale(1.3).high < 24.0


def test_contradicting_loads_widen_the_interval() -> None:
    steady, moody = Search(0.05, 5.0), Search(0.05, 5.0)
    for number in range(6):
        steady.add(plain_load(5.0, missed=25))
        moody.add(plain_load(5.0, missed=(5, 45)[number % 2]))
    assert moody.answer().width > 1.5 * steady.answer().width


def test_larger_slo_is_held_at_a_higher_rate() -> None:
    search = search_through(3, 4.0)
    rates = [search.at_scale(scale).rate for scale in (0.7, 1.0, 1.5)]
    assert rates == sorted(rates) and rates[2] > 1.1 * rates[0]
    assert rates[1] == pytest.approx(search.answer().rate, rel=0.08)


def test_share_of_a_load_counts_as_fewer_requests_than_it_has() -> None:
    (evidence,) = plain([load(TRUTH, 5)])
    assert isinstance(evidence, Evidence) and evidence.requests < 250
