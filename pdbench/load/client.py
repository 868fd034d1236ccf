"""The load client: streamed requests over raw sockets on one event loop, each becoming one RequestRecord.

Arrival instants are the kernel's; the loop waits with microsecond precision, so that requests leave when they are planned.
"""

import itertools
import os
import select
import socket
import time
from array import array
from collections import deque
from typing import Any

import msgspec

from pdbench.config import LoadConfig, answer_timeout_s
from pdbench.errors import UserError
from pdbench.http import ServerUrl, authorization, split_url
from pdbench.load.connection import Address, ArrivalClock, Connection, enable_stamps, files_left, words
from pdbench.load.response import Response
from pdbench.records import Canary, RequestRecord

_DEADLINE_CHECK_S = 0.05
_CLOCK_REFRESH_S = 1.0
# uvicorn closes idle connections after 5 s: one that is older could be closed while it is used again (as the proxy's).
_IDLE_S = 4.0
_PROBE_TIMEOUT_S = 2.0
# A stream is free this long after `[DONE]`, or after finish and usage without it, also where the server leaves the body open: another
# connection takes the next request then.
_OPEN_AFTER_DONE_S, _OPEN_AFTER_USAGE_S = 0.001, 0.25
# epoll_wait counts whole milliseconds: what remains of a wait is left to select(2), which counts microseconds.
_MILLISECOND_S = 0.001
_HIGHEST_FOR_SELECT = 1023


