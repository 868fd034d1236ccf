"""The fault table of docs/proxy.md: servers are really killed and paused, clients really leave."""

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdbench.http import get
from tests.support.processes import ending_with_tests, free_port, wait_until
from tests.support.proxy_processes import Server, instance, proxy, read_answer

FAST = ("--health-interval-s", "0.2", "--prefill-timeout-s", "1", "--decode-timeout-s", "1")

# A real decode instance waits for KV; a scripted one waits this long, or does not answer within a test.
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


@pytest.fixture(scope="module")
def patient(lasting, tmp_path_factory):
    """A proxy over the same instances whose timeouts no request of a busy machine reaches."""
    _, prefill, decode = lasting
    with proxy(tmp_path_factory.mktemp("patient"), prefill=[prefill], decode=[decode]) as server:
        yield server, prefill, decode


def test_dead_prefill_is_reported_and_taken_back(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        pair[0].kill()
        answer = server.complete(decode=FOREVER)
        assert answer.status in (502, 503)
        assert answer.json["error"]["stage"] == "prefill"
        wait_until(lambda: not server.is_ready())
        answer = server.complete()
        assert (answer.status, answer.json["error"]["stage"]) == (503, "prefill")
        assert "retry-after" in answer.headers
        server.wait_idle()
        with instance(tmp_path, "prefill-again", port=pair[0].port):
            wait_until(server.is_ready)
            assert server.complete().status == 200


def test_unhealthy_instance_is_taken_out_and_back(tmp_path, pair):
    with proxy(tmp_path, *FAST, decode=[pair[1]]) as server:
        assert server.complete(decode={"health": 503}).status == 200
        # Its answers, 5xx among them, are no sign of health: three failed checks in a row take it out.
        wait_until(lambda: not server.is_ready())
        assert server.complete().status == 503
        with pair[1].connect() as connection:
            send_request(connection, max_tokens=2, decode={"health": 200})
            assert read_answer(connection).status == 200
        wait_until(server.is_ready)
        assert server.complete().status == 200


def test_instance_removed_during_its_check_leaves_no_connection(tmp_path, pair):
    with instance(tmp_path, "hung") as hung, proxy(tmp_path, *FAST, decode=[pair[1]]) as server:
        hung.signal(signal.SIGSTOP)
        for _ in range(5):
            added = server.request("POST", "/instances", {"role": "decode", "url": hung.url})
            assert added.status == 201
            wait_until(lambda: connections(server, hung))
            assert server.request("DELETE", f"/instances/{added.json['id']}?now=true").status == 202
            wait_until(lambda: not connections(server, hung))


def connections(server: Server, to: Server) -> int:
    """How many connections a proxy of one worker has to an instance."""
    ends = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(end.raddr != () and end.raddr.port == to.port for end in ends)


def test_request_that_decode_computes_alone_never_returns_to_prefill(tmp_path, pair):
    """Its event would say both: that decode computed the prompt, and where prefill did."""
    with instance(tmp_path, "hung") as hung, ThreadPoolExecutor() as threads:
        options = ("--fallback", "recompute", "--health-interval-s", "60")
        with proxy(tmp_path, *options, prefill=[pair[0]], decode=[hung]) as server:
            server.wait_all_healthy()
            assert server.request("POST", "/instances/prefill-0/drain").status == 200
            hung.signal(signal.SIGSTOP)
            running = threads.submit(server.complete)
            wait_until(server.in_flight)
            assert server.request("POST", "/instances", {"role": "decode", "url": pair[1].url}).status == 201
            assert server.request("POST", "/instances/prefill-0/resume").status == 200
            server.wait_all_healthy()
            hung.kill()
            answer = running.result()
            assert answer.status == 200
            event = server.event(answer.request_id)
            assert (event["prefill"], event["decode_alone"], event["retries"]) == (None, "prefill-failed", 1)


def test_dead_prefill_is_replaced_then_recomputed_by_decode(tmp_path, pair):
    with instance(tmp_path, "prefill-2") as second:
        options = ("--fallback", "recompute", "--prefill-policy", "round-robin", "--health-interval-s", "60")
        with proxy(tmp_path, *options, prefill=[pair[0], second], decode=[pair[1]]) as server:
            server.wait_all_healthy()
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


@pytest.mark.parametrize("connector", ["p2p-nccl", "mooncake", "nixl", "nixl-push", "builtin-p2p-nccl"])
def test_stalled_prefill_is_a_504(tmp_path, pair, connector):
    with proxy(tmp_path, *FAST, "--connector", connector, prefill=[pair[0]], decode=[pair[1]]) as server:
        pair[0].signal(signal.SIGSTOP)
        answer = server.complete(decode=FOREVER)
        assert (answer.status, answer.json["error"]["stage"]) == (504, "prefill")
        server.wait_idle()
        if connector in ("nixl", "nixl-push", "builtin-p2p-nccl"):
            assert not pair[1].requests(), "decode must not hear of it"
        else:
            wait_until(pair[1].aborted)


@pytest.mark.parametrize("connector", ["nixl", "builtin-p2p-nccl"])
def test_what_prefill_refuses_is_decodes_to_answer_where_it_can(tmp_path, pair, connector):
    with proxy(tmp_path, "--connector", connector, prefill=[pair[0]], decode=[pair[1]]) as server:
        before = len(pair[1].requests())
        answer = server.complete(max_tokens=4, prefill={"status": 400}, decode={"status": 422})
        can = connector == "nixl"
        assert (answer.status, len(pair[1].requests()) - before) == ((422, 1) if can else (400, 0))


def test_dead_decode_is_replaced_before_the_first_byte(tmp_path, pair):
    with instance(tmp_path, "decode-2") as second:
        options = ("--decode-policy", "round-robin", "--health-interval-s", "60")
        with proxy(tmp_path, *options, prefill=[pair[0]], decode=[pair[1], second]) as server:
            server.wait_all_healthy()
            pair[1].kill()
            assert [server.complete().status for _ in range(2)] == [200, 200]
            second.kill()
            answer = server.complete(stream=True)
            assert (answer.status, answer.json["error"]["stage"]) == (502, "decode")


def test_decode_killed_mid_stream_ends_with_an_error_event(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, "killed", max_tokens=1000, decode={"delay": 0.01}) as stream:
            pair[1].kill()
            answer = read_answer(stream)
        assert answer.status == 200
        assert answer.events[-1]["error"]["stage"] == "decode"
        assert b"[DONE]" not in answer.body
        assert answer.complete
        assert server.event("killed")["stage"] == "decode"


def test_decode_stalled_mid_stream_ends_with_a_504_event(tmp_path, pair):
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
def test_failed_answer_of_decode_is_an_error(lasting, stream, decode, status):
    server, _, _ = lasting
    answer = server.complete(stream=stream, max_tokens=4, decode=decode)
    assert (answer.status, answer.json["error"]["stage"]) == (status, "decode")
    assert answer.complete
    server.wait_idle()


@pytest.mark.parametrize("decode", [{"die": 2}, {"end": "no-done"}])
def test_truncated_stream_ends_with_an_error_event(lasting, decode):
    server, _, _ = lasting
    answer = server.complete(stream=True, max_tokens=4, decode=decode)
    assert answer.status == 200
    assert answer.events[-1]["error"]["stage"] == "decode"
    assert all("choices" in event for event in answer.events[:-1])


def test_truncated_body_is_a_502(lasting):
    answer = lasting[0].complete(max_tokens=4, decode={"end": "cut-off"})
    assert (answer.status, answer.json["error"]["stage"]) == (502, "decode")


def test_client_leaving_before_an_answer_stops_both(patient):
    server, *pair = patient
    with server.connect() as connection:
        send_request(connection, "before", prefill=FOREVER, decode=FOREVER)
        for member in pair:
            member.received("before")
    for member in pair:
        wait_until(lambda member=member: "before" in member.aborted())
    assert server.event("before")["status"] == 499
    server.wait_idle()


def test_client_leaving_mid_stream_stops_decode(patient):
    server, _, decode = patient
    with running_stream(server, "leaving", max_tokens=2000, decode={"delay": 0.01}):
        pass
    wait_until(lambda: "leaving" in decode.aborted())
    assert server.event("leaving")["status"] == 499
    server.wait_idle()


@pytest.mark.parametrize("connector", ["nixl", "builtin-p2p-nccl"])
def test_client_leaving_during_prefill_stops_prefill(tmp_path, pair, connector):
    with proxy(tmp_path, "--connector", connector, prefill=[pair[0]], decode=[pair[1]]) as server:
        with server.connect() as connection:
            send_request(connection, prefill=FOREVER)
            wait_until(pair[0].requests)
        server.wait_idle()
        wait_until(pair[0].aborted)
        assert not pair[1].requests(), "decode must not hear of it"


def test_thousand_leaving_clients_leave_nothing_in_flight(patient):
    server, _, _ = patient
    for _ in range(5):
        connections = [server.connect() for _ in range(200)]
        for connection in connections:
            send_request(connection, stream=True, max_tokens=500, decode={"delay": 0.1})
        for connection in connections:
            assert connection.recv(20)
            connection.close()
    server.wait_idle()
    assert server.complete(stream=True).events[-1] == b"[DONE]"


def test_two_thousand_streams_of_which_half_leave(tmp_path):
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
            wait_until(lambda: server.in_flight() == 2000)
            for leaving in connections[:1000]:
                leaving.close()
            wait_until(lambda: server.in_flight() == 1000)
            wait_until(lambda: len(decode.aborted()) == 1000)
            for staying in connections[1000:]:
                assert staying.recv(4096)
                staying.close()
            server.wait_idle()
            wait_until(lambda: len(decode.aborted()) == 2000)


def test_slow_reader_gets_everything_and_delays_nobody(patient):
    server, _, _ = patient
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
        first = threads.submit(server.complete, max_tokens=2, decode={"until": str(tmp_path / "end")})
        wait_until(server.in_flight)
        rest = list(threads.map(lambda _: server.complete(max_tokens=2), range(4)))
        for answer in rest:
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert answer.json["error"]["stage"] == "queue"
        (tmp_path / "end").touch()
        assert first.result().status == 200
        assert server.complete().status == 200


def test_shutdown_completes_requests_in_flight(tmp_path, pair):
    with proxy(tmp_path, prefill=[pair[0]], decode=[pair[1]]) as server:
        held = {"until": str(tmp_path / "end")}
        with running_stream(server, max_tokens=30, decode=held) as stream, server.connect() as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(idle).status == 200
            server.signal(signal.SIGTERM)
            time.sleep(0.2)  # the signal has come before the request's end
            (tmp_path / "end").touch()
            assert read_answer(stream).events[-1] == b"[DONE]"
            assert server.process.wait(60) == 0
            assert idle.recv(10) == b""
        with pytest.raises(OSError, match="refused"):
            server.connect()


def test_shutdown_cuts_off_after_the_drain_timeout(tmp_path, pair):
    with proxy(tmp_path, "--drain-timeout-s", "0.2", prefill=[pair[0]], decode=[pair[1]]) as server:
        with running_stream(server, max_tokens=1000, decode={"delay": 0.1}) as stream:
            server.signal(signal.SIGTERM)
            assert not read_answer(stream).complete
        assert server.process.wait(60) == 0
        wait_until(pair[1].aborted)


def test_full_disk_costs_log_lines_and_no_answer(tmp_path, pair):
    with proxy(tmp_path, *FAST, prefill=[pair[0]], decode=[pair[1]]) as server:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, most))
        with server.connect() as connection:  # one connection: it is kept
            for number in range(4):
                send_request(connection, str(number))
                assert read_answer(connection).status == 200
        # A request is counted when prefill and decode have both ended, which may be after the answer.
        wait_until(lambda: b'requests_total{status="200"} 4.0' in server.request("GET", "/metrics").body)
    assert (tmp_path / "proxy.stderr").read_text().count("the event log cannot be written") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_proxy_whose_output_is_not_taken_serves(workers):
    port, command = free_port(), [sys.executable, "-m", "pdbench", "proxy", "--prefill", "http://127.0.0.1:1"]
    command += ["--decode", "http://127.0.0.1:2", "--port", str(port), "--workers", workers]
    with Path("/dev/full").open("w") as full, subprocess.Popen(ending_with_tests(command), stdout=full) as running:
        wait_until(lambda: running.poll() is not None or get(f"http://127.0.0.1:{port}", "/metrics"))
        assert running.poll() is None
        running.terminate()
