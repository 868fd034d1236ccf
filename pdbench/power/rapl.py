"""Energy of CPU packages and their DRAM through Linux powercap (Intel and AMD), where the machine has it.

Try: python -c "from pdbench.power.rapl import open_rapl; print([(zone.id, zone.not_measured) for zone in open_rapl()])"
"""

from pathlib import Path
from typing import Any

from pdbench.power.reader import Reader

POWERCAP = Path("/sys/class/powercap")


class RaplReader(Reader):
    """One powercap zone. `energy_j` counts from the first read, wrap-around taken out; power is its slope between reads."""

    def __init__(self, zone: Path, device_id: str, kind: str, name: str) -> None:
        super().__init__(device_id, kind, name)
        self._counter = zone / "energy_uj"
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj: int | None = None
        self._total_uj = 0
        self._last_s = 0.0

    def read(self, now_s: float) -> dict[str, Any]:
        """Joules so far and the mean watts since the last read (none at the first)."""
        try:
            value_uj = int(self._counter.read_text())
        except PermissionError:
            self.lose(f"no permission to read {self._counter}: root may, or whom `chmod a+r` on it lets")
            return {}
        except (OSError, ValueError) as error:
            self.lose(f"{self._counter} cannot be read: {error}")
            return {}
        values: dict[str, Any] = {}
        if self._last_uj is not None:
            step_uj = value_uj - self._last_uj
            step_uj += self._range_uj if step_uj < 0 else 0
            self._total_uj += step_uj
            if now_s > self._last_s:
                values["power_w"] = step_uj / 1e6 / (now_s - self._last_s)
        self._last_uj, self._last_s = value_uj, now_s
        return values | {"energy_j": self._total_uj / 1e6}


def open_rapl(powercap: Path = POWERCAP) -> list[RaplReader]:
    """A reader for every package and every DRAM zone; core and uncore lie inside the package and are left out."""
    readers = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            package = (
                name if name.startswith("package") else (powercap / zone.name.rpartition(":")[0] / "name").read_text()
            )
            if name.startswith("package"):
                readers.append(RaplReader(zone, f"cpu-{name}", "cpu", f"CPU {name}"))
            elif name == "dram":
                readers.append(RaplReader(zone, f"dram-{package.strip()}", "dram", f"DRAM of {package.strip()}"))
        except (OSError, ValueError):
            continue
    return readers
