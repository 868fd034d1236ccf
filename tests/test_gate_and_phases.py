"""The gate's verdicts and the join of proxy, connector and client instants."""

import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pdbench import experiment, gate, phases
from pdbench.config import Options
from pdbench.errors import UserError
from pdbench.records import Clock, Gate, RequestRecord, Run, load_run
from pdbench.serving.running import Running

SPLIT = Running(name="disaggregated", url="http://127.0.0.1:8000", model_name="m")
OUTPUT = [(f"text {i}", 20) for i in range(len(gate.prompts(1)))]
TEXTS = [text for text, _ in OUTPUT]


def test_equal_outputs_and_all_kv_external_pass() -> None:
    verdict = gate.check(SPLIT, 1, TEXTS, OUTPUT, 80)
    assert verdict.passed
    assert "80 of 80" in verdict.detail


def test_decode_may_recompute_one_token_a_prompt_and_no_more() -> None:
    assert gate.check(SPLIT, 1, TEXTS, OUTPUT, 76).passed
    verdict = gate.check(SPLIT, 1, TEXTS, OUTPUT, 75)
    assert not verdict.passed
    assert "computed the rest itself" in verdict.detail


def test_one_different_output_fails() -> None:
    verdict = gate.check(SPLIT, 1, ["other", *TEXTS[1:]], OUTPUT, 80)
    assert not verdict.passed
    assert verdict.equal_outputs == 3


def test_what_could_not_be_checked_is_said_and_not_counted() -> None:
    verdict = gate.check(SPLIT, 1, None, OUTPUT, None)
    assert verdict.equal_outputs is None
    assert verdict.external_kv_tokens is None
    assert "no reference" in verdict.detail
    assert "no counter" in verdict.detail


def test_events_join_the_client_by_request_and_transfer_id(tmp_path: Path) -> None:
    proxy = {
        "event": "request",
        "request_id": "r1",
        "transfer_id": "t1",
        "received_s": 10.1,
        "prefill_sent_s": 10.2,
        "prefill_done_s": 10.5,
    }
    receive = {
        "event": "kv_transfer",
        "side": "receive",
        "transfer_id": "t1",
        "first_byte_s": 10.51,
        "end_s": 10.52,
        "error": None,
    }
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(proxy), '{"event": "requ']))
    (tmp_path / "b.jsonl").write_text(
        json.dumps(receive | {"side": "send", "end_s": 99.0}) + "\n" + json.dumps(receive)
    )
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "absent.jsonl")]
    events = phases.read_events(paths, Clock(monotonic_s=10.0, unix_s=0.0))
    joined = RequestRecord(id="r1", planned_s=0.0, sent_s=0.05, token_s=[0.6, 0.7])
    alone = RequestRecord(id="r2", planned_s=0.0, sent_s=0.05, token_s=[0.6])
    phases.join([joined, alone], events)
    rounded = {name: None if span is None else tuple(round(x, 6) for x in span) for name, span in joined.phases.items()}
    assert rounded == {"prefill": (0.2, 0.5), "kv_transfer": (0.51, 0.52), "decode": (0.52, 0.7)}
    assert alone.phases == {}


def receive(rank: int, first_byte_s: float, end_s: float, error: str | None = None) -> dict[str, object]:
    span = {"first_byte_s": first_byte_s, "end_s": end_s}
    return {"event": "kv_transfer", "side": "receive", "transfer_id": "t1", "rank": rank, "error": error, **span}


