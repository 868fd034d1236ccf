"""The connection between two workers: who is let in, who is refused, and that no peer can make it hang."""

import socket
import struct
import threading
from types import SimpleNamespace

import msgspec
import pytest

from pdbench.kv import channel
from pdbench.kv.channel import (
    Channel,
    ChannelClosedError,
    accept_handshake,
    connect,
    offer_handshake,
)
from pdbench.kv.ranks import Identity, matching_shares
from tests.support.processes import free_port

SECRET = b"sixteen letters or more"
IDENTITY = Identity(
    transport="tcp", tensor_parallel=2, rank=1, block_size=16, layout="4 parts", model="abc", kv_heads=4
)


def context_of(secret=SECRET, identity=IDENTITY):
    """What the handshake reads of a worker's context."""
    return SimpleNamespace(secret=secret, identity=identity, packer=SimpleNamespace(target_parts=2), timeout_s=5.0)


@pytest.fixture
def ends():
    """Decode's and prefill's end of a TCP connection over the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield Channel(ours, 5.0), Channel(theirs, 5.0)


def shake(ends, *, decode_secret=SECRET, decode_identity=IDENTITY):
    """Run both sides of the handshake; returns what each side raised."""
    raised = {}

    def side(name, handshake, *arguments):
        try:
            handshake(*arguments)
        except ChannelClosedError as error:
            raised[name] = error

    prefill = threading.Thread(target=side, args=("prefill", accept_handshake, ends[1], context_of()))
    prefill.start()
    side("decode", offer_handshake, ends[0], context_of(decode_secret, decode_identity), 1)
    prefill.join()
    return raised


def test_handshake_of_equal_sides_succeeds(ends):
    assert shake(ends) == {}
    ends[0].send({"type": "request"}, memoryview(b"payload"))
    assert ends[1].receive() == {"type": "request"}
    buffer = bytearray(7)
    ends[1].receive_into(memoryview(buffer))
    assert bytes(buffer) == b"payload"


def test_handshake_with_another_secret_is_refused_on_both_sides(ends):
    raised = shake(ends, decode_secret=b"another secret of length")
    assert "PDBENCH_KV_SECRET" in str(raised["prefill"])
    assert "PDBENCH_KV_SECRET" in str(raised["decode"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_heads", 8),
        ("block_size", 32),
        ("layout", "8 parts"),
        ("transport", "nccl"),
        ("model", "x"),
    ],
)
def test_handshake_of_unequal_sides_names_the_difference(ends, field, value):
    raised = shake(ends, decode_identity=msgspec.structs.replace(IDENTITY, **{field: value}))
    assert f"{field} is {value} on the decode side" in str(raised["decode"])
    assert f"{field} is {value} on the decode side" in str(raised["prefill"])


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"tensor_parallel": 2}, {"tensor_parallel": 3}, "one of 2 prefill and 3 decode ranks must be a multiple"),
        ({"tensor_parallel": 2}, {"tensor_parallel": 6}, "4 KV heads cannot be divided among 6 ranks"),
        ({"tensor_parallel": 2, "kv_heads": 0}, {"tensor_parallel": 4, "kv_heads": 0}, "differ from layer to layer"),
        ({"tensor_parallel": 16}, {"tensor_parallel": 1}, "4 copies cannot share 2 layers"),
    ],
)
def test_widths_that_cannot_be_exact_are_refused_in_one_line(prefill, decode, reason):
    ours, theirs = (msgspec.structs.replace(IDENTITY, **{"rank": 0} | fields) for fields in (prefill, decode))
    with pytest.raises(ValueError, match=reason) as refusal:
        matching_shares(ours, theirs, 2)
    assert f"tensor_parallel is {theirs.tensor_parallel} on the decode side" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("widths", [(1, 1), (1, 2)])
@pytest.mark.parametrize(("theirs", "travel"), [("1 parts", True), ("2 parts", False), ("", False)])
def test_draft_models_layers_travel_where_both_have_the_same(widths, theirs, travel):
    prefill, decode = (
        msgspec.structs.replace(IDENTITY, rank=0, tensor_parallel=width, drafts=drafts)
        for width, drafts in zip(widths, ("1 parts", theirs), strict=True)
    )
    assert {share.drafts for share in matching_shares(prefill, decode, 2)} == {travel}


def test_equal_widths_need_no_heads():
    identity = msgspec.structs.replace(IDENTITY, tensor_parallel=3, kv_heads=0)
    assert [(share.rank, share.reader) for share in matching_shares(identity, identity, 1)] == [(0, 0), (1, 1), (2, 2)]


def test_prefills_rank_that_is_not_the_one_meant_is_refused(ends):
    thread = threading.Thread(target=accept_handshake, args=(ends[1], context_of()))
    thread.start()
    with pytest.raises(ChannelClosedError, match="it is rank 1 of a prefill instance, not 0"):
        offer_handshake(ends[0], context_of(), 0)
    thread.join()


def test_prefill_that_reflects_the_proof_is_refused(ends):
    def impostor():
        ends[1].send({"protocol": channel.PROTOCOL, "nonce": "00"})
        answer = ends[1].receive()
        # What it could do without the secret: reflect decode's own proof.
        ends[1].send({"identity": answer["identity"], "proof": answer["proof"]})

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(ChannelClosedError, match="did not prove"):
        offer_handshake(ends[0], context_of(), 1)
    thread.join()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("!I", 1 << 30),
        struct.pack("!I", 2) + b"{]",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 9) + b'{"a":"\xff"}',
        struct.pack("!I", 60_000) + b"[" * 60_000,
        struct.pack("!I", 2) + b"{}",
        struct.pack("!I", 19) + b'{"identity": {"a":1',
        b"",
    ],
)
def test_unauthenticated_peer_is_refused_whatever_it_sends(ends, sent):
    ends[0]._socket.sendall(sent)
    ends[0]._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosedError):
        accept_handshake(ends[1], context_of())


def test_silent_unauthenticated_peer_is_refused_after_the_handshake_timeout(ends, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT_S", 0.2)
    with pytest.raises(ChannelClosedError, match="in time"):
        accept_handshake(ends[1], context_of())


def test_peer_that_stops_reading_is_disconnected(ends):
    ends[0].set_timeout(0.2)
    with pytest.raises(ChannelClosedError, match="took no data"):
        for _ in range(100):
            ends[0].send({"type": "blocks"}, memoryview(bytes(1 << 20)))


def test_message_that_stops_half_way_closes_but_an_idle_connection_stays(ends):
    ends[1].set_timeout(0.2)
    threading.Timer(0.5, lambda: ends[0]._socket.sendall(struct.pack("!I", 50) + b'{"type"')).start()
    with pytest.raises(ChannelClosedError, match="sent no data"):
        ends[1].receive(idle=True)


def test_send_without_wait_does_not_wait_for_a_reader(ends):
    with pytest.raises(ChannelClosedError):
        for _ in range(10_000):
            ends[0].send({"type": "request", "padding": "x" * 10_000}, wait=False)


def test_channel_that_another_thread_closed_raises_at_every_use(ends):
    ends[0].close()
    for use in (
        lambda: ends[0].send({"type": "request"}),
        lambda: ends[0].send({"type": "request"}, wait=False),
        lambda: ends[0].set_timeout(1.0),
        ends[0].receive,
    ):
        with pytest.raises(ChannelClosedError):
            use()


def test_descriptor_is_not_free_while_a_thread_uses_it(ends):
    descriptor = ends[0]._socket.fileno()
    with ends[0]._using():
        ends[0].close()
        with socket.socket() as next_owner:
            assert next_owner.fileno() != descriptor
    assert ends[0]._socket.fileno() == -1


def test_close_wakes_a_thread_that_receives(ends):
    raised = []

    def receive():
        try:
            ends[0].receive()
        except ChannelClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    ends[0].close()
    thread.join(60)
    assert raised and not thread.is_alive()


@pytest.mark.parametrize("port", [None, 99_999])
def test_connect_without_a_listener_fails(port):
    context = SimpleNamespace(timeout_s=1.0)
    with pytest.raises(ChannelClosedError, match="not reachable"):
        connect(("127.0.0.1", port or free_port()), 0, context)
