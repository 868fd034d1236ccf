"""Energy of devices over windows of time: the counter's joules, the integral of power beside them, and what each role used."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from pdbench.analysis.metrics import RATIOS, Array, Timings, Totals, inside, per
from pdbench.events import TransferEvent
from pdbench.records import DeviceRecord, DeviceSample, Interval, Run

ENGINE_READY = "engine_ready"
ROLE_ORDER = {"prefill": 0, "decode": 1}
"""The roles with a phase of their own, in the order of a request's way; all other roles come after."""
EDGE_S, HOLE_S = 0.25, 1.0
ALONE_S = 0.2
"""A power meter needs this much time with transfers and nothing else."""
J_PER_KWH = 3.6e6
NO_GPU = "no GPU was sampled"
ONE_INSTANCE = (
    "one instance does both phases on the same GPU and no meter splits them; "
    "`pdbench bench --phase prefill` and `--phase decode` measure each alone"
)


class EnergyWindow(msgspec.Struct, frozen=True, kw_only=True):
    """What one device used in `duration_s` seconds of windows; None where it was not measured all along.

    `energy_j` is `counter_j` where there is a counter, else `integral_j`, the area of the power curve; `residual_pct` is
    100 (integral - counter) / counter. `counter_resets` counts jumps backwards; the integral stands in for those stretches.
    """

    duration_s: float
    energy_j: float | None
    counter_j: float | None
    integral_j: float | None
    residual_pct: float | None
    mean_power_w: float | None
    counter_resets: int = 0


class RoleEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """The metered devices of one role over the trials' windows (`window_s` together). total_j = active_j + idle_j + waiting_j.

    For prefill and decode, `active_j` and `idle_j` are of the `phase_s` seconds in which at least one request (failed ones too)
    was in the role's phase: what lies above the engine-ready idle draw, and that draw; `waiting_j` is all it drew in the other
    `waiting_s`. Other roles have no phase: phase_s, phase_j, waiting_s and waiting_j are None, the split is of the whole window.
    """

    devices: int
    window_s: float
    total_j: float | None
    active_j: float | None
    idle_j: float | None
    waiting_j: float | None
    phase_j: float | None
    phase_s: float | None
    waiting_s: float | None
    idle_power_w: float | None
    j_per_output_token: float | None


class TransferEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """The KV transfers of the windows: bytes of all; joules above idle only of the `alone_s` seconds in which a transfer ran and
    no request was in prefill or decode, and only where those are 0.2 s or more; `not_measured` says why there are none."""

    bytes: int | None
    alone_s: float
    active_j: float | None
    not_measured: str | None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """All metered devices (the GPUs; on a host without, the CPU's RAPL domains) over the trials' windows; roles, prefill first.

    Failed requests' joules are in every numerator, only what was delivered in a denominator. `j_per_computed_prompt_token` is of
    the prefill role alone. `energy_delay_js` is J per request times mean E2E seconds; `goodput_per_w` good requests per joule.
    `not_measured` says why total_j is None, `not_split` why prefill and decode cannot be separated.
    """

    total_j: float | None
    mean_power_w: float | None
    j_per_output_token: float | None
    j_per_request: float | None
    j_per_computed_prompt_token: float | None
    decode_j_per_output_token: float | None
    output_tokens_per_j: float | None
    goodput_per_w: float | None
    energy_delay_js: float | None
    price_per_million_output_tokens: float | None
    gco2_per_million_output_tokens: float | None
    roles: dict[str, RoleEnergy]
    kv_transfer: TransferEnergy | None
    not_measured: str | None
    not_split: str | None


