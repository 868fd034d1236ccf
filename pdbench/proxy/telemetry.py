"""A request's instants as JSON lines and in the Server-Timing header, and the proxy's metrics for Prometheus."""

import os
from pathlib import Path

import msgspec

from pdbench.errors import UserError
from pdbench.events import ProxyEvent
from pdbench.proxy.instances import SERVING, InstanceTable

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
STAGES = ("queue", "prefill", "first_byte", "decode", "total")


def stages(event: ProxyEvent) -> dict[str, float]:
    """Stage -> its seconds, for the stages whose both ends are known."""
    spans = {
        "queue": (event.received_s, event.admitted_s),
        "prefill": (event.prefill_sent_s, event.prefill_done_s),
        "first_byte": (event.decode_sent_s, event.first_byte_s),
        "decode": (event.first_byte_s, event.last_byte_s),
        "total": (event.received_s, event.last_byte_s),
    }
    return {name: end - start for name, (start, end) in spans.items() if start is not None and end is not None}


def server_timing(event: ProxyEvent) -> bytes:
    """The value of a Server-Timing header: the stages known so far, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * span_s:.3f}" for name, span_s in stages(event).items()).encode()


class EventLog:
    """A file that gets one line per request; raises UserError if it cannot be written."""

    def __init__(self, path: str | None) -> None:
        self._file: int | None = None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                # Several workers share the file: every line is one write to a file opened for appending.
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise UserError(f"cannot write the event log {path} ({error.strerror}): name another file") from None

    def write(self, event: ProxyEvent) -> None:
        if self._file is not None:
            os.write(self._file, msgspec.json.encode(event) + b"\n")


class Metrics:
    """One worker's counters, and all workers' together where they share `folder` (None: there is one worker)."""

    def __init__(self, table: InstanceTable, folder: str | None) -> None:
        if folder is not None:
            # prometheus_client reads it when it is imported, so the import must come after this.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import prometheus_client as prometheus

        self._prometheus = prometheus
        self._table = table
        self._shared = folder is not None
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "pdbench_proxy_requests", "Requests answered", ["status"], registry=registry
        )
        self._errors = prometheus.Counter(
            "pdbench_proxy_errors", "Requests failed, by stage", ["stage"], registry=registry
        )
        self._retries = prometheus.Counter("pdbench_proxy_retries", "Further instances tried", registry=registry)
        seconds = prometheus.Histogram(
            "pdbench_proxy_stage_seconds", "Duration of a stage", ["stage"], registry=registry, buckets=_BUCKETS_S
        )
        self._stages = {stage: seconds.labels(stage) for stage in STAGES}

    def count(self, event: ProxyEvent) -> None:
        """Count a request that has ended."""
        self._requests.labels(str(event.status)).inc()
        if event.stage is not None:
            self._errors.labels(event.stage).inc()
        if event.retries:
            self._retries.inc(event.retries)
        for stage, span_s in stages(event).items():
            self._stages[stage].observe(span_s)

    def render(self) -> bytes:
        """All workers' metrics in Prometheus' text format."""
        prometheus, registry = self._prometheus, self._registry
        if self._shared:
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)
        lines = [f"# TYPE pdbench_proxy_instance_{name} gauge" for name in ("in_flight", "prompt_tokens", "ready")]
        for instance in self._table.all():
            labels = f'{{role="{instance.role}",instance="{instance.address.url}"}}'
            requests, tokens = self._table.load(instance)
            ready = self._table.healthy(instance) and self._table.state(instance) == SERVING
            values = {"in_flight": requests, "prompt_tokens": tokens, "ready": int(ready)}
            lines += [f"pdbench_proxy_instance_{name}{labels} {value}" for name, value in values.items()]
        return prometheus.generate_latest(registry) + "\n".join([*lines, ""]).encode()
