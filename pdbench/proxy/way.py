"""One request's way: into the queue, to a prefill and a decode instance, and decode's answer back to the client.

Until a byte was passed on, a failed stage is tried again at another instance; after that the client is told.
Try: pdbench proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --event-log events.jsonl
"""

import asyncio
import os
import time
from dataclasses import dataclass

from pdbench.config import ProxyConfig
from pdbench.events import ProxyEvent
from pdbench.proxy import first_token, wire
from pdbench.proxy.admission import Admission
from pdbench.proxy.ask import PREFIX_BYTES, Ask, fields_of, is_one_sequence, prompt_of, prompt_tokens
from pdbench.proxy.balancing import choose
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.dialects import Dialect, Handoff, Message, plain
from pdbench.proxy.errors import RefusedError, StageError
from pdbench.proxy.instances import Instance, InstanceTable
from pdbench.proxy.instants import EventLog, server_timing
from pdbench.proxy.metrics import Metrics
from pdbench.proxy.stream import EventStream
from pdbench.proxy.upstream import Leg, Pool

_EVENT_STREAM = b"text/event-stream; charset=utf-8"
# Prefill keeps the KV of a request that is over until decode has it. When a client leaves before decode's engine knows the
# request, decode gets this long to fetch the KV, so that prefill need not wait for its own timeout.
MEET_KV_S = 1.0


@dataclass(frozen=True, slots=True)
class Services:
    """What every request of a worker uses."""

    config: ProxyConfig
    dialect: Dialect
    table: InstanceTable
    pool: Pool
    admission: Admission
    event_log: EventLog
    metrics: Metrics
    api_key: bytes | None
    upstream_key: bytes | None


