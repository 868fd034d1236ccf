"""Inputs that nobody thought of: over HTTP, over JSON, and against the proxy's own OpenAPI description.

CI sends a few hundred. For 100,000: PDBENCH_FUZZ_INPUTS=100000 pytest tests/test_proxy_fuzz.py --timeout 3600
"""

import json
import os
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy_processes import instance, proxy, read_answer

INPUTS = int(os.environ.get("PDBENCH_FUZZ_INPUTS", "150"))
SETTINGS = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=INPUTS == 150,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A proxy whose instances answer anything; at the end it must be alive, empty, and have logged no traceback."""
    folder = tmp_path_factory.mktemp("fuzz")
    with instance(folder, "prefill", "--deaf") as prefill, instance(folder, "decode", "--deaf") as decode:
        with proxy(folder, prefill=[prefill], decode=[decode]) as server:
            yield server
            assert server.complete().status == 200
            assert server.in_flight() == 0


PIECES = st.sampled_from(
    [b"GET ", b"POST ", b"DELETE ", b"CONNECT ", b"/v1/completions", b"/v1/chat/completions", b"/health", b"/instances",
     b"/instances/decode-1", b"/metrics", b"/v1/models", b"*", b"http://x/", b"?a=b", b"#", b"%00", b" HTTP/1.1\r\n",
     b" HTTP/1.0\r\n", b" HTTP/9.9\r\n", b"Host: x\r\n", b"Content-Length: 2\r\n", b"Content-Length: 0\r\n",
     b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n",
     b"Transfer-Encoding: gzip, chunked\r\n", b"Connection: close\r\n", b"Connection: keep-alive, Upgrade\r\n",
     b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"X-Request-Id: a\r\n", b"Authorization: Bearer x\r\n",
     b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"{}", b"0\r\n\r\n", b"2\r\n{}\r\n", b"ffffffffffffffff\r\n", b"-2\r\n",
     b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}']
)  # fmt: skip


@SETTINGS
@given(st.lists(PIECES | st.binary(max_size=12), max_size=16).map(b"".join), st.integers(0, 60))
def test_any_bytes_get_an_answer_or_a_close(target, data, cut):
    with target.connect() as connection:
        connection.settimeout(20)
        try:
            connection.sendall(data[:cut])
            connection.sendall(data[cut:])
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while piece := connection.recv(65536):
                received += piece
        except (ConnectionError, OSError) as error:
            assert not isinstance(error, TimeoutError), "the proxy neither answered nor closed"
            return
    assert not received or received.startswith(b"HTTP/1.1 ")


NAMES = st.sampled_from(
    ["model", "prompt", "messages", "stream", "max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of", "echo",
     "prompt_logprobs", "use_beam_search", "kv_transfer_params", "stream_options", "tools", "logprobs"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | NAMES, inner, max_size=4)
)
OBJECTS = st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=8)


@SETTINGS
@given(body=OBJECTS | VALUES, spoil=st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=3)))
def test_any_json_is_served_or_refused_by_name(target, body, spoil):
    data = json.dumps(body).encode()
    if spoil is not None:
        at, piece = spoil
        data = data[:at] + piece + data[at + 1 :]
    answer = target.ask("POST", "/v1/completions", data or b" ")
    assert answer.complete
    assert answer.status == 200 or (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")


@settings(SETTINGS, max_examples=max(INPUTS // 10, 20))
@given(bodies=st.lists(OBJECTS | VALUES, min_size=1, max_size=3), name=st.text(max_size=12))
def test_every_answer_is_one_that_the_description_names(target, bodies, name):
    description = target.ask("GET", "/openapi.json").json
    quoted = "".join(f"%{byte:02x}" for byte in name.encode())
    with target.connect() as connection:
        for path, operations in description["paths"].items():
            for method in (name for name in operations if name != "parameters"):
                for body in bodies:
                    data = b"" if method == "get" else json.dumps(body).encode()
                    lines = f"{method.upper()} {path.replace('{id}', quoted)} HTTP/1.1\r\nHost: x\r\n"
                    connection.sendall(f"{lines}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                    answer = read_answer(connection)
                    if str(answer.status) not in operations[method]["responses"]:
                        error = answer.json["error"]
                        assert error["code"] == answer.status
                        assert {"message", "type", "code"} <= set(error)
