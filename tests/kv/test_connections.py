"""Every fault of a connection, over real sockets: peers that die, stall, misbehave or are not authenticated."""

import dataclasses
import json
import os
import socket
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest
import torch

from pdbench.kv.channel import (
    Blocks,
    Cancel,
    Channel,
    ChannelClosedError,
    FetchRequest,
    accept_handshake,
    connect,
)
from pdbench.kv.compat import SECRET_VARIABLE
from tests.support.kv import (
    BLOCK,
    BLOCKS,
    LAYERS,
    PATIENCE_S,
    Instance,
    cancel,
    fetch,
    instances,
    moves,
    new_transfer,
    prefill,
    settled,
)
from tests.support.processes import free_port, lines_of

pytestmark = pytest.mark.usefixtures("kv_secret")


@pytest.mark.parametrize("noticed_by", ["a step", "a cancellation", "the clock"])
def test_connection_that_just_closed_fails_its_fetches_once(tmp_path, noticed_by):
    """The thread that reads sees the end of a connection first; the engine may be about to write to it."""
    port, log = free_port(), tmp_path / "d.jsonl"
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode", event_log=str(log))) as (p, d):
        waiting, next_one = new_transfer(8), new_transfer(8)
        moves(p, d, [1, 2], [10, 11])
        fetch(d, waiting, [12, 13], p.port)
        receiver = d.worker._receiver
        (peer,) = receiver._instances["127.0.0.1", p.port].peers.values()
        with d.worker._changed:  # the peer's thread cannot report the end before the engine used the connection
            peer.channel.close()
            if noticed_by == "a step":
                fetch(d, next_one, [14, 15], p.port)
            elif noticed_by == "a cancellation":
                cancel(d, waiting, p.port)
            else:
                (part,) = receiver._receives[waiting.transfer_id].parts.values()
                part.alive_s -= 100
                receiver.tick()
        d.until(lambda: waiting.request_id in d.failed)
        if noticed_by == "a step":
            d.until(lambda: next_one.request_id in d.received)
        moves(p, d, [4, 5], [16, 17])
    ends = [line for line in map(json.loads, lines_of(log)) if line["transfer_id"] == waiting.transfer_id]
    assert len(ends) == 1 and ends[0]["error"]


def test_unpack_error_fails_the_fetch_of_a_lost_peer(kv_pair, monkeypatch):
    p, d = kv_pair
    bad = new_transfer(8)
    moves(p, d, [1, 2], [10, 11])
    receiver = d.worker._receiver
    (instance,) = receiver._instances.values()
    (peer,) = instance.peers.values()

    def unpack(*_):
        with d.worker._changed:
            receiver._lose(instance, "the connection broke")
        raise RuntimeError("no such block")

    monkeypatch.setattr(peer.connection, "unpack", unpack)
    prefill(p, bad, [3, 4])
    fetch(d, bad, [12, 13], p.port)
    d.until(lambda: d.failed == [bad.request_id])


def test_timekeeping_continues_after_an_error(kv_pair, monkeypatch, caplog):
    _, d = kv_pair
    ticks = []

    def tick():
        ticks.append(time.monotonic())
        raise RuntimeError("unexpected")

    monkeypatch.setattr(d.worker._receiver, "tick", tick)
    d.until(lambda: len(ticks) >= 2)
    assert "checking for overdue transfers failed" in caplog.text


def test_decode_is_connected_at_the_engines_first_step():
    """Before, vLLM may be capturing CUDA graphs, beside which nothing may be allocated on the GPU."""
    port = free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode")) as (p, d):
        transfer = new_transfer(8)
        fetch(d, transfer, [10, 11], port)
        d.until(lambda: any(thread.name == "kv-peer" for thread in threading.enumerate()))
        time.sleep(0.2)
        assert not p.worker._sender._peers
        prefill(p, transfer, [1, 2])
        settled(p, d, transfer)


@pytest.mark.parametrize("steps", [False, True])
def test_decode_that_waits_for_the_first_step_is_disconnected_after_the_timeout(steps):
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=0.5)) as p:
        channel = connected(p)
        if steps:
            p.step()
            channel.send({"type": "nonsense"})
        channel.set_timeout(5.0)
        with pytest.raises(ChannelClosedError):
            channel.receive()


def test_prefill_after_its_request_timed_out_keeps_nothing():
    with instances(lambda: Instance("prefill", free_port(), timeout_s=1.0)) as p:
        p.step()
        transfer, channel = new_transfer(8), connected(p)
        channel.send(FetchRequest(transfer.transfer_id, tokens=8, fingerprint="same", start_block=0, piece_blocks=4))
        assert "no such prefill came" in channel.receive(idle=True)["reason"]
        prefill(p, transfer, [1, 2])
        assert p.sent == [transfer.request_id]


def test_reader_error_disconnects_the_peer(monkeypatch, caplog):
    with instances(lambda: Instance("prefill", free_port())) as p:
        p.step()
        channel, sender = connected(p), p.worker._sender
        monkeypatch.setattr(sender, "_remember", lambda *_: 1 / 0)
        channel.send(Cancel("t", "why"))
        with pytest.raises(ChannelClosedError):
            channel.receive()
        p.until(lambda: not sender._peers)
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_machine_without_more_threads_fails_the_fetch_and_not_the_engine(monkeypatch, side):
    with instances(lambda: Instance("prefill", free_port()), lambda: Instance("decode")) as (p, d):
        p.step()
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == ("kv-receive" if side == "decode" else "kv-send"):
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", refuse)
            failing = new_transfer(8)
            fetch(d, failing, [10, 11], p.port)
            d.until(lambda: d.failed == [failing.request_id])
        moves(p, d, [1, 2], [10, 11])


