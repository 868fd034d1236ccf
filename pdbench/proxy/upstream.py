"""Asking instances: one leg is one request at one instance; connections are kept and used again.

A leg never raises: it ends, and `error` says why if it failed. Try: tests/test_proxy_faults.py
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable

import httptools

from pdbench.proxy.instances import Instance, InstanceTable
from pdbench.proxy.wire import Headers, header

# Below uvicorn's 5 s keep-alive, so that a request seldom meets a connection that is being closed.
IDLE_LIMIT_S = 4.0
REPLY_LIMIT_BYTES = 256 * 2**20


class Pool:
    """The idle connections of one worker to all instances, and the legs under way."""

    def __init__(self, table: InstanceTable, connect_timeout_s: float, unhealthy_after: int) -> None:
        self.table = table
        self.connect_timeout_s = connect_timeout_s
        self.unhealthy_after = unhealthy_after
        self.live: set[Leg] = set()
        self._idle: defaultdict[tuple[str, int], deque[InstanceConnection]] = defaultdict(deque)

    def take(self, instance: Instance) -> "InstanceConnection | None":
        """An idle connection that is still good, or None."""
        idle = self._idle[(instance.address.host, instance.address.port)]
        while idle:
            connection = idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since_s < IDLE_LIMIT_S:
                return connection
            connection.transport.abort()
        return None

    def give(self, connection: "InstanceConnection", instance: Instance) -> None:
        """Keep a connection for the next leg."""
        connection.idle_since_s = time.monotonic()
        self._idle[(instance.address.host, instance.address.port)].append(connection)

    def tick(self, seconds: float) -> None:
        """Let time pass: stalled legs fail, old idle connections close."""
        for leg in list(self.live):
            leg.tick(seconds)
        now = time.monotonic()
        for idle in self._idle.values():
            while idle and (idle[0].lost or now - idle[0].idle_since_s > IDLE_LIMIT_S):
                idle.popleft().transport.abort()

    def close(self) -> None:
        """End every leg and every connection."""
        for leg in list(self.live):
            leg.abort("the proxy is shutting down")
        for idle in self._idle.values():
            while idle:
                idle.pop().transport.abort()


class Leg:
    """One request at one instance, from `start` to `finished`; `tokens` is its share of the instance's load
    (None: not counted, nor is it a request).

    `started` ends with the first byte of the answer's body (or with the leg), `finished` with the leg. Until `take` is
    replaced, the body gathers in `body`.
    """

    __slots__ = (
        "_body_bytes", "_connection", "_data", "_limit_s", "_pool", "_task", "chunks", "end_s", "error",
        "finished", "first_byte_s", "headers", "instance", "paused", "quiet_s", "sent_s", "stage", "started", "status", "take",
        "timed_out", "tokens",
    )  # fmt: skip

    def __init__(self, pool: Pool, instance: Instance, stage: str, *, tokens: int | None, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.instance = instance
        self.stage = stage
        self.tokens = tokens
        self.started: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[None] = loop.create_future()
        self.status: int | None = None
        self.headers: Headers = []
        self.chunks: list[bytes] = []
        self.error: str | None = None
        self.timed_out = False
        self.paused = False
        self.sent_s: float | None = None
        self.first_byte_s: float | None = None
        self.end_s: float | None = None
        self.take: Callable[[bytes], None] = self._take_first
        self._pool = pool
        self._limit_s = limit_s
        self.quiet_s = 0.0
        self._body_bytes = 0
        self._connection: InstanceConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._data = b""

    @property
    def body(self) -> bytes:
        """The body so far."""
        return b"".join(self.chunks)

    @property
    def is_event_stream(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        return self.status == 200 and (header(self.headers, b"content-type") or b"").startswith(b"text/event-stream")

    def start(self, data: bytes) -> None:
        """Send the request, over an idle connection or a new one."""
        self._pool.live.add(self)
        if self.tokens is not None:
            self._pool.table.begin(self.instance, self.tokens)
        self._data = data
        connection = self._pool.take(self.instance)
        if connection is not None:
            self._send(connection)
        else:
            self._task = asyncio.create_task(self._connect())

    def abort(self, reason: str) -> None:
        """Close the connection now, so that the instance stops working on the request."""
        self._end(reason)

    def pause(self, paused: bool) -> None:
        """Stop reading while the client cannot take more; the instance then waits too, and no stall is counted."""
        self.paused = paused
        if self._connection is not None and not self._connection.lost:
            if paused:
                self._connection.transport.pause_reading()
            else:
                self._connection.transport.resume_reading()

    def tick(self, seconds: float) -> None:
        """Let time pass; the leg fails when it was quiet for longer than its limit."""
        self.quiet_s = 0.0 if self.paused else self.quiet_s + seconds
        if self.quiet_s > self._limit_s:
            self.timed_out = True
            self.fail(f"no byte for {self._limit_s:g} s")

    def head(self, status: int, headers: Headers) -> None:
        """The answer's head is complete."""
        self.status = status
        self.headers = headers

    def end(self) -> None:
        """The answer is complete; the connection is the pool's again."""
        self._connection = None
        if self.tokens is not None and self.status is not None and self.status < 500:
            self._pool.table.served(self.instance)
        self._end(None)

    def lost(self) -> None:
        """The connection closed before the answer was complete."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.uses > 1 and self.status is None:
            # An idle connection that the instance was closing: nothing was served, so once more over a new one.
            self._task = asyncio.create_task(self._connect())
        elif self.status is None:
            self.fail("the connection closed before an answer")
        else:
            self.fail(f"the connection closed after {self._body_bytes} bytes of the answer")

    def fail(self, error: str) -> None:
        """End the leg; the failure counts against the instance."""
        self._pool.table.failed(self.instance, self._pool.unhealthy_after)
        self._end(error)

    def _take_first(self, body: bytes) -> None:
        self.first_byte_s = time.monotonic()
        self.take = self._take_more
        self._take_more(body)
        if not self.started.done():
            self.started.set_result(None)

    def _take_more(self, body: bytes) -> None:
        self.chunks.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > REPLY_LIMIT_BYTES:
            self._end(f"the answer is larger than {REPLY_LIMIT_BYTES} bytes")

    async def _connect(self) -> None:
        address = self.instance.address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._pool.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: InstanceConnection(self._pool), address.host, address.port
                )
        except TimeoutError:
            self.timed_out = True
            self.fail(f"no connection within {self._pool.connect_timeout_s:g} s")
        except OSError as error:
            self.fail(f"no connection: {error.strerror or type(error).__name__}")
        else:
            self._send(connection)

    def _send(self, connection: "InstanceConnection") -> None:
        self._connection = connection
        self.sent_s = time.monotonic()
        connection.send(self._data, self)

    def _end(self, error: str | None) -> None:
        if self.finished.done():
            return
        self.end_s = time.monotonic()
        self.error = error
        connection, self._connection, task, self._task = self._connection, None, self._task, None
        self._data = b""
        if connection is not None:
            connection.leg = None
            connection.transport.abort()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._pool.live.discard(self)
        if self.tokens is not None:
            self._pool.table.end(self.instance, self.tokens)
        self.finished.set_result(None)
        if not self.started.done():
            self.started.set_result(None)


class InstanceConnection(asyncio.Protocol):
    """One connection to an instance: takes one leg at a time, parses the answer, goes back to the pool."""

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self.leg: Leg | None = None
        self.lost = False
        self.uses = 0
        self.idle_since_s = 0.0
        self._pool = pool
        self._headers: Headers = []
        self._complete = False
        self._until_close = False
        self._keep_alive = False
        # httptools calls `on_body` for every piece of a body; a list's own append costs no Python frame.
        self._bodies: list[bytes] = []
        self.on_body = self._bodies.append
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, leg: Leg) -> None:
        """Send a request; the answer goes to `leg`."""
        self.leg = leg
        self.uses += 1
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        leg = self.leg
        if leg is None:
            self.transport.abort()
            return
        leg.quiet_s = 0.0
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            leg.fail("the answer is not HTTP")
            return
        bodies = self._bodies
        if bodies:
            leg.take(bodies[0] if len(bodies) == 1 else b"".join(bodies))
            bodies.clear()
        if self._complete:
            self._finish()

    def eof_received(self) -> None:
        """The instance sends no more: the end of an answer that has no other."""
        if self.leg is not None and self._until_close:
            self._keep_alive = False
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self.lost = True
        leg, self.leg = self.leg, None
        if leg is not None:
            leg.lost()

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: one header."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """httptools: the head."""
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status >= 200 and self.leg is not None:
            framed = header(headers, b"content-length") is not None or header(headers, b"transfer-encoding") is not None
            self._until_close = not framed
            self.leg.head(status, headers)

    def on_message_complete(self) -> None:
        """httptools: the answer is complete (an interim 1xx answer is not one)."""
        self._headers.clear()  # trailers are not passed on
        self._complete = self._parser.get_status_code() >= 200
        self._keep_alive = self._parser.should_keep_alive() and not self._until_close

    def _finish(self) -> None:
        leg, self.leg = self.leg, None
        self._complete = False
        if leg is None:
            self.transport.abort()
            return
        if self._keep_alive:
            if leg.paused:  # by a slow client, with the answer's last bytes: the next one's must be read
                self.transport.resume_reading()
            self._pool.give(self, leg.instance)
        else:
            self.transport.close()
            self.lost = True
        leg.end()
