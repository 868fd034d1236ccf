"""Predictions and refusals as tables."""

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from pdbench.config import LoadConfig
from pdbench.plan.engine import Layout
from pdbench.plan.records import Check, Figure, Prediction, Search
from pdbench.planning import CALIBRATION, plan
from pdbench.report import plan as report
from pdbench.report.chart_types import SPARE
from pdbench.report.plan_curves import steps_chart
from pdbench.report.tables import Terminal, markdown
from tests.plan.test_predict import calibration, predicted, role

SPLIT, REPLICAS = Layout("disaggregated", {"prefill": 1, "decode": 1}), Layout("replicas", {"replica": 2})


def checked(folder: str, layout: Layout) -> Check:
    figures = {"ttft_p50_ms": Figure(50.0, 40.0, 70.0)}
    predicted = Prediction(layout=layout, load="", figures=figures, seconds_ms={"compute": 50.0})
    path = f"/runs/held-out/{folder}/{layout.kind}_results"
    measured = {"ttft_p50_ms": 48.0}
    return Check(
        path=path, held_out=True, differs=[], measured=measured, trials={}, seconds_ms={}, predicted=predicted, at_own_speed=predicted
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loads", "names"),
    [(["rate-4", "bursts"], ["rate-4, 1p1d", "rate-4, replicas:2", "bursts, 1p1d", "bursts, replicas:2"]), ("abcdefgh", ["1p1d", "replicas:2"])],
)  # fmt: skip
def test_checks_have_short_names_and_a_colour_each_or_one_per_deployment(loads: list[str], names: list[str]) -> None:
    checks = [checked(load, layout) for load in loads for layout in (SPLIT, REPLICAS)]
    for panel in report.checks_chart(checks).panels:
        points = [series for series in panel.series if series.kind == "points"]
        assert [series.name for series in points] == names
        assert [series.shade for series in points] == [*SPARE[: len(names)]]
        assert sum(len(series.x) for series in points) == len(checks)
    titles = [panel.title for panel in report.seconds_chart(checks, []).panels]
    assert "the costs' best estimate" in report.seconds_chart(checks, []).caption
    assert titles[:2] == [f"{loads[0]}, 1p1d", f"{loads[0]}, replicas:2"]


def test_steps_have_the_same_names_and_values_in_table_and_picture() -> None:
    found = calibration(roles={"single": role(alike_launch=0.5), "prefill": role()})
    single, prefill = (panel for panel in steps_chart(found).panels if "a prompt's step" in panel.title)
    lines = {series.name: dict(zip(series.x, series.y, strict=True)) for series in single.series if series.name}
    rows = {row[0]: row[1:] for row in report.calibration(found).rows}
    alone, beside = lines["alone"], lines["beside a running stream"]
    long, per_token = 521, 1e3 * role().engine.costs.host_per_prompt_token_s
    assert rows["a prompt's step alone, host, ms"][0] == pytest.approx(alone[long] - long * per_token)
    assert rows["and of over 512 tokens beside a running stream, host, ms"][0] == pytest.approx(
        beside[long] - long * per_token
    )
    assert beside[501] == alone[501], "one kind of attention kernels computes both"
    assert rows["and of over 512 tokens beside a running stream, host, ms"][1] is None
    assert [series.name for series in prefill.series if series.name] == ["alone"]


def test_saved_and_printed_load_says_all_that_was_asked(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration()))
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500, slo_ttft_ms=400.0)
    plan([tmp_path], (), ["single"], load, tmp_path, Console(quiet=True), most_gpus=1)
    asked = "2 requests/s, Poisson arrivals, 40 requests, 1,500 tokens in, 64 tokens out, SLO TTFT 400 ms"
    assert {each["load"] for each in msgspec.json.decode((tmp_path / "predictions.json").read_bytes())} == {asked}
    written = (tmp_path / "plan.md").read_text()
    assert f"Predicted: {asked}\n" in written and f"Search: 99 % of requests within the SLO: {asked}\n" in written
    found = msgspec.json.decode((tmp_path / "search.json").read_bytes(), type=Search)
    charts = [
        report.search_chart(found, on_gpus=True),
        report.predictions_chart(found.candidates, on_gpus=True),
    ]
    assert all(chart.caption.startswith(f"{asked}. ") for chart in charts)
    assert f"Predicted: {asked}. " in report.seconds_chart([], found.candidates).caption


def test_refusals_stand_below_their_load_each_in_a_paragraph() -> None:
    unsure = calibration(roles={"single": role(sure=1.0)})
    refused = [predicted(unsure, wanted, input_tokens=4000) for wanted in ("single", "replicas:2000")]
    assert all("prompts of 4,000 tokens" in (each.refusal or "") for each in refused)
    table = report.predictions(refused, on_gpus=True)
    written = io.StringIO()
    Console(file=written, width=400).print(Terminal(table))
    lines = written.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines if line] == ["Predicted", "single", "replicas"]
    assert "\n\nreplicas:2000: refused" in markdown(table)
    answered = predicted(calibration(), "replicas:2000")
    assert "replicas:2000 (2,000 GPUs)" in report.predictions([answered], on_gpus=True).header


def test_a_share_below_the_slo_is_not_rounded_up_to_it() -> None:
    figures = {"slo_met_pct": Figure(99.96, 98.975, 100.0), "ttft_p50_ms": Figure(98.975, 98.975, 98.975)}
    table = report.predictions([Prediction(layout=SPLIT, load="", figures=figures)], on_gpus=True)
    assert [row[1] for row in table.rows] == ["99.0 (99.0-99.0)", "99.9 (98.9-100)"]
