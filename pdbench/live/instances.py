"""What a server's own metrics say of its last seconds: requests running and waiting, KV use, token rate, latencies."""

import math
import re
from collections import deque

from pdbench.analysis.curves import SERVER_FIELDS
from pdbench.live.publisher import Buckets, ServerReading
from pdbench.server_metrics import samples

_HISTOGRAMS = {
    "ttft_ms": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "tbt_ms": (
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "sglang:inter_token_latency_seconds",
    ),
    "e2e_ms": ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
}
_ALL_HISTOGRAMS = tuple(name for names in _HISTOGRAMS.values() for name in names)
_UPPER = re.compile(r'(?:^|,)\s*le="([^"]+)"')


def histograms(page: str) -> dict[str, Buckets]:
    """Latency -> its counts, summed over the engines behind a page; those that the page lacks are left out."""
    series: dict[str, Buckets] = {}
    for name, labels, count in samples(page, _ALL_HISTOGRAMS):
        if name.endswith("_bucket") and (upper := _UPPER.search(labels)):
            counts = series.setdefault(name.removesuffix("_bucket"), {})
            counts[float(upper[1])] = counts.get(float(upper[1]), 0.0) + count
    present = {key: next((name for name in names if name in series), None) for key, names in _HISTOGRAMS.items()}
    return {key: series[name] for key, name in present.items() if name}


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
    """A server's readings of the last seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._readings: deque[tuple[float, ServerReading]] = deque()

    def take(self, reading: ServerReading, now_s: float) -> None:
        self._readings.append((now_s, reading))

    def values(self, now_s: float, window_s: float, stale_s: float) -> dict[tuple[str, str], float]:
        """(figure, of what) -> value: now, or over the last `window_s`; nothing once no reading came for `stale_s`."""
        while len(self._readings) > 2 and self._readings[0][0] < now_s - window_s:
            self._readings.popleft()
        if not self._readings or now_s - self._readings[-1][0] > stale_s:
            return {}
        (first_s, first), (last_s, last) = self._readings[0], self._readings[-1]
        values = {
            (key, self.name): last.figures[key] * factor for key, factor in SERVER_FIELDS.items() if key in last.figures
        }
        new_tokens = last.figures.get("output_tokens", -1.0) - first.figures.get("output_tokens", 0.0)
        if last_s > first_s and new_tokens >= 0:
            values["output_tokens_per_s", self.name] = new_tokens / (last_s - first_s)
        for key, counts in last.histograms.items():
            before = first.histograms.get(key, {})
            recent = {upper: count - before.get(upper, 0.0) for upper, count in counts.items()}
            if before and min(recent.values()) >= 0:  # else it was started again
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    if (seconds := quantile(recent, share)) is not None:
                        values[key, f"{self.name} {name}"] = 1e3 * seconds
        return values
