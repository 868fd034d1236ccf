"""Prefill and decode workers over real sockets, without vLLM's engine: which blocks arrive, and where."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.outputs import KVConnectorOutput

from pdbench.events import TransferEvent
from pdbench.kv.connector import PdKvConnector
from pdbench.kv.metrics import TransferRecorder
from pdbench.kv.scheduler import Fetch, StepPlan
from tests.support.kv import (
    BLOCK,
    BLOCKS,
    LAYERS,
    PATIENCE_S,
    Instance,
    fetch,
    instances,
    new_transfer,
    prefill,
    settled,
)
from tests.support.processes import free_port, wait_until

pytestmark = pytest.mark.usefixtures("kv_secret")


@pytest.mark.parametrize("order", ["prefill first", "decode first", "decode between the chunks"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 31, 32, 33])
def test_blocks_arrive_in_either_order(kv_pair, order, tokens):
    p, d = kv_pair
    transfer, count = new_transfer(tokens), -(-tokens // BLOCK)
    here, there = list(range(3, 3 + count)), list(range(40, 40 + count))[::-1]
    chunks = sorted({min(tokens, 7), min(tokens, 18), tokens})
    if order == "prefill first":
        prefill(p, transfer, here, chunks)
        fetch(d, transfer, there, p.port)
    elif order == "decode first":
        fetch(d, transfer, there, p.port)
        prefill(p, transfer, here, chunks)
    else:
        prefill(p, transfer, here, chunks[:1], ended=False)
        fetch(d, transfer, there, p.port)
        first_blocks = -(-chunks[0] // BLOCK)
        p.compute(transfer, here[first_blocks:], tokens)
        p.end(transfer)
    settled(p, d, transfer)
    assert torch.equal(p.blocks(here), d.blocks(there))


def test_only_missing_blocks_travel(kv_pair, tmp_path):
    p, d = kv_pair
    transfer = new_transfer(30)
    before = d.blocks([20, 21, 22]).clone()
    prefill(p, transfer, list(range(8)))
    fetch(d, transfer, list(range(23, 28)), p.port, start=3)
    settled(p, d, transfer)
    assert torch.equal(p.blocks(list(range(3, 8))), d.blocks(list(range(23, 28))))
    assert torch.equal(before, d.blocks([20, 21, 22]))
    ((_, _, moved, _, _),) = d.worker.recorder.take_stats().data["transfers"]
    assert moved == 5 * LAYERS * BLOCK * 8 * 4


def test_finished_chunks_travel_while_later_ones_compute(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(32)
    before = d.blocks([16]).clone()
    fetch(d, transfer, list(range(10, 18)), p.port)
    prefill(p, transfer, list(range(8)), [17], ended=False)
    d.until(lambda: torch.equal(d.blocks([10, 11, 12, 13]), p.blocks([0, 1, 2, 3])))
    assert torch.equal(before, d.blocks([16])) and not d.received


def test_transfer_larger_than_the_staging_buffer_goes_in_pieces(kv_pair):
    port = free_port()
    big = (BLOCKS, BLOCK, 64 * 1024)  # 1 MiB per layer's block
    with instances(
        lambda: Instance("prefill", port, layout=big, staging_mib=8),
        lambda: Instance("decode", layout=big, staging_mib=5),
    ) as (p, d):
        transfer = new_transfer(40)
        prefill(p, transfer, list(range(10)))
        fetch(d, transfer, list(range(30, 40)), port)
        settled(p, d, transfer)
        assert torch.equal(p.blocks(list(range(10))), d.blocks(list(range(30, 40))))


def test_many_transfers_at_once_between_many_workers(kv_pair):
    ports = [free_port(), free_port()]
    with instances(
        *(lambda port=port: Instance("prefill", port) for port in ports),
        *(lambda: Instance("decode") for _ in range(2)),
    ) as (p0, p1, d0, d1):
        jobs = []
        for i in range(24):
            p, d, transfer = (p0, p1)[i % 2], (d0, d1)[i // 2 % 2], new_transfer(8)
            here, there = [2 * (i % 12), 2 * (i % 12) + 1], [2 * i, 2 * i + 1]
            if i % 3:
                prefill(p, transfer, here)
                fetch(d, transfer, there, p.port)
            else:
                fetch(d, transfer, there, p.port)
                prefill(p, transfer, here)
            jobs.append((p, d, transfer, here, there))
        for p, d, transfer, here, there in jobs:
            settled(p, d, transfer)
            assert torch.equal(p.blocks(here), d.blocks(there))


def test_ranks_transfer_to_the_same_rank():
    port = free_port(count=2)
    with instances(
        *(lambda rank=rank: Instance("prefill", port, rank=rank, ranks=2) for rank in (0, 1)),
        *(lambda rank=rank: Instance("decode", rank=rank, ranks=2) for rank in (0, 1)),
    ) as (p0, p1, d0, d1):
        transfer = new_transfer(12)
        for p in (p0, p1):
            prefill(p, transfer, [1, 2, 3])
        for d in (d0, d1):
            fetch(d, transfer, [7, 8, 9], port)
        for p, d in ((p0, d0), (p1, d1)):
            settled(p, d, transfer)
            assert torch.equal(p.blocks([1, 2, 3]), d.blocks([7, 8, 9]))


def test_preempted_prefill_sends_what_it_computes_again(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(30)
    fetch(d, transfer, list(range(50, 58)), p.port)
    prefill(p, transfer, list(range(8)), [12], ended=False)
    d.until(lambda: torch.equal(d.blocks([50, 51, 52]), p.blocks([0, 1, 2])))
    p.step(preempted=[transfer.request_id])
    for cache in p.cache.values():
        cache[3:8] = 7.0  # of another request
    p.compute(transfer, list(range(20, 28)), 8, replace=True)
    p.compute(transfer, [], 30)
    p.end(transfer)
    settled(p, d, transfer)
    assert torch.equal(d.blocks([53, 54, 55, 56, 57]), p.blocks([23, 24, 25, 26, 27]))


def test_event_log_and_statistics_of_both_sides(tmp_path):
    port = free_port()
    logs = [str(tmp_path / "p.jsonl"), str(tmp_path / "d.jsonl")]
    with instances(
        lambda: Instance("prefill", port, event_log=logs[0]),
        lambda: Instance("decode", event_log=logs[1], timeout_s=0.5),
    ) as (p, d):
        transfer, lost = new_transfer(10), new_transfer(8)
        fetch(d, transfer, [10, 11, 12], port)
        prefill(p, transfer, [1, 2, 3], [5, 10])
        settled(p, d, transfer)
        fetch(d, lost, [20, 21], free_port())
        d.until(lambda: d.failed == [lost.request_id])
        stats = d.worker.recorder.take_stats()
        assert [t[:3] for t in stats.data["transfers"]] == [
            ("receive", True, 3 * LAYERS * BLOCK * 8 * 4),
            ("receive", False, 0),
        ]
        assert stats.reduce()["receive transfers"] == 1 and stats.reduce()["receive failures"] == 1
        assert d.worker.recorder.take_stats() is None
    send, receive, failure = (json.loads(line) for log in logs for line in Path(log).read_text().splitlines())
    for line in (send, receive):
        assert line["event"] == "kv_transfer" and line["transfer_id"] == transfer.transfer_id and line["error"] is None
        assert (line["bytes"], line["tokens"], line["blocks"]) == (3 * LAYERS * BLOCK * 8 * 4, 10, 3)
        assert line["asked_s"] <= line["first_byte_s"] <= line["end_s"]
        assert line["wire_s"] > 0
    assert (send["side"], receive["side"]) == ("send", "receive")
    assert receive["reported_s"] >= receive["end_s"] and send["ready_s"] <= send["end_s"]
    assert failure["error"] and failure["wire_s"] is None and failure["bytes"] == 0


def test_event_log_that_cannot_be_written_is_logged_once_and_holds_nothing(caplog):
    recorder = TransferRecorder("/dev/full", rank=0)
    for _ in range(3):
        recorder.add(TransferEvent(side="send", transfer_id="t"))
    wait_until(recorder._log._lines.empty, PATIENCE_S)
    recorder.close()
    assert caplog.text.count("cannot be written") == 1
    assert recorder.take_stats().reduce()["send transfers"] == 3


def halves(worker, ranks):
    """The scheduler's and the worker's half as vLLM holds them, without the engine that constructs them."""
    scheduling, working = (object.__new__(PdKvConnector) for _ in range(2))
    scheduling._ranks, working._worker = ranks, worker
    return scheduling, working


def test_step_output_reports_what_arrived_meanwhile(kv_pair, monkeypatch):
    """vLLM's scheduler learns of it from the connector in its process, not two steps later; failures take the usual way."""
    p, d = kv_pair
    scheduling, working = halves(d.worker, ranks=1)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", working)
    good, bad, early = new_transfer(8), new_transfer(8), new_transfer(8)
    prefill(p, good, [1, 2])
    prefill(p, dataclasses.replace(bad, fingerprint="another"), [3, 4])
    fetches = [
        Fetch(transfer=dataclasses.replace(transfer, host=d.host, port=p.port), start_block=0, blocks=blocks)
        for transfer, blocks in ((bad, [7, 8]), (good, [5, 6]))
    ]
    d.worker.load(StepPlan(fetches=fetches))
    reported, deadline_s = set(), time.monotonic() + PATIENCE_S
    while not reported and time.monotonic() < deadline_s:
        output = KVConnectorOutput(finished_recving={early.request_id})
        scheduling.update_connector_output(output)
        reported = output.finished_recving - {early.request_id}
    assert reported == {good.request_id} and output.finished_recving == {early.request_id, good.request_id}
    assert torch.equal(p.blocks([1, 2]), d.blocks([5, 6]))
    d.until(lambda: d.failed)
    assert d.received == d.failed == [bad.request_id]
    output = KVConnectorOutput()
    scheduling.update_connector_output(output)
    assert output.finished_recving is None  # once and no more


@pytest.mark.parametrize(("ranks", "agent"), [(2, "worker"), (1, None)])
def test_step_output_is_left_to_vllm_with_other_ranks_or_processes(kv_pair, monkeypatch, ranks, agent):
    _, d = kv_pair
    scheduling, working = halves(d.worker, ranks)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", working if agent else None)
    monkeypatch.setattr(d.worker, "take_received", lambda: {"never"})
    output = KVConnectorOutput()
    scheduling.update_connector_output(output)
    assert output.finished_recving is None
