"""One thread per host that reads every device at a steady interval and reports how steady it was; the merging of records.

Three things happen on that thread: samples every `interval_s`; the driver's power buffer is emptied once a second, which
gives a finer curve than polling at no polling cost; each energy counter is read as it moves (counter.py).
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from pdbench.power.counter import CounterEdgeTracker
from pdbench.power.device import Reader
from pdbench.records import Clock, DeviceRecord, DeviceSample

BUFFER_S = 1.0
_FIRST_EDGES_S = 0.5
_LAST_EDGE_S = 0.25
_COUNTS = {"missed_ticks", "stale_repeats"}
_NOT_STATISTICS = {"t_s", "read_s", "energy_j", "throttle"}


class SystemTime:
    """This host's clocks; tests put scripted ones in their place."""

    monotonic = staticmethod(time.monotonic)
    unix = staticmethod(time.time)
    cpu = staticmethod(time.thread_time)

    def wait(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


class Sampler:
    """Samples `readers` every `interval_s` seconds (0.01 to 10) while the `with` block runs; closes them at its end.

    On entry it waits (half a second at most) until every energy counter has moved once, so that the edge of a window that
    starts then is covered.
    """

    def __init__(
        self, readers: Sequence[Reader], interval_s: float, clock: Clock, time_source: SystemTime | None = None
    ) -> None:
        self._clock, self._interval_s = clock, interval_s
        self._time = time_source or SystemTime()
        self._devices = [_Device(reader, self._time) for reader in readers]
        self._stop = threading.Event()
        self._settled = threading.Event()
        self._never = threading.Event()
        self._end_s: float | None = None
        self._thread = threading.Thread(target=self.run, name="pdbench-sampler", daemon=True)
        self._missed_intervals = 0
        self._figures: dict[str, float | None] = {}
        self._figures_taken = False

    def __enter__(self) -> "Sampler":
        self._thread.start()
        try:
            self._settled.wait(2 * _FIRST_EDGES_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def run(self) -> None:
        """The thread: reads what is due until it is stopped, and on until the end of the window is covered."""
        began_cpu, began = self._time.cpu(), self._time.monotonic()
        for device in self._devices:
            device.guarded(device.reader.buffer)  # what the driver gathered before is not ours
        next_sample, next_buffer = began, began + BUFFER_S
        while not self._over():
            now = self._time.monotonic()
            if now >= next_sample:
                for device in self._devices:
                    device.sample()
                # Intervals that have already passed are counted as missed, never made up for in a burst.
                late = int((self._time.monotonic() - next_sample) / self._interval_s)
                self._missed_intervals += late
                next_sample += (late + 1) * self._interval_s
            elif now >= next_buffer:
                for device in self._devices:
                    device.empty_buffer()
                next_buffer = self._time.monotonic() + BUFFER_S
            elif due_counters := [device for device in self._devices if device.counter.due_s <= now]:
                min(due_counters, key=lambda device: device.counter.due_s).read_counter()
            else:
                if all(device.counter.settled for device in self._devices) or now - began > _FIRST_EDGES_S:
                    self._settled.set()
                due = min([next_sample, next_buffer, *(device.counter.due_s for device in self._devices)])
                self._time.wait(max(0.0, due - now), self._stop if self._end_s is None else self._never)
        for device in self._devices:
            device.sample()  # one more beyond the end of the window
            device.empty_buffer()
            device.reader.close()
        self._settled.set()
        ran_s = self._time.monotonic() - began
        self._figures = {
            "missed_ticks": float(self._missed_intervals),
            "sampler_cpu_pct": 100 * (self._time.cpu() - began_cpu) / ran_s if ran_s else None,
        }

    def _over(self) -> bool:
        """It was stopped, and every counter has been read at one more edge (or a quarter of a second has passed)."""
        if not self._stop.is_set():
            return False
        now = self._time.monotonic()
        if self._end_s is None:
            self._end_s = now + _LAST_EDGE_S
            for device in self._devices:
                device.counter.finish(now)
        return now >= self._end_s or not any(device.counter.finishing for device in self._devices)

    def latest(self) -> list[tuple[Reader, DeviceSample | None]]:
        """Each device's last sample, for a live table; safe while the thread runs."""
        return [(device.reader, device.samples[-1] if device.samples else None) for device in self._devices]

    def idle(self, name: str, seconds: float) -> None:
        """Wait for `seconds` of idleness and keep its mean power as the devices' `idle_power_w[name]` (see power/idle.py)."""
        start = self._time.monotonic()
        self.pause(seconds)
        for device in self._devices:
            device.idle_windows[name] = (start, self._time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let the sampling go on for `seconds`."""
        self._time.wait(seconds, self._stop)

    def take(self) -> list[DeviceRecord]:
        """What was read since the last call, on the run's clock, for `merge_records`; safe while the thread runs. The first
        pieces after the `with` block carry the figures of the sampling and the idle powers."""
        figures = {} if self._figures_taken else self._figures
        self._figures_taken |= bool(figures)
        return [device.piece(self._clock, figures, device.take()) for device in self._devices]

    def records(self) -> list[DeviceRecord]:
        """Everything read, on the run's clock, with statistics; call it after the `with` block."""
        return merge_records([device.piece(self._clock, self._figures) for device in self._devices])


def merge_records(pieces: Sequence[DeviceRecord], move: Callable[[float], float] | None = None) -> list[DeviceRecord]:
    """One record per device (host and id) from pieces of it, of one sampler or of several (interleaved trials), with statistics
    over all. `move` puts their instants on the run's clock.

    Of the samplings' figures, counts add up and of the others the worst stands.
    """
    devices: dict[tuple[str | None, str], list[DeviceRecord]] = {}
    for piece in pieces:
        devices.setdefault((piece.host, piece.id), []).append(piece)
    return [_merged(pieces, move) for pieces in devices.values()]


def _merged(pieces: list[DeviceRecord], move: Callable[[float], float] | None) -> DeviceRecord:
    samples = [sample for piece in pieces for sample in piece.samples]
    fine = [point for piece in pieces for point in piece.fine_power]
    edges = [point for piece in pieces for point in piece.energy_ticks]
    if move:
        samples = [msgspec.structs.replace(sample, t_s=move(sample.t_s)) for sample in samples]
        fine, edges = ([(move(t_s), value) for t_s, value in points] for points in (fine, edges))
    samples.sort(key=lambda sample: sample.t_s)
    fine.sort()
    # A node that was lost could not send the figures of its sampling.
    samplings = [piece.sampling for piece in pieces if piece.sampling] or [_sampling_statistics(samples, fine)]
    sampling: dict[str, float | None] = {}
    for name in dict.fromkeys(itertools.chain(*samplings)):
        values = [value for figures in samplings if (value := figures.get(name)) is not None]
        sampling[name] = None if not values else sum(values) if name in _COUNTS else max(values)
    return msgspec.structs.replace(
        pieces[-1],
        samples=samples,
        fine_power=fine,
        energy_ticks=sorted(edges),
        sampling=sampling,
        statistics=_field_statistics(samples),
        not_measured={field: reason for piece in pieces for field, reason in piece.not_measured.items()},
        idle_power_w={kind: power_w for piece in pieces for kind, power_w in piece.idle_power_w.items()},
    )


def _field_statistics(samples: Sequence[DeviceSample]) -> dict[str, dict[str, float | None]]:
    """Field -> avg, min and max over the samples that have it; a field that no sample has is left out."""
    statistics: dict[str, dict[str, float | None]] = {}
    for field in (name for name in DeviceSample.__struct_fields__ if name not in _NOT_STATISTICS):
        values = [value for sample in samples if (value := getattr(sample, field)) is not None]
        if values:
            statistics[field] = {"avg": float(np.mean(values)), "min": float(min(values)), "max": float(max(values))}
    return statistics


def _sampling_statistics(
    samples: Sequence[DeviceSample], fine: Sequence[tuple[float, float]]
) -> dict[str, float | None]:
    """The achieved interval (p50, p99, largest gap), the time a read takes, the fine curve's interval, repeated powers.

    A repeat is a sample whose power equals the one before it: the device had not refreshed it (or drew just the same).
    """
    gaps_ms = 1000 * np.diff([sample.t_s for sample in samples])
    reads_ms = [1000 * sample.read_s for sample in samples if sample.read_s is not None]
    fine_ms = 1000 * np.diff([t_s for t_s, _ in fine])
    powers = [sample.power_w for sample in samples]
    repeats = sum(a is not None and a == b for a, b in itertools.pairwise(powers))
    return {
        "p50_ms": float(np.percentile(gaps_ms, 50)) if len(gaps_ms) else None,
        "p99_ms": float(np.percentile(gaps_ms, 99)) if len(gaps_ms) else None,
        "largest_gap_ms": float(np.max(gaps_ms)) if len(gaps_ms) else None,
        "read_p50_ms": float(np.median(reads_ms)) if reads_ms else None,
        "fine_interval_ms": float(np.median(fine_ms)) if len(fine_ms) else None,
        "stale_repeats": float(repeats),
    }


class _Device:
    """What the thread has read from one reader; instants are monotonic until `piece` puts them on the run's clock."""

    def __init__(self, reader: Reader, time_source: SystemTime) -> None:
        self.reader, self._time = reader, time_source
        self.samples: list[DeviceSample] = []
        self.fine: list[tuple[float, float]] = []
        self.counter = CounterEdgeTracker()
        self.idle_windows: dict[str, tuple[float, float]] = {}
        self._new_counter_j: float | None = None
        self._taken = [slice(0, 0)] * 3

    def sample(self) -> None:
        """Read the quick fields once; a device that is lost gives no more samples."""
        if self.reader.lost:
            return
        before = self._time.monotonic()
        values = self.guarded(lambda: self.reader.read(before)) or {}
        after = self._time.monotonic()
        if not values:
            return
        if self._new_counter_j is not None:
            values.setdefault("energy_j", self._new_counter_j)
            self._new_counter_j = None
        self.samples.append(DeviceSample(t_s=(before + after) / 2, read_s=after - before, **values))

    def read_counter(self) -> None:
        before = self._time.monotonic()
        value = self.guarded(self.reader.counter_j)
        after = self._time.monotonic()
        self._new_counter_j = value if value is not None else self._new_counter_j
        has_counter = not self.reader.lost and "energy_j" not in self.reader.not_measured
        if value is None and self.counter.settled and has_counter:
            self.counter.skip(after)
        else:
            self.counter.observe((before + after) / 2, value, after)

    def empty_buffer(self) -> None:
        """The driver's wall-clock stamps become monotonic by the offset of this moment."""
        offset = self._time.unix() - self._time.monotonic()
        entries = None if self.reader.lost else self.guarded(self.reader.buffer)
        self.fine += [(unix_s - offset, power_w) for unix_s, power_w in entries or []]

    def guarded(self, call: Callable[[], Any]) -> Any:
        """A reader's bug or a driver's surprise loses that device, never the thread."""
        try:
            return call()
        except Exception as error:
            self.reader.mark_failed(f"reading failed: {type(error).__name__}: {error}")
            return None

    def take(self) -> list[slice]:
        """What is new in samples, fine curve and counter since the last call."""
        sizes = (len(self.samples), len(self.fine), len(self.counter.edges))
        self._taken = [slice(before.stop, size) for before, size in zip(self._taken, sizes, strict=True)]
        return self._taken

    def piece(
        self, clock: Clock, figures: dict[str, float | None], parts: Sequence[slice] = (slice(None),) * 3
    ) -> DeviceRecord:
        """These parts of what was read, on the run's clock; with `figures`, the sampling has ended."""
        reader, run_s = self.reader, clock.of_monotonic
        record = DeviceRecord(
            id=reader.id,
            kind=reader.kind,
            name=reader.name,
            role=reader.role,
            index=reader.index,
            samples=[msgspec.structs.replace(sample, t_s=run_s(sample.t_s)) for sample in self.samples[parts[0]]],
            fine_power=[(run_s(t_s), power_w) for t_s, power_w in self.fine[parts[1]]],
            energy_ticks=[(run_s(t_s), energy_j) for t_s, energy_j in self.counter.edges[parts[2]]],
            not_measured=dict(reader.not_measured),
        )
        if figures:
            sampling = _sampling_statistics(self.samples, self.fine)
            record.sampling = sampling | figures | {"energy_refresh_ms": self.counter.refresh_ms}
            record.idle_power_w = {name: self._mean_power_w(*window) for name, window in self.idle_windows.items()}
        return record

    def _mean_power_w(self, start_s: float, end_s: float) -> float | None:
        """The mean of the fine curve's points in a window of steady power, or of the samples' where there is none."""
        powers = [power_w for t_s, power_w in self.fine if start_s <= t_s <= end_s] or [
            sample.power_w for sample in self.samples if sample.power_w is not None and start_s <= sample.t_s <= end_s
        ]
        return float(np.mean(powers)) if powers else None
