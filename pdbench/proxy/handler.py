"""One completion request: it is queued, sent to a prefill and a decode instance, and decode's answer passed back.

A stage that fails before a byte was passed on is tried again at another instance; after that the client gets the error.
"""

import asyncio
import os
import time
from collections import deque
from dataclasses import dataclass

from pdbench.config import ProxyConfig
from pdbench.events import ProxyEvent
from pdbench.proxy import first_token, messages
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.instances import Instance, InstanceTable, choose
from pdbench.proxy.kv_protocols import Handoff, KvProtocol, Message, plain_decode
from pdbench.proxy.messages import ClientRequest, Headers, RequestError, StageError
from pdbench.proxy.stream import EventStream
from pdbench.proxy.telemetry import EventLog, Metrics, server_timing
from pdbench.proxy.upstream import ConnectionPool, UpstreamRequest

_PREFIX_BYTES = 1024
_EVENT_STREAM = b"text/event-stream; charset=utf-8"
# Prefill keeps the KV of a finished request until decode has fetched it. When a client leaves before decode's engine
# knows the request, decode gets this long to fetch the KV, so that prefill need not wait for its own timeout.
FETCH_KV_S = 1.0


class Admission:
    """A bounded number of requests in flight, and a bounded first-come, first-served queue before them."""

    def __init__(self, max_in_flight: int, queue_size: int, queue_timeout_s: float) -> None:
        self.in_flight = 0
        self._max_in_flight = max_in_flight
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self) -> None:
        """Wait for a place; raises RequestError(429) when the queue is full or the wait too long."""
        if self.in_flight < self._max_in_flight:
            self.in_flight += 1
            return
        if len(self._queue) >= self._queue_size:
            raise RequestError(429, "the proxy's queue is full: try again later", stage="queue", retry_after_s=1)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place in self._queue:
                self._queue.remove(place)
            elif not place.cancelled():
                self.leave()  # the place was given in the same moment
            if isinstance(error, asyncio.CancelledError):
                raise
            text = f"no place within {self._queue_timeout_s:g} s: try again later"
            raise RequestError(429, text, stage="queue", retry_after_s=1) from None

    def leave(self) -> None:
        """Give the place to the next request in the queue."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_flight -= 1


@dataclass(slots=True)
class ProxyContext:
    """What all requests of a worker share; keys are None where none is set."""

    config: ProxyConfig
    protocol: KvProtocol
    table: InstanceTable
    pool: ConnectionPool
    admission: Admission
    event_log: EventLog
    metrics: Metrics
    api_key: bytes | None
    admin_key: bytes | None
    upstream_key: bytes | None
    draining: bool = False

    def send(
        self, request: ClientRequest, instance: Instance, stage: str, message: Message, *, tokens: int, timeout_s: float
    ) -> UpstreamRequest:
        """Send a client's request, with this body and id, to an instance."""
        upstream = UpstreamRequest(self.pool, instance, stage, tokens=tokens, timeout_s=timeout_s)
        # A client's key for the proxy stays here; without one of the proxy's own it is for the instances.
        key = self.upstream_key if self.api_key is not None else self.upstream_key or request.authorization
        host = instance.address.netloc.encode()
        upstream.start(messages.upstream_bytes(request, host, message.body, message.request_id, key))
        return upstream


def check_answer(upstream: UpstreamRequest) -> int:
    """The status of a finished request whose answer can be passed on; raises StageError for any other."""
    stage, slot = upstream.stage, upstream.instance.slot
    name = f"{stage} {upstream.instance.address.url}"
    if upstream.error is not None or upstream.status is None:
        raise StageError(stage, slot, f"{name}: {upstream.error}", timed_out=upstream.timed_out)
    if upstream.status >= 500:
        raise StageError(stage, slot, f"{name} answered {upstream.status}")
    if upstream.first_byte_s is None:
        raise StageError(stage, slot, f"{name} answered {upstream.status} with an empty body")
    return upstream.status


