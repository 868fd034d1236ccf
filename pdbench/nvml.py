"""NVIDIA GPUs through NVML: the only file that imports pynvml. Units are converted here (mW, mJ, bytes -> W, J, MiB).

Power is the instant field (186) with the 1 s average (185) beside it; the fine curve is the driver's sample buffer.
Try: python -c "from pdbench.nvml import open_gpu; gpu = open_gpu(0, None); print(gpu.name, gpu.read(0.0), gpu.not_measured)"
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import pynvml as nv

from pdbench.power.reader import Reader

_LOST = {
    nv.NVML_ERROR_GPU_IS_LOST,
    nv.NVML_ERROR_RESET_REQUIRED,
    nv.NVML_ERROR_UNINITIALIZED,
    nv.NVML_ERROR_DRIVER_NOT_LOADED,
}
_NEVER = {
    nv.NVML_ERROR_NOT_SUPPORTED,
    nv.NVML_ERROR_NO_PERMISSION,
    nv.NVML_ERROR_FUNCTION_NOT_FOUND,
    nv.NVML_ERROR_INVALID_ARGUMENT,
}
_THROTTLE = {
    nv.nvmlClocksEventReasonGpuIdle: "gpu_idle",
    nv.nvmlClocksEventReasonApplicationsClocksSetting: "clocks_setting",
    nv.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    nv.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    nv.nvmlClocksEventReasonSyncBoost: "sync_boost",
    nv.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    nv.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    nv.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake",
    nv.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}
_POWER_FIELDS = {"power_w": nv.NVML_FI_DEV_POWER_INSTANT, "power_average_w": nv.NVML_FI_DEV_POWER_AVERAGE}
_MIG = "MIG is on: the board's meter is shared by its slices, and no slice has one of its own"


def _utilization(handle: Any) -> tuple[float, float]:
    rates = nv.nvmlDeviceGetUtilizationRates(handle)
    return float(rates.gpu), float(rates.memory)


def _throttle(handle: Any) -> tuple[list[str]]:
    reasons = nv.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return ([name for bit, name in _THROTTLE.items() if reasons & bit],)


_CALLS: list[tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]] = [
    (("sm_clock_mhz",), lambda handle: (float(nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM)),)),
    (("memory_clock_mhz",), lambda handle: (float(nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_MEM)),)),
    (("gpu_utilization_pct", "memory_utilization_pct"), _utilization),
    (("temperature_c",), lambda handle: (float(nv.nvmlDeviceGetTemperature(handle, nv.NVML_TEMPERATURE_GPU)),)),
    (("memory_used_mib",), lambda handle: (nv.nvmlDeviceGetMemoryInfo(handle).used / 2**20,)),
    (("throttle",), _throttle),
    (("power_limit_w",), lambda handle: (nv.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,)),
]


class GpuReader(Reader):
    """One GPU, by its NVML index (the driver's order, which CUDA shares under CUDA_DEVICE_ORDER=PCI_BUS_ID)."""

    def __init__(self, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", f"GPU {index}", role=role, index=index)
        self._open = False
        self._seen_us = 0
        self._failures: dict[str, int] = {}
        try:
            nv.nvmlInit()
            self._open = True
            if index >= (count := int(nv.nvmlDeviceGetCount())):
                self.lose(f"the driver sees {count} GPUs, none of index {index}")
                return
            self._handle = nv.nvmlDeviceGetHandleByIndex(index)
            self.name = nv.nvmlDeviceGetName(self._handle)
        except nv.NVMLError as error:
            self.lose(_reason(error))
            return
        if _mig(self._handle):
            self.not_measured |= dict.fromkeys(("power_w", "power_average_w", "energy_j"), _MIG)

    def read(self, now_s: float) -> dict[str, Any]:
        """The fast fields: one batched call for both powers, one call (about 2 us) for each of the others."""
        values = self._powers()
        for fields, call in _CALLS:
            if not self.lost and fields[0] not in self.not_measured:
                values |= zip(fields, self._attempt(fields, call) or (), strict=False)
        return values

    def counter_j(self) -> float | None:
        """Joules since the driver was loaded; a call takes 2.4 ms on Hopper and moves every 100 ms."""
        if self.lost or "energy_j" in self.not_measured:
            return None
        found = self._attempt(("energy_j",), lambda handle: (nv.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,))
        return float(found[0]) if found else None

    def buffer(self) -> list[tuple[float, float]]:
        """The entries since the last call; the driver holds about 2.4 s of them."""
        if self.lost or "power_w" in self.not_measured or "fine_power" in self.not_measured:
            return []
        try:
            kind, found = nv.nvmlDeviceGetSamples(self._handle, nv.NVML_TOTAL_POWER_SAMPLES, self._seen_us)
        except nv.NVMLError as error:
            if error.value != nv.NVML_ERROR_NOT_FOUND:
                self._note(("fine_power",), error)
            return []
        fresh = sorted((entry.timeStamp, _number(kind, entry.sampleValue)) for entry in found)
        fresh = [(at, value) for at, value in fresh if at > self._seen_us]
        self._seen_us = fresh[-1][0] if fresh else self._seen_us
        return [(at / 1e6, value / 1000) for at, value in fresh]

    def close(self) -> None:
        """Give NVML back."""
        if self._open:
            self._open = False
            nv.nvmlShutdown()

    def _powers(self) -> dict[str, Any]:
        wanted = [field for field in _POWER_FIELDS if field not in self.not_measured]
        if self.lost or not wanted:
            return self._plain_power()
        answers = self._attempt(
            tuple(wanted),
            lambda handle: tuple(nv.nvmlDeviceGetFieldValues(handle, [_POWER_FIELDS[field] for field in wanted])),
        )
        values = {}
        for field, answer in zip(wanted, answers or (), strict=False):
            if answer.nvmlReturn == nv.NVML_SUCCESS:
                values[field] = _number(answer.valueType, answer.value) / 1000
            else:
                self._note((field,), nv.NVMLError(answer.nvmlReturn))
        return values

    def _plain_power(self) -> dict[str, Any]:
        """Drivers without the two fields have one power reading, an average; under MIG there is none to attribute."""
        if self.lost or self.not_measured.get("power_w") == _MIG or "plain_power" in self.not_measured:
            return {}
        found = self._attempt(("plain_power",), lambda handle: (nv.nvmlDeviceGetPowerUsage(handle) / 1000,))
        return {"power_average_w": found[0]} if found else {}

    def _attempt(self, fields: tuple[str, ...], call: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...] | None:
        try:
            found = call(self._handle)
        except nv.NVMLError as error:
            self._note(fields, error)
            return None
        for field in fields:
            self._failures.pop(field, None)
        return found

    def _note(self, fields: tuple[str, ...], error: Any) -> None:
        """A lost GPU is lost, an unsupported field is never asked again, any other failure is one missing value."""
        if error.value in _LOST:
            self.lose(_reason(error))
        for field in fields:
            if error.value in _NEVER:
                self.not_measured[field] = _reason(error)
            elif error.value not in _LOST:
                self._failures[field] = self._failures.get(field, 0) + 1
                if self._failures[field] >= 10:
                    self.not_measured[field] = f"given up after 10 failed reads in a row: {_reason(error)}"


def open_gpu(index: int, role: str | None) -> GpuReader:
    """The GPU of this NVML index; one that cannot be opened is a reader whose `not_measured` says why."""
    return GpuReader(index, role)


def gpu_count() -> int:
    """How many GPUs NVML sees; 0 without NVML."""
    try:
        nv.nvmlInit()
    except nv.NVMLError:
        return 0
    try:
        return int(nv.nvmlDeviceGetCount())
    finally:
        nv.nvmlShutdown()


def gpus_of(processes: Iterable[int]) -> list[int]:
    """The GPUs on which one of these processes, or of those that they started, computes; none where NVML does not tell (in a
    container it may know other ids)."""
    trees = set()
    for pid in processes:
        with contextlib.suppress(psutil.Error):
            trees |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    try:
        nv.nvmlInit()
    except nv.NVMLError:
        return []
    found = []
    try:
        for index in range(int(nv.nvmlDeviceGetCount())):
            with contextlib.suppress(nv.NVMLError):
                handle = nv.nvmlDeviceGetHandleByIndex(index)
                if any(one.pid in trees for one in nv.nvmlDeviceGetComputeRunningProcesses(handle)):
                    found.append(index)
    finally:
        nv.nvmlShutdown()
    return found


def _mig(handle: Any) -> bool:
    try:
        return bool(nv.nvmlDeviceGetMigMode(handle)[0])
    except nv.NVMLError:
        return False


def _number(kind: int, value: Any) -> float:
    """The member of NVML's value union that `kind` names."""
    names = {
        nv.NVML_VALUE_TYPE_DOUBLE: "dVal",
        nv.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        nv.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        nv.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        nv.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        nv.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    }
    return float(getattr(value, names.get(kind, "uiVal")))


def _reason(error: Any) -> str:
    if error.value == nv.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver here (libnvidia-ml.so.1 not found)"
    if error.value == nv.NVML_ERROR_NO_PERMISSION:
        return "no permission: root may read it"
    return str(error)


def lock_sm_clock(index: int, mhz: int) -> None:
    """Hold the SM clock at `mhz` (the driver may clamp it: read it back). Raises GpuRefusedError."""
    _order(index, lambda handle: nv.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz))


def unlock_sm_clock(index: int) -> None:
    """Let the SM clock go. Raises GpuRefusedError."""
    _order(index, nv.nvmlDeviceResetGpuLockedClocks)


def sm_clock_mhz(index: int) -> int:
    """The SM clock now. Raises GpuRefusedError."""
    return int(_order(index, lambda handle: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM)))


