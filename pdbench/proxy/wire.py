"""HTTP/1.1 heads and error bodies, as bytes: what the proxy says to clients and to instances. Parsing is httptools' work.

Try: python -c "from pdbench.proxy.wire import answer; print(answer(200, b'{}').decode())"
"""

from http import HTTPStatus
from typing import Any

import msgspec

Headers = list[tuple[bytes, bytes]]

# Headers of one connection, not of the message (RFC 9110, 7.6.1), and those the proxy writes itself.
_OWN_REQUEST_HEADERS = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"host content-length expect accept-encoding x-request-id authorization".split()
)
_OWN_REPLY_HEADERS = frozenset(
    b"connection keep-alive proxy-authenticate proxy-connection te trailer transfer-encoding upgrade content-length".split()
)
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def header(headers: Headers, name: bytes) -> bytes | None:
    """The value of the header `name` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def request(
    method: bytes, target: bytes, host: bytes, headers: Headers, body: bytes, request_id: bytes, key: bytes | None
) -> bytes:
    """A whole request to an instance: the client's own headers, framed anew, so that no framing trick can pass."""
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\nX-Request-Id: %b" % (method, target, host, request_id)]
    lines += [b"%b: %b" % pair for pair in headers if pair[0] not in _OWN_REQUEST_HEADERS]
    if key is not None:
        lines.append(b"Authorization: " + key)
    if method == b"POST" or body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def head(status: int, headers: Headers, *, length: int | None, chunked: bool, keep_alive: bool) -> bytes:
    """The head of an answer to a client; its length is known, or its body is chunked, or it lasts until the close."""
    lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"Unknown"))]
    lines += [b"%b: %b" % pair for pair in headers if pair[0] not in _OWN_REPLY_HEADERS]
    if length is not None:
        lines.append(b"content-length: %d" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked")
    lines.append(b"connection: keep-alive" if keep_alive else b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def answer(status: int, body: bytes, *, headers: Headers | None = None, keep_alive: bool = True) -> bytes:
    """A whole answer of the proxy itself; its body is JSON unless `headers` say otherwise."""
    headers = headers or []
    if header(headers, b"content-type") is None:
        headers = [(b"content-type", b"application/json"), *headers]
    return head(status, headers, length=len(body), chunked=False, keep_alive=keep_alive) + body


def error_body(status: int, message: str, *, stage: str | None = None) -> bytes:
    """An error in OpenAI's form; `stage` names where a request failed (request, queue, prefill, decode)."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    if stage is not None:
        error["stage"] = stage
    return msgspec.json.encode({"error": error})
