"""What is recorded of every transfer: one JSON line in the event log, vLLM's own statistics and its Prometheus metrics."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from pdbench.events import TransferEvent
from pdbench.kv.event_log import EventLog

_SIDES = ("send", "receive")
_SECONDS = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_RATES = [0.1, 0.3, 1, 3, 10, 30, 50, 100, 150, 200, 250, 300, 350, 400, 450]
_METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "transfers": ("KV transfers that ended well.", {}),
    "failures": ("KV transfers that failed.", {}),
    "bytes": ("Bytes of KV cache moved.", {}),
    "wait_seconds": ("From decode's request to the first byte.", {"buckets": _SECONDS}),
    "wire_seconds": ("Time in which a transfer's bytes moved.", {"buckets": _SECONDS}),
    "gigabytes_per_second": ("Rate on the wire, in 1e9 bytes per second.", {"buckets": _RATES}),
}


class TransferRecorder:
    """Collects one rank's finished transfers for vLLM's statistics, and writes them to the event log."""

    def __init__(self, path: str | None, rank: int) -> None:
        self._rank = rank
        self._stats = PdKvStats()
        self._lock = threading.Lock()
        self._log = EventLog(path)
        self.close = self._log.close

    def add(self, record: TransferEvent) -> None:
        record.rank = self._rank
        if record.end_s is None:
            record.end_s = time.monotonic()
        with self._lock:
            ended = (record.side, record.error is None, record.bytes, record.wait_s, record.wire_s)
            self._stats.data["transfers"].append(ended)
        self._log.add(record)

    def take_stats(self) -> PdKvStats | None:
        """Transfers that ended since the last call; None if there are none."""
        with self._lock:
            if self._stats.is_empty():
                return None
            taken, self._stats = self._stats, PdKvStats()
            return taken


@dataclass
class PdKvStats(KVConnectorStats):
    """Transfers of an interval: (side, ended well, bytes, wait_s, wire_s) of each. Plain data, because it crosses processes."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = self.data or {"transfers": []}

    def reset(self) -> None:
        self.data = {"transfers": []}

    def aggregate(self, other: KVConnectorStats) -> PdKvStats:
        """Add the transfers of another interval or of another rank."""
        self.data["transfers"] += other.data["transfers"]
        return self

    def is_empty(self) -> bool:
        return not self.data["transfers"]

    def reduce(self) -> dict[str, int | float]:
        """The interval as vLLM's log shows it; sides that moved nothing are left out."""
        line: dict[str, int | float] = {}
        for side in _SIDES:
            ended = [transfer for transfer in self.data["transfers"] if transfer[0] == side]
            moved = [(size, wire_s or 0) for _, good, size, _, wire_s in ended if good]
            total, wire_s = sum(size for size, _ in moved), sum(seconds for _, seconds in moved)
            if ended:
                line |= {f"{side} transfers": len(moved), f"{side} failures": len(ended) - len(moved)}
            if moved:
                line[f"{side} MB"] = round(total / 1e6, 3)
            if wire_s > 0:
                line[f"{side} GB/s on the wire"] = round(total / wire_s / 1e9, 3)
        return line


class PdKvPromMetrics(KVConnectorPromMetrics):
    """The same as Prometheus metrics, labelled by side (send, receive) beside vLLM's own labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[tuple[int, str, str], Any] = {}
        for name, (text, more) in _METRICS.items():
            kind = self._histogram_cls if more else self._counter_cls
            metric = kind(name=f"vllm:pdbench_kv_{name}", documentation=text, labelnames=[*labelnames, "side"], **more)
            for engine, values in per_engine_labelvalues.items():
                for side in _SIDES:
                    self._metrics[engine, side, name] = metric.labels(*values, side)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for side, good, size, wait_s, wire_s in transfer_stats_data["transfers"]:
            seen: dict[str, float] = {"failures": 1}
            if good:
                seen = {"transfers": 1, "bytes": size}
                if wait_s is not None:
                    seen["wait_seconds"] = max(wait_s, 0.0)
                if wire_s:
                    seen |= {"wire_seconds": wire_s, "gigabytes_per_second": size / wire_s / 1e9}
            for name, value in seen.items():
                metric = self._metrics[engine_idx, side, name]
                (metric.observe if _METRICS[name][1] else metric.inc)(value)
