"""What servers tell of themselves. Proxy and KV connectors: one JSON line per event, written and read by the same structs.

The client names its request in X-Request-Id, the proxy logs that name beside its transfer id, the connectors log the latter.
`pdbench.kv`, which runs inside vLLM, imports this module and nothing else of pdbench: it needs msgspec alone.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, get_type_hints

import msgspec

if TYPE_CHECKING:
    from pdbench.records import Interval, RequestRecord


Instant = Annotated[float | None, "an instant on the clock of its writer's host until `move` puts it on another"]


class ProxyEvent(msgspec.Struct, kw_only=True, tag="request", tag_field="event"):
    """One request's way through the proxy. Instants are None where a stage was not reached.

    `received_s`: the request was read whole; `first_token_s`: prefill's token was passed on as the client's first;
    `first_byte_s`: first byte of decode's body; `error`: what failed.
    """

    request_id: str = ""
    transfer_id: str | None = None
    received_s: Instant = None
    admitted_s: Instant = None
    prefill_sent_s: Instant = None
    prefill_done_s: Instant = None
    first_token_s: Instant = None
    decode_sent_s: Instant = None
    first_byte_s: Instant = None
    last_byte_s: Instant = None
    prefill: str | None = None
    decode: str | None = None
    retries: int = 0
    status: int = 0
    stage: str | None = None
    error: str | None = None


class TransferEvent(msgspec.Struct, kw_only=True, tag="kv_transfer", tag_field="event"):
    """One finished KV transfer on one side ("send" or "receive"). Instants are None for what never happened.

    `wire_s` is the time in which its bytes moved; `ready_s` (send side): its last forward pass was over; `reported_s`
    (receive side): vLLM was told, from then on decode can schedule the request.
    """

    side: str
    transfer_id: str
    rank: int = 0
    peer: str | None = None
    bytes: int = 0
    tokens: int = 0
    blocks: int = 0
    pieces: int = 0
    asked_s: Instant = None
    ready_s: Instant = None
    first_byte_s: Instant = None
    end_s: Instant = None
    reported_s: Instant = None
    wire_s: float | None = None
    error: str | None = None

    @property
    def wait_s(self) -> float | None:
        """Seconds from the ask to the first byte, None if either never happened."""
        if self.asked_s is None or self.first_byte_s is None:
            return None
        return self.first_byte_s - self.asked_s

    def moved(self, count: int, blocks: int, begun_s: float, seconds: float) -> None:
        """Count one piece that took `seconds` on the wire."""
        if self.first_byte_s is None:
            self.first_byte_s = begun_s
        self.bytes += count
        self.blocks += blocks
        self.pieces += 1
        self.wire_s = (self.wire_s or 0.0) + seconds


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a server's log that a reader must know: when it was read, the `flag` that it is a reason for, and what it means."""

    t_s: float
    flag: str
    text: str
    meaning: str


class ServerSeries(msgspec.Struct, kw_only=True):
    """What one server counted while loads ran. `values` maps a name of `server_metrics.NAMES` to its value at each of `t_s`, the
    middles of the readings (None: not told); `missed` readings had no answer. `lines` are those of its log during the loads."""

    server: str
    role: str
    t_s: list[float] = []
    values: dict[str, list[float | None]] = {}
    missed: int = 0
    lines: list[LogLine] = []


Event = ProxyEvent | TransferEvent
_INSTANTS = {
    kind: [name for name, hint in get_type_hints(kind, include_extras=True).items() if hint == Instant]
    for kind in (ProxyEvent, TransferEvent)
}
_decode = msgspec.json.Decoder(Event).decode


def parse(lines: Iterable[bytes | str]) -> list[Event]:
    """The events of an event log's lines, their instants on its host's monotonic clock; lines of other kinds are left out."""
    events = []
    for line in lines:
        try:
            events.append(_decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # another kind of line, or the last one of a process that was killed
    return events


def move(event: Event, to_clock: Callable[[float], float]) -> Event:
    """Put every instant of `event` on another clock, in place."""
    for name in _INSTANTS[type(event)]:
        instant_s = getattr(event, name)
        if instant_s is not None:
            setattr(event, name, to_clock(instant_s))
    return event


def join(requests: "Iterable[RequestRecord]", events: Iterable[Event], has_prefill: bool = False) -> None:
    """Fill each request's `phases` from the events that name it; a phase that nobody reported is None.

    `has_prefill`: the deployment has prefill instances, whether or not an event says that the request went through one.
    """
    events = list(events)
    proxied = {event.request_id: event for event in events if isinstance(event, ProxyEvent) and event.request_id}
    received: dict[str, list[TransferEvent]] = {}
    for event in events:
        if isinstance(event, TransferEvent) and event.side == "receive":
            received.setdefault(event.transfer_id, []).append(event)
    for request in requests:
        way = proxied.get(request.id)
        if "queue" in request.phases and (has_prefill or (way is not None and way.prefill_sent_s is not None)):
            # The answer came from decode, whose queue is where a request waits for its KV: not the wait of the single instance.
            request.phases["decode_queue"] = request.phases.pop("queue")
        if way is None:
            continue
        # From the first byte to the end over all ranks of decode; no end where one of them failed.
        ranks = received.get(way.transfer_id or "", [])
        kv_begin_s = min((rank.first_byte_s for rank in ranks if rank.first_byte_s is not None), default=None)
        ends = [rank.end_s for rank in ranks if rank.end_s is not None and not rank.error]
        kv_end_s = max(ends) if ends and len(ends) == len(ranks) else None
        last_token_s = request.token_s[-1] if request.token_s else None
        # Without a prefill instance (replicas) the same instance computes the prompt too: no instant tells where decode begins.
        decode_begin_s = way.decode_sent_s if kv_end_s is None else kv_end_s
        decode = None if way.prefill_sent_s is None else _interval(decode_begin_s, last_token_s)
        request.phases |= {
            "prefill": _interval(way.prefill_sent_s, way.prefill_done_s),
            "kv_transfer": _interval(kv_begin_s, kv_end_s),
            "decode": decode,
        }


def _interval(start_s: float | None, end_s: float | None) -> "Interval | None":
    return None if start_s is None or end_s is None or end_s < start_s else (start_s, end_s)
