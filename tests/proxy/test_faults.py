"""The fault table of docs/proxy.md: servers are really killed and paused, clients really leave."""

import json
import resource
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.support.proxy_processes import Server, instance, proxy, read_answer, wait_until

FAST = ("--health-interval-s", "0.2", "--prefill-timeout-s", "1", "--decode-timeout-s", "1")

# A decode instance waits for KV; the scripted one just waits: for long where it is never to answer.
WAITS, FOREVER = {"first": 0.5}, {"first": 30}


def send_request(connection: socket.socket, request_id: str = "-", **fields: Any) -> None:
    """Send a completion request and read nothing."""
    body = json.dumps({"model": "m", "prompt": "Hi", **fields})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(body)}"
    connection.sendall(f"{head}\r\n\r\n{body}".encode())


@contextmanager
def running_stream(server: Server, request_id: str = "-", **fields: Any) -> Iterator[socket.socket]:
    """A connection on which a stream has begun and of which nothing is read yet; the client leaves at the end."""
    with server.connect() as connection:
        send_request(connection, request_id, stream=True, **fields)
        assert connection.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
        yield connection


@pytest.fixture
def pair(tmp_path):
    """A prefill and a decode instance that a test may break."""
    with instance(tmp_path, "prefill") as prefill, instance(tmp_path, "decode") as decode:
        yield prefill, decode


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """A proxy over instances that no test breaks, and those."""
    folder = tmp_path_factory.mktemp("lasting")
    with instance(folder, "prefill") as prefill, instance(folder, "decode") as decode:
        # Failures count against an instance; here it is to stay in.
        with proxy(folder, *FAST, "--unhealthy-after", "1000", prefill=[prefill], decode=[decode]) as server:
            yield server, prefill, decode


