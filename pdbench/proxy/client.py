"""One client's connection: reads its requests within limits, serves them one after another, and writes the answers.

HTTP is written by hand here, in messages.py and in upstream.py (httptools parses it): a proxy's cost is its work per
token, which is one read and one write here. On an HTTP framework a token costs three times as much
(docs/results/proxy.md).
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httptools

from pdbench.proxy import messages
from pdbench.proxy.messages import ClientRequest, Headers, RequestError

METHODS = (b"GET", b"POST", b"DELETE")
MAX_HEADERS = 128
MAX_PIPELINED = 16
# How long a refused client may go on sending: closing a socket that has unread bytes resets it, and the client may then
# lose the answer.
LINGER_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may do: connections, bytes of a head and of a body, seconds between requests and for sending one."""

    connections: int
    head_bytes: int
    body_bytes: int
    idle_s: float
    request_s: float


class ClientConnection(asyncio.Protocol):
    """`handle` answers a request, `methods_of` gives a path's methods, `connections` are all open connections."""

    transport: asyncio.Transport

    def __init__(
        self,
        handle: Callable[[ClientRequest, "ClientConnection"], Coroutine[Any, Any, None]],
        methods_of: Callable[[bytes], tuple[bytes, ...]],
        connections: "set[ClientConnection]",
        limits: Limits,
    ) -> None:
        self.last_request = False
        self.chunked = False
        self.on_pause: Callable[[bool], None] | None = None
        self.on_leave: Callable[[str], None] | None = None
        self._handle = handle
        self._methods_of = methods_of
        self._connections = connections
        self._limits = limits
        self._waiting: deque[ClientRequest] = deque()
        self._request: ClientRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._refusal: RequestError | None = None
        self._quiet_s = 0.0
        self._parser = httptools.HttpRequestParser(self)
        self._begin()

    @property
    def busy(self) -> bool:
        """Whether a request is being served or read."""
        return self._task is not None or self._in_message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._connections.add(self)
        if len(self._connections) > self._limits.connections:
            self._refuse_and_close(RequestError(503, "too many connections: try again later", retry_after_s=1))
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._waiting.clear()
        if self.on_leave is not None:
            # Before the task hears of it: what an instance sends until then could not be written any more.
            self.on_leave("the client left")
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "only HTTP/1.1 is spoken here: send no Upgrade")
        except httptools.HttpParserError as error:
            self._refuse(400, f"not a valid HTTP/1.1 request: {str(error)[:100]}")
        if self._in_message and not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(431, f"the request's head is larger than {self._limits.head_bytes} bytes")
        elif self._in_message:
            self._raw_bytes += len(data)
            if self._raw_bytes > 2 * self._limits.body_bytes + 65536:
                self._refuse(413, "the request's chunks carry too little data")
        if self._refusal is not None:
            self._refuse_and_close(self._refusal)

    def pause_writing(self) -> None:
        """The client reads its answer more slowly than it comes."""
        self._paused = True
        self._quiet_s = 0.0
        if self.on_pause is not None:
            self.on_pause(True)

    def resume_writing(self) -> None:
        self._paused = False
        self._quiet_s = 0.0
        if self.on_pause is not None:
            self.on_pause(False)

    def tick(self, seconds: float) -> None:
        """Count time: ends the connection of a client that is silent, slow to send, or does not read its answer."""
        self._quiet_s += seconds
        if self._in_message and self._task is None:
            self._sending_s += seconds
            if self._sending_s > self._limits.request_s:
                self._refuse_and_close(
                    RequestError(408, f"the request took over {self._limits.request_s:g} s to arrive")
                )
        elif self._quiet_s > self._limits.idle_s:
            if self._paused:
                self.transport.abort()
            elif self._task is None:
                self.transport.close()

    def respond(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Write a whole answer to the request being served, if the client is still there."""
        if self.transport.is_closing():
            return
        self.transport.write(messages.response(status, body, headers or [], keep_alive=self._keep_alive))
        if not self._keep_alive:
            self.transport.close()

    def refuse(self, error: RequestError, headers: Headers | None = None) -> None:
        """Answer the request being served with an error."""
        self.respond(error.status, error.body, error.headers + (headers or []))

    def begin_stream(self, status: int, headers: Headers) -> bytes:
        """The head of a streamed answer, to be written with its first bytes."""
        assert self._request is not None
        self.chunked = not self._request.http_1_0
        keep_alive = self._keep_alive and self.chunked
        return messages.response_head(status, headers, length=None, chunked=self.chunked, keep_alive=keep_alive)

    def end_stream(self, last: bytes = b"", *, close: bool = False) -> None:
        """Write `last` and the end of a streamed answer, if the client is still there."""
        if self.transport.is_closing():
            return
        if self.chunked:
            last = (b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n"
        if last:
            self.transport.write(last)
        self.last_request = self.last_request or close or not self.chunked
        if not self._keep_alive:
            self.transport.close()

    @property
    def _keep_alive(self) -> bool:
        return self._request is not None and self._request.keep_alive and not self.last_request

    # httptools calls the next six, in this order, for each request.

    def on_message_begin(self) -> None:
        self._begin()
        self._in_message = True

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # trailers after a body count towards the limit and are not forwarded
            self._headers.append((name.lower(), value))
        self._head_bytes += len(name) + len(value)
        if len(self._headers) > MAX_HEADERS or self._head_bytes > self._limits.head_bytes:
            self._refuse(431, f"the head is larger than {self._limits.head_bytes} bytes or {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Refuse what can be refused before the body is read."""
        self._head_done = True
        names = [name for name, _ in self._headers]
        version = self._parser.get_http_version()
        length = messages.header(self._headers, b"content-length")
        if version not in ("1.0", "1.1"):
            self._refuse(505, "only HTTP/1.1 is spoken here")
        elif self._parser.get_method() not in METHODS:
            path = self._target.split(b"?", 1)[0]
            self._refusal = self._refusal or messages.method_refused(self._methods_of(path) or METHODS)
        elif self._parser.should_upgrade():
            self._refuse(400, "only HTTP/1.1 is spoken here: send no Upgrade")
        elif not self._target.startswith(b"/"):
            self._refuse(400, "the request's target must begin with /")
        elif names.count(b"host") != 1 and (version == "1.1" or names.count(b"host") > 1):
            self._refuse(400, "one Host header is needed")
        elif names.count(b"transfer-encoding") > 1 or (version == "1.0" and b"transfer-encoding" in names):
            self._refuse(400, "the request's framing is ambiguous")
        elif length is not None and int(length) > self._limits.body_bytes:
            self._refuse(413, f"the body is larger than {self._limits.body_bytes} bytes")
        elif (messages.header(self._headers, b"expect") or b"").lower() == b"100-continue" and self._task is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse(413, f"the body is larger than {self._limits.body_bytes} bytes")

    def on_message_complete(self) -> None:
        """Serve the request, or let it wait for the one before."""
        if self._refusal is not None:
            return
        request = ClientRequest(
            method=self._parser.get_method(),
            target=self._target,
            headers=self._headers,
            body=b"".join(self._body),
            received_s=time.monotonic(),
            keep_alive=self._parser.should_keep_alive(),
            http_1_0=self._parser.get_http_version() == "1.0",
            request_id=messages.header(self._headers, b"x-request-id") or b"",
            authorization=messages.header(self._headers, b"authorization"),
        )
        self._begin()
        self._waiting.append(request)
        if len(self._waiting) > MAX_PIPELINED:
            self._refuse(429, f"more than {MAX_PIPELINED} requests sent ahead on one connection")
        elif self._task is None:
            self._serve_next()

    def _begin(self) -> None:
        self._in_message = False
        self._head_done = False
        self._head_bytes = self._raw_bytes = self._body_bytes = 0
        self._sending_s = 0.0
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []

    def _serve_next(self) -> None:
        self._request = self._waiting.popleft()
        self._task = asyncio.create_task(self._handle(self._request, self))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = self._request = self.on_pause = self.on_leave = None
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
