"""One client's connection: reads its requests within limits, serves them one after another, and writes the answers.

HTTP is written by hand here, in messages.py and in upstream.py (httptools parses it): a proxy's cost is its work per
token, one read and one write. On an HTTP framework a token costs three times as much (docs/results/proxy.md).
"""

import asyncio
import contextlib
import fcntl
import os
import re
import sys
import termios
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from typing import Any

import httptools

from pdbench.config import ProxyConfig
from pdbench.proxy import first_token, messages
from pdbench.proxy.messages import ClientRequest, Headers, RequestError
from pdbench.proxy.upstream import UpstreamRequest

METHODS = (b"GET", b"POST", b"DELETE")
MAX_HEADERS = 128
MAX_PIPELINED = 16
# How long a refused client may go on sending: closing a socket that has unread bytes resets it, and the client may then
# lose the answer.
LINGER_S = 2.0
MAX_HELD_BYTES = 16 * 2**20
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")


@dataclass(eq=False)
class ClientConnection(asyncio.Protocol):
    """`handle` answers a request, `connections` are all open connections of this worker."""

    handle: Callable[[ClientRequest, "ClientConnection"], Coroutine[Any, Any, None]]
    config: ProxyConfig
    connections: "set[ClientConnection]"
    transport: asyncio.Transport = field(init=False)
    request: ClientRequest | None = None
    decode: UpstreamRequest | None = None
    """Whose events are passed on."""
    last_request: bool = False
    _waiting: list[ClientRequest] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None
    _paused: bool = False
    _refusal: RequestError | None = None
    _quiet_s: float = 0.0
    _unread: int = 0

    def __post_init__(self) -> None:
        self._head_limit = int(self.config.max_header_kib * 2**10)
        self._body_limit = int(self.config.max_body_mib * 2**20)
        self._parser = httptools.HttpRequestParser(self)
        self._begin()

    @property
    def busy(self) -> bool:
        return self._task is not None or self._in_message or self.transport.get_write_buffer_size() > 0

    @property
    def keep_alive(self) -> bool:
        return self.request is not None and self.request.keep_alive and not self.last_request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.connections.add(self)
        if len(self.connections) > ceil(self.config.max_connections / self.config.workers):
            self._refuse_and_close(RequestError(503, "too many connections: try again later"))
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.connections.discard(self)
        self._waiting.clear()
        if self.decode is not None:
            # Before the task hears of it: what an instance sends until then could not be written any more.
            self.decode.end("the client left")
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        headers = self._headers  # each request has a list of its own
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "only HTTP/1.1 is spoken here: send no Upgrade")
        except httptools.HttpParserError as error:
            self._refuse(400, f"not a valid HTTP/1.1 request: {str(error)[:100]}")
        # A request that begins behind an earlier one's end counts from the next piece on.
        if self._in_message and self._headers is headers:
            self._raw_bytes += len(data)
            if not self._head_done and self._raw_bytes > self._head_limit:
                self._refuse(431, f"the request's head is larger than {self._head_limit} bytes")
            elif self._raw_bytes > 2 * self._body_limit + 65536:
                self._refuse(413, "the request's chunks carry too little data")
        if self._refusal is not None:
            self._refuse_and_close(self._refusal)

    def pause_writing(self) -> None:
        """The client reads its answer more slowly than it comes."""
        self._paused = True
        self._quiet_s = 0.0
        if self.decode is not None:
            self.decode.pause(True)

    def resume_writing(self) -> None:
        self._paused = False
        self._quiet_s = 0.0
        if self.decode is not None:
            self.decode.pause(False)

    def tick(self, seconds: float) -> None:
        """Count time: ends the connection of a client that is silent, slow to send, or does not read its answer."""
        self._quiet_s += seconds
        if self._paused:
            unread = self._count_unread()
            if unread < self._unread:  # slow, but reading
                self._quiet_s = 0.0
            self._unread = unread
        if self._in_message and self._task is None:
            self._sending_s += seconds
            limit_s = self.config.request_timeout_s
            if self._sending_s > limit_s:
                self._refuse_and_close(RequestError(408, f"the request took over {limit_s:g} s to arrive"))
        elif self._quiet_s > self.config.idle_timeout_s:
            if self._paused:
                self.transport.abort()
            elif self._task is None:
                self.transport.close()

    def _count_unread(self) -> int:
        """How many bytes of the answer wait for the client, here and in the kernel."""
        queued = bytes(4)
        with contextlib.suppress(OSError, ValueError):  # the descriptor may be closed already
            queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def respond(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Write a whole answer to the request being served, if the client is still there."""
        if self.transport.is_closing():
            return
        self.transport.write(messages.response(status, body, headers or [], keep_alive=self.keep_alive))
        if not self.keep_alive:
            self.transport.close()

    # httptools calls the next six, in this order, for each request.

    def on_message_begin(self) -> None:
        self._in_message = True

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # trailers after a body are not forwarded
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Refuse what can be refused before the body is read."""
        self._head_done = True
        names = [name for name, _ in self._headers]
        version = self._parser.get_http_version()
        length = messages.header(self._headers, b"content-length")
        size = len(self._target) + sum(map(len, chain.from_iterable(self._headers)))
        if len(names) > MAX_HEADERS or size > self._head_limit:
            self._refuse(431, f"the head is larger than {self._head_limit} bytes or {MAX_HEADERS} headers")
        if version not in ("1.0", "1.1"):
            self._refuse(505, "only HTTP/1.1 is spoken here")
        elif self._parser.should_upgrade():
            self._refuse(400, "only HTTP/1.1 is spoken here: send no Upgrade")
        elif not self._target.startswith(b"/"):
            self._refuse(400, "the request's target must begin with /")
        elif names.count(b"host") != 1 and (version == "1.1" or names.count(b"host") > 1):
            self._refuse(400, "one Host header is needed")
        elif names.count(b"transfer-encoding") > 1 or (version == "1.0" and b"transfer-encoding" in names):
            self._refuse(400, "the request's framing is ambiguous")
        elif length is not None and int(length) > self._body_limit:
            self._refuse(413, f"the body is larger than {self._body_limit} bytes")
        elif (messages.header(self._headers, b"expect") or b"").lower() == b"100-continue" and self._task is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._body_limit:
            self._refuse(413, f"the body is larger than {self._body_limit} bytes")

    def on_message_complete(self) -> None:
        if self._refusal is not None:
            return
        method = self._parser.get_method()
        request_id = messages.header(self._headers, b"x-request-id") or b""
        request = ClientRequest(
            method=method,
            target=self._target,
            headers=self._headers,
            body=b"".join(self._body),
            received_s=time.monotonic(),
            # Answers to other methods may have another framing: a HEAD's has no body.
            keep_alive=self._parser.should_keep_alive() and method in METHODS,
            http_1_0=self._parser.get_http_version() == "1.0",
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else os.urandom(16).hex().encode(),
        )
        self._begin()
        self._waiting.append(request)
        if len(self._waiting) > MAX_PIPELINED:
            self._refuse(429, f"more than {MAX_PIPELINED} requests sent ahead on one connection")
        elif self._task is None:
            self._serve_next()

    def _begin(self) -> None:
        self._in_message = self._head_done = False
        self._raw_bytes = self._body_bytes = 0
        self._sending_s = 0.0
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []

    def _serve_next(self) -> None:
        self.request = self._waiting.pop(0)
        self._task = asyncio.create_task(self.handle(self.request, self))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = self.request = self.decode = None
        self._quiet_s = 0.0
        if not task.cancelled() and task.exception() is not None:
            context = {"message": "a request's handler failed", "exception": task.exception()}
            asyncio.get_running_loop().call_exception_handler(context)
            self.transport.abort()
        elif self._refusal is not None:
            self._refuse_and_close(self._refusal)
        elif self._waiting and not self.transport.is_closing():
            self._serve_next()

    def _refuse(self, status: int, message: str) -> None:
        if self._refusal is None:
            self._refusal = RequestError(status, message)

    def _refuse_and_close(self, refusal: RequestError) -> None:
        """Answer with an error, after the answers to earlier requests, and end the connection."""
        self._refusal = refusal
        self._waiting.clear()
        if self._task is not None or self.transport.is_closing():
            return
        self._begin()
        with contextlib.suppress(OSError):
            self.transport.write(messages.response(refusal.status, refusal.body, refusal.headers, keep_alive=False))
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)


