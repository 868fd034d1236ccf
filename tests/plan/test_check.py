"""A run beside its prediction: what is taken of the run itself."""

import io

import msgspec
import numpy as np
import pytest
from rich.console import Console

from pdbench.events import ProxyEvent
from pdbench.plan.check import own_speed
from pdbench.plan.deployment import parse_layout
from pdbench.plan.records import Check, Figure, Prediction
from pdbench.plan.steps import Part, Stream, visits_of
from pdbench.records import Clock, Run
from pdbench.report import plan as report
from pdbench.report import text
from pdbench.report.tables import Terminal
from tests.plan.test_predict import calibration


def prefill_part(took_s: float) -> Part:
    """An instance that got ten prompts, one at a time."""
    run = Run(name="disaggregated", clock=Clock(0.0, 0.0), config={}, host={}, versions={})
    ways = {
        str(number): ProxyEvent(request_id=str(number), prefill_sent_s=number, prefill_done_s=number + took_s)
        for number in range(10)
    }
    streams = [Stream(name, [float(name) + took_s], 1000, 1000) for name in ways]
    return Part(run, 0, "prefill", 0, streams, {}, ways, visits=visits_of(run, streams, ways))


def test_own_speed_is_that_of_all_instances_of_a_role() -> None:
    usual_s = 0.005 + 0.03 + 0.001  # way in, host, host's part per token
    fast, slow = prefill_part(usual_s), prefill_part(0.005 + 2 * 0.031)
    costs = calibration().roles["prefill"].engine.costs
    alone = own_speed(calibration(), [slow])
    both = own_speed(calibration(), [fast, slow])
    assert alone["host_prefill_s"] == pytest.approx(2 * costs.host_prefill_s)
    speed = both["host_prefill_s"] / costs.host_prefill_s
    assert 1 < speed < 2
    assert sorted(np.multiply(speed, both["noise"][0])) == pytest.approx([1.0] * 10 + [2.0] * 10)


def checked(path: str, layout: str, held_out: bool = True, trials: tuple[float, ...] = (50.0,)) -> Check:
    figures = {name: Figure(51.0, 40.0, 70.0) for name in report.OVERVIEW}
    made = Prediction(layout=parse_layout(layout), load="", figures=figures)
    measured = dict.fromkeys(figures, 50.0)
    spread = {name: [min(trials), max(trials)] for name in figures}
    return Check(
        path=path,
        held_out=held_out,
        differs=[],
        measured=measured,
        trials=spread,
        seconds_ms={},
        predicted=made,
        at_own_speed=made,
    )


def test_table_of_several_checks_names_them_in_a_narrow_terminal() -> None:
    checks = [
        checked("results/long-name-of-a-host/rates/rate=8.0/replicas_results", "replicas:2"),
        checked("results/long-name-of-a-host/rates/rate=16.0/disaggregated_results", "1p1d", held_out=False),
    ]
    table = report.overview(checks)
    assert [row[0] for row in table.rows[::2]] == ["rate=8.0, replicas:2", "rate=16.0, 1p1d"]
    assert table.note.endswith("rates/rate=16.0/disaggregated_results")
    written = io.StringIO()
    Console(file=written, width=80).print(Terminal(table))
    rows = [line.split()[0] for line in written.getvalue().splitlines() if "7 of 7" in line]
    assert rows == ["rate=8.0,", "rate=16.0,"], "no name is broken within a word"


def test_tokens_per_s_are_compared_and_what_follows_from_others_is_not_counted() -> None:
    made = checked("replicas_results", "replicas:2")
    names = ("output_tokens_per_s", *report.FOLLOW)
    figures = made.predicted.figures | dict.fromkeys(names, Figure(51.0, 40.0, 70.0))
    predicted = msgspec.structs.replace(made.predicted, figures=figures)
    made = msgspec.structs.replace(made, predicted=predicted, measured=dict.fromkeys(figures, 50.0))
    assert {text.label(name) for name in figures} == {row[0] for row in report.check(made).rows}
    assert report.overview([made]).rows[0][1] == "8 of 8"
    assert "Mean TBT p50" in report.overview([made]).note


@pytest.mark.parametrize(("trials", "words"), [((50.0,), "50.0"), ((45.0, 55.0), "50.0 (45.0-55.0)")])
def test_one_trial_has_no_least_and_most(trials: tuple[float, ...], words: str) -> None:
    table = report.check(checked("replicas_results", "replicas:2", trials=trials))
    assert table.rows[0][1] == words
    assert ("least and most" in table.note) == (len(trials) > 1)
