"""NVIDIA GPUs through NVML: the only file that imports pynvml. Units are converted here (mW, mJ, bytes -> W, J, MiB).

A GPU is named by its NVML index: the driver's order, which CUDA shares under CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

import itertools
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from math import inf
from typing import Any, ParamSpec, TypeVar

import pynvml as nv

from pdbench.errors import UserError

_LOST = {
    nv.NVML_ERROR_GPU_IS_LOST,
    nv.NVML_ERROR_RESET_REQUIRED,
    nv.NVML_ERROR_UNINITIALIZED,
    nv.NVML_ERROR_DRIVER_NOT_LOADED,
}
_UNSUPPORTED = {
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
_POWER_FIELDS = {
    "power_w": (nv.NVML_FI_DEV_POWER_INSTANT, nv.NVML_POWER_SCOPE_GPU),
    "power_average_w": (nv.NVML_FI_DEV_POWER_AVERAGE, nv.NVML_POWER_SCOPE_GPU),
}
_MORE_SCOPES = {"module_power_w": nv.NVML_POWER_SCOPE_MODULE, "memory_power_w": nv.NVML_POWER_SCOPE_MEMORY}
_SUPERCHIP = re.compile(r"Grace|\bG[HB]\d{2,3}\b")
_SETTINGS: dict[str, Callable[[Any], bool | float]] = {
    "persistence": lambda handle: bool(nv.nvmlDeviceGetPersistenceMode(handle)),
    "ecc": lambda handle: bool(nv.nvmlDeviceGetEccMode(handle)[0]),
    "mig": lambda handle: bool(nv.nvmlDeviceGetMigMode(handle)[0]),
    "max_sm_clock_mhz": lambda handle: float(nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_SM)),
    "compute_capability": lambda handle: float("{}.{}".format(*nv.nvmlDeviceGetCudaComputeCapability(handle))),
}
GA100 = 8.0
"""The compute capability up to which nvmlDeviceGetPowerUsage gives an instant; newer ones the mean of a second (NVML's documentation)."""
ANSWER_S = 20.0
"""A driver takes seconds to wake GPUs that nobody uses; one that hangs answers never."""
MPS = "nvidia-cuda-mps"
"""Processes of CUDA's Multi-Process Service, which lets several processes compute on a GPU at the same time, are named so."""
P = ParamSpec("P")
T = TypeVar("T")
_VALUE_MEMBERS = {
    nv.NVML_VALUE_TYPE_DOUBLE: "dVal",
    nv.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    nv.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    nv.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    nv.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    nv.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
}
_PCIE_LINKS = {
    nv.NVML_TOPOLOGY_INTERNAL: "PIX",
    nv.NVML_TOPOLOGY_SINGLE: "PIX",
    nv.NVML_TOPOLOGY_MULTIPLE: "PXB",
    nv.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
    nv.NVML_TOPOLOGY_NODE: "NODE",
    nv.NVML_TOPOLOGY_SYSTEM: "SYS",
}


class GpuError(Exception):
    """NVML refused a call: the GPU is `lost`, the call is `unsupported` there (for good), or it `needs_root`. None: it did not answer."""

    def __init__(self, error: Any) -> None:
        code = None if error is None else error.value
        self.lost, self.unsupported = code is None or code in _LOST, code in _UNSUPPORTED
        self.needs_root = code == nv.NVML_ERROR_NO_PERMISSION
        texts = {
            None: f"the NVIDIA driver did not answer within {ANSWER_S:g} s: `dmesg` may say why (NVRM, Xid)",
            nv.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver here (libnvidia-ml.so.1 not found)",
            nv.NVML_ERROR_NO_PERMISSION: "no permission: root may read it",
        }
        super().__init__(texts.get(code) or str(error))


def bounded(call: Callable[P, T], otherwise: Callable[[], T] | None = None) -> Callable[P, T]:
    """The call, given up after ANSWER_S: then it gives `otherwise()`, or raises GpuError. Its thread cannot be ended, but is waited for no longer."""

    @wraps(call)
    def answered(*args: P.args, **kwargs: P.kwargs) -> T:
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(call(*args, **kwargs))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="pdbench-nvml", daemon=True).start()
        if wait([done], ANSWER_S).done:
            return done.result()
        if otherwise is None:
            raise GpuError(None)
        return otherwise()

    return answered


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except nv.NVMLError as error:
        raise GpuError(error) from None