class EventStream:
    """The streamed answer to a client, made of decode's events; `edit` may change them, and be set to another or None.

    Only whole events are passed on, so that an error event can always follow the last one.
    """

    def __init__(self, client: ClientConnection, headers: Headers) -> None:
        assert client.request is not None
        self.held = bytearray()
        self.last = b""
        self._client = client
        self.edit: Callable[[bytes], bytes] | None = None
        self._dialect = client.request.dialect
        self.transport = client.transport
        self._chunked = not client.request.http_1_0
        keep_alive = client.keep_alive and self._chunked
        self._head = messages.response_head(200, headers, length=None, chunked=self._chunked, keep_alive=keep_alive)
        self._write = client.transport.write

    def begin(self, events: bytes) -> None:
        self._write(self._head + self._frame(events))
        self._head = b""

    def follow(self, decode: UpstreamRequest) -> None:
        """Pass on the part of decode's body that is there, and the rest as it arrives."""
        self._client.decode = decode
        self.held.clear()
        first = self._whole_events(decode.body)
        decode.chunks = []
        if first and self.edit is not None:
            first = self.edit(first)
        self.last = first
        if decode.finished.done():
            self._head += self._frame(first)  # all in one write
            return
        self.begin(first)
        decode.consume = self.pass_on
        if self._chunked:
            decode.relay_to(self, None if self.edit is None else first_token.EDITED)

    def pass_on(self, body: bytes) -> None:
        body = self._whole_events(body)
        if not body:
            return
        if self.edit is not None:
            body = self.edit(body)
            if not body:
                return
        self.last = body
        self._write(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def close(self) -> str | None:
        """End the client's stream after decode has ended; returns what failed, which the client was sent, or None."""
        decode = self._client.decode
        assert decode is not None
        # The end of the body ends an event that lacks its blank line.
        rest, error = bytes(self.held).rstrip(), None
        held = rest + b"\n\n" if rest else b""
        if not self._dialect.is_end(held or self.last):  # what fails behind the last event costs the client nothing
            missing = (self._dialect.ends or (b"[DONE]",))[0].decode()
            error = decode.error or f"decode ended the stream without {missing}"
        if error is None:
            self._end(held)
        else:
            status = 504 if decode.timed_out else 502
            self.fail(RequestError(status, f"decode failed mid-stream: {error}", stage="decode"))
        return error

    def fail(self, error: RequestError) -> None:
        """End the client's stream with an error event, and the connection."""
        self._client.last_request = True
        self._end(b"%bdata: %b\n\n" % (self._dialect.error_event, error.body))

    def _end(self, last: bytes) -> None:
        client = self._client
        if client.transport.is_closing():
            return
        self._write(self._head + self._frame(last) + (b"0\r\n\r\n" if self._chunked else b""))
        if not (client.keep_alive and self._chunked):
            client.transport.close()

    def _frame(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked and body else body

    def _whole_events(self, body: bytes) -> bytes:
        if not self.held and body.endswith(_EVENT_ENDS):  # nearly every piece
            return body
        held, seen = self.held, max(0, len(self.held) - 3)  # an event's end may lie in two pieces
        held += body
        cut = max(at + len(end) if (at := held.rfind(end, seen)) >= 0 else 0 for end in _EVENT_ENDS)
        whole = bytes(held[:cut])
        del held[:cut]
        if len(held) > MAX_HELD_BYTES:
            assert self._client.decode is not None
            self._client.decode.end(f"one event is larger than {MAX_HELD_BYTES} bytes")
        return whole
