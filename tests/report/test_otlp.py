"""Runs sent as traces: to a receiver that reads OTLP/HTTP with OpenTelemetry's own parser, and as the SDK's spans."""

import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from pdbench.analysis.run_analysis import analyze
from pdbench.errors import UserError
from pdbench.records import RequestError, RequestRecord, save_run
from pdbench.report import commands
from tests.support.processes import call_pdbench, free_port
from tests.support.runs import build_run

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'pdbench[otlp]'")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.status import StatusCode

from pdbench.report import otlp

ZERO_NS = 1_800_000_000 * 10**9
"""The zero of `build_run`'s clock."""
PHASES = {
    "client": (9.9, 10.0),
    "send": (10.0, 10.01),
    "proxy": (10.01, 10.02),
    "prefill": (10.02, 10.3),
    "api_server": (10.02, 10.05),
    "queue": (10.05, 10.1),
    "compute": (10.1, 10.28),
    "compute_1": (10.1, 10.2),
    "compute_2": (10.2, 10.28),
    "kv_transfer": (10.15, 10.31),
    "handoff": (10.28, 10.32),
    "decode": (10.31, 11.0),
    "decode_wait": (10.32, 10.33),
    "decode_step": (10.33, 10.35),
    "reply": (10.35, 10.36),
}


def request(identity="r", **changes) -> RequestRecord:
    fields = {
        "id": identity, "planned_s": 9.9, "sent_s": 10.0, "token_s": [10.36, 10.6, 11.0], "end_s": 11.01, "prompt_tokens": 40,
        "output_tokens": 3, "finish_reason": "length", "phases": dict(PHASES),
    }  # fmt: skip
    return RequestRecord(**fields | changes)


def spans_of(*requests: RequestRecord):
    """The spans of a run with these requests, out of the SDK's in-memory exporter."""
    run = build_run(trials=1, requests=1)
    run.run_id, run.requests = "abcd", list(requests)
    memory = InMemorySpanExporter()
    memory.export(list(otlp.spans(run, analyze(run))))
    return memory.get_finished_spans()


