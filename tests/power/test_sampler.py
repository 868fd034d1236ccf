"""The sampler over a scripted NVML: the real nvidia-ml-py, the real loop, the library's own clock, a known integral."""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdbench.analysis.energy import energy_over, residual_flags
from pdbench.power.host import open_readers
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import Clock, DeviceRecord
from tests.support.fake_nvml import WAVES, build, child, exact_j, sampled, wave_text

FINE_S = 0.02


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def jumps(name: str) -> list[tuple[float, float]]:
    """(t in the period, height in watts) of the wave's vertical edges, its wrap-around among them."""
    period, points = WAVES[name]
    pairs = [*itertools.pairwise(points), ((period, points[-1][1]), (period, points[0][1]))]
    return [(a[0] % period, abs(a[1] - b[1])) for a, b in pairs if a[0] == b[0] and a[1] != b[1]]


def near_jumps_w(name: str, t: float) -> float:
    """The watts that jump within one fine interval of `t`: the buffer cannot tell when inside it they did."""
    period = WAVES[name][0]
    distances = [(min(abs(t % period - at), period - abs(t % period - at)), height) for at, height in jumps(name)]
    return sum(height for distance, height in distances if distance < 1.5 * FINE_S)


def windows(seed: int) -> Iterator[tuple[float, float]]:
    generator = random.Random(seed)
    for _ in range(300):
        length = generator.uniform(1, 5)
        start = generator.uniform(0.6, 18 - length)
        yield start, start + length


@pytest.mark.parametrize("interval_s", [0.1, 0.01])
@pytest.mark.parametrize("name", WAVES)
def test_energy_of_any_window_is_the_waves_own(library: Path, name: str, interval_s: float) -> None:
    [device] = sampled(library, 18.5, {"decode": [0]}, interval_s, power_0=wave_text(name))
    quiet = 0
    for start, end in windows(seed=1):
        window, exact = energy_over(device, start, end), exact_j(name, start, end)
        edge_w = near_jumps_w(name, start) + near_jumps_w(name, end)
        # An edge that falls into the very 20 ms of a jump is uncertain by a quarter of that step; all others are not.
        allowed_j = 0.005 * exact + edge_w * FINE_S / 4
        quiet += edge_w == 0
        assert window.counter_j == pytest.approx(exact, abs=allowed_j)
        assert window.integral_j == pytest.approx(exact, abs=allowed_j)
        assert window.mean_power_w == pytest.approx(window.counter_j / (end - start))
        assert residual_flags(device, window) == []
    assert quiet > 100


def test_tick_of_the_counter_is_found_and_followed(library: Path) -> None:
    [device] = sampled(library, 30.0, {"decode": [0]}, power_0=wave_text("square"))
    assert device.sampling["energy_refresh_ms"] == pytest.approx(100, abs=0.2)
    for at, _ in device.energy_ticks:
        assert abs((at - 0.037 + 0.05) % 0.1 - 0.05) < 0.003, "as good as one read and one pause"
    assert len(device.energy_ticks) < 14, "a counter that costs 2.4 ms a read is read every few seconds"


def test_achieved_interval_and_fine_curve_are_reported(library: Path) -> None:
    [device] = sampled(library, 10.0, {"decode": [0]}, power_0=wave_text("square"))
    assert device.sampling["p50_ms"] == pytest.approx(100, abs=0.1)
    assert device.sampling["fine_interval_ms"] == pytest.approx(20, abs=0.1)
    assert device.sampling["missed_ticks"] == 0
    assert len(device.fine_power) > 490
    assert device.statistics["power_w"]["max"] == pytest.approx(650)
    assert device.statistics["power_w"]["min"] == pytest.approx(120)
    [fast] = sampled(library, 10.0, {"decode": [0]}, 0.01, power_0=wave_text("square"))
    # Polled ten times as often, the driver repeats its values; they are counted and stay in.
    assert fast.sampling["stale_repeats"] > 850
    assert len(fast.samples) > 990


def test_every_field_of_a_sample_is_in_its_own_unit(library: Path) -> None:
    [device] = sampled(library, 2.0, {"prefill": [0]}, power_0="1 0:400 1:400")
    sample = device.samples[-1]
    assert (sample.power_w, sample.power_average_w, sample.power_limit_w) == (400, 400, 700)
    assert (sample.sm_clock_mhz, sample.memory_clock_mhz, sample.temperature_c) == (1980, 3201, 40)
    assert (sample.gpu_utilization_pct, sample.memory_utilization_pct) == (57, 28)
    assert (sample.memory_used_mib, sample.throttle) == (64 * 1024, [])
    assert (device.id, device.kind, device.name, device.role) == ("gpu0", "gpu", "Scripted GPU", "prefill")
    assert device.not_measured == {}


def test_lost_gpu_keeps_what_it_gave_and_the_other_goes_on(library: Path) -> None:
    lost, other = sampled(library, 10.0, {"prefill": [0], "decode": [1]}, gpus="2", fail="0:*:15:4.0")
    assert "lost" in lost.not_measured["device"]
    assert 3.8 < lost.samples[-1].t_s < 4.1
    assert energy_over(lost, 1, 3).counter_j == pytest.approx(200, rel=0.005)
    assert energy_over(lost, 3, 8).energy_j is None
    assert other.not_measured == {}
    assert energy_over(other, 3, 8).counter_j == pytest.approx(500, rel=0.005)


