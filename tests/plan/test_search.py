"""The search finds what trying every deployment finds, with fewer simulations."""

from itertools import chain

import msgspec
import pytest

from pdbench.config import LoadConfig
from pdbench.plan import search as plan_search
from pdbench.plan.demand import demand_of_load
from pdbench.plan.engine import Box, Demand, Layout
from pdbench.plan.records import Calibration, Candidate, Search
from pdbench.plan.search import Trials, least_that, search
from tests.plan.test_predict import calibration

MOST = 7
SLO = (150.0, 6.0)


def demands(rate: float) -> list[Demand]:
    config = LoadConfig(rate=rate, requests=200, input_tokens=1500, output_tokens=48)
    return [demand_of_load(config, seed) for seed in range(2)]


def found(
    rate: float, sequences: int = 64, *, by_joules: bool = False, most: int = MOST
) -> tuple[Search, Calibration, list[Demand]]:
    made = calibration()
    box = Box(prompt_tokens=8192, sequences=sequences, context_tokens=1_000_000)
    roles = {
        name: msgspec.structs.replace(role, engine=msgspec.structs.replace(role.engine, box=box))
        for name, role in made.roles.items()
    }
    made, loads = calibration(roles=roles), demands(rate)
    return search(made, loads.__getitem__, slo=SLO, most_gpus=most, by_joules=by_joules), made, loads


def every_deployment(made: Calibration, loads: list[Demand]) -> list[Candidate]:
    trials = Trials(made, loads.__getitem__, SLO, MOST)
    splits = [
        Layout("disaggregated", {"prefill": x, "decode": y}) for x in range(1, MOST) for y in range(1, MOST - x + 1)
    ]
    same = [Layout("replicas", {"replica": n}) for n in range(2, MOST + 1)]
    return [trials.candidate(wanted, len(loads)) for wanted in chain([Layout("single", {"single": 1})], same, splits)]


@pytest.fixture(autouse=True)
def two_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "SEEDS", 2)


@pytest.mark.parametrize("rate", [3.0, 25.0, 50.0])
def test_cheapest_is_that_of_trying_every_deployment(rate: float) -> None:
    for by_joules in (False, True):
        result, made, loads = found(rate, by_joules=by_joules)
        every = [each for each in every_deployment(made, loads) if each.met]
        fewest = min(each.layout.gpus for each in every)
        joules = {id(each): sum(each.j_per_output_token) for each in every}
        least = (
            min(joules.values()) if by_joules else min(joules[id(each)] for each in every if each.layout.gpus == fewest)
        )
        best = result.candidates[0]
        assert best.met
        assert sum(best.j_per_output_token) == pytest.approx(least)
        assert by_joules or best.layout.gpus == fewest
        assert result.simulations < 2 * 28


def test_deployments_beyond_the_calibration_are_refused_and_not_chosen() -> None:
    wide, narrow = found(25.0)[0], found(25.0, sequences=4, most=12)[0]
    assert narrow.candidates[0].met
    assert narrow.candidates[0].layout.gpus > wide.candidates[0].layout.gpus
    reasons = [each.refusal for each in narrow.candidates if each.refusal]
    assert any("more sequences in one step than any run" in reason for reason in reasons)


def test_many_small_decode_instances_are_found() -> None:
    result = found(100.0, sequences=4, most=80)[0]
    best = {each.layout.kind: each for each in reversed(result.candidates) if each.met}
    assert set(best) == {"replicas", "disaggregated"}
    assert best["disaggregated"].layout.gpus < 80


def test_no_deployment_within_the_limit_is_said() -> None:
    result = found(60.0, most=3)[0]
    assert not any(each.met for each in result.candidates)
    closest = {each.layout.kind: each for each in result.candidates}
    assert closest["replicas"].layout.gpus == closest["disaggregated"].layout.gpus == 3
    assert 0 < closest["disaggregated"].met_pct[0] < 99


@pytest.mark.parametrize("answer", [3, 4, 9, 17, 40])
def test_least_number_is_found(answer: int) -> None:
    assert least_that(lambda number: number >= answer, 3, 40) == answer
    assert least_that(lambda number: number >= answer, 3, answer - 1) is None