class Receiver(BaseHTTPRequestHandler):
    """Parses what it gets, and gives its server's `answer`: a status and a response."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
        status, response = self.server.answer
        data = response.SerializeToString()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.lock, server.got, server.answer = threading.Lock(), [], (200, ExportTraceServiceResponse())
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def received(server):
    return [
        span
        for _, request in server.got
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def test_spans_are_at_the_run_s_wall_clock_and_nest_within_their_parents():
    spans = {span.name: span for span in spans_of(request())}
    root = spans.pop("text_completion synthetic")
    assert (root.start_time, root.end_time) == (ZERO_NS + 10 * 10**9, ZERO_NS + 11_010_000_000)
    assert root.events[0].timestamp == ZERO_NS + 10_360_000_000 and root.parent is None
    assert spans.keys() == PHASES.keys() - {"client"}
    by_id = {span.context.span_id: span for span in (root, *spans.values())}
    for name, span in spans.items():
        parent = by_id[span.parent.span_id]
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time, name
        assert span.context.trace_id == root.context.trace_id and not span.attributes
        assert (span.start_time, span.end_time) == tuple(ZERO_NS + round(at_s * 1e9) for at_s in PHASES[name])
    parents = {name: by_id[span.parent.span_id].name for name, span in spans.items()}
    assert {name for name, parent in parents.items() if parent == "prefill"} == {"api_server", "queue", "compute"}
    assert {name for name, parent in parents.items() if parent == "compute"} == {"compute_1", "compute_2"}
    assert {name for name, parent in parents.items() if parent == "decode"} == {"decode_wait", "decode_step"}


def test_figures_are_those_of_the_analysis():
    (root, *_rest) = spans_of(request(prompt_tokens=None))
    assert root.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.36)
    assert root.attributes["pdbench.send_delay_ms"] == pytest.approx(100)
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert "gen_ai.usage.input_tokens" not in root.attributes and "error.type" not in root.attributes
    assert root.status.status_code is StatusCode.UNSET


def test_phase_that_was_not_measured_has_no_span():
    phases = PHASES | {"queue": None, "prefill": None}
    spans = {span.name: span for span in spans_of(request(phases=phases))}
    root = spans["text_completion synthetic"]
    assert not {"queue", "prefill"} & spans.keys()
    assert spans["compute"].parent == root.context  # what would hold it is not known


def test_phase_that_outlives_its_request_is_cut_and_says_so():
    phases = {"prefill": (10.02, 11.51), "reply": (12.0, 12.1)}
    spans = {span.name: span for span in spans_of(request(phases=phases))}
    root, prefill = spans["text_completion synthetic"], spans["prefill"]
    assert prefill.end_time == root.end_time
    assert prefill.attributes["pdbench.cut_ms"] == pytest.approx(500)
    assert "reply" not in spans


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"error": RequestError("http_503", "no room"), "token_s": []}, "http_503", "no room"),
        ({"token_s": [], "output_tokens": 0}, "no_tokens", "no_tokens"),
        ({"error": RequestError("interrupted", "stopped")}, "interrupted", "stopped"),
    ],
)
def test_failed_request_has_status_error_and_its_class(changes, kind, words):
    (root, *_rest) = spans_of(request(phases={}, **changes))
    assert root.status.status_code is StatusCode.ERROR and root.status.description == words
    assert root.attributes["error.type"] == kind
    assert "gen_ai.response.time_to_first_chunk" not in root.attributes


def test_warmup_and_requests_never_sent_have_no_span():
    unsent = request("b", sent_s=None, end_s=None, token_s=[], phases={}, error=RequestError("interrupted", "stopped"))
    (root,) = spans_of(request("a", warmup=True), unsent, request("c", phases={}))
    assert root.attributes["pdbench.request_id"] == "c"


def test_same_run_has_the_same_ids_whenever_it_is_sent():
    first, second = ([span.context for span in spans_of(request("a"), request("b"))] for _ in range(2))
    assert first == second
    assert len({context.trace_id for context in first}) == 2
    assert len({context.span_id for context in first}) == len(first)


@pytest.mark.usefixtures("undrawn")
def test_report_sends_each_request_once(receiver, tmp_path):
    run = build_run(trials=1, requests=300, tokens=4)
    save_run(run, tmp_path / "run")
    console = Console(file=io.StringIO(), width=200)
    commands.report([tmp_path / "run"], tmp_path / "report", None, console, otlp=receiver.url)
    spans = received(receiver)
    roots = [span for span in spans if not span.parent_span_id]
    assert len(roots) == 300 and len(receiver.got) > 1  # several batches
    assert {path for path, _ in receiver.got} == {"/v1/traces"}
    assert len({span.span_id for span in spans}) == len(spans)
    assert f"{len(spans)} spans" in console.file.getvalue()
    resource = receiver.got[0][1].resource_spans[0].resource
    values = {each.key: each.value.string_value for each in resource.attributes}
    assert values["service.name"] == "pdbench" and values["pdbench.deployment"] == "disaggregated"


@pytest.mark.usefixtures("undrawn")
def test_rejected_spans_are_an_error(receiver, folders, tmp_path):
    receiver.answer = (
        200,
        ExportTraceServiceResponse(partial_success={"rejected_spans": 7, "error_message": "too old"}),
    )
    with pytest.raises(UserError, match="7 rejected: too old"):
        commands.report(folders[:1], tmp_path, None, Console(file=io.StringIO()), otlp=receiver.url)


@pytest.mark.usefixtures("undrawn")
def test_refusing_receiver_is_one_line(receiver, folders, tmp_path):
    receiver.answer = (404, ExportTraceServiceResponse())
    with pytest.raises(UserError, match=r"did not take the spans .*404") as error:
        commands.report(folders[:1], tmp_path, None, Console(file=io.StringIO()), otlp=receiver.url)
    assert "\n" not in str(error.value) and (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_unreachable_receiver_is_one_line_and_the_report_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")  # for how long it tries again
    save_run(build_run(trials=1), tmp_path / "run")
    url = f"http://127.0.0.1:{free_port()}"
    done = call_pdbench("report", "run", "--otlp", url, cwd=tmp_path)
    assert done.returncode == 1 and "Connection refused" in done.stderr and url in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://host:4317", "http://"])
def test_address_that_is_none_is_refused_before_anything_is_drawn(url, tmp_path, folders):
    with pytest.raises(UserError, match="no HTTP address"):
        commands.report(folders[:1], tmp_path / "report", None, Console(file=io.StringIO()), otlp=url)
    assert not (tmp_path / "report").exists()


def test_missing_extra_names_its_installation(monkeypatch, tmp_path, folders):
    monkeypatch.delitem(sys.modules, "pdbench.report.otlp")
    monkeypatch.delattr("pdbench.report.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"pip install 'pdbench\[otlp\]'"):
        commands.report(folders[:1], tmp_path / "report", None, Console(file=io.StringIO()), otlp="http://127.0.0.1:1")
    assert not (tmp_path / "report").exists()
