"""What the sampler reads: the base class of all devices, and GPUs of both makers (amdsmi comes with ROCm, not with pdbench)."""

import importlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pdbench import nvml

T = TypeVar("T")
_MIG = "MIG is on: the board's meter is shared by its slices, and no slice has one"


class Reader:
    """One device. `not_measured` maps a field of DeviceSample, or "device" for all of it, to the reason."""

    def __init__(
        self, device_id: str, kind: str, name: str, *, role: str | None = None, index: int | None = None
    ) -> None:
        self.id, self.kind, self.name, self.role, self.index = device_id, kind, name, role, index
        self.not_measured: dict[str, str] = {}

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

    def buffer(self) -> list[tuple[float, float]]:
        """New entries (unix seconds, watts) of a power buffer that the driver fills between reads."""
        return []

    def close(self) -> None:
        pass


class GpuReader(Reader):
    """One NVIDIA GPU."""

    def __init__(self, gpu: nvml.OpenGpu, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", gpu.name, role=role, index=index)
        self._gpu = gpu
        self._buffer_us = 0
        self._failures: Counter[str] = Counter()
        if gpu.mig:
            self.not_measured |= dict.fromkeys(("power_w", "power_average_w", "energy_j", "fine_power"), _MIG)

    def read(self, now_s: float) -> dict[str, Any]:
        values = {}
        for field, value in self._gpu.read(self.not_measured).items():
            if isinstance(value, nvml.GpuError):
                self._note(field, value)
            else:
                self._failures.pop(field, None)
                values[field] = value
        return values

    def counter_j(self) -> float | None:
        return None if "energy_j" in self.not_measured else self._attempt("energy_j", self._gpu.energy_j)

    def buffer(self) -> list[tuple[float, float]]:
        if not self.not_measured.keys().isdisjoint(("power_w", "fine_power")):
            return []
        entries = self._attempt("fine_power", partial(self._gpu.buffer, self._buffer_us)) or []
        self._buffer_us = entries[-1][0] if entries else self._buffer_us
        return [(at_us / 1e6, power_w) for at_us, power_w in entries]

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


def open_gpu(index: int, role: str | None) -> Reader:
    """One GPU of either maker; where it cannot be opened, the reason is in the reader's `not_measured`."""
    try:
        return GpuReader(nvml.OpenGpu(index), index, role)
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
