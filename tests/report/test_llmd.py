"""A run as a benchmark report of llm-d, checked by llm-d's own model where it is installed."""

import io
import json
from importlib.util import find_spec

import pytest
from rich.console import Console

from pdbench.analysis.run_analysis import analyze
from pdbench.records import RequestError
from pdbench.report import commands, llmd
from tests.support.runs import build_run


@pytest.mark.parametrize("gpu", [True, False])
def test_figures_are_those_of_the_run(gpu):
    analysis = analyze(build_run(gpu=gpu))
    report = json.loads(json.dumps(llmd.report(analysis)))
    aggregate = report["results"]["request_performance"]["aggregate"]
    assert aggregate["latency"]["time_to_first_token"]["p99"] == analysis.summary.ttft_ms.p99
    assert aggregate["requests"]["total"] == analysis.summary.requests.sent
    assert aggregate["throughput"]["output_token_rate"]["mean"] == analysis.summary.throughput.output_tokens_per_s
    powers = [
        device["aggregate"]["power_consumption"]["mean"]
        for device in report["results"]["observability"]["components"]
        if "power_consumption" in device["aggregate"]
    ]
    if gpu:
        assert sum(powers) == pytest.approx(analysis.summary.energy.mean_power_w)
    labels = {component["metadata"]["label"] for component in report["scenario"]["stack"]}
    assert labels == {"prefill", "decode"}


def test_run_whose_requests_were_never_sent_has_a_report():
    run = build_run("single", trials=1, requests=3)
    for request in run.requests:
        request.sent_s = request.end_s = request.output_tokens = None
        request.token_s, request.phases, request.error = [], {}, RequestError("refused", "x")
    report = llmd.report(analyze(run))
    assert report["results"]["request_performance"]["aggregate"]["requests"]["failures"] == 3
    assert report["run"]["time"]["start"] == report["run"]["time"]["end"]


@pytest.mark.usefixtures("undrawn")
def test_report_is_written_beside_the_page(folders, tmp_path):
    commands.report(folders, tmp_path, None, Console(file=io.StringIO()), llm_d=True)
    assert json.loads((tmp_path / "single_llm-d.json").read_bytes())["version"] == llmd.VERSION


@pytest.mark.skipif(find_spec("llmd_benchmark_report") is None, reason="pip install llmd-benchmark-report")
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", ["single", "disaggregated"])
def test_report_passes_llm_ds_own_check(name, gpu):
    from llmd_benchmark_report import load_benchmark_report

    loaded = load_benchmark_report(llmd.report(analyze(build_run(name, gpu=gpu))))
    assert loaded.version == llmd.VERSION and loaded.results.request_performance.aggregate.requests.total > 0
