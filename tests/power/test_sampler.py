"""The sampler over a scripted NVML: the real nvidia-ml-py, the real loop, the library's own clock, a known integral."""

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdbench.analysis.device_flags import RESIDUAL_LIMIT_PCT, device_flags
from pdbench.analysis.meter import Meter
from pdbench.power.device import Reader
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import DeviceRecord
from tests.support.fake_nvml import WAVES, child, exact_j, sampled, wave_text
from tests.support.runs import energy_over

FINE_S = 0.02


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
def test_energy_of_any_window_is_the_integral_of_the_wave(nvml_library: Path, name: str, interval_s: float) -> None:
    [device] = sampled(nvml_library, 18.5, {"decode": [0]}, interval_s, power_0=wave_text(name))
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
        assert window.residual_pct is not None and abs(window.residual_pct) < RESIDUAL_LIMIT_PCT
        assert window.counter_resets == 0
    assert quiet > 100


def test_energy_counter_is_read_as_it_moves(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 30.0, {"decode": [0]}, power_0=wave_text("square"))
    assert device.sampling["energy_refresh_ms"] == pytest.approx(100, abs=0.2)
    for at, _ in device.energy_ticks:
        assert abs((at - 0.037 + 0.05) % 0.1 - 0.05) < 0.003, "as good as one read and one pause"
    assert len(device.energy_ticks) < 14, "a counter that costs 2.4 ms a read is read every few seconds"


def test_sampling_statistics_report_interval_and_fine_curve(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 10.0, {"decode": [0]}, power_0=wave_text("square"))
    assert device.sampling["p50_ms"] == pytest.approx(100, abs=0.1)
    assert device.sampling["fine_interval_ms"] == pytest.approx(20, abs=0.1)
    assert device.sampling["missed_ticks"] == 0
    assert len(device.fine_power) > 490
    assert device.statistics["power_w"]["max"] == pytest.approx(650)
    assert device.statistics["power_w"]["min"] == pytest.approx(120)
    [fast] = sampled(nvml_library, 10.0, {"decode": [0]}, 0.01, power_0=wave_text("square"))
    # Polled ten times as often, the driver repeats its values; they are counted and stay in.
    assert fast.sampling["stale_repeats"] > 850
    assert len(fast.samples) > 990


def test_sample_fields_have_the_units_of_their_names(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 2.0, {"prefill": [0]}, power_0="1 0:400 1:400")
    sample = device.samples[-1]
    assert (sample.power_w, sample.power_average_w, sample.power_limit_w) == (400, 400, 700)
    assert (sample.sm_clock_mhz, sample.memory_clock_mhz, sample.temperature_c) == (1980, 3201, 40)
    assert (sample.gpu_utilization_pct, sample.memory_utilization_pct) == (57, 28)
    assert (sample.memory_used_mib, sample.throttle) == (64 * 1024, [])
    assert (device.id, device.kind, device.name, device.role) == ("gpu0", "gpu", "Scripted GPU", "prefill")
    assert device.not_measured == {}


def test_lost_gpu_keeps_its_samples_and_does_not_stop_the_others(nvml_library: Path) -> None:
    lost, other = sampled(nvml_library, 10.0, {"prefill": [0], "decode": [1]}, gpus="2", fail="0:*:15:4.0")
    assert "lost" in lost.not_measured["device"]
    assert 3.8 < lost.samples[-1].t_s < 4.1
    assert energy_over(lost, 1, 3).counter_j == pytest.approx(200, rel=0.005)
    assert energy_over(lost, 3, 8).energy_j is None
    assert other.not_measured == {}
    assert energy_over(other, 3, 8).counter_j == pytest.approx(500, rel=0.005)


