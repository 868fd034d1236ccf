"""Every fault of a transfer, over real sockets: each receive ends, each kept block is freed, nothing wrong is written."""

import threading
import time

import pytest
import torch

from pdbench.kv.transports import TcpLink
from tests.support.kv import (
    BLOCK,
    BLOCKS,
    Instance,
    cancel,
    fetch,
    instances,
    moves,
    new_transfer,
    prefill,
    settled,
)
from tests.support.processes import free_port

pytestmark = pytest.mark.usefixtures("kv_secret")


@pytest.mark.parametrize(
    ("decode", "line"),
    [
        ({"ranks": 2, "kv_heads": 0}, "tensor_parallel is 2 on the decode side and 1 on the prefill side"),
        ({"ranks": 2, "kv_heads": 2, "layout": (BLOCKS, 1, 8, 4)}, "layout is "),
        (
            {"kv_heads": 8, "layout": (BLOCKS, 8, BLOCK, 8)},
            "kv_heads is 8 on the decode side and 2 on the prefill side",
        ),
    ],
)
def test_layouts_that_do_not_match_are_refused_in_one_line(caplog, decode, line):
    port, heads = free_port(), decode["kv_heads"] and 2
    decode = {"layout": (BLOCKS, 2, BLOCK, 8)} | decode
    with instances(
        lambda: Instance("prefill", port, kv_heads=heads, layout=(BLOCKS, 2, BLOCK, 8)),
        lambda: Instance("decode", **decode),
    ) as (p, d):
        transfer = new_transfer(8)
        fetch(d, transfer, [1, 2], port)
        d.until(lambda: d.failed)
        assert line in caplog.text
        assert p.sent == []


def test_prefill_that_decode_never_requests_is_freed():
    with instances(lambda: Instance("prefill", free_port(), timeout_s=0.3)) as p:
        transfer = new_transfer(8)
        prefill(p, transfer, [1, 2])
        p.until(lambda: p.sent == [transfer.request_id])


def test_prefill_that_never_comes_fails_the_fetch():
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=0.5), lambda: Instance("decode", timeout_s=0.5)) as (
        p,
        d,
    ):
        transfer = new_transfer(8)
        fetch(d, transfer, [5, 6], port)
        d.until(lambda: d.received)
        assert d.failed == [transfer.request_id]
        # Should it come later, its blocks are not kept in vain.
        p.step()
        prefill(p, transfer, [1, 2])
        p.until(lambda: p.sent == [transfer.request_id])


def test_prefill_that_queues_longer_than_the_timeout_is_waited_for():
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=2.0), lambda: Instance("decode", timeout_s=2.0)) as (
        p,
        d,
    ):
        transfer = new_transfer(8)
        fetch(d, transfer, [5, 6], port)
        p.step(expected=[transfer])
        until_s = time.monotonic() + 4.0
        while time.monotonic() < until_s:  # both engines go on with other requests
            p.step()
            d.step()
        assert not d.received
        p.compute(transfer, [1, 2], replace=True)
        p.end(transfer)
        settled(p, d, transfer)


def test_prefill_that_does_not_listen_fails_the_fetch(kv_pair):
    _, d = kv_pair
    transfer = new_transfer(8)
    fetch(d, transfer, [5, 6], free_port())
    d.until(lambda: d.failed == [transfer.request_id])


