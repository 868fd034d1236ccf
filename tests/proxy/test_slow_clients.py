"""Clients that read a whole answer slowly: it waits for them, as long as they read at all and also when the proxy is told to end."""

import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.proxy_processes import Server, proxy
from tests.support.servers import Peer, ScriptedServer

TEXT_BYTES = 12 * 2**20
BODY = b'{"model":"m","prompt":"Hi"}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)


def large_answer(peer: Peer) -> bool:
    peer.respond({"text": "" if peer.method == "GET" else "x" * TEXT_BYTES})
    return True


@pytest.fixture(scope="module")
def decode() -> Iterator[ScriptedServer]:
    with ScriptedServer(large_answer) as server:
        yield server


def read_slowly(server: Server, seconds: float, begun: Callable[[], None] = lambda: None) -> int:
    """How many bytes of an answer come to a client that takes this long for it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(POST + BODY)
        got = len(connection.recv(65536))
        begun()
        while piece := connection.recv(65536):
            got += len(piece)
            time.sleep(seconds * len(piece) / TEXT_BYTES)
    return got


def test_whole_answer_is_not_cut_while_its_client_reads(tmp_path, decode):
    with proxy(tmp_path, "--idle-timeout-s", "1", decode=[decode]) as server:
        assert read_slowly(server, 6.0) > TEXT_BYTES


def test_client_that_reads_nothing_is_left(tmp_path, decode):
    with proxy(tmp_path, "--idle-timeout-s", "1", decode=[decode]) as server:
        assert read_slowly(server, 1.0, begun=lambda: time.sleep(4)) < TEXT_BYTES


def test_shutdown_waits_for_a_client_that_reads(tmp_path, decode):
    with proxy(tmp_path, decode=[decode]) as server:
        assert read_slowly(server, 3.0, begun=lambda: server.signal(signal.SIGTERM)) > TEXT_BYTES
        assert server.process.wait(60) == 0
