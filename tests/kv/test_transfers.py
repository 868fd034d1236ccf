"""Prefill and decode workers over real sockets, without vLLM's engine: which blocks arrive, and where."""

import dataclasses
import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.outputs import KVConnectorOutput

from pdbench.events import TransferEvent
from pdbench.kv.blocks import BlockPacker
from pdbench.kv.connector import PdKvConnector
from pdbench.kv.metrics import TransferRecorder
from pdbench.kv.ranks import held
from pdbench.kv.scheduler import Fetch, StepPlan
from pdbench.kv.worker import FETCH_WAIT_S, IDLE_WAIT_S
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
        p.compute(transfer, here[sum(end <= chunks[0] for end in transfer.ends) :])
        p.end(transfer)
    settled(p, d, transfer)
    assert torch.equal(p.blocks(here), d.blocks(there))


DRAFT, TARGET = "layer.0", ("layer.1", "layer.2")


@pytest.mark.parametrize("told", [True, False], ids=["wait_for_save", "next step"])
def test_draft_models_layers_travel_when_it_has_run(kv_secret, told):
    with instances(*(partial(Instance, role, free_port(), drafts=(DRAFT,)) for role in ("prefill", "decode"))) as pair:
        p, d = pair
        transfer, blocks = new_transfer(8), [3, 4]
        fetch(d, transfer, blocks, p.port)
        p.step(expected=[transfer])
        p.compute(transfer, blocks, replace=True)
        time.sleep(0.2)  # enough for a transfer that does not wait
        p.cache[DRAFT][blocks] = 7.0  # the draft model's pass is launched only now
        if told:
            p.worker.after_drafting()
        p.end(transfer)
        settled(p, d, transfer)
        assert torch.equal(p.blocks(blocks), d.blocks(blocks))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_side_without_the_draft_model_exchanges_the_others(kv_secret, role):
    makers = []
    for name in ("prefill", "decode"):
        layers = {"drafts": (DRAFT,)} if name == role else {"layers": TARGET}
        makers.append(partial(Instance, name, free_port(), **layers))
    with instances(*makers) as (p, d):
        before = {name: cache.clone() for name, cache in d.cache.items()}
        transfer, here, there = new_transfer(11), [3, 4, 5], [7, 9, 8]
        fetch(d, transfer, there, p.port)
        prefill(p, transfer, here)
        settled(p, d, transfer)
        for name in TARGET:
            assert torch.equal(p.cache[name][here], d.cache[name][there])
        assert role == "prefill" or torch.equal(d.cache[DRAFT], before[DRAFT])


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