def test_prefill_that_is_aborted_fails_the_fetch_at_once(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(30)
    fetch(d, transfer, list(range(8)), p.port)
    prefill(p, transfer, list(range(8)), [12], error="prefill ended as aborted")
    settled(p, d, transfer, failed=True)


def test_prefill_that_ends_without_its_blocks_fails_the_fetch(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(30)
    prefill(p, transfer, list(range(8)), ended=False)
    p.step(preempted=[transfer.request_id])
    fetch(d, transfer, list(range(8)), p.port)
    p.end(transfer)
    settled(p, d, transfer, failed=True)


def test_prefill_aborted_before_it_was_scheduled_keeps_nothing(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(30)
    fetch(d, transfer, list(range(8)), p.port)
    p.step(expected=[transfer])
    p.end(transfer, kept=False, error="prefill ended as aborted")
    d.until(lambda: d.failed == [transfer.request_id])
    assert p.sent == []


@pytest.mark.parametrize("when", ["before prefill", "during prefill", "after prefill", "before it was requested"])
def test_decode_that_gives_up_frees_both_sides(kv_pair, when):
    p, d = kv_pair
    transfer = new_transfer(30)
    if when == "before it was requested":
        prefill(p, transfer, list(range(8)))
        cancel(d, transfer, p.port)
        p.until(lambda: p.sent == [transfer.request_id])
        assert d.received == []
        return
    fetch(d, transfer, list(range(8)), p.port)
    if when == "before prefill":
        cancel(d, transfer, p.port)
    prefill(p, transfer, list(range(8)), [12], ended=False)
    if when == "during prefill":
        cancel(d, transfer, p.port)
    p.end(transfer)
    if when == "after prefill":
        cancel(d, transfer, p.port)
    settled(p, d, transfer, failed=True)


def act_as_nccl(monkeypatch):
    """TcpLink's header leaves while blocks are still copied."""

    def begin_send(link, header):
        link.channel.send(header)

    def end_send(link, header):
        with link.channel._using():
            link.channel._socket.sendall(link._bytes[: header.bytes])
        return 0.1

    monkeypatch.setattr(TcpLink, "begin_send", begin_send)
    monkeypatch.setattr(TcpLink, "end_send", end_send)


class Pause:
    """Holds the thread that calls a method, before or after what it does, until `go_on`."""

    def __init__(self, monkeypatch, name, before=False):
        self.reached, self.go_on, method = threading.Event(), threading.Event(), getattr(TcpLink, name)

        def call(*arguments):
            result = None if before else method(*arguments)
            self.reached.set()
            assert self.go_on.wait(30)
            return method(*arguments) if before else result

        monkeypatch.setattr(TcpLink, name, call)


def test_prefill_aborted_while_its_blocks_are_copied_sends_nothing(kv_pair, monkeypatch):
    act_as_nccl(monkeypatch)
    packed = Pause(monkeypatch, "pack")
    p, d = kv_pair
    aborted, before = new_transfer(8), d.blocks([10, 11])
    fetch(d, aborted, [10, 11], p.port)
    prefill(p, aborted, [1, 2], ended=False)
    assert packed.reached.wait(30)
    p.end(aborted, kept=True, error="prefill was aborted")
    assert p.sent == []  # vLLM keeps the blocks, which are still read
    packed.go_on.set()
    settled(p, d, aborted, failed=True)
    assert torch.equal(d.blocks([10, 11]), before)
    moves(p, d, [3, 4], [12, 13])  # the next one goes over the same connection


def test_bytes_that_come_after_decode_gave_up_are_not_written(kv_pair, monkeypatch):
    p, d = kv_pair
    received = Pause(monkeypatch, "receive")
    given_up, before = new_transfer(8), d.blocks([10, 11])
    prefill(p, given_up, [1, 2])
    fetch(d, given_up, [10, 11], p.port)
    assert received.reached.wait(30)
    cancel(d, given_up, p.port)
    d.until(lambda: d.failed == [given_up.request_id])
    received.go_on.set()
    moves(p, d, [3, 4], [12, 13])
    assert torch.equal(d.blocks([10, 11]), before)


@pytest.mark.parametrize("name", ["pack", "begin_send", "copied", "end_send"])
def test_piece_that_breaks_off_ends_the_connection(kv_pair, monkeypatch, name):
    """Else the next header would be followed by its bytes."""
    act_as_nccl(monkeypatch)
    p, d = kv_pair
    moves(p, d, [1, 2], [8, 9])
    broken, before, method = new_transfer(8), d.blocks([10, 11]), getattr(TcpLink, name)
    links = []

    def fail(link, *arguments):
        if threading.current_thread().name != "kv-send" or links:
            return method(link, *arguments)
        links.append(link)
        if name != "end_send":
            method(link, *arguments)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(TcpLink, name, fail)
    fetch(d, broken, [10, 11], p.port)
    prefill(p, broken, [3, 4])
    settled(p, d, broken, failed=True)
    assert torch.equal(d.blocks([10, 11]), before)
    moves(p, d, [5, 6], [12, 13])


def test_preempted_blocks_are_overwritten_after_their_copy(kv_pair, monkeypatch):
    """Not before, though the header has left and the send is launched."""
    act_as_nccl(monkeypatch)
    p, d = kv_pair
    copying = Pause(monkeypatch, "copied", before=True)
    transfer = new_transfer(8)
    fetch(d, transfer, [10, 11], p.port)
    prefill(p, transfer, [1, 2], [4], ended=False)
    assert copying.reached.wait(30)
    engine = threading.Thread(target=p.step, kwargs={"preempted": [transfer.request_id]})
    engine.start()
    engine.join(0.2)
    assert engine.is_alive()
    copying.go_on.set()
    engine.join(30)
    assert not engine.is_alive()
    p.compute(transfer, [3, 4], replace=True)
    p.end(transfer)
    settled(p, d, transfer)


def test_other_prompt_under_the_transfer_id_is_refused_and_the_right_one_served(kv_pair):
    p, d = kv_pair
    transfer = new_transfer(8)
    prefill(p, transfer, [1, 2])
    before = d.blocks([10, 11]).clone()
    for wrong in (
        new_transfer(8, transfer_id=transfer.transfer_id, fingerprint="other"),
        new_transfer(12, transfer_id=transfer.transfer_id),
    ):
        fetch(d, wrong, [10, 11, 12][: -(-wrong.tokens // BLOCK)], p.port)
        d.until(lambda wrong=wrong: wrong.request_id in d.failed)
    assert torch.equal(before, d.blocks([10, 11]))
    fetch(d, transfer, [10, 11], p.port)
    settled(p, d, transfer)


def test_transfer_id_serves_once(kv_pair):
    p, d = kv_pair
    first = new_transfer(8)
    prefill(p, first, [1, 2])
    fetch(d, first, [10, 11], p.port)
    settled(p, d, first)
    replay = new_transfer(8, transfer_id=first.transfer_id)
    fetch(d, replay, [12, 13], p.port)
    d.until(lambda: replay.request_id in d.failed)
    again = new_transfer(8, transfer_id=first.transfer_id)
    prefill(p, again, [3, 4])
    p.until(lambda: again.request_id in p.sent)


@pytest.mark.parametrize("order", ["requested before", "requested after", "never requested"])
def test_repeated_prefill_keeps_nothing_and_the_first_is_served(order):
    """A proxy that sends a prefill twice: the second keeps nothing, and the first is still served."""
    port = free_port()
    timeout_s = 1.0 if order == "never requested" else 5.0
    with instances(lambda: Instance("prefill", port, timeout_s=timeout_s), lambda: Instance("decode")) as (p, d):
        first = new_transfer(30)
        again = new_transfer(30, transfer_id=first.transfer_id)
        if order == "requested before":
            fetch(d, first, list(range(8)), port)
        prefill(p, first, list(range(8)), [12], ended=False)
        if order == "requested before":
            d.until(lambda: torch.equal(d.blocks([0]), p.blocks([0])))
        prefill(p, again, list(range(20, 28)))
        p.until(lambda: again.request_id in p.sent)
        p.compute(first, list(range(3, 8)))
        p.end(first)
        if order == "requested after":
            fetch(d, first, list(range(8)), port)
        p.until(lambda: first.request_id in p.sent)
        if order != "never requested":
            settled(p, d, first)
            assert torch.equal(p.blocks(list(range(8))), d.blocks(list(range(8))))


def test_second_fetch_of_one_transfer_id_fails(kv_pair):
    p, d = kv_pair
    first = new_transfer(8)
    second = new_transfer(8, transfer_id=first.transfer_id)
    fetch(d, first, [10, 11], p.port)
    fetch(d, second, [12, 13], p.port)
    d.until(lambda: d.failed == [second.request_id])
    prefill(p, first, [1, 2])
    settled(p, d, first)


def test_prefill_that_dies_fails_its_fetches_and_serves_again_when_it_returns(kv_pair):
    p, d = kv_pair
    waiting = new_transfer(8)
    moves(p, d, [1, 2], [10, 11])
    fetch(d, waiting, [12, 13], p.port)
    p.worker.close()
    d.until(lambda: d.failed == [waiting.request_id])
    with instances(lambda: Instance("prefill", p.port)) as returned:
        moves(returned, d, [4, 5], [14, 15])


def test_decode_that_dies_frees_what_it_requested(kv_pair):
    p, d = kv_pair
    transfer, early = new_transfer(30), new_transfer(8)
    fetch(d, transfer, list(range(8)), p.port)
    fetch(d, early, [10, 11], p.port)
    prefill(p, transfer, list(range(8)), [12], ended=False)
    d.until(lambda: torch.equal(d.blocks([0]), p.blocks([0])))
    d.worker.close()
    p.end(transfer)
    p.until(lambda: transfer.request_id in p.sent)
    prefill(p, early, [20, 21])
    p.until(lambda: early.request_id in p.sent)


def test_worker_ends_all_its_threads():
    """One that still ran a kernel when Python exits would abort the process."""
    before, port = set(threading.enumerate()), free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode")) as (p, d):
        transfer = new_transfer(30)
        fetch(d, transfer, list(range(8)), p.port)
        prefill(p, transfer, list(range(8)))
        settled(p, d, transfer)
        names = {thread.name for thread in threading.enumerate()} - {thread.name for thread in before}
        assert {"kv-listen", "kv-peer", "kv-send", "kv-receive"} <= names
    assert not set(threading.enumerate()) - before
