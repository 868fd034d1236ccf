"""The cheapest clocks where nobody can judge some of the answers; a whole search of clocks is in end_to_end/test_search_clocks.py."""

from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pdbench import slo_clocks, slo_search
from pdbench.config import LoadConfig, Options
from pdbench.errors import UserError
from pdbench.records import Clock, Run
from pdbench.report.search_sentence import sentence
from pdbench.search.document import Document, Held, Point

LOAD = LoadConfig(slo_tbt_ms=50.0, rate=4.0, requests=40)
CLOCKS: list[int | None] = [600, 800, 990, 1200, 1410, 1600, None]


def tuned(undecided_pct: dict[int | None, float]) -> tuple[Document, list[int | None]]:
    """What --tune finds where slower clocks cost less, and answers of some clocks cannot be judged; and which it sent."""
    sent: list[int | None] = []
    joules = dict[int | None, float](zip(CLOCKS, (10.0, 15.0, 20.0, 30.0, 35.0, 38.0, 40.0), strict=True))
    loads: Any = SimpleNamespace(points=[], beside_s=0.0, out=Path(), console=Console(quiet=True))
    loads.deployment = SimpleNamespace(options=Options(load=LOAD), tune={"single_clock": CLOCKS})

    def send(name: str, load: LoadConfig, judge: object, setting: dict[str, int | None]) -> SimpleNamespace:
        clock = setting["single_clock"]
        unknown = undecided_pct.get(clock, 0.0)
        point = Point(
            deployment="single", run=f"{clock}", rate_per_s=4.0, requests=40, attained_pct=100.0 - unknown, undecided_pct=unknown, slo_used=0.5,
            held=None, limited_by=None, client_limited=False, load_s=10.0, setting=setting,
        )  # fmt: skip
        sent.append(clock)
        loads.points.append(point)
        return SimpleNamespace(run=Run(name="single", clock=Clock(0, 0), config={}, host={}, versions={}), point=point)

    def analysis(path: Path) -> Any:
        clock = sent[-1]
        unknown = undecided_pct.get(clock, 0.0)
        used_j = None if unknown > 5 else joules[clock] / (1 - unknown / 100)
        return SimpleNamespace(summary=SimpleNamespace(goodput=SimpleNamespace(j_per_good_request=used_j)))

    loads.send = send
    entry = Held(name="single")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slo_clocks, "load_analysis", analysis)
        slo_clocks.tune(loads, 0.95, inf, LOAD, entry, lambda: None)
    document = Document(command={}, slo={"slo_tbt_ms": 50.0}, attain_pct=95.0, deployments=[entry], points=loads.points)
    return document, sent


def test_cheapest_setting_that_can_be_judged_is_named_without_reserve() -> None:
    document, _sent = tuned({})
    assert document.deployments[0].tuned and document.deployments[0].tuned.setting == {"single_clock": 600}
    assert "needs least energy" in sentence(document) and "nobody can judge" not in sentence(document)


def test_choice_by_joules_that_are_at_most_what_they_are_says_so() -> None:
    """4 % of one setting's answers may have been good, which makes its joules per good request too large."""
    document, _sent = tuned({990: 4.0})
    assert "chosen by joules that are what they are at most, as answers that nobody can judge" in sentence(document)


def test_setting_that_nobody_can_judge_is_not_chosen_and_the_answer_says_so() -> None:
    document, sent = tuned({990: 50.0})
    assert 990 in sent and document.deployments[0].tuned
    assert document.deployments[0].tuned.setting == {"single_clock": 1200}
    assert "nobody can judge" in sentence(document)
    document, _sent = tuned(dict.fromkeys(CLOCKS, 50.0))
    assert document.deployments[0].tuned and document.deployments[0].tuned.setting is None
    assert "no setting could be judged" in sentence(document)


@pytest.mark.parametrize("tune", ["clock=990", "prefill_clock=fast", "prefill_clock", "prefill_clock=990,990"])
def test_a_wrong_tune_is_not_called_a_vary(tune: str) -> None:
    with pytest.raises(UserError, match=r"^--tune"):
        slo_search.tuning(Options(), [tune], ["disaggregated"])