def test_unsupported_field_is_not_measured(nvml_library: Path) -> None:
    failing = "0:DeviceGetTemperature:3 0:DeviceGetTotalEnergyConsumption:3 0:DeviceGetUtilizationRates:4"
    [device] = sampled(nvml_library, 5.0, {"decode": [0]}, fail=failing)
    assert device.not_measured["temperature_c"] == "Not Supported"
    assert "permission" in device.not_measured["gpu_utilization_pct"]
    assert all(sample.temperature_c is None and sample.gpu_utilization_pct is None for sample in device.samples)
    window = energy_over(device, 1, 4)
    assert (window.counter_j, window.residual_pct) == (None, None)
    assert window.energy_j == pytest.approx(300, rel=0.005)


def test_gpu_without_buffer_is_integrated_over_samples(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 8.0, {"decode": [0]}, fail="0:DeviceGetSamples:3", power_0=wave_text("constant"))
    assert device.fine_power == [] and device.not_measured["fine_power"] == "Not Supported"
    assert energy_over(device, 1.03, 6.51).integral_j == pytest.approx(exact_j("constant", 1.03, 6.51), rel=0.005)


def test_gpu_without_instant_power_is_integrated_over_its_average(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 6.0, {"decode": [0]}, fail="0:Field186:3 0:DeviceGetSamples:3")
    assert device.not_measured["power_w"] == "Not Supported"
    assert energy_over(device, 1, 5).integral_j == pytest.approx(400, rel=0.005)
    [old] = sampled(nvml_library, 6.0, {"decode": [0]}, fail="0:DeviceGetFieldValues:3")
    assert old.samples[-1].power_average_w == 100 and old.samples[-1].power_w is None


def test_plain_power_of_old_gpus_is_an_instant(nvml_library: Path) -> None:
    """NVML: a 1 s mean from Ampere on, but for GA100. Taken for one, readings stood half a second early: 1,712 J of 1,950."""
    no_fields = "0:DeviceGetFieldValues:3 0:DeviceGetTotalEnergyConsumption:3"
    steps = "6.0 0:120 3:120 3:650 6:650"
    for capability, is_instant in (("70", True), ("80", True), ("86", False), ("90", False)):
        [device] = sampled(nvml_library, 20.0, {"decode": [0]}, fail=no_fields, capability=capability, power_0=steps)
        assert device.settings["compute_capability"] == int(capability) / 10
        last = device.samples[-1]
        assert (last.power_average_w is None, last.power_w is None) == (is_instant, not is_instant)
        if is_instant:
            assert energy_over(device, 9.0, 12.0).energy_j == pytest.approx(3 * 650, rel=0.02)


@pytest.mark.parametrize(
    ("capability", "measured", "missing"), [("80", "power_w", "power_average_w"), ("86", "power_average_w", "power_w")]
)
def test_plain_power_is_measured_and_an_instant_has_the_drivers_buffer_beside_it(
    nvml_library: Path, capability: str, measured: str, missing: str
) -> None:
    """The field that it stands in for was "Not Supported" all the same, and the buffer of a GA100 not read: 1,565 J of 1,540, with an edge known to 100 ms."""
    no_fields = "0:DeviceGetFieldValues:3"
    square = wave_text("square")
    [device] = sampled(nvml_library, 8.0, {"decode": [0]}, fail=no_fields, capability=capability, power_0=square)
    assert device.not_measured == {missing: "Not Supported"}
    assert getattr(device.samples[-1], measured) is not None
    assert bool(device.fine_power) == (measured == "power_w")
    if measured == "power_w":
        window = energy_over(device, 2, 6)
        assert window.energy_j == pytest.approx(exact_j("square", 2, 6), rel=0.002)
        assert window.integral_j == pytest.approx(exact_j("square", 2, 6), rel=0.002)


def test_counter_reset_is_flagged_and_bridged_by_the_curve(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 20.0, {"decode": [0]}, reset_s="9.0", power_0=wave_text("square"))
    window = energy_over(device, 2, 18)
    assert window.counter_resets == 1
    assert window.counter_j == pytest.approx(exact_j("square", 2, 18), rel=0.005)
    assert flag_names(device, 2, 18) == ["energy-counter-reset", "short-window"]


