"""One device's joules over windows of time: those of its energy counter, and the area of its power curve beside them."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from pdbench.analysis.intervals import difference, intersection, length_s, union
from pdbench.analysis.metrics import Array, BoolArray, inside, per, total
from pdbench.analysis.power_curve import HOLE_S, Curve, curve_of, highest_limit_w, sampled, scope_of
from pdbench.records import DeviceRecord, DeviceSample, Interval

STANDS_STILL, READS_ZERO = "the energy counter stands still", "the power reads 0 W, which no GPU draws"
UNKNOWN_SHARE = 0.01
"""Of a window's joules: up to this may lie in holes that its edges cut, where only a hole's total is known. It bounds the error."""
COARSE = "the windows are too short for readings so far apart"
REFUSED_SHARE = 0.5
"""Of a window's joules: where so many may lie on the other side of its edges, there is no energy."""
STILL_S = 1.0
"""A counter that rests this long, and longer than it usually does between two moves, stands still: every device draws power."""
JUMP, CREEP, MOST_W = 3.0, 10.0, 10_000.0
"""A step is a jump from this many times its usual share of the power curve's joules on, or above this power. A counter that gets
less than a tenth of the curve's joules stands still."""


class EnergyWindow(msgspec.Struct, frozen=True, kw_only=True):
    """What one device used in `duration_s` seconds of windows; None where it was not measured all along.

    `energy_j` is `counter_j` where there is a counter, else `integral_j`, the area of the power curve; `residual_pct` is
    100 (integral - counter) / counter. The integral stands in where the counter jumped (`counter_resets` times; back, or by more
    than the device can have used) and where it stood still (`counter_still_s` seconds). A counter that never counts is none, nor
    is one that says only of a longer time what was used: a window's edge lies in a hole of readings and curve (UNKNOWN_SHARE).

    `uncertain_j`: so many joules at most may lie on the other side of the windows' edges, which fall between readings; where that is
    over half of the energy, there is none (REFUSED_SHARE).
    """

    duration_s: float
    energy_j: float | None
    counter_j: float | None
    integral_j: float | None
    residual_pct: float | None
    mean_power_w: float | None
    counter_resets: int = 0
    counter_still_s: float = 0.0
    uncertain_j: float | None = None


class PowerScope(msgspec.Struct, frozen=True, kw_only=True):
    """Power and energy of a part of a GPU's board, or of the board with more around it; `uncertain_j` as of an `EnergyWindow`."""

    mean_power_w: float | None
    energy_j: float | None
    uncertain_j: float | None = None


