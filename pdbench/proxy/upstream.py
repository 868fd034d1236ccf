"""Requests to instances over kept connections, and the health checks."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

import httptools

from pdbench.config import ProxyConfig
from pdbench.proxy.instances import LEAVING, Instance, InstanceTable
from pdbench.proxy.messages import Headers, header

# Below uvicorn's 5 s keep-alive, so that a request seldom meets a connection that is being closed.
MAX_IDLE_S = 4.0
MAX_BODY_BYTES = 256 * 2**20
HEALTH_TIMEOUT_S = 5.0
# Between checks of an instance that is out.
_HEALTH_RETRY_S = 0.25


class ConnectionPool:
    """The idle connections of one worker to all instances, and its requests under way."""

    def __init__(self, table: InstanceTable, config: ProxyConfig) -> None:
        self.table = table
        self.config = config
        self.active: set[UpstreamRequest] = set()
        self._idle: defaultdict[tuple[str, int], deque[InstanceConnection]] = defaultdict(deque)

    def acquire(self, instance: Instance) -> "InstanceConnection | None":
        """An idle connection to the instance that still works, or None."""
        idle = self._idle[(instance.address.host, instance.address.port)]
        while idle:
            connection = idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since_s < MAX_IDLE_S:
                return connection
            connection.transport.abort()
        return None

    def release(self, connection: "InstanceConnection", instance: Instance) -> None:
        """Keep a connection for the next request."""
        connection.idle_since_s = time.monotonic()
        self._idle[(instance.address.host, instance.address.port)].append(connection)

    def tick(self, seconds: float) -> None:
        """Count time: stalled requests fail, old idle connections are closed."""
        for request in list(self.active):
            request.tick(seconds)
        now = time.monotonic()
        for idle in self._idle.values():
            while idle and (idle[0].lost or now - idle[0].idle_since_s > MAX_IDLE_S):
                idle.popleft().transport.abort()

    def close(self) -> None:
        for request in list(self.active):
            request.end("the proxy is shutting down")
        for idle in self._idle.values():
            while idle:
                idle.pop().transport.abort()


class UpstreamRequest:
    """One request at one instance, from `start` to `finished`. It never raises: `error` says why it failed.

    `tokens`: its share of the instance's load, None for a health check, which is none. `started` is done at the first
    byte of the body or at the end, `finished` at the end. The body gathers in `chunks` until `consume` is replaced.
    """

    __slots__ = (
        "_body_bytes", "_connection", "_data", "_pool", "_task", "_timeout_s", "chunks", "consume", "end_s", "error",
        "finished", "first_byte_s", "headers", "instance", "paused", "quiet_s", "sent_s", "stage", "started", "status",
        "timed_out", "tokens",
    )  # fmt: skip

    def __init__(
        self, pool: ConnectionPool, instance: Instance, stage: str, tokens: int | None, timeout_s: float
    ) -> None:
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
        self.consume: Callable[[bytes], None] = self._gather
        self.quiet_s = 0.0
        self._pool = pool
        self._timeout_s = timeout_s
        self._body_bytes = 0
        self._connection: InstanceConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._data = b""

    @property
    def body(self) -> bytes:
        """The part of the body that has arrived and was not consumed."""
        return b"".join(self.chunks)

    def start(self, data: bytes) -> None:
        """Send the request, over an idle connection or a new one."""
        self._pool.active.add(self)
        if self.tokens is not None:
            self._pool.table.begin(self.instance, self.tokens)
        self._data = data
        connection = self._pool.acquire(self.instance)
        if connection is not None:
            self._send(connection)
        else:
            self._task = asyncio.create_task(self._connect())

    def end(self, error: str | None) -> None:
        """End now; if the answer is not complete, closing the connection makes the instance stop working on it."""
        if self.finished.done():
            return
        self.end_s = time.monotonic()
        self.error = error
        connection, self._connection, task, self._task = self._connection, None, self._task, None
        self._data = b""
        if connection is not None:
            connection.request = None
            connection.transport.abort()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._pool.active.discard(self)
        if self.tokens is not None:
            self._pool.table.end(self.instance, self.tokens)
        self.finished.set_result(None)
        if not self.started.done():
            self.started.set_result(None)

    def pause(self, paused: bool) -> None:
        """Stop reading while the client cannot take more; the instance then waits too, and that is not a stall."""
        self.paused = paused
        if self._connection is not None and not self._connection.lost:
            if paused:
                self._connection.transport.pause_reading()
            else:
                self._connection.transport.resume_reading()

    def tick(self, seconds: float) -> None:
        """Count time: fails if the instance has been silent for longer than the timeout."""
        self.quiet_s = 0.0 if self.paused else self.quiet_s + seconds
        if self.quiet_s > self._timeout_s:
            self.timed_out = True
            self.fail(f"no byte for {self._timeout_s:g} s")

    def complete(self) -> None:
        """The answer is complete and its connection is back in the pool."""
        self._connection = None
        if self.tokens is not None and self.status is not None and self.status < 500:
            self._pool.table.served(self.instance)
        self.end(None)

    def connection_lost(self) -> None:
        """The connection closed before the answer was complete."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.uses > 1 and self.status is None:
            # An idle connection that the instance was closing: nothing was served, so send it again over a new one.
            self._task = asyncio.create_task(self._connect())
        elif self.status is None:
            self.fail("the connection closed before an answer")
        else:
            self.fail(f"the connection closed after {self._body_bytes} bytes of the answer")

    def fail(self, error: str) -> None:
        """End with a failure that counts against the instance."""
        self._pool.table.failed(self.instance, self._pool.config.unhealthy_after)
        self.end(error)

    def _gather(self, body: bytes) -> None:
        if self.first_byte_s is None:
            self.first_byte_s = time.monotonic()
        self.chunks.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self.end(f"the answer is larger than {MAX_BODY_BYTES} bytes")
        if not self.started.done():
            self.started.set_result(None)

    async def _connect(self) -> None:
        address = self.instance.address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._pool.config.connect_timeout_s):
                protocol = partial(InstanceConnection, self._pool)
                _, connection = await loop.create_connection(protocol, address.host, address.port)
        except TimeoutError:
            self.timed_out = True
            self.fail(f"no connection within {self._pool.config.connect_timeout_s:g} s")
        except OSError as error:
            self.fail(f"no connection: {error.strerror or type(error).__name__}")
        else:
            self._send(connection)

    def _send(self, connection: "InstanceConnection") -> None:
        self._connection = connection
        self.sent_s = time.monotonic()
        connection.request = self
        connection.uses += 1
        connection.transport.write(self._data)