def flag_names(device: DeviceRecord, start_s: float, end_s: float) -> list[str]:
    return [flag.name for flag in device_flags(Meter(device), [(start_s, end_s)])]


@pytest.mark.parametrize("still_s", ["-1000", "0.4", "20.0", "31.0"])
def test_counter_that_stands_still_is_no_counter(nvml_library: Path, still_s: str) -> None:
    [device] = sampled(nvml_library, 60.0, {"decode": [0]}, still_s=still_s, power_0=wave_text("square"))
    window = energy_over(device, 2, 58)
    assert window.energy_j == pytest.approx(exact_j("square", 2, 58), rel=0.01)
    assert window.counter_still_s > 20 and flag_names(device, 2, 58) == ["energy-counter-still"]
    flag = next(device_flags(Meter(device), [(2, 58)]))
    assert flag.detail.startswith("gpu0: the energy counter stood still for") and "integral" in flag.detail
    if float(still_s) < 2:
        assert (window.counter_j, window.residual_pct) == (None, None)
    else:
        assert flag_names(device, 2, float(still_s) - 2) == ["short-window"]


def test_counter_without_a_power_curve_that_stands_still_is_no_energy(nvml_library: Path) -> None:
    no_power = "0:DeviceGetFieldValues:3 0:DeviceGetPowerUsage:3 0:DeviceGetSamples:3"
    [device] = sampled(nvml_library, 40.0, {"decode": [0]}, still_s="0", fail=no_power)
    assert energy_over(device, 2, 35).energy_j is None
    assert flag_names(device, 2, 35) == ["energy-counter-still"]


NO_POWER = "0:DeviceGetFieldValues:3{0} 0:DeviceGetPowerUsage:3{0} 0:DeviceGetSamples:3{0}"


@pytest.mark.parametrize("from_s", ["", ":5.0"])
def test_counter_without_a_power_curve_is_read_often(nvml_library: Path, from_s: str) -> None:
    """Read every 5 s, nothing says where in them the load began and ended."""
    steps = "20 0:120 11.5:120 11.5:600 20:600"
    [device] = sampled(nvml_library, 41.0, {"decode": [0]}, fail=NO_POWER.format(from_s), power_0=steps)
    window = energy_over(device, 31.5, 40.0)
    assert window.energy_j == window.counter_j == pytest.approx(8.5 * 600, rel=0.01)


@pytest.mark.parametrize("jump", ["15.0:100000000", "15.0:500000", "15.0:30000"])
def test_counter_that_jumps_ahead_is_flagged_and_bridged_by_the_curve(nvml_library: Path, jump: str) -> None:
    [device] = sampled(nvml_library, 40.0, {"decode": [0]}, jump=jump, power_0=wave_text("square"))
    window = energy_over(device, 2, 38)
    assert window.counter_resets == 1 and flag_names(device, 2, 38) == ["energy-counter-reset"]
    assert window.energy_j == pytest.approx(exact_j("square", 2, 38), rel=0.01)


@pytest.mark.parametrize("refresh_s", ["1.5", "2.0", "3.7", "8.0"])
def test_counter_that_the_driver_refreshes_rarely_is_read_as_it_moves(nvml_library: Path, refresh_s: str) -> None:
    """Read at any moment, 2 s of its joules were missing or too many: windows were off by up to a fifth."""
    [device] = sampled(nvml_library, 60.0, {"decode": [0]}, refresh_s=refresh_s, power_0=wave_text("ramp"))
    for start, end in ((8.3, 20.1), (17.9, 25.2), (15.0, 44.4), (3.0, 50.0)):
        window = energy_over(device, start, end)
        assert window.energy_j == pytest.approx(exact_j("ramp", start, end), rel=0.01)
    moves = [second[0] for first, second in itertools.pairwise(device.energy_ticks) if first[1] != second[1]]
    late = [abs((at - 0.037 + 0.5) % float(refresh_s) - 0.5) for at in moves]
    assert max(late) < 0.06 and len(late) >= 3 and flag_names(device, 3, 50) == []


