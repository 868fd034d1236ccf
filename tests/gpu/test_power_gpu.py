"""NVML and the sampler on real GPUs, read-only: no clock and no limit is ever set. Run: pytest -m gpu tests/gpu/test_power_gpu.py"""

import re
import subprocess
import time

import numpy as np
import pytest

from pdbench import nvml
from pdbench.analysis.power_curve import power_curve
from pdbench.power.device import open_gpu
from pdbench.power.idle import idle_before_start
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import Clock, DeviceRecord
from tests.support.runs import energy_over

pytestmark = pytest.mark.gpu

HALF_S = 0.25


def sample_under(
    load_s: float, on_s: float, off_s: float, interval_s: float = 0.1
) -> tuple[DeviceRecord, float, float]:
    """GPU 0 under matrix products, `on_s` of every `on_s + off_s`; returns its record and the load's start and end."""
    torch = pytest.importorskip("torch")
    matrix = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    clock = Clock.start()
    with (sampler := Sampler([open_gpu(0, "load")], interval_s)):
        time.sleep(1)
        start = clock.now()
        while clock.now() < start + load_s:
            end = time.monotonic() + on_s
            while time.monotonic() < end:
                matrix @ matrix
                torch.cuda.synchronize()
            time.sleep(off_s)
        end_s = clock.now()
        time.sleep(1)
    records = merge_records(sampler.take(), clock.of_monotonic)
    return records[0], start, end_s


def test_counter_and_integral_agree_over_thirty_seconds() -> None:
    device, start, end = sample_under(30.0, 0.2, 0.05)
    window = energy_over(device, start, end)
    print({"counter_j": window.counter_j, "residual_pct": window.residual_pct} | device.sampling)
    assert window.counter_j is not None and window.residual_pct is not None
    assert abs(window.residual_pct) < 2
    assert device.not_measured == {}


def test_square_wave_is_visible_in_the_fine_curve() -> None:
    device, start, end = sample_under(10.0, HALF_S, HALF_S)
    assert device.fine_power, "this driver has no power buffer"
    t, power = np.array([point for point in power_curve(device) if start + 1 < point[0] < end - 1]).T
    even = np.arange(t[0], t[-1], 0.01)
    spectrum = np.abs(np.fft.rfft(np.interp(even, t, power) - power.mean()))
    strongest = np.fft.rfftfreq(len(even), 0.01)[spectrum.argmax()]
    swing = np.percentile(power, 95) - np.percentile(power, 5)
    print({"strongest_hz": strongest, "swing_w": swing} | device.sampling)
    # The launch loop and the pause each run a little over, so the wave is a little slower than 2 Hz.
    assert 1.6 < strongest < 2.2
    assert swing > 100


@pytest.mark.parametrize("interval_s", [0.1, 0.01])
def test_every_field_is_plausible(interval_s: float) -> None:
    device, _, _ = sample_under(3.0, 3.0, 0.0, interval_s)
    print(device.sampling, device.statistics)
    last = device.samples[-1]
    assert 20 < device.statistics["power_w"]["max"] < 1500
    assert last.sm_clock_mhz and last.memory_clock_mhz and last.temperature_c and last.power_limit_w
    assert device.statistics["gpu_utilization_pct"]["max"] > 50
    assert device.sampling["energy_refresh_ms"] is not None


def nvidia_smi(*arguments: str) -> str:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True).stdout


def test_inventory_is_that_of_nvidia_smi() -> None:
    rows = nvidia_smi("--query-gpu=index,name,driver_version,memory.total,uuid", "--format=csv,noheader,nounits")
    found = [(gpu.index, gpu.name, gpu.driver, gpu.memory_total_mib, gpu.uuid) for gpu in nvml.gpus()]
    print(found)
    expected = [row.split(", ") for row in rows.splitlines()]
    assert found == [(int(index), name, driver, float(mib), uuid) for index, name, driver, mib, uuid in expected]


def test_links_are_those_of_nvidia_smi() -> None:
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).split() for row in nvidia_smi("topo", "-m").splitlines()]
    count = len(nvml.gpus())
    cells = [row[1 : count + 1] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and row[1] != "GPU1"]
    print(nvml.links())
    assert nvml.links() == {(a, b): cells[a][b] for a in range(count) for b in range(count) if a != b}


def test_idle_power_has_both_kinds() -> None:
    idle = idle_before_start([0], 2.0)["gpu0"].power_w
    print(idle)
    assert idle["bare"] and idle["context"]
    assert 20 < idle["bare"] < idle["context"] + 5 < 300
