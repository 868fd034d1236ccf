"""Saved runs as OpenTelemetry traces: one span per request, its phases below it; docs/live.md says what they hold."""

import logging
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from math import isfinite
from urllib.parse import urlsplit

from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.errors import OptionError, UserError
from pdbench.events import ProxyEvent, ways_of
from pdbench.failures import kind_of
from pdbench.records import RequestRecord, Run

try:
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode
except ImportError as error:
    raise UserError("--otlp needs OpenTelemetry's SDK and exporter: pip install 'pdbench[otlp]'") from error

Attributes = dict[str, str | int | float | list[str]]

BATCH = 1000
_PROMPT = ("prefill", "decode_alone")
_PARENTS = {
    "api_server": _PROMPT,
    "queue": _PROMPT,
    "compute": _PROMPT,
    "decode_queue": ("decode",),
    "decode_wait": ("decode",),
    "decode_step": ("decode",),
}
"""Phase -> those that it is a part of; the steps of `compute` (compute_1, ...) are parts of that, all others of the request."""


class Collector:
    """Where spans go: an OTLP/HTTP endpoint. Raises UserError for what is no address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"--otlp {url} is no HTTP address: write for example --otlp http://127.0.0.1:4318")
        self._url, self._rejected, self._reason = url, 0, ""
        session = requests.Session()
        session.hooks["response"] = [self._answered]
        endpoint = parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else url
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint=endpoint, session=session)
        logger, handler = logging.getLogger("opentelemetry"), logging.Handler()
        handler.emit = self._logged  # type: ignore[method-assign]
        logger.propagate, logger.handlers = False, [handler]

    def send(self, spans: Iterator[ReadableSpan]) -> int:
        """Send all of them and return their number. Raises UserError when they were not taken."""
        sent = 0
        while batch := list(islice(spans, BATCH)):
            self._reason = ""
            result = self._exporter.export(batch)
            if result is not SpanExportResult.SUCCESS or self._rejected:
                raise UserError(
                    f"--otlp {self._url} did not take the spans ({self._reason or 'no reason given'}), {sent} were sent before: check that "
                    "an OTLP/HTTP receiver listens there (port 4318 as a rule); nothing else is lost, the same command sends them again"
                )
            sent += len(batch)
        return sent

    def _logged(self, record: logging.LogRecord) -> None:
        """Keep the first thing that the exporter says of a batch, of an exception the innermost."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        cause = next((each for each in arguments if isinstance(each, BaseException)), None)
        while cause is not None and cause.__context__ is not None:
            cause = cause.__context__
        self._reason = self._reason or " ".join(str(cause or record.getMessage()).split())

    def _answered(self, response: requests.Response, **_options: object) -> None:
        """The exporter does not read how many spans a receiver refused."""
        if response.ok and response.headers.get("Content-Type") == "application/x-protobuf":
            partial = ExportTraceServiceResponse.FromString(response.content).partial_success
            if partial.rejected_spans:
                self._rejected += partial.rejected_spans
                self._reason = f"{partial.rejected_spans} rejected: {partial.error_message}"


def spans(run: Run, analysis: RunAnalysis) -> Iterator[ReadableSpan]:
    """The measured requests of `run`, each with its phases; `analysis` is the run's. A request that was never sent has no span."""
    load = run.config.get("load") or {}
    resource = Resource.create(
        {"service.name": "pdbench", "service.version": analysis.pdbench}
        | {"pdbench.deployment": run.name, "pdbench.run_id": run.run_id or analysis.source}
    )
    fixed: Attributes = {
        "gen_ai.operation.name": "chat" if load.get("endpoint") == "chat" else "text_completion",
        # Of servers that somebody else started only the protocol is known.
        "gen_ai.provider.name": "openai" if run.name == "bench" else "vllm",
    }
    if model := run.config.get("model"):
        fixed["gen_ai.request.model"] = model
    ways = ways_of(run.events)
    rows = {identity: row for row, identity in enumerate(analysis.requests.id)}
    for record in run.requests:
        if not record.warmup and record.sent_s is not None and record.end_s is not None:
            attributes = fixed | _attributes(record, analysis, rows[record.id], ways.get(record.id))
            yield from _request(record, run, resource, attributes)


def _attributes(record: RequestRecord, analysis: RunAnalysis, row: int, way: ProxyEvent | None) -> Attributes:
    """What is known of a request; names of OpenTelemetry's conventions for GenAI where there are any."""
    columns = analysis.requests
    numbers = {
        "gen_ai.response.time_to_first_chunk": columns.ttft_ms[row] / 1e3,
        "pdbench.mean_tbt_ms": columns.mean_tbt_ms[row],
        "pdbench.send_delay_ms": columns.send_delay_ms[row],
    }
    known = {
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.reasoning.output_tokens": record.reasoning_tokens,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "error.type": record.error.kind if record.error else kind_of(record),
        "pdbench.request_id": record.id,
        "pdbench.trial": record.trial,
        "pdbench.first_token": columns.first_token[row],
        "pdbench.prefill_instance": way.prefill if way else None,
        "pdbench.decode_instance": way.decode if way else None,
    }
    finite = {name: float(value) for name, value in numbers.items() if isfinite(value)}
    return {name: value for name, value in known.items() if value is not None} | finite


def _request(record: RequestRecord, run: Run, resource: Resource, attributes: Attributes) -> Iterator[ReadableSpan]:
    """From `sent_s` to `end_s`; below it what of each phase lies in that time. The same run has the same ids whenever it is sent."""
    identity = f"{run.run_id or run.clock.unix_s} {record.id}"
    zero_ns = round(run.clock.unix_s * 1e9)
    scope = InstrumentationScope("pdbench")

    def at(instant_s: float | None) -> int:
        return zero_ns + round((instant_s or 0.0) * 1e9)

    def context(phase: str) -> SpanContext:
        digests = (blake2b(identity.encode(), digest_size=16), blake2b(f"{identity} {phase}".encode(), digest_size=8))
        trace, span = (int.from_bytes(digest.digest()) for digest in digests)
        return SpanContext(trace, span, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    begin, end = at(record.sent_s), at(record.end_s)
    failed = attributes.get("error.type")
    yield ReadableSpan(
        name=f"{attributes['gen_ai.operation.name']} {attributes.get('gen_ai.request.model', '')}".rstrip(),
        context=context(""),
        resource=resource,
        attributes=attributes,
        events=[Event("first token", timestamp=at(record.token_s[0]))] if record.token_s else [],
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, record.error.message if record.error else str(failed)) if failed else Status(),
        start_time=begin,
        end_time=end,
        instrumentation_scope=scope,
    )
    # The wait in the client lies before the request: an attribute of it.
    phases = {name: span for name, span in record.phases.items() if span is not None and name != "client"}
    inside = {name: (max(at(start), begin), min(at(stop), end)) for name, (start, stop) in phases.items()}
    inside = {name: (start, stop) for name, (start, stop) in inside.items() if start <= stop}
    for name, (start, stop) in inside.items():
        parents = ("compute",) if name.startswith("compute_") else _PARENTS.get(name, ())
        holds = (parent for parent in parents if parent in inside)
        parent = next((of for of in holds if inside[of][0] <= start and stop <= inside[of][1]), "")
        cut_ms = (phases[name][1] - phases[name][0]) * 1e3 - (stop - start) / 1e6
        yield ReadableSpan(
            name=name,
            context=context(name),
            parent=context(parent),
            resource=resource,
            attributes={"pdbench.cut_ms": cut_ms} if cut_ms > 0.001 else {},
            start_time=start,
            end_time=stop,
            instrumentation_scope=scope,
        )
