"""A device's power over time, from its samples and the driver's buffer, and the joules below it."""

import numpy as np

from pdbench.analysis.metrics import Array
from pdbench.records import DeviceRecord, Interval

EDGE_S, HOLE_S = 0.25, 1.0


class Curve:
    """Power over time as straight lines between points; energy is their area. `missing`: where points are missing, a hole
    inside, or more than a moment before the first and after the last one."""

    def __init__(self, points: Array) -> None:
        self.t, self.w = points.T
        steps = np.diff(self.t)
        self.area = np.concatenate([[0.0], np.cumsum(steps * (self.w[1:] + self.w[:-1]) / 2)])
        hole_s = max(HOLE_S, 3 * float(np.median(steps))) if len(steps) else HOLE_S
        self.missing: list[Interval] = [(-np.inf, np.inf)]
        if len(steps):
            holes = np.flatnonzero(steps > hole_s)
            self.missing = [
                (-np.inf, float(self.t[0]) - EDGE_S),
                *zip(self.t[holes].tolist(), self.t[holes + 1].tolist(), strict=True),
                (float(self.t[-1]) + EDGE_S, np.inf),
            ]

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two instants, the edges interpolated; None where points are missing."""
        if any(missing_start < end and start < missing_end for missing_start, missing_end in self.missing):
            return None
        return self._until(end) - self._until(start)

    def between_j(self, t: Array) -> Array:
        """About the joules between each instant and the next, for a check; NaN where points are missing."""
        if len(self.t) < 2:
            return np.full(max(len(t) - 1, 0), np.nan)
        drawn_j = np.diff(np.interp(t, self.t, self.area, left=np.nan, right=np.nan))
        for start, end in self.missing:
            drawn_j[(t[:-1] < end) & (t[1:] > start)] = np.nan
        return drawn_j

    def _until(self, t: float) -> float:
        i = max(int(np.searchsorted(self.t, t, side="right")) - 1, 0)
        power = self.w[i]
        if self.t[0] < t < self.t[-1]:
            power = self.w[i] + (self.w[i + 1] - self.w[i]) * (t - self.t[i]) / (self.t[i + 1] - self.t[i])
        return float(self.area[i] + (t - self.t[i]) * (self.w[i] + power) / 2)


def sampled(device: DeviceRecord, field: str) -> Array:
    """Rows of (t_s, value) of a field of the samples, where it was measured."""
    points = [(sample.t_s, value) for sample in device.samples if (value := getattr(sample, field)) is not None]
    return np.array(sorted(points), dtype=float).reshape(-1, 2)


def power_curve(device: DeviceRecord) -> Array:
    """Rows of (t_s, power_w): the driver's own buffer where it reaches, the samples elsewhere; repeated values stay in.

    An entry of the buffer is taken as the mean of the time since the entry before, so it stands in the middle of that time.
    A device without instant power gives its average power instead.
    """
    instant = sampled(device, "power_w")
    samples = instant if len(instant) else sampled(device, "power_average_w")
    if len(device.fine_power) < 2:
        return samples
    fine = np.array(sorted(device.fine_power), dtype=float)
    step_s = float(np.median(np.diff(fine[:, 0])))
    fine[:, 0] -= step_s / 2
    place = np.searchsorted(fine[:, 0], samples[:, 0])
    edges = np.concatenate([[-np.inf], fine[:, 0], [np.inf]])
    far = np.minimum(samples[:, 0] - edges[place], edges[place + 1] - samples[:, 0]) > 3 * step_s
    merged = np.concatenate([fine, samples[far]])
    return merged[np.argsort(merged[:, 0], kind="stable")]
