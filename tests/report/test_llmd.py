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


@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_of_this_host_is_said_of_a_server_given_by_its_url(gpu):
    """What is known of it is what was measured: its GPUs where they are here."""
    run = build_run("bench", gpu=gpu)
    assert llmd.report(analyze(run))["scenario"]["stack"][0]["standardized"]["tool_version"] == "0.26.0"
    run.config["serve"] = None
    (server,) = llmd.report(analyze(run))["scenario"]["stack"]
    known = server["standardized"]
    assert (known["tool"], known["tool_version"]) == ("unknown", "unknown") and server["native"]["config"] == {}
    accelerator = known["accelerator"]
    assert accelerator["model"] == ("Synthetic H200" if gpu else "unknown") and accelerator["parallelism"] == {}


def test_cpu_is_no_accelerator_of_a_run_on_gpus_without_power() -> None:
    run = build_run("single")
    run.config["gpus"], run.devices = 1, []
    (server,) = llmd.report(analyze(run))["scenario"]["stack"]
    assert server["standardized"]["accelerator"]["model"] == "unknown"


def test_a_ramp_has_no_rate_of_its_own() -> None:
    """The schema has one rate: the one that a ramp begins with would stand for the whole load."""

    def said(**load) -> dict:
        return llmd.report(analyze(build_run("single", load=load)))["scenario"]["load"]["standardized"]

    assert said(rate=2.0)["rate_qps"] == 2.0
    assert "rate_qps" not in said(rate=2.0, ramp_to=20.0)


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
@pytest.mark.parametrize("name", ["single", "disaggregated", "bench"])
def test_report_passes_llm_ds_own_check(name, gpu):
    from llmd_benchmark_report import load_benchmark_report

    run = build_run(name, gpu=gpu)
    run.config["serve"] = None if name == "bench" else run.config["serve"]
    loaded = load_benchmark_report(llmd.report(analyze(run)))
    assert loaded.version == llmd.VERSION and loaded.results.request_performance.aggregate.requests.total > 0
