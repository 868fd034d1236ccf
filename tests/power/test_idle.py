"""Idle power of free GPUs, and trials that start as cool as the first one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pdbench.power.device import Reader
from pdbench.power.idle import Cooldown
from tests.support.fake_nvml import child


class Thermometer(Reader):
    """One temperature per read, the last one for ever."""

    readings: dict[int, list[float | None]]

    def __init__(self, index: int, role: str | None) -> None:
        super().__init__(f"gpu{index}", "gpu", "fake", index=index)

    def read(self, now_s: float) -> dict[str, Any]:
        left = self.readings[self.index or 0]
        value = left.pop(0) if len(left) > 1 else left[0]
        return {} if value is None else {"temperature_c": value}


def test_cooldown_waits_until_every_gpu_is_as_cool_as_at_first() -> None:
    naps: list[float] = []
    Thermometer.readings = {0: [40.0, 60.0, 50.0, 42.0, 41.0], 1: [35.0, 36.0]}
    cooldown = Cooldown(60.0, Thermometer, naps.append)
    assert cooldown.wait([0, 1]) == {"gpu0": 40.0, "gpu1": 35.0}
    assert naps == []
    assert cooldown.wait([0, 1]) == {"gpu0": 42.0, "gpu1": 36.0}
    assert len(naps) == 2


def test_cooldown_ends_at_its_limit() -> None:
    naps: list[float] = []
    Thermometer.readings = {0: [40.0, 60.0]}
    cooldown = Cooldown(5.0, Thermometer, naps.append)
    cooldown.wait([0])
    assert cooldown.wait([0]) == {"gpu0": 60.0}
    assert len(naps) == 5


def test_cooldown_leaves_out_a_gpu_without_thermometer() -> None:
    Thermometer.readings = {0: [None]}
    assert Cooldown(5.0, Thermometer).wait([0]) == {}


def test_idle_power_without_cuda_is_bare_alone(nvml_library: Path) -> None:
    code = "from pdbench.power.idle import idle_before_start; print(idle_before_start([0], 0.3))"
    expected = (
        "{'gpu0': Idle(power_w={'bare': 100.0, 'context': None}, utilization_pct={'bare': None, 'context': None})}"
    )
    assert child(nvml_library, code).strip() == expected  # too short to say how busy the GPU was


def test_idle_power_says_how_busy_the_gpu_was(nvml_library: Path) -> None:
    code = "from pdbench.power.idle import idle_before_start; print(idle_before_start([0], 1.5)['gpu0'].utilization_pct['bare'])"
    assert child(nvml_library, code) == "14.0\n"


@pytest.mark.parametrize(("seconds", "power_w"), [(1.5, "100.0"), (0.5, "None")])
def test_idle_power_of_a_gpu_that_gives_an_average_alone(nvml_library: Path, seconds: float, power_w: str) -> None:
    """It had none, and so no joules above idle. Its first second is of the time before."""
    code = f"from pdbench.power.idle import idle_before_start; print(idle_before_start([0], {seconds})['gpu0'].power_w['bare'])"
    fails = "0:DeviceGetFieldValues:3"
    assert child(nvml_library, code, fail=fails, capability="86").strip() == power_w


def test_idle_power_with_cuda_has_both_kinds(nvml_library: Path, tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text(
        "int cuInit(unsigned f) { return f; } int cuDevicePrimaryCtxRetain(void **c, int d) { *c = c; return d; }"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", nvml_library / "libcuda.so.1", source], check=True)
    try:
        code = "from pdbench.power.idle import idle_before_start; print(idle_before_start([0], 0.3))"
        assert "power_w={'bare': 100.0, 'context': 100.0}" in child(nvml_library, code)
    finally:
        (nvml_library / "libcuda.so.1").unlink()
