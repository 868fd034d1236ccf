"""What the /metrics of a vLLM or SGLang server say: requests running and waiting, KV use, token rate, latencies of the last seconds."""

import math
import re
from collections import deque
from dataclasses import dataclass, field

_NUMBERS = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv_pct": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
}
_HISTOGRAMS = {
    "ttft_ms": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "tbt_ms": (
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "sglang:inter_token_latency_seconds",
    ),
    "e2e_ms": ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
}
_LINE = re.compile(r"^([a-z:_0-9]+)(?:\{(.*)\})? ([^ ]+)", re.MULTILINE)
_UPPER = re.compile(r'le="([^"]+)"')
Buckets = dict[float, float]
"""Upper bound in seconds -> how many values were at or below it."""


@dataclass
class Reading:
    """One page: sums over the engines of a server (the mean of their KV use), counts of its histograms."""

    numbers: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, Buckets] = field(default_factory=dict)


def read(page: str) -> Reading:
    """Metrics that the page lacks are left out."""
    series: dict[str, list[float]] = {}
    buckets: dict[str, Buckets] = {}
    for name, labels, text in _LINE.findall(page):
        if name.startswith(("vllm:", "sglang:")):
            try:
                value = float(text)
            except ValueError:
                continue
            if not name.endswith("_bucket"):
                series.setdefault(name, []).append(value)
            elif upper := _UPPER.search(labels):
                counts = buckets.setdefault(name.removesuffix("_bucket"), {})
                counts[float(upper[1])] = counts.get(float(upper[1]), 0.0) + value
    reading = Reading()
    for key, names in _NUMBERS.items():
        if values := next((series[name] for name in names if name in series), None):
            reading.numbers[key] = 100 * sum(values) / len(values) if key == "kv_pct" else sum(values)
    for key, names in _HISTOGRAMS.items():
        if counts := next((buckets[name] for name in names if name in buckets), None):
            reading.buckets[key] = counts
    return reading


def quantile(counts: Buckets, share: float) -> float | None:
    """A quantile in seconds, linear inside its bucket as Prometheus' histogram_quantile; None without values."""
    total, below, lower = counts.get(math.inf, 0.0), 0.0, 0.0
    if not total > 0:
        return None
    for upper, at_or_below in sorted(counts.items()):
        if at_or_below >= share * total:
            if upper == math.inf or at_or_below == below:
                return lower
            return lower + (upper - lower) * (share * total - below) / (at_or_below - below)
        below, lower = at_or_below, upper
    return lower


class Instance:
    """A server's pages of the last seconds."""

    def __init__(self, name: str, role: str) -> None:
        self.name, self.role = name, role
        self.answers = True
        self._readings: deque[tuple[float, Reading]] = deque()

    def take(self, page: bytes | None, now_s: float) -> None:
        self.answers = page is not None
        if page is not None:
            self._readings.append((now_s, read(page.decode("utf-8", "replace"))))

    def values(self, now_s: float, window_s: float, stale_s: float) -> dict[tuple[str, str], float]:
        """(figure, of what) -> value: now, or over the last `window_s`; nothing once no page came for `stale_s`."""
        while len(self._readings) > 2 and self._readings[0][0] < now_s - window_s:
            self._readings.popleft()
        if not self._readings or now_s - self._readings[-1][0] > stale_s:
            return {}
        (first_s, first), (last_s, last) = self._readings[0], self._readings[-1]
        values = {(key, self.name): last.numbers[key] for key in ("running", "waiting", "kv_pct") if key in last.numbers}
        tokens = [reading.numbers.get("tokens") for reading in (first, last)]
        if last_s > first_s and None not in tokens and tokens[1] >= tokens[0]:  # type: ignore[operator]
            values["output_tokens_per_s", self.name] = (tokens[1] - tokens[0]) / (last_s - first_s)  # type: ignore[operator]
        for key, counts in last.buckets.items():
            before = first.buckets.get(key, {})
            recent = {upper: count - before.get(upper, 0.0) for upper, count in counts.items()}
            if before and min(recent.values()) >= 0:  # else it was started again
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    if (seconds := quantile(recent, share)) is not None:
                        values[key, f"{self.name} {name}"] = 1e3 * seconds
        return values