def test_prefill_dead_is_named_and_let_in_again(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        pair[0].kill()
        answer = server.complete(decode=FOREVER)
        assert answer.status in (502, 503)
        assert answer.json["error"]["stage"] == "prefill"
        wait_until(lambda: server.ask("GET", "/health").status == 503, "the dead instance is out")
        answer = server.complete()
        assert (answer.status, answer.json["error"]["stage"]) == (503, "prefill")
        assert "retry-after" in answer.headers
        wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
        with instance(tmp_path, "prefill-again", port=pair[0].port):
            wait_until(lambda: server.ask("GET", "/health").status == 200, "the instance is back")
            assert server.complete().status == 200


def test_an_instance_that_answers_but_is_sick_is_let_out_and_in_again(tmp_path, pair):
    with proxy(tmp_path, *FAST, decode=[pair[1]]) as server:
        assert server.complete(decode={"health": 503}).status == 200
        # Its answers, 5xx among them, are no sign of health: three failed checks in a row take it out.
        wait_until(lambda: server.ask("GET", "/health").status == 503, "the sick instance is out")
        assert server.complete().status == 503
        with pair[1].connect() as connection:
            send_request(connection, max_tokens=2, decode={"health": 200})
            assert read_answer(connection).status == 200
        wait_until(lambda: server.ask("GET", "/health").status == 200, "it is back")
        assert server.complete().status == 200


def test_an_instance_that_is_removed_amid_its_check_leaves_no_connection(tmp_path, pair):
    with instance(tmp_path, "hung") as hung, proxy(tmp_path, *FAST, decode=[pair[1]]) as server:
        hung.signal(signal.SIGSTOP)
        for _ in range(5):
            added = server.ask("POST", "/instances", {"role": "decode", "url": hung.url})
            assert added.status == 201
            wait_until(lambda: connections(server, hung), "a check is under way")
            assert server.ask("DELETE", f"/instances/{added.json['id']}?now=true").status == 202
            wait_until(lambda: not connections(server, hung), "its connection is closed")


def connections(server: Server, to: Server) -> int:
    """How many connections a proxy of one worker has to an instance."""
    ends = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(end.raddr != () and end.raddr.port == to.port for end in ends)


def test_another_prefill_takes_over_and_recompute_follows(tmp_path, pair):
    with instance(tmp_path, "prefill-2") as second:
        options = ("--fallback", "recompute", "--prefill-policy", "round-robin", "--health-interval-s", "60")
        with proxy(tmp_path, *options, prefill=[pair[0], second], decode=[pair[1]]) as server:
            wait_until(
                lambda: all(i["healthy"] for i in server.ask("GET", "/instances").json["instances"]), "all are in"
            )
            pair[0].kill()
            answers = [server.complete(decode=WAITS) for _ in range(2)]
            assert [answer.status for answer in answers] == [200, 200]
            events = [server.event(answer.request_id) for answer in answers]
            assert sorted(event["retries"] for event in events) == [0, 1]
            assert {event["prefill"] for event in events} == {second.url}
            second.kill()
            answer = server.complete(stream=True, decode=WAITS)
            assert answer.events[-1] == b"[DONE]"
            assert server.event(answer.request_id)["prefill"] is None
            assert "kv_transfer_params" not in pair[1].requests()[-1]["body"]


@pytest.mark.parametrize("connector", ["p2p-nccl", "nixl", "builtin-p2p-nccl"])
def test_prefill_stalled_is_a_timeout_of_prefill(tmp_path, pair, connector):
    with proxy(tmp_path, *FAST, "--connector", connector, prefill=[pair[0]], decode=[pair[1]]) as server:
        pair[0].signal(signal.SIGSTOP)
        answer = server.complete(decode=FOREVER)
        assert (answer.status, answer.json["error"]["stage"]) == (504, "prefill")
        wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
        if connector != "p2p-nccl":
            assert not pair[1].requests(), "decode must not hear of it"
        else:
            wait_until(pair[1].aborted, "decode is told to stop")


def test_decode_dead_before_a_byte_is_tried_elsewhere(tmp_path, pair):
    with instance(tmp_path, "decode-2") as second:
        options = ("--decode-policy", "round-robin", "--health-interval-s", "60")
        with proxy(tmp_path, *options, prefill=[pair[0]], decode=[pair[1], second]) as server:
            wait_until(
                lambda: all(i["healthy"] for i in server.ask("GET", "/instances").json["instances"]), "all are in"
            )
            pair[1].kill()
            assert [server.complete().status for _ in range(2)] == [200, 200]
            second.kill()
            answer = server.complete(stream=True)
            assert (answer.status, answer.json["error"]["stage"]) == (502, "decode")


def test_decode_killed_mid_stream_is_said_and_closed(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, "killed", max_tokens=1000, decode={"delay": 0.01}) as stream:
            pair[1].kill()
            answer = read_answer(stream)
        assert answer.status == 200
        assert answer.events[-1]["error"]["stage"] == "decode"
        assert b"[DONE]" not in answer.body
        assert answer.complete
        assert server.event("killed")["stage"] == "decode"


def test_decode_paused_mid_stream_is_a_timeout_said(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, max_tokens=1000, decode={"delay": 0.01}) as stream:
            pair[1].signal(signal.SIGSTOP)
            assert read_answer(stream).events[-1]["error"]["code"] == 504


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("decode", "status"),
    [
        ({"die": 0}, 502),
        ({"status": 500}, 502),
        ({"first": 30}, 504),
        ({"end": "empty-body"}, 502),
        ({"end": "garbage"}, 502),
    ],
)
def test_no_failed_answer_looks_like_a_good_one(lasting, stream, decode, status):
    server, _, _ = lasting
    answer = server.complete(stream=stream, max_tokens=4, decode=decode)
    assert (answer.status, answer.json["error"]["stage"]) == (status, "decode")
    assert answer.complete
    wait_until(lambda: server.in_flight() == 0, "nothing is in flight")


@pytest.mark.parametrize("decode", [{"die": 2}, {"end": "no-done"}])
def test_truncated_streams_end_with_an_error(lasting, decode):
    server, _, _ = lasting
    answer = server.complete(stream=True, max_tokens=4, decode=decode)
    assert answer.status == 200
    assert answer.events[-1]["error"]["stage"] == "decode"
    assert all("choices" in event for event in answer.events[:-1])


def test_body_cut_off_is_a_502(lasting):
    answer = lasting[0].complete(max_tokens=4, decode={"end": "cut-off"})
    assert (answer.status, answer.json["error"]["stage"]) == (502, "decode")


def test_client_that_leaves_before_an_answer_ends_the_work_of_both(lasting):
    server, *pair = lasting
    with server.connect() as connection:
        send_request(connection, "before", prefill=FOREVER, decode=FOREVER)
        for one in pair:
            one.asked("before")
    for one in pair:
        wait_until(lambda one=one: "before" in one.aborted(), "it has stopped")
    assert server.event("before")["status"] == 499
    wait_until(lambda: server.in_flight() == 0, "nothing is in flight")


def test_client_that_leaves_amid_a_stream_ends_it(lasting):
    server, _, decode = lasting
    with running_stream(server, "amid", max_tokens=2000, decode={"delay": 0.01}):
        pass
    wait_until(lambda: "amid" in decode.aborted(), "decode has stopped")
    assert server.event("amid")["status"] == 499
    wait_until(lambda: server.in_flight() == 0, "nothing is in flight")


