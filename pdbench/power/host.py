"""The devices of this host for the sampler: GPUs by role, CPU packages and DRAM (RAPL), CPU use of processes and of the host.

CPU use is a share of time, not a power: nothing here derives watts from it.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pdbench.power.device import Reader, gpu_indices, open_gpu

_REFRESH_S = 1.0


def open_readers(gpus: Mapping[str, Sequence[int]], processes: Mapping[str, Sequence[int]]) -> list[Reader]:
    """Readers of each role's GPUs (by driver index) and processes (by pid, with their descendants), and RAPL where it exists.

    A GPU that cannot be read is still in the list; its `not_measured` says why.
    """
    readers = [open_gpu(index, role) for role, indices in gpus.items() for index in indices]
    readers += [ProcessReader(role, list(pids)) for role, pids in processes.items() if pids]
    return [*readers, *open_rapl()]


def open_host(gpus: Sequence[int] | None = None) -> list[Reader]:
    """What `pdbench monitor` watches: the named GPUs (None: all of them), RAPL, and the host's CPU use."""
    indices = gpu_indices() if gpus is None else gpus
    return [*(open_gpu(index, None) for index in indices), *open_rapl(), HostReader()]


def open_rapl(powercap: Path = Path("/sys/class/powercap")) -> list[Reader]:
    """Every package and every DRAM zone of Linux powercap (Intel and AMD)."""
    readers: list[Reader] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                readers.append(RaplReader(zone, f"cpu-{name}", "cpu", f"CPU {name}"))
            elif name == "dram":  # other parts (core, uncore) are counted in their package
                package = (powercap / zone.name.rpartition(":")[0] / "name").read_text().strip()
                readers.append(RaplReader(zone, f"dram-{package}", "dram", f"DRAM of {package}"))
        except (OSError, ValueError):
            continue
    return readers


class RaplReader(Reader):
    """One powercap zone. `energy_j` counts from the first read, without wrap-around; power is its slope between reads."""

    def __init__(self, zone: Path, device_id: str, kind: str, name: str) -> None:
        super().__init__(device_id, kind, name)
        self._counter = zone / "energy_uj"
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last: tuple[int, float] | None = None
        self._total_uj = 0

    def read(self, now_s: float) -> dict[str, Any]:
        try:
            value_uj = int(self._counter.read_text())
        except (OSError, ValueError) as error:
            refused = f"no permission to read {self._counter}: root may; `chmod a+r` permits others"
            is_refusal = isinstance(error, PermissionError)
            self.mark_failed(refused if is_refusal else f"{self._counter} cannot be read: {error}")
            return {}
        before, self._last = self._last, (value_uj, now_s)
        if before is None:
            return {"energy_j": 0.0}
        step_uj = value_uj - before[0]
        step_uj += self._range_uj if step_uj < 0 else 0
        self._total_uj += step_uj
        power = {"power_w": step_uj / 1e6 / (now_s - before[1])} if now_s > before[1] else {}
        return power | {"energy_j": self._total_uj / 1e6}


class _CpuReader(Reader):
    """What both readers of CPU use have in common: no power, and the mean clock of all cores."""

    def __init__(self, device_id: str, name: str, role: str | None, no_power: str) -> None:
        super().__init__(device_id, "process", name, role=role)
        self.not_measured |= dict.fromkeys(("power_w", "energy_j"), no_power)
        self._clock_read_s = -math.inf
        self._clock_mhz: dict[str, float] = {}

    def _cpu_clock(self, now_s: float) -> dict[str, float]:
        # Read once a second: the kernel wakes every core to answer.
        if now_s - self._clock_read_s >= _REFRESH_S:
            self._clock_read_s = now_s
            frequency = None
            with contextlib.suppress(OSError, NotImplementedError):
                frequency = psutil.cpu_freq()
            if frequency and frequency.current:
                self._clock_mhz = {"cpu_clock_mhz": float(frequency.current)}
            else:
                self.not_measured["cpu_clock_mhz"] = "the kernel does not report the CPU's clock"
        return self._clock_mhz


