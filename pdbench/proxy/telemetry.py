"""A request's instants as JSON lines and in the Server-Timing header, and the proxy's metrics for Prometheus."""

import logging
import os
from collections.abc import Iterator
from functools import cache, partial

import msgspec

from pdbench.events import ProxyEvent
from pdbench.proxy.instances import InstanceTable

log = logging.getLogger("pdbench.proxy")

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_STAGES = {
    "queue": ("received_s", "admitted_s"),
    "prefill": ("prefill_sent_s", "prefill_done_s"),
    "first_byte": ("decode_sent_s", "first_byte_s"),
    "decode": ("first_byte_s", "last_byte_s"),
    "total": ("received_s", "last_byte_s"),
}


def _stages(event: ProxyEvent) -> Iterator[tuple[str, float]]:
    """The stages whose both ends are known, and their seconds."""
    for stage, (start, end) in _STAGES.items():
        start_s, end_s = getattr(event, start), getattr(event, end)
        if start_s is not None and end_s is not None:
            yield stage, end_s - start_s


def server_timing(event: ProxyEvent) -> bytes:
    """The value of a Server-Timing header: the stages known so far, in milliseconds."""
    return ", ".join(f"{stage};dur={1000 * span_s:.3f}" for stage, span_s in _stages(event)).encode()


class Telemetry:
    """The event log and one worker's counters, all workers' together where they share `metrics_dir`."""

    def __init__(self, table: InstanceTable, event_log: int | None, metrics_dir: str | None) -> None:
        if metrics_dir is not None:
            # prometheus_client reads it when it is imported, so the import must come after this.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_dir
        import prometheus_client as prometheus
        from prometheus_client.multiprocess import MultiProcessCollector

        self._table = table
        self._event_log = event_log
        registry = prometheus.CollectorRegistry()
        counter = partial(prometheus.Counter, registry=registry)
        self._answered = cache(counter("pdbench_proxy_requests", "Requests answered", ["status"]).labels)
        self._errors = counter("pdbench_proxy_errors", "Requests failed, by stage", ["stage"])
        self._retries = counter("pdbench_proxy_retries", "Further instances tried")
        seconds = prometheus.Histogram(
            "pdbench_proxy_stage_seconds", "Duration of a stage", ["stage"], registry=registry, buckets=_BUCKETS_S
        )
        self._seconds = {stage: seconds.labels(stage) for stage in _STAGES}
        if metrics_dir is not None:
            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)
        self._render_counters = partial(prometheus.generate_latest, registry)

    def record(self, event: ProxyEvent) -> None:
        if self._event_log is not None:
            try:
                os.write(self._event_log, msgspec.json.encode(event) + b"\n")
            except OSError as error:
                self._event_log = None
                log.error("the event log cannot be written (%s): no more lines there; make room and restart", error)
        self._answered(event.status).inc()
        if event.stage is not None:
            self._errors.labels(event.stage).inc()
        if event.retries:
            self._retries.inc(event.retries)
        for stage, span_s in _stages(event):
            self._seconds[stage].observe(span_s)

    def render(self) -> bytes:
        """All workers' metrics in Prometheus' text format."""
        lines = [f"# TYPE pdbench_proxy_instance_{name} gauge" for name in ("in_flight", "prompt_tokens", "ready")]
        for instance in self._table.all():
            labels = f'{{role="{instance.role}",instance="{instance.address.url}"}}'
            requests, tokens = self._table.load(instance)
            values = {"in_flight": requests, "prompt_tokens": tokens, "ready": int(self._table.is_ready(instance))}
            lines += [f"pdbench_proxy_instance_{name}{labels} {value}" for name, value in values.items()]
        return self._render_counters() + "\n".join([*lines, ""]).encode()
