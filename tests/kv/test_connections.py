"""Every fault of a connection, over real sockets: peers that die, stall, misbehave or have no business here."""

import json
import os
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from pdbench.kv.control import (
    Ask,
    Blocks,
    Channel,
    ChannelClosedError,
    Forget,
    Identity,
    accept_handshake,
    offer_handshake,
)
from pdbench.kv.messages import SECRET_VARIABLE
from tests.support.kv_instances import (
    BLOCK,
    BLOCKS,
    LAYERS,
    PATIENCE_S,
    SECRET,
    Instance,
    drop,
    fetch,
    free_port,
    instances,
    prefill,
    prompt,
    settled,
)

pytestmark = pytest.mark.usefixtures("kv_secret")


@pytest.mark.parametrize("by", ["a step", "a drop", "the clock"])
def test_a_connection_that_just_closed_fails_its_fetches_once(tmp_path, by):
    """The thread that reads sees the end of a connection first; the engine may be about to write to it."""
    port, log = free_port(), tmp_path / "d.jsonl"
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode", event_log=str(log))) as (p, d):
        good, waiting, next_one = prompt(8), prompt(8), prompt(8)
        prefill(p, good, [1, 2])
        fetch(d, good, [10, 11], p.port)
        settled(p, d, good)
        fetch(d, waiting, [12, 13], p.port)
        receiver = d.worker._receiver
        (peer,) = receiver._peers.values()
        with d.worker._changed:  # the peer's thread cannot tell of the end before we have used it
            peer.link.channel.close()
            if by == "a step":
                fetch(d, next_one, [14, 15], p.port)
            elif by == "a drop":
                drop(d, waiting, p.port)
            else:
                receiver._receives[waiting.transfer_id].alive_s -= 100
                receiver.tick()
        d.until(lambda: waiting.request_id in d.failed)
        if by == "a step":
            d.until(lambda: next_one.request_id in d.received)
        after = prompt(8)
        prefill(p, after, [4, 5])
        fetch(d, after, [16, 17], p.port)
        settled(p, d, after)
    ends = [
        line for line in map(json.loads, log.read_text().splitlines()) if line["transfer_id"] == waiting.transfer_id
    ]
    assert len(ends) == 1 and ends[0]["error"]


def test_blocks_that_cannot_be_written_fail_the_fetch_even_if_its_peer_was_given_up_meanwhile(kv_pair, monkeypatch):
    p, d = kv_pair
    good, bad = prompt(8), prompt(8)
    prefill(p, good, [1, 2])
    fetch(d, good, [10, 11], p.port)
    settled(p, d, good)
    receiver = d.worker._receiver
    (peer,) = receiver._peers.values()

    def unpack(*_):
        with d.worker._changed:
            receiver._lose(peer, "the engine found it gone")
        raise RuntimeError("no such block")

    monkeypatch.setattr(peer.link, "unpack", unpack)
    prefill(p, bad, [3, 4])
    fetch(d, bad, [12, 13], p.port)
    d.until(lambda: d.failed == [bad.request_id])


def test_the_clock_goes_on_after_an_error(kv_pair, monkeypatch, caplog):
    _, d = kv_pair
    ticks = []

    def tick():
        ticks.append(time.monotonic())
        raise RuntimeError("once in a while")

    monkeypatch.setattr(d.worker._receiver, "tick", tick)
    d.until(lambda: len(ticks) >= 2)
    assert "what is overdue" in caplog.text


def test_a_decode_is_let_in_when_the_engine_takes_its_first_step():
    """Before, vLLM may be capturing CUDA graphs, beside which nothing may be allocated on the GPU."""
    port = free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode")) as (p, d):
        asked = prompt(8)
        fetch(d, asked, [10, 11], port)
        d.until(lambda: any(thread.name == "kv-peer" for thread in threading.enumerate()))
        time.sleep(0.2)
        assert not p.worker._sender._peers
        prefill(p, asked, [1, 2])
        settled(p, d, asked)


@pytest.mark.parametrize("steps", [False, True])
def test_a_decode_that_waits_at_the_door_is_left_in_the_end(steps):
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=0.5)) as p:
        channel = offered(p)
        if steps:
            p.step()
            channel.send({"type": "nonsense"})
        channel.set_timeout(5.0)
        with pytest.raises(ChannelClosedError):
            channel.receive(idle=False)


def test_a_prefill_that_comes_after_its_ask_was_refused_keeps_nothing():
    with instances(lambda: Instance("prefill", free_port(), timeout_s=1.0)) as p:
        p.step()
        asked, channel = prompt(8), offered(p)
        channel.send(Ask(asked.transfer_id, tokens=8, fingerprint="same", start_block=0, piece_blocks=4))
        assert "no such prefill came" in channel.receive()["reason"]
        prefill(p, asked, [1, 2])
        assert p.sent == [asked.request_id]