class ProcessReader(_CpuReader):
    """The processes `pids` of one role and their descendants; 100 % is one core busy."""

    def __init__(self, role: str | None, pids: list[int]) -> None:
        no_power = "CPU use of processes has no meter of its own"
        super().__init__(f"process-{role}", f"CPU use of {role}'s processes", role, no_power)
        self._roots = pids
        self._processes: dict[int, psutil.Process] = {}
        self._used: dict[int, tuple[float, float]] = {}
        self._refreshed_s = -math.inf

    def read(self, now_s: float) -> dict[str, Any]:
        """CPU time of each process since its last reading over the time between the two, summed; memory is the sum of
        resident sets."""
        # Walking /proc is expensive: once a second.
        if now_s - self._refreshed_s >= _REFRESH_S:
            self._refreshed_s = now_s
            for root in self._roots:
                with contextlib.suppress(psutil.Error):
                    top = psutil.Process(root)
                    for process in (top, *top.children(recursive=True)):
                        self._processes.setdefault(process.pid, process)
        memory_bytes = 0
        shares: list[float] = []
        for pid, process in list(self._processes.items()):
            try:
                at_s, used_s = _cpu_time(process)
                memory_bytes += process.memory_info().rss
            except psutil.Error:
                del self._processes[pid]
                continue
            # What a process had used before its first reading belongs to no interval of ours.
            before, self._used[pid] = self._used.get(pid), (at_s, used_s)
            if before and at_s > before[0]:
                shares.append((used_s - before[1]) / (at_s - before[0]))
        if not self._processes:
            self.not_measured.setdefault("cpu_utilization_pct", "no such process (any more)")
            return {}
        values = {"memory_used_mib": memory_bytes / 2**20} | self._cpu_clock(now_s)
        return values | ({"cpu_utilization_pct": 100 * sum(shares)} if shares else {})


class HostReader(_CpuReader):
    """CPU use of the whole host; 100 % is one core busy."""

    def __init__(self) -> None:
        no_power = "CPU use is a share of time, not a power; RAPL zones are devices of their own"
        super().__init__("host", f"CPU use of the host, {psutil.cpu_count()} cores", None, no_power)
        self._before = psutil.cpu_times()

    def read(self, now_s: float) -> dict[str, Any]:
        """Busy time since the last read over all time that the same reading accounts for: late or not, at most all cores."""
        before, self._before = self._before, psutil.cpu_times()
        spent_s = {name: max(0.0, getattr(self._before, name) - getattr(before, name)) for name in before._fields}
        # Linux counts a guest's time in user and nice as well.
        all_s = sum(seconds for name, seconds in spent_s.items() if not name.startswith("guest"))
        busy_s = sum(spent_s.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        values = {"memory_used_mib": psutil.virtual_memory().used / 2**20} | self._cpu_clock(now_s)
        return values | ({"cpu_utilization_pct": 100 * (psutil.cpu_count() or 1) * busy_s / all_s} if all_s else {})


def _cpu_time(process: psutil.Process) -> tuple[float, float]:
    """An instant, and the CPU seconds that a process had used by then. On a busy machine this thread can be suspended between
    two readings; the closest pair of a few tries counts."""
    tries = []
    for _ in range(3):
        begin_s = time.monotonic()
        try:
            # The process's CPU clock, see clock_getcpuclockid(3): /proc counts in steps of 10 ms, a tenth of an interval.
            used_s = time.clock_gettime(~process.pid << 3 | 2)
        except OSError:
            times = process.cpu_times()
            used_s = times.user + times.system
        end_s = time.monotonic()
        tries.append((end_s - begin_s, (begin_s + end_s) / 2, used_s))
        if end_s - begin_s < 0.001:
            break
    _, at_s, used_s = min(tries)
    return at_s, used_s
