"""One thread per host that reads every device at a steady interval and reports how steady it was; the merging of records.

Three things happen on that thread: samples every `interval_s`; the driver's power buffer is emptied once a second, which
gives a finer curve than polling at no polling cost; each energy counter is read as it moves (counter.py).
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from pdbench.power.counter import ANCHOR_S, UNSHAPED_S, CounterEdgeTracker
from pdbench.power.device import Reader
from pdbench.records import DeviceRecord, DeviceSample

BUFFER_S = 1.0
_FIRST_EDGES_S = 0.5
_LAST_EDGE_S = 0.25
_STAMP_ERROR_S = 0.01
_SLOW_S, _HANGS_S = 0.25, 10.0
"""A reading that took longer is of nobody knows which instant; ... a thread that takes longer for its last ones hangs in a driver."""
_COUNTS = {"missed_ticks", "stale_repeats"}
_LOOKS_BACK_S = 1.0
"""A GPU's utilisation, and its average power, are of up to so long before they are read."""
_POWERS = {"power_w", "power_average_w", "module_power_w", "memory_power_w"}
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

    def __init__(self, readers: Sequence[Reader], interval_s: float, time_source: SystemTime | None = None) -> None:
        self._interval_s, self._time = interval_s, time_source or SystemTime()
        self._devices = [_Device(reader, self._time) for reader in readers]
        self._stop = threading.Event()
        self._settled = threading.Event()
        self._end_s: float | None = None
        self._thread = threading.Thread(target=self.run, name="pdbench-sampler", daemon=True)
        self._figures: dict[str, float | None] = {}

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
        self._thread.join(_HANGS_S)
        if self._thread.is_alive():
            for device in self._devices:
                device.give_up()

    def run(self) -> None:
        """The thread: reads what is due until it is stopped, and on until the end of the window is covered."""
        began_cpu, began = self._time.cpu(), self._time.monotonic()
        missed_intervals = 0
        for device in self._devices:
            device.guarded(partial(device.reader.buffer, self._time.unix()))  # what it gathered before is not ours
        next_sample, next_buffer = began, began + BUFFER_S
        while not self._over():
            now = self._time.monotonic()
            if now >= next_sample:
                for device in self._devices:
                    device.sample()
                # Intervals that have already passed are counted as missed, never made up for in a burst.
                late = int((self._time.monotonic() - next_sample) / self._interval_s)
                missed_intervals += late
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
                self._time.wait(max(0.0, due - now), self._stop if self._end_s is None else threading.Event())
        for device in self._devices:
            device.sample()  # one more beyond the end of the window
            device.empty_buffer()
            device.reader.close()
        self._settled.set()
        ran_s = self._time.monotonic() - began
        self._figures = {
            "missed_ticks": float(missed_intervals),
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

    def latest(self) -> list[DeviceRecord]:
        """The last sample of each device that has one, for what is shown live; safe while the thread runs."""
        return [device.record(device.samples[-1:]) for device in self._devices if device.samples]

    def idle(self, name: str, seconds: float) -> None:
        """Wait for `seconds` of idleness and keep its mean power as the devices' `idle_power_w[name]` (see power/idle.py)."""
        start = self._time.monotonic()
        self._time.wait(seconds, self._stop)
        for device in self._devices:
            device.idle_windows[name] = (start, self._time.monotonic())

    def take(self) -> list[DeviceRecord]:
        """What was read since the last call, on the monotonic clock, for `merge_records`; safe while the thread runs. The
        first pieces after the `with` block carry the figures of the sampling and the idle powers."""
        figures, self._figures = self._figures, {}
        return [device.take(figures) for device in self._devices]


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
    statistics: dict[str, dict[str, float | None]] = {}
    for field in (name for name in DeviceSample.__struct_fields__ if name not in _NOT_STATISTICS):
        values = [value for sample in samples if (value := getattr(sample, field)) is not None]
        if values:
            # The mean of power is energy over time, which analysis/meter.py fills in.
            mean = None if field in _POWERS else float(np.mean(values))
            statistics[field] = {"avg": mean, "min": float(min(values)), "max": float(max(values))}
    return msgspec.structs.replace(
        pieces[-1],
        samples=samples,
        fine_power=fine,
        energy_ticks=sorted(edges),
        sampling=sampling,
        statistics=statistics,
        not_measured={field: reason for piece in pieces for field, reason in piece.not_measured.items()},
        idle_power_w={kind: power_w for piece in pieces for kind, power_w in piece.idle_power_w.items()},
        idle_utilization_pct={kind: pct for piece in pieces for kind, pct in piece.idle_utilization_pct.items()},
    )


def _sampling_statistics(
    samples: Sequence[DeviceSample], fine: Sequence[tuple[float, float]]
) -> dict[str, float | None]:
    """The achieved interval (p50, p99, largest gap), the time a read takes, the fine curve's interval, repeated powers.

    A repeat is a sample whose power equals the one before it: the device had not refreshed it (or drew just the same).
    """
    gaps_ms = 1000 * np.diff([sample.t_s for sample in samples])
    reads_ms = 1000 * np.array([sample.read_s for sample in samples if sample.read_s is not None])
    fine_ms = 1000 * np.diff([t_s for t_s, _ in fine])
    powers = [sample.power_w for sample in samples]
    quantiles = {"p50_ms": (gaps_ms, 50), "p99_ms": (gaps_ms, 99), "largest_gap_ms": (gaps_ms, 100)}
    quantiles |= {"read_p50_ms": (reads_ms, 50), "fine_interval_ms": (fine_ms, 50)}
    figures = {name: float(np.percentile(x, pct)) if len(x) else None for name, (x, pct) in quantiles.items()}
    return figures | {"stale_repeats": float(sum(a is not None and a == b for a, b in itertools.pairwise(powers)))}


class _Device:
    """What the thread has read from one reader."""

    def __init__(self, reader: Reader, time_source: SystemTime) -> None:
        self.reader, self._time = reader, time_source
        self.samples: list[DeviceSample] = []
        self.fine: list[tuple[float, float]] = []
        self._offset: float | None = None
        self._busy_since_s: float | None = None
        self.counter = CounterEdgeTracker()
        self.idle_windows: dict[str, tuple[float, float]] = {}
        self._new_counter_j: float | None = None
        self._taken, self._slow = (0, 0, 0), 0

    def sample(self) -> None:
        """Read the quick fields once; a device that is lost gives no more samples."""
        if self.reader.lost:
            return
        before = self._time.monotonic()
        values = self.guarded(lambda: self.reader.read(before))
        after = self._time.monotonic()
        if not values or after - before > _SLOW_S:
            self._slow += bool(values)
            return
        self.counter.anchor_s = ANCHOR_S if {"power_w", "power_average_w"} & values.keys() else UNSHAPED_S
        if self._new_counter_j is not None:
            values.setdefault("energy_j", self._new_counter_j)
            self._new_counter_j = None
        self.samples.append(DeviceSample(t_s=(before + after) / 2, read_s=after - before, **values))

    def read_counter(self) -> None:
        before = self._time.monotonic()
        value = self.guarded(self.reader.counter_j)
        after = self._time.monotonic()
        if value is not None and after - before > _SLOW_S:
            self.counter.skip(after)
            return
        if value is not None:
            self._new_counter_j = value
        if value is None and self.counter.settled and "energy_j" not in self.reader.not_measured:
            self.counter.skip(after)
        else:
            self.counter.observe((before + after) / 2, value, after)

    def empty_buffer(self) -> None:
        """The driver's wall-clock stamps become monotonic by the offset of this moment; where that clock was set meanwhile, the stamps of before
        by the earlier offset."""
        unix_s = self._time.unix()
        offset = unix_s - self._time.monotonic()
        entries = None if self.reader.lost else self.guarded(partial(self.reader.buffer, unix_s))
        last_s = self.fine[-1][0] if self.fine else -math.inf
        end_s = self._time.monotonic() + _STAMP_ERROR_S
        offsets = {offset: None, self._offset or offset: None}
        new = []
        for stamp_s, power_w in entries or []:
            times = [t_s for each in offsets if last_s < (t_s := stamp_s - each) <= end_s]
            new += [(t_s, power_w) for t_s in times[:1]]
        self.fine += sorted(new)
        self._offset = offset

    def guarded(self, call: Callable[[], Any]) -> Any:
        """A reader's bug or a driver's surprise loses that device, never the thread."""
        self._busy_since_s = self._time.monotonic()
        try:
            return call()
        except Exception as error:
            self.reader.mark_failed(f"reading failed: {type(error).__name__}: {error}")
            return None
        finally:
            self._busy_since_s = None

    def give_up(self) -> None:
        """Where the thread still waits for this device's driver, it is lost."""
        if (since_s := self._busy_since_s) is not None:
            self.reader.mark_failed(f"its driver has not answered for {self._time.monotonic() - since_s:.0f} s")

    def record(self, samples: list[DeviceSample]) -> DeviceRecord:
        reader = self.reader
        return DeviceRecord(
            id=reader.id, kind=reader.kind, name=reader.name, role=reader.role, index=reader.index, samples=samples
        )

    def take(self, figures: dict[str, float | None]) -> DeviceRecord:
        """What is new since the last call; with `figures`, the sampling has ended."""
        taken, self._taken = self._taken, (len(self.samples), len(self.fine), len(self.counter.edges))
        samples, fine, edges = map(slice, taken, self._taken)
        record = self.record(self.samples[samples])
        record.fine_power, record.energy_ticks = self.fine[fine], self.counter.edges[edges]
        record.not_measured = dict(self.reader.not_measured)
        record.default_power_limit_w, record.settings = self.reader.default_power_limit_w, dict(self.reader.settings)
        if figures:
            if self._slow and not self.samples:
                reason = (
                    f"each of {self._slow} readings took over {_SLOW_S:g} s: of which instant they are is not known"
                )
                record.not_measured |= dict.fromkeys(("device", "power_w", "energy_j"), reason)
            period_s = self.counter.period_s
            refresh = {"energy_refresh_ms": None if period_s is None else 1000 * period_s}
            refresh["energy_tick_error_ms"] = 1000 * self.counter.error_s if self.counter.edges else None
            record.sampling = _sampling_statistics(self.samples, self.fine) | figures | refresh
            for name, (start_s, end_s) in self.idle_windows.items():
                # The fine curve of a window of steady power, or the samples where there is none; of a device that gives an average alone, that.
                instants, averages = (
                    [(sample.t_s, value) for sample in self.samples if (value := getattr(sample, field)) is not None]
                    for field in ("power_w", "power_average_w")
                )
                curves = ((self.fine, start_s), (instants, start_s), (averages, start_s + _LOOKS_BACK_S))
                windows = ([power_w for t_s, power_w in curve if since_s <= t_s <= end_s] for curve, since_s in curves)
                powers = next(filter(None, windows), None)
                record.idle_power_w[name] = float(np.mean(powers)) if powers else None
                busy_pct = [
                    sample.gpu_utilization_pct
                    for sample in self.samples
                    if start_s + _LOOKS_BACK_S <= sample.t_s <= end_s and sample.gpu_utilization_pct is not None
                ]
                record.idle_utilization_pct[name] = float(np.mean(busy_pct)) if busy_pct else None
        return record
