"""Random inputs: bytes, JSON bodies, and requests to every path of the OpenAPI description.

CI sends a few hundred. For 100,000: PDBENCH_FUZZ_INPUTS=100000 pytest tests/proxy/test_fuzz.py --timeout 3600
"""

import json
import os
import socket

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from tests.support.proxy_processes import instance, proxy, read_answer

INPUTS = int(os.environ.get("PDBENCH_FUZZ_INPUTS", "150"))
SETTINGS = settings(max_examples=INPUTS)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A proxy whose instances answer anything; at the end it must be alive, empty, and have logged no traceback."""
    folder = tmp_path_factory.mktemp("fuzz")
    with instance(folder, "prefill", "--same-answer") as prefill, instance(folder, "decode", "--same-answer") as decode:
        with proxy(folder, "--first-token", "decode", prefill=[prefill], decode=[decode]) as server:
            yield server
            assert server.complete().status == 200
            server.wait_idle()


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
def test_random_bytes_get_an_answer_or_a_close(target, data, cut):
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
     "prompt_logprobs", "use_beam_search", "kv_transfer_params", "stream_options", "tools", "logprobs", "temperature", "stop",
     "return_token_ids", "seed", "user"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | NAMES, inner, max_size=4)
)
OBJECTS = st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=8)

# The same as bytes: what no JSON encoder writes, and what a client would really send.
ODD = st.sampled_from(
    [b"null", b"true", b"false", b"0", b"-0", b"1", b"2", b"-1", b"1.5", b"1e999", b"-1e-999", b"9" * 400, b"1" + b"0" * 19,
     b"0.1e+05", b"01", b"+1", b".5", b"1.", b"0x10", b"NaN", b"-Infinity", b"nul", b'""', b'"a"', b"'a'", b'"\\ud800"',
     b'"\\udc00\\ud800"', b'"\\uZZZZ"', b'"\\q"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\x00"', b'"\n"', b'"open',
     b'"\\u0000"', b"[]", b"{}", b"[[]]", b"[1,2,3]", b"[1, 2,]", b"[,]", b'["a","b"]', b"[[1],[2]]", b"[1,-1,1e400]", b"[null]",
     b'{"a":1,"a":2}', b'{"a"}', b'{"a":}', b"{1:2}", b'{"include_usage":true}', b'{"remote_host":"10.0.0.1","remote_port":1}',
     b'[{"role":"user","content":"Hi"}]', b"[" * 700 + b"]" * 700, b"[" * 3000, b'{"a":' * 1500 + b"1" + b"}" * 1500,
     b'{"a":[' * 700, b"9" * 5000, b"", b" ", b"\xef\xbb\xbf1", b"1 2", b"/*1*/1", b"1}", b"]"]
)  # fmt: skip
RAW = ODD | SCALARS.map(lambda value: json.dumps(value).encode())
KEYS = NAMES.map(lambda name: b'"%b"' % name.encode()) | ODD
PAIRS = st.lists(st.tuples(KEYS, RAW), max_size=4)
VALID = st.sampled_from(
    [
        [(b'"model"', b'"m"'), (b'"prompt"', b'"Hi"'), (b'"max_tokens"', b"4")],
        [(b'"prompt"', b'"Hi"'), (b'"temperature"', b"0"), (b'"stream"', b"true"), (b'"max_tokens"', b"4")],
        [(b'"prompt"', b"[1,2,3]"), (b'"temperature"', b"0"), (b'"stream"', b"true"), (b'"return_token_ids"', b"true")],
        [(b'"messages"', b'[{"role":"user","content":"Hi"}]'), (b'"n"', b"1"), (b'"stream"', b"false")],
    ]
)


@st.composite
def bodies(draw):
    """A valid request with fields replaced, repeated, added, taken out, put in another order; then bytes of it spoilt."""
    pairs = list(draw(VALID))
    for at in draw(st.lists(st.integers(0, len(pairs) - 1), max_size=2)):
        pairs[at] = (pairs[at][0], draw(RAW))
    pairs += draw(PAIRS)
    if draw(st.booleans()):
        pairs = draw(st.permutations(pairs))
    comma, colon = draw(
        st.sampled_from([(b",", b":"), (b" , ", b" : "), (b",\n", b":\t"), (b",,", b":"), (b";", b"=")])
    )
    body = b"{" + comma.join(key + colon + value for key, value in pairs) + b"}"
    for at, piece in draw(st.lists(st.tuples(st.integers(0, len(body)), st.binary(max_size=3)), max_size=2)):
        body = body[:at] + piece + body[at + len(piece) :]
    return body[: draw(st.integers(0, len(body)))] if draw(st.integers(0, 9)) == 0 else body


@pytest.fixture(scope="module")
def line(target):
    """One kept connection, replaced when an answer has ended it."""
    kept = Line(target)
    yield kept
    kept.connection.close()


class Line:
    """Requests one after another to the proxy."""

    def __init__(self, server) -> None:
        self.server, self.connection = server, server.connect()

    def complete(self, path: str, body: bytes):
        """The answer to one request."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        keep = False
        try:
            self.connection.sendall(head.encode() + body)
            answer = read_answer(self.connection)
            # A stream that ends in an error event is closed whatever its head promised.
            keep = answer.headers["connection"] == "keep-alive" and b'data: {"error"' not in answer.body
        finally:
            if not keep:
                self.connection.close()
                self.connection = self.server.connect()
        return answer


@SETTINGS
@given(
    path=st.sampled_from(["/v1/completions", "/v1/completions", "/v1/chat/completions"]),
    body=bodies()
    | OBJECTS.map(lambda value: json.dumps(value).encode())
    | VALUES.map(lambda value: json.dumps(value).encode()),
)
@example(path="/v1/completions", body=b'{"prompt":' + b"[" * 1_000_000)
@example(path="/v1/completions", body=b'{"a":' * 200_000 + b"1" + b"}" * 200_000)
@example(path="/v1/completions", body=b'{"temperature":0,"stream":true,"prompt":"' + b"x" * 1_000_000 + b'"}')
@example(path="/v1/completions", body=b'{"temperature":0,"stream":true,"prompt":"a","max_tokens":"5"}')
@example(path="/v1/completions", body=b'{"temperature":0,"stream":null,"prompt":"a"}')
def test_random_json_is_served_or_refused(line, path, body):
    note(f"{path} {body[:1000]!r}")
    answer = line.complete(path, body)
    note(f"{answer}")
    assert answer.complete
    if answer.status == 200:
        assert answer.body.endswith(b"data: [DONE]\n\n") or answer.json["choices"]
    else:
        assert answer.status == 400
        assert answer.json["error"]["type"] == "invalid_request_error"


@settings(SETTINGS, max_examples=max(INPUTS // 10, 20))
@given(bodies=st.lists(OBJECTS | VALUES, min_size=1, max_size=3), name=st.text(max_size=12))
def test_random_bodies_get_answers_of_the_openapi_description(target, bodies, name):
    description = target.request("GET", "/openapi.json").json
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