class Way:
    """One completion request; `run` ends when the client has its answer or has left.

    A leg's futures are awaited under a shield: a client that leaves cancels the waiting, never the leg, which must still be
    able to end.
    """

    def __init__(self, services: Services, ask: Ask, client: ClientConnection) -> None:
        self._services = services
        self._ask = ask
        self._client = client
        self._event = ProxyEvent(request_id=ask.request_id.decode("latin-1"), received_s=ask.received_s)
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._stream: EventStream | None = None
        self._alone = False
        self._early = False
        self._asked_late = False
        self._prefix = b""
        self._tokens = 0

    async def run(self) -> None:
        """Serve the request; every failure becomes an answer that names its stage."""
        event, admission = self._event, self._services.admission
        try:
            self._read_fields()
            await admission.enter()
            try:
                event.admitted_s = time.monotonic()
                await self._try_instances()
            finally:
                admission.leave()
        except (RefusedError, StageError) as failure:
            self._note(failure.status, failure.stage, failure.message)
            self._tell(failure)
        except asyncio.CancelledError:
            self._note(499, "client", "the client left")
            raise
        finally:
            self._end()

    def _read_fields(self) -> None:
        ask, dialect = self._ask, self._services.dialect
        ask.fields = fields_of(ask.body)
        prompt = prompt_of(ask.fields)
        self._prefix = prompt[:PREFIX_BYTES]
        self._tokens = prompt_tokens(prompt)
        self._alone = not dialect.HAS_PREFILL or (dialect.DECODE_ALONE and not is_one_sequence(ask.fields))
        wanted = self._services.config.first_token == "prefill" and dialect.FIRST_TOKEN and not self._alone
        self._early = wanted and first_token.is_exact(ask)

    def _tell(self, failure: RefusedError | StageError) -> None:
        """Give the client a failure as the answer, or as the end of the stream that has begun."""
        if self._stream is not None:
            self._stream.fail(failure.status, failure.message, failure.stage)
        elif isinstance(failure, RefusedError):
            self._client.refuse(failure)
        else:
            body = wire.error_body(failure.status, failure.message, stage=failure.stage)
            self._client.respond(failure.status, body, self._extra_headers())

    async def _try_instances(self) -> None:
        config = self._services.config
        tried: set[int] = set()
        failure: StageError | None = None
        while True:
            prefill, decode = self._choose(tried, failure)
            self._event.retries += failure is not None
            try:
                return await self._answer(await self._attempt(prefill, decode))
            except StageError as failed:
                failure = failed
            self._drop_legs(failure.message)
            if failure.slot is not None:
                tried.add(failure.slot)
            if self._event.retries >= config.retries:
                if not (failure.stage == "prefill" and self._may_recompute()):
                    raise failure
                self._alone = True

    def _may_recompute(self) -> bool:
        return self._services.config.fallback == "recompute" and self._services.dialect.DECODE_ALONE and not self._alone

    def _choose(self, tried: set[int], failure: StageError | None) -> tuple[Instance | None, Instance]:
        """The next pair of instances; without one, the last failure or a 503 is the answer."""
        config, table = self._services.config, self._services.table
        prefill = None
        if not self._alone:
            prefill = choose(config.prefill_policy, "prefill", table, self._prefix, tried)
            if prefill is None and not self._may_recompute():
                raise failure or RefusedError(503, "no prefill instance is ready", stage="prefill", retry_after_s=1)
        decode = choose(config.decode_policy, "decode", table, self._prefix, tried)
        if decode is None:
            raise failure or RefusedError(503, "no decode instance is ready", stage="decode", retry_after_s=1)
        self._event.prefill = prefill.address.url if prefill else None
        self._event.decode = decode.address.url
        return prefill, decode

    async def _attempt(self, prefill: Instance | None, decode: Instance) -> Leg:
        """Ask one pair of instances; returns the leg whose answer the client gets."""
        dialect, ask = self._services.dialect, self._ask
        transfer_id = os.urandom(16).hex()
        handoff = Handoff(transfer_id, (prefill or decode).address, decode.address)
        self._event.transfer_id = transfer_id if prefill else None
        if prefill is None:
            self._decode = self._start(decode, "decode", plain.decode(ask, handoff, b""))
            return self._decode
        asked = first_token.prefill_ask(ask) if self._early else ask
        self._prefill = self._start(prefill, "prefill", dialect.prefill(asked, handoff))
        reply = b""
        if dialect.AT_ONCE and not self._early:
            self._decode = self._start(decode, "decode", dialect.decode(ask, handoff, b""))
            await asyncio.wait((self._prefill.finished, self._decode.started), return_when=asyncio.FIRST_COMPLETED)
            if not self._prefill.finished.done():
                return self._decode
        await asyncio.shield(self._prefill.finished)
        if self._decode is not None and self._decode.first_byte_s is not None and self._decode.status == 200:
            return self._decode
        if self._prefill.status is not None and 400 <= self._prefill.status < 500 and self._prefill.error is None:
            return self._prefill
        _check(self._prefill)
        if self._decode is None:
            reply = self._prefill.body
            self._asked_late = True
            if self._early:
                handoff = self._pass_first_token(handoff, reply)
            self._decode = self._start(decode, "decode", self._decode_message(handoff, reply))
        return self._decode

    def _pass_first_token(self, handoff: Handoff, reply: bytes) -> Handoff:
        """Give the client prefill's token; from here on the request is what follows it, also when it is tried again."""
        self._early = False
        first = first_token.read(self._ask, reply)
        if first is None:
            return handoff
        self._note_legs()
        headers = [(b"content-type", _EVENT_STREAM), *self._extra_headers()]
        self._stream = EventStream(self._client, headers, first_token.edit(self._ask))
        self._stream.open(first.event)
        self._event.first_token_s = time.monotonic()
        self._ask = first.rest
        return handoff._replace(prefilled_tokens=first.prefilled_tokens)

    def _decode_message(self, handoff: Handoff, reply: bytes) -> Message:
        try:
            return self._services.dialect.decode(self._ask, handoff, reply)
        except ValueError:
            assert self._prefill is not None
            raise StageError("prefill", self._prefill.instance.slot, "prefill's answer is not JSON") from None

    def _start(self, instance: Instance, stage: str, message: Message) -> Leg:
        services, ask = self._services, self._ask
        limit_s = services.config.prefill_timeout_s if stage == "prefill" else services.config.decode_timeout_s
        leg = Leg(services.pool, instance, stage, tokens=self._tokens, limit_s=limit_s)
        netloc = instance.address.netloc.encode()
        leg.start(upstream_request(services, ask, netloc, message))
        return leg

    async def _answer(self, leg: Leg) -> None:
        """Pass the leg's answer on: events as they come, anything else whole, so that it can still become an error."""
        await asyncio.shield(leg.started)
        if leg.is_event_stream and leg.first_byte_s is not None:
            self._note_legs()
            self._event.status = 200
            stream = self._stream or EventStream(self._client, leg.headers + self._extra_headers())
            stream.follow(leg)
            await asyncio.shield(leg.finished)
            error = stream.close()
            if error is not None:
                self._note(200, "decode", f"mid-stream: {error}")
            return
        await asyncio.shield(leg.finished)
        status = _check(leg)
        self._note_legs()
        if self._stream is not None:
            answer = leg.body[:500].decode(errors="replace")
            raise RefusedError(status, f"decode answered {status} with no stream: {answer}", stage="decode")
        self._note(status, leg.stage if status >= 400 else None, f"answered {status}" if status >= 400 else None)
        self._client.respond(status, leg.body, leg.headers + self._extra_headers())

    def _extra_headers(self) -> wire.Headers:
        if not self._services.config.timing_header:
            return []
        return [(b"server-timing", server_timing(self._event))]

    def _note(self, status: int, stage: str | None, error: str | None) -> None:
        self._event.status, self._event.stage, self._event.error = status, stage, error

    def _note_legs(self) -> None:
        event = self._event
        if self._prefill is not None:
            event.prefill_sent_s = self._prefill.sent_s
            event.prefill_done_s = self._prefill.end_s if self._prefill.error is None else None
        if self._decode is not None:
            event.decode_sent_s = self._decode.sent_s
            event.first_byte_s = self._decode.first_byte_s
            event.last_byte_s = self._decode.end_s if self._decode.error is None else None

    def _drop_legs(self, reason: str) -> None:
        for leg in (self._prefill, self._decode):
            if leg is not None:
                leg.abort(reason)
        self._note_legs()
        self._prefill = self._decode = None

    def _end(self) -> None:
        """Log the request. A prefill whose answer comes after decode's runs on, and the log waits for it."""
        prefill, decode = self._prefill, self._decode
        well = decode is not None and decode.finished.done() and decode.error is None and self._event.error is None
        if well and prefill is not None and not prefill.finished.done():
            prefill.finished.add_done_callback(lambda _: self._log())
            return
        reason = self._event.error or "not needed any more"
        if prefill is not None:
            prefill.abort(reason)
        if decode is not None and self._asked_late and not decode.started.done():
            decode.started.add_done_callback(lambda _: decode.abort(reason))
            asyncio.get_running_loop().call_later(MEET_KV_S, decode.abort, reason)
        elif decode is not None:
            decode.abort(reason)
        self._log()

    def _log(self) -> None:
        self._note_legs()
        self._services.event_log.write(self._event)
        self._services.metrics.count(self._event)


