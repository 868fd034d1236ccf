"""What servers tell of themselves. Proxy and KV connectors: one JSON line per event, written and read by the same structs.

The client names its request in X-Request-Id, the proxy logs that name beside its transfer id, the connectors log the latter.
`pdbench.kv`, which runs inside vLLM, imports this module and nothing else of pdbench: it needs msgspec alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, get_type_hints

import msgspec

if TYPE_CHECKING:
    from pdbench.records import Interval, RequestRecord


Instant = Annotated[float | None, "an instant on the clock of its writer's host until `move` puts it on another"]
Instants = Annotated[list[float], "several of them"]


class ProxyEvent(msgspec.Struct, kw_only=True, tag="request", tag_field="event"):
    """One request's way through the proxy. Instants are None where a stage was not reached.

    `received_s`: the request was read whole; `first_token_s`: prefill's token was passed on as the client's first;
    `first_byte_s`: first byte of decode's body; `error`: what failed. `prompt_tokens` is the proxy's estimate; `decode_alone`: why decode
    computed the prompt although there are prefill instances ("short", "several-sequences", "stateful", "unnamed", "prefill-failed", "prefill-refused");
    `first_tokens_differ`: decode's first token was not prefill's, which had opened the stream, and decode was sent the request again.
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
    prompt_tokens: int = 0
    decode_alone: str | None = None
    retries: int = 0
    first_tokens_differ: bool = False
    status: int = 0
    stage: str | None = None
    error: str | None = None


class TransferEvent(msgspec.Struct, kw_only=True, tag="kv_transfer", tag_field="event"):
    """One finished KV transfer on one side ("send" or "receive"). Instants are None for what never happened.

    `wire_s` is the time in which its bytes moved, `copy_s` that in which they were gathered from the cache (send side, once its forward pass
    was over) or written into it; `ready_s` (send side): its last forward pass was over and decode had asked; `reported_s`
    (receive side): vLLM was told, from then on it can schedule the request. `direction`: a "handoff" goes from prefill to decode, a
    "return" brings prefill what decode has of the same request's prompt.
    """

    side: str
    transfer_id: str
    direction: str = "handoff"
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
    copy_s: float | None = None
    error: str | None = None

    @property
    def wait_s(self) -> float | None:
        if self.asked_s is None or self.first_byte_s is None:
            return None
        return self.first_byte_s - self.asked_s

    def moved(self, count: int, blocks: int, begun_s: float, wire_s: float, copy_s: float) -> None:
        """Count one piece that moved within `wire_s` and was copied from or to the cache within `copy_s`."""
        if self.first_byte_s is None:
            self.first_byte_s = begun_s
        self.bytes += count
        self.blocks += blocks
        self.pieces += 1
        self.wire_s = (self.wire_s or 0.0) + wire_s
        self.copy_s = (self.copy_s or 0.0) + copy_s


class Flag(msgspec.Struct, frozen=True):
    """Something a reader must know wherever the run's figures appear: `name` (client-limited, gate-failed, ...), `detail`."""

    name: str
    detail: str


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
    values: dict[str, list[Annotated[float, msgspec.Meta(ge=0, le=1e18)] | None]] = {}
    missed: int = 0
    lines: list[LogLine] = []


class PrefixCacheCounts(msgspec.Struct, frozen=True):
    """What one instance counted during a load, its warm-up left out: prompt tokens, and those that its prefix cache had."""

    role: str
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    cached_tokens: Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class EngineFacts(msgspec.Struct, kw_only=True):
    """An engine's limits as vLLM resolved them: from its log and /metrics; None where neither says."""

    role: str
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    async_scheduling: bool | None = None
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None
    graph_sizes: list[int] | None = None
    kv_cache_tokens: int | None = None
    block_size: int | None = None


class PromptEvent(msgspec.Struct, kw_only=True, tag="prompt", tag_field="event"):
    """One prompt on one vLLM server ("prefill-0"), until its first token or its end (`error`) without one.

    `request_id` is vLLM's. `arrived_s`: the API server had its tokens; `taken_s`: the engine took it from its input. One entry per step that
    computed a part of the prompt, the part's tokens in `tokens`: `begin_s` when it was scheduled, later by what the engine then waited for the
    step before; `end_s` when its output was there. On decode the parts are what did not come from prefill, as a rule the last token.
    """

    server: str
    request_id: str
    transfer_id: str | None = None
    prompt_tokens: int = 0
    arrived_s: Instant = None
    taken_s: Instant = None
    begin_s: Instants = []
    end_s: Instants = []
    tokens: list[int] = []
    first_token_s: Instant = None
    error: str | None = None


