"""A client's connection: its requests one after another, their limits, and the way back for the answers.

Try: curl -v http://127.0.0.1:8000/health
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httptools

from pdbench.proxy import wire
from pdbench.proxy.ask import Ask
from pdbench.proxy.errors import RefusedError, method_refused
from pdbench.proxy.paths import METHODS, methods_of

MAX_HEADERS = 128
MAX_PIPELINED = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may do: bytes of a head and of a body, seconds of silence."""

    head_bytes: int
    body_bytes: int
    idle_s: float
    request_s: float


class ClientConnection(asyncio.Protocol):
    """One connection of a client. `handle` answers one request; `everyone` is the set of open connections."""

    transport: asyncio.Transport

    def __init__(
        self,
        handle: Callable[[Ask, "ClientConnection"], Coroutine[Any, Any, None]],
        everyone: "set[ClientConnection]",
        limits: Limits,
        max_connections: int,
    ) -> None:
        self.last_request = False
        self.chunked = False
        self.on_pause: Callable[[bool], None] | None = None
        self.on_leave: Callable[[str], None] | None = None
        self._handle = handle
        self._everyone = everyone
        self._limits = limits
        self._max_connections = max_connections
        self._waiting: deque[Ask] = deque()
        self._ask: Ask | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._refusal: RefusedError | None = None
        self._quiet_s = 0.0
        self._parser = httptools.HttpRequestParser(self)
        self._begin()

    @property
    def busy(self) -> bool:
        """Whether a request is being served or read."""
        return self._task is not None or self._in_message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self.transport = transport  # type: ignore[assignment]
        self._everyone.add(self)
        if len(self._everyone) > self._max_connections:
            self._say_and_close(RefusedError(503, "too many connections: try again later", retry_after_s=1))

    def connection_lost(self, error: Exception | None) -> None:
        """The client left: whatever is under way for it ends now."""
        self._everyone.discard(self)
        self._waiting.clear()
        if self.on_leave is not None:
            # At once: what came before the task hears of it could not be written any more.
            self.on_leave("the client left")
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        if self._refusal is not None:
            return
        self._quiet_s = 0.0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "the proxy speaks HTTP/1.1 alone: send no Upgrade")
        except httptools.HttpParserError as error:
            self._refuse(400, f"not a valid HTTP/1.1 request: {str(error)[:100]}")
        if self._in_message and not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(431, f"the request's head is larger than {self._limits.head_bytes} bytes")
        elif self._in_message:
            self._raw_bytes += len(data)
            if self._raw_bytes > 2 * self._limits.body_bytes + 65536:
                self._refuse(413, "the request's chunks carry too little")
        if self._refusal is not None:
            self._say_and_close(self._refusal)

    def pause_writing(self) -> None:
        """The client takes its answer slower than it comes."""
        self._paused = True
        self._quiet_s = 0.0
        if self.on_pause is not None:
            self.on_pause(True)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._quiet_s = 0.0
        if self.on_pause is not None:
            self.on_pause(False)

    def tick(self, seconds: float) -> None:
        """Let time pass: a silent client is closed, one that neither takes nor leaves is cut off."""
        self._quiet_s += seconds
        if self._in_message and self._task is None:
            self._head_s += 0.0 if self._head_done else seconds
            if max(self._quiet_s, self._head_s) > self._limits.request_s:
                self._say_and_close(RefusedError(408, "the request took too long to arrive"))
        elif self._task is None and self._quiet_s > self._limits.idle_s:
            self.transport.close()
        elif self._paused and self._quiet_s > self._limits.idle_s:
            self.transport.abort()

    def respond(self, status: int, body: bytes, headers: wire.Headers | None = None) -> None:
        """A whole answer to the request under way, if the client is still there."""
        if self.transport.is_closing():
            return
        self.transport.write(wire.answer(status, body, headers=headers, keep_alive=self._keep_alive))
        self._after_answer()

    def refuse(self, refusal: RefusedError) -> None:
        """The proxy's own error as the answer to the request under way."""
        body = wire.error_body(refusal.status, refusal.message, stage=refusal.stage)
        self.respond(refusal.status, body, refusal.headers)

    def begin_stream(self, status: int, headers: wire.Headers) -> bytes:
        """The head of a streamed answer, to be written with its first bytes."""
        assert self._ask is not None
        self.chunked = not self._ask.http_1_0
        keep_alive = self._keep_alive and self.chunked
        return wire.head(status, headers, length=None, chunked=self.chunked, keep_alive=keep_alive)

    def end_stream(self, last: bytes = b"", *, close: bool = False) -> None:
        """The end of a streamed answer, after `last`, if the client is still there."""
        if self.transport.is_closing():
            return
        if self.chunked:
            last = (b"%x\r\n%b\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n"
        if last:
            self.transport.write(last)
        self.last_request = self.last_request or close or not self.chunked
        self._after_answer()

    @property
    def _keep_alive(self) -> bool:
        return self._ask is not None and self._ask.keep_alive and not self.last_request

    def _after_answer(self) -> None:
        if not self._keep_alive:
            self.transport.close()

    # httptools calls these, in this order, for each request.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._begin()
        self._in_message = True

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; trailers behind a body count towards the limit and go no further."""
        if not self._head_done:
            self._headers.append((name.lower(), value))
        self._head_bytes += len(name) + len(value)
        if len(self._headers) > MAX_HEADERS or self._head_bytes > self._limits.head_bytes:
            self._refuse(431, f"the head is larger than {self._limits.head_bytes} bytes or {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """The head is complete: refuse early what need not be read."""
        self._head_done = True
        names = [name for name, _ in self._headers]
        version = self._parser.get_http_version()
        length = wire.header(self._headers, b"content-length")
        if version not in ("1.0", "1.1"):
            self._refuse(505, "the proxy speaks HTTP/1.1 alone")
        elif self._parser.get_method() not in METHODS:
            self._refusal = self._refusal or method_refused(methods_of(self._target.split(b"?", 1)[0]) or METHODS)
        elif self._parser.should_upgrade():
            self._refuse(400, "the proxy speaks HTTP/1.1 alone: send no Upgrade")
        elif not self._target.startswith(b"/"):
            self._refuse(400, "the request's target must begin with /")
        elif names.count(b"host") != 1 and (version == "1.1" or names.count(b"host") > 1):
            self._refuse(400, "one Host header is needed")
        elif names.count(b"transfer-encoding") > 1 or (version == "1.0" and b"transfer-encoding" in names):
            self._refuse(400, "the request's framing is ambiguous")
        elif length is not None and int(length) > self._limits.body_bytes:
            self._refuse(413, f"the body is larger than {self._limits.body_bytes} bytes")
        elif (wire.header(self._headers, b"expect") or b"").lower() == b"100-continue" and self._task is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse(413, f"the body is larger than {self._limits.body_bytes} bytes")

    def on_message_complete(self) -> None:
        """The request is complete: serve it, or let it wait for the one before."""
        if self._refusal is not None:
            return
        ask = Ask(
            method=self._parser.get_method(),
            target=self._target,
            headers=self._headers,
            body=b"".join(self._body),
            received_s=time.monotonic(),
            keep_alive=self._parser.should_keep_alive(),
            http_1_0=self._parser.get_http_version() == "1.0",
            request_id=wire.header(self._headers, b"x-request-id") or b"",
            authorization=wire.header(self._headers, b"authorization"),
        )
        self._begin()
        self._waiting.append(ask)
        if len(self._waiting) > MAX_PIPELINED:
            self._refuse(429, f"more than {MAX_PIPELINED} requests sent ahead on one connection")
        elif self._task is None:
            self._serve_next()

    def _begin(self) -> None:
        self._in_message = False
        self._head_done = False
        self._head_bytes = self._raw_bytes = self._body_bytes = 0
        self._head_s = 0.0
        self._target = b""
        self._headers: wire.Headers = []
        self._body: list[bytes] = []

    def _serve_next(self) -> None:
        self._ask = self._waiting.popleft()
        self._task = asyncio.create_task(self._handle(self._ask, self))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = self._ask = self.on_pause = self.on_leave = None
        self._quiet_s = 0.0
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a request's handling failed", "exception": task.exception()}
            )
            self.transport.abort()
        elif self._refusal is not None:
            self._say_and_close(self._refusal)
        elif self._waiting and not self.transport.is_closing():
            self._serve_next()

    def _refuse(self, status: int, message: str) -> None:
        if self._refusal is None:
            self._refusal = RefusedError(status, message)

    def _say_and_close(self, refusal: RefusedError) -> None:
        # The answers to earlier requests of this connection come first; what follows a broken one is not looked at.
        self._refusal = refusal
        self._waiting.clear()
        if self._task is not None or self.transport.is_closing():
            return
        body = wire.error_body(refusal.status, refusal.message, stage=refusal.stage)
        with contextlib.suppress(OSError):
            self.transport.write(wire.answer(refusal.status, body, headers=refusal.headers, keep_alive=False))
        self.transport.close()