def connected(p):
    """A channel to a prefill instance, after the handshake."""
    return connect(("127.0.0.1", p.port), 0, p.worker._sender._context)[0]


@contextmanager
def false_prefill(behave):
    """A prefill that knows the secret and then does what `behave(channel)` does; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            channel = Channel(connection, 5.0)
            accept_handshake(channel, template.worker._receiver._context)
            behave(channel)

        template = Instance("decode")
        template.worker.close()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_rank_that_answers_after_its_instance_was_lost_is_disconnected():
    """Prefill's first rank answers and dies while the second is still connecting."""
    port = free_port(count=2)
    with (
        socket.create_server(("127.0.0.1", port)) as first,
        socket.create_server(("127.0.0.1", port + 1)) as second,
        instances(lambda: Instance("decode", kv_heads=2, layout=(BLOCKS, 2, BLOCK, 8))) as d,
    ):
        ours = d.worker._receiver._context
        of_rank = [
            dataclasses.replace(ours, identity=msgspec.structs.replace(ours.identity, tensor_parallel=2, rank=rank))
            for rank in (0, 1)
        ]
        transfer = new_transfer(8)
        fetch(d, transfer, [5, 6], port)
        channels = [Channel(first.accept()[0], 5.0)]
        accept_handshake(channels[0], of_rank[0])
        channels.append(Channel(second.accept()[0], 5.0))
        channels[0].close()
        d.until(lambda: d.failed == [transfer.request_id])
        accept_handshake(channels[1], of_rank[1])
        channels[1].set_timeout(PATIENCE_S)
        with pytest.raises(ChannelClosedError, match="closed by the other side"):
            channels[1].receive()


def first_piece(request, payload_bytes=None, **changes):
    size = LAYERS * BLOCK * 8 * 4
    header = {"transfer_id": request["transfer_id"], "start": 0, "count": 1, "bytes": size} | changes
    return Blocks(**header), memoryview(bytes(size if payload_bytes is None else payload_bytes))


@pytest.mark.parametrize(
    "fault",
    [
        "stalls within a piece",
        "dies within a piece",
        "stalls between pieces",
        "sends the wrong block",
        "sends too much",
        "sends nonsense",
    ],
)
def test_prefill_that_misbehaves_fails_the_fetch(fault):
    over = threading.Event()

    def behave(channel):
        request = channel.receive()
        if fault in ("stalls within a piece", "dies within a piece"):
            channel.send(*first_piece(request, 10))
        elif fault == "stalls between pieces":
            channel.send(*first_piece(request))
        elif fault == "sends the wrong block":
            channel.send(*first_piece(request, start=1))
        elif fault == "sends too much":
            channel.send(*first_piece(request, count=9))
        else:
            channel.send({"type": "nonsense"})
        if "stalls" in fault:
            over.wait(PATIENCE_S)
        channel.close()

    with false_prefill(behave) as port, instances(lambda: Instance("decode", timeout_s=0.5)) as d:
        transfer = new_transfer(8)
        before = d.blocks([6]).clone()
        fetch(d, transfer, [5, 6], port)
        d.until(lambda: d.failed == [transfer.request_id])
        over.set()
        assert torch.equal(before, d.blocks([6]))


def test_stopped_decode_does_not_hold_blocks_for_ever():
    """Decode requests and then reads nothing, as a stopped process does: prefill gives up when its sends stall."""
    port = free_port()
    big = (BLOCKS, BLOCK, 256 * 1024)  # 4 MiB per layer's block, more than sockets buffer
    with instances(lambda: Instance("prefill", port, layout=big, timeout_s=0.5)) as p:
        transfer = new_transfer(16)
        connected(p).send(
            FetchRequest(transfer.transfer_id, tokens=16, fingerprint="same", start_block=0, piece_blocks=4)
        )
        prefill(p, transfer, [0, 1, 2, 3])
        p.until(lambda: p.sent == [transfer.request_id])


def test_unauthenticated_peers_change_nothing(kv_pair):
    p, d = kv_pair
    outsiders = [socket.create_connection(("127.0.0.1", p.port)) for _ in range(5)]
    outsiders[0].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    outsiders[1].sendall(os.urandom(1000))
    outsiders[2].close()
    transfer = new_transfer(8)
    prefill(p, transfer, [1, 2])
    fetch(d, transfer, [10, 11], p.port)
    settled(p, d, transfer)
    for outsider in outsiders:
        outsider.close()


def test_decode_with_another_secret_gets_no_blocks(kv_pair, monkeypatch):
    p, _ = kv_pair
    monkeypatch.setenv(SECRET_VARIABLE, "another secret, as long")
    with instances(lambda: Instance("decode")) as other:
        transfer = new_transfer(8)
        prefill(p, transfer, [1, 2])
        fetch(other, transfer, [10, 11], p.port)
        other.until(lambda: other.failed == [transfer.request_id])
        assert p.sent == []  # still kept for the decode that may have it
