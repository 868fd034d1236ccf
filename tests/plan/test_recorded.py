"""Runs recorded on two H200: what is calibrated by them predicts them again, and the one the other."""

import tarfile
from pathlib import Path

import pytest

from pdbench.analysis.run_analysis import analyze
from pdbench.plan.calibration import calibrate
from pdbench.plan.check import check
from pdbench.plan.records import Calibration, Check
from pdbench.records import Run, load_run
from pdbench.report.plan_curves import distributions_chart, steps_chart

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ARCHIVE = RESULTS / "h200x2-p2p-nccl" / "runs.tar.xz"
DRAWS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    loaded = {kind: load_run(folder / f"{kind}_results") for kind in ("single", "disaggregated")}
    loaded["disaggregated"].trials = loaded["disaggregated"].trials[:1]  # one is enough
    return loaded


@pytest.fixture(scope="module")
def single(runs: dict[str, Run]) -> Calibration:
    return calibrate({Path("single"): runs["single"]})


@pytest.fixture(scope="module")
def disaggregated(runs: dict[str, Run]) -> Calibration:
    return calibrate({Path("disaggregated"): runs["disaggregated"]})


def errors(answer: Check) -> dict[str, float]:
    """Predicted over measured, at the run's own speed."""
    assert answer.at_own_speed is not None
    return {
        name: answer.at_own_speed.figures[name].value / value
        for name, value in answer.measured.items()
        if name in answer.at_own_speed.figures
    }


def test_costs_of_the_h200(single: Calibration) -> None:
    role = single.roles["single"]
    costs = role.engine.costs
    assert role.engine.limits.async_scheduling
    assert 0.003 < costs.gpu_decode_s[1] < 0.0036
    assert 0.004 < costs.gpu_decode_s[24] < 0.005
    # Launching one prompt of 2,048 tokens takes 50 to 70 ms, the GPU 20 to 25.
    assert 0.05 < costs.host_prefill_s + 2048 * costs.host_per_prompt_token_s < 0.07
    assert 0.018 < costs.gpu_prefill_s + 2048 * costs.gpu_per_prompt_token_s < 0.027
    assert 0.005 < costs.ingress_s < 0.008
    assert role.error_of("host_per_prompt_token_s") > 0.3, "every prompt had the same length"
    assert single.drift == pytest.approx(1.38, abs=0.05)


def test_picture_of_steps_has_the_measured_ones_beside_the_line(single: Calibration) -> None:
    decode, prompts = steps_chart(single).panels
    shaded = decode.series[0]
    costs, ratios = single.roles["single"].engine.costs, single.roles["single"].decode_ratios
    assert decode.series[-1].kind == prompts.series[-1].kind == "points"
    assert decode.series[-1].x == [sequences for sequences, _ in ratios] and max(decode.series[-1].x) <= max(shaded.x)
    for (sequences, _), before, size in zip(ratios, [0, *costs.gpu_decode_s], costs.gpu_decode_s, strict=False):
        assert before < sequences <= size, "between two sizes of the CUDA graphs"
    line = dict(zip(decode.series[1].x, decode.series[1].y, strict=True))
    assert decode.series[-1].y == pytest.approx([ratio * line[size] for size, ratio in ratios])
    assert len(prompts.series[-1].x) > 5 and all(0.9 < ratio < 1.1 for _, ratio in ratios)


def test_single_instance_predicts_itself(single: Calibration, runs: dict[str, Run]) -> None:
    answer = check(single, Path("single"), runs["single"], draws=DRAWS)
    tbt = analyze(runs["single"]).summary.mean_tbt_ms
    assert tbt is not None and answer.measured["mean_tbt_p50_ms"] == tbt.p50
    error = errors(answer)
    for name in (
        "ttft_p50_ms",
        "ttft_p90_ms",
        "tbt_p50_ms",
        "tbt_p90_ms",
        "tbt_p99_ms",
        "e2e_p50_ms",
        "j_per_output_token",
    ):
        assert error[name] == pytest.approx(1, abs=0.05), name
    inside = [
        figure.low <= answer.measured[name] <= figure.high
        for name, figure in answer.predicted.figures.items()
        if name.endswith("_ms") and name in answer.measured and figure.low is not None and figure.high is not None
    ]
    assert sum(inside) >= 8


def test_disaggregation_predicts_the_single_instance(disaggregated: Calibration, runs: dict[str, Run]) -> None:
    answer = check(disaggregated, Path("single"), runs["single"], draws=DRAWS)
    assert answer.held_out
    error = errors(answer)
    for name in ("ttft_p50_ms", "tbt_p50_ms", "e2e_p50_ms"):
        assert error[name] == pytest.approx(1, abs=0.05), name
    assert error["ttft_p99_ms"] == pytest.approx(1, abs=0.15)
    assert error["j_per_output_token"] == pytest.approx(1, abs=0.15)


def test_disaggregation_is_refused_without_a_handoff(single: Calibration, runs: dict[str, Run]) -> None:
    answer = check(single, Path("disaggregated"), runs["disaggregated"], draws=DRAWS)
    assert answer.predicted.refusal and "handoff" in answer.predicted.refusal
    assert answer.at_own_speed is None


def test_way_in_of_disaggregation_is_that_of_prefill(disaggregated: Calibration, runs: dict[str, Run]) -> None:
    answer = check(disaggregated, Path("disaggregated"), runs["disaggregated"], draws=2)
    costs = disaggregated.roles["prefill"].engine.costs
    assert answer.predicted.seconds_ms["way_in"] == pytest.approx(1e3 * (costs.ingress_s + disaggregated.proxy_s))


def test_measured_seconds_are_those_of_the_measured_requests(tmp_path: Path) -> None:
    """Warm-up requests wait for kernels that are compiled: with them a mean of 52 ms to the first token was drawn as 106."""
    with tarfile.open(RESULTS / "h200x2-dense" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "rate=8.0" / "replicas_results"
    run = load_run(path)
    answer = check(calibrate({path: run}), path, run, draws=2)
    measured = [request for request in run.requests if not request.warmup]
    assert len(measured) < len(run.requests)
    e2e_ms = [1e3 * (request.token_s[-1] - request.sent_s) for request in measured if request.sent_s is not None]
    assert sum(answer.seconds_ms.values()) == pytest.approx(sum(e2e_ms) / len(e2e_ms))
    chart = distributions_chart([answer])
    assert [panel.title.partition(":")[0] for panel in chart.panels] == ["TTFT", "TBT", "E2E"]
    assert "the costs' best estimate" in chart.caption
    assert not distributions_chart([answer] * 5).panels
    for panel, name in zip(chart.panels, ("ttft", "tbt", "e2e"), strict=True):
        bars, *curves = panel.series
        assert [series.name for series in curves] == ["measured", "predicted"]
        for part, place in (("p50", 50), ("p90", 90), ("p99", 99)):
            measured = curves[0].x[curves[0].y.index(place)]
            assert measured == pytest.approx(answer.measured[f"{name}_{part}_ms"], rel=0.01)
            assert answer.predicted.figures[f"{name}_{part}_ms"].low in bars.x
        for series in curves:
            assert series.x == sorted(series.x)
