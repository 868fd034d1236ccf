"""What the sampler reads: GPUs of both makers, CPU packages and DRAM (RAPL), CPU use of processes and of the host.

CPU use is a share of time, not a power: nothing here derives watts from it. amdsmi comes with ROCm, not with pdbench.
"""

import contextlib
import importlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pdbench import nvml
from pdbench.errors import UserError

T = TypeVar("T")
_REFRESH_S = 1.0
_STILL_S, _MOST_W, _MOST_CPU_W = 1.0, 10_000.0, 1_000.0
_MIG = "MIG is on: the board's meter is shared by its slices, and no slice has one"


class Reader:
    """One device. `not_measured` maps a field of DeviceSample, or "device" for all of it, to the reason."""

    def __init__(
        self, device_id: str, kind: str, name: str, *, role: str | None = None, index: int | None = None
    ) -> None:
        self.id, self.kind, self.name, self.role, self.index = device_id, kind, name, role, index
        self.not_measured: dict[str, str] = {}
        self.default_power_limit_w: float | None = None
        self.settings: dict[str, bool | float] = {}

    @property
    def lost(self) -> bool:
        """Nothing of the device can be read any more (or ever could)."""
        return "device" in self.not_measured

    def mark_failed(self, reason: str) -> None:
        """Give the device up for the rest of the run; other devices go on."""
        self.not_measured |= dict.fromkeys(("device", "power_w", "energy_j"), reason)

    def read(self, now_s: float) -> dict[str, Any]:
        """Field of DeviceSample -> value, for what can be read quickly; `now_s` is the monotonic clock's reading."""
        return {}

    def counter_j(self) -> float | None:
        """The energy counter in joules, where the device refreshes it at intervals of its own; None without one."""
        return None

    def buffer(self, now_s: float) -> list[tuple[float, float]]:
        """New entries (unix seconds, watts) of a power buffer that the driver fills between reads; it is `now_s` by that clock."""
        return []

    def close(self) -> None:
        pass


