"""The relay of streams that are under way: what reaches the client is what the instance sent, however it was cut."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pdbench.proxy.relay import is_whole_events
from tests.support.processes import wait_until
from tests.support.proxy_processes import Answer, Server, proxy, read_answer
from tests.support.servers import SSE_HEAD, Peer, ScriptedServer, chunk, event, token

EVENT = event(token())
DONE = event(b"[DONE]")


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (chunk(EVENT), True),
        (chunk(EVENT) * 3, True),
        (chunk(EVENT + EVENT), True),
        (chunk(b"data: {}\r\n\r\n"), True),
        (b"00" + chunk(EVENT), True),
        (chunk(b"x" * 253 + b"\n\n"), True),
        (chunk(b"x" * 254 + b"\n\n"), True),
        (chunk(b"x" * 255 + b"\n\n"), True),
        (b"", False),
        (chunk(b""), False),
        (chunk(EVENT) + chunk(b""), False),
        (chunk(EVENT)[:-1], False),
        (chunk(EVENT) + chunk(EVENT)[:7], False),
        (chunk(EVENT[:-1]), False),
        (chunk(EVENT[:9]) + chunk(EVENT[9:]), False),
        (EVENT, False),
        (b"-5\r\nx\n\n\r\n", False),
        (b"\r\n\n\n\r\n", False),
        (b"3\r\nx\n\nyy", False),
    ],
)
def test_only_whole_chunks_of_whole_events_are_passed_on(data: bytes, whole: bool) -> None:
    assert is_whole_events(data) is whole


class Script:
    """A decode instance that writes `pieces` after the head of a stream, with pauses, then ends, or resets once `read` is set."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.pause_s = 0.0
        self.reset = False
        self.read = threading.Event()

    def answer(self, peer: Peer) -> bool:
        if peer.method == "GET":
            peer.respond({})
            return True
        reset = self.reset  # the next test may set it while this answer's last pause lasts
        peer.write(SSE_HEAD)
        peer.write(*self.pieces, pause_s=self.pause_s)
        if reset:
            self.read.wait(60)  # a reset discards what the proxy has not read yet
            peer.reset()
        return True


@pytest.fixture(scope="module")
def decode() -> Iterator[tuple[Script, ScriptedServer]]:
    script = Script()
    with ScriptedServer(script.answer) as server:
        yield script, server


