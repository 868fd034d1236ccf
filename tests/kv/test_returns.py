"""What decode has of a prompt goes back to prefill: workers over real sockets, without vLLM's engine."""

import dataclasses
import json
import threading
import time

import pytest
import torch

from pdbench.kv.scheduler import Fetch, PrefillProgress
from pdbench.kv.transports import Link
from tests.support.kv import BLOCK, LAYERS, PATIENCE_S, Instance, instances, new_transfer, settled
from tests.support.processes import free_port, lines_of

pytestmark = pytest.mark.usefixtures("kv_secret")
TOKENS, HELD = 30, 5  # of the prompt's 8 blocks decode has 5
HERE, THERE = list(range(3, 11)), list(range(40, 48))


@pytest.fixture
def pair(tmp_path):
    """A prefill and a decode worker that return KV."""
    port = free_port(count=2)
    more = {"return_kv": True, "timeout_s": 30.0}
    with instances(
        lambda: Instance("prefill", port, event_log=str(tmp_path / "prefill"), **more),
        lambda: Instance("decode", port + 1, event_log=str(tmp_path / "decode"), **more),
    ) as started:
        yield started


def returned(transfer, d):
    """The transfer of what decode has."""
    there = {"host": "127.0.0.1", "port": d.port, "returned": True}
    return dataclasses.replace(transfer, tokens=HELD * BLOCK, ends=transfer.ends[:HELD], **there)


def ask(p, d, transfer, computed=True):
    """Decode asks for the rest of a prompt and offers what it has; returns what it asked, once prefill knows."""
    progress = [PrefillProgress(request_id=transfer.request_id, blocks=THERE[:HELD], replace=True)]
    rest = dataclasses.replace(transfer, host="127.0.0.1", port=p.port)
    fetch = Fetch(transfer=rest, start_block=HELD, blocks=THERE[HELD:], tokens=TOKENS - HELD * BLOCK)
    d.step(idle=True, offers=[returned(transfer, d)], prefilled=progress if computed else [], fetches=[fetch])
    p.step(expected=[transfer])
    p.until(lambda: p.worker.asked(transfer.transfer_id) is not None)
    return p.worker.asked(transfer.transfer_id)


def take(p, d, transfer, start=2):
    """Prefill fetches what decode has, from a block on."""
    back, blocks = returned(transfer, d), HERE[start:HELD]
    p.step(fetches=[Fetch(transfer=back, start_block=start, blocks=blocks, tokens=len(blocks) * BLOCK)])


def records(tmp_path, name, direction):
    lines = [json.loads(line) for line in lines_of(tmp_path / name)]
    return [line for line in lines if line["direction"] == direction]


def is_forgotten(instance):
    sender, receiver = instance.worker._sender, instance.worker._receiver
    return not (sender._by_request or sender._by_transfer or receiver._receives)


def prefill_computes_instead(p, transfer):
    """The return has failed: prefill computes those blocks, and hands over as ever."""
    p.until(lambda: p.received)
    assert p.failed == p.received
    p.compute(transfer, HERE, replace=True)
    p.end(transfer)
    p.until(lambda: p.sent)


def test_prefill_gets_what_decode_has_and_decode_the_rest(pair, tmp_path):
    p, d = pair
    transfer = new_transfer(TOKENS)
    asked = ask(p, d, transfer)
    assert (asked.start_block, tuple(asked.returns_at)) == (HELD, ("127.0.0.1", d.port))
    take(p, d, transfer)
    p.until(lambda: p.received)
    assert not p.failed and torch.equal(p.blocks(HERE[2:HELD]), d.blocks(THERE[2:HELD]))
    p.compute(transfer, HERE, replace=True)
    p.end(transfer)
    settled(p, d, transfer)
    assert torch.equal(p.blocks(HERE[HELD:]), d.blocks(THERE[HELD:]))
    assert is_forgotten(p) and is_forgotten(d)
    for instance in pair:
        instance.worker.close()
    size = LAYERS * BLOCK * 8 * 4
    for name, side, direction, blocks in (
        ("prefill", "receive", "return", 3),
        ("decode", "send", "return", 3),
        ("prefill", "send", "handoff", 3),
        ("decode", "receive", "handoff", 3),
    ):
        (record,) = records(tmp_path, name, direction)
        assert (record["side"], record["transfer_id"], record["error"]) == (side, transfer.transfer_id, None)
        assert (record["blocks"], record["bytes"]) == (blocks, blocks * size)