def ranks_of(role, heads, count, port=0, **more):
    """Workers of one instance: each has its share of `heads` KV heads (1: a copy of the same)."""
    layout = (BLOCKS, max(1, heads // count), BLOCK, 8)
    return [
        lambda rank=rank: Instance(role, port, rank=rank, ranks=count, kv_heads=heads, layout=layout, **more)
        for rank in range(count)
    ]


@pytest.mark.parametrize(
    ("heads", "prefill_ranks", "decode_ranks"),
    [(1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 1), (6, 2, 6), (6, 3, 1), (2, 1, 4), (2, 4, 1), (2, 4, 2), (1, 2, 2)],
)
def test_unequal_tensor_parallelism_moves_every_head_to_its_place(heads, prefill_ranks, decode_ranks):
    port = free_port(count=prefill_ranks)
    makers = [*ranks_of("prefill", heads, prefill_ranks, port), *ranks_of("decode", heads, decode_ranks)]
    with instances(*makers) as workers:
        ps, ds = workers[:prefill_ranks], workers[prefill_ranks:]
        model = [torch.randn(BLOCKS, heads, BLOCK, 8) for _ in range(LAYERS)]
        for p in ps:
            for cache, layer in zip(p.cache.values(), model, strict=True):
                own = held(heads, prefill_ranks, p.rank)
                cache.copy_(layer[:, own.start : own.stop])
        for first_asks, start in ((False, 0), (True, 3)):
            transfer, here, there = new_transfer(30), list(range(8)), list(range(40, 48))
            for p in ps:
                if not first_asks:
                    prefill(p, transfer, here, [17, 30])
            for d in ds:
                fetch(d, transfer, there[start:], port, start=start)
            for p in ps:
                if first_asks:
                    prefill(p, transfer, here, [17, 30])
            for d in ds:
                d.until(lambda d=d, name=transfer.request_id: name in d.received)
                assert not d.failed
                for cache, layer in zip(d.cache.values(), model, strict=True):
                    own = held(heads, decode_ranks, d.rank)
                    assert torch.equal(cache[there[start:]], layer[start:8, own.start : own.stop])
            for p in ps:
                p.until(lambda p=p, name=transfer.request_id: p.sent.count(name) == 1)


def test_fetch_fails_whole_when_one_of_prefills_ranks_is_lost():
    port = free_port(count=2)
    makers = [*ranks_of("prefill", 2, 2, port, timeout_s=1.0), *ranks_of("decode", 2, 1)]
    with instances(*makers) as (p0, p1, d):
        first, second = new_transfer(8), new_transfer(8)
        for p in (p0, p1):
            prefill(p, first, [1, 2])
        fetch(d, first, [5, 6], port)
        for p in (p0, p1):
            settled(p, d, first)
        fetch(d, second, [7, 8], port)
        prefill(p0, second, [3, 4])
        p1.worker.close()
        d.until(lambda: d.failed == [second.request_id])
        p0.until(lambda: second.request_id in p0.sent)
        assert d.received.count(second.request_id) == 1


def test_prefill_is_freed_when_one_of_decodes_ranks_never_asks():
    port = free_port()
    makers = [*ranks_of("prefill", 2, 1, port, timeout_s=0.5), *ranks_of("decode", 2, 2)]
    with instances(*makers) as (p, d0, _):
        transfer = new_transfer(8)
        prefill(p, transfer, [1, 2])
        fetch(d0, transfer, [5, 6], port)
        p.until(lambda: p.sent == [transfer.request_id])
        d0.until(lambda: d0.received == [transfer.request_id])


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
    p.compute(transfer, [20, 21], replace=True)
    p.compute(transfer, list(range(22, 28)))
    p.end(transfer)
    settled(p, d, transfer)
    assert torch.equal(d.blocks([53, 54, 55, 56, 57]), p.blocks([23, 24, 25, 26, 27]))


def test_event_log_and_statistics_of_both_sides(tmp_path):
    port = free_port()
    logs = [str(tmp_path / "p.jsonl"), str(tmp_path / "d.jsonl")]
    with instances(
        lambda: Instance("prefill", port, event_log=logs[0]),
        lambda: Instance("decode", event_log=logs[1], timeout_s=2.0),
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
        assert line["wire_s"] > 0 and 0 <= line["copy_s"] < line["end_s"] - line["asked_s"]
    assert (send["side"], receive["side"]) == ("send", "receive")
    assert receive["reported_s"] >= receive["end_s"] and send["ready_s"] <= send["end_s"]
    assert failure["error"] and failure["wire_s"] is failure["copy_s"] is None and failure["bytes"] == 0


def test_handoff_begins_before_the_copy(tmp_path, monkeypatch):
    """On CPU, too, where the copy is over as soon as it is launched."""
    port, log, gathered, gather = free_port(), tmp_path / "p.jsonl", [], BlockPacker.gather
    monkeypatch.setattr(BlockPacker, "gather", lambda *what: gathered.append(time.monotonic()) or gather(*what))
    with instances(lambda: Instance("prefill", port, event_log=str(log)), lambda: Instance("decode")) as (p, d):
        transfer = new_transfer(8)
        prefill(p, transfer, [1, 2])
        fetch(d, transfer, [10, 11], port)
        settled(p, d, transfer)
    assert json.loads(log.read_text())["ready_s"] <= gathered[-1]


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


def test_idle_step_waits_longer_for_what_it_fetches_than_for_what_it_keeps(kv_pair, monkeypatch):
    p, d = kv_pair
    waited, wait = [], threading.Condition.wait
    monkeypatch.setattr(threading.Condition, "wait", lambda self, s=None: waited.append(s) or wait(self, s))
    transfer = new_transfer(8)
    fetch(d, transfer, [1, 2], p.port)
    d.step()
    assert FETCH_WAIT_S in waited
    d.step(cancelled=[(dataclasses.replace(transfer, host="127.0.0.1", port=p.port), "over")])
    waited.clear()
    prefill(p, new_transfer(8), [1, 2])
    p.step()
    assert IDLE_WAIT_S in waited and FETCH_WAIT_S not in waited


def test_step_output_reports_what_arrived_meanwhile(kv_pair, monkeypatch):
    """vLLM's scheduler learns of it from the connector in its process, not two steps later; failures take the usual way."""
    p, d = kv_pair
    scheduling, working = halves(d.worker, ranks=1)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", working)
    good, bad, early = new_transfer(8), new_transfer(8), new_transfer(8)
    prefill(p, good, [1, 2])
    prefill(p, dataclasses.replace(bad, fingerprint="another"), [3, 4])
    fetches = [
        Fetch(transfer=dataclasses.replace(transfer, host=d.host, port=p.port), start_block=0, blocks=blocks, tokens=8)
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


def test_arrival_waits_for_the_next_output_and_no_longer(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(8)
    fetch(d, transfer, [3, 4], p.port, idle=False)
    assert d.worker.take_received() == set()
    prefill(p, transfer, [1, 2])
    wait_until(lambda: d.worker._receiver._ended, PATIENCE_S)
    assert not d.step(idle=False).received  # the output of the step before will tell it
    assert d.step(idle=False).received == {transfer.request_id}  # no output came


@pytest.mark.parametrize(("ranks", "agent"), [(2, "worker"), (1, None)])
def test_step_output_is_left_to_vllm_with_other_ranks_or_processes(kv_pair, monkeypatch, ranks, agent):
    _, d = kv_pair
    scheduling, working = halves(d.worker, ranks)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", working if agent else None)
    monkeypatch.setattr(d.worker, "take_received", lambda: {"never"})
    output = KVConnectorOutput()
    scheduling.update_connector_output(output)
    assert output.finished_recving is None
