"""What is recorded of every transfer: one JSON line in the event log, vLLM's own statistics and its Prometheus metrics."""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from pdbench.events import TransferEvent

logger = logging.getLogger(f"vllm.{__name__}")

_FIELDS = ("bytes", "wait_s", "wire_s")
_SIDES = ("send", "receive")
_SECONDS = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_RATES = [0.1, 0.3, 1, 3, 10, 30, 50, 100, 150, 200, 250, 300, 350, 400, 450]
_METRICS = {  # name -> documentation, and the buckets of a histogram
    "transfers": ("KV transfers that ended well.", None),
    "failures": ("KV transfers that failed.", None),
    "bytes": ("Bytes of KV cache moved.", None),
    "wait_seconds": ("From decode's request to the first byte.", _SECONDS),
    "wire_seconds": ("Time in which a transfer's bytes moved.", _SECONDS),
    "gigabytes_per_second": ("Rate on the wire, in 1e9 bytes per second.", _RATES),
}


class TransferRecorder:
    """Collects finished transfers for vLLM's statistics, and writes them to the event log from a thread of its own."""

    def __init__(self, path: str | None) -> None:
        self._stats = PdKvStats()
        self._lock = threading.Lock()
        self._lines: queue.SimpleQueue[TransferEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._write, args=(Path(path),), name="kv-event-log", daemon=True)
            self._thread.start()

    def add(self, record: TransferEvent) -> None:
        if record.end_s is None:
            record.end_s = time.monotonic()
        with self._lock:
            self._stats.add(record)
        if self._thread is not None:
            self._lines.put(record)

    def take_stats(self) -> PdKvStats | None:
        """Transfers that ended since the last call; None if there are none."""
        with self._lock:
            if self._stats.is_empty():
                return None
            taken, self._stats = self._stats, PdKvStats()
            return taken

    def close(self) -> None:
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(timeout=2.0)

    def _write(self, path: Path) -> None:
        try:
            with path.open("ab", buffering=0) as file:
                while (record := self._lines.get()) is not None:
                    file.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            logger.error("the KV event log %s cannot be written (%s): no more lines there", path, error)
            while self._lines.get() is not None:
                pass


@dataclass
class PdKvStats(KVConnectorStats):
    """Transfers of an interval: lists of raw values by side, and a 1 per failure. Plain data, because it crosses processes."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {f"{side}_{name}": [] for side in _SIDES for name in (*_FIELDS, "failed")}

    def add(self, record: TransferEvent) -> None:
        if record.error is not None:
            self.data[f"{record.side}_failed"].append(1)
            return
        for name in _FIELDS:
            self.data[f"{record.side}_{name}"].append(getattr(record, name))

    def aggregate(self, other: KVConnectorStats) -> PdKvStats:
        """Add the transfers of another interval or of another rank."""
        for name, values in other.data.items():
            self.data[name].extend(values)
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """The interval as vLLM's log shows it; sides that moved nothing are left out."""
        line: dict[str, int | float] = {}
        for side in _SIDES:
            moved, wire = sum(self.data[f"{side}_bytes"]), sum(seconds or 0 for seconds in self.data[f"{side}_wire_s"])
            count, failed = len(self.data[f"{side}_bytes"]), len(self.data[f"{side}_failed"])
            if count or failed:
                line |= {f"{side} transfers": count, f"{side} failures": failed}
            if count:
                line |= {f"{side} MB": round(moved / 1e6, 3)}
            if wire > 0:
                line |= {f"{side} GB/s on the wire": round(moved / wire / 1e9, 3)}
        return line


class PdKvPromMetrics(KVConnectorPromMetrics):
    """The same as Prometheus metrics, labelled by side (send, receive) beside vLLM's own labels."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labels: list[str], per_engine: dict[int, list[object]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labels, per_engine)
        self._metrics: dict[tuple[str, str], dict[int, Any]] = {}
        for name, (documentation, buckets) in _METRICS.items():
            arguments = {"documentation": documentation, "labelnames": [*labels, "side"]}
            if buckets is None:
                metric = self._counter_cls(name=f"vllm:pdbench_kv_{name}", **arguments)
            else:
                metric = self._histogram_cls(name=f"vllm:pdbench_kv_{name}", buckets=buckets, **arguments)
            for side in _SIDES:
                labelled = {engine: [*values, side] for engine, values in per_engine.items()}
                self._metrics[name, side] = create_metric_per_engine(metric, labelled)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        for side in _SIDES:
            self._metrics["failures", side][engine_idx].inc(len(data[f"{side}_failed"]))
            self._metrics["transfers", side][engine_idx].inc(len(data[f"{side}_bytes"]))
            self._metrics["bytes", side][engine_idx].inc(sum(data[f"{side}_bytes"]))
            for moved, wait, wire in zip(*(data[f"{side}_{name}"] for name in _FIELDS), strict=True):
                if wait is not None:
                    self._metrics["wait_seconds", side][engine_idx].observe(max(wait, 0.0))
                if wire:
                    self._metrics["wire_seconds", side][engine_idx].observe(wire)
                    self._metrics["gigabytes_per_second", side][engine_idx].observe(moved / wire / 1e9)
