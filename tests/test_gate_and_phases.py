"""The gate's verdicts and the join of proxy, connector and client instants."""

import json
from pathlib import Path

from pdbench import gate, phases
from pdbench.records import Clock, RequestRecord
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
