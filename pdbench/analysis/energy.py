"""Energy of one device over windows of time: its own counter, the integral of its power beside it, and how they differ.

Try: python -c "
from pdbench.records import load_run; from pdbench.analysis.energy import energy_over
for device in load_run('disaggregated_results').devices: print(device.id, energy_over(device, 0.0, 1.0))"
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pdbench.records import DeviceRecord, Flag, Interval

RESIDUAL_LIMIT_PCT = 3.0
EDGE_S = 0.25
HOLE_S = 1.0

Floats = npt.NDArray[np.float64]


class EnergyWindow(msgspec.Struct, frozen=True, kw_only=True):
    """What one device used in `duration_s` seconds of windows between `start_s` and `end_s`; None where not measured.

    `counter_j` comes from the device's energy counter, `integral_j` from its power curve, `residual_pct` is
    100 (integral - counter) / counter, `mean_power_w` is `energy_j` over the duration.
    `counter_resets` counts the counter's jumps backwards; the integral stands in for those stretches.
    """

    start_s: float
    end_s: float
    duration_s: float
    counter_j: float | None
    integral_j: float | None
    residual_pct: float | None
    mean_power_w: float | None
    counter_resets: int = 0

    @property
    def energy_j(self) -> float | None:
        """The counter's figure where there is one, else the integral."""
        return self.integral_j if self.counter_j is None else self.counter_j


def energy_over(device: DeviceRecord, start_s: float, end_s: float) -> EnergyWindow:
    """The energy of `device` between two instants of the run's clock."""
    return energy_in(device, [(start_s, end_s)])


def energy_in(device: DeviceRecord, windows: Sequence[Interval]) -> EnergyWindow:
    """The energy of `device` in all `windows` together; overlapping windows count once. No window is an energy of 0 J."""
    return Meter(device).energy_in(windows)


class Meter:
    """A device's readings made ready once, for asking about many windows."""

    def __init__(self, device: DeviceRecord) -> None:
        self._curve = _Curve(power_curve(device))
        self._counter = _Counter(counter_readings(device), self._curve)

    def energy_in(self, windows: Sequence[Interval]) -> EnergyWindow:
        """As the function of this name."""
        windows, curve, counter = merge(windows), self._curve, self._counter
        duration_s = sum(end - start for start, end in windows)
        integral_j = _total([curve.energy_j(start, end) for start, end in windows])
        counter_j = _total([counter.energy_j(start, end) for start, end in windows])
        energy_j = integral_j if counter_j is None else counter_j
        residual = None if counter_j is None or integral_j is None or counter_j <= 0 else integral_j / counter_j - 1
        return EnergyWindow(
            start_s=windows[0][0] if windows else 0.0,
            end_s=windows[-1][1] if windows else 0.0,
            duration_s=duration_s,
            counter_j=counter_j,
            integral_j=integral_j,
            residual_pct=None if residual is None else 100 * residual,
            mean_power_w=None if energy_j is None or duration_s <= 0 else energy_j / duration_s,
            counter_resets=sum(counter.resets_in(start, end) for start, end in windows),
        )


def active_and_idle_j(window: EnergyWindow, idle_power_w: float | None) -> tuple[float | None, float | None]:
    """(active, idle) joules: idle is what the device draws with its engine ready and no request, active what lies above."""
    if window.energy_j is None or idle_power_w is None:
        return None, None
    idle_j = min(idle_power_w * window.duration_s, window.energy_j)
    return window.energy_j - idle_j, idle_j


def residual_flags(device: DeviceRecord, window: EnergyWindow) -> list[Flag]:
    """A flag where counter and integral differ by more than 3 %, and one where the counter was reset."""
    flags = []
    if window.residual_pct is not None and abs(window.residual_pct) > RESIDUAL_LIMIT_PCT:
        detail = f"{device.id}: integral {window.integral_j:.1f} J, counter {window.counter_j:.1f} J ({window.residual_pct:+.1f} %)"
        flags.append(Flag("energy-residual", detail))
    if window.counter_resets:
        detail = (
            f"{device.id}: the energy counter jumped back {window.counter_resets} times; the integral stands in there"
        )
        flags.append(Flag("energy-counter-reset", detail))
    return flags


def merge(windows: Sequence[Interval]) -> list[Interval]:
    """The same instants as sorted windows that do not overlap; empty and reversed windows fall away."""
    merged: list[Interval] = []
    for start, end in sorted((start, end) for start, end in windows if end > start):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def power_curve(device: DeviceRecord) -> list[tuple[float, float]]:
    """(t_s, power_w): the driver's own buffer where it reaches, the samples elsewhere; repeated values stay in.

    An entry of the buffer is taken as the mean of the time since the entry before, so it stands in the middle of that time.
    A device without instant power gives its average power instead.
    """
    field = "power_w" if any(sample.power_w is not None for sample in device.samples) else "power_average_w"
    samples = [(sample.t_s, power) for sample in device.samples if (power := getattr(sample, field)) is not None]
    fine = sorted(device.fine_power)
    if len(fine) < 2:
        return sorted(samples)
    step_s = float(np.median(np.diff([t for t, _ in fine])))
    fine = [(t - step_s / 2, power) for t, power in fine]
    times = np.array([t for t, _ in fine])
    reach_s = 3 * step_s
    nearest = np.searchsorted(times, [t for t, _ in samples])
    after = np.append(times, np.inf)[nearest]
    before = np.append(-np.inf, times)[nearest]
    outside = [
        point
        for point, near, far in zip(samples, before, after, strict=True)
        if min(point[0] - near, far - point[0]) > reach_s
    ]
    return sorted(fine + outside)