class GpuReader(Reader):
    """One NVIDIA GPU."""

    def __init__(self, gpu: nvml.OpenGpu, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", gpu.name, role=role, index=index)
        self._gpu = gpu
        self.not_measured |= gpu.not_measured
        self.default_power_limit_w, self.settings = gpu.default_power_limit_w, gpu.settings
        self._failures: Counter[str] = Counter()
        # Peaks of microseconds reach twice the limit.
        self._most_w = 3 * gpu.default_power_limit_w if gpu.default_power_limit_w else _MOST_W
        if gpu.mig:
            self.not_measured |= dict.fromkeys(("power_w", "power_average_w", "energy_j", "fine_power"), _MIG)

    def read(self, now_s: float) -> dict[str, Any]:
        values = {}
        for field, value in self._gpu.read(self.not_measured).items():
            if isinstance(value, nvml.GpuError):
                self._note(field, value)
            elif "power" in field and not 0 <= value <= (
                self._most_w if field in ("power_w", "power_average_w") else _MOST_W
            ):
                continue  # some drivers answer with a type's largest number now and then
            else:
                self._failures.pop(field, None)
                self.not_measured.pop(field, None)  # the driver's one power stands in for its field
                values[field] = value
        return values

    def counter_j(self) -> float | None:
        return None if "energy_j" in self.not_measured else self._attempt("energy_j", self._gpu.energy_j)

    def buffer(self, now_s: float) -> list[tuple[float, float]]:
        if not self.not_measured.keys().isdisjoint(("power_w", "fine_power")):
            return []
        entries = self._attempt("fine_power", lambda: self._gpu.buffer(now_s)) or []
        return [entry for entry in entries if 0 <= entry[1] <= self._most_w]

    def close(self) -> None:
        self._gpu.close()

    def _attempt(self, field: str, call: Callable[[], T]) -> T | None:
        try:
            value = call()
        except nvml.GpuError as error:
            self._note(field, error)
            return None
        self._failures.pop(field, None)
        return value

    def _note(self, field: str, error: nvml.GpuError) -> None:
        """An unsupported field is not read again, nor one that fails ten times in a row; else one value is missing."""
        self._failures[field] += 1
        if error.lost:
            self.mark_failed(str(error))
        elif error.unsupported:
            self.not_measured[field] = str(error)
        elif self._failures[field] >= 10:
            self.not_measured[field] = f"given up after 10 failed reads in a row: {error}"


class AmdReader(Reader):
    """One AMD GPU by its handle. Instant power where the board gives it (MI300), else its average socket power."""

    def __init__(self, smi: Any, gpu: Any, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", f"AMD GPU {index}", role=role, index=index)

        def clock_mhz(kind: Any) -> Any:
            info = smi.amdsmi_get_clock_info(gpu, kind)
            return info.get("clk", info.get("cur_clk"))

        def energy_j() -> Any:
            count = smi.amdsmi_get_energy_count(gpu)
            ticks = _number(count.get("energy_accumulator", count.get("power")))
            return None if ticks is None else ticks * count["counter_resolution"] / 1e6

        def memory_mib() -> Any:
            used = _number(smi.amdsmi_get_gpu_memory_usage(gpu, smi.AmdSmiMemoryType.VRAM))
            return None if used is None else used / 2**20

        self._calls: dict[str, Callable[[], Any]] = {
            "power_w": lambda: smi.amdsmi_get_power_info(gpu).get("current_socket_power"),
            "power_average_w": lambda: smi.amdsmi_get_power_info(gpu).get("average_socket_power"),
            "energy_j": energy_j,
            "sm_clock_mhz": lambda: clock_mhz(smi.AmdSmiClkType.GFX),
            "memory_clock_mhz": lambda: clock_mhz(smi.AmdSmiClkType.MEM),
            "gpu_utilization_pct": lambda: smi.amdsmi_get_gpu_activity(gpu).get("gfx_activity"),
            "memory_utilization_pct": lambda: smi.amdsmi_get_gpu_activity(gpu).get("umc_activity"),
            "temperature_c": lambda: smi.amdsmi_get_temp_metric(
                gpu, smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
            ),
            "memory_used_mib": memory_mib,
        }
        self.not_measured["throttle"] = "amdsmi gives no reasons for its clocks"
        self.not_measured["fine_power"] = "amdsmi has no buffer of samples"

    def read(self, now_s: float) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field, call in self._calls.items():
            if field in self.not_measured:
                continue
            try:
                value = _number(call())
            except Exception as error:
                self.not_measured[field] = f"amdsmi: {error}"
                continue
            if value is None:
                self.not_measured[field] = "amdsmi: the board does not give it"
            else:
                values[field] = value
        return values


def _number(value: Any) -> float | None:
    """amdsmi writes "N/A", or a type's largest number, for what a board does not give."""
    return float(value) if isinstance(value, (int, float)) and value not in (0xFFFF, 0xFFFFFFFF, 2**64 - 1) else None


def _amd_gpus() -> tuple[Any, list[Any]]:
    """amdsmi and its GPUs' handles; none where it is not installed or finds no driver (it raises many kinds of error then)."""
    try:
        smi: Any = importlib.import_module("amdsmi")
        smi.amdsmi_init()
        return smi, list(smi.amdsmi_get_processor_handles())
    except Exception:
        return None, []


class RaplReader(Reader):
    """One powercap zone. `energy_j` counts from the first read, without wrap-around; power is its slope between reads."""

    def __init__(self, zone: Path, device_id: str, kind: str, name: str) -> None:
        super().__init__(device_id, kind, name)
        self._counter = zone / "energy_uj"
        self._range_uj = 0
        try:
            self._range_uj = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError) as error:
            self.mark_failed(f"{zone / 'max_energy_range_uj'} cannot be read: {error}")
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
        step_uj, passed_s = value_uj - before[0], now_s - before[1]
        if step_uj == 0:
            # A zone that counts moves within milliseconds: this is no power of 0 W. Its power is told by its next move.
            self._last = before
            if passed_s > _STILL_S:
                self.not_measured |= dict.fromkeys(("power_w", "energy_j"), f"{self._counter} stands still")
            return {"energy_j": self._total_uj / 1e6}
        for field in ("power_w", "energy_j"):
            self.not_measured.pop(field, None)
        step_uj += self._range_uj if step_uj < 0 else 0
        if step_uj > _MOST_W * 1e6 * (passed_s + _STILL_S) or passed_s * _MOST_CPU_W * 1e6 > self._range_uj:
            # It was set back (a guest that moved to another host) and did not wrap around, or it may have done so more than once
            # (nobody read it for a minute or more): the total starts again, visibly.
            self._total_uj = 0
            return {"energy_j": 0.0}
        self._total_uj += step_uj
        power = {"power_w": step_uj / 1e6 / passed_s} if passed_s > 0 else {}
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


def open_gpu(index: int, role: str | None) -> Reader:
    """One GPU of either maker; where it cannot be opened, the reason is in the reader's `not_measured`."""
    try:
        return GpuReader(nvml.bounded(nvml.OpenGpu)(index), index, role)
    except (nvml.GpuError, LookupError) as error:
        reason = str(error)
    smi, handles = _amd_gpus()
    if index < len(handles):
        return AmdReader(smi, handles[index], index, role)
    reader = Reader(f"gpu{index}", "gpu", f"GPU {index}", role=role, index=index)
    reader.mark_failed(f"amdsmi sees {len(handles)} GPUs, none of index {index}" if handles else reason)
    return reader


def gpu_indices() -> list[int]:
    """The GPUs of this host, of either maker."""
    return [gpu.index for gpu in nvml.gpus()] or list(range(len(_amd_gpus()[1])))


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


def open_host(gpus: Sequence[int] | None = None) -> list[Reader]:
    """What `pdbench monitor` watches: the named GPUs (None: all of them), RAPL, and the host's CPU use.

    Raises UserError for a GPU that this host lacks.
    """
    nvml.check_answers()
    present = gpu_indices()
    indices = present if gpus is None else gpus
    if missing := sorted(set(indices) - set(present)):
        raise UserError(f"no GPU {missing[0]} here: --gpus takes indices of this host's GPUs, {present}")
    return [*(open_gpu(index, None) for index in indices), *open_rapl(), HostReader()]