class Client:
    """Sends requests to one server and collects finished records; `start` never blocks, `poll` waits for bytes.

    `url` is the server's base (http or https, IPv6 in brackets); of `config` it takes the options of single requests.
    The API key is read from OPENAI_API_KEY. Raises UserError for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        config: LoadConfig | None = None,
        *,
        zero_s: float | None = None,
        header: dict[str, str] | None = None,
    ) -> None:
        self._config = config = config or LoadConfig()
        self.clock = ArrivalClock(time.monotonic() if zero_s is None else zero_s)
        self.busy_s = array("d")
        self.merged_reads = 0
        # Since when the streams of these requests are free, although their records are still to come: the servers leave the bodies open.
        self.freed_s: dict[str, float] = {}
        self._open: deque[tuple[float, Response]] = deque()
        self._most = files_left()
        server = split_url(url, verify_tls=config.tls_verify)
        addresses, self._tls, self._server_name = _reachable_addresses(server), server.tls, server.host
        self.addresses = [address[1][0] for address in addresses]
        self._addresses = itertools.cycle(addresses)
        path = f"{server.base}/v1/{'chat/completions' if config.endpoint == 'chat' else 'completions'}"
        headers = {"Host": server.authority, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= authorization() | (header or {})
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        self._epoll = select.epoll()
        self._fine = self._epoll.fileno() <= _HIGHEST_FOR_SELECT
        self._connections: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._finished: list[RequestRecord] = []
        self._check_at_s = self._refresh_at_s = 0.0
        # The kernel begins to stamp some milliseconds after the first socket has asked: this one asks for all.
        self._stamper = socket.socket(addresses[0][0], socket.SOCK_STREAM)
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
        # pdbench's proxy sends the trial's canaries over all pairs of instances in turn.
        pair = b"X-Pdbench-Pair: %d\r\n" % record.canary.number if record.canary else b""
        data = b"%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            self._head, pair, record.id.encode(), len(body), body,
        )  # fmt: skip
        response = Response(record, body)
        # The connection that is idle longest, so that all addresses have their share, unless it is too old or the server has
        # closed it. No request is ever sent twice: resets are data.
        while self._idle and (record.sent_s - self._idle[0].idle_since_s > _IDLE_S or self._idle[0].stale()):
            self._settle(self._idle[0], ("closed", ""))
        if self._idle:
            connection = self._idle.popleft()
            response.reused = True
        else:
            try:
                connection = Connection(next(self._addresses), self._tls, self._server_name, self.clock, self._epoll)
            except OSError as error:
                response.fail("connect", words(error), self.clock.now())
                self._finished.append(record)
                return
            self._connections[connection.sock.fileno()] = connection
        connection.request(data, response)
        if connection.broken is not None:
            self._settle(connection, connection.broken)

    def poll(self, until_s: float) -> list[RequestRecord]:
        """Handle what arrives until a request ends, a stream is free or `until_s` (run's clock) has come; the requests that ended."""
        monotonic, zero_s, wait, busy = time.monotonic, self.clock.zero_s, self._wait, self.busy_s.append
        connections, open_ = self._connections, self._open
        now_s = monotonic() - zero_s
        while True:
            next_s = now_s if self._finished else min(until_s, self._check_at_s, open_[0][0] if open_ else until_s)
            ready = wait(next_s - now_s)
            began_s = monotonic() - zero_s
            for number, events in ready:
                connection = connections[number]
                connection.ready(events)
                response = connection.response
                if connection.broken is not None or (response is not None and response.complete):
                    self._settle(connection, connection.broken)
                elif response is not None and response.done and not response.freed:
                    open_.append((began_s + _OPEN_AFTER_DONE_S, response))
            now_s = monotonic() - zero_s
            if ready:
                busy(now_s - began_s)
            if open_ and now_s >= open_[0][0]:
                _, response = open_.popleft()
                self._free(response, response.whole_s or now_s)
            if now_s >= self._check_at_s:
                self._check_deadlines(now_s)
                break
            if now_s >= until_s or self._finished or self.freed_s:
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
            connection.idle(self.clock.now())
            self._idle.append(connection)
        else:
            del self._connections[connection.sock.fileno()]
            connection.close()
            if response is None:
                self._idle.remove(connection)
            else:
                now_s = self.clock.now()
                if response.whole_s is not None and not response.freed:
                    self.freed_s[response.record.id] = now_s
                response.closed(now_s, *(failure or ("closed", "")))
        if response is not None:
            self.merged_reads += response.merged_reads
            self._finished.append(response.record)

    def _free(self, response: Response, at_s: float) -> None:
        """The answer is whole, only its body is still open: its stream can have the next request, if there are descriptors for both."""
        if not response.complete and not response.freed and (self._idle or len(self._connections) < self._most):
            response.freed = True
            self.freed_s[response.record.id] = at_s

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
            tokens = response.record.token_s
            waited_s = now_s - response.record.sent_s
            is_late = now_s > response.told_all_s + _OPEN_AFTER_USAGE_S
            is_held = (is_late or now_s > response.given_up_s) and not response.freed
            if is_held and "held-open" not in response.record.notes:
                response.record.notes.append("held-open")
            if is_late:
                self._free(response, now_s)
            if now_s > response.given_up_s:
                self._settle(connection, ("closed", ""))
            elif waited_s > limit_s and not tokens:
                self._settle(connection, ("timeout", f"no token after {limit_s:g} s"))
            elif waited_s > limit_s and waited_s > (whole_s := answer_timeout_s(limit_s, response.asked_tokens or 0)):
                self._settle(connection, ("timeout", f"not whole after {whole_s:g} s"))
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


def fetch(
    url: str,
    body: dict[str, Any],
    config: LoadConfig | None = None,
    header: dict[str, str] | None = None,
    canary: Canary | None = None,
) -> RequestRecord:
    """Send one request, wait, return its record; the body's `stream` and `return_token_ids` are set here."""
    whole = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **body}
    with Client(url, config, header=header) as client:
        record = RequestRecord(id=os.urandom(8).hex(), planned_s=client.clock.now(), canary=canary)
        client.start(record, msgspec.json.encode(whole))
        while not client.poll(client.clock.now() + 1.0):
            client.freed_s.clear()
    return record


def _reachable_addresses(server: ServerUrl) -> list[Address]:
    """The host's addresses that accept a connection, so that `localhost` finds a server on ::1 or 127.0.0.1; else the first."""
    try:
        addresses = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"cannot resolve {server.host}: {error.strerror}") from None
    found: list[Address] = list(dict.fromkeys((family, address) for family, _, _, _, address in addresses))
    if len(found) == 1:
        return found
    reachable: list[Address] = []
    for family, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_TIMEOUT_S)
            if probe.connect_ex(address) == 0:
                reachable.append((family, address))
    return reachable or found[:1]