@pytest.mark.parametrize("connector", ["nixl", "builtin-p2p-nccl"])
def test_client_that_leaves_while_prefill_computes_alone_ends_it(tmp_path, pair, connector):
    with proxy(tmp_path, "--connector", connector, prefill=[pair[0]], decode=[pair[1]]) as server:
        with server.connect() as connection:
            send_request(connection, prefill=FOREVER)
            wait_until(pair[0].requests, "the request is at prefill")
        wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
        wait_until(pair[0].aborted, "prefill has stopped")
        assert not pair[1].requests(), "decode must not hear of it"


def test_a_thousand_clients_that_leave_leave_nothing(lasting):
    server, _, _ = lasting
    for _ in range(5):
        connections = [server.connect() for _ in range(200)]
        for connection in connections:
            send_request(connection, stream=True, max_tokens=500, decode={"delay": 0.1})
        for connection in connections:
            assert connection.recv(20)
            connection.close()
    wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
    assert server.complete(stream=True).events[-1] == b"[DONE]"


def test_two_thousand_streams_at_once_and_a_thousand_leave(tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with instance(tmp_path, "prefill") as prefill, instance(tmp_path, "decode") as decode:
        with proxy(tmp_path, prefill=[prefill], decode=[decode]) as server:
            connections = []
            for _ in range(20):
                arriving = [server.connect() for _ in range(100)]
                for connection in arriving:
                    send_request(connection, stream=True, max_tokens=10000, decode={"delay": 5})
                for connection in arriving:
                    assert connection.recv(15) == b"HTTP/1.1 200 OK"
                connections += arriving
            wait_until(lambda: server.in_flight() == 2000, "all are at decode, none at prefill")
            for leaving in connections[:1000]:
                leaving.close()
            wait_until(lambda: server.in_flight() == 1000, "those who left are counted out")
            wait_until(lambda: len(decode.aborted()) == 1000, "decode has stopped work on each")
            for staying in connections[1000:]:
                assert staying.recv(4096)
                staying.close()
            wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
            wait_until(lambda: len(decode.aborted()) == 2000, "decode has stopped work on each")


def test_slow_reader_gets_everything_and_slows_nobody(lasting):
    server, _, _ = lasting
    slow = server.connect()
    send_request(slow, stream=True, max_tokens=50000)
    time.sleep(0.5)
    assert server.complete(stream=True).events[-1] == b"[DONE]"
    got = b""
    while b"[DONE]" not in got[-100:]:
        piece = slow.recv(65536)
        assert piece
        got += piece
    assert got.count(b'"text"') == 50000
    slow.close()


def test_full_queue_is_429_with_retry_after(tmp_path, pair):
    options = ("--max-in-flight", "1", "--queue-size", "1", "--queue-timeout-s", "1")
    with proxy(tmp_path, *options, prefill=[pair[0]], decode=[pair[1]]) as server, ThreadPoolExecutor(8) as threads:
        first = threads.submit(server.complete, max_tokens=2, decode={"delay": 1})
        wait_until(server.in_flight, "the first is under way")
        rest = list(threads.map(lambda _: server.complete(max_tokens=2), range(4)))
        assert first.result().status == 200
        assert {answer.status for answer in rest} <= {200, 429}
        refused = [answer for answer in rest if answer.status == 429]
        assert len(refused) >= 3
        assert all(
            answer.headers["retry-after"] == "1" and answer.json["error"]["stage"] == "queue" for answer in refused
        )
        assert server.complete().status == 200


def test_shutdown_ends_what_is_in_flight_and_takes_nothing_new(tmp_path, pair):
    with proxy(tmp_path, prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, max_tokens=30, decode={"delay": 0.02}) as stream, server.connect() as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(idle).status == 200
            server.signal(signal.SIGTERM)
            assert read_answer(stream).events[-1] == b"[DONE]"
            assert server.process.wait(10) == 0
            assert idle.recv(10) == b""
        with pytest.raises(OSError, match="refused"):
            server.connect()


def test_shutdown_cuts_off_what_takes_too_long(tmp_path, pair):
    with proxy(tmp_path, "--drain-timeout-s", "0.2", prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, max_tokens=1000, decode={"delay": 0.1}) as stream:
            server.signal(signal.SIGTERM)
            assert not read_answer(stream).complete
        assert server.process.wait(10) == 0
        wait_until(pair[1].aborted, "decode is told to stop")
