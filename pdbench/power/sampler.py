"""One thread a host that reads every device on a steady beat, and says how steady the beat was.

Three things happen on that thread: samples every `interval_s`; the driver's power buffer is emptied once a second, which
gives a finer curve than polling at no polling cost; each energy counter is read on its own tick (see ticks.py).
Try: pdbench monitor --duration 5
"""

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from pdbench.errors import UserError
from pdbench.power.reader import Reader
from pdbench.power.statistics import field_statistics, mean_power_w, sampling_statistics
from pdbench.power.ticks import TickFollower
from pdbench.records import Clock, DeviceRecord, DeviceSample

BUFFER_S = 1.0
_FIRST_TICKS_S = 0.5
_LAST_TICK_S = 0.25


class TimeSource(Protocol):
    """The clocks that the sampler lives by; tests put a scripted one here."""

    def monotonic(self) -> float: ...
    def unix(self) -> float: ...
    def cpu(self) -> float: ...
    def wait(self, seconds: float, stop: threading.Event) -> None: ...


class SystemTime:
    """This host's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    def cpu(self) -> float:
        return time.thread_time()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


class Sampler:
    """Samples `readers` every `interval_s` seconds (0.01 to 10) while the `with` block runs; closes them at its end.

    Raises UserError for an interval out of that range. On entry it waits (half a second at most) until every energy counter has ticked, so that the window's edge is covered.
    """

    def __init__(
        self, readers: Sequence[Reader], interval_s: float, clock: Clock, time_source: TimeSource | None = None
    ) -> None:
        if not 0.01 <= interval_s <= 10:
            raise UserError(f"sample interval {interval_s} s: devices can be sampled every 0.01 to 10 seconds")
        self._clock, self._interval_s = clock, interval_s
        self._time: TimeSource = time_source or SystemTime()
        self._devices = [_Device(reader, self._time) for reader in readers]
        self._stop = threading.Event()
        self._settled = threading.Event()
        self._never = threading.Event()
        self._end_s: float | None = None
        self._thread = threading.Thread(target=self.run, name="pdbench-sampler", daemon=True)
        self._missed_ticks = 0
        self._cpu_s = self._ran_s = 0.0

    def __enter__(self) -> "Sampler":
        self._thread.start()
        try:
            self._settled.wait(2 * _FIRST_TICKS_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def run(self) -> None:
        """The thread's whole life: beat until told to stop, and on until the end of the window is covered."""
        began_cpu, began = self._time.cpu(), self._time.monotonic()
        for device in self._devices:
            device.start_buffer()
        next_sample, next_buffer = began, began + BUFFER_S
        while not self._over():
            now = self._time.monotonic()
            if now >= next_sample:
                self._sample()
                next_sample = self._beat_after(next_sample)
            elif now >= next_buffer:
                self._empty_buffers()
                next_buffer = self._time.monotonic() + BUFFER_S
            elif due_counters := [device for device in self._devices if _tick_due(device) <= now]:
                min(due_counters, key=_tick_due).read_counter()
            else:
                self._settle(now - began)
                due = min([next_sample, next_buffer, *map(_tick_due, self._devices)])
                self._time.wait(max(0.0, due - now), self._stop if self._end_s is None else self._never)
        self._close()
        self._cpu_s, self._ran_s = self._time.cpu() - began_cpu, self._time.monotonic() - began

    def latest(self) -> list[tuple[Reader, DeviceSample | None]]:
        """Each device's last sample, for a live table; safe while the thread runs."""
        return [(device.reader, device.samples[-1] if device.samples else None) for device in self._devices]

    def idle(self, name: str, seconds: float) -> None:
        """Stay here for `seconds` of idleness and keep it as the devices' `idle_power_w[name]` (bare, context, engine_ready)."""
        start = self._time.monotonic()
        self.pause(seconds)
        for device in self._devices:
            device.idle_windows[name] = (start, self._time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let the sampling go on for `seconds`."""
        self._time.wait(seconds, self._stop)

    def take(self) -> list[DeviceRecord]:
        """What was read since the last call, on the run's clock and without statistics; safe while the thread runs."""
        return [device.take(self._clock) for device in self._devices]

    def records(self) -> list[DeviceRecord]:
        """Everything read, on the run's clock, with statistics; call it after the `with` block."""
        cpu_pct = 100 * self._cpu_s / self._ran_s if self._ran_s else None
        return [
            device.record(self._clock, {"missed_ticks": float(self._missed_ticks), "sampler_cpu_pct": cpu_pct})
            for device in self._devices
        ]

    def _beat_after(self, planned: float) -> float:
        """The next beat; those that have already passed are missed and counted, never made up for in a burst."""
        late = int((self._time.monotonic() - planned) / self._interval_s)
        self._missed_ticks += late
        return planned + (late + 1) * self._interval_s

    def _sample(self) -> None:
        for device in self._devices:
            device.sample()

    def _empty_buffers(self) -> None:
        for device in self._devices:
            device.empty_buffer()

    def _settle(self, ran_s: float) -> None:
        if all(device.ticks.settled for device in self._devices) or ran_s > _FIRST_TICKS_S:
            self._settled.set()

    def _over(self) -> bool:
        """Told to stop, and every counter has been read on one more tick (or a quarter of a second has passed)."""
        if not self._stop.is_set():
            return False
        now = self._time.monotonic()
        if self._end_s is None:
            self._end_s = now + _LAST_TICK_S
            for device in self._devices:
                device.ticks.hurry(now)
        return now >= self._end_s or not any(device.ticks.hurrying for device in self._devices)

    def _close(self) -> None:
        """One sample and one look into the buffers past the window's end, then let the devices go."""
        self._sample()
        self._empty_buffers()
        for device in self._devices:
            device.reader.close()
        self._settled.set()


def merge_records(records: Sequence[DeviceRecord]) -> list[DeviceRecord]:
    """One record a device from those of several samplers (interleaved trials): samples joined, statistics made anew.

    Counts add up; of sampling's times and of idle powers the later sampler's stand where both have one, and of gaps the worst.
    """
    merged: dict[tuple[str | None, str], DeviceRecord] = {}
    for record in records:
        key = (record.host, record.id)
        merged[key] = _join(merged[key], record) if key in merged else record
    return list(merged.values())


def _join(first: DeviceRecord, second: DeviceRecord) -> DeviceRecord:
    samples = sorted(first.samples + second.samples, key=lambda sample: sample.t_s)
    sampling = first.sampling | second.sampling
    for name in first.sampling.keys() & second.sampling.keys():
        pair = [value for value in (first.sampling[name], second.sampling[name]) if value is not None]
        if pair:
            sampling[name] = sum(pair) if name in ("missed_ticks", "stale_repeats") else max(pair)
    return msgspec.structs.replace(
        second,
        samples=samples,
        fine_power=sorted(first.fine_power + second.fine_power),
        energy_ticks=sorted(first.energy_ticks + second.energy_ticks),
        not_measured=first.not_measured | second.not_measured,
        sampling=sampling,
        statistics=field_statistics(samples),
        idle_power_w=first.idle_power_w | second.idle_power_w,
    )


class _Device:
    """What the thread has gathered from one reader; instants are monotonic until `record` moves them to the run's clock."""

    def __init__(self, reader: Reader, time_source: TimeSource) -> None:
        self.reader, self._time = reader, time_source
        self.samples: list[DeviceSample] = []
        self.fine: list[tuple[float, float]] = []
        self.ticks = TickFollower()
        self.idle_windows: dict[str, tuple[float, float]] = {}
        self._new_counter_j: float | None = None
        self._taken = (0, 0, 0)

    def sample(self) -> None:
        """Read the fast fields once; a device that is lost gives no more samples."""
        if self.reader.lost:
            return
        before = self._time.monotonic()
        values = self._guarded(lambda: self.reader.read(before)) or {}
        after = self._time.monotonic()
        if not values:
            return
        if self._new_counter_j is not None:
            values.setdefault("energy_j", self._new_counter_j)
            self._new_counter_j = None
        self.samples.append(DeviceSample(t_s=(before + after) / 2, read_s=after - before, **values))

    def read_counter(self) -> None:
        """Read the energy counter once, where the follower asks for it."""
        before = self._time.monotonic()
        value = self._guarded(self.reader.counter_j)
        after = self._time.monotonic()
        self._new_counter_j = value if value is not None else self._new_counter_j
        if value is None and self.ticks.settled and not self.reader.lost and "energy_j" not in self.reader.not_measured:
            self.ticks.missed(after)
        else:
            self.ticks.seen((before + after) / 2, value, after)

    def start_buffer(self) -> None:
        """Throw away what the driver gathered before we began."""
        self._guarded(self.reader.buffer)

    def empty_buffer(self) -> None:
        """Take the driver's buffer; its wall-clock stamps become monotonic by the offset of this moment."""
        offset = self._time.unix() - self._time.monotonic()
        entries = None if self.reader.lost else self._guarded(self.reader.buffer)
        self.fine += [(unix_s - offset, power) for unix_s, power in entries or []]

    def _guarded(self, call: Any) -> Any:
        """A reader's bug or a driver's surprise loses that device, never the thread."""
        try:
            return call()
        except Exception as error:
            self.reader.lose(f"reading failed: {type(error).__name__}: {error}")
            return None

    def take(self, clock: Clock) -> DeviceRecord:
        """What is new since the last call; lists only grow, so a slice of what was there is whole."""
        lists: tuple[list[Any], ...] = (self.samples, self.fine, self.ticks.ticks)
        upto = len(self.samples), len(self.fine), len(self.ticks.ticks)
        samples, fine, ticks = (values[a:b] for values, a, b in zip(lists, self._taken, upto, strict=True))
        self._taken = upto
        return self._plain(clock, samples, fine, ticks)

    def record(self, clock: Clock, sampling: dict[str, float | None]) -> DeviceRecord:
        """Everything on the run's clock, with statistics."""
        record, moved = self._plain(clock, self.samples, self.fine, self.ticks.ticks), clock.of_monotonic
        samples, fine = record.samples, record.fine_power
        idle = {name: mean_power_w(samples, fine, moved(a), moved(b)) for name, (a, b) in self.idle_windows.items()}
        return msgspec.structs.replace(
            record,
            sampling=sampling_statistics(samples, fine) | sampling | {"energy_refresh_ms": self.ticks.refresh_ms},
            statistics=field_statistics(samples),
            idle_power_w=idle,
        )

    def _plain(
        self,
        clock: Clock,
        samples: list[DeviceSample],
        fine: list[tuple[float, float]],
        ticks: list[tuple[float, float]],
    ) -> DeviceRecord:
        reader, moved = self.reader, clock.of_monotonic
        return DeviceRecord(
            id=reader.id,
            kind=reader.kind,
            name=reader.name,
            role=reader.role,
            index=reader.index,
            samples=[msgspec.structs.replace(sample, t_s=moved(sample.t_s)) for sample in samples],
            fine_power=[(moved(t), power) for t, power in fine],
            energy_ticks=[(moved(t), energy) for t, energy in ticks],
            not_measured=dict(reader.not_measured),
        )


def _tick_due(device: _Device) -> float:
    return device.ticks.due_s