class Meter:
    """A device's power curve and energy counter prepared once, for the energy of many windows."""

    def __init__(self, device: DeviceRecord) -> None:
        self.device = device
        self._curve = curve_of(device)
        wider = {"module": "module_power_w", "memory": "memory_power_w"}
        curves = {scope: scope_of(device, field) for scope, field in wider.items()}
        self._scopes = {scope: curve for scope, curve in curves.items() if len(curve.t)}
        # The counter on its own refreshes where the sampler caught them, else as the samples have it.
        ticks = np.array(sorted(device.energy_ticks), dtype=float).reshape(-1, 2)
        readings = ticks if len(ticks) > 1 else sampled(device, "energy_j")
        self._t: Array = readings[:, 0]
        self._steps = np.diff(readings[:, 1])
        wrong, self._resets, self._still = _doubtful(self._t, self._steps, self._curve)
        for i in np.flatnonzero(wrong):  # the curve tells the joules there; none at all are no reading
            self._steps[i] = self._curve.energy_j(self._t[i], self._t[i + 1]) or np.nan
        if wrong.all():
            self._t = self._t[:0]
        else:
            self._t, self._steps = _moves(self._t, self._steps, wrong)
        self._beyond_s, self._unknown = 0.0, np.zeros(len(self._steps), dtype=bool)
        if len(self._t) > 1:
            passed_s = np.diff(self._t)
            self._beyond_s = 1.5 * float(np.median(passed_s))
            # Ticks are caught now and then, the closest ones one refresh apart.
            usual_s = float(passed_s.min() if len(ticks) > 1 else np.median(passed_s))
            self._t, self._steps, self._unknown = _around_holes(
                self._t, self._steps, self._curve, max(HOLE_S, 3 * usual_s)
            )
        self._total = np.concatenate([[0.0], np.nancumsum(self._steps)])
        # Summary, flags and scopes ask for the same windows.
        self._energies: dict[tuple[Interval, ...], EnergyWindow] = {}
        self._most_w = highest_limit_w(device) or MOST_W
        self._tick_error_s = (device.sampling.get("energy_tick_error_ms") or 0.0) / 1e3 if len(ticks) > 1 else 0.0

    def whole(self) -> list[Interval]:
        """The time from the counter's first reading to its last one, or the power curve's where there is no counter, without that in which
        no power was read (between turns others may use the device); empty without either."""
        t = self._t if len(self._t) > 1 else self._curve.t
        span = [(float(t[0]), float(t[-1]))] if len(t) > 1 else []
        return difference(span, self._curve.missing) if len(self._curve.t) > 1 else span

    def energy_in(self, windows: Sequence[Interval]) -> EnergyWindow:
        """The energy in all `windows` together; overlapping windows count once. No window is an energy of 0 J."""
        key = tuple(union(windows))
        if key not in self._energies:
            self._energies[key] = self._energy_in(key)
        return self._energies[key]

    def _energy_in(self, windows: Sequence[Interval]) -> EnergyWindow:
        duration_s = length_s(windows)
        still_s = length_s(intersection(self._still, windows))
        integral_j = total([self._curve.energy_j(start, end) for start, end in windows])
        if (still_s and self.device.kind != "gpu") or (windows and not integral_j and self.device.kind == "gpu"):
            integral_j = None  # RAPL's power is its counter's slope; no GPU draws 0 W
        counter_j = total([self._counter_j(start, end) for start, end in windows])
        if still_s > 0.99 * duration_s:
            counter_j = None
        if counter_j is not None and self._unknown_j(windows) > UNKNOWN_SHARE * counter_j:
            counter_j = None
        energy_j = integral_j if counter_j is None else counter_j
        uncertain_j = None if energy_j is None else self._uncertain_j(windows, is_counted=counter_j is not None)
        if energy_j is not None and uncertain_j is not None and uncertain_j > REFUSED_SHARE * energy_j:
            energy_j = counter_j = integral_j = None
        residual_pct = None
        if counter_j is not None and integral_j is not None and counter_j > 0:
            residual_pct = 100 * (integral_j / counter_j - 1)
        return EnergyWindow(
            duration_s=duration_s,
            energy_j=energy_j,
            counter_j=counter_j,
            integral_j=integral_j,
            residual_pct=residual_pct,
            mean_power_w=per(energy_j, duration_s),
            counter_resets=int(np.count_nonzero(inside(self._resets, windows))),
            counter_still_s=still_s,
            uncertain_j=uncertain_j,
        )

    def scopes_in(self, windows: Sequence[Interval]) -> dict[str, PowerScope]:
        """What the device's figures are of, a GPU, and the joules of the superchip's module and of its memory where it has these meters."""
        if self.device.kind != "gpu":
            return {}
        windows, own = union(windows), self.energy_in(windows)
        scopes = {"gpu": PowerScope(mean_power_w=own.mean_power_w, energy_j=own.energy_j, uncertain_j=own.uncertain_j)}
        for scope, curve in self._scopes.items():
            joules, uncertain_j = total([curve.energy_j(start, end) for start, end in windows]), None
            if joules is not None:
                uncertain_j = float(curve.uncertain_j(self._inner_edges(windows)).sum())
                joules = None if uncertain_j > REFUSED_SHARE * joules else joules
            mean_w = per(joules, length_s(windows))
            scopes[scope] = PowerScope(mean_power_w=mean_w, energy_j=joules, uncertain_j=uncertain_j)
        return scopes

    def power_still_s(self, windows: Sequence[Interval]) -> float:
        """For how long, at most, the power stood at one value in the windows, to the last digit."""
        here = inside(self._curve.t, windows)
        t, w = self._curve.t[here], self._curve.w[here]
        if not len(t):
            return 0.0
        edges = np.concatenate([[0], np.flatnonzero(np.diff(w)) + 1, [len(w)]])
        return float(np.max(t[edges[1:] - 1] - t[edges[:-1]]))

    def power_gaps(self, windows: Sequence[Interval]) -> list[Interval]:
        """Where in the windows no power was read; none of a device that never gave any."""
        return intersection(windows, self._curve.missing) if len(self._curve.t) > 1 else []

    def why_silent(self, windows: Sequence[Interval]) -> str | None:
        """Why there is no energy though readings came: the counter, which is all there is, does not count, or the power reads 0 W."""
        energy = self.energy_in(windows)
        if energy.energy_j is None and energy.counter_still_s > 0:
            return STANDS_STILL
        if energy.energy_j is None and energy.uncertain_j is not None:
            return COARSE
        zero = self.device.kind == "gpu" and len(self._curve.w) > 0 and not self._curve.w.any()
        return READS_ZERO if energy.energy_j is None and zero else None

    def samples_in(self, windows: Sequence[Interval]) -> list[DeviceSample]:
        here = inside(np.array([sample.t_s for sample in self.device.samples], dtype=float), windows)
        return [sample for sample, is_here in zip(self.device.samples, here, strict=True) if is_here]

    def _counter_j(self, start: float, end: float) -> float | None:
        """The counter's joules between two instants; None where it was not read around them."""
        t = self._t
        if len(t) < 2 or start < t[0] - self._beyond_s or end > t[-1] + self._beyond_s:
            return None
        first = int(np.clip(np.searchsorted(t, start, side="right") - 1, 0, len(t) - 2))
        last = int(np.clip(np.searchsorted(t, end, side="left") - 1, 0, len(t) - 2))
        if np.isnan(self._steps[first : last + 1]).any():
            return None
        parts: list[float | None] = [self._counted_j(last, end) - self._counted_j(first, start)]
        # Beyond the first and the last reading lies no more than a stretch: the curve tells it.
        parts += [self._curve.energy_j(start, min(end, t[0]))] if start < t[0] else []
        parts += [self._curve.energy_j(max(start, t[-1]), end)] if end > t[-1] else []
        return total(parts)

    def _uncertain_j(self, windows: Sequence[Interval], *, is_counted: bool) -> float:
        """The joules that may lie on the other side of the windows' edges, at most; those of holes are in `_unknown_j`. Beyond the record's own
        edges nothing was read that could belong inside."""
        edges = self._inner_edges(windows)
        by_curve = self._curve.uncertain_j(edges)
        if not is_counted or not windows:
            return float(by_curve.sum())
        place = np.clip(np.searchsorted(self._t, edges, side="right") - 1, 0, len(self._t) - 2)
        joules, after_s, before_s = self._steps[place], edges - self._t[place], self._t[place + 1] - edges
        # Spread evenly; in truth between all of a step's joules as early as the highest power allows, and as late.
        spread_j = joules * after_s / np.maximum(after_s + before_s, 1e-9)
        early_j, late_j = np.minimum(joules, self._most_w * after_s), np.maximum(0.0, joules - self._most_w * before_s)
        even_j = np.maximum(early_j - spread_j, spread_j - late_j)
        shaped_j = self._curve.uncertain_j(edges, np.minimum(after_s, before_s))
        drawn_j = {i: self._curve.energy_j(self._t[i], self._t[i + 1]) for i in np.unique(place).tolist()}
        shaped = np.array([bool(drawn_j[i]) for i in place.tolist()], dtype=bool)
        bounds = np.where(shaped, shaped_j, even_j)
        bounds[self._unknown[place]] = 0.0
        outside = (edges < self._t[0]) | (edges > self._t[-1])
        # What the counter has of a step beyond (or below) what samples saw of it may lie on either side of the edges.
        sampled_alone = shaped & ~outside & ~self._unknown[place] & self._curve.between_instants(edges)
        unseen_j = 0.0
        if self.device.kind == "gpu":  # RAPL's power is its counter's slope
            cut = np.unique(place[sampled_alone]).tolist()
            unseen_j = sum(abs(float(self._steps[i]) - (drawn_j[i] or 0.0)) for i in cut)
        return float(np.where(outside, by_curve, bounds).sum()) + unseen_j + self._misplaced_j(windows)

    def _inner_edges(self, windows: Sequence[Interval]) -> Array:
        """The windows' edges that are not those of the record itself."""
        edges = np.array(windows, dtype=float).ravel()
        return edges[~np.isin(edges, np.array(self.whole()))]

    def _misplaced_j(self, windows: Sequence[Interval]) -> float:
        """What the windows gain or lose where the counter's readings are not quite at the moves: a shifted one gives joules of the step before to the
        one after, and counts by how unequal these steps' shares in the windows are."""
        edges, curve = np.array(windows, dtype=float).ravel(), self._curve
        t, area = (curve.t, curve.area) if len(curve.t) > 1 else (self._t, self._t)
        at_edges, at_steps = np.interp(edges, t, area), np.interp(self._t, t, area)
        before = np.searchsorted(edges, self._t, side="right")
        full = np.concatenate([[0.0], np.cumsum(at_edges[1::2] - at_edges[::2])])
        since = np.where(before % 2, at_steps - at_edges[np.maximum(before - 1, 0)], 0.0)
        shares = np.diff(full[before // 2] + since) / np.maximum(np.diff(at_steps), 1e-9)
        highest_w = float(curve.w.max(initial=0.0)) or float(np.nanmax(self._steps / np.diff(self._t)))
        return self._tick_error_s * highest_w * float(np.abs(np.diff(shares, prepend=0.0, append=0.0)).sum())

    def _unknown_j(self, windows: Sequence[Interval]) -> float:
        """The joules of holes in which an edge of the windows lies."""
        edges = np.array(windows, dtype=float).ravel()
        place = np.searchsorted(self._t, edges)
        within = (place > 0) & (place < len(self._t)) & (place == np.searchsorted(self._t, edges, side="right"))
        cut = np.unique(place[within] - 1)
        return float(self._steps[cut][self._unknown[cut]].sum())

    def _counted_j(self, i: int, t: float) -> float:
        """Joules from the first reading to an instant in (or beyond) the stretch after reading i, spread as the curve is shaped."""
        low, high = self._t[i], self._t[i + 1]
        t = min(t, high)
        if t <= low:
            return float(self._total[i])
        part, whole = self._curve.energy_j(low, t), self._curve.energy_j(low, high)
        share = (t - low) / (high - low) if part is None or not whole else part / whole
        return float(self._total[i] + self._steps[i] * share)


def mean_powers_w(energy: EnergyWindow, scopes: dict[str, PowerScope]) -> dict[str, float | None]:
    """The mean of each field of the samples that is a power, by what a meter says of some windows."""
    return {"power_w": energy.mean_power_w} | {f"{scope}_power_w": part.mean_power_w for scope, part in scopes.items()}


def with_mean_power(device: DeviceRecord) -> DeviceRecord:
    """The device with the mean of its powers over the whole record in `statistics`: energy over time, as in every window. Samples of a load
    whose period is a multiple of theirs all meet one phase of it."""
    meter = Meter(device)
    whole = meter.whole()
    means = mean_powers_w(meter.energy_in(whole), meter.scopes_in(whole))
    if "power_w" not in device.statistics:  # the average is all that the device gives
        means["power_average_w"] = means["power_w"]
    statistics = {
        field: {**figures, "avg": means[field]} if field in means else figures
        for field, figures in device.statistics.items()
    }
    return msgspec.structs.replace(device, statistics=statistics)


def _doubtful(t: Array, steps: Array, curve: Curve) -> tuple[BoolArray, Array, list[Interval]]:
    """The steps of a counter that are not to be believed, the instants at which it jumped, and the stretches in which it stood still."""
    moves = np.flatnonzero(steps)
    rests = np.append(t[:1], t[moves + 1])  # from these instants on it rested, until the next move or the last reading
    rested_s = np.append(t[moves], t[-1:]) - rests
    usual_s = float(np.median(np.diff(rests))) if len(moves) else 0.0
    still = rested_s > max(STILL_S, 1.1 * usual_s)
    rest_of = np.searchsorted(moves, np.arange(len(steps)))  # a step belongs to the rest before its move
    drawn_j = curve.between_j(t)
    used_j = np.bincount(rest_of, drawn_j, len(rests))[: len(moves)]
    shares = steps[moves][used_j > 0] / used_j[used_j > 0]
    usual = max(float(np.median(shares)), 1.0) if len(shares) else 1.0
    most_j = usual * (JUMP * used_j + 0.5 * curve.w.max(initial=0.0)) + curve.unseen_j(np.diff(rests))
    jumped = (steps[moves] < 0) | (steps[moves] > np.fmin(most_j, MOST_W * (np.diff(rests) + 1.0)))
    doubtful = still | np.append(jumped, np.zeros(len(rests) - len(moves), dtype=bool))
    doubtful[:-1] |= still[1:]  # the last move before it stood still may be a part of what was used
    wrong = doubtful[rest_of]
    known = ~wrong & np.isfinite(drawn_j)
    if CREEP * steps[known].sum() < drawn_j[known].sum() and np.diff(t)[known].sum() > STILL_S:
        return np.ones_like(wrong), t[moves[jumped] + 1], [(float(t[0]), np.inf)]
    ends = np.append(t[moves + 1], np.inf)
    return (
        wrong,
        t[moves[jumped] + 1],
        list(zip(rests[still].tolist(), ends[: len(rests)][still].tolist(), strict=True)),
    )


def _moves(t: Array, steps: Array, wrong: BoolArray) -> tuple[Array, Array]:
    """The instants at which the counter moved, and its joules between them: a reading that repeats the one before is as old as that. Where
    the curve stands in, all readings stay."""
    repeats = (steps == 0) & ~wrong
    kept = np.flatnonzero(~np.append(len(steps) > 0 and repeats[0], repeats))
    between = [float(steps[first:last].sum()) for first, last in pairwise(kept)]
    return t[kept], np.array(between, dtype=float)


def _around_holes(t: Array, steps: Array, curve: Curve, hole_s: float) -> tuple[Array, Array, BoolArray]:
    """The readings of a counter and its steps, and which of these are unknown within: longer than `hole_s`, and the curve does not
    shape them whole. Where it tells the joules at the ends of a step, these are cut off as steps of their own."""
    unknown = np.zeros(len(steps), dtype=bool)
    for i in np.flatnonzero((np.diff(t) > hole_s) & np.isfinite(steps))[::-1]:
        low, high = float(t[i]), float(t[i + 1])
        if curve.energy_j(low, high):
            continue
        missing = intersection([(low, high)], curve.missing) or [(low, high)]
        begin, end = missing[0][0], missing[-1][1]
        ends_j = np.array([curve.energy_j(low, begin) or 0.0, curve.energy_j(end, high) or 0.0])
        ends_j *= min(1.0, steps[i] / max(ends_j.sum(), 1e-9))
        t = np.insert(t, i + 1, [begin, end])
        steps = np.insert(steps, [i, i + 1], ends_j)
        steps[i + 1] -= ends_j.sum()
        unknown = np.insert(unknown, [i, i + 1], [False, False])
        unknown[i + 1] = True
    return t, steps, unknown
