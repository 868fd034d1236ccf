"""What every meter offers the sampler; a meter overrides what its device has, the rest stays not measured.

Try: python -c "from pdbench.power.devices import open_readers; print(open_readers({}, {'self': [1]})[0].read(0.0))"
"""

from typing import Any


class Reader:
    """One device. `not_measured` maps a field of DeviceSample, or "device" for all of it, to the reason."""

    def __init__(
        self, device_id: str, kind: str, name: str, *, role: str | None = None, index: int | None = None
    ) -> None:
        self.id, self.kind, self.name, self.role, self.index = device_id, kind, name, role, index
        self.not_measured: dict[str, str] = {}

    @property
    def lost(self) -> bool:
        """The whole device can no longer be read (or never could)."""
        return "device" in self.not_measured

    def lose(self, reason: str) -> None:
        """Give the device up for the rest of the run, for this reason; other devices go on."""
        for field in ("device", "power_w", "energy_j"):
            self.not_measured[field] = reason

    def read(self, now_s: float) -> dict[str, Any]:
        """Field of DeviceSample -> value, for what can be read at once; `now_s` is the monotonic clock's reading."""
        return {}

    def counter_j(self) -> float | None:
        """The energy counter in joules when the device refreshes it on a tick of its own; None without one."""
        return None

    def buffer(self) -> list[tuple[float, float]]:
        """New entries (unix seconds, watts) of a power buffer that the driver fills between reads."""
        return []

    def close(self) -> None:
        """Let the device go."""
