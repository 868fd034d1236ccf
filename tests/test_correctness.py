"""The gate's verdicts and what a run does with it."""

import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pdbench import correctness, experiment
from pdbench.config import Options
from pdbench.errors import UserError
from pdbench.records import Gate, RequestRecord, Run, load_run
from pdbench.serving.deployment_info import DeploymentInfo

SPLIT = DeploymentInfo(name="disaggregated", url="http://127.0.0.1:8000", model_name="m")
OUTPUT = [(f"text {i}", 20) for i in range(len(correctness.prompts(1)))]
TEXTS = [text for text, _ in OUTPUT]


def test_equal_outputs_and_all_kv_external_pass() -> None:
    verdict = correctness.check(SPLIT, 1, TEXTS, OUTPUT, 80)
    assert verdict.passed
    assert "80 of 80" in verdict.detail


def test_decode_may_recompute_one_token_a_prompt_and_no_more() -> None:
    assert correctness.check(SPLIT, 1, TEXTS, OUTPUT, 76).passed
    verdict = correctness.check(SPLIT, 1, TEXTS, OUTPUT, 75)
    assert not verdict.passed
    assert "computed the rest itself" in verdict.detail


def test_one_different_output_fails() -> None:
    verdict = correctness.check(SPLIT, 1, ["other", *TEXTS[1:]], OUTPUT, 80)
    assert not verdict.passed
    assert verdict.equal_outputs == 3


def test_what_could_not_be_checked_is_said_and_not_counted() -> None:
    verdict = correctness.check(SPLIT, 1, None, OUTPUT, None)
    assert verdict.equal_outputs is None
    assert verdict.external_kv_tokens is None
    assert "no reference" in verdict.detail
    assert "no counter" in verdict.detail


def run_without_servers(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    trials: int,
    passes: Callable[..., tuple[Gate, list[str]]],
    measure: Callable[..., None],
) -> str:
    """`pdbench run` of both deployments whose servers, gate and measurement are these; what it printed."""

    @contextmanager
    def started(deployment: SimpleNamespace, _: Console) -> Iterator[object]:
        running = DeploymentInfo(name=deployment.name, url="http://127.0.0.1:8000", model_name="m")
        yield SimpleNamespace(running=lambda: running, check=None)

    made = lambda name: SimpleNamespace(name=name, check_ports=lambda: None, gpus=dict)  # noqa: E731
    monkeypatch.setattr(experiment, "maker", lambda *_: made)
    monkeypatch.setattr(experiment, "started", started)
    monkeypatch.setattr(correctness, "run", passes)
    monkeypatch.setattr(experiment, "_measure_into", measure)
    told = io.StringIO()
    console = Console(file=told, width=200)
    experiment.run(("single", "disaggregated"), trials, Options(), out, console, lambda _: None)
    return told.getvalue()


def test_every_start_of_prefill_and_decode_passes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [correctness.check(SPLIT, 1, texts, OUTPUT, 80) for texts in (TEXTS, ["other", *TEXTS[1:]])]
    gated: list[str] = []
    runs: dict[str, Run] = {}

    def passes(running: DeploymentInfo, *_: object) -> tuple[Gate, list[str]]:
        gated.append(running.name)
        return (verdicts[gated.count("disaggregated") - 1], TEXTS)

    told = run_without_servers(monkeypatch, tmp_path, 3, passes, lambda one, *_: runs.setdefault(one.name, one))
    assert gated == ["single", "disaggregated", "disaggregated"]
    assert told.count("correctness gate") == 2
    assert not runs["disaggregated"].gate.passed
    assert [flag.name for flag in runs["disaggregated"].flags] == ["gate-failed"]
    assert runs["single"].gate is None


def test_what_is_measured_is_on_disk_before_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = correctness.check(SPLIT, 1, TEXTS, OUTPUT, 80)
    on_disk = []

    def measure(one: Run, *_: object) -> None:
        saved = [folder for folder in ("single_results", "disaggregated_results") if (tmp_path / folder).exists()]
        on_disk.append(sum(len(load_run(tmp_path / folder).requests) for folder in saved))
        one.requests.append(RequestRecord(id=str(len(on_disk)), planned_s=0.0))

    run_without_servers(monkeypatch, tmp_path, 3, lambda *_: (verdict, TEXTS), measure)
    assert on_disk == [0, 1, 2, 3]  # A BB AA B


def test_a_decode_that_does_not_tell_its_counters_proves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=f"{url}/metrics does not answer"):
        correctness.external_kv_tokens([url])