class Meter:
    """A device's power curve and energy counter prepared once, for the energy of many windows."""

    def __init__(self, device: DeviceRecord) -> None:
        self.device = device
        self._curve = _Curve(power_curve(device))
        # The counter on its own refreshes where the sampler caught them, else as the samples have it.
        readings = device.energy_ticks
        if len(readings) < 2:
            readings = [(sample.t_s, sample.energy_j) for sample in device.samples if sample.energy_j is not None]
        self._t, counted_j = np.array(sorted(readings), dtype=float).reshape(-1, 2).T
        self._steps = np.diff(counted_j)
        back = np.flatnonzero(self._steps < 0)
        self._resets = self._t[back + 1]
        # Where the counter jumped back, the curve tells the joules of that stretch.
        self._steps[back] = np.array([self._curve.energy_j(self._t[i], self._t[i + 1]) for i in back], dtype=float)
        self._total = np.concatenate([[0.0], np.nancumsum(self._steps)])
        self._beyond_s = 1.5 * float(np.median(np.diff(self._t))) if len(self._t) > 1 else 0.0

    def energy_in(self, windows: Sequence[Interval]) -> EnergyWindow:
        """The energy in all `windows` together; overlapping windows count once. No window is an energy of 0 J."""
        windows = union(windows)
        duration_s = length_s(windows)
        integral_j = _sum([self._curve.energy_j(start, end) for start, end in windows])
        counter_j = _sum([self._counter_j(start, end) for start, end in windows])
        energy_j = integral_j if counter_j is None else counter_j
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
        )

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
        return _sum(parts)

    def _counted_j(self, i: int, t: float) -> float:
        """Joules from the first reading to an instant in (or beyond) the stretch after reading i, spread as the curve is shaped."""
        low, high = self._t[i], self._t[i + 1]
        t = min(t, high)
        if t <= low:
            return float(self._total[i])
        part, whole = self._curve.energy_j(low, t), self._curve.energy_j(low, high)
        share = (t - low) / (high - low) if part is None or not whole else part / whole
        return float(self._total[i] + self._steps[i] * share)


class Joules(NamedTuple):
    """What several devices used together: in total, and apart what lies above the engine-ready idle draw, and that draw."""

    energy_j: float | None
    active_j: float | None
    idle_j: float | None


def joules(meters: Sequence[Meter], windows: Sequence[Interval]) -> Joules:
    """None where there is no device, no window, or a device was not measured (or its idle power, for the parts)."""
    each = []
    for meter in meters:
        window, idle_power_w = meter.energy_in(windows), meter.device.idle_power_w.get(ENGINE_READY)
        if window.energy_j is None or idle_power_w is None:
            each.append(Joules(window.energy_j, None, None))
        else:
            idle_j = min(idle_power_w * window.duration_s, window.energy_j)
            each.append(Joules(window.energy_j, window.energy_j - idle_j, idle_j))
    return Joules(*map(_sum, zip(*each, strict=True))) if each and windows else Joules(None, None, None)


def metered(meters: Sequence[Meter]) -> list[Meter]:
    """Those whose energy counts: the GPUs, or the CPU's RAPL domains on a host without."""
    gpus = [meter for meter in meters if meter.device.kind == "gpu"]
    return gpus or [meter for meter in meters if meter.device.kind in ("cpu", "dram")]


def device_name(device: DeviceRecord) -> str:
    """A device's id, with its host where a run has several: every host counts its GPUs from 0."""
    return device.id if device.host is None else f"{device.host}/{device.id}"