def counter_readings(device: DeviceRecord) -> list[tuple[float, float]]:
    """(t_s, energy_j): the counter's readings on its own refreshes where the sampler caught them, else those of the samples."""
    if len(device.energy_ticks) >= 2:
        return sorted(device.energy_ticks)
    return sorted((sample.t_s, sample.energy_j) for sample in device.samples if sample.energy_j is not None)


class _Curve:
    """Power over time as straight lines between points; energy is their area."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.t: Floats = np.array([t for t, _ in points], dtype=float)
        self.w: Floats = np.array([w for _, w in points], dtype=float)
        steps = np.diff(self.t)
        self.area: Floats = (
            np.concatenate([[0.0], np.cumsum(steps * (self.w[1:] + self.w[:-1]) / 2)]) if len(points) else self.t
        )
        self.hole_s = max(HOLE_S, 3 * float(np.median(steps))) if len(steps) else HOLE_S
        self.holes = [(self.t[i], self.t[i + 1]) for i in np.flatnonzero(steps > self.hole_s)]

    def covers(self, start: float, end: float) -> bool:
        """Are there points all along, with no hole and at most a moment missing at either edge?"""
        if len(self.t) < 2 or start < self.t[0] - EDGE_S or end > self.t[-1] + EDGE_S:
            return False
        return not any(a < end and start < b for a, b in self.holes)

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two instants, the edges interpolated; None where the curve does not reach."""
        return self._until(end) - self._until(start) if self.covers(start, end) else None

    def _until(self, t: float) -> float:
        if t <= self.t[0]:
            return float((t - self.t[0]) * self.w[0])
        if t >= self.t[-1]:
            return float(self.area[-1] + (t - self.t[-1]) * self.w[-1])
        i = int(np.searchsorted(self.t, t, side="right")) - 1
        power = self.w[i] + (self.w[i + 1] - self.w[i]) * (t - self.t[i]) / (self.t[i + 1] - self.t[i])
        return float(self.area[i] + (t - self.t[i]) * (self.w[i] + power) / 2)


class _Counter:
    """The energy counter between its readings: each stretch's joules are spread in time as the power curve is shaped."""

    def __init__(self, readings: Sequence[tuple[float, float]], curve: _Curve) -> None:
        self.t: Floats = np.array([t for t, _ in readings], dtype=float)
        self.curve = curve
        self.steps = np.diff(np.array([j for _, j in readings], dtype=float))
        self.beyond_s = 1.5 * float(np.median(np.diff(self.t))) if len(self.t) > 1 else 0.0
        self.resets: Floats = self.t[1:][self.steps < 0] if len(self.steps) else self.t[:0]

    def resets_in(self, start: float, end: float) -> int:
        """How often the counter jumped back between two instants."""
        return int(np.count_nonzero((self.resets > start) & (self.resets <= end)))

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two instants; None where the counter was not read around them."""
        if len(self.t) < 2:
            return None
        if start < self.t[0] - self.beyond_s or end > self.t[-1] + self.beyond_s:
            return None
        first = max(int(np.searchsorted(self.t, start, side="right")) - 1, 0)
        last = min(int(np.searchsorted(self.t, end, side="left")), len(self.t) - 1)
        inside = [self._stretch_j(i, start, end) for i in range(first, max(last, first + 1)) if i < len(self.steps)]
        return _total(
            [*inside, self._beyond_j(start, min(end, self.t[0])), self._beyond_j(max(start, self.t[-1]), end)]
        )

    def _stretch_j(self, i: int, start: float, end: float) -> float | None:
        """The part of the stretch between readings i and i + 1 that lies in the window."""
        low, high = self.t[i], self.t[i + 1]
        a, b = max(start, low), min(end, high)
        if b <= a:
            return 0.0
        if a == low and b == high and self.steps[i] >= 0:
            return float(self.steps[i])
        part, whole = self.curve.energy_j(a, b), self.curve.energy_j(low, high)
        if self.steps[i] < 0:
            return part
        share = (b - a) / (high - low) if part is None or not whole else part / whole
        return float(self.steps[i] * share)

    def _beyond_j(self, start: float, end: float) -> float | None:
        """What lies before the first or after the last reading: no more than a stretch, from the curve."""
        return 0.0 if end <= start else self.curve.energy_j(start, end)


def _total(parts: Sequence[float | None]) -> float | None:
    """The sum, or None when a part is not measured: a total with a piece missing is no total."""
    known = [part for part in parts if part is not None]
    return float(sum(known)) if len(known) == len(parts) else None
