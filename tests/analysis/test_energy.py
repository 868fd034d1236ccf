"""Energy over windows and its attribution, from records with exact areas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.analysis.device_flags import device_flags
from pdbench.analysis.energy import Energy, joules
from pdbench.analysis.intervals import difference, intersection, length_s, union
from pdbench.analysis.meter import Meter
from pdbench.analysis.run_analysis import analyze
from pdbench.events import ProxyEvent, TransferEvent
from pdbench.records import (
    Clock,
    DeviceRecord,
    DeviceSample,
    Interval,
    RequestError,
    RequestRecord,
    Run,
    Trial,
)
from tests.support.runs import build_run, energy_over


def gpu(
    role: str = "decode", watts: float = 400.0, gain: float = 1.0, until_s: int = 20, **more: object
) -> DeviceRecord:
    """A GPU of constant power, whose counter counts `gain` times that."""
    samples = [DeviceSample(t_s=i / 10, power_w=watts, energy_j=gain * watts * i / 10) for i in range(10 * until_s + 1)]
    index = 0 if role == "prefill" else 1
    return DeviceRecord(id=f"gpu{index}", kind="gpu", name="G", role=role, index=index, samples=samples, **more)  # type: ignore[arg-type]


def test_window_edges_are_covered_between_samples() -> None:
    window = energy_over(gpu(), 1.234, 5.678)
    assert window.counter_j == pytest.approx(400 * 4.444)
    assert window.integral_j == pytest.approx(400 * 4.444)
    assert (window.residual_pct, window.mean_power_w) == (pytest.approx(0), pytest.approx(400))


def test_repeated_values_are_power_not_gaps() -> None:
    # 400 W for 5 s reads 2000 J although every sample repeats the one before.
    assert energy_over(gpu(until_s=5), 0, 5).integral_j == pytest.approx(2000)


def test_outside_what_was_measured_there_is_no_energy() -> None:
    assert energy_over(gpu(), 15, 25).energy_j is None
    assert energy_over(gpu(), -5, 3).energy_j is None
    assert energy_over(DeviceRecord(id="p", kind="process", name="p"), 0, 1).energy_j is None


def test_a_hole_in_the_samples_is_no_energy() -> None:
    device = gpu()
    device.samples = [sample for sample in device.samples if not 5 < sample.t_s < 8]
    for sample in device.samples:
        sample.energy_j = None
    assert energy_over(device, 4, 9).energy_j is None
    assert energy_over(device, 8.5, 9.5).energy_j == pytest.approx(400)


@pytest.mark.parametrize(("gain", "flagged"), [(1.02, False), (1.05, True), (0.9, True)])
def test_residual_above_three_percent_is_flagged(gain: float, flagged: bool) -> None:
    device = gpu(gain=gain, until_s=40)
    window = energy_over(device, 2, 12)
    assert window.counter_j == pytest.approx(4000 * gain)
    assert window.residual_pct == pytest.approx(100 * (1 / gain - 1))
    assert [flag.name for flag in device_flags(Meter(device), [(2, 36)])] == ["energy-residual"] * flagged


def test_idle_is_kept_apart_and_never_exceeds_the_total() -> None:
    def parts(engine_ready: float | None) -> object:
        return pytest.approx(joules([Meter(gpu(idle_power_w={"engine_ready": engine_ready}))], [(0, 10)]))

    assert parts(120) == (4000, 2800, 1200, 0)
    assert parts(500) == (4000, 0, 4000, 0)
    assert joules([Meter(gpu())], [(0, 10)]) == (pytest.approx(4000), None, None, 0)


intervals = st.lists(st.tuples(st.floats(0, 19), st.floats(0, 19)), max_size=8)


@given(intervals, intervals)
def test_windows_are_a_set_of_instants(first: list[Interval], second: list[Interval]) -> None:
    both, rest = intersection(first, second), difference(first, second)
    assert length_s(both) + length_s(rest) == pytest.approx(length_s(union(first)))
    assert intersection(rest, second) == []


@given(intervals)
def test_energy_of_windows_adds_up(windows: list[Interval]) -> None:
    joined = Meter(gpu()).energy_in(windows)
    if joined.uncertain_j and joined.energy_j is None:
        assert joined.uncertain_j > 200 * joined.duration_s
        return
    assert joined.integral_j == pytest.approx(400 * joined.duration_s, abs=1e-6)
    assert joined.counter_j == pytest.approx(400 * joined.duration_s, abs=1e-6)


def disaggregated() -> Run:
    """Ten seconds measured; prefill busy 2 s, decode 6 s; one request of three failed after its prefill."""
    ready = {"idle_power_w": {"engine_ready": 120.0}}
    requests = [
        RequestRecord(
            id="a",
            planned_s=5,
            token_s=[8.0] * 50,
            end_s=8.0,
            prompt_tokens=100,
            phases={"prefill": (5, 6), "kv_transfer": (6, 6.5), "decode": (6.5, 9.5)},
        ),
        RequestRecord(
            id="b",
            planned_s=9,
            token_s=[13.0] * 50,
            end_s=13.0,
            prompt_tokens=100,
            phases={"prefill": (9.5, 10.5), "kv_transfer": (10.5, 11), "decode": (11, 14)},
        ),
        RequestRecord(
            id="c",
            planned_s=9,
            error=RequestError("reset", "gone"),
            prompt_tokens=100,
            phases={"prefill": (9.5, 10.0), "kv_transfer": None, "decode": None},
        ),
    ]
    return Run(
        name="disaggregated",
        clock=Clock(monotonic_s=0, unix_s=0),
        config={},
        host={},
        versions={},
        trials=[Trial(index=0, start_s=5, end_s=15)],
        requests=requests,
        devices=[gpu("prefill", 300, **ready), gpu("decode", 400, **ready)],
        events=[
            TransferEvent(side="receive", transfer_id="a", bytes=10**9, first_byte_s=6.0, end_s=6.5),
            TransferEvent(side="receive", transfer_id="b", bytes=10**9, first_byte_s=10.5, end_s=11.0),
            TransferEvent(
                side="receive", transfer_id="b", direction="return", bytes=10**8, first_byte_s=8.5, end_s=9.0
            ),
        ],
    )


def energy(run: Run) -> Energy:
    return analyze(run).summary.energy


def test_gpus_of_one_index_on_two_hosts_are_two() -> None:
    run = disaggregated()
    for host, device in zip(("a", "b"), run.devices, strict=True):
        device.id, device.index, device.host = "gpu0", 0, host
    summary = analyze(run).summary
    assert summary.energy.total_j == pytest.approx(7000)
    roles = {role: used.total_j for role, used in summary.energy.roles.items()}
    assert roles == {"prefill": pytest.approx(3000), "decode": pytest.approx(4000)}
    assert set(summary.devices) == {"a/gpu0", "b/gpu0"}


def test_roles_phases_and_tokens_get_their_joules() -> None:
    used = energy(disaggregated())
    prefill, decode = used.roles["prefill"], used.roles["decode"]
    assert (used.total_j, prefill.total_j, decode.total_j) == tuple(map(pytest.approx, (7000, 3000, 4000)))
    assert (prefill.phase_s, prefill.phase_j) == (pytest.approx(2), pytest.approx(600))
    assert (prefill.active_j, prefill.idle_j) == (pytest.approx(360), pytest.approx(240))
    assert (decode.phase_s, decode.phase_j) == (pytest.approx(6), pytest.approx(2400))
    assert (prefill.waiting_s, prefill.waiting_j) == (pytest.approx(8), pytest.approx(2400))
    assert used.j_per_output_token == pytest.approx(70)
    assert used.decode_j_per_output_token == decode.j_per_output_token == pytest.approx(40)
    assert used.j_per_computed_prompt_token == pytest.approx(10), "the failed request's prompt was computed too"
    assert used.j_per_request == pytest.approx(3500), "its energy stays in the total, it is no delivered request"
    assert (used.mean_power_w, used.output_tokens_per_j) == (pytest.approx(700), pytest.approx(1 / 70))


def test_prompt_that_decode_computes_alone_is_decodes_work() -> None:
    before, run = analyze(disaggregated()).summary.energy, disaggregated()
    run.requests[2] = RequestRecord(
        id="c", planned_s=9, token_s=[12.0], end_s=12.0, prompt_tokens=100, phases={"decode_alone": (9.5, 14.5)}
    )
    run.events = [ProxyEvent(request_id="c", decode_sent_s=9.5, decode_alone="short")]
    after = analyze(run).summary.energy
    assert (before.j_per_computed_prompt_token, after.j_per_computed_prompt_token) == pytest.approx((10, 15))
    assert (before.roles["decode"].phase_s, after.roles["decode"].phase_s) == pytest.approx((6, 8))


def test_parts_of_a_role_add_up_to_its_total() -> None:
    for run in (disaggregated(), build_run(seed=2), build_run("single", seed=2)):
        for role in energy(run).roles.values():
            parts = (role.active_j, role.idle_j, role.waiting_j)
            if role.phase_s and role.phase_j is None:  # prefill of 21 ms, sampled every 100 ms
                assert parts == (None, None, None)
                continue
            if role.phase_s and role.waiting_j is None:  # decode's waits of 31 ms
                assert role.waiting_uncertain_j and role.active_j and role.idle_j
                continue
            assert sum(part for part in parts if part is not None) == pytest.approx(role.total_j)
            assert (role.waiting_j is None) == (run.name == "single")


def test_transfers_have_joules_only_where_nothing_else_runs() -> None:
    transfers = energy(disaggregated()).kv_transfer
    assert transfers is not None and transfers.not_measured is None
    assert (transfers.bytes, transfers.returned_bytes) == (2 * 10**9, 10**8)
    assert transfers.alone_s == pytest.approx(1)
    assert transfers.active_j == pytest.approx(180 + 280)
    crowded = disaggregated()
    crowded.requests.append(RequestRecord(id="d", planned_s=5, phases={"decode": (5, 15)}))
    transfers = energy(crowded).kv_transfer
    assert transfers is not None and transfers.active_j is None and "too short" in (transfers.not_measured or "")


def test_single_instance_is_not_split() -> None:
    run = disaggregated()
    run.devices = [gpu("single")]
    used = energy(run)
    assert used.total_j == pytest.approx(4000)
    assert used.j_per_output_token == pytest.approx(40)
    split = (used.j_per_computed_prompt_token, used.decode_j_per_output_token, used.kv_transfer)
    assert split == (None, None, None)
    assert "--phase prefill" in (used.not_split or "")


def test_gpu_that_both_roles_share_is_counted_once() -> None:
    run = disaggregated()
    run.devices = [gpu("prefill+decode")]
    used = energy(run)
    assert (used.total_j, list(used.roles)) == (pytest.approx(4000), ["prefill+decode"])
    assert used.j_per_output_token == pytest.approx(40)
    assert (used.j_per_computed_prompt_token, used.decode_j_per_output_token, used.kv_transfer) == (None, None, None)
    assert "share their GPUs" in (used.not_split or "")


def test_a_missing_piece_makes_no_total() -> None:
    run = disaggregated()
    run.devices[0].samples = []
    used = energy(run)
    assert (used.total_j, used.j_per_output_token, used.j_per_computed_prompt_token) == (None, None, None)
    assert used.decode_j_per_output_token == pytest.approx(40)
    run.devices = []
    assert (energy(run).not_split, energy(run).not_measured) == ("no GPU was sampled", "no device was sampled")


def test_rapl_domains_count_where_there_is_no_gpu() -> None:
    run = disaggregated()
    for device, kind in zip(run.devices, ("cpu", "dram"), strict=True):
        device.kind, device.role = kind, None
    used = energy(run)
    assert (used.total_j, list(used.roles), used.not_split) == (pytest.approx(7000), ["host"], "no GPU was sampled")


def test_what_the_joules_bought() -> None:
    run = disaggregated()
    run.config = {"power": {"price_kwh": 0.3, "gco2_kwh": 400}, "load": {"slo_ttft_ms": 3500}}
    for request, sent_s in zip(run.requests, (5.0, 9.0, 9.0), strict=True):
        request.sent_s = sent_s
    summary = analyze(run).summary
    assert summary.throughput.output_tokens_per_s_per_device == pytest.approx(5)
    assert summary.energy.energy_delay_js == pytest.approx(3500 * 3.5)
    assert summary.energy.goodput_per_w == pytest.approx(1 / 7000)
    kwh = 70 * 1e6 / 3.6e6
    assert summary.energy.price_per_million_output_tokens == pytest.approx(kwh * 0.3)
    assert summary.energy.gco2_per_million_output_tokens == pytest.approx(kwh * 400)


def test_without_a_meter_the_reason_stands_in() -> None:
    used = energy(build_run(gpu=False))
    assert (used.total_j, used.not_measured) == (None, "RAPL zones are devices of their own")


def test_small_energy_is_not_rounded_to_nothing() -> None:
    run = disaggregated()
    for device in run.devices:
        device.samples = [DeviceSample(t_s=i / 10, power_w=1e-6) for i in range(200)]
    assert energy(run).j_per_output_token == pytest.approx(2e-7)


@pytest.mark.parametrize("still_j", [0.0, 123456.0])
def test_counter_that_never_moves_leaves_the_integral(still_j: float) -> None:
    device = gpu(until_s=60, energy_ticks=[(i / 2, still_j) for i in range(120)])
    window = energy_over(device, 5, 55)
    assert (window.energy_j, window.counter_j, window.residual_pct) == (pytest.approx(20_000), None, None)
    flag, power = device_flags(Meter(device), [(5, 55)])
    assert (flag.name, flag.detail.split(":")[0]) == ("energy-counter-still", "gpu1")
    assert power.name == "power-still"  # which does not move either


def test_counter_that_creeps_is_no_counter() -> None:
    device = gpu(until_s=60, energy_ticks=[(float(i), 0.001 * i) for i in range(61)])
    assert energy_over(device, 5, 55).energy_j == pytest.approx(20_000)
    for i, sample in enumerate(device.samples):
        sample.power_w = 400 + i % 2
    assert [flag.name for flag in device_flags(Meter(device), [(5, 55)])] == ["energy-counter-still"]


def test_counter_in_a_wrong_unit_leaves_the_integral() -> None:
    window = energy_over(gpu(gain=1000, until_s=60), 5, 55)
    assert window.energy_j == pytest.approx(20_000) and window.counter_resets > 100


def test_gpu_that_was_not_read_all_the_time_is_why_there_is_no_energy() -> None:
    """Not the host's CPU use, which never has any."""
    run = disaggregated()
    host = DeviceRecord(id="host", kind="process", name="CPU", not_measured={"power_w": "a share of time"})
    run.devices.append(host)
    run.devices[0].samples = [sample for sample in run.devices[0].samples if sample.t_s < 10]
    assert energy(run).not_measured == f"{run.devices[0].id} could not be read all through the measured windows"
    run.devices[0].not_measured = {"power_w": "GPU is lost"}
    assert energy(run).not_measured == f"{run.devices[0].id}: GPU is lost"


