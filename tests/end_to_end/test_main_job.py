"""The whole job on real vLLM (CPU), through the entry points that a user calls."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdbench.analysis.run_analysis import load_analysis
from pdbench.events import PromptEvent, TransferEvent
from pdbench.records import SCHEMA, load_run
from tests.conftest import serve_config
from tests.support.processes import ROOT, left, marked, wait_until
from tests.support.served import Served, flags

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """./run_disaggregated_test.sh, small: one trial of four requests."""
    folder = tmp_path_factory.mktemp("job")
    arguments = ["--trials", "1", "--requests", "4", "--warmup", "1", "--output-tokens", "12", "--out", str(folder)]
    done = subprocess.run(
        [
            str(ROOT / "run_disaggregated_test.sh"),
            str(ROOT / "recipes/cpu-1p1d.toml"),
            *arguments,
            *flags(serve_config(folder / "logs")),
        ],
        capture_output=True,
        text=True,
        env=marked(folder),
        timeout=400,
        check=False,
    )
    return folder, done


def test_job_succeeds_and_prints_its_steps(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = job
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("prefill-0: ready", "decode-0: ready", "proxy: ready", "single-0: ready", "correctness gate passed"):
        assert line in done.stdout
    assert left(folder) == []


def test_results_hold_every_request_and_the_proof_of_the_transfer(
    job: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = job
    run = load_run(folder / "disaggregated_results")
    measured = [request for request in run.requests if not request.warmup]
    assert len(measured) == 4
    for request in measured:
        assert request.error is None
        assert request.output_tokens == len(request.token_s) == 12
        assert request.sent_s is not None and request.end_s is not None
        assert request.sent_s < request.token_s[0] <= request.token_s[-1] <= request.end_s
        assert request.token_s == sorted(request.token_s)
        for phase in ("prefill", "kv_transfer", "decode"):
            span = request.phases[phase]
            assert span is not None and span[0] <= span[1]
        # Prefill lies inside the request; the KV arrives before decode's first token (the first may be prefill's own).
        assert request.sent_s < request.phases["prefill"][0]  # type: ignore[index]
        assert request.phases["kv_transfer"][1] < request.token_s[1]  # type: ignore[index]
    assert run.gate is not None and run.gate.passed
    assert run.gate.external_kv_tokens == run.gate.prompt_tokens
    sent = [event for event in run.events if isinstance(event, TransferEvent) and event.side == "send"]
    assert len(sent) >= len(measured)
    assert all(event.bytes > 0 for event in sent)


@pytest.mark.parametrize("name", ["single", "disaggregated"])
def test_ttft_is_in_parts_with_queue_and_compute_apart(
    job: tuple[Path, subprocess.CompletedProcess[str]], name: str
) -> None:
    folder, _ = job
    analysis = load_analysis(folder / f"{name}_results")
    assert analysis.curves.ttft_parts_ms is not None and analysis.summary.ttft_ms is not None
    parts, ttft_ms = analysis.curves.ttft_parts_ms, analysis.summary.ttft_ms.mean
    assert sum(parts.values()) == pytest.approx(ttft_ms)
    assert min(parts["queue"], parts["compute"]) > 0 and parts["other"] < 0.5 * ttft_ms
    for phase in ("api_server", "queue", "compute", "reply"):
        assert np.isfinite(analysis.requests.phase_ms[phase]).all(), phase
    assert (analysis.requests.compute_steps >= 1).all()
    prompts = [event for event in load_run(folder / f"{name}_results").events if isinstance(event, PromptEvent)]
    for event in prompts:
        assert event.error is None
        # Decode computes what prefill's KV does not say: the first token.
        assert (sum(event.tokens) == event.prompt_tokens) == (not event.server.startswith("decode"))


def test_deployments_generate_the_same_greedy_text(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = job
    runs = [load_run(folder / f"{name}_results") for name in ("single", "disaggregated")]
    texts = [[request.text for request in run.requests if not request.warmup] for run in runs]
    assert texts[0] == texts[1] and len(texts[0]) == 4
    # A random model may answer two prompts alike: what must differ is what was sent.
    assert len({request.prompt_sha256 for request in runs[0].requests if not request.warmup}) == 4


def test_devices_are_sampled_from_before_the_first_request_to_after_the_last(
    job: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = job
    run = load_run(folder / "disaggregated_results")
    by_role = {device.role: device for device in run.devices}
    assert {"prefill", "decode"} <= set(by_role)
    for role in ("prefill", "decode"):
        samples = by_role[role].samples
        assert samples[0].t_s <= min(request.planned_s for request in run.requests)
        assert samples[-1].t_s >= max(request.token_s[-1] for request in run.requests)
        assert any((sample.cpu_utilization_pct or 0) > 0 for sample in samples)
        # No meter, no number.
        assert all(sample.power_w is None for sample in samples) or "power_w" not in by_role[role].not_measured


def test_files_are_where_the_readme_says(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = job
    for name in ("disaggregated_results.json", "prefill_gpu_data.json", "decode_gpu_data.json"):
        content = json.loads((folder / "disaggregated_results" / name).read_text())
        assert content["schema"] == SCHEMA
    saved = json.loads((folder / "disaggregated_results/disaggregated_results.json").read_text())
    assert saved["summary"]["ttft_ms"]["count"] == 4
    for picture in (
        "disaggregated_results/disaggregated_performance_analysis.png",
        "single_results/single_performance_analysis.png",
        "performance_comparison.png",
    ):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 500
            assert len(image.convert("L").getcolors() or [0] * 300) > 20  # something is drawn


def test_servers_by_hand_are_measured_by_hand(served: Served, tmp_path: Path) -> None:
    load = ["--url", served.info().url, "--log-dir", served.config.log_dir]
    load += ["--requests", "3", "--output-tokens", "8", "--concurrency", "2"]
    bench = subprocess.run(
        [sys.executable, str(ROOT / "test_disaggregated_performance.py"), *load, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=marked(tmp_path),
        timeout=200,
        check=False,
    )
    assert bench.returncode == 0, bench.stdout + bench.stderr
    run = load_run(tmp_path / "disaggregated_results")
    assert run.gate is not None and run.gate.passed
    assert {device.role for device in run.devices} >= {"prefill", "decode"}
    assert all(request.phases.get("kv_transfer") for request in run.requests if not request.warmup)
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signal_to_pdbench_while_servers_start_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    config = serve_config(tmp_path / "logs")
    command = [sys.executable, "-m", "pdbench", "serve", *flags(config)]
    serving = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=marked(tmp_path))
    wait_until(lambda: len(left(tmp_path)) >= 6, 60)  # itself, three supervisors, three servers
    serving.send_signal(number)
    serving.wait(60)
    wait_until(lambda: left(tmp_path) == [], 60)


def test_server_that_dies_is_reported_with_its_cause(tmp_path: Path) -> None:
    config = serve_config(tmp_path / "logs", vllm_args="--no-such-argument")
    done = subprocess.run(
        [sys.executable, "-m", "pdbench", "serve", "--single", *flags(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=marked(tmp_path),
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert "died with exit code 2" in done.stderr
    assert "--vllm-args" in done.stderr
    assert "--no-such-argument" in done.stderr  # the end of its log
    assert left(tmp_path) == []
