"""What a reader must know of a run's devices wherever its figures appear: throttled, too short for energy, meters that disagree.

Try: python -c "from pdbench.records import load_run as l; from pdbench.analysis.flags import device_flags as f; print(f(l('single_results')))"
"""

from collections import Counter
from collections.abc import Iterator

from pdbench.analysis.energy import energy_in, residual_flags
from pdbench.records import DeviceRecord, Flag, Interval, Run

SHORT_S = 30.0
"""Energy wants windows of at least this (MLPerf Power and ML.ENERGY ask for 30 s or more)."""
THROTTLED_PCT = 1.0
HARMLESS = {"gpu_idle", "clocks_setting", "display_clock_setting", "sync_boost"}
"""Clock event reasons that are no sign of a device held below what it was asked for."""


def device_flags(run: Run) -> list[Flag]:
    """Flags of all devices over the measured windows; none where nothing was measured."""
    windows = [(trial.start_s, trial.end_s) for trial in run.trials if trial.end_s > trial.start_s]
    return [flag for device in run.devices for flag in _of_device(device, windows)]


def _of_device(device: DeviceRecord, windows: list[Interval]) -> Iterator[Flag]:
    energy = energy_in(device, windows)
    yield from residual_flags(device, energy)
    shortest_s = min((end - start for start, end in windows), default=0.0)
    if energy.energy_j is not None and shortest_s < SHORT_S:
        detail = f"{device.id}: a window of {shortest_s:.1f} s is short for energy, {SHORT_S:g} s are asked for: more --requests"
        yield Flag("short-window", detail)
    inside = [one for one in device.samples if any(start <= one.t_s <= end for start, end in windows)]
    reasons = Counter(reason for one in inside for reason in one.throttle or () if reason not in HARMLESS)
    for reason, count in reasons.items():
        share_pct = 100 * count / len(inside)
        if share_pct >= THROTTLED_PCT:
            yield Flag("throttled", f"{device.id}: {reason} in {share_pct:.0f} % of the samples")
