"""A trial starts as cool as the first one did, or after the longest wait."""

from typing import Any

from pdbench.power.device import Reader
from pdbench.power.idle import Cooldown


class Thermometer(Reader):
    """A device that tells one temperature a read, the last one for ever."""

    readings: dict[int, list[float | None]]

    def __init__(self, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", "fake", index=index)

    def read(self, now_s: float) -> dict[str, Any]:
        left = self.readings[self.index or 0]
        value = left.pop(0) if len(left) > 1 else left[0]
        return {} if value is None else {"temperature_c": value}


def test_it_waits_until_every_gpu_is_as_cool_as_at_first() -> None:
    naps: list[float] = []
    Thermometer.readings = {0: [40.0, 60.0, 50.0, 42.0, 41.0], 1: [35.0, 36.0]}
    cooldown = Cooldown(60.0, Thermometer, naps.append)
    assert cooldown.wait([0, 1]) == {"gpu0": 40.0, "gpu1": 35.0}
    assert naps == []
    assert cooldown.wait([0, 1]) == {"gpu0": 42.0, "gpu1": 36.0}
    assert len(naps) == 2


def test_it_does_not_wait_for_ever() -> None:
    naps: list[float] = []
    Thermometer.readings = {0: [40.0, 60.0]}
    cooldown = Cooldown(5.0, Thermometer, naps.append)
    cooldown.wait([0])
    assert cooldown.wait([0]) == {"gpu0": 60.0}
    assert len(naps) == 5


def test_a_gpu_without_a_thermometer_is_left_out() -> None:
    Thermometer.readings = {0: [None]}
    assert Cooldown(5.0, Thermometer).wait([0]) == {}