@pytest.mark.parametrize("step", ["15.0:3600", "15.0:-3600", "15.0:1", "15.0:-1"])
def test_wall_clock_that_is_set_moves_no_sample_of_the_driver(nvml_library: Path, step: str) -> None:
    no_counter = "0:DeviceGetTotalEnergyConsumption:3"
    [device] = sampled(nvml_library, 40.0, {"decode": [0]}, step=step, fail=no_counter, power_0=wave_text("square"))
    times = [t_s for t_s, _ in device.fine_power]
    assert times[0] >= 0 and times == sorted(times) and times[-1] < 40.1 and len(times) > 1900
    assert energy_over(device, 2, 38).integral_j == pytest.approx(exact_j("square", 2, 38), rel=0.01)
    assert energy_over(device, 20, 38).integral_j == pytest.approx(exact_j("square", 20, 38), rel=0.005)


def test_superchips_module_and_memory_are_read_beside_the_gpu(nvml_library: Path) -> None:
    settings = {"name": "NVIDIA GH200 480GB", "scopes": "1:1.5 2:0.1", "power_0": wave_text("constant")}
    [device] = sampled(nvml_library, 6.0, {"decode": [0]}, **settings)
    sample = device.samples[-1]
    assert (sample.power_w, sample.module_power_w, sample.memory_power_w) == (400, 600, 40)
    scopes = Meter(device).scopes_in([(1.0, 5.0)])
    assert {name: scope.energy_j for name, scope in scopes.items()} == {
        "gpu": pytest.approx(1600, rel=0.005),
        "module": pytest.approx(2400, rel=0.005),
        "memory": pytest.approx(160, rel=0.005),
    }
    assert device.not_measured == {}


def test_memorys_power_that_is_an_average_stands_in_the_middle_of_its_second(nvml_library: Path) -> None:
    """It had been taken for an instant, half a second late: 165 J of 195 in the 3 s after a step of load; what is left is the step's own second."""
    steps = "6.0 0:120 3:120 3:650 6:650"
    [device] = sampled(nvml_library, 20.0, {"decode": [0]}, fail="0:Field186:3", scopes="2:0.1", power_0=steps)
    assert device.settings["memory_power_w_averaged"] is True
    for start_s in (9.0, 15.0):
        assert Meter(device).scopes_in([(start_s, start_s + 3)])["memory"].energy_j == pytest.approx(181.4, rel=0.01)
    [instant] = sampled(nvml_library, 2.0, {"decode": [0]}, scopes="2:0.1", power_0=steps)
    assert "memory_power_w_averaged" not in instant.settings


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"name": "NVIDIA GB200"}, {"module_power_w", "memory_power_w"}),
        ({"name": "NVIDIA GB300", "scopes": "1:1.5"}, {"memory_power_w"}),
        ({"name": "NVIDIA GH200 480GB", "scopes": "all"}, {"module_power_w", "memory_power_w"}),
        ({"name": "NVIDIA H100 80GB HBM3"}, set()),
        ({"name": "NVIDIA H100 80GB HBM3", "scopes": "all"}, set()),
    ],
)
def test_scope_that_a_superchip_does_not_give_is_named(
    nvml_library: Path, settings: dict[str, str], missing: set[str]
) -> None:
    [device] = sampled(nvml_library, 3.0, {"decode": [0]}, **settings)
    assert device.not_measured.keys() == missing
    assert (device.samples[-1].module_power_w is None) == ("scopes" not in settings or settings["scopes"] == "all")
    assert device.samples[-1].power_w == 100


def test_power_limit_and_its_default_are_recorded(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 2.0, {"decode": [0]}, reasons="4", limit_w="500")
    assert (device.samples[-1].power_limit_w, device.default_power_limit_w) == (500, 700)
    assert device.samples[-1].throttle == ["sw_power_cap"]


def test_mig_slice_has_no_power(nvml_library: Path) -> None:
    [device] = sampled(nvml_library, 2.0, {"decode": [0]}, mig="1")
    assert "MIG" in device.not_measured["power_w"] and "MIG" in device.not_measured["energy_j"]
    assert device.samples and energy_over(device, 0.5, 1.5).energy_j is None