def energy_of(run: Run, timings: Timings, meters: Sequence[Meter], totals: Totals) -> Energy:
    """The energy of a run over its trials' windows, of which `totals` are the counts."""
    windows = union(timings.windows)
    by_role: dict[str, list[Meter]] = {}
    for meter in sorted(metered(meters), key=lambda meter: ROLE_ORDER.get(meter.device.role or "", 2)):
        by_role.setdefault(meter.device.role or "host", []).append(meter)
    # The instants in which at least one request, failed ones and warm-ups among them, is in the phase.
    phases = {
        name: union([window for request in run.requests if (window := request.phases.get(name)) is not None])
        for name in ("prefill", "decode", "kv_transfer")
    }
    roles = {
        role: _role_energy(of_role, windows, intersection(phases[role], windows) if role in ROLE_ORDER else [], totals)
        for role, of_role in by_role.items()
    }
    split = ROLE_ORDER.keys() <= roles.keys()
    prefilled_s = timings.phase_s["prefill"][:, 1]
    # A prompt had been computed at prefill's end, or (where that was not measured) when its first token came.
    computed_s = np.where(np.isfinite(prefilled_s), prefilled_s, timings.first_s)
    prompt_tokens = timings.requests.prompt_tokens[inside(computed_s, windows)].sum()
    e2e_ms = timings.latencies["e2e"].rising
    kwh_per_million = per(totals.ratio("j_per_output_token"), J_PER_KWH / 1e6)
    power = run.config.get("power") or {}
    return Energy(
        total_j=totals.energy_j,
        **{name: totals.ratio(name) for name in Energy.__struct_fields__ if name in RATIOS},
        j_per_computed_prompt_token=per(roles["prefill"].total_j, prompt_tokens) if split else None,
        decode_j_per_output_token=roles["decode"].j_per_output_token if split else None,
        energy_delay_js=_product(totals.ratio("j_per_request"), float(e2e_ms.mean()) / 1e3 if len(e2e_ms) else None),
        price_per_million_output_tokens=_product(kwh_per_million, power.get("price_kwh")),
        gco2_per_million_output_tokens=_product(kwh_per_million, power.get("gco2_kwh")),
        roles=roles,
        kv_transfer=_transfer_energy(run, metered(meters), windows, phases) if split else None,
        not_measured=why_not_measured(run.devices, ("power_w", "energy_j")) if totals.energy_j is None else None,
        not_split=None if split else ONE_INSTANCE if any(d.kind == "gpu" for d in run.devices) else NO_GPU,
    )


def why_not_measured(devices: Sequence[DeviceRecord], fields: Sequence[str]) -> str:
    """Why no device has one of these fields."""
    reasons = {reason for device in devices for name, reason in device.not_measured.items() if name in fields}
    return "; ".join(sorted(reasons)) or ("no meter on this machine" if devices else "no device was sampled")


def _role_energy(
    meters: Sequence[Meter], windows: Sequence[Interval], phase: Sequence[Interval], totals: Totals
) -> RoleEnergy:
    """A role's devices in the windows, in those of its own phase (empty: it has none), and in between."""
    whole, in_phase = joules(meters, windows), joules(meters, phase or windows)
    waiting_j = None
    if phase and whole.energy_j is not None and in_phase.energy_j is not None:
        waiting_j = whole.energy_j - in_phase.energy_j
    return RoleEnergy(
        devices=len(meters),
        window_s=length_s(windows),
        total_j=whole.energy_j,
        active_j=in_phase.active_j,
        idle_j=in_phase.idle_j,
        waiting_j=waiting_j,
        phase_j=in_phase.energy_j if phase else None,
        phase_s=length_s(phase) if phase else None,
        waiting_s=length_s(windows) - length_s(phase) if phase else None,
        idle_power_w=_sum([meter.device.idle_power_w.get(ENGINE_READY) for meter in meters]),
        j_per_output_token=per(whole.energy_j, totals.output_tokens),
    )


def _transfer_energy(
    run: Run, meters: Sequence[Meter], windows: Sequence[Interval], phases: dict[str, list[Interval]]
) -> TransferEnergy:
    received = [event for event in run.events if isinstance(event, TransferEvent) and event.side == "receive"]
    ends = np.array([np.nan if event.end_s is None else event.end_s for event in received])
    sizes = [event.bytes for event, here in zip(received, inside(ends, windows), strict=True) if here]
    alone = difference(intersection(phases["kv_transfer"], windows), [*phases["prefill"], *phases["decode"]])
    alone_s, why = length_s(alone), None
    active_j = joules(meters, alone).active_j if alone_s >= ALONE_S else None
    if not received and not phases["kv_transfer"]:
        why = "this connector reports no transfers"
    elif alone_s < ALONE_S:
        only = f"only {1000 * alone_s:.0f} ms of transfers ran with no request in prefill or decode"
        why = f"{only}: too short for a power meter"
    elif active_j is None:
        why = "power or engine-ready idle was not measured"
    return TransferEnergy(bytes=sum(sizes) if sizes else None, alone_s=alone_s, active_j=active_j, not_measured=why)


