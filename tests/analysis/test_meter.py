"""A device whose readings have holes: what a window's energy is then, and when it is not known."""

from itertools import pairwise

import numpy as np
import pytest

from pdbench.analysis.device_flags import device_flags
from pdbench.analysis.meter import Meter, with_mean_power
from pdbench.analysis.run_analysis import analyze
from pdbench.records import DeviceRecord, DeviceSample, Interval
from pdbench.report import tables, text
from tests.analysis.test_energy import disaggregated
from tests.support.runs import energy_over

BUSY_W, IDLE_W = 500.0, 120.0
BUSY: Interval = (20.0, 80.0)
"""When the load runs; 30,000 J."""


def drawn_j(t_s: float) -> float:
    return IDLE_W * t_s + (BUSY_W - IDLE_W) * (min(max(t_s, BUSY[0]), BUSY[1]) - BUSY[0])


def loaded(
    *holes: Interval,
    ticks: bool = True,
    power: str | None = "power_w",
    power_until_s: float = 100.0,
    step_s: float = 0.1,
) -> DeviceRecord:
    """A GPU sampled for 100 s, its counter caught every 5 s (or with each sample); nothing at all is read in the holes."""

    def read(at_s: float) -> bool:
        return not any(start < at_s < end for start, end in holes)

    device = DeviceRecord(id="gpu0", kind="gpu", name="G", role="decode", index=0)
    for at_s in filter(read, np.arange(0, 100 + step_s / 2, step_s).round(6).tolist()):
        sample = DeviceSample(t_s=at_s, energy_j=None if ticks else drawn_j(at_s))
        if power and at_s <= power_until_s:
            setattr(sample, power, BUSY_W if BUSY[0] < at_s <= BUSY[1] else IDLE_W)
        device.samples.append(sample)
    if ticks:
        device.energy_ticks = [
            (at_s, drawn_j(at_s)) for at_s in (0.1, 0.2, *np.arange(2.5, 100, 5).tolist()) if read(at_s)
        ]
    return device


@pytest.mark.parametrize("ticks", [True, False])
@pytest.mark.parametrize("hole", [(10, 25), (19, 30), (70, 95), (15, 21.3)])
def test_hole_over_an_edge_of_the_window_is_no_energy(hole: Interval, ticks: bool) -> None:
    """Spread evenly over the hole, the counter's joules were 2.4 to 9.2 % too few with ticks, 1.2 to 7.6 % without."""
    window = energy_over(loaded(hole, ticks=ticks), *BUSY)
    assert (window.energy_j, window.counter_j, window.mean_power_w) == (None, None, None)


@pytest.mark.parametrize("ticks", [True, False])
@pytest.mark.parametrize("holes", [[(30, 45)], [(21, 79)], [(1, 19.4)], [(2, 10), (40, 60)], [(19.7, 20.3)]])
def test_hole_inside_the_window_or_outside_leaves_the_counters_total(holes: list[Interval], ticks: bool) -> None:
    device = loaded(*holes, ticks=ticks)
    assert energy_over(device, *BUSY).energy_j == pytest.approx(30_000, rel=0.002)
    assert energy_over(device, 19.5, 90).energy_j == pytest.approx(drawn_j(90) - drawn_j(19.5), rel=0.003)


def test_hole_that_hardly_matters_leaves_the_energy() -> None:
    device = loaded((90, 92))
    window = energy_over(device, 0.5, 91)  # 240 J of 34,000 in the hole
    assert window.counter_j == pytest.approx(drawn_j(91) - drawn_j(0.5), rel=0.002)
    assert energy_over(device, 80, 91).energy_j is None  # ... of 1,320


def test_phases_of_a_hole_are_not_known_and_the_windows_total_is() -> None:
    run = disaggregated()
    whole = analyze(run).summary.energy
    for device in run.devices:
        device.samples = [sample for sample in device.samples if not 9.7 < sample.t_s < 11.9]
    used = analyze(run).summary.energy
    assert used.total_j == pytest.approx(whole.total_j)
    for role in ("prefill", "decode"):
        assert used.roles[role].total_j == pytest.approx(whole.roles[role].total_j)
        assert whole.roles[role].phase_j and used.roles[role].phase_j is None


def test_window_between_two_holes_is_the_curves() -> None:
    window = energy_over(loaded((38, 44), (46, 53)), 44.5, 45.5)
    assert (window.counter_j, window.energy_j) == (None, pytest.approx(500))


@pytest.mark.parametrize(("ends_s", "known"), [((20, 80), False), ((20, 60), True), ((62.4, 72.6), False)])
def test_where_the_power_was_lost_rare_readings_of_the_counter_tell_no_edge(ends_s: Interval, known: bool) -> None:
    window = energy_over(loaded(power_until_s=60), *ends_s)
    assert (window.counter_j is not None) == known
    frequent = energy_over(loaded(power_until_s=60, ticks=False), *ends_s)
    assert frequent.counter_j == pytest.approx(drawn_j(ends_s[1]) - drawn_j(ends_s[0]), rel=0.002)


