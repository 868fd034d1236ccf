"""The load client: streamed requests over raw sockets on one event loop, each becoming one RequestRecord.

Arrival instants are the kernel's; the loop waits with microsecond precision, so that requests leave when they are planned.
"""

import contextlib
import os
import select
import socket
import time
from array import array
from collections import deque
from typing import Any

import msgspec

from pdbench.errors import UserError
from pdbench.http import ServerUrl, authorization, split_url
from pdbench.load.connection import Address, ArrivalClock, Connection, enable_stamps
from pdbench.load.response import Response
from pdbench.records import RequestRecord

_DEADLINE_CHECK_S = 0.05
_CLOCK_REFRESH_S = 1.0
# epoll_wait counts whole milliseconds: what remains of a wait is left to select(2), which counts microseconds.
_MILLISECOND_S = 0.001
_HIGHEST_FOR_SELECT = 1023


class Client:
    """Sends requests to one server and collects finished records; `start` never blocks, `poll` waits for bytes.

    `url` is the server's base (http or https, IPv6 in brackets); `endpoint` "completions" or "chat". `timeout_s` bounds a
    request from sending to its last byte, `read_timeout_s` the silence between two arrivals once the response has begun.
    The API key is read from OPENAI_API_KEY. Raises UserError for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str = "completions",
        zero_s: float | None = None,
        timeout_s: float = 120.0,
        read_timeout_s: float = 60.0,
        verify_tls: bool = True,
    ) -> None:
        self.clock = ArrivalClock(time.monotonic() if zero_s is None else zero_s)
        self.busy_s = array("d")
        self.in_flight = 0
        self.merged_reads = 0
        server = split_url(url, verify_tls=verify_tls)
        self._address, self._tls, self._server_name = _reachable_address(server), server.tls, server.host
        path = f"{server.base}/v1/{'chat/completions' if endpoint == 'chat' else 'completions'}"
        headers = {"Host": server.authority, "Content-Type": "application/json"} | authorization()
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        self._timeout_s, self._read_timeout_s = timeout_s, read_timeout_s
        self._poller = _Poller()
        self._idle: deque[Connection] = deque()
        self._active: set[Connection] = set()
        self._finished: list[RequestRecord] = []
        self._check_at_s = self._refresh_at_s = 0.0
        # The kernel begins to stamp some milliseconds after the first socket has asked: this one asks for all.
        self._stamper = socket.socket(self._address[0], socket.SOCK_STREAM)
        enable_stamps(self._stamper)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._active, *self._idle]:
            connection.close()
        self._stamper.close()
        self._poller.close()

    def start(self, record: RequestRecord, body: bytes) -> None:
        """Send `body` (JSON) now; the record comes out of a later `poll`, complete. Sets `sent_s` before anything else."""
        record.sent_s = self.clock.now()
        self.in_flight += 1
        data = b"%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, record.id.encode(), len(body), body)
        response = Response(record)
        connection = self._idle_connection()
        if connection is None:
            try:
                connection = Connection(self._address, self._tls, self._server_name, self.clock, self._poller.watch)
            except OSError as error:
                response.fail("connect", f"{error}: `ulimit -n` bounds the connections", self.clock.now())
                self._collect(response)
                return
        self._active.add(connection)
        connection.request(data, response)
        if connection.broken is not None:
            self._settle(connection)

    def poll(self, until_s: float) -> list[RequestRecord]:
        """Handle what arrives until a request ends or `until_s` (run's clock) has come; the requests that ended."""
        monotonic, zero_s, wait, busy = time.monotonic, self.clock.zero_s, self._poller.wait, self.busy_s.append
        now_s = monotonic() - zero_s
        while not self._finished:
            ready = wait(min(until_s, self._check_at_s) - now_s)
            began_s = monotonic() - zero_s
            for connection, events in ready:
                connection.ready(events)
                response = connection.response
                if connection.broken is not None or (response is not None and response.complete):
                    self._settle(connection)
            now_s = monotonic() - zero_s
            if ready:
                busy(now_s - began_s)
            if now_s >= self._check_at_s:
                self._check_deadlines(now_s)
                break
            if now_s >= until_s:
                break
        finished, self._finished = self._finished, []
        return finished

    def tokens_in_flight(self) -> int:
        """Tokens received so far of the requests that have not ended."""
        return sum(len(connection.response.record.token_s) for connection in self._active if connection.response)

    def take_counters(self) -> tuple[bytes, bytes, int]:
        """(turns of the loop and delays of reads in seconds as raw float64 arrays, merged reads) since the last call."""
        counters = self.busy_s.tobytes(), self.clock.read_delays_s.tobytes(), self.merged_reads
        self.busy_s, self.clock.read_delays_s, self.merged_reads = array("d"), array("d"), 0
        return counters

    def abandon(self, kind: str, message: str) -> list[RequestRecord]:
        """End every request in flight as a failure of this class; what has arrived is kept."""
        now_s = self.clock.now()
        for connection in list(self._active):
            self._drop(connection, kind, message, now_s)
        finished, self._finished = self._finished, []
        return finished

    def _idle_connection(self) -> Connection | None:
        """The connection used last that the server has not closed meanwhile. No request is ever sent twice: resets are data."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale():
                return connection
            self._drop(connection, "closed", "", 0.0)
        return None

    def _settle(self, connection: Connection) -> None:
        """A connection whose response is complete or that broke: keep it or drop it."""
        response = connection.response
        if response is not None and response.complete and connection.broken is None and response.keep_alive:
            self._active.discard(connection)
            connection.idle()
            self._idle.append(connection)
            self._collect(response)
        else:
            kind, message = connection.broken or ("closed", "")
            self._drop(connection, kind, message, self.clock.now())

    def _drop(self, connection: Connection, kind: str, message: str, at_s: float) -> None:
        self._active.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        self._poller.forget(connection)
        connection.close()
        if connection.response is not None:
            connection.response.closed(at_s, kind, message)
            self._collect(connection.response)

    def _collect(self, response: Response) -> None:
        self.merged_reads += response.merged_reads
        self.in_flight -= 1
        self._finished.append(response.record)

    def _check_deadlines(self, now_s: float) -> None:
        self._check_at_s = now_s + _DEADLINE_CHECK_S
        if now_s >= self._refresh_at_s:
            self._refresh_at_s = now_s + _CLOCK_REFRESH_S
            self.clock.refresh()
        for connection in list(self._active):
            response = connection.response
            if response is None or response.record.sent_s is None:
                continue
            if now_s - response.record.sent_s > self._timeout_s:
                self._drop(connection, "timeout", f"not whole after {self._timeout_s:g} s", now_s)
            elif connection.last_byte_s is not None and now_s - connection.last_byte_s > self._read_timeout_s:
                self._drop(connection, "stall", f"no byte for {self._read_timeout_s:g} s in mid-response", now_s)


class _Poller:
    """Waits for sockets with epoll, and wakes within microseconds of a deadline."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._fine = self._epoll.fileno() <= _HIGHEST_FOR_SELECT
        self.close = self._epoll.close

    def watch(self, connection: Connection, events: int) -> None:
        if connection.watched:
            self._epoll.modify(connection.sock, events)
        else:
            self._connections[connection.sock.fileno()] = connection
            self._epoll.register(connection.sock, events)

    def forget(self, connection: Connection) -> None:
        if connection.watched:
            self._epoll.unregister(connection.sock)
            del self._connections[connection.sock.fileno()]

    def wait(self, wait_s: float) -> list[tuple[Connection, int]]:
        """The ready connections with their events, after at most `wait_s` seconds (0 or less: at once)."""
        coarse_s = wait_s - 2 * _MILLISECOND_S
        ready = self._epoll.poll(coarse_s if coarse_s > 0 else 0)
        if not ready and wait_s > 0 and coarse_s <= 0:
            if self._fine:
                select.select([self._epoll], [], [], wait_s)
                ready = self._epoll.poll(0)
            else:
                ready = self._epoll.poll(wait_s)
        connections = self._connections
        return [(connections[number], events) for number, events in ready]


def fetch(url: str, body: dict[str, Any], *, endpoint: str = "completions", timeout_s: float = 120.0) -> RequestRecord:
    """Send one request, wait, return its record; the body's `stream` and `return_token_ids` are set here."""
    whole = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **body}
    with Client(url, endpoint=endpoint, timeout_s=timeout_s) as client:
        record = RequestRecord(id=os.urandom(8).hex(), planned_s=client.clock.now())
        client.start(record, msgspec.json.encode(whole))
        while not client.poll(client.clock.now() + 1.0):
            pass
    return record


def _reachable_address(server: ServerUrl) -> Address:
    """The first of the host's addresses that accepts a connection, so that `localhost` finds a server on ::1 or 127.0.0.1."""
    try:
        addresses = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"cannot resolve {server.host}: {error.strerror}") from None
    if len(addresses) > 1:
        for family, _, _, _, address in addresses:
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(2.0)
                probe.connect(address)
                return family, address
    return addresses[0][0], addresses[0][4]