@pytest.fixture(scope="module")
def relaying(decode: tuple[Script, ScriptedServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with proxy(tmp_path_factory.mktemp("relay"), decode=[decode[1]]) as server:  # type: ignore[list-item]
        yield server


def answer(script: Script, relaying: Server, pieces: list[bytes], *, pause_s: float = 0.002) -> Answer:
    script.pieces, script.pause_s = pieces, pause_s
    return relaying.complete(stream=True)


def request(*, close: bool = False) -> bytes:
    body = b'{"model": "m", "prompt": "H", "stream": true}'
    fields = b"Host: x\r\nContent-Length: %d\r\n%b" % (len(body), b"Connection: close\r\n" if close else b"")
    return b"POST /v1/completions HTTP/1.1\r\n%b\r\n%b" % (fields, body)


def cut(data: bytes, generator: random.Random) -> list[bytes]:
    places = sorted(generator.sample(range(1, len(data)), 12))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_streams_cut_anywhere_arrive_whole(decode: tuple[Script, ScriptedServer], relaying: Server, seed: int) -> None:
    generator = random.Random(seed)
    texts = ["x", "1f\r\nnot a chunk\n\n\r\n", "0\r\n\r\n", "y" * 40_000, "ü" * 50, ""]
    events = [event(token(generator.choice(texts))) for _ in range(20)]
    if seed % 2:
        events = [piece for each in events for piece in (each[:5], each[5:])]
    body = b"".join(events) + DONE
    raw = b"".join(map(chunk, [*events, DONE, b""]))
    whole = [chunk(each) for each in [*events, DONE]]
    for pieces in (cut(raw, generator), [*whole, chunk(b"")], [*whole[:-1], whole[-1] + chunk(b"")]):
        got = answer(decode[0], relaying, pieces)
        assert got.complete and got.body == body
    relaying.wait_idle()


def test_burst_larger_than_one_read_arrives_whole(decode: tuple[Script, ScriptedServer], relaying: Server) -> None:
    filled = event(b"x" * (4096 - len(chunk(event(b""))) - 2))  # its size takes three digits, the empty event's one
    assert len(chunk(filled)) == 4096  # so that reads end where chunks end
    burst = chunk(filled) * 12 + chunk(DONE) + chunk(b"")
    got = answer(decode[0], relaying, [*[chunk(EVENT)] * 5, burst], pause_s=0.02)
    assert got.complete and got.body == EVENT * 5 + filled * 12 + DONE


def test_reset_instance_ends_the_stream_with_an_error_event(
    decode: tuple[Script, ScriptedServer], relaying: Server
) -> None:
    script, _ = decode
    script.pieces, script.pause_s, script.reset = [chunk(EVENT)] * 5, 0.02, True
    with relaying.connect() as connection:
        connection.sendall(request(close=True))
        wait_until(lambda: connection.recv(65536, socket.MSG_PEEK).count(EVENT) == 5)
        script.read.set()
        got = read_answer(connection)
    script.reset = False
    assert got.events[:5] == [token()] * 5 and got.events[5]["error"]["code"] == 502


def test_stream_without_done_ends_with_an_error_event(decode: tuple[Script, ScriptedServer], relaying: Server) -> None:
    got = answer(decode[0], relaying, [*[chunk(EVENT)] * 5, chunk(b"")], pause_s=0.02)
    assert "without [DONE]" in got.events[-1]["error"]["message"]


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n"])
def test_done_without_its_blank_line_is_the_end(
    decode: tuple[Script, ScriptedServer], relaying: Server, end: bytes
) -> None:
    got = answer(decode[0], relaying, [*[chunk(EVENT)] * 3, chunk(end) + chunk(b"")], pause_s=0.02)
    assert got.complete and got.events == [*[token()] * 3, b"[DONE]"]


def test_reset_behind_the_last_event_costs_the_client_nothing(
    decode: tuple[Script, ScriptedServer], relaying: Server
) -> None:
    script, _ = decode
    script.reset = True
    script.read.set()
    got = answer(script, relaying, [*[chunk(EVENT)] * 3, chunk(DONE)], pause_s=0.1)
    script.reset = False
    assert got.complete and got.events == [*[token()] * 3, b"[DONE]"]


def test_event_of_many_pieces_arrives_whole(decode: tuple[Script, ScriptedServer], relaying: Server) -> None:
    large = b"data: " + b"x" * (8 * 2**20) + b"\r\n\r\n"
    pieces = [chunk(large[at : at + 50_001]) for at in range(0, len(large), 50_001)]
    got = answer(decode[0], relaying, [chunk(EVENT), *pieces, chunk(DONE), chunk(b"")], pause_s=0)
    assert got.complete and got.body == EVENT + large + DONE


def test_slow_client_gets_everything(decode: tuple[Script, ScriptedServer], relaying: Server) -> None:
    script, _ = decode
    event_64k = event(token("z" * 65_000))
    script.pieces, script.pause_s = [*[chunk(EVENT)] * 3, *[chunk(event_64k)] * 400, chunk(DONE) + chunk(b"")], 0.0
    with relaying.connect() as connection:
        connection.sendall(request(close=True))
        time.sleep(0.5)
        data = b""
        while piece := connection.recv(1 << 20):
            data += piece
    assert data.count(b"data: ") == 404 and data.endswith(DONE + b"\r\n" + chunk(b""))


def test_client_that_leaves_ends_the_request_at_the_instance(
    decode: tuple[Script, ScriptedServer], relaying: Server
) -> None:
    script, _ = decode
    script.pieces, script.pause_s = [chunk(EVENT)] * 500, 0.01
    with relaying.connect() as connection:
        connection.sendall(request())
        while b"data: " not in connection.recv(65536):
            pass
        time.sleep(0.1)
        assert relaying.in_flight() == 1
    relaying.wait_idle()


def test_connection_serves_again_after_a_relayed_stream(
    decode: tuple[Script, ScriptedServer], relaying: Server
) -> None:
    script, server = decode
    before = len(server.requests)
    for _ in range(5):
        got = answer(script, relaying, [*[chunk(EVENT)] * 5, chunk(DONE), chunk(b"")])
        assert got.complete and len(got.events) == 6
    # A health check may have the idle connection just then, and one that was idle for seconds is not used again.
    assert len({peer.sock for peer in server.requests[before:] if peer.method == "POST"}) < 5
