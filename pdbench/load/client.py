"""The load client: streamed requests over raw sockets on one event loop, each becoming one RequestRecord.

Arrival instants are the kernel's; the loop waits with microsecond precision, so that requests leave when they are planned.
"""

import contextlib
import os
import select
import socket
import time
from array import array
from typing import Any

import msgspec

from pdbench.config import LoadConfig
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

    `url` is the server's base (http or https, IPv6 in brackets); of `config` it takes the options of single requests.
    The API key is read from OPENAI_API_KEY. Raises UserError for a URL that cannot be used.
    """

    def __init__(self, url: str, config: LoadConfig | None = None, *, zero_s: float | None = None) -> None:
        self._config = config = config or LoadConfig()
        self.clock = ArrivalClock(time.monotonic() if zero_s is None else zero_s)
        self.busy_s = array("d")
        self.merged_reads = 0
        server = split_url(url, verify_tls=config.tls_verify)
        self._address, self._tls, self._server_name = _reachable_address(server), server.tls, server.host
        path = f"{server.base}/v1/{'chat/completions' if config.endpoint == 'chat' else 'completions'}"
        headers = {"Host": server.authority, "Content-Type": "application/json"} | authorization()
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        self._epoll = select.epoll()
        self._fine = self._epoll.fileno() <= _HIGHEST_FOR_SELECT
        self._connections: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._finished: list[RequestRecord] = []
        self._check_at_s = self._refresh_at_s = 0.0
        # The kernel begins to stamp some milliseconds after the first socket has asked: this one asks for all.
        self._stamper = socket.socket(self._address[0], socket.SOCK_STREAM)
        enable_stamps(self._stamper)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()
        self._stamper.close()
        self._epoll.close()

    def start(self, record: RequestRecord, body: bytes) -> None:
        """Send `body` (JSON) now; the record comes out of a later `poll`, complete. Sets `sent_s` before anything else."""
        record.sent_s = self.clock.now()
        data = b"%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, record.id.encode(), len(body), body)
        response = Response(record)
        # The connection used last that the server has not closed meanwhile. No request is ever sent twice: resets are data.
        while self._idle and self._idle[-1].stale():
            self._settle(self._idle[-1], ("closed", ""))
        if self._idle:
            connection = self._idle.pop()
        else:
            try:
                connection = Connection(self._address, self._tls, self._server_name, self.clock, self._epoll)
            except OSError as error:
                response.fail("connect", f"{error}: `ulimit -n` bounds the connections", self.clock.now())
                self._finished.append(record)
                return
            self._connections[connection.sock.fileno()] = connection
        connection.request(data, response)
        if connection.broken is not None:
            self._settle(connection, connection.broken)

    def poll(self, until_s: float) -> list[RequestRecord]:
        """Handle what arrives until a request ends or `until_s` (run's clock) has come; the requests that ended."""
        monotonic, zero_s, wait, busy = time.monotonic, self.clock.zero_s, self._wait, self.busy_s.append
        connections = self._connections
        now_s = monotonic() - zero_s
        while not self._finished:
            ready = wait(min(until_s, self._check_at_s) - now_s)
            began_s = monotonic() - zero_s
            for number, events in ready:
                connection = connections[number]
                connection.ready(events)
                response = connection.response
                if connection.broken is not None or (response is not None and response.complete):
                    self._settle(connection, connection.broken)
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

    def take_counters(self) -> tuple[bytes, bytes, int]:
        """(turns of the loop and delays of reads in seconds as raw float64 arrays, merged reads) since the last call."""
        counters = self.busy_s.tobytes(), self.clock.read_delays_s.tobytes(), self.merged_reads
        self.busy_s, self.clock.read_delays_s, self.merged_reads = array("d"), array("d"), 0
        return counters

    def abandon(self, kind: str, message: str) -> list[RequestRecord]:
        """End every request in flight as a failure of this class; what has arrived is kept."""
        for connection in list(self._connections.values()):
            if connection.response is not None:
                self._settle(connection, (kind, message))
        finished, self._finished = self._finished, []
        return finished

    def _settle(self, connection: Connection, failure: tuple[str, str] | None) -> None:
        """End the connection's request, if it has one, and keep the connection only if it can take another."""
        response = connection.response
        if response is not None and response.keep_alive and failure is None and not connection.unsent:
            connection.idle()
            self._idle.append(connection)
        else:
            del self._connections[connection.sock.fileno()]
            connection.close()
            if response is None:
                self._idle.remove(connection)
            else:
                response.closed(self.clock.now(), *(failure or ("closed", "")))
        if response is not None:
            self.merged_reads += response.merged_reads
            self._finished.append(response.record)

    def _check_deadlines(self, now_s: float) -> None:
        self._check_at_s = now_s + _DEADLINE_CHECK_S
        if now_s >= self._refresh_at_s:
            self._refresh_at_s = now_s + _CLOCK_REFRESH_S
            self.clock.refresh()
        limit_s, silence_s = self._config.request_timeout_s, self._config.read_timeout_s
        for connection in list(self._connections.values()):
            response, byte_s = connection.response, connection.last_byte_s
            if response is None or response.record.sent_s is None:
                continue
            if now_s - response.record.sent_s > limit_s:
                self._settle(connection, ("timeout", f"not whole after {limit_s:g} s"))
            elif byte_s is not None and now_s - byte_s > silence_s:
                self._settle(connection, ("stall", f"no byte for {silence_s:g} s in mid-response"))

    def _wait(self, wait_s: float) -> list[tuple[int, int]]:
        """The ready sockets with their events, after at most `wait_s` seconds (0 or less: at once), within microseconds."""
        coarse_s = wait_s - 2 * _MILLISECOND_S
        ready = self._epoll.poll(coarse_s if coarse_s > 0 else 0)
        if not ready and wait_s > 0 and coarse_s <= 0:
            if self._fine:
                select.select([self._epoll], [], [], wait_s)
                return self._epoll.poll(0)
            return self._epoll.poll(wait_s)
        return ready


def fetch(url: str, body: dict[str, Any], config: LoadConfig | None = None) -> RequestRecord:
    """Send one request, wait, return its record; the body's `stream` and `return_token_ids` are set here."""
    whole = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **body}
    with Client(url, config) as client:
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
        with contextlib.suppress(OSError), socket.create_connection((server.host, server.port), 2.0) as probe:
            return probe.family, probe.getpeername()
    return addresses[0][0], addresses[0][4]
