"""The search finds what trying every deployment finds, with fewer simulations."""

from collections.abc import Callable
from itertools import chain

import msgspec
import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.plan import search as plan_search
from pdbench.plan.demand import demand_of_load
from pdbench.plan.engine import Box, Demand, Layout
from pdbench.plan.records import Calibration, Prediction, Search
from pdbench.plan.search import Trials, least_that, search
from pdbench.report import plan as report
from pdbench.report.chart_types import GOOD, ORANGE
from tests.plan.test_predict import calibration

MOST = 7
SLO = (150.0, 6.0)


def found(
    rate: float, sequences: int = 64, *, by_joules: bool = False, most: int = MOST, slo: tuple[float, float] = SLO
) -> tuple[Search, Trials]:
    made = calibration()
    box = Box(prompt_tokens=8192, sequences=sequences, context_tokens=1_000_000)
    roles = {
        name: msgspec.structs.replace(role, engine=msgspec.structs.replace(role.engine, box=box))
        for name, role in made.roles.items()
    }
    made = calibration(roles=roles)

    def demands(draw: int) -> Demand:
        return demand_of_load(LoadConfig(rate=rate, requests=200, input_tokens=1500, output_tokens=48), draw)

    result = search(made, demands, f"{rate:g} requests/s", slo=slo, most_gpus=most, by_joules=by_joules)
    return result, Trials(made, demands, "", slo)


def every_deployment(trials: Trials) -> list[Prediction]:
    splits = [
        Layout("disaggregated", {"prefill": x, "decode": y}) for x in range(1, MOST) for y in range(1, MOST - x + 1)
    ]
    same = [Layout("replicas", {"replica": n}) for n in range(2, MOST + 1)]
    return [trials.judge(layout) for layout in chain([Layout("single", {"single": 1})], same, splits)]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "DRAWS", 8)


@pytest.mark.parametrize("rate", [3.0, 25.0])
def test_cheapest_is_that_of_trying_every_deployment(rate: float) -> None:
    for by_joules in (False, True):
        result, trials = found(rate, by_joules=by_joules)
        every = [each for each in every_deployment(trials) if each.verdict == "met"]
        fewest = min(each.layout.gpus for each in every)
        joules = [each.figures["j_per_output_token"].value for each in every if by_joules or each.layout.gpus == fewest]
        best = result.candidates[0]
        assert best.verdict == "met"
        assert best.figures["j_per_output_token"].value == pytest.approx(min(joules))
        assert by_joules or best.layout.gpus == fewest
        assert result.simulations < 8 * 28


def test_deployment_is_met_only_where_the_whole_interval_is_within_the_slo() -> None:
    """A day as slow as the interval has it decides, not the best estimate; the table and the picture go by the same verdict."""
    result, trials = found(25.0)
    places = {each.layout.name: place for place, each in enumerate(result.candidates)}
    undecided = [each for each in result.candidates if each.verdict == "not decided"]
    assert undecided and any(trials.may_keep(each.layout) for each in undecided)
    for each in result.candidates:
        share = each.figures["slo_met_pct"]
        assert (each.verdict == "met") == (share.low >= 99) and (each.verdict == "not met") == (share.high < 99)
    assert result.candidates[0].verdict == "met" and result.candidates[0].layout.gpus > undecided[0].layout.gpus
    assert all(places[each.layout.name] > 0 for each in undecided)
    rows = report.search(result, on_gpus=True).rows
    words = {row[0]: row[2] for row in rows}
    assert words[undecided[0].layout.name] == "not decided" and rows[0][2] == "cheapest"
    named = {series.name: series.shade for series in report.search_chart(result, on_gpus=True).panels[0].series}
    assert named["not decided"] == ORANGE and named["keeps the SLO"] == GOOD
    picture = report.predictions_chart(undecided[:1], on_gpus=True)
    assert {series.shade for panel in picture.panels for series in panel.series} == {ORANGE}


def test_deployments_beyond_the_calibration_are_refused_and_not_chosen() -> None:
    wide, narrow = found(25.0)[0], found(25.0, sequences=4, most=12)[0]
    assert narrow.candidates[0].verdict == "met"
    assert narrow.candidates[0].layout.gpus > wide.candidates[0].layout.gpus
    reasons = [each.refusal for each in narrow.candidates if each.refusal]
    assert any("more sequences in one step than any run" in reason for reason in reasons)
    rows = [row for row in report.search(narrow, on_gpus=True).rows if row[2] == "refused"]
    assert rows and all(row[3:] == [None] * 4 for row in rows), "no figures of what is refused"
    assert "25 requests/s" in report.search_chart(narrow, on_gpus=True).caption


def test_row_says_where_the_queue_grows() -> None:
    result = found(60.0, most=2)[0]
    rows = {row[0]: row[2] for row in report.search(result, on_gpus=True).rows}
    growing = {each.layout.name: each.verdict for each in result.candidates if each.saturated}
    assert growing and len(growing) < len(rows)
    assert {name for name, words in rows.items() if "queue grows" in str(words)} == {*growing}
    name, verdict = growing.popitem()
    assert rows[name] == f"{verdict}, queue grows"


def test_many_small_decode_instances_are_found() -> None:
    result = found(100.0, sequences=4, most=80)[0]
    best = {each.layout.kind: each for each in reversed(result.candidates) if each.verdict == "met"}
    assert set(best) == {"replicas", "disaggregated"}
    assert best["disaggregated"].layout.gpus < 80


def test_no_deployment_within_the_limit_is_said() -> None:
    result = found(60.0, most=3)[0]
    assert not any(each.verdict == "met" for each in result.candidates)
    closest = {each.layout.kind: each for each in reversed(result.candidates)}
    assert closest["replicas"].layout.gpus == closest["disaggregated"].layout.gpus == 3
    assert 0 < closest["disaggregated"].figures["slo_met_pct"].value < 99
    assert "surely keeps" in (report.search(result, on_gpus=True).note or "")


@pytest.mark.parametrize("answer", [3, 4, 9, 17, 40])
def test_least_number_is_found(answer: int) -> None:
    assert least_that(lambda number: number >= answer, 3, 40) == answer
    assert least_that(lambda number: number >= answer, 3, answer - 1) is None


def with_gpus(**gpus: int) -> Calibration:
    """Engines whose instances stand on so many GPUs."""
    made = calibration()
    return calibration(
        roles={name: msgspec.structs.replace(each, gpus=gpus.get(name, 1)) for name, each in made.roles.items()}
    )


def demands_of(rate: float) -> Callable[[int], Demand]:
    return lambda draw: demand_of_load(LoadConfig(rate=rate, requests=60, input_tokens=1500, output_tokens=48), draw)


def test_instances_of_several_gpus_are_counted_by_their_gpus() -> None:
    made = with_gpus(single=2, prefill=2, decode=2)
    result = search(made, demands_of(3.0), "", slo=SLO, most_gpus=MOST)
    assert {each.layout.gpus for each in result.candidates} <= {2, 4, 6}
    assert {"single": 2}.items() <= {each.layout.name: each.layout.gpus for each in result.candidates}.items()


def test_fewer_gpus_than_an_instance_has_are_refused() -> None:
    with pytest.raises(UserError, match="--max-gpus 1: an instance of these runs has 2 GPUs"):
        search(with_gpus(single=2, prefill=2, decode=2), demands_of(3.0), "", slo=SLO, most_gpus=1)


def test_search_over_instances_of_unequal_size_is_refused() -> None:
    with pytest.raises(UserError, match="unequal numbers of GPUs"):
        search(with_gpus(decode=2), demands_of(3.0), "", slo=SLO, most_gpus=MOST)
