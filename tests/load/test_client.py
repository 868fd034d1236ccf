"""The load client against a scripted server over real sockets: every failure class, keep-alive, TLS, IPv6, large bodies."""

import json
import os
import socket
import struct
import subprocess
import threading
import time

import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.http import offered_model
from pdbench.load import connection
from pdbench.load.client import Client, fetch
from pdbench.records import RequestRecord
from tests.support.processes import free_port, wait_until
from tests.support.servers import SSE_HEAD, Peer, ScriptedServer, chunk, event, stream, token, tokens

BODY = {"model": "m", "prompt": "Hello", "max_tokens": 8}


def ask(answer, **options) -> RequestRecord:
    with ScriptedServer(answer) as server:
        return fetch(server.url, BODY, LoadConfig(**options))


def finish(client: Client, record: RequestRecord) -> RequestRecord:
    client.start(record, b"{}")
    while not client.poll(client.clock.now() + 0.1):
        pass
    return record


def send(client: Client, count: int) -> list[RequestRecord]:
    """Several requests at once, when all have ended."""
    records = [RequestRecord(id=str(index), planned_s=0.0) for index in range(count)]
    for record in records:
        client.start(record, b"{}")
    while any(record.end_s is None for record in records):
        client.poll(client.clock.now() + 0.1)
    return records


def ask_step_by_step(count: int, tls=None) -> RequestRecord:
    """A record of `count` tokens, each of them sent when the one before has been read."""
    read = threading.Semaphore()

    def answer(peer: Peer) -> bool:
        peer.write(SSE_HEAD)
        for payload in tokens(count):
            read.acquire()
            peer.write(chunk(event(payload)))
        peer.write(chunk(b""))
        return True

    with ScriptedServer(answer, tls=tls) as server, Client(server.url) as client:
        record, seen = RequestRecord(id="r", planned_s=client.clock.now()), 0
        client.start(record, json.dumps(BODY).encode())
        while not client.poll(client.clock.now() + 0.001):
            while seen < len(record.token_s):
                seen += 1
                read.release()
    return record


def test_whole_response_becomes_a_record():
    record = ask_step_by_step(5)
    assert record.error is None and record.finish_reason == "length" and record.counted_by == "token_ids"
    assert record.text == "t0 t1 t2 t3 t4 " and record.prompt_tokens == 5 and record.output_tokens == 5
    assert record.planned_s <= record.sent_s < record.token_s[0] < record.token_s[4] <= record.end_s
    assert len(set(record.token_s)) == 5


def test_arrivals_carry_the_kernel_stamp_even_when_read_late():
    written, looked = [], threading.Event()

    def answer(peer: Peer) -> bool:
        before_s = time.monotonic()
        peer.write(SSE_HEAD + chunk(event(token("a", [1]))))
        written.append((before_s, time.monotonic()))
        if peer.fields["x-request-id"] == "late":
            looked.wait(60)
        peer.write(chunk(event(token("b", [2], "stop"))) + chunk(b""))
        return True

    with ScriptedServer(answer) as server, Client(server.url) as client:
        # The kernel begins to stamp some milliseconds after it was asked to.
        wait_until(lambda: finish(client, RequestRecord(id="early", planned_s=0.0)).stamp == "kernel")
        written.clear()
        record = RequestRecord(id="late", planned_s=client.clock.now())
        client.start(record, b"{}")
        wait_until(lambda: written)
        time.sleep(0.5)  # a client that does not look
        while not record.token_s:
            client.poll(client.clock.now() + 0.1)
        looked.set()
        wait_until(lambda: client.poll(client.clock.now() + 0.1))
        assert record.stamp == "kernel"
        (before_s, after_s), arrived_s = written[0], record.token_s[0] + client.clock.zero_s
        assert before_s - 0.1 <= arrived_s <= after_s + 0.4  # it was read 0.5 s after it was written


def test_vllm_request_metrics_become_the_queue_and_the_compute_phase():
    record = ask(stream(tokens(2, metrics={"queue_time_ms": 4.0, "time_to_first_token_ms": 10.0})))
    start_s, end_s = record.phases["queue"]
    assert end_s - start_s == pytest.approx(0.004) and record.token_s[0] - end_s == pytest.approx(0.010)
    assert record.phases["compute"] == (end_s, record.token_s[0])


def test_refused_connection_is_a_failure_class():
    record = fetch(f"http://127.0.0.1:{free_port()}", BODY)
    assert record.error.kind == "refused" and record.token_s == [] and record.end_s is not None