class RequestHandler:
    """Handles one completion request; `run` returns when the client has its answer or has left."""

    # The futures of upstream requests are awaited under a shield: a client that leaves cancels the waiting, but the
    # upstream request must still be able to end.

    def __init__(self, context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
        self._context = context
        self._request = request
        self._client = client
        self._event = ProxyEvent(request_id=request.request_id.decode("latin-1"), received_s=request.received_s)
        self._prefill: UpstreamRequest | None = None
        self._decode: UpstreamRequest | None = None
        self._stream: EventStream | None = None
        self._decode_only = False
        self._wants_first_token = False
        self._decode_after_prefill = False
        self._prefix = b""
        self._tokens = 0

    async def run(self) -> None:
        """Handle the request; every failure becomes an answer that names its stage."""
        context, request, admission = self._context, self._request, self._context.admission
        protocol = context.protocol
        try:
            request.fields = messages.parse_fields(request.body)
            prompt = bytes(request.fields.get("prompt") or request.fields.get("messages") or b"")
            self._prefix = prompt[:_PREFIX_BYTES]
            self._tokens = messages.prompt_tokens(prompt)
            transferable = messages.is_single_sequence(request.fields) or not protocol.decode_can_prefill
            self._decode_only = protocol.prefill is None or not transferable
            may_open = protocol.first_token and context.config.first_token == "prefill" and not self._decode_only
            self._wants_first_token = may_open and first_token.is_exact(request)
            await admission.enter()
            try:
                self._event.admitted_s = time.monotonic()
                await self._try_instances()
            finally:
                admission.leave()
        except RequestError as error:
            self._note(error.status, error.stage, error.message)
            if self._stream is not None:
                self._stream.fail(error)
            else:
                self._client.refuse(error, self._timing_header())
        except asyncio.CancelledError:
            self._note(499, "client", "the client left")
            raise
        finally:
            self._end()

    async def _try_instances(self) -> None:
        tried: set[int] = set()
        failure: StageError | None = None
        while True:
            prefill, decode = self._choose(tried, failure)
            self._event.retries += failure is not None
            try:
                return await self._answer(await self._attempt(prefill, decode))
            except StageError as error:
                failure = error
            for upstream in (self._prefill, self._decode):
                if upstream is not None:
                    upstream.end(failure.message)
            self._note_instants()
            self._prefill = self._decode = None
            tried.add(failure.slot)
            if self._event.retries >= self._context.config.retries:
                if not (failure.stage == "prefill" and self._may_recompute()):
                    raise failure
                self._decode_only = True

    def _may_recompute(self) -> bool:
        context = self._context
        return context.config.fallback == "recompute" and context.protocol.decode_can_prefill and not self._decode_only

    def _choose(self, tried: set[int], failure: StageError | None) -> tuple[Instance | None, Instance]:
        """The next pair of instances; raises the last failure, or a 503, if there is none."""
        config, table = self._context.config, self._context.table
        prefill = None
        if not self._decode_only:
            prefill = choose(config.prefill_policy, "prefill", table, self._prefix, tried)
            if prefill is None and not self._may_recompute():
                raise failure or RequestError(503, "no prefill instance is ready", stage="prefill", retry_after_s=1)
        decode = choose(config.decode_policy, "decode", table, self._prefix, tried)
        if decode is None:
            raise failure or RequestError(503, "no decode instance is ready", stage="decode", retry_after_s=1)
        self._event.prefill = prefill.address.url if prefill else None
        self._event.decode = decode.address.url
        return prefill, decode

    async def _attempt(self, prefill: Instance | None, decode: Instance) -> UpstreamRequest:
        """Send the request to one pair of instances; returns the upstream request whose answer the client gets."""
        protocol, request = self._context.protocol, self._request
        transfer_id = os.urandom(16).hex()
        handoff = Handoff(transfer_id, (prefill or decode).address, decode.address)
        self._event.transfer_id = transfer_id if prefill else None
        if prefill is None or protocol.prefill is None:
            self._decode = self._send(decode, "decode", plain_decode(request, handoff, b""))
            return self._decode
        to_prefill = first_token.prefill_request(request) if self._wants_first_token else request
        self._prefill = self._send(prefill, "prefill", protocol.prefill(to_prefill, handoff))
        if protocol.concurrent_dispatch and not self._wants_first_token:
            self._decode = self._send(decode, "decode", protocol.decode(request, handoff, b""))
            await asyncio.wait((self._prefill.finished, self._decode.started), return_when=asyncio.FIRST_COMPLETED)
            if not self._prefill.finished.done():
                return self._decode
        await asyncio.shield(self._prefill.finished)
        if self._decode is not None and self._decode.first_byte_s is not None and self._decode.status == 200:
            return self._decode
        if self._prefill.status is not None and 400 <= self._prefill.status < 500 and self._prefill.error is None:
            return self._prefill
        check_answer(self._prefill)
        if self._decode is None:
            prefill_answer = self._prefill.body
            self._decode_after_prefill = True
            if self._wants_first_token:
                handoff = self._pass_first_token(handoff, prefill_answer)
            try:
                message = protocol.decode(self._request, handoff, prefill_answer)
            except ValueError:
                raise StageError("prefill", prefill.slot, "prefill's answer is not JSON") from None
            self._decode = self._send(decode, "decode", message)
        return self._decode

    def _pass_first_token(self, handoff: Handoff, prefill_answer: bytes) -> Handoff:
        """Open the client's stream with prefill's token; from here on the request is for the tokens after it."""
        self._wants_first_token = False
        first = first_token.read(self._request, prefill_answer)
        if first is None:
            return handoff
        self._note_instants()
        headers = [(b"content-type", _EVENT_STREAM), *self._timing_header()]
        self._stream = EventStream(self._client, headers, first_token.event_editor(self._request))
        self._stream.open(first.event)
        self._event.first_token_s = time.monotonic()
        self._request = first.rest
        return handoff._replace(prefilled_tokens=first.prefilled_tokens)

    def _send(self, instance: Instance, stage: str, message: Message) -> UpstreamRequest:
        config = self._context.config
        timeout_s = config.prefill_timeout_s if stage == "prefill" else config.decode_timeout_s
        return self._context.send(self._request, instance, stage, message, tokens=self._tokens, timeout_s=timeout_s)

    async def _answer(self, upstream: UpstreamRequest) -> None:
        """Pass an answer on: events as they come, anything else whole, so that it can still become an error."""
        await asyncio.shield(upstream.started)
        is_events = (messages.header(upstream.headers, b"content-type") or b"").startswith(b"text/event-stream")
        if is_events and upstream.status == 200 and upstream.first_byte_s is not None:
            self._note_instants()
            self._event.status = 200
            stream = self._stream or EventStream(self._client, upstream.headers + self._timing_header())
            stream.follow(upstream)
            await asyncio.shield(upstream.finished)
            error = stream.close()
            if error is not None:
                self._note(200, "decode", f"mid-stream: {error}")
            return
        await asyncio.shield(upstream.finished)
        status = check_answer(upstream)
        self._note_instants()
        if self._stream is not None:
            text = upstream.body[:500].decode(errors="replace")
            raise RequestError(status, f"decode answered {status} with no stream: {text}", stage="decode")
        self._note(status, upstream.stage if status >= 400 else None, f"answered {status}" if status >= 400 else None)
        self._client.respond(status, upstream.body, upstream.headers + self._timing_header())

    def _timing_header(self) -> Headers:
        enabled = self._context.config.timing_header and self._event.admitted_s is not None
        return [(b"server-timing", server_timing(self._event))] if enabled else []

    def _note(self, status: int, stage: str | None, error: str | None) -> None:
        self._event.status, self._event.stage, self._event.error = status, stage, error

    def _note_instants(self) -> None:
        event, prefill, decode = self._event, self._prefill, self._decode
        if prefill is not None:
            event.prefill_sent_s = prefill.sent_s
            event.prefill_done_s = prefill.end_s if prefill.error is None else None
        if decode is not None:
            event.decode_sent_s = decode.sent_s
            event.first_byte_s = decode.first_byte_s
            event.last_byte_s = decode.end_s if decode.error is None else None

    def _end(self) -> None:
        """End what still runs, and log the request."""
        prefill, decode = self._prefill, self._decode
        succeeded = decode is not None and decode.finished.done() and decode.error is None and self._event.error is None
        if succeeded and prefill is not None and not prefill.finished.done():
            # Decode's answer can be complete before prefill's: then prefill runs on, and the log line waits for it.
            prefill.finished.add_done_callback(lambda _: self._log())
            return
        reason = self._event.error or "not needed any more"
        if prefill is not None:
            prefill.end(reason)
        if decode is not None and self._decode_after_prefill and not decode.started.done():
            decode.started.add_done_callback(lambda _: decode.end(reason))
            asyncio.get_running_loop().call_later(FETCH_KV_S, decode.end, reason)
        elif decode is not None:
            decode.end(reason)
        self._log()

    def _log(self) -> None:
        self._note_instants()
        self._context.event_log.write(self._event)
        self._context.metrics.count(self._event)