def power_curve(device: DeviceRecord) -> Array:
    """Rows of (t_s, power_w): the driver's own buffer where it reaches, the samples elsewhere; repeated values stay in.

    An entry of the buffer is taken as the mean of the time since the entry before, so it stands in the middle of that time.
    A device without instant power gives its average power instead.
    """
    field = "power_w" if any(sample.power_w is not None for sample in device.samples) else "power_average_w"
    points = [(sample.t_s, power) for sample in device.samples if (power := getattr(sample, field)) is not None]
    samples = np.array(sorted(points), dtype=float).reshape(-1, 2)
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


class _Curve:
    """Power over time as straight lines between points; energy is their area."""

    def __init__(self, points: Array) -> None:
        self.t, self.w = points.T
        steps = np.diff(self.t)
        self.area = np.concatenate([[0.0], np.cumsum(steps * (self.w[1:] + self.w[:-1]) / 2)])
        hole_s = max(HOLE_S, 3 * float(np.median(steps))) if len(steps) else HOLE_S
        self.holes = [(self.t[i], self.t[i + 1]) for i in np.flatnonzero(steps > hole_s)]

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two instants, the edges interpolated; None where points are missing: a hole inside, or more than a
        moment at either edge."""
        if len(self.t) < 2 or start < self.t[0] - EDGE_S or end > self.t[-1] + EDGE_S:
            return None
        if any(hole_start < end and start < hole_end for hole_start, hole_end in self.holes):
            return None
        return self._until(end) - self._until(start)

    def _until(self, t: float) -> float:
        i = max(int(np.searchsorted(self.t, t, side="right")) - 1, 0)
        power = self.w[i]
        if self.t[0] < t < self.t[-1]:
            power = self.w[i] + (self.w[i + 1] - self.w[i]) * (t - self.t[i]) / (self.t[i + 1] - self.t[i])
        return float(self.area[i] + (t - self.t[i]) * (self.w[i] + power) / 2)


def length_s(windows: Sequence[Interval]) -> float:
    """Seconds of windows that do not overlap."""
    return sum((end - start for start, end in windows), 0.0)


def union(windows: Sequence[Interval], depth: int = 1) -> list[Interval]:
    """The instants that at least `depth` windows cover, as sorted windows that do not overlap; empty and reversed ones cover none."""
    edges = np.array([(start, end) for start, end in windows if end > start], dtype=float).reshape(-1, 2).T
    order = np.argsort(edges, axis=None, kind="stable")  # of one instant, the starts come first
    at, step = edges.ravel()[order], np.where(order < edges.shape[1], 1, -1)
    cover = np.cumsum(step)
    bounds = zip(
        at[(step > 0) & (cover == depth)].tolist(), at[(step < 0) & (cover == depth - 1)].tolist(), strict=True
    )
    return [(start, end) for start, end in bounds if end > start]


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants that lie in both."""
    return union([*union(first), *union(second)], depth=2)


def difference(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants of `first` that do not lie in `second`."""
    taken = union(second)
    ends, starts = [-np.inf, *(end for _, end in taken)], [*(start for start, _ in taken), np.inf]
    return intersection(first, list(zip(ends, starts, strict=True)))


def _sum(parts: Sequence[float | None]) -> float | None:
    """None as soon as a part is not measured: a total with a piece missing is no total."""
    numbers = [part for part in parts if part is not None]
    return float(sum(numbers)) if len(numbers) == len(parts) else None


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second