def test_offer_that_prefill_does_not_need_is_withdrawn_without_a_record(pair, tmp_path):
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer)
    p.compute(transfer, HERE, replace=True)
    p.end(transfer)
    settled(p, d, transfer)
    assert is_forgotten(p) and is_forgotten(d)
    for instance in pair:
        instance.worker.close()
    assert not records(tmp_path, "prefill", "return") and not records(tmp_path, "decode", "return")


def test_decode_that_offers_nothing_says_so(pair):
    p, d = pair
    transfer = new_transfer(TOKENS)
    rest = dataclasses.replace(transfer, host="127.0.0.1", port=p.port)
    d.step(idle=True, fetches=[Fetch(transfer=rest, start_block=0, blocks=THERE, tokens=TOKENS)])
    p.step(expected=[transfer])
    p.until(lambda: p.worker.asked(transfer.transfer_id) is not None)
    assert p.worker.asked(transfer.transfer_id).returns_at is None
    p.compute(transfer, HERE, replace=True)
    p.end(transfer)
    settled(p, d, transfer)


def test_decode_that_gives_its_request_up_ends_the_return(pair):
    """The offer's blocks were never computed: prefill waits for them until decode's client leaves, and computes them itself."""
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer, computed=False)
    take(p, d, transfer)
    d.step(cancelled=[(dataclasses.replace(transfer, host="127.0.0.1", port=p.port), "decode gave the request up")])
    d.until(lambda: d.received)
    p.until(lambda: p.received)
    assert p.failed == p.received and is_forgotten(d)
    # The end of the return and that of decode's fetch come in messages of their own, in either order.
    p.until(lambda: p.worker.asked(transfer.transfer_id).tokens == 0)  # nothing more will be asked
    p.compute(transfer, HERE, replace=True)
    p.end(transfer)
    p.until(lambda: p.sent)
    assert is_forgotten(p)


def test_prefill_that_gives_its_request_up_ends_both(pair):
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer, computed=False)
    take(p, d, transfer)
    p.step(cancelled=[(returned(transfer, d), "prefill gave the request up")])
    p.end(transfer, kept=False, error="prefill ended as aborted")
    for instance in pair:
        instance.until(lambda instance=instance: instance.received and is_forgotten(instance))
        assert instance.failed == instance.received


def test_dead_decode_fails_the_return_and_no_more(pair):
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer, computed=False)
    take(p, d, transfer)
    d.worker.close()
    prefill_computes_instead(p, transfer)
    assert is_forgotten(p)


def test_decode_that_does_not_listen_fails_the_return(pair):
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer)
    nowhere = dataclasses.replace(returned(transfer, d), port=free_port())
    p.step(fetches=[Fetch(transfer=nowhere, start_block=2, blocks=HERE[2:HELD], tokens=3 * BLOCK)])
    prefill_computes_instead(p, transfer)
    d.until(lambda: d.received)
    assert torch.equal(p.blocks(HERE[HELD:]), d.blocks(THERE[HELD:]))


def test_other_prompt_gets_nothing_back(pair):
    p, d = pair
    transfer = new_transfer(TOKENS)
    ask(p, d, transfer)
    take(p, d, dataclasses.replace(transfer, fingerprint="another prompt's"))
    prefill_computes_instead(p, transfer)
    d.until(lambda: d.received)
    assert not d.failed


def test_blocks_that_are_being_returned_are_not_freed(pair, monkeypatch):
    """Decode's request is over in the middle of the copy: vLLM hears of it when the copy is done."""
    p, d = pair
    transfer, copying, go = new_transfer(TOKENS), threading.Event(), threading.Event()
    pack = Link.pack

    def slow(link, block_ids, after):
        if block_ids == THERE[2:HELD]:
            copying.set()
            assert go.wait(PATIENCE_S)
        return pack(link, block_ids, after)

    monkeypatch.setattr(Link, "pack", slow)
    ask(p, d, transfer)
    take(p, d, transfer)
    assert copying.wait(PATIENCE_S)
    d.step(cancelled=[(dataclasses.replace(transfer, host="127.0.0.1", port=p.port), "decode gave the request up")])
    for _ in range(20):
        d.step()
        time.sleep(0.01)
    assert not d.received
    go.set()
    d.until(lambda: d.received)
    p.until(lambda: p.received)
    assert p.failed and is_forgotten(d)
