"""What the proxy refuses: ambiguous framing, malformed HTTP, large or slow requests, and missing keys."""

import socket
import subprocess
import sys
import time

import pytest

from tests.support.proxy_processes import instance, proxy, read_answer

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"model":"m","prompt":"Hi"}'


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A proxy with small limits, and its instance."""
    folder = tmp_path_factory.mktemp("guarded")
    options = ("--max-body-mib", "0.01", "--max-header-kib", "4", "--request-timeout-s", "1", "--idle-timeout-s", "2")
    with instance(folder, "decode") as decode:
        with proxy(folder, *options, "--max-connections", "20", decode=[decode]) as server:
            yield server, decode


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        POST
        + b"Content-Length: 27\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        + POST
        + b"Content-Length: 2\r\n\r\n{}",
        POST + b"Content-Length: 27\r\nContent-Length: 28\r\n\r\n" + BODY,
        POST + b"Content-Length: +27\r\n\r\n" + BODY,
        POST + b"Content-Length : 27\r\n\r\n" + BODY,
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1b\n" + BODY + b"\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b" folded: x\r\n\r\n",
        POST + b"X: a\x00b\r\n\r\n",
        POST + b"X: a\nContent-Length: 5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\nHost: x\n\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        POST + b"Host: y\r\nContent-Length: 0\r\n\r\n",
        b"GET http://other/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT other:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_ambiguous_or_malformed_http_is_refused_and_closed(guarded, data):
    server, decode = guarded
    before = len(decode.requests())
    with server.connect() as connection:
        connection.sendall(data)
        answer = read_answer(connection)
        assert answer.status in (400, 405, 505)
        assert answer.headers["connection"] == "close"
        assert connection.recv(1) == b""
    assert len(decode.requests()) == before


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [("PUT", "/v1/completions", 405), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/x", 404),
     ("GET", "/v1/../instances", 404), ("POST", "/reset_prefix_cache", 404), ("GET", "//health", 404), ("POST", "/v1/x/drain", 404)],
)  # fmt: skip
def test_unknown_path_or_method_is_refused(guarded, method, target, status):
    answer = guarded[0].request(method, target)
    assert answer.status == status
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b"\xff", b'{"a":}', b"[" * 5000, b'{"a":' * 1500, b"1e999", b'{"a":"\xff"}']
)
def test_body_that_is_no_json_object_is_a_400(guarded, body):
    answer = guarded[0].request("POST", "/v1/completions", body)
    assert answer.status == 400
    assert "JSON object" in answer.json["error"]["message"]


def test_large_body_or_head_is_refused(guarded):
    server, _ = guarded
    assert server.request("POST", "/v1/completions", b"x" * 20000).status == 413
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    assert server.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3).status == 413
    assert server.send(POST + b"X: " + b"x" * 8000 + b"\r\n\r\n").status == 431
    assert server.send(POST + b"X: " + b"x" * 8000).status == 431
    assert server.send(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 8000)).status == 431
    assert server.send(POST + b"".join(b"X-%d: x\r\n" % i for i in range(200)) + b"\r\n").status == 431
    tiny = b"1;" + b"e" * 100 + b"\r\nx\r\n"
    assert server.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + tiny * 1000).status == 413


def test_head_within_the_limit_is_served_however_it_is_cut(guarded, tmp_path):
    head = POST + b"X: " + b"x" * 3000 + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    with (
        proxy(tmp_path, "--max-header-kib", "4", decode=[guarded[1]]) as server,
        server.connect() as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(head), 1000):
            connection.sendall(head[start : start + 1000])
            time.sleep(0.05)
        connection.sendall(BODY)
        assert read_answer(connection).status == 200
        # Sent ahead: the end of a large body, and the beginning of the next head.
        large = b'{"model":"m","prompt":"%b"}' % (b"x" * 9000)
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(large) + large + head[:1000])
        assert read_answer(connection).status == 200
        connection.sendall(head[1000:] + BODY)
        assert read_answer(connection).status == 200


def test_client_that_sends_on_sees_the_refusal_instead_of_a_reset(guarded):
    size = 64 * 2**20
    with guarded[0].connect() as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size // 2**20):
            connection.sendall(bytes(2**20))
        assert read_answer(connection).status == 413
        assert connection.recv(1) == b""


def test_incomplete_request_is_a_408(guarded):
    for begun in (POST, POST + b"Content-Length: 27\r\n\r\n{"):
        assert guarded[0].send(begun).status == 408


@pytest.mark.parametrize("begun", [POST, POST + b"Content-Length: 1000\r\n\r\n"], ids=["head", "body"])
def test_dripping_request_is_a_408(guarded, begun):
    with guarded[0].connect() as connection:
        connection.settimeout(0.2)
        connection.sendall(begun)
        for _ in range(50):
            connection.sendall(b"x")
            try:
                assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 408"
                return
            except TimeoutError:
                continue
    raise AssertionError("the proxy waits for a request that takes 10 s to arrive")


def test_idle_connection_is_closed(guarded):
    with guarded[0].connect() as connection:
        assert connection.recv(1) == b""


def test_connections_are_limited(guarded):
    server, _ = guarded
    connections = [server.connect() for _ in range(40)]
    answers = []
    for connection in connections:
        connection.settimeout(0.3)
        try:
            answers.append(connection.recv(2000))
        except TimeoutError:
            answers.append(None)
    assert sum(answer is not None and answer.startswith(b"HTTP/1.1 503") for answer in answers) >= 20
    for connection in connections:
        connection.close()


def test_pipelined_requests_are_answered_in_order_and_limited(guarded):
    request = POST + b"Content-Length: 27\r\n\r\n" + BODY
    with guarded[0].connect() as connection:
        connection.sendall(request + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        reader = connection.makefile("rb")
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
        text = reader.read(1)
        while b"HTTP/1.1 200 OK" not in text:
            text += reader.read(1)
    with guarded[0].connect() as connection:
        connection.sendall(request * 40)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        assert b"429 Too Many Requests" in received


def test_hop_by_hop_headers_are_not_forwarded(guarded):
    server, decode = guarded
    answer = server.request(
        "POST", "/v1/completions", BODY, TE="trailers", X_Other="kept", Proxy_Authorization="secret"
    )
    assert answer.status == 200
    headers = decode.requests()[-1]["headers"]
    assert headers["x-other"] == "kept"
    assert not {"te", "proxy-authorization", "connection"} & set(headers)


@pytest.mark.parametrize("request_id", ["x y", "a" * 300, "é"])
def test_invalid_request_id_is_replaced(guarded, request_id):
    server, decode = guarded
    assert server.request("POST", "/v1/completions", BODY, X_Request_Id=request_id).status == 200
    assert len(decode.requests()[-1]["headers"]["x-request-id"]) == 32


def test_keys_open_what_they_are_for(tmp_path):
    keys = {
        "PDBENCH_PROXY_API_KEY": "user-key",
        "PDBENCH_PROXY_ADMIN_KEY": "admin-key",
        "PDBENCH_UPSTREAM_API_KEY": "inner-key",
    }
    with instance(tmp_path, "decode") as decode, proxy(tmp_path, decode=[decode], **keys) as server:
        assert server.complete().status == 401
        assert server.request("GET", "/v1/models").status == server.request("GET", "/metrics").status == 401
        assert server.request("POST", "/v1/completions", BODY, Authorization="Bearer user-kez").status == 401
        assert server.request("POST", "/v1/completions", BODY, Authorization="Bearer user-key").status == 200
        assert decode.requests()[-1]["headers"]["authorization"] == "Bearer inner-key"
        assert server.request("GET", "/instances", Authorization="Bearer user-key").status == 401
        assert server.request("GET", "/instances", Authorization="Bearer admin-key").status == 200
        assert server.request("GET", "/instances", Authorization="Bearer admin-key", Origin="http://evil").status == 403
        assert "user-key" not in server.log.read_text()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs a socket for IPv4 and IPv6")
def test_instances_path_is_open_to_this_host_on_both_families(guarded, tmp_path):
    with proxy(tmp_path, "--host", "::", decode=[guarded[1]]) as server:  # which the test asks at 127.0.0.1
        assert server.request("GET", "/instances").status == 200


@pytest.mark.parametrize("header", ["Forwarded", "X_Forwarded_For", "X_Real_IP", "Via"])
def test_instances_path_refuses_forwarded_requests(guarded, header):
    server, _ = guarded
    assert server.request("GET", "/instances").status == 200
    assert server.request("GET", "/instances", **{header: "for=10.1.2.3"}).status == 403


def test_client_key_is_forwarded_if_the_proxy_has_none(guarded):
    server, decode = guarded
    assert server.request("POST", "/v1/completions", BODY, Authorization="Bearer abc").status == 200
    assert decode.requests()[-1]["headers"]["authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--decode", "http://127.0.0.1:1"], "--connector none"),
        (["--prefill", "http://127.0.0.1:1"], "add --decode"),
        (["--connector", "none", "--prefill", "http://a:1", "--decode", "http://a:2"], "has no prefill"),
        (["--prefill", "ftp://x", "--decode", "http://127.0.0.1:1"], "write http://HOST:PORT"),
        (["--prefill", "http://a:1", "--decode", "http://a:2", "--workers", "257"], "--workers"),
        (["--prefill", "http://a:1", "--decode", "http://a:2", "--event-log", "/proc/x/y"], "event log"),
    ],
)
def test_invalid_options_are_a_one_line_error(options, words):
    argv = [sys.executable, "-m", "pdbench", "proxy", "--port", "0", *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        argv = [sys.executable, "-m", "pdbench", "proxy", "--port", str(port), "--connector", "none"]
        done = subprocess.run([*argv, "--decode", "http://127.0.0.1:1"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, str(port) in done.stderr) == (1, True)
