"""One completion request: it is queued, sent to a prefill and a decode instance, and decode's answer passed back."""

import asyncio
import os
import time
from dataclasses import dataclass, field, replace
from math import ceil

from pdbench.config import ProxyConfig
from pdbench.events import ProxyEvent
from pdbench.proxy import first_token, kv_protocols, messages
from pdbench.proxy.client import ClientConnection, EventStream
from pdbench.proxy.instances import Instance, InstanceTable, choose
from pdbench.proxy.kv_protocols import PROTOCOLS, Handoff, decode_body, prefill_body
from pdbench.proxy.messages import ClientRequest, Headers, RequestError, StageError
from pdbench.proxy.telemetry import Telemetry, server_timing
from pdbench.proxy.upstream import ConnectionPool, UpstreamRequest

_EVENT_STREAM = b"text/event-stream; charset=utf-8"
# Prefill keeps the KV of a finished request until decode has fetched it. When a client leaves before decode's engine
# knows the request, decode gets this long to fetch the KV, so that prefill need not wait for its own timeout.
FETCH_KV_S = 1.0


class ProxyContext:
    """What all requests of a worker share; `requests` counts those in flight and in the queue."""

    def __init__(
        self, config: ProxyConfig, table: InstanceTable, event_log: int | None, metrics_dir: str | None
    ) -> None:
        self.config = config
        self.protocol = PROTOCOLS[config.connector]
        self.table = table
        self.pool = ConnectionPool(table, config)
        max_in_flight = ceil(config.max_in_flight / config.workers)
        self.requests = 0
        self._max_requests = max_in_flight + ceil(config.queue_size / config.workers)
        self._places = asyncio.Semaphore(max_in_flight)
        self.telemetry = Telemetry(table, event_log, metrics_dir)
        # Keys are never options: a process list shows options. An empty one is none.
        self.api_key = os.environb.get(b"PDBENCH_PROXY_API_KEY", b"")
        self.admin_key = os.environb.get(b"PDBENCH_PROXY_ADMIN_KEY", b"")
        self.upstream_key = os.environb.get(b"PDBENCH_UPSTREAM_API_KEY", b"")
        self.draining = False

    async def admit(self) -> None:
        """Wait for a place in flight, first come, first served; raises RequestError: the queue is full, the wait too long."""
        timeout_s = self.config.queue_timeout_s
        if self.requests >= self._max_requests:
            raise RequestError(429, "the proxy's queue is full: try again later", stage="queue")
        self.requests += 1
        try:
            if self._places.locked():
                async with asyncio.timeout(timeout_s):
                    await self._places.acquire()
            else:
                await self._places.acquire()
        except BaseException as error:
            self.requests -= 1
            if isinstance(error, TimeoutError):
                text = f"no place within {timeout_s:g} s: try again later"
                raise RequestError(429, text, stage="queue") from None
            raise

    def leave(self) -> None:
        self._places.release()
        self.requests -= 1

    def send(
        self, request: ClientRequest, instance: Instance, stage: str, body: bytes, timeout_s: float
    ) -> UpstreamRequest:
        # A client's key for the proxy stays here; without one of the proxy's own it is for the instances.
        key = None if self.api_key else messages.header(request.headers, b"authorization")
        if self.upstream_key:
            key = b"Bearer " + self.upstream_key
        data = messages.upstream_bytes(request, instance.address.netloc.encode(), body, key)
        return UpstreamRequest(self.pool, instance, stage, data, request.tokens, timeout_s)


def check_answer(upstream: UpstreamRequest) -> int:
    """The status of a finished request whose answer can be passed on; raises StageError for any other."""
    stage, instance, status = upstream.stage, upstream.instance, upstream.status
    if upstream.error is not None or status is None:
        failure = f": {upstream.error}"
    elif status >= 500:
        failure = f" answered {status}"
    elif upstream.first_byte_s is None:
        failure = f" answered {status} with an empty body"
    else:
        return status
    raise StageError(stage, instance.slot, f"{stage} {instance.address.url}{failure}", timed_out=upstream.timed_out)