class InstanceConnection(asyncio.Protocol):
    """A connection to an instance: carries one request at a time, parses its answer, goes back to the pool."""

    transport: asyncio.Transport

    def __init__(self, pool: ConnectionPool) -> None:
        self.request: UpstreamRequest | None = None
        self.lost = False
        self.uses = 0
        self.idle_since_s = 0.0
        self._pool = pool
        self._headers: Headers = []
        self._complete = False
        self._until_close = False
        self._keep_alive = False
        # httptools calls `on_body` for every piece of a body; a list's append is a call without a Python frame.
        self._bodies: list[bytes] = []
        self.on_body = self._bodies.append
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        request = self.request
        if request is None:
            self.transport.abort()
            return
        request.quiet_s = 0.0
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            request.fail("the answer is not HTTP")
            return
        bodies = self._bodies
        if bodies:
            request.consume(bodies[0] if len(bodies) == 1 else b"".join(bodies))
            bodies.clear()
        if self._complete:
            self._finish()

    def eof_received(self) -> None:
        """End an answer that has no other end."""
        if self.request is not None and self._until_close:
            self._keep_alive = False
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        request, self.request = self.request, None
        if request is not None:
            request.connection_lost()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status >= 200 and self.request is not None:
            framed = header(headers, b"content-length") is not None or header(headers, b"transfer-encoding") is not None
            self._until_close = not framed
            self.request.status, self.request.headers = status, headers

    def on_message_complete(self) -> None:
        self._headers.clear()  # trailers are not passed on
        self._complete = self._parser.get_status_code() >= 200  # an interim 1xx answer is not the end
        self._keep_alive = self._parser.should_keep_alive() and not self._until_close

    def _finish(self) -> None:
        request, self.request = self.request, None
        self._complete = False
        if request is None:
            self.transport.abort()
            return
        if self._keep_alive:
            if request.paused:  # by a slow client, with the answer's last bytes: the next answer must be read
                self.transport.resume_reading()
            self._pool.release(self, request.instance)
        else:
            self.transport.close()
            self.lost = True
        request.complete()


async def watch_health(pool: ConnectionPool) -> None:
    """Check every instance forever, and remove those that have left. One worker does it for all."""
    checks: dict[Instance, asyncio.Task[None]] = {}
    while True:
        instances = pool.table.all()
        for instance in instances:
            if pool.table.state(instance) == LEAVING and pool.table.load(instance)[0] == 0:
                pool.table.remove(instance)
            elif instance not in checks or checks[instance].done():
                checks[instance] = asyncio.create_task(_check_health(pool, instance))
        for removed in checks.keys() - set(instances):
            checks.pop(removed).cancel()
        await asyncio.sleep(min(_HEALTH_RETRY_S, pool.config.health_interval_s))


async def _check_health(pool: ConnectionPool, instance: Instance) -> None:
    """One check, and the wait before the next."""
    table, config = pool.table, pool.config
    request = UpstreamRequest(pool, instance, "health", tokens=None, timeout_s=HEALTH_TIMEOUT_S)
    request.start(f"GET /health HTTP/1.1\r\nHost: {instance.address.netloc}\r\n\r\n".encode())
    try:
        # Without the shield a cancelled check would cancel `finished`, and the request could not close its connection.
        await asyncio.shield(request.finished)
    finally:
        request.end("the check was cancelled")
    if request.error is None and request.status is not None:
        if request.status < 500:  # servers without a /health answer 404, and they are alive too
            table.passed(instance)
        else:
            table.failed(instance, config.unhealthy_after)
    wait_s = config.health_interval_s if table.healthy(instance) else _HEALTH_RETRY_S
    await asyncio.sleep(min(wait_s, config.health_interval_s))
