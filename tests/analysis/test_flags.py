"""Devices that were throttled, measured too briefly, or whose meters disagree are flagged; silent ones are not."""

from pdbench.analysis.flags import device_flags
from pdbench.records import Clock, DeviceRecord, DeviceSample, Run, Trial


def a_run(
    seconds: float, *, power_w: float | None = 100.0, counter_w: float = 100.0, throttle: list[str] | None = None
) -> Run:
    samples = [
        DeviceSample(
            t_s=i / 10, power_w=power_w, energy_j=None if power_w is None else counter_w * i / 10, throttle=throttle
        )
        for i in range(int(seconds * 10) + 1)
    ]
    device = DeviceRecord(id="gpu0", kind="gpu", name="H200", role="prefill", samples=samples)
    trial = Trial(index=0, start_s=0.0, end_s=seconds)
    clock = Clock(monotonic_s=0.0, unix_s=0.0)
    return Run(name="single", clock=clock, config={}, host={}, versions={}, trials=[trial], devices=[device])


def names(run: Run) -> list[str]:
    return [flag.name for flag in device_flags(run)]


def test_a_long_quiet_run_has_no_flag() -> None:
    assert names(a_run(40, throttle=["gpu_idle", "clocks_setting"])) == []


def test_a_power_cap_is_told() -> None:
    assert names(a_run(40, throttle=["sw_power_cap"])) == ["throttled"]


def test_a_window_under_30_s_is_short_for_energy() -> None:
    assert names(a_run(20)) == ["short-window"]


def test_counter_and_integral_that_disagree_are_told() -> None:
    assert names(a_run(40, counter_w=110.0)) == ["energy-residual"]


def test_what_has_no_meter_has_no_energy_flag() -> None:
    assert names(a_run(5, power_w=None)) == []