@pytest.mark.parametrize("power_w", [None, 0.0])
def test_meter_that_only_counts_and_stands_still_measures_nothing(power_w: float | None) -> None:
    run = disaggregated()
    samples = [DeviceSample(t_s=i / 10, power_w=power_w, energy_j=0.0) for i in range(200)]
    run.devices = [DeviceRecord(id="cpu-package-0", kind="cpu", name="CPU", samples=samples)]
    analysis = analyze(run)
    used, device = analysis.summary.energy, analysis.summary.devices["cpu-package-0"]
    assert (used.total_j, used.j_per_output_token) == (None, None)
    assert used.not_measured == device.not_measured["energy_j"] == "the energy counter stands still"
    assert [flag.name for flag in analysis.flags] == [
        "requests-failed",
        "answers-at-once",
        "energy-counter-still",
    ]  # one of its requests failed


def test_device_says_how_far_its_power_limit_held_it_down() -> None:
    run = disaggregated()
    for i, sample in enumerate(run.devices[0].samples):
        sample.power_limit_w, sample.throttle = 500.0, ["sw_power_cap"] if i % 2 else []
    run.devices[0].default_power_limit_w = 700.0
    prefill, decode = analyze(run).summary.devices.values()
    assert prefill.power_capped_pct == pytest.approx(50, abs=1) and prefill.readings["power_limit_w"].max == 500
    assert (prefill.default_power_limit_w, decode.power_capped_pct) == (700, None)
    assert prefill.scopes["gpu"].energy_j == prefill.energy.energy_j