PART = chunk(event(token("a", [1])))


def hang(peer: Peer) -> bool:
    peer.write(SSE_HEAD, PART)
    time.sleep(30.0)
    return False


def test_bytes_that_are_no_http_chunk_fail_and_earlier_tokens_are_kept():
    record = ask(lambda peer: peer.write(SSE_HEAD, PART, b"zz\r\nnot a chunk"))
    assert record.error.kind == "bad_http" and len(record.token_s) == 1 and record.text == "a"


def test_stall_and_timeout_are_separate_failure_classes():
    assert ask(hang, request_timeout_s=0.3).error.kind == "timeout"
    config = LoadConfig(read_timeout_s=1.0)
    with ScriptedServer(hang) as server, Client(server.url, config) as client:
        record = finish(client, RequestRecord(id="r", planned_s=0.0))
        assert record.error.kind == "stall" and len(record.token_s) == 1


def test_redirection_says_where_to():
    head = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/v1/completions\r\nContent-Length: 0\r\n\r\n"
    record = ask(lambda peer: peer.write(head))
    assert record.error.kind == "http_307" and record.error.message.startswith(
        "sent on to http://elsewhere/v1/completions"
    )


def test_response_without_an_answer_fails():
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    assert ask(lambda peer: peer.write(switch)).error.kind == "bad_http"
    assert ask(lambda peer: False).error.kind == "reset"


def test_response_may_end_with_the_connection_after_slow_headers():
    def answer(peer: Peer) -> bool:
        for byte in b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n":
            peer.write(bytes([byte]))
            time.sleep(0.001)
        peer.write(event(token("a", [1], "stop")))
        return False

    record = ask(answer)
    assert record.error is None and record.text == "a"


def test_connection_is_reused_and_replaced_when_closed_between_requests():
    with ScriptedServer(stream(tokens(2))) as server, Client(server.url) as client:
        for index in range(5):
            assert finish(client, RequestRecord(id=f"r{index}", planned_s=0.0)).error is None
        assert server.connections == 1
        server.requests[-1].sock.shutdown(socket.SHUT_RDWR)
        # Not polled in between: the client finds out only when it uses the connection.
        time.sleep(0.05)
        record = finish(client, RequestRecord(id="again", planned_s=0.0))
        assert record.error is None and server.connections == 2
        assert server.requests[-1].fields["x-request-id"] == "again"


def test_ipv6_and_localhost_are_reached():
    with ScriptedServer(stream(tokens(2)), host="::1") as server:
        assert fetch(server.url, BODY).error is None
    with ScriptedServer(stream(tokens(2))) as server:
        assert fetch(server.url.replace("127.0.0.1", "localhost"), BODY).error is None


def test_large_body_arrives_whole():
    with ScriptedServer(stream(tokens(2))) as server:
        prompt = "春 water " * 1_000_000
        assert fetch(server.url, BODY | {"prompt": prompt}).error is None
        assert server.requests[0].json["prompt"] == prompt


def test_stream_of_ten_thousand_tokens():
    record = ask(stream(tokens(10_000)))
    assert record.error is None and len(record.token_s) == 10_000 == record.output_tokens
    assert record.token_s == sorted(record.token_s)


def test_many_streams_at_once():
    with ScriptedServer(stream(tokens(20))) as server, Client(server.url) as client:
        assert all(len(record.token_s) == 20 and record.error is None for record in send(client, 100))


def test_api_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ScriptedServer(stream(tokens(1))) as server:
        fetch(f"{server.url}/base/v1/", BODY, LoadConfig(endpoint="chat"))
        assert server.requests[0].fields["authorization"] == "Bearer secret-key"
        assert server.requests[0].head.startswith(b"POST /base/v1/chat/completions HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "url", ["ftp://host", "127.0.0.1:8000", "http://:80", "http://host:port", "http://a..b:80", "http://[::1:80", "http://h/v1?version=1",
     "http://h/v1#x", "http://h/a b", "http://h/\u00fc"],
)  # fmt: skip
def test_unusable_url_is_a_user_error(url):
    with pytest.raises(UserError, match="--url"):
        Client(url)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/chat/completions", "/v1/completions/"])
def test_url_of_the_interface_is_taken_for_its_base(end: str) -> None:
    with ScriptedServer(stream(tokens(1))) as server:
        assert fetch(f"{server.url}/base{end}", BODY).error is None
        assert server.requests[0].path == "/base/v1/completions"