Event = ProxyEvent | TransferEvent | PromptEvent
_INSTANTS = {
    kind: [name for name, hint in get_type_hints(kind, include_extras=True).items() if hint in (Instant, Instants)]
    for kind in (ProxyEvent, TransferEvent, PromptEvent)
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
        at_s = getattr(event, name)
        if at_s is not None:
            setattr(event, name, [to_clock(each_s) for each_s in at_s] if isinstance(at_s, list) else to_clock(at_s))
    return event


def ways_of(events: Iterable[Event]) -> dict[str, ProxyEvent]:
    """The client's request id -> what the proxy logged of the request."""
    return {event.request_id: event for event in events if isinstance(event, ProxyEvent) and event.request_id}


def join(requests: "Iterable[RequestRecord]", events: Iterable[Event], has_prefill: bool = False) -> None:
    """Fill each request's `phases` from the events that name it; a phase that nobody reported is None (docs/metrics.md).

    `has_prefill`: the deployment has prefill instances, whether or not an event says that the request went through one.
    """
    events = list(events)
    proxied = ways_of(events)
    received: dict[str, list[TransferEvent]] = {}
    # Of a request that was tried at several instances, the last one that computed its prompt; decode's part of it apart.
    prompts: dict[tuple[str, bool], PromptEvent] = {}
    transfers = {way.transfer_id: name for name, way in proxied.items() if way.transfer_id}
    for event in events:
        if isinstance(event, TransferEvent) and event.side == "receive" and event.direction == "handoff":
            received.setdefault(event.transfer_id, []).append(event)
    computed = [event for event in events if isinstance(event, PromptEvent) and event.first_token_s and event.begin_s]
    for event in sorted(computed, key=lambda event: event.first_token_s or 0.0):
        for name in _client_names(event, transfers):
            prompts[name, event.server.startswith("decode")] = event
    for request in requests:
        way, phases = proxied.get(request.id), request.phases
        through_prefill = has_prefill if way is None else way.prefill_sent_s is not None and way.decode_alone is None
        first_s, last_s = (request.token_s[0], request.token_s[-1]) if request.token_s else (None, None)
        if through_prefill:
            # What the server itself said (pdbench.load.response) is of decode, measured back from its first token. There a request
            # also queues for its KV.
            for name, of_decode in (("queue", "decode_queue"), ("compute", "decode_step")):
                span = phases.pop(name, None)
                if span is not None and (way is None or way.first_token_s is None):
                    phases[of_decode] = span
        ready_s = None
        if way is not None:
            # From the first byte to the end over all ranks of decode; no end where one of them failed.
            ranks = received.get(way.transfer_id or "", [])
            kv_begin_s = min((rank.first_byte_s for rank in ranks if rank.first_byte_s is not None), default=None)
            kv_end_s, ready_s = _last(ranks, "end_s"), _last(ranks, "reported_s")
            # Without a prefill instance (replicas) the same instance computes the prompt too: no instant tells where decode begins.
            decode_begin_s = way.decode_sent_s if kv_end_s is None else kv_end_s
            phases |= {
                "send": _interval(request.sent_s, way.received_s),
                "proxy": _interval(way.received_s, way.prefill_sent_s if through_prefill else way.decode_sent_s),
                "prefill": _interval(way.prefill_sent_s, way.prefill_done_s),
                "kv_transfer": _interval(kv_begin_s, kv_end_s),
                "decode": _interval(decode_begin_s, last_s) if through_prefill else None,
            }
            if way.decode_alone is not None:
                phases["decode_alone"] = _interval(way.decode_sent_s, last_s)
        prompt, decode = prompts.get((request.id, False)), prompts.get((request.id, True))
        if not through_prefill:
            prompt, decode = decode or prompt, None  # of decode: what prefill computed was of no use
        if prompt is not None:
            sent_s = None if through_prefill else request.sent_s  # without an event: what the proxy did is not known
            if way is not None:
                sent_s = way.prefill_sent_s if through_prefill else way.decode_sent_s
            phases |= {
                "api_server": _interval(sent_s, prompt.arrived_s),
                "queue": _interval(prompt.arrived_s, prompt.begin_s[0]),
                "compute": _interval(prompt.begin_s[0], prompt.first_token_s),
            }
            steps = zip(prompt.begin_s, prompt.end_s, strict=False)
            phases |= {f"compute_{number}": _interval(*step) for number, step in enumerate(steps, 1)}
        if decode is not None:
            # Other connectors do not say when decode has the KV: then the handoff lasts until decode's first step.
            handed_s = decode.begin_s[0] if ready_s is None else ready_s
            computed_s = None if prompt is None else prompt.first_token_s
            phases |= {
                # KV can arrive before prefill's scheduler has seen that the step is over.
                "handoff": None if computed_s is None else _interval(min(computed_s, handed_s), handed_s),
                "decode_wait": _interval(ready_s, decode.begin_s[0]),
                "decode_step": _interval(decode.begin_s[0], decode.first_token_s),
            }
        opener = prompt
        if through_prefill and (way is None or way.first_token_s is None):
            opener = None if way is None else decode
        if opener is not None:
            phases["reply"] = _interval(opener.first_token_s, first_s)


def _client_names(event: PromptEvent, transfers: dict[str, str]) -> Iterator[str]:
    """What the client may have called the request: vLLM puts "cmpl-" or "chatcmpl-" before it, numbers or random digits after it."""
    if event.transfer_id in transfers:
        yield transfers[event.transfer_id]
        return
    name = event.request_id.partition("-")[2]
    # With vLLM's own P2P connector and NixlPushConnector the transfer's id is a part of the name.
    yield from (transfers[part] for part in re.split("[_-]", name) if part in transfers)
    yield name
    for _ in range(2):
        name = name.rpartition("-")[0]
        yield name


def _last(ranks: "list[TransferEvent]", instant: str) -> float | None:
    """The last rank's instant, None where a rank failed or has none."""
    instants = [getattr(rank, instant) for rank in ranks if not rank.error]
    return max(instants) if instants and len(instants) == len(ranks) and None not in instants else None


def _interval(start_s: float | None, end_s: float | None) -> "Interval | None":
    return None if start_s is None or end_s is None or end_s < start_s else (start_s, end_s)
