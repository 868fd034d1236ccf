"""A device's power over time, from its samples and the driver's buffer, and the joules below it."""

import numpy as np

from pdbench.analysis.metrics import Array, BoolArray
from pdbench.records import DeviceRecord, Interval

EDGE_S, HOLE_S = 0.25, 1.0
"""The first and the last power hold for so long beyond them; points this far apart have a hole between them."""
FAR = 3.0
"""Steps of the driver's buffer: samples this far from its entries are points of the curve, too."""
FEWEST_MOVES = 20
"""So many moves of the power tell how often its meter is refreshed."""
AVERAGED_S = 1.0
"""What a device's average power is of, by NVML's documentation: the time before it."""


class Curve:
    """Power over time as straight lines between points; energy is their area. `missing`: where points are missing, a hole
    inside, or more than a moment before the first and after the last one. `means_s`: each point is the mean of so long (0: it is of an instant).
    Between instants power may have been anything up to `most_w`, within the device's own means of a second up to the highest that was read.
    `reads` has rows of (t_s, read_s) of the samples, which are of any instant of their reading.
    """

    def __init__(self, points: Array, means_s: float, reads: Array, most_w: float = 0.0) -> None:
        self.t, self.w = points.T
        self._means_s = means_s
        self._span_w = float(np.ptp(self.w)) if len(self.w) else 0.0
        self._stands_s = stands_s(points)
        self._most_w = float(np.max(self.w, initial=0.0 if means_s >= AVERAGED_S else most_w))
        self._read_t, self._read_s = reads.T
        steps = np.diff(self.t)
        self.area = np.concatenate([[0.0], np.cumsum(steps * (self.w[1:] + self.w[:-1]) / 2)])
        self._hole_s = max(HOLE_S, 3 * float(np.median(steps))) if len(steps) else HOLE_S
        self.missing: list[Interval] = [(-np.inf, np.inf)]
        if len(steps):
            holes = np.flatnonzero(steps > self._hole_s)
            self.missing = [
                (-np.inf, float(self.t[0]) - EDGE_S),
                *zip(self.t[holes].tolist(), self.t[holes + 1].tolist(), strict=True),
                (float(self.t[-1]) + EDGE_S, np.inf),
            ]
        # As beyond the ends: what a moment before or after a hole was read holds a little into it.
        self._unknown = [
            (start, end) if np.isinf(end - start) else (start + EDGE_S, end - EDGE_S) for start, end in self.missing
        ]

    def uncertain_j(self, at_s: Array, known_s: Array | float = np.inf) -> Array:
        """For each instant, how many joules may lie on the other side of it than the lines say, at most: where between two points the
        power jumped is not known; a counter was read within `known_s`. Between means of the driver's buffer the jump may be as high as the powers
        differ that were ever read; between instants power may go up to the highest limit and back, within means of a second down to 0."""
        if len(self.t) < 2:
            return np.full(len(at_s), np.inf)
        place = np.clip(np.searchsorted(self.t, at_s, side="right"), 1, len(self.t) - 1)
        before_s, after_s = self.t[place - 1], self.t[place]
        instants = self.between_instants(at_s)
        # Means keep the joules of a jump, and a straight line is off by a quarter of it at most; by half between two instants.
        within_s = np.where(instants, (after_s - before_s) / 2, np.maximum(after_s - before_s, self._means_s) / 4)
        beyond_s = np.minimum(np.abs(at_s - before_s), np.abs(after_s - at_s))
        alone = (after_s - before_s > self._hole_s) | (at_s < before_s) | (at_s > after_s)
        # What is read may be as old as the meter's refresh: a late curve has a window's first jump late and the jump at its end in time.
        late_j = self._span_w * np.minimum(self._stands_s / 2, known_s)
        of_samples = instants | (self._means_s >= AVERAGED_S)
        unsure_s = np.where(alone, beyond_s, within_s) + np.where(of_samples, self._reading_s(at_s) / 2, 0.0)
        return late_j + np.where(of_samples, self._most_w, self._span_w) * np.minimum(unsure_s, known_s)

    def _reading_s(self, at_s: Array) -> Array:
        """How long, at most, the readings around each instant took."""
        if not len(self._read_t):
            return np.zeros(len(at_s))
        place = np.searchsorted(self._read_t, at_s)
        return np.max([self._read_s[np.clip(place + step, 0, len(self._read_t) - 1)] for step in (-1, 0, 1)], axis=0)

    def between_instants(self, at_s: Array) -> BoolArray:
        """Are the points around each instant themselves of instants: samples, where the driver's buffer does not reach?"""
        if len(self.t) < 2:
            return np.zeros(len(at_s), dtype=bool)
        place = np.clip(np.searchsorted(self.t, at_s, side="right"), 1, len(self.t) - 1)
        return np.asarray(self.t[place] - self.t[place - 1] > FAR * self._means_s)

    def unseen_j(self, lengths_s: Array) -> Array:
        """What may have been drawn in so long without any of the points showing it: up to the limit from one of them to the next."""
        apart_s = float(np.median(np.diff(self.t))) if len(self.t) > 1 else 0.0
        return self._most_w * np.minimum(lengths_s, apart_s)

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two instants, the edges interpolated; None where points are missing."""
        if any(unknown_start < end and start < unknown_end for unknown_start, unknown_end in self._unknown):
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
            apart_s = self.t[i + 1] - self.t[i]
            if apart_s > self._hole_s:  # from one end of a hole nothing leads to the other
                if self.t[i + 1] - t < t - self.t[i]:
                    return float(self.area[i + 1] - (self.t[i + 1] - t) * self.w[i + 1])
            else:
                power = self.w[i] + (self.w[i + 1] - self.w[i]) * (t - self.t[i]) / apart_s
        return float(self.area[i] + (t - self.t[i]) * (self.w[i] + power) / 2)


def stands_s(points: Array) -> float:
    """How long a meter's power stands before it is refreshed, where it is read more often than that; else 0. Nine in ten times it stands
    at least so long: an idle GPU may draw the same for longer. Powers that come back to the digit are a script's or rounded: they tell nothing."""
    t, w = points.T
    moves = np.flatnonzero(np.diff(w)) + 1
    if len(moves) < FEWEST_MOVES or len(np.unique(w[moves])) < len(moves) / 2:
        return 0.0
    stood_s, step_s = float(np.quantile(np.diff(t[moves]), 0.1)), float(np.median(np.diff(t)))
    return stood_s if stood_s > 1.5 * step_s else 0.0


