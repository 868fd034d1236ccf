"""CPU use of a role's processes, for hosts without GPUs: a share of time, not a power; nothing here claims watts.

Try: python -c "
import os, time; from pdbench.power.processes import ProcessReader
reader = ProcessReader('self', [os.getpid()]); reader.read(0.0); time.sleep(1); print(reader.read(1.0))"
"""

from typing import Any

import psutil

from pdbench.power.reader import Reader

_TREE_REFRESH_S = 1.0


class ProcessReader(Reader):
    """The processes `pids` of one role and all that they started; 100 % is one core busy."""

    def __init__(self, role: str | None, pids: list[int]) -> None:
        super().__init__(f"process-{role}", "process", f"CPU use of {role}'s processes", role=role)
        self._roots = pids
        self._processes: dict[int, psutil.Process] = {}
        self._used_s: dict[int, float] = {}
        self._total_s = 0.0
        self._before: tuple[float, float] | None = None
        self._refreshed_s: float | None = None
        self._clock = _CpuClock(self)
        for field in ("power_w", "energy_j"):
            self.not_measured[field] = "CPU use of processes has no meter of its own"

    def read(self, now_s: float) -> dict[str, Any]:
        """CPU time of the tree since the last read over the time between; memory is the sum of resident sets."""
        if self._refreshed_s is None or now_s - self._refreshed_s >= _TREE_REFRESH_S:
            self._refresh()
            self._refreshed_s = now_s
        memory_bytes = 0
        for pid, process in list(self._processes.items()):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    memory_bytes += process.memory_info().rss
                used_s = times.user + times.system
                # What a process had used before it was first seen belongs to no interval of ours.
                self._total_s += used_s - self._used_s.get(pid, used_s)
                self._used_s[pid] = used_s
            except psutil.Error:
                del self._processes[pid]
        if not self._processes:
            self.not_measured.setdefault("cpu_utilization_pct", "no such process (any more)")
            return {}
        before, self._before = self._before, (now_s, self._total_s)
        values: dict[str, Any] = {"memory_used_mib": memory_bytes / 2**20} | self._clock.read(now_s)
        if before and now_s > before[0]:
            values["cpu_utilization_pct"] = 100 * (self._total_s - before[1]) / (now_s - before[0])
        return values

    def _refresh(self) -> None:
        """Find the tree anew; walking /proc is dear, so once a second."""
        for root in self._roots:
            try:
                top = psutil.Process(root)
                found = [top, *top.children(recursive=True)]
            except psutil.Error:
                continue
            for process in found:
                self._processes.setdefault(process.pid, process)


class HostReader(Reader):
    """CPU use of the whole host; 100 % is one core busy."""

    def __init__(self) -> None:
        super().__init__("host", "process", f"CPU use of the host, {psutil.cpu_count()} cores")
        self._before: tuple[float, float] | None = None
        self._clock = _CpuClock(self)
        for field in ("power_w", "energy_j"):
            self.not_measured[field] = "CPU use is a share of time, not a power; RAPL zones are devices of their own"

    def read(self, now_s: float) -> dict[str, Any]:
        """Busy time since the last read over the time between."""
        times = psutil.cpu_times()
        busy_s = times.user + times.system + times.nice + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
        before, self._before = self._before, (now_s, busy_s)
        values: dict[str, Any] = {"memory_used_mib": psutil.virtual_memory().used / 2**20} | self._clock.read(now_s)
        if before and now_s > before[0]:
            values["cpu_utilization_pct"] = 100 * max(0.0, busy_s - before[1]) / (now_s - before[0])
        return values


class _CpuClock:
    """The mean clock of all cores; asked once a second, for the kernel wakes every core to answer."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._at_s: float | None = None
        self._value: dict[str, Any] = {}

    def read(self, now_s: float) -> dict[str, Any]:
        if self._at_s is not None and now_s - self._at_s < _TREE_REFRESH_S:
            return self._value
        self._at_s = now_s
        try:
            frequency = psutil.cpu_freq()
        except (OSError, NotImplementedError):
            frequency = None
        if frequency is None or not frequency.current:
            self._reader.not_measured["cpu_clock_mhz"] = "the kernel does not tell the CPU's clock"
        else:
            self._value = {"cpu_clock_mhz": float(frequency.current)}
        return self._value