def test_tls_keeps_kernel_stamps_and_checks_the_certificate(tmp_path, monkeypatch):
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ScriptedServer(stream(tokens(50)), tls=context) as server:
        assert fetch(server.url, BODY).error.kind == "tls"
        for model in (None, "m"):  # before a load, whose requests would all fail
            with pytest.raises(UserError, match=r"certificate of .*/v1/models is not trusted .*--no-tls-verify"):
                offered_model(server.url, model)
        monkeypatch.setenv("SSL_CERT_FILE", os.fspath(certificate))
        record = fetch(server.url, BODY | {"prompt": "long " * 100_000})
        assert record.error is None and len(record.token_s) == 50 and record.stamp is not None
        assert record.text == "".join(f"t{index} " for index in range(50))
    assert len(set(ask_step_by_step(5, tls=context).token_s)) == 5


def test_abandoned_request_keeps_what_has_arrived():
    release = threading.Event()

    def answer(peer: Peer) -> bool:
        peer.write(SSE_HEAD, PART)
        release.wait(60.0)
        return False

    with ScriptedServer(answer) as server, Client(server.url) as client:
        record = RequestRecord(id="r", planned_s=0.0)
        client.start(record, b"{}")
        while not record.token_s:
            client.poll(client.clock.now() + 0.1)
        assert client.abandon("interrupted", "Ctrl-C") == [record]
        assert record.error.kind == "interrupted" and record.text == "a"
    release.set()


def test_user_stamps_are_used_and_recorded_without_kernel_stamps(monkeypatch):
    monkeypatch.setattr(connection, "enable_stamps", lambda sock: None)
    record = ask_step_by_step(5)
    assert record.error is None and record.stamp == "user" and len(set(record.token_s)) == 5


def test_stepped_wall_clock_does_not_move_arrivals():
    clock = connection.ArrivalClock(time.monotonic())
    seconds, nanoseconds = divmod(time.time_ns() + 5_000_000_000, 1_000_000_000)
    ahead = [(socket.SOL_SOCKET, 37, struct.pack("@qq", seconds, nanoseconds))]
    at_s, kernel = clock.arrival(ahead)
    assert not kernel and at_s < 4.0 and len(clock.read_delays_s) == 0


def test_wall_clock_that_was_stepped_back_does_not_move_arrivals(monkeypatch):
    clock = connection.ArrivalClock(time.monotonic())
    unix_s = time.time
    monkeypatch.setattr(time, "time", lambda: unix_s() - 5.0)
    for before_s in (0.0, -5.0):  # stamped before the step, and after it
        seconds, nanoseconds = divmod(time.time_ns() + int(before_s * 1e9), 1_000_000_000)
        at_s, _ = clock.arrival([(socket.SOL_SOCKET, 37, struct.pack("@qq", seconds, nanoseconds))])
        assert -0.1 < at_s <= clock.now() and clock.now() - at_s < 4.0
    clock = connection.ArrivalClock(time.monotonic())
    late = divmod(time.time_ns() - 5_000_000_000 - 300_000_000, 1_000_000_000)  # no step: it was read so late
    at_s, kernel = clock.arrival([(socket.SOL_SOCKET, 37, struct.pack("@qq", *late))])
    assert kernel and 0.25 < clock.now() - at_s < 3.0 and clock.read_delays_s[-1] > 0.25


@pytest.mark.parametrize("asked", [8, 100_000])
def test_time_limit_of_a_whole_answer_follows_the_tokens_asked_for(asked):
    answer = stream(tokens(12), pause_s=0.2)
    with ScriptedServer(answer) as server:
        record = fetch(server.url, BODY | {"max_tokens": asked}, LoadConfig(request_timeout_s=1.5))
    assert (record.error and record.error.kind) == ("timeout" if asked == 8 else None)


def test_answer_that_never_begins_ends_after_the_time_limit_whatever_was_asked_for():
    record = ask(lambda peer: time.sleep(60.0), request_timeout_s=0.2)
    assert record.error.kind == "timeout" and record.end_s < 30
    body = BODY | {"max_tokens": 100_000}
    with ScriptedServer(lambda peer: time.sleep(60.0)) as server:
        record = fetch(server.url, body, LoadConfig(request_timeout_s=0.2))
    assert record.error.kind == "timeout" and record.end_s - record.sent_s < 30