def sampled(device: DeviceRecord, field: str) -> Array:
    """Rows of (t_s, value) of a field of the samples, where it was measured."""
    points = [(sample.t_s, value) for sample in device.samples if (value := getattr(sample, field)) is not None]
    return np.array(sorted(points), dtype=float).reshape(-1, 2)


def power_curve(device: DeviceRecord) -> Array:
    """Rows of (t_s, power_w): the driver's own buffer where it reaches, the samples elsewhere; repeated values stay in.

    An entry of the buffer is taken as the mean of the time since the entry before, so it stands in the middle of that time.
    A device without instant power gives its average power instead, which stands in the middle of its second, too.
    """
    samples = sampled(device, "power_w")
    if not len(samples) and len(samples := sampled(device, "power_average_w")):
        return _in_the_middle(samples)
    if len(device.fine_power) < 2:
        return samples
    fine = np.array(sorted(device.fine_power), dtype=float)
    step_s = fine_step_s(device)
    fine[:, 0] -= step_s / 2
    place = np.searchsorted(fine[:, 0], samples[:, 0])
    edges = np.concatenate([[-np.inf], fine[:, 0], [np.inf]])
    far = np.minimum(samples[:, 0] - edges[place], edges[place + 1] - samples[:, 0]) > FAR * step_s
    merged = np.concatenate([fine, samples[far]])
    return merged[np.argsort(merged[:, 0], kind="stable")]


def _in_the_middle(averages: Array) -> Array:
    """Averages, each in the middle of its time; nothing tells the last half of a second better than the last one."""
    return np.concatenate([averages - [AVERAGED_S / 2, 0.0], averages[-1:]])


def scope_of(device: DeviceRecord, field: str) -> Curve:
    """The curve of a superchip's power beyond the GPU's, of which some drivers give an average alone."""
    points = sampled(device, field)
    averages = bool(device.settings.get(f"{field}_averaged")) and len(points) > 0
    means_s = AVERAGED_S if averages else 0.0
    return Curve(_in_the_middle(points) if averages else points, means_s, sampled(device, "read_s"))


def fine_step_s(device: DeviceRecord) -> float:
    """How far the entries of the driver's buffer are apart; 0 without one."""
    times = np.array(sorted(t_s for t_s, _ in device.fine_power))
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def curve_of(device: DeviceRecord) -> Curve:
    averages = not any(sample.power_w is not None for sample in device.samples)
    means_s = AVERAGED_S if averages else fine_step_s(device)
    return Curve(power_curve(device), means_s, sampled(device, "read_s"), highest_limit_w(device))


def highest_limit_w(device: DeviceRecord) -> float:
    """The highest power limit that it had, or has by default; 0 where none is known."""
    limits_w = [sample.power_limit_w for sample in device.samples if sample.power_limit_w is not None]
    return max([*limits_w, device.default_power_limit_w or 0.0])