@contextmanager
def _session() -> Iterator[None]:
    with _errors():
        nv.nvmlInit()
        try:
            yield
        finally:
            nv.nvmlShutdown()


def _handles() -> Iterator[tuple[int, Any]]:
    """Index and handle of each GPU that answers."""
    for index in range(nv.nvmlDeviceGetCount()):
        with suppress(nv.NVMLError):
            handle = nv.nvmlDeviceGetHandleByIndex(index)
            nv.nvmlDeviceGetUUID(handle)  # one that fell off the bus still has a handle
            yield index, handle


@dataclass(frozen=True)
class Gpu:
    """One GPU of the inventory; its memory is None where the board does not report it (it shares the host's)."""

    index: int
    name: str
    driver: str
    memory_total_mib: float | None
    memory_used_mib: float | None
    uuid: str = ""


def _gpus() -> tuple[Gpu, ...]:
    inventory = []
    with suppress(GpuError), _session():
        driver = nv.nvmlSystemGetDriverVersion()
        for index, handle in _handles():
            total_mib = used_mib = None
            with suppress(nv.NVMLError):
                memory = nv.nvmlDeviceGetMemoryInfo(handle)
                total_mib, used_mib = float(memory.total // 2**20), float(memory.used // 2**20)
            name, uuid = nv.nvmlDeviceGetName(handle), nv.nvmlDeviceGetUUID(handle)
            inventory.append(Gpu(index, name, driver, total_mib, used_mib, uuid))
    return tuple(inventory)


gpus = bounded(_gpus, otherwise=tuple)  # all of this host that answer; none without NVML


def check_answers() -> None:
    """Raises UserError where the driver hangs; one that is not there, or refuses, answers."""
    try:
        bounded(_gpus)()
    except GpuError as error:
        raise UserError(str(error)) from None


@partial(bounded, otherwise=dict)
def links() -> dict[tuple[int, int], str]:
    """Two GPUs, the lower index first -> their link as `nvidia-smi topo -m` has it: NV18 is 18 NVLinks; PIX, PXB, PHB, NODE, SYS are PCIe."""
    named: dict[tuple[int, int], str] = {}
    with suppress(GpuError), _session():
        handles = dict(_handles())
        buses = {index: nv.nvmlDeviceGetPciInfo(handle).busId for index, handle in handles.items()}
        ends: dict[int, list[Any]] = {index: [] for index in handles}
        for index, handle in handles.items():
            with suppress(nv.NVMLError):
                for link in range(nv.NVML_NVLINK_MAX_LINKS):
                    if nv.nvmlDeviceGetNvLinkState(handle, link):
                        ends[index].append(nv.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)
        for first, second in itertools.combinations(handles, 2):
            # Behind NVSwitch no link ends at a GPU: all of them lead to every GPU that is there.
            switched = sum(end not in buses.values() for end in ends[first]) if ends[second] else 0
            if count := ends[first].count(buses[second]) or switched:
                named[first, second] = f"NV{count}"
            else:
                with suppress(nv.NVMLError, KeyError):
                    level = nv.nvmlDeviceGetTopologyCommonAncestor(handles[first], handles[second])
                    named[first, second] = _PCIE_LINKS[level]
    return named


@partial(bounded, otherwise=set)
def computing() -> set[tuple[int, int]]:
    """(GPU, process id) of all that computes; none where NVML does not say (it may know a container's processes by other ids)."""
    found = set()
    with suppress(GpuError), _session():
        for index, handle in _handles():
            with suppress(nv.NVMLError):
                found |= {(index, process.pid) for process in nv.nvmlDeviceGetComputeRunningProcesses(handle)}
    return found


class OpenGpu:
    """One GPU, kept open to be read often; its methods raise GpuError. `settings` are DeviceRecord's.

    `not_measured` names a superchip's power scopes that the driver does not give; a board of a GPU alone has no module.
    """

    def __init__(self, index: int) -> None:
        self._buffer_us = 0
        self._powers = dict(_POWER_FIELDS)
        self.not_measured: dict[str, str] = {}
        self.default_power_limit_w: float | None = None
        with ExitStack() as opened:
            opened.enter_context(_session())
            if index >= (count := int(nv.nvmlDeviceGetCount())):
                raise LookupError(f"the driver sees {count} GPUs, none of index {index}")
            self._handle = nv.nvmlDeviceGetHandleByIndex(index)
            self.name = str(nv.nvmlDeviceGetName(self._handle))
            self.settings: dict[str, bool | float] = {}
            for name, call in _SETTINGS.items():
                with suppress(nv.NVMLError):
                    self.settings[name] = call(self._handle)
            with suppress(nv.NVMLError):
                self.default_power_limit_w = nv.nvmlDeviceGetPowerManagementDefaultLimit(self._handle) / 1000
            if not self.mig:
                self._find_scopes()
            self.close = opened.pop_all().close

    @property
    def mig(self) -> bool:
        """Is the board divided into slices?"""
        return bool(self.settings.get("mig"))

    def _find_scopes(self) -> None:
        """Which further powers this board gives: instant where it can be."""
        fields = list(itertools.product(_POWER_FIELDS, (nv.NVML_POWER_SCOPE_GPU, *_MORE_SCOPES.values())))
        answers: list[float | GpuError | None] = [None] * len(fields)
        with suppress(nv.NVMLError):
            answers = list(_powers_w([(_POWER_FIELDS[power][0], scope) for power, scope in fields], self._handle))
        watts = dict(zip(fields, answers, strict=True))
        for name, scope in _MORE_SCOPES.items():
            for power in _POWER_FIELDS:
                # A driver that knows no scopes answers each of them with the GPU's own power.
                its_own = watts[power, scope] != watts[power, nv.NVML_POWER_SCOPE_GPU]
                if isinstance(watts[power, scope], float) and its_own:
                    self._powers.setdefault(name, (_POWER_FIELDS[power][0], scope))
            if self._powers.get(name, (None,))[0] == nv.NVML_FI_DEV_POWER_AVERAGE:
                self.settings[f"{name}_averaged"] = True
            if name not in self._powers and _SUPERCHIP.search(self.name):
                self.not_measured[name] = f"the driver does not give the power of the {name.split('_')[0]}"

    def read(self, skip: Container[str]) -> dict[str, Any]:
        """Field of DeviceSample -> value, or GpuError, without the fields in `skip`; it ends at a lost GPU."""
        calls = dict(_READINGS)
        powers = {field: query for field, query in self._powers.items() if field not in skip}
        if powers:
            calls = {tuple(powers): partial(_powers_w, list(powers.values()))} | calls
        # A driver without these two has one power.
        if powers.keys().isdisjoint(_POWER_FIELDS) and not self.mig:
            calls = {("plain_power",): lambda handle: (nv.nvmlDeviceGetPowerUsage(handle) / 1000,)} | calls
        values: dict[str, Any] = {}
        for fields, call in calls.items():
            if fields[0] in skip:
                continue
            try:
                values |= zip(fields, call(self._handle), strict=True)
            except nv.NVMLError as error:
                values |= dict.fromkeys(fields, GpuError(error))
                if error.value in _LOST:
                    break
        if isinstance(values.get("plain_power"), float):
            is_instant = self.settings.get("compute_capability", inf) <= GA100
            field = "power_w" if is_instant else "power_average_w"
            self._powers.pop(field, None)
            values[field] = values.pop("plain_power")
        return values

    def energy_j(self) -> float:
        """Joules since the driver was loaded; a call takes 2.4 ms on Hopper, and the counter moves every 100 ms."""
        with _errors():
            return float(nv.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def buffer(self, now_s: float) -> list[tuple[float, float]]:
        """(unix seconds, watts) of the driver's own samples since the last call; it holds about 2.4 s of them. All of them where its clock
        was set back, so that it is only `now_s`."""
        if self._buffer_us > 1e6 * now_s:
            self._buffer_us = 0
        try:
            kind, entries = nv.nvmlDeviceGetSamples(self._handle, nv.NVML_TOTAL_POWER_SAMPLES, self._buffer_us)
        except nv.NVMLError as error:
            if error.value == nv.NVML_ERROR_NOT_FOUND:
                return []
            raise GpuError(error) from None
        samples = sorted((int(entry.timeStamp), _number(kind, entry.sampleValue) / 1000) for entry in entries)
        samples = [sample for sample in samples if sample[0] > self._buffer_us]
        self._buffer_us = samples[-1][0] if samples else self._buffer_us
        return [(at_us / 1e6, power_w) for at_us, power_w in samples]


def _powers_w(queries: Sequence[tuple[int, int]], handle: Any) -> list[float | GpuError]:
    """All powers, each a field and its scope, in one call."""
    return [
        _number(answer.valueType, answer.value) / 1000
        if answer.nvmlReturn == nv.NVML_SUCCESS
        else GpuError(nv.NVMLError(answer.nvmlReturn))
        for answer in nv.nvmlDeviceGetFieldValues(handle, queries)
    ]


def _utilization(handle: Any) -> tuple[float, float]:
    rates = nv.nvmlDeviceGetUtilizationRates(handle)
    return float(rates.gpu), float(rates.memory)


def _throttle(handle: Any) -> tuple[list[str]]:
    reasons = nv.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return ([name for bit, name in _THROTTLE.items() if reasons & bit],)


# Fields of DeviceSample that one call each (about 2 us) gives.
_READINGS: dict[tuple[str, ...], Callable[[Any], Iterable[Any]]] = {
    ("sm_clock_mhz",): lambda handle: (float(nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM)),),
    ("memory_clock_mhz",): lambda handle: (float(nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_MEM)),),
    ("gpu_utilization_pct", "memory_utilization_pct"): _utilization,
    ("temperature_c",): lambda handle: (float(nv.nvmlDeviceGetTemperature(handle, nv.NVML_TEMPERATURE_GPU)),),
    ("memory_used_mib",): lambda handle: (nv.nvmlDeviceGetMemoryInfo(handle).used / 2**20,),
    ("throttle",): _throttle,
    ("power_limit_w",): lambda handle: (nv.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,),
}


