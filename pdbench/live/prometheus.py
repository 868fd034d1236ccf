"""A measurement's figures as metrics for Prometheus, named by its conventions; docs/live.md lists them."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pdbench.analysis.metrics import Array
from pdbench.live.state import State

BOUNDS_S = tuple(float(f"{10 ** (step / 12):.3g}") for step in range(-48, 37))
"""Of every histogram: twelve a decade from 0.1 ms to 1,000 s, so that a quantile read off it is right within about 10 %."""
_HELP = {
    "time_to_first_token": "From sending a request to its first token.",
    "time_between_tokens": "Gaps between the tokens of a stream.",
    "request_duration": "From sending a request to its end.",
}


class Metrics:
    """Counts since the viewer's start; `update` adds what is new."""

    def __init__(self) -> None:
        self._requests = Counter[str]()
        self._good = Counter[str]()
        self._histograms: dict[tuple[str, str], tuple[Array, float]] = {}
        self._state: State | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def update(self, state: State) -> None:
        self._state = state
        new, state.new_requests = state.new_requests, {}
        for name, requests in new.items():
            timings = state.timings(requests)
            self._requests[name] += len(requests)
            if timings.slo.in_slo is not None:
                self._good[name] += int(timings.slo.in_slo.sum())
            values = (timings.requests.ttft_ms, timings.tbt_ms, timings.requests.e2e_ms)
            for figure, ms in zip(_HELP, values, strict=True):
                seconds = ms[np.isfinite(ms)] / 1e3
                counts = np.histogram(seconds, [-np.inf, *np.nextafter(BOUNDS_S, np.inf), np.inf])[0]
                before, total_s = self._histograms.get((figure, name), (np.zeros(len(counts)), 0.0))
                self._histograms[figure, name] = before + counts, total_s + float(seconds.sum())

    def collect(self) -> Iterator[Metric]:
        state = self._state
        if state is None:
            return
        for metric, words, counted in (
            ("requests", "Measured requests that ended.", self._requests),
            ("requests_within_slo", "Requests within the SLO.", self._good),
            ("output_tokens", "Tokens that arrived.", state.tokens),
        ):
            counts = CounterMetricFamily(f"pdbench_{metric}", words, labels=["deployment"])
            for name, count in counted.items():
                counts.add_metric([name], count)
            yield counts
        words = "Measured requests that failed, by class."
        failures = CounterMetricFamily("pdbench_request_failures", words, labels=["deployment", "kind"])
        for name, kinds in state.failed.items():
            for kind, count in kinds.items():
                failures.add_metric([name, kind], count)
        yield failures
        for figure, words in _HELP.items():
            family = HistogramMetricFamily(f"pdbench_{figure}_seconds", words, labels=["deployment"])
            for (of, name), (in_bucket, total_s) in self._histograms.items():
                if of == figure:
                    upper = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
                    family.add_metric([name], list(zip(upper, np.cumsum(in_bucket).tolist(), strict=True)), total_s)
            yield family
        in_flight = GaugeMetricFamily("pdbench_requests_in_flight", "Requests in flight now.", labels=["deployment"])
        labels = ["device", "kind", "role"]
        power = GaugeMetricFamily("pdbench_device_power_watts", "Power of a device now.", labels=labels)
        words = "Energy of a device since the start."
        energy = CounterMetricFamily("pdbench_device_energy_joules", words, labels=labels)
        of_device = {name: [each.label, each.kind, each.role or ""] for name, each in state.devices.items()}
        for (figure, name), value in state.latest.items():
            if figure == "in_flight":
                in_flight.add_metric([name], value)
            if figure == "power_w":
                power.add_metric(of_device[name], value)
        for name, joules in state.energy_j.items():
            energy.add_metric(of_device[name], joules)
        yield from (in_flight, power, energy)

    def page(self) -> tuple[bytes, str]:
        """With its content type."""
        return generate_latest(self._registry), "text/plain; version=0.0.4; charset=utf-8"
