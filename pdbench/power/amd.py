"""AMD GPUs through amdsmi, where it is installed (it comes with ROCm, not from us). Units are converted here.

Try: python -c "from pdbench.power import amd; print(amd.available(), amd.count())"
"""

import importlib
from collections.abc import Callable
from typing import Any

from pdbench.power.reader import Reader


def _library() -> Any | None:
    """amdsmi, initialised; None where it is not installed or finds no driver (it raises many kinds of error then)."""
    try:
        library: Any = importlib.import_module("amdsmi")
        library.amdsmi_init()
    except Exception:
        return None
    return library


def available() -> bool:
    """Is there an AMD GPU that amdsmi can read?"""
    return count() > 0


def count() -> int:
    """How many GPUs amdsmi sees; 0 without it."""
    library = _library()
    return len(library.amdsmi_get_processor_handles()) if library else 0


class AmdReader(Reader):
    """One AMD GPU by its amdsmi index. Instant power where the board gives it (MI300), else its average socket power."""

    def __init__(self, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", f"AMD GPU {index}", role=role, index=index)
        self._smi: Any = _library()
        handles = self._smi.amdsmi_get_processor_handles() if self._smi else []
        if index >= len(handles):
            self.lose(f"amdsmi sees {len(handles)} GPUs, none of index {index}")
            return
        self._handle = handles[index]
        self._calls: list[tuple[str, Callable[[], float | None]]] = [
            ("power_w", lambda: self._power("current_socket_power")),
            ("power_average_w", lambda: self._power("average_socket_power")),
            ("energy_j", self._energy_j),
            ("sm_clock_mhz", lambda: self._clock("GFX")),
            ("memory_clock_mhz", lambda: self._clock("MEM")),
            ("gpu_utilization_pct", lambda: self._activity("gfx_activity")),
            ("memory_utilization_pct", lambda: self._activity("umc_activity")),
            ("temperature_c", self._temperature_c),
            ("memory_used_mib", self._memory_mib),
        ]
        self.not_measured["throttle"] = "amdsmi gives no reasons for its clocks"
        self.not_measured["fine_power"] = "amdsmi has no buffer of samples"

    def read(self, now_s: float) -> dict[str, Any]:
        """Every field that the board gives; the first failure of a field is its reason from then on."""
        values: dict[str, Any] = {}
        for field, call in () if self.lost else self._calls:
            if field in self.not_measured:
                continue
            try:
                value = call()
            except Exception as error:
                self.not_measured[field] = f"amdsmi: {error}"
                continue
            if value is None:
                self.not_measured[field] = "amdsmi: the board does not give it"
            else:
                values[field] = value
        return values

    def _power(self, name: str) -> float | None:
        return _known(self._smi.amdsmi_get_power_info(self._handle).get(name))

    def _energy_j(self) -> float | None:
        found = self._smi.amdsmi_get_energy_count(self._handle)
        ticks = _known(found.get("energy_accumulator", found.get("power")))
        return None if ticks is None else ticks * float(found["counter_resolution"]) / 1e6

    def _clock(self, kind: str) -> float | None:
        info = self._smi.amdsmi_get_clock_info(self._handle, getattr(self._smi.AmdSmiClkType, kind))
        return _known(info.get("clk", info.get("cur_clk")))

    def _activity(self, name: str) -> float | None:
        return _known(self._smi.amdsmi_get_gpu_activity(self._handle).get(name))

    def _temperature_c(self) -> float | None:
        smi = self._smi
        kind, metric = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
        return _known(smi.amdsmi_get_temp_metric(self._handle, kind, metric))

    def _memory_mib(self) -> float | None:
        smi = self._smi
        used = _known(smi.amdsmi_get_gpu_memory_usage(self._handle, smi.AmdSmiMemoryType.VRAM))
        return None if used is None else used / 2**20


def _known(value: Any) -> float | None:
    """amdsmi writes "N/A", or a type's largest number, for what a board does not give."""
    return float(value) if isinstance(value, (int, float)) and value not in (0xFFFF, 0xFFFFFFFF, 2**64 - 1) else None
