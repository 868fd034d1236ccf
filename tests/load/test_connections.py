"""How the load client uses its connections: kept, retired, taken in turn, over every address of a host."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pdbench.load import client as client_module
from pdbench.load import response
from pdbench.load.client import Client, fetch
from pdbench.records import RequestRecord
from tests.load.test_client import BODY, finish, send
from tests.load.test_generator import load
from tests.support.processes import ROOT
from tests.support.servers import Peer, ScriptedServer, chunk, event, stream, tokens, usage


def test_request_asks_for_no_compression():
    with ScriptedServer(stream(tokens(2))) as server:
        assert fetch(server.url, BODY).error is None
        assert server.requests[0].fields["accept-encoding"] == "identity"


def test_reset_of_a_reused_connection_has_its_own_class():
    calls = iter(range(3))

    def answer(peer: Peer) -> bool:
        if next(calls):
            peer.reset()
            return False
        return stream(tokens(2))(peer)

    with ScriptedServer(answer) as server, Client(server.url) as client:
        kinds = [finish(client, RequestRecord(id=str(index), planned_s=0.0)).error for index in range(3)]
    assert [error and error.kind for error in kinds] == [None, "reset_reused", "reset"]


def test_idle_connection_is_retired_before_the_server_closes_it(monkeypatch):
    with ScriptedServer(stream(tokens(2))) as server, Client(server.url) as client:
        for idle_s in (60.0, 60.0, 0.0):
            monkeypatch.setattr(client_module, "_IDLE_S", idle_s)
            assert finish(client, RequestRecord(id="r", planned_s=0.0)).error is None
        assert server.connections == 2


def test_idle_connections_take_turns():
    with ScriptedServer(stream(tokens(2))) as server, Client(server.url) as client:
        for _ in range(2):
            send(client, 3)
        used = []
        for index in range(3):
            finish(client, RequestRecord(id=f"turn{index}", planned_s=0.0))
            used.append(server.requests[-1].sock)
        assert server.connections == 3 and len(set(used)) == 3


def test_all_reachable_addresses_are_used_in_turn(monkeypatch):
    with ScriptedServer(stream(tokens(2), pause_s=0.02)) as first:
        with ScriptedServer(stream(tokens(2), pause_s=0.02), host="127.0.0.2", port=first.port) as second:
            hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]  # nobody listens at the last
            resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, first.port)) for host in hosts]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved)
            with Client(f"http://pair:{first.port}") as client:
                assert client.addresses == hosts[:2]
                records = send(client, 8)
            assert all(record.error is None for record in records)
            assert first.connections >= 5 and second.connections >= 5  # a probe each


NO_PORTS = """
import fcntl, socket, struct
from pathlib import Path
with socket.socket() as sock:  # the loopback device of a new network is down
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x8 | 0x40))
Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("50000 50001")
from pdbench.load.client import Client
from pdbench.records import RequestRecord
from tests.support.servers import ScriptedServer
with ScriptedServer(lambda peer: True, port=6000) as server, Client(server.url) as client:
    for index in range(4):
        client.start(record := RequestRecord(id=str(index), planned_s=0.0), b"{}")
    [ended, *_] = client.poll(client.clock.now() + 9)
    print(ended.error.kind, ended.error.message)
"""


def test_host_without_a_free_port_is_told_with_the_remedy() -> None:
    apart = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own may be made here")
    command = [*apart, sys.executable, "-c", NO_PORTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("connect [Errno 99] Cannot assign requested address: no local port is free: "), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("end", "given_up_after_s"),
    [([b"[DONE]"], 30.0), ([usage(5, 3)], 30.0), ([], 0.1)],
    ids=["done", "usage", "finish"],
)
def test_stream_is_free_once_its_answer_is_whole(monkeypatch, end: list, given_up_after_s: float):
    """A server that ends no response before the next request has come: the client must not wait for the end."""
    arrived = [threading.Event() for _ in range(4)]
    places = iter(range(4))

    def answer(peer: Peer) -> bool:
        place = next(places)
        arrived[place].set()
        body = b"".join(event(payload) for payload in [*tokens(3), *end])
        peer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % (len(body) + 1000)
        )
        peer.write(body)
        for later in arrived[place + 1 : place + 2]:
            later.wait(60)
        return False

    for name in ("_AFTER_DONE_S", "_AFTER_FINISH_S"):
        monkeypatch.setattr(response, name, given_up_after_s)
    with ScriptedServer(answer) as server:
        result = load(server, concurrency=1, requests=4, warmup=0)
    first, second = sorted(result.requests, key=lambda record: record.id)[:2]
    is_done, flags = end == [b"[DONE]"], {flag.name for flag in result.flags}
    assert [record.error for record in result.requests] == [None] * 4
    assert first.end_s < second.sent_s and (second.due_s == first.end_s) == is_done
    assert ("held-open" in flags) == (not is_done) and "client-limited" not in flags


def in_answer(serve: Callable[[Peer], bool], most: list[int]) -> Callable[[Peer], bool]:
    """The server, with the most answers that it gave at once noted: of connections that the client has not closed."""
    answering, lock = set[socket.socket](), threading.Lock()

    def is_open(sock: socket.socket) -> bool:
        try:
            return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def answer(peer: Peer) -> bool:
        with lock:
            answering.add(peer.sock)
            most[0] = max(most[0], sum(map(is_open, answering)))
        kept = serve(peer)
        with lock:
            answering.remove(peer.sock)
        return kept

    return answer


def test_finish_of_one_choice_frees_no_stream():
    """Choices one after the other, with a pause that is longer than the client waits after finish and usage."""

    def serve(peer: Peer) -> bool:
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for choice in (0, 1):
            time.sleep(0.4)
            said = {"usage": {"prompt_tokens": 5, "completion_tokens": choice + 1}}
            one = {"choices": [{"index": choice, "text": "a", "token_ids": [1], "finish_reason": "stop"}], **said}
            peer.write(chunk(event(one)))
        peer.write(chunk(event(b"[DONE]")) + chunk(b""))
        return True

    most = [0]
    with ScriptedServer(in_answer(serve, most)) as server:
        result = load(server, concurrency=2, requests=6, warmup=0, extra_body='{"n": 2}')
    assert [record.error for record in result.requests] == [None] * 6 and most == [2]
    assert "held-open" not in {flag.name for flag in result.flags}


def test_what_comes_after_done_is_no_part_of_the_answer():
    def serve(peer: Peer) -> bool:
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        peer.write(chunk(b"".join(event(payload) for payload in [*tokens(3), b"[DONE]"])))
        for _ in range(100):
            time.sleep(0.01)
            try:
                peer.write(chunk(event({"type": "ping"})))
            except OSError:
                break
        return False

    with ScriptedServer(serve) as server:
        result = load(server, concurrency=2, requests=6, warmup=0)
    assert all(record.error is None and record.end_s == record.token_s[-1] for record in result.requests)


def test_open_bodies_take_no_descriptor_that_a_stream_needs(monkeypatch):
    monkeypatch.setattr(client_module, "files_left", lambda: 6)

    def serve(peer: Peer) -> bool:
        body = b"".join(event(payload) for payload in [*tokens(3), b"[DONE]"])
        peer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % (len(body) + 1000)
        )
        peer.write(body)
        peer.sock.recv(1)  # until the client gives up
        return False

    most = [0]
    with ScriptedServer(in_answer(serve, most)) as server:
        result = load(server, concurrency=4, requests=16, warmup=0)
    assert most[0] <= 6
    assert [record.error for record in result.requests] == [None] * 16
    assert "held-open" in {flag.name for flag in result.flags}