@pytest.mark.parametrize("order", [1, -1])
def test_a_transfer_lasts_until_its_last_rank_has_all(order: int) -> None:
    proxy = {"event": "request", "request_id": "r1", "transfer_id": "t1", "decode_sent_s": 0.5}
    ranks = [receive(0, 1.0, 3.0), receive(1, 1.9, 2.0)][::order]
    request = RequestRecord(id="r1", planned_s=0.0, token_s=[4.0])
    phases.join([request], [proxy, *ranks])
    assert (request.phases["kv_transfer"], request.phases["decode"]) == ((1.0, 3.0), (3.0, 4.0))
    phases.join([request], [proxy, receive(0, 1.0, 3.0, "gone"), receive(1, 1.9, 2.0)][::order])
    assert (request.phases["kv_transfer"], request.phases["decode"]) == (None, (0.5, 4.0))


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
        running = Running(name=deployment.name, url="http://127.0.0.1:8000", model_name="m")
        yield SimpleNamespace(running=lambda: running, check=None)

    made = lambda name: SimpleNamespace(name=name, check_ports=lambda: None, gpus=dict)  # noqa: E731
    monkeypatch.setattr(experiment, "maker", lambda *_: made)
    monkeypatch.setattr(experiment, "started", started)
    monkeypatch.setattr(gate, "run", passes)
    monkeypatch.setattr(experiment, "_measure_into", measure)
    told = io.StringIO()
    console = Console(file=told, width=200)
    experiment.run(("single", "disaggregated"), trials, Options(), out, console, lambda _: None)
    return told.getvalue()


def test_every_start_of_prefill_and_decode_passes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [gate.check(SPLIT, 1, texts, OUTPUT, 80) for texts in (TEXTS, ["other", *TEXTS[1:]])]
    gated: list[str] = []
    runs: dict[str, Run] = {}

    def passes(running: Running, *_: object) -> tuple[Gate, list[str]]:
        gated.append(running.name)
        return (verdicts[gated.count("disaggregated") - 1], TEXTS)

    told = run_without_servers(monkeypatch, tmp_path, 3, passes, lambda one, *_: runs.setdefault(one.name, one))
    assert gated == ["single", "disaggregated", "disaggregated"]
    assert told.count("correctness gate") == 2
    assert not runs["disaggregated"].gate.passed
    assert [flag.name for flag in runs["disaggregated"].flags] == ["gate-failed"]
    assert runs["single"].gate is None


def test_what_is_measured_is_on_disk_before_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = gate.check(SPLIT, 1, TEXTS, OUTPUT, 80)
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
        gate.external_kv_tokens([url])


def test_every_instant_of_an_event_is_on_the_runs_clock_and_no_duration_is(tmp_path: Path) -> None:
    transfer = {"event": "kv_transfer", "side": "receive", "transfer_id": "t1", "bytes": 11, "error": None}
    transfer |= {"asked_s": 11.0, "ready_s": None, "first_byte_s": 12.0, "end_s": 13.0, "reported_s": 14.0}
    transfer |= {"wait_s": 1.0, "wire_s": 0.5}
    request = {"event": "request", "request_id": "r1", "received_s": 11.0, "admitted_s": 12.0, "status": 200}
    (tmp_path / "a.jsonl").write_text(json.dumps(transfer) + "\n" + json.dumps(request))
    read = phases.read_events([str(tmp_path / "a.jsonl")], Clock(monotonic_s=10.0, unix_s=0.0))
    moved = {"asked_s": 1.0, "first_byte_s": 2.0, "end_s": 3.0, "reported_s": 4.0}
    assert read == [transfer | moved, request | {"received_s": 1.0, "admitted_s": 2.0}]


def test_a_phase_nobody_reported_is_none(tmp_path: Path) -> None:
    proxy = {"event": "request", "request_id": "r1", "transfer_id": "t1", "received_s": 10.1, "decode_sent_s": 10.6}
    (tmp_path / "a.jsonl").write_text(json.dumps(proxy))
    request = RequestRecord(id="r1", planned_s=0.0, sent_s=0.05, token_s=[0.7])
    phases.join([request], phases.read_events([str(tmp_path / "a.jsonl")], Clock(monotonic_s=10.0, unix_s=0.0)))
    assert request.phases["prefill"] is None
    assert request.phases["kv_transfer"] is None
    assert request.phases["decode"] is not None
