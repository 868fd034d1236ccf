"""Energy of one device over windows of time: its own counter, the integral of its power beside it, and how they differ.

Try: python -c "
from pdbench.records import load_run; from pdbench.analysis.energy import energy_over
for device in load_run('disaggregated_results').devices: print(device.id, energy_over(device, 0.0, 1.0))"
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pdbench.analysis.metrics import Measured, Totals, inside, per
from pdbench.events import TransferEvent
from pdbench.records import DeviceRecord, Flag, Interval, RequestRecord, Run

ENGINE_READY = "engine_ready"
ROLE_ORDER = {"prefill": 0, "decode": 1}
"""The order of a request's way; all other roles come after."""
ALONE_S = 0.2
"""A power meter needs this much time with transfers and nothing else."""
J_PER_KWH = 3.6e6
RESIDUAL_LIMIT_PCT = 3.0
EDGE_S = 0.25
HOLE_S = 1.0

Floats = npt.NDArray[np.float64]


class EnergyWindow(msgspec.Struct, frozen=True, kw_only=True):
    """What one device used in `duration_s` seconds of windows between `start_s` and `end_s`; None where not measured.

    `energy_j` is the counter's figure where there is one, else the integral. `counter_j` comes from the device's energy counter, `integral_j` from its power curve, `residual_pct` is
    100 (integral - counter) / counter, `mean_power_w` is `energy_j` over the duration.
    `counter_resets` counts the counter's jumps backwards; the integral stands in for those stretches.
    """

    start_s: float
    end_s: float
    duration_s: float
    counter_j: float | None
    integral_j: float | None
    residual_pct: float | None
    energy_j: float | None
    mean_power_w: float | None
    counter_resets: int = 0


def device_name(device: DeviceRecord) -> str:
    """A device's id, with its host where a run has several: every host counts its GPUs from 0."""
    return device.id if device.host is None else f"{device.host}/{device.id}"


def energy_over(device: DeviceRecord, start_s: float, end_s: float) -> EnergyWindow:
    """The energy of `device` between two instants of the run's clock."""
    return energy_in(device, [(start_s, end_s)])


def energy_in(device: DeviceRecord, windows: Sequence[Interval]) -> EnergyWindow:
    """The energy of `device` in all `windows` together; overlapping windows count once. No window is an energy of 0 J."""
    return Meter(device).energy_in(windows)


class Meter:
    """A device's readings made ready once, for asking about many windows."""

    def __init__(self, device: DeviceRecord) -> None:
        self.device = device
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
            energy_j=energy_j,
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
    gb_per_j: float | None
    not_measured: str | None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """All metered devices (the GPUs; on a host without, the CPU's RAPL domains) over the trials' windows; roles, prefill first.

    Failed requests' joules are in every numerator, only what was delivered in a denominator. `j_per_computed_prompt_token` is of
    the prefill role alone. `energy_delay_js` is J per request times mean E2E seconds; `goodput_per_w` good requests per joule.
    `not_measured` says why total_j is None, `not_split` why prefill and decode cannot be told apart.
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


def metered(meters: Sequence[Meter]) -> list[Meter]:
    """Those whose energy counts: the GPUs, or the CPU's RAPL domains on a host without."""
    gpus = [meter for meter in meters if meter.device.kind == "gpu"]
    return gpus or [meter for meter in meters if meter.device.kind in ("cpu", "dram")]


def energy_of(run: Run, measured: Measured, meters: Sequence[Meter], totals: Totals, why_no_meter: str) -> Energy:
    """The energy of a run over its trials' windows, of which `totals` are the counts."""
    windows = merge(measured.windows)
    counted = sorted(metered(meters), key=lambda meter: ROLE_ORDER.get(meter.device.role or "", 2))
    by_role: dict[str, list[Meter]] = {}
    for meter in counted:
        by_role.setdefault(meter.device.role or "host", []).append(meter)
    roles = {
        role: _role_energy(role, meters, run.requests, windows, totals.output_tokens)
        for role, meters in by_role.items()
    }
    split = {"prefill", "decode"} <= roles.keys()
    gpus = any(meter.device.kind == "gpu" for meter in counted)
    not_split = (
        "one instance does both phases on the same GPU and no meter splits them; "
        "`pdbench bench --phase prefill` and `--phase decode` measure each alone"
    )
    e2e_ms = measured.e2e_ms[np.isfinite(measured.e2e_ms)]
    kwh_per_million = per(totals.j_per_output_token, J_PER_KWH / 1e6)
    power = run.config.get("power") or {}
    return Energy(
        total_j=totals.energy_j,
        mean_power_w=totals.mean_power_w,
        j_per_output_token=totals.j_per_output_token,
        j_per_request=totals.j_per_request,
        j_per_computed_prompt_token=per(roles["prefill"].total_j, _computed_prompts(measured, windows))
        if split
        else None,
        decode_j_per_output_token=roles["decode"].j_per_output_token if split else None,
        output_tokens_per_j=totals.output_tokens_per_j,
        goodput_per_w=totals.goodput_per_w,
        energy_delay_js=_times(totals.j_per_request, float(e2e_ms.mean()) / 1e3 if len(e2e_ms) else None),
        price_per_million_output_tokens=_times(kwh_per_million, power.get("price_kwh")),
        gco2_per_million_output_tokens=_times(kwh_per_million, power.get("gco2_kwh")),
        roles=roles,
        kv_transfer=_transfer_energy(run, counted, windows) if split else None,
        not_measured=None if totals.energy_j is not None else why_no_meter,
        not_split=None if split else not_split if gpus else "no GPU was sampled",
    )


