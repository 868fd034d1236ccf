"""CPU use of a role's processes, for hosts without GPUs: a share of time, not a power; nothing here claims watts.

Try: python -c "
import os, time; from pdbench.power.processes import ProcessReader
reader = ProcessReader('self', [os.getpid()]); reader.read(0.0); time.sleep(1); print(reader.read(1.0))"
"""

import sys
import time
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
        self._seen: dict[int, tuple[float, float]] = {}
        self._refreshed_s: float | None = None
        self._clock = _CpuClock(self)
        for field in ("power_w", "energy_j"):
            self.not_measured[field] = "CPU use of processes has no meter of its own"

    def read(self, now_s: float) -> dict[str, Any]:
        """CPU time of each process of the tree since its last reading over the time between the two, summed; memory is the
        sum of resident sets."""
        if self._refreshed_s is None or now_s - self._refreshed_s >= _TREE_REFRESH_S:
            self._refresh()
            self._refreshed_s = now_s
        memory_bytes = 0
        shares: list[float] = []
        for pid, process in list(self._processes.items()):
            try:
                at_s, used_s = _used_at(process)
                memory_bytes += process.memory_info().rss
            except psutil.Error:
                del self._processes[pid]
                continue
            # What a process had used before it was first seen belongs to no interval of ours.
            before, self._seen[pid] = self._seen.get(pid), (at_s, used_s)
            if before and at_s > before[0]:
                shares.append((used_s - before[1]) / (at_s - before[0]))
        if not self._processes:
            self.not_measured.setdefault("cpu_utilization_pct", "no such process (any more)")
            return {}
        values: dict[str, Any] = {"memory_used_mib": memory_bytes / 2**20} | self._clock.read(now_s)
        if shares:
            values["cpu_utilization_pct"] = 100 * sum(shares)
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
        self._before = psutil.cpu_times()
        self._clock = _CpuClock(self)
        for field in ("power_w", "energy_j"):
            self.not_measured[field] = "CPU use is a share of time, not a power; RAPL zones are devices of their own"

    def read(self, now_s: float) -> dict[str, Any]:
        """Busy time since the last read over all time that the same reading accounts for: late or not, never more than all
        cores."""
        before, self._before = self._before, psutil.cpu_times()
        spent_s = {name: max(0.0, getattr(self._before, name) - getattr(before, name)) for name in before._fields}
        # Linux counts a guest's time in user and nice as well.
        all_s = sum(seconds for name, seconds in spent_s.items() if not name.startswith("guest"))
        busy_s = sum(spent_s.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        values: dict[str, Any] = {"memory_used_mib": psutil.virtual_memory().used / 2**20} | self._clock.read(now_s)
        if all_s:
            values["cpu_utilization_pct"] = 100 * (psutil.cpu_count() or 1) * busy_s / all_s
        return values


def _used_at(process: psutil.Process) -> tuple[float, float]:
    """An instant, and the CPU seconds that a process had used at it. On a busy machine this thread can wait between two
    readings; the closest pair of a few tries counts."""
    tries = []
    for _ in range(3):
        begun_s, used_s, ended_s = time.monotonic(), _used_s(process), time.monotonic()
        tries.append((ended_s - begun_s, (begun_s + ended_s) / 2, used_s))
        if ended_s - begun_s < 0.001:
            break
    _, at_s, used_s = min(tries)
    return at_s, used_s


def _used_s(process: psutil.Process) -> float:
    """CPU seconds that a process has used: by its CPU clock where there is one (Linux, see clock_getcpuclockid(3)), for
    /proc counts in steps of 10 ms, a tenth of a sample's interval."""
    if sys.platform == "linux":
        try:
            return time.clock_gettime(~process.pid << 3 | 2)
        except OSError:
            pass
    times = process.cpu_times()
    return float(times.user + times.system)


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