def _number(kind: int, value: Any) -> float:
    return float(getattr(value, _VALUE_MEMBERS.get(kind, "uiVal")))


@contextmanager
def _gpu(index: int) -> Iterator[Any]:
    """The handle of one GPU for one call. Raises GpuError, as do the functions below."""
    with _session():
        yield nv.nvmlDeviceGetHandleByIndex(index)


@bounded
def lock_sm_clock(index: int, mhz: int) -> None:
    """The driver may clamp `mhz`: read it back."""
    with _gpu(index) as gpu:
        nv.nvmlDeviceSetGpuLockedClocks(gpu, mhz, mhz)


@bounded
def unlock_sm_clock(index: int) -> None:
    with _gpu(index) as gpu:
        nv.nvmlDeviceResetGpuLockedClocks(gpu)


@bounded
def sm_clock_mhz(index: int) -> int:
    with _gpu(index) as gpu:
        return int(nv.nvmlDeviceGetClockInfo(gpu, nv.NVML_CLOCK_SM))


@bounded
def power_limit_w(index: int) -> float:
    with _gpu(index) as gpu:
        return float(nv.nvmlDeviceGetPowerManagementLimit(gpu)) / 1000


@bounded
def power_limit_range_w(index: int) -> tuple[float, float]:
    """The lowest and the highest limit that the board accepts."""
    with _gpu(index) as gpu:
        low, high = nv.nvmlDeviceGetPowerManagementLimitConstraints(gpu)
        return low / 1000, high / 1000


@bounded
def set_power_limit(index: int, watts: float) -> None:
    with _gpu(index) as gpu:
        nv.nvmlDeviceSetPowerManagementLimit(gpu, round(1000 * watts))