def test_missing_gpu_names_its_index(nvml_library: Path) -> None:
    _, absent = sampled(nvml_library, 1.0, {"prefill": [0], "decode": [7]})
    assert absent.samples == [] and "7" in absent.not_measured["device"]


def test_merged_records_of_two_samplers_are_one_device(nvml_library: Path) -> None:
    [first] = sampled(nvml_library, 4.0, {"decode": [0]})
    [second] = sampled(nvml_library, 4.0, {"decode": [0]}, power_0="1 0:300 1:300")
    for sample in second.samples:
        sample.t_s += 10
    moved = [(t + 10, j + 100000) for t, j in second.energy_ticks]
    second.fine_power = [(t + 10, power) for t, power in second.fine_power]
    second.energy_ticks = moved
    [both] = merge_records([first, second])
    assert energy_over(both, 1, 3).energy_j == pytest.approx(200, rel=0.005)
    assert energy_over(both, 11, 13).energy_j == pytest.approx(600, rel=0.005)
    assert both.statistics["power_w"] == {"avg": None, "min": 100, "max": 300}
    assert energy_over(both, 3, 12).integral_j is None, "nobody measured the time between"


def test_merged_pieces_are_the_whole_record(nvml_library: Path) -> None:
    code = """
import msgspec
from pdbench.power.device import open_gpu
from pdbench.power.sampler import Sampler, merge_records
from tests.support.fake_nvml import ScriptedTime
scripted = ScriptedTime(6.0)
sampler = Sampler([open_gpu(0, "decode")], 0.1, scripted)
pieces, wait = [], scripted.wait
def wait_and_take(seconds, stop):
    pieces.extend(sampler.take())
    wait(seconds, stop)
scripted.wait = wait_and_take
sampler.run()
pieces += sampler.take()
assert len(pieces) > 50 and sum(bool(piece.samples) for piece in pieces) > 50
assert [piece for piece in pieces if piece.sampling] == pieces[-1:]
whole = merge_records(pieces, scripted.clock.of_monotonic)
assert sampler.take()[0].sampling == {}, "the figures of a sampling count once"
moved = merge_records(pieces, lambda t_s: scripted.clock.of_monotonic(t_s) + 100)[0]
assert moved.samples[0].t_s == whole[0].samples[0].t_s + 100
assert moved.fine_power[-1][0] > 105 and moved.energy_ticks[-1][0] > 105
lost = merge_records(pieces[:-1])[0]
assert lost.sampling["p50_ms"] is not None and lost.statistics["power_w"]["max"] == 650
print(msgspec.json.encode(whole).decode())
"""
    settings = {"power_0": wave_text("square")}
    merged = msgspec.json.decode(child(nvml_library, code, clock="scripted", **settings), type=list[DeviceRecord])
    assert merged == sampled(nvml_library, 6.0, {"decode": [0]}, **settings)


@pytest.mark.parametrize("power_w", [4294967, 9999, 2200])  # of a board whose limit is 700 W
def test_power_that_no_board_draws_is_no_reading(nvml_library: Path, power_w: int) -> None:
    [device] = sampled(nvml_library, 3.0, {"decode": [0]}, power_0=f"1 0:{power_w} 1:{power_w}")
    assert device.samples[-1].power_w is None and device.samples[-1].temperature_c == 40
    assert device.fine_power == []


def test_device_whose_readings_are_all_too_slow_says_so() -> None:
    class Slow(Reader):
        def read(self, now_s: float) -> dict[str, float]:
            time.sleep(0.3)
            return {"power_w": 100.0}

    sampler = Sampler([Slow("gpu0", "gpu", "slow")], 0.1)
    with sampler:
        time.sleep(1.0)
    (device,) = merge_records(sampler.take())
    assert device.samples == [] and "readings took over 0.25 s" in device.not_measured["power_w"]
