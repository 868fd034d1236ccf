"""Requests to instances over kept connections, and the health checks."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import httptools
import msgspec

from pdbench.config import ProxyConfig
from pdbench.proxy.instances import Address, Instance, InstanceTable, State
from pdbench.proxy.kv_protocols import may_open
from pdbench.proxy.messages import Headers, header
from pdbench.proxy.relay import Relay

if TYPE_CHECKING:
    from pdbench.proxy.client import EventStream

# Below uvicorn's 5 s keep-alive, so that a request seldom meets a connection that is being closed.
MAX_IDLE_S = 4.0
MAX_BODY_BYTES = 256 * 2**20
HEALTH_TIMEOUT_S = 5.0
# Between checks of an instance that is out.
_HEALTH_RETRY_S = 0.25


class _Model(msgspec.Struct):
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_models = msgspec.json.Decoder(_Models).decode


class ConnectionPool:
    """The idle connections of one worker to all instances, and its requests under way."""

    def __init__(self, table: InstanceTable, config: ProxyConfig) -> None:
        self.table = table
        self.config = config
        self.active: set[UpstreamRequest] = set()
        self.relay = Relay()
        self._idle: defaultdict[Address, deque[InstanceConnection]] = defaultdict(deque)

    def acquire(self, instance: Instance) -> "InstanceConnection | None":
        """An idle connection to the instance that still works, or None."""
        idle = self._idle[instance.address]
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing() and time.monotonic() - connection.idle_since_s < MAX_IDLE_S:
                return connection
            connection.transport.abort()
        return None

    def release(self, connection: "InstanceConnection", instance: Instance) -> None:
        connection.idle_since_s = time.monotonic()
        self._idle[instance.address].append(connection)

    def tick(self, seconds: float) -> None:
        """Count time: stalled requests fail, old idle connections are closed."""
        for request in list(self.active):
            request.tick(seconds)
        now = time.monotonic()
        for idle in self._idle.values():
            while idle and (idle[0].transport.is_closing() or now - idle[0].idle_since_s > MAX_IDLE_S):
                idle.popleft().transport.abort()


@dataclass(slots=True, eq=False)
class UpstreamRequest:
    """One request at one instance, sent at once. It never raises: `error` says why it failed.

    `tokens` and `requests`: its share of the instance's load, 0 for a health check. `started` is done at the first byte
    of the body or at the end, `finished` at the end. The body gathers in `chunks` until `consume` is replaced. `sink` is the
    client's stream that the relay passes whole events on to, but for a piece that contains `stop_at`.
    """

    pool: ConnectionPool
    instance: Instance
    stage: str
    data: bytes
    tokens: int
    timeout_s: float
    requests: int = 1
    started: asyncio.Future[None] = field(default_factory=asyncio.Future)
    finished: asyncio.Future[None] = field(default_factory=asyncio.Future)
    status: int | None = None
    headers: Headers = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    consume: Callable[[bytes], None] = field(init=False)
    error: str | None = None
    timed_out: bool = False
    paused: bool = False
    quiet_s: float = 0.0
    sent_s: float | None = None
    first_byte_s: float | None = None
    end_s: float | None = None
    connection: "InstanceConnection | None" = None
    sink: "EventStream | None" = None
    stop_at: bytes | None = None
    source_fd: int = -1
    sink_fd: int = -1
    _body_bytes: int = 0
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.consume = self._gather
        self.pool.active.add(self)
        self.pool.table.count(self.instance, self.requests, self.tokens)
        connection = self.pool.acquire(self.instance)
        if connection is not None:
            self._send(connection)
        else:
            self._task = asyncio.create_task(self._connect())

    @property
    def body(self) -> bytes:
        """The part of the body that has arrived and was not consumed."""
        return b"".join(self.chunks)

    def end(self, error: str | None) -> None:
        """End now; if the answer is not complete, closing the connection makes the instance stop working on it."""
        if self.finished.done():
            return
        self.end_s = time.monotonic()
        self.error = error
        connection, self.connection, task, self._task = self.connection, None, self._task, None
        self.data = b""
        if connection is not None:
            connection.request = None
            self.pool.relay.leave(self)
            connection.transport.abort()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self.pool.active.discard(self)
        self.pool.table.count(self.instance, -self.requests, -self.tokens)
        self.finished.set_result(None)
        if not self.started.done():
            self.started.set_result(None)

    def relay_to(self, sink: "EventStream", stop_at: bytes | None) -> None:
        """Pass what comes on to the client without parsing it, as long as it is whole events without `stop_at`."""
        if self.connection is None:  # all has come
            return
        self.sink, self.stop_at = sink, stop_at
        self.source_fd = self.connection.transport.get_extra_info("socket").fileno()
        self.sink_fd = sink.transport.get_extra_info("socket").fileno()

    def pause(self, paused: bool) -> None:
        """Stop reading while the client cannot take more; the instance then waits too, and that is not a stall."""
        self.paused = paused
        if self.connection is not None and not self.connection.transport.is_closing():
            if paused:
                self.connection.transport.pause_reading()
            else:
                self.connection.transport.resume_reading()

    def tick(self, seconds: float) -> None:
        """Count time: fails if the instance has been silent for longer than the timeout."""
        self.quiet_s = 0.0 if self.paused else self.quiet_s + seconds
        if self.quiet_s > self.timeout_s:
            self.timed_out = True
            self.fail(f"no byte for {self.timeout_s:g} s")

    def connection_lost(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None and connection.uses > 1 and self.status is None:
            # An idle connection that the instance was closing: nothing was served, so send it again over a new one.
            self._task = asyncio.create_task(self._connect())
        else:
            self.fail(f"the connection closed before {'an answer' if self.status is None else 'the end of the answer'}")

    def fail(self, error: str) -> None:
        """End with a failure that counts against the instance."""
        self.pool.table.failed(self.instance, self.pool.config.unhealthy_after)
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
            async with asyncio.timeout(self.pool.config.connect_timeout_s):
                protocol = partial(InstanceConnection, self.pool)
                _, connection = await loop.create_connection(protocol, address.host, address.port)
        except TimeoutError:
            self.timed_out = True
            self.fail(f"no connection within {self.pool.config.connect_timeout_s:g} s")
        except OSError as error:
            self.fail(f"no connection: {error.strerror or type(error).__name__}")
        else:
            self._send(connection)

    def _send(self, connection: "InstanceConnection") -> None:
        self.connection = connection
        self.sent_s = time.monotonic()
        connection.request = self
        connection.uses += 1
        connection.transport.write(self.data)


@dataclass(eq=False)
class InstanceConnection(asyncio.Protocol):
    """A connection to an instance: carries one request at a time, parses its answer, goes back to the pool."""

    pool: ConnectionPool
    transport: asyncio.Transport = field(init=False)
    request: UpstreamRequest | None = None
    uses: int = 0
    idle_since_s: float = 0.0
    _headers: Headers = field(default_factory=list)
    _bodies: list[bytes] = field(default_factory=list)
    _between_chunks: bool = False
    _complete: bool = False
    _until_close: bool = False
    _keep_alive: bool = False

    def __post_init__(self) -> None:
        # httptools calls `on_body` for every piece of a body; a list's append is a call without a Python frame.
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
        if self._complete and self.request is request:
            self._finish(request)
        elif self._between_chunks and request.sink is not None and self.request is request and not request.paused:
            sink = request.sink
            if not (sink.held or sink.transport.is_closing() or sink.transport.get_write_buffer_size()):
                self.transport.pause_reading()
                self.pool.relay.enter(request)

    def eof_received(self) -> None:
        if self.request is not None and self._until_close:
            self._keep_alive = False
            self._finish(self.request)

    def connection_lost(self, error: Exception | None) -> None:
        request, self.request = self.request, None
        if request is not None:
            request.connection_lost()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status >= 200 and self.request is not None:
            self._until_close = not (header(headers, b"content-length") or header(headers, b"transfer-encoding"))
            self.request.status, self.request.headers = status, headers
            self.request.data = b""  # it is not sent again from here on

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        self._between_chunks = False
        self._headers.clear()  # trailers are not passed on
        self._complete = self._parser.get_status_code() >= 200  # an interim 1xx answer is not the end
        self._keep_alive = self._parser.should_keep_alive() and not self._until_close

    def _finish(self, request: UpstreamRequest) -> None:
        self.request = None
        self._complete = False
        if self._keep_alive:
            if request.paused:  # by a slow client, with the answer's last bytes: the next answer must be read
                self.transport.resume_reading()
            self.pool.release(self, request.instance)
        else:
            self.transport.close()
        request.connection = None
        if request.status is not None and request.status < 500:
            self.pool.table.served(request.instance)
        request.end(None)


async def watch_health(pool: ConnectionPool, key: bytes) -> None:
    """Check every instance forever, and remove those that have left. One worker does it for all; `key` is for the instances."""
    checks: dict[Instance, asyncio.Task[None]] = {}
    while True:
        instances = pool.table.all()
        for instance in instances:
            if pool.table.state(instance) == State.LEAVING and pool.table.load(instance)[0] == 0:
                pool.table.set_state(instance, State.REMOVED)
            elif instance not in checks or checks[instance].done():
                checks[instance] = asyncio.create_task(_check_health(pool, instance, key))
        for removed in checks.keys() - set(instances):
            checks.pop(removed).cancel()
        await asyncio.sleep(min(_HEALTH_RETRY_S, pool.config.health_interval_s))


async def _check_health(pool: ConnectionPool, instance: Instance, key: bytes) -> None:
    """One check, and the wait before the next."""
    table, config = pool.table, pool.config
    request = await _ask(pool, instance, b"/health", key)
    if request.error is None and request.status is not None:
        if request.status < 500:  # servers without a /health answer 404, and they are alive too
            asks = may_open(config) and instance.role == "decode" and not table.healthy(instance)
            table.passed(instance, await _max_model_len(pool, instance, key) if asks else None)
        else:
            table.failed(instance, config.unhealthy_after)
    wait_s = config.health_interval_s
    await asyncio.sleep(wait_s if table.healthy(instance) else min(wait_s, _HEALTH_RETRY_S))


async def _max_model_len(pool: ConnectionPool, instance: Instance, key: bytes) -> int:
    """The most tokens of a request that the instance's models take, as vLLM lists them; 0 where it does not say."""
    request = await _ask(pool, instance, b"/v1/models", key)
    try:
        return min(m.max_model_len for m in _decode_models(request.body).data if m.max_model_len)
    except (msgspec.MsgspecError, ValueError):
        return 0


async def _ask(pool: ConnectionPool, instance: Instance, path: bytes, key: bytes) -> UpstreamRequest:
    """A finished request of the proxy's own."""
    authorization = b"Authorization: Bearer %b\r\n" % key if key else b""
    data = b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (path, instance.address.netloc.encode(), authorization)
    request = UpstreamRequest(pool, instance, "health", data, tokens=0, timeout_s=HEALTH_TIMEOUT_S, requests=0)
    try:
        # Without the shield a cancelled check would cancel `finished`, and the request could not close its connection.
        await asyncio.shield(request.finished)
    finally:
        request.end("the check was cancelled")
    return request