def first_of(*futures: asyncio.Future[None]) -> asyncio.Future[None]:
    """Done when one of these is, as asyncio.wait has it for several times the CPU time."""
    first = asyncio.get_running_loop().create_future()

    def end(_: asyncio.Future[None]) -> None:
        if not first.done():
            first.set_result(None)

    for future in futures:
        future.add_done_callback(end)
    return first


@dataclass(slots=True)
class RequestHandler:
    """Handles one completion request; `run` returns when the client has its answer or has left."""

    # The futures of upstream requests are awaited under a shield: a client that leaves cancels the waiting, but the
    # upstream request must still be able to end.

    context: ProxyContext
    request: ClientRequest
    client: ClientConnection
    event: ProxyEvent = field(default_factory=ProxyEvent)
    prefill: UpstreamRequest | None = None
    decode: UpstreamRequest | None = None
    stream: EventStream | None = None
    wants_first_token: bool = False
    decode_after_prefill: bool = False
    reserved: Instance | None = None
    prefix: bytes = b""
    check: first_token.Check | None = None

    async def run(self) -> None:
        """Handle the request; raises RequestError, which names the stage, unless it was sent as an error event."""
        context, request, protocol = self.context, self.request, self.context.protocol
        self.event.request_id, self.event.received_s = request.request_id.decode("latin-1"), request.received_s
        try:
            if not (protocol.request_id is None or protocol.decode_can_prefill or request.dialect.names_request):
                path, remedy = request.path.decode("latin-1"), "use /v1/chat/completions"
                raise RequestError(404, f"{path} carries no KV transfer of vLLM's own connector: {remedy}")
            request.fields = messages.parse_fields(request.body)
            prompt = bytes(request.fields.get(request.dialect.prompt, b""))
            if "prefix-affinity" in (context.config.prefill_policy, context.config.decode_policy):
                self.prefix = messages.prefix(prompt)
            self.event.prompt_tokens = request.tokens = messages.prompt_tokens(prompt)
            if protocol.has_prefill and protocol.decode_can_prefill:
                self.event.decode_alone = self._why_decode_alone()
            may_open = kv_protocols.may_open(context.config) and self.event.decode_alone is None
            self.wants_first_token = may_open and first_token.is_exact(request)
            await context.admit()
            try:
                self.event.admitted_s = time.monotonic()
                await self._try_instances()
            finally:
                context.leave()
        except RequestError as error:
            self._note(error.status, error.stage, str(error))
            if self.stream is None:
                error.headers += self._timing_header()
                raise
            self.stream.fail(error)
        except asyncio.CancelledError:
            self._note(499, "client", "the client left")
            raise
        finally:
            self._end()

    def _why_decode_alone(self) -> str | None:
        request = self.request
        if not messages.is_single_sequence(request.fields):
            return "several-sequences"
        if messages.is_stateful(request.fields):
            return "stateful"
        if self.context.protocol.request_id is not None and not request.dialect.names_request:
            return "unnamed"
        may_stay = messages.header(request.headers, b"x-pdbench-disaggregate") != b"always"
        return "short" if may_stay and request.tokens <= self.context.config.disaggregate_above else None

    async def _try_instances(self) -> None:
        """A stage that fails before a byte was passed on is tried again at another instance."""
        config, table, protocol = self.context.config, self.context.table, self.context.protocol
        may_recompute = config.fallback == "recompute" and protocol.decode_can_prefill
        tried: set[int] = set()
        failure: StageError | None = None
        pair_header = messages.header(self.request.headers, b"x-pdbench-pair") or b""
        pair = int(pair_header) if pair_header.isdigit() and len(pair_header) < 10 else None
        while True:
            prefill = None
            if protocol.has_prefill and self.event.decode_alone is None:
                prefill = choose(config.prefill_policy, "prefill", table, self.prefix, tried, pair)
                if prefill is None and not may_recompute:
                    raise failure or RequestError(503, "no prefill instance is ready", stage="prefill")
                if prefill is None:
                    self.event.decode_alone = "prefill-failed"
            decode = choose(config.decode_policy, "decode", table, self.prefix, tried, pair)
            if decode is None:
                raise failure or RequestError(503, "no decode instance is ready", stage="decode")
            self.event.prefill = prefill.address.url if prefill else None
            self.event.decode = decode.address.url
            self.event.retries += failure is not None
            try:
                return await self._answer(await self._attempt(prefill, decode))
            except StageError as error:
                failure = error
            finally:
                self._reserve(None)
            for upstream in (self.prefill, self.decode):
                if upstream is not None:
                    upstream.end(str(failure))
            self._note_instants()
            self.prefill = self.decode = None
            tried.add(failure.slot)
            if self.event.retries >= config.retries:
                if not (failure.stage == "prefill" and may_recompute):
                    raise failure
                self.event.decode_alone = "prefill-failed"

    def _reserve(self, decode: Instance | None) -> None:
        """Count the request at the decode instance while prefill works: those that come meanwhile choose by it. None: no longer."""
        table, tokens = self.context.table, self.request.tokens
        if self.reserved is not None:
            table.count(self.reserved, -1, -tokens)
        if decode is not None:
            table.count(decode, 1, tokens)
        self.reserved = decode

    def _send_to_decode(self, request: ClientRequest, decode: Instance, params: bytes | None = None) -> UpstreamRequest:
        self._reserve(None)  # it counts as sent from here on
        self.check = None
        if self.stream is not None:  # decode continues after prefill's token
            self.stream.edit = first_token.event_editor(request)
        body = decode_body(request, params)
        self.decode = self.context.send(request, decode, "decode", body, self.context.config.decode_timeout_s)
        return self.decode

    async def _attempt(self, prefill: Instance | None, decode: Instance) -> UpstreamRequest:
        """Send the request to one pair of instances; returns the upstream request whose answer the client gets."""
        context, request, config = self.context, self.request, self.context.config
        protocol = context.protocol
        if prefill is None:
            self.event.transfer_id = None
            return self._send_to_decode(request, decode)
        handoff = Handoff(os.urandom(16).hex(), prefill.address, decode.address, return_kv=config.return_kv)
        self.event.transfer_id = handoff.transfer_id
        if protocol.request_id is not None:
            request = replace(request, request_id=protocol.request_id(handoff, request.request_id))
        body = prefill_body(request, protocol, handoff, wants_token=self.wants_first_token)
        self.prefill = context.send(request, prefill, "prefill", body, config.prefill_timeout_s)
        prefill_first = self.wants_first_token and config.first_token == "prefill" and not config.return_kv
        if protocol.at_once and not prefill_first:
            sent = self._send_to_decode(request, decode, protocol.decode_params(handoff, b""))
            await first_of(self.prefill.finished, sent.started)
            if not self.prefill.finished.done():
                return sent
        else:
            self._reserve(decode)
        await asyncio.shield(self.prefill.finished)
        if self.decode is not None and self.decode.first_byte_s is not None and self.decode.status == 200:
            return self.decode
        if self.prefill.status is not None and 400 <= self.prefill.status < 500 and self.prefill.error is None:
            if not protocol.decode_can_prefill:
                return self.prefill
            # Prefill was sent a shorter request: decode says what is wrong with the client's.
            if self.decode is not None:
                self.decode.end("prefill refused the request")
            self.event.decode_alone = "prefill-refused"
            return self._send_to_decode(self.request, decode)
        check_answer(self.prefill)
        if self.wants_first_token:
            self.wants_first_token = False
            first, longest = first_token.read(request, self.prefill.body), context.table.max_model_len(decode)
            # What decode will refuse, since the context does not hold it, must not begin.
            if first and (longest is None or first.total_tokens <= longest):
                # The client's stream opens with prefill's token; from here on `request` is for the tokens after it.
                self._note_instants()
                headers = [(b"content-type", _EVENT_STREAM), *self._timing_header()]
                self.stream = EventStream(self.client, headers)
                self.stream.begin(first.event)
                self.event.first_token_s = time.monotonic()
                request.body, request.fields = b"", {}  # `rest` has all that is still needed
                self.request = request = first.rest
                handoff = handoff._replace(prefilled_tokens=first.prompt_tokens)
                if self.decode is not None:
                    self.check = first_token.Check(first, self.stream, self.decode)
                    self.stream.edit = self.check.first_events
        if self.decode is not None:
            return self.decode
        try:
            params = protocol.decode_params(handoff, self.prefill.body)
        except ValueError:
            raise StageError("prefill", prefill.slot, "prefill's answer is not JSON") from None
        self.decode_after_prefill = True
        return self._send_to_decode(request, decode, params)

    async def _answer(self, upstream: UpstreamRequest) -> None:
        """Pass an answer on: events as they come, anything else whole, so that it can still become an error."""
        await asyncio.shield(upstream.started)
        is_events = (messages.header(upstream.headers, b"content-type") or b"").startswith(b"text/event-stream")
        if is_events and upstream.status == 200 and upstream.first_byte_s is not None:
            self._note_instants()
            self.event.status = 200
            # What nothing needs any more would stay in memory for as long as the stream lasts.
            if self.prefill is not None and self.prefill.finished.done():
                self.prefill = None
            if self.check is None:
                self.request.body, self.request.fields = b"", {}
            stream = self.stream or EventStream(self.client, upstream.headers + self._timing_header())
            stream.follow(upstream)
            await asyncio.shield(upstream.finished)
            if self.check is not None and self.check.differs:
                # Decode chose another first token: it continues from prefill's, with the prompt in its prefix cache.
                self.event.first_tokens_differ = True
                await self._answer(self._send_to_decode(self.request, upstream.instance))
                return
            error = stream.close()
            if error is not None:
                self._note(200, "decode", f"mid-stream: {error}")
            return
        await asyncio.shield(upstream.finished)
        status = check_answer(upstream)
        self._note_instants()
        if self.stream is not None:
            text = upstream.body[:500].decode(errors="replace")
            raise RequestError(status, f"decode answered {status} with no stream: {text}", stage="decode")
        self._note(status, upstream.stage if status >= 400 else None, f"answered {status}" if status >= 400 else None)
        self.client.respond(status, upstream.body, upstream.headers + self._timing_header())

    def _timing_header(self) -> Headers:
        enabled = self.context.config.timing_header and self.event.admitted_s is not None
        return [(b"server-timing", server_timing(self.event))] if enabled else []

    def _note(self, status: int, stage: str | None, error: str | None) -> None:
        self.event.status, self.event.stage, self.event.error = status, stage, error

    def _note_instants(self) -> None:
        event, prefill, decode = self.event, self.prefill, self.decode
        if prefill is not None:
            event.prefill_sent_s = prefill.sent_s
            event.prefill_done_s = prefill.end_s if prefill.error is None else None
        if decode is not None:
            event.decode_sent_s = decode.sent_s
            event.first_byte_s = decode.first_byte_s
            event.last_byte_s = decode.end_s if decode.error is None else None

    def _end(self) -> None:
        """End what still runs, and log the request."""
        prefill, decode = self.prefill, self.decode
        succeeded = decode is not None and decode.finished.done() and decode.error is None and self.event.error is None
        if succeeded and prefill is not None and not prefill.finished.done():
            # Decode's answer can be complete before prefill's: then prefill runs on, and the log line waits for it.
            prefill.finished.add_done_callback(lambda _: self._log())
            return
        reason = self.event.error or "not needed any more"
        if prefill is not None:
            prefill.end(reason)
        if decode is not None and self.decode_after_prefill and not decode.started.done():
            decode.started.add_done_callback(lambda _: decode.end(reason))
            asyncio.get_running_loop().call_later(FETCH_KV_S, decode.end, reason)
        elif decode is not None:
            decode.end(reason)
        self._log()

    def _log(self) -> None:
        self._note_instants()
        self.context.telemetry.record(self.event)