def test_a_reader_that_fails_loses_its_peer(monkeypatch, caplog):
    with instances(lambda: Instance("prefill", free_port())) as p:
        p.step()
        channel, sender = offered(p), p.worker._sender
        monkeypatch.setattr(sender, "_dropped", lambda *_: 1 / 0)
        channel.send(Forget("t", "why"))
        with pytest.raises(ChannelClosedError):
            channel.receive(idle=False)
        p.until(lambda: not sender._peers)
        assert "ZeroDivisionError" in caplog.text


def offered(p):
    """A channel to a prefill instance that has shaken hands."""
    channel = Channel(socket.create_connection(("127.0.0.1", p.port)), 5.0)
    offer_handshake(channel, SECRET.encode(), p.worker._sender._identity)
    return channel


@contextmanager
def false_prefill(behave):
    """A prefill that knows the secret and then does what `behave(channel)` does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            channel = Channel(connection, 5.0)
            accept_handshake(channel, SECRET.encode(), identity)
            behave(channel)

        layout = Instance("decode")
        identity = Identity(
            transport="tcp",
            tensor_parallel=1,
            rank=0,
            block_size=BLOCK,
            layout=layout.worker._receiver._identity.layout,
            model="model",
        )
        layout.worker.close()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def first_piece(ask, bytes_of_it=None, **changes):
    size = LAYERS * BLOCK * 8 * 4
    header = {"transfer_id": ask["transfer_id"], "start": 0, "count": 1, "bytes": size} | changes
    return Blocks(**header), memoryview(bytes(size if bytes_of_it is None else bytes_of_it))


@pytest.mark.parametrize(
    "what",
    [
        "stalls amid a piece",
        "dies amid a piece",
        "stalls between pieces",
        "sends the wrong block",
        "sends too much",
        "says nonsense",
    ],
)
def test_a_prefill_that_misbehaves_fails_the_fetch(what):
    over = threading.Event()

    def behave(channel):
        ask = channel.receive()
        if what in ("stalls amid a piece", "dies amid a piece"):
            channel.send(*first_piece(ask, 10))
        elif what == "stalls between pieces":
            channel.send(*first_piece(ask))
        elif what == "sends the wrong block":
            channel.send(*first_piece(ask, start=1))
        elif what == "sends too much":
            channel.send(*first_piece(ask, count=9))
        else:
            channel.send({"type": "nonsense"})
        if "stalls" in what:
            over.wait(PATIENCE_S)
        channel.close()

    with false_prefill(behave) as port, instances(lambda: Instance("decode", timeout_s=0.5)) as d:
        asked = prompt(8)
        before = d.blocks([6]).clone()
        fetch(d, asked, [5, 6], port)
        d.until(lambda: d.failed == [asked.request_id])
        over.set()
        assert torch.equal(before, d.blocks([6]))


def test_a_stopped_decode_does_not_hold_blocks_for_ever():
    """Decode asks and then reads nothing, as a stopped process does: prefill gives up when its sends stall."""
    port = free_port()
    big = (BLOCKS, BLOCK, 256 * 1024)  # 4 MiB a layer's block, more than sockets buffer
    with instances(lambda: Instance("prefill", port, layout=big, timeout_s=0.5)) as p:
        asked = prompt(16)
        offered(p).send(Ask(asked.transfer_id, tokens=16, fingerprint="same", start_block=0, piece_blocks=4))
        prefill(p, asked, [0, 1, 2, 3])
        p.until(lambda: p.sent == [asked.request_id])


def test_strangers_change_nothing(kv_pair):
    p, d = kv_pair
    strangers = [socket.create_connection(("127.0.0.1", p.port)) for _ in range(5)]
    strangers[0].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    strangers[1].sendall(os.urandom(1000))
    strangers[2].close()
    asked = prompt(8)
    prefill(p, asked, [1, 2])
    fetch(d, asked, [10, 11], p.port)
    settled(p, d, asked)
    for stranger in strangers:
        stranger.close()


def test_another_secret_gets_no_blocks(kv_pair, monkeypatch):
    p, _ = kv_pair
    monkeypatch.setenv(SECRET_VARIABLE, "another secret, as long")
    with instances(lambda: Instance("decode")) as outsider:
        asked = prompt(8)
        prefill(p, asked, [1, 2])
        fetch(outsider, asked, [10, 11], p.port)
        outsider.until(lambda: outsider.failed == [asked.request_id])
        assert p.sent == []  # still kept for the one that may have it
