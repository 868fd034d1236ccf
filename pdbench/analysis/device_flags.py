"""What is wrong with a device's readings over the measured windows, or what held the device down."""

from collections import Counter
from collections.abc import Iterator, Sequence

from pdbench.analysis.intervals import length_s
from pdbench.analysis.meter import EnergyWindow, Meter, PowerScope
from pdbench.analysis.power_curve import EDGE_S
from pdbench.records import Flag, Interval

SHORT_S = 30.0
"""Energy needs windows of at least this (MLPerf Power and ML.ENERGY ask for 30 s or more)."""
THROTTLED_PCT = 1.0
POWER_STILL_S = 10.0
"""No GPU under load draws the same power this long, to the milliwatt."""
CLOCKS_SET_PCT, CLOCK_STEP_MHZ = 50.0, 15.0
RESIDUAL_LIMIT_PCT = COARSE_PCT = 3.0
# Of module or memory, which no figure is made of.
SCOPE_COARSE_PCT = 10.0
IDLE_BUSY_PCT = 5.0
"""Idle GPUs show 0 %, those with an idle engine too (44 runs on H100 and H200); at 5 % idle power is too high by up to 5 % of a load's."""
POWER_CAPS = {"sw_power_cap", "hw_power_brake"}
HARMLESS = {"gpu_idle", "clocks_setting", "display_clock_setting", "sync_boost"}
"""Clock event reasons that are no sign of a device held below the clock that was set."""


def clocks_set(meter: Meter, windows: Sequence[Interval]) -> Iterator[Flag]:
    """A GPU whose clocks somebody had set before the run: the driver says so in half of the samples, and it never ran at its highest."""
    during, most_mhz = meter.samples_in(windows), meter.device.settings.get("max_sm_clock_mhz")
    clocks_mhz = [sample.sm_clock_mhz for sample in during if sample.sm_clock_mhz is not None]
    told = sum("clocks_setting" in (sample.throttle or ()) for sample in during)
    if not clocks_mhz or not most_mhz or 100 * told < CLOCKS_SET_PCT * len(during):
        return
    if max(clocks_mhz) < most_mhz - CLOCK_STEP_MHZ:
        yield Flag(
            "clocks-set",
            f"{meter.device.label}: its clocks were set before the run, it ran at {max(clocks_mhz):.0f} of {most_mhz:.0f} MHz at most: "
            "`sudo nvidia-smi -rgc` and `-rac` free them; else compare only with runs that had the same",
        )


def device_flags(meter: Meter, windows: Sequence[Interval]) -> Iterator[Flag]:
    """A device that was lost, counter and integral that differ by more than 3 %, a counter that jumped or stood still, power that stood
    still or was not read, short windows, throttling."""
    device, energy = meter.device, meter.energy_in(windows)
    gaps = [] if "device" in device.not_measured else meter.power_gaps(windows)
    if device.samples and (reason := device.not_measured.get("device")):
        last_s = device.samples[-1].t_s
        yield Flag(
            "device-lost",
            f"{device.label}: nothing could be read after {last_s:.0f} s of the run ({reason}): energy is not known from then on; "
            "`dmesg` says more (NVRM, Xid), and a GPU that fell off the bus needs a reset",
        )
    if energy.residual_pct is not None and abs(energy.residual_pct) > RESIDUAL_LIMIT_PCT:
        both = f"integral {energy.integral_j:.1f} J, counter {energy.counter_j:.1f} J"
        yield Flag("energy-residual", f"{device.label}: {both} ({energy.residual_pct:+.1f} %)")
    scopes = {f"{device.label}, {scope}": part for scope, part in meter.scopes_in(windows).items() if scope != "gpu"}
    parts: dict[str, EnergyWindow | PowerScope] = {device.label: energy, **scopes}
    for name, part in parts.items():
        coarse = f"{name}: the windows are short for how far its readings are apart"
        if part.uncertain_j is None:
            continue
        if part.energy_j is None:
            yield Flag("energy-coarse", f"{coarse}; energy is not given")
            continue
        share_pct = 100 * part.uncertain_j / part.energy_j if part.energy_j else 0.0
        if share_pct > (COARSE_PCT if part is energy else SCOPE_COARSE_PCT):
            yield Flag("energy-coarse", f"{coarse}; energy may be off by up to {share_pct:.0f} %")
    instead = "energy is not measured there" if energy.energy_j is None else "the integral stands in there"
    if energy.counter_resets:
        times = f"jumped {energy.counter_resets} times, back or by more than can be; {instead}"
        yield Flag("energy-counter-reset", f"{device.label}: the energy counter {times}")
    if energy.counter_still_s:
        stood = f"stood still for {energy.counter_still_s:.1f} s while the device drew power; {instead}"
        yield Flag("energy-counter-still", f"{device.label}: the energy counter {stood}")
    if energy.counter_j is None and energy.integral_j and (stood_s := meter.power_still_s(windows)) > POWER_STILL_S:
        yield Flag(
            "power-still",
            f"{device.label}: the power stood at one value for {stood_s:.0f} s and no energy counter checks it: its meter is not refreshed, "
            "do not trust its energy",
        )
    if (gaps_s := length_s(gaps)) > EDGE_S and (device.kind == "gpu" or not energy.counter_still_s):
        known = "energy is not known" if energy.energy_j is None else "energy is the counter's alone, nothing checks it"
        yield Flag(
            "power-gaps",
            f"{device.label}: no power was read for {gaps_s:.1f} s of the measured windows, from {gaps[0][0]:.0f} s of the run on: peaks and the energy of "
            f"phases there are not known; {known}",
        )
    for kind, busy_pct in device.idle_utilization_pct.items():
        if busy_pct is not None and busy_pct > IDLE_BUSY_PCT:
            yield Flag(
                "idle-busy",
                f"{device.label}: the GPU was busy for {busy_pct:.0f} % of the time in which its {kind} idle power was measured: that is too high, and what "
                "lies above idle too low; measure again while nobody computes there",
            )
    shortest_s = min((end - start for start, end in windows), default=0.0)
    if energy.energy_j is not None and shortest_s < SHORT_S:
        remedy = "raise --requests or --duration-s, or send a longer trace"
        short = f"a window of {shortest_s:.1f} s is short for energy, needs at least {SHORT_S:g} s: {remedy}"
        yield Flag("short-window", f"{device.label}: {short}")
    during = meter.samples_in(windows)
    reasons = Counter(reason for sample in during for reason in sample.throttle or () if reason not in HARMLESS)
    for reason, count in reasons.items():
        share_pct = 100 * count / len(during)
        if share_pct >= THROTTLED_PCT:
            yield Flag("throttled", f"{device.label}: {reason} in {share_pct:.0f} % of the samples")