def test_rapl_zone_that_stands_still_in_a_part_of_the_window_is_not_measured() -> None:
    samples = [DeviceSample(t_s=i / 10, power_w=50.0 * (i < 300), energy_j=5.0 * min(i, 300)) for i in range(601)]
    device = DeviceRecord(id="cpu-package-0", kind="cpu", name="CPU", samples=samples)
    assert energy_over(device, 5, 25).energy_j == pytest.approx(1000)
    assert energy_over(device, 5, 55).energy_j is None


@pytest.mark.parametrize(("frozen_s", "flagged"), [(60, True), (15, True), (5, False), (0, False)])
def test_power_that_is_not_refreshed_is_flagged_where_no_counter_checks_it(frozen_s: int, flagged: bool) -> None:
    device = gpu(until_s=60)
    for i, sample in enumerate(device.samples):
        sample.power_w = 400.0 if i < 10 * frozen_s else 300 + i % 7
    assert [flag.name for flag in device_flags(Meter(device), [(0, 60)]) if flag.name == "power-still"] == []
    for sample in device.samples:
        sample.energy_j = None
    assert [flag.name for flag in device_flags(Meter(device), [(0, 60)])] == ["power-still"] * flagged


@pytest.mark.parametrize("counter_j", [None, 0.0])
def test_gpu_that_reads_0_w_has_no_energy(counter_j: float | None) -> None:
    run = disaggregated()
    for device in run.devices:
        device.samples = [DeviceSample(t_s=i / 10, power_w=0.0, energy_j=counter_j) for i in range(200)]
    used = energy(run)
    assert (used.total_j, used.j_per_output_token, used.mean_power_w) == (None, None, None)
    reason = "the power reads 0 W, which no GPU draws" if counter_j is None else "the energy counter stands still"
    assert used.not_measured == reason
