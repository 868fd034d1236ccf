"""The proxy's figures for Prometheus: requests, errors by stage, stages' durations, load of each instance.

With several workers, prometheus-client keeps the counts in files of a folder that all workers write and any can read.
Try: curl http://127.0.0.1:8000/metrics
"""

import os
from collections.abc import Iterator

from pdbench.events import ProxyEvent
from pdbench.proxy.instances import WANTED, InstanceTable
from pdbench.proxy.instants import stages

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """One worker's counters, and the view of all workers' counters; `folder` is shared when there are several."""

    def __init__(self, table: InstanceTable, folder: str | None) -> None:
        if folder is not None:
            # Read by prometheus_client when it is imported, so that must come later.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import prometheus_client as prometheus

        self._prometheus = prometheus
        self._table = table
        self._several = folder is not None
        own = prometheus.CollectorRegistry()
        self._own = own
        self._requests = prometheus.Counter("pdbench_proxy_requests", "Requests answered", ["status"], registry=own)
        self._errors = prometheus.Counter("pdbench_proxy_errors", "Requests failed, by stage", ["stage"], registry=own)
        self._retries = prometheus.Counter("pdbench_proxy_retries", "Further instances tried", registry=own)
        self._seconds = prometheus.Histogram(
            "pdbench_proxy_stage_seconds", "Duration of a stage", ["stage"], registry=own, buckets=_BUCKETS_S
        )
        self._stages = {
            stage: self._seconds.labels(stage) for stage in ("queue", "prefill", "first_byte", "decode", "total")
        }

    def count(self, event: ProxyEvent) -> None:
        """Count one request that has ended."""
        self._requests.labels(str(event.status)).inc()
        if event.stage is not None:
            self._errors.labels(event.stage).inc()
        if event.retries:
            self._retries.inc(event.retries)
        for stage, span_s in stages(event).items():
            self._stages[stage].observe(span_s)

    def render(self) -> bytes:
        """All workers' figures in Prometheus' text form."""
        prometheus, registry = self._prometheus, self._own
        if self._several:
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)
        return prometheus.generate_latest(registry) + "\n".join([*self._instance_lines(), ""]).encode()

    def _instance_lines(self) -> Iterator[str]:
        yield "# TYPE pdbench_proxy_instance_in_flight gauge"
        yield "# TYPE pdbench_proxy_instance_prompt_tokens gauge"
        yield "# TYPE pdbench_proxy_instance_ready gauge"
        for instance in self._table.all():
            labels = f'{{role="{instance.role}",instance="{instance.address.url}"}}'
            requests, tokens = self._table.load(instance)
            ready = self._table.healthy(instance) and WANTED.get(self._table.wanted(instance)) == "serving"
            yield f"pdbench_proxy_instance_in_flight{labels} {requests}"
            yield f"pdbench_proxy_instance_prompt_tokens{labels} {tokens}"
            yield f"pdbench_proxy_instance_ready{labels} {int(ready)}"