def _check(leg: Leg) -> int:
    """The status of a leg that ended well; raises StageError for any other."""
    where = f"{leg.stage} {leg.instance.address.url}"
    if leg.error is not None or leg.status is None:
        raise StageError(leg.stage, leg.instance.slot, f"{where}: {leg.error}", timed_out=leg.timed_out)
    if leg.status >= 500:
        raise StageError(leg.stage, leg.instance.slot, f"{where} answered {leg.status}")
    if leg.first_byte_s is None:
        raise StageError(leg.stage, leg.instance.slot, f"{where} answered {leg.status} with an empty body")
    return leg.status


def upstream_request(services: Services, ask: Ask, netloc: bytes, message: Message) -> bytes:
    """The request that an instance gets. The proxy's own key stays with the proxy."""
    key = services.upstream_key if services.api_key is not None else services.upstream_key or ask.authorization
    return wire.request(ask.method, ask.target, netloc, ask.headers, message.body, message.request_id, key)


async def pass_through(services: Services, ask: Ask, client: ClientConnection) -> None:
    """A request that needs no prefill (the models' list, tokenize, ...): any ready instance answers it."""
    decode = choose("least-work", "decode", services.table, b"", set())
    if decode is None:
        raise RefusedError(503, "no decode instance is ready", stage="decode", retry_after_s=1)
    leg = Leg(services.pool, decode, "decode", tokens=0, limit_s=services.config.request_timeout_s)
    netloc = decode.address.netloc.encode()
    leg.start(upstream_request(services, ask, netloc, Message(ask.body, ask.request_id)))
    try:
        await asyncio.shield(leg.finished)
        status = _check(leg)
    except StageError as failure:
        raise RefusedError(failure.status, failure.message, stage=failure.stage) from None
    finally:
        leg.abort("the client left")
    client.respond(status, leg.body, leg.headers)