def power_limit_w(index: int) -> float:
    """The power limit that is set. Raises GpuRefusedError."""
    return float(_order(index, nv.nvmlDeviceGetPowerManagementLimit)) / 1000


def power_limit_range_w(index: int) -> tuple[float, float]:
    """The lowest and highest power limit that the board takes. Raises GpuRefusedError."""
    low, high = _order(index, nv.nvmlDeviceGetPowerManagementLimitConstraints)
    return low / 1000, high / 1000


def set_power_limit(index: int, watts: float) -> None:
    """Set the power limit. Raises GpuRefusedError."""
    _order(index, lambda handle: nv.nvmlDeviceSetPowerManagementLimit(handle, round(1000 * watts)))


class GpuRefusedError(Exception):
    """NVML did not do what was asked; `needs_root` when it was for want of permission."""

    def __init__(self, index: int, error: Any) -> None:
        super().__init__(f"GPU {index}: {_reason(error)}")
        self.needs_root = error.value == nv.NVML_ERROR_NO_PERMISSION


def _order(index: int, call: Callable[[Any], Any]) -> Any:
    try:
        nv.nvmlInit()
        try:
            return call(nv.nvmlDeviceGetHandleByIndex(index))
        finally:
            nv.nvmlShutdown()
    except nv.NVMLError as error:
        raise GpuRefusedError(index, error) from None