def phase_windows(requests: Iterable[RequestRecord], phase: str) -> list[Interval]:
    """The instants in which at least one request, failed ones and warm-ups among them, is in `phase`."""
    return merge([window for request in requests if (window := request.phases.get(phase)) is not None])


def _role_energy(
    role: str, meters: Sequence[Meter], requests: Iterable[RequestRecord], windows: Sequence[Interval], tokens: int
) -> RoleEnergy:
    """A role's devices in the windows, in those of its own phase, and in between."""
    idle_w = [meter.device.idle_power_w.get(ENGINE_READY) for meter in meters]
    total_j = total(meter.energy_in(windows).energy_j for meter in meters)
    window_s = length_s(windows)
    phase = intersect(phase_windows(requests, role), windows) if role in ROLE_ORDER else []
    each = [meter.energy_in(phase or windows) for meter in meters]
    parts = [active_and_idle_j(window, power_w) for window, power_w in zip(each, idle_w, strict=True)]
    phase_j = total(window.energy_j for window in each)
    waiting_j = None if not phase or total_j is None or phase_j is None else total_j - phase_j
    return RoleEnergy(
        devices=len(meters),
        window_s=window_s,
        total_j=total_j,
        active_j=total(active for active, _ in parts),
        idle_j=total(idle for _, idle in parts),
        waiting_j=waiting_j,
        phase_j=phase_j if phase else None,
        phase_s=length_s(phase) if phase else None,
        waiting_s=window_s - length_s(phase) if phase else None,
        idle_power_w=total(idle_w),
        j_per_output_token=per(total_j, tokens),
    )


def _transfer_energy(run: Run, meters: Sequence[Meter], windows: Sequence[Interval]) -> TransferEnergy:
    received = [event for event in run.events if isinstance(event, TransferEvent) and event.side == "receive"]
    ends = np.array([np.nan if event.end_s is None else event.end_s for event in received])
    sizes = [event.bytes for event, here in zip(received, inside(ends, windows), strict=True) if here]
    transfers = phase_windows(run.requests, "kv_transfer")
    busy = [*phase_windows(run.requests, "prefill"), *phase_windows(run.requests, "decode")]
    alone = without(intersect(transfers, windows), busy)
    active_j, moved, why = None, 0.0, None
    if not received and not transfers:
        why = "this connector reports no transfers"
    elif length_s(alone) < ALONE_S:
        why = (
            f"only {1000 * length_s(alone):.0f} ms of transfers ran with no request in prefill or decode: "
            "too short for a power meter"
        )
    else:
        above = [
            active_and_idle_j(meter.energy_in(alone), meter.device.idle_power_w.get(ENGINE_READY))[0]
            for meter in meters
        ]
        active_j = total(above)
        why = "power or engine-ready idle was not measured" if active_j is None else None
        for event in received:  # a transfer's bytes are spread evenly over its wire time
            start, end = event.first_byte_s, event.end_s
            if start is not None and end is not None and end > start:
                moved += event.bytes * length_s(intersect([(start, end)], alone)) / (end - start)
    return TransferEnergy(
        bytes=sum(sizes) if sizes else None,
        alone_s=length_s(alone),
        active_j=active_j,
        gb_per_j=per(moved / 1e9 or None, active_j),
        not_measured=why,
    )


def _computed_prompts(measured: Measured, windows: Sequence[Interval]) -> int | None:
    """Tokens of the prompts computed in the windows: at prefill's end, or (not measured) when the first token came."""
    prefilled = measured.phase_s["prefill"][:, 1]
    prompts = measured.prompt_tokens[inside(np.where(np.isfinite(prefilled), prefilled, measured.first_s), windows)]
    return int(prompts.sum()) if np.isfinite(prompts).all() else None


def length_s(windows: Sequence[Interval]) -> float:
    """Seconds of windows that do not overlap."""
    return sum(end - start for start, end in windows)


def intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants that lie in both."""
    left, right = merge(first), merge(second)
    both, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        both.append((max(left[i][0], right[j][0]), min(left[i][1], right[j][1])))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return merge(both)


def without(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants of `first` that do not lie in `second`."""
    taken = merge(second)
    ends = [-np.inf, *(end for _, end in taken)]
    starts = [*(start for start, _ in taken), np.inf]
    return intersect(first, list(zip(ends, starts, strict=True)))


def total(values: Iterable[float | None]) -> float | None:
    """The sum, or None as soon as one is not measured (or there is none)."""
    known = list(values)
    return None if not known or None in known else float(sum(value for value in known if value is not None))


def _times(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second