@pytest.mark.parametrize("power", [None, "power_w", "power_average_w"])
@pytest.mark.parametrize("refresh_s", [0.02, 0.1, 1.0, 2.0])
def test_slow_counter_is_a_counter(refresh_s: float, power: str | None) -> None:
    """Caught at every move, or as samples have it."""
    for caught in (True, False):
        device = loaded(power=power)
        moves = np.arange(0, 100, refresh_s).tolist()
        device.energy_ticks = [(at_s, drawn_j(at_s)) for at_s in moves] if caught else []
        for sample in device.samples:
            sample.energy_j = None if caught else drawn_j(sample.t_s // refresh_s * refresh_s)
        for start, end in ((20.33, 79.2), (30.1, 35.7)):
            window = energy_over(device, start, end)
            if window.counter_j is None:  # nothing tells when in its 2 s the joules of an edge were drawn
                assert (power, refresh_s, end) == (None, 2.0, 35.7)
                continue
            assert window.counter_j == pytest.approx(500 * (end - start), abs=window.uncertain_j + 0.1 * 500 + 1)
            assert window.counter_still_s == 0


@pytest.mark.parametrize("interval_s", [0.05, 1.0, 2.0, 10.0])
def test_rapl_at_any_interval_is_measured(interval_s: float) -> None:
    at = np.arange(0, 100 + interval_s / 2, interval_s).tolist()
    samples = [DeviceSample(t_s=at[0], energy_j=0.0)]
    samples += [DeviceSample(t_s=end, power_w=60.0, energy_j=60 * end) for _, end in pairwise(at)]
    device = DeviceRecord(id="cpu-package-0", kind="cpu", name="CPU", samples=samples)
    meter = Meter(device)
    for window in ((0.4 * interval_s, 50.0), (33.3, 77.7)):
        assert meter.energy_in([window]).energy_j == pytest.approx(60 * (window[1] - window[0]))


def test_mean_power_is_the_joules_over_the_time_and_not_of_the_samples() -> None:
    """A load whose steps take as long as the sampling's: each sample meets 339 W, the counter has 396."""
    run = disaggregated()
    for device in run.devices:
        device.samples = [DeviceSample(t_s=i / 10, power_w=339.0, energy_j=396 * i / 10) for i in range(201)]
    analysis = analyze(run)
    for device in analysis.summary.devices.values():
        assert device.energy.mean_power_w == device.readings["power_w"].mean == pytest.approx(396)
        assert (device.readings["power_w"].min, device.readings["power_w"].max) == (339, 339)
    assert [row[2] for row in tables.devices(analysis).rows] == pytest.approx([396, 396])
    for device in run.devices:
        device.samples = [sample for sample in device.samples if not 4 < sample.t_s < 8]
    analysis = analyze(run)
    assert [device.readings["power_w"].mean for device in analysis.summary.devices.values()] == [None, None]
    assert [row[2] for row in tables.devices(analysis).rows] == [None, None]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (loaded(), None),
        (loaded(power=None), None),  # it never gave any, which stands in not_measured
        (loaded((1, 19)), None),
        (loaded(power_until_s=60.0, ticks=False), ("19.8 s", "from 60 s", "counter's alone")),
        (loaded((30, 45)), ("15.0 s", "from 30 s", "counter's alone")),
        (loaded((70, 95)), ("10.0 s", "from 70 s", "energy is not known")),
    ],
)
def test_power_that_was_not_read_in_a_part_of_the_window_is_flagged(
    device: DeviceRecord, words: tuple[str, ...] | None
) -> None:
    details = [flag.detail for flag in device_flags(Meter(device), [BUSY]) if flag.name == "power-gaps"]
    assert len(details) == (words is not None)
    for detail in details:
        assert all(word in detail for word in words or ())
        with text.language("zh"):
            assert "没有读到功率" in text.translate(detail) and " the " not in text.translate(detail)
    device.not_measured["device"] = "GPU is lost"
    assert "power-gaps" not in [flag.name for flag in device_flags(Meter(device), [BUSY])]


@pytest.mark.parametrize("counted", [True, False], ids=["counter and curve", "curve"])
def test_mean_power_of_a_record_leaves_out_what_others_drew_between_its_turns(counted: bool) -> None:
    """Two turns of 20 s at 300 W, and 40 s between them in which somebody else drew 700 W."""
    samples = [DeviceSample(t_s=begin + i / 10, power_w=300.0) for begin in (0, 60) for i in range(201)]
    drawn = {0.0: 0.0, 20.0: 6000.0, 60.0: 34000.0, 80.0: 40000.0}
    device = DeviceRecord(
        id="gpu0", kind="gpu", name="G", samples=samples, energy_ticks=list(drawn.items()) if counted else []
    )
    device.statistics = {"power_w": {"avg": None, "min": 300.0, "max": 300.0}}
    assert with_mean_power(device).statistics["power_w"]["avg"] == pytest.approx(300.0)


@pytest.mark.parametrize("interval_s", [2.0, 5.0, 10.0])
def test_counter_between_samples_far_apart_has_not_jumped(interval_s: float) -> None:
    """Bursts that no sample met were taken for jumps of the counter, and samples of an idle GPU stood in: half of the joules."""
    bursts = [(at_s + 0.3, at_s + 0.9 * interval_s) for at_s in np.arange(30, 70, interval_s).tolist()]

    def joules(t_s: float) -> float:
        return IDLE_W * t_s + (BUSY_W - IDLE_W) * sum(min(max(t_s - start, 0), end - start) for start, end in bursts)

    samples = [DeviceSample(t_s=t_s, power_w=IDLE_W) for t_s in np.arange(0, 101, interval_s).tolist()]
    device = DeviceRecord(id="gpu0", kind="gpu", name="G", samples=samples, default_power_limit_w=700.0)
    device.energy_ticks = [(t_s, joules(t_s)) for t_s in np.arange(0.1, 100, 2.5).tolist()]
    window = energy_over(device, 5, 95)
    assert (window.counter_resets, window.counter_still_s) == (0, 0)
    assert window.energy_j == pytest.approx(joules(95) - joules(5), rel=0.01)