def test_unsupported_field_is_not_measured_and_the_rest_is(library: Path) -> None:
    failing = "0:DeviceGetTemperature:3 0:DeviceGetTotalEnergyConsumption:3 0:DeviceGetUtilizationRates:4"
    [device] = sampled(library, 5.0, {"decode": [0]}, fail=failing)
    assert device.not_measured["temperature_c"] == "Not Supported"
    assert "permission" in device.not_measured["gpu_utilization_pct"]
    assert all(sample.temperature_c is None and sample.gpu_utilization_pct is None for sample in device.samples)
    window = energy_over(device, 1, 4)
    assert (window.counter_j, window.residual_pct) == (None, None)
    assert window.energy_j == pytest.approx(300, rel=0.005)


def test_without_buffer_the_samples_are_the_curve(library: Path) -> None:
    [device] = sampled(library, 8.0, {"decode": [0]}, fail="0:DeviceGetSamples:3", power_0=wave_text("constant"))
    assert device.fine_power == [] and device.not_measured["fine_power"] == "Not Supported"
    assert energy_over(device, 1.03, 6.51).integral_j == pytest.approx(exact_j("constant", 1.03, 6.51), rel=0.005)


def test_without_the_instant_field_the_average_stands_in(library: Path) -> None:
    [device] = sampled(library, 6.0, {"decode": [0]}, fail="0:Field186:3 0:DeviceGetSamples:3")
    assert device.not_measured["power_w"] == "Not Supported"
    assert energy_over(device, 1, 5).integral_j == pytest.approx(400, rel=0.005)
    [old] = sampled(library, 6.0, {"decode": [0]}, fail="0:DeviceGetFieldValues:3")
    assert old.samples[-1].power_average_w == 100 and old.samples[-1].power_w is None


def test_counter_reset_is_counted_and_bridged_by_the_curve(library: Path) -> None:
    [device] = sampled(library, 20.0, {"decode": [0]}, reset_s="9.0", power_0=wave_text("square"))
    window = energy_over(device, 2, 18)
    assert window.counter_resets == 1
    assert window.counter_j == pytest.approx(exact_j("square", 2, 18), rel=0.005)
    assert [flag.name for flag in residual_flags(device, window)] == ["energy-counter-reset"]


def test_mig_has_no_power_of_its_own(library: Path) -> None:
    [device] = sampled(library, 2.0, {"decode": [0]}, mig="1")
    assert "MIG" in device.not_measured["power_w"] and "MIG" in device.not_measured["energy_j"]
    assert device.samples and energy_over(device, 0.5, 1.5).energy_j is None


def test_gpu_that_is_not_there_says_so(library: Path) -> None:
    _, absent = sampled(library, 1.0, {"prefill": [0], "decode": [7]})
    assert absent.samples == [] and "7" in absent.not_measured["device"]


def test_records_of_two_samplers_are_one_device(library: Path) -> None:
    [first] = sampled(library, 4.0, {"decode": [0]})
    [second] = sampled(library, 4.0, {"decode": [0]}, power_0="1 0:300 1:300")
    for sample in second.samples:
        sample.t_s += 10
    moved = [(t + 10, j + 100000) for t, j in second.energy_ticks]
    second.fine_power = [(t + 10, power) for t, power in second.fine_power]
    second.energy_ticks = moved
    [both] = merge_records([first, second])
    assert energy_over(both, 1, 3).energy_j == pytest.approx(200, rel=0.005)
    assert energy_over(both, 11, 13).energy_j == pytest.approx(600, rel=0.005)
    assert both.statistics["power_w"] == {"avg": pytest.approx(200, rel=0.02), "min": 100, "max": 300}
    assert energy_over(both, 3, 12).integral_j is None, "nobody measured the time between"


def test_idle_is_measured_bare_and_without_cuda_no_more(library: Path) -> None:
    code = "from pdbench.power.idle import idle_before_start; print(idle_before_start([0], 0.3))"
    assert child(library, code) == "{'gpu0': {'bare': 100.0, 'context': None}}\n"


def test_idle_with_a_cuda_context(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text(
        "int cuInit(unsigned f) { return f; } int cuDevicePrimaryCtxRetain(void **c, int d) { *c = c; return d; }"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library / "libcuda.so.1", source], check=True)
    try:
        code = "from pdbench.power.idle import idle_before_start; print(idle_before_start([0], 0.3))"
        assert child(library, code) == "{'gpu0': {'bare': 100.0, 'context': 100.0}}\n"
    finally:
        (library / "libcuda.so.1").unlink()


def test_a_tree_of_processes_without_gpu() -> None:
    spin = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    tree = subprocess.Popen([sys.executable, "-c", spin], start_new_session=True)
    try:
        sampler = Sampler(open_readers({}, {"decode": [tree.pid], "gone": [2**22 + 1]}), 0.05, Clock.start())
        with sampler:
            while not any((sample := found) and sample.cpu_utilization_pct for _, found in sampler.latest()):
                sampler.idle("bare", 0.2)
        records = {record.role: record for record in sampler.records()}
    finally:
        os.killpg(tree.pid, 9)
        tree.wait()
    decode: DeviceRecord = records["decode"]
    # One process spins: late samples must not read as more than its one core (10 % for the clock of the reading).
    assert decode.kind == "process" and 0 < decode.statistics["cpu_utilization_pct"]["avg"] <= 110
    assert decode.statistics["memory_used_mib"]["min"] > 0
    assert "no meter" in decode.not_measured["power_w"]
    assert energy_over(decode, 0, 1).energy_j is None
    assert records["gone"].samples == [] and "no such process" in records["gone"].not_measured["cpu_utilization_pct"]
