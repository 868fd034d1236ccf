"""Which joules belong to what: each role's devices, the windows of each phase, a prompt token, an output token, a request.

A role's energy is that of all its devices. A phase's windows are the instants in which at least one request is in it, cut
to the trials. One instance doing both phases gets totals only: no meter can split them, and nothing here invents a split.
Try: python -c "
from pdbench.records import load_run; from pdbench.analysis.attribution import attribute
print(attribute(load_run('disaggregated_results')))"
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from pdbench.analysis.energy import active_and_idle_j, energy_in, merge
from pdbench.analysis.metrics import Measured, inside, measure
from pdbench.events import TransferEvent
from pdbench.records import DeviceRecord, Interval, RequestRecord, Run

ENGINE_READY = "engine_ready"
PHASE_OF_ROLE = {"prefill": "prefill", "decode": "decode"}
HANDOFF_S = 0.2
_J_PER_KWH = 3.6e6


class PhaseEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """A role in the windows of one phase: `busy_s` is their length; None where the devices were not measured all along.

    `idle_j` is the engine-ready draw for that time, `active_j` what lies above.
    """

    busy_s: float
    energy_j: float | None
    active_j: float | None
    idle_j: float | None
    mean_power_w: float | None


class RoleEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of a role over the trials. `idle_j` is its engine-ready draw for that time, `active_j` what lies above.

    `waiting_s` and `waiting_j` are the time and energy in which none of its requests was in its phase: a role that waits.
    `worst_residual_pct` is the largest difference between a device's integral and its counter.
    """

    devices: int
    window_s: float
    total_j: float | None
    active_j: float | None
    idle_j: float | None
    idle_power_w: float | None
    worst_residual_pct: float | None
    phase: PhaseEnergy | None
    waiting_s: float | None
    waiting_j: float | None


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """The KV handoff: bytes over all transfers; joules only where there was time with a transfer and no other work."""

    bytes: int | None
    apart_s: float
    active_j: float | None
    gb_per_j: float | None
    why: str | None


class Attribution(msgspec.Struct, frozen=True, kw_only=True):
    """A run's energy by role and phase. Tokens and requests are those of the trials' windows.

    Energy of failed requests is in every numerator; only what was delivered is in the denominators. `why_no_split` says why
    the two per-token figures of the phases are None.
    """

    roles: dict[str, RoleEnergy]
    total_j: float | None
    j_per_computed_prompt_token: float | None
    j_per_output_token: float | None
    j_per_request: float | None
    decode_j_per_output_token: float | None
    handoff: Handoff | None
    why_no_split: str | None


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """What a joule buys. `energy_delay_js` is J a request times its mean end-to-end seconds; goodput is in good requests."""

    output_tokens_per_j: float | None
    output_tokens_per_s_per_device: float | None
    energy_delay_js: float | None
    goodput_per_w: float | None
    price_per_million_output_tokens: float | None
    gco2_per_million_output_tokens: float | None


def attribute(run: Run, cached_prompt_tokens: int = 0, measured: Measured | None = None) -> Attribution:
    """Energy by role and phase over the run's trials; `cached_prompt_tokens` were sent but not computed (prefix cache)."""
    measured = measured or measure(run)
    trials = merge(measured.windows)
    by_role: dict[str, list[DeviceRecord]] = {}
    for device in run.devices:
        if device.kind == "gpu":
            by_role.setdefault(device.role or "host", []).append(device)
    roles = {role: role_energy(role, devices, run.requests, trials) for role, devices in by_role.items()}
    split = PHASE_OF_ROLE.keys() <= roles.keys()
    total_j = total(role.total_j for role in roles.values()) if roles and trials else None
    prefilled = measured.phase_s["prefill"][:, 1]
    # A prompt had been computed at prefill's end, or (where that was not measured) when its first token came.
    computed_s = np.where(np.isfinite(prefilled), prefilled, measured.first_s)
    prompts = measured.prompt_tokens[inside(computed_s, trials)]
    computed = int(prompts.sum()) - cached_prompt_tokens if np.isfinite(prompts).all() else None
    tokens = measured.window_tokens
    return Attribution(
        roles=roles,
        total_j=total_j,
        j_per_computed_prompt_token=per(roles["prefill"].total_j, computed) if split else None,
        j_per_output_token=per(total_j, tokens),
        j_per_request=per(total_j, measured.ended_inside(measured.ok)),
        decode_j_per_output_token=per(roles["decode"].total_j, tokens) if split else None,
        handoff=_handoff(run, by_role, trials) if split else None,
        why_no_split=None if split else _why_no_split(roles),
    )


def role_energy(
    role: str, devices: Sequence[DeviceRecord], requests: Iterable[RequestRecord], trials: Sequence[Interval]
) -> RoleEnergy:
    """The devices of one role in the trials' windows, in the windows of its own phase, and in between."""
    whole = [energy_in(device, trials) for device in devices]
    idle_w = [device.idle_power_w.get(ENGINE_READY) for device in devices]
    parts = [active_and_idle_j(window, power) for window, power in zip(whole, idle_w, strict=True)]
    residuals = [window.residual_pct for window in whole if window.residual_pct is not None]
    window_s = sum(end - start for start, end in trials)
    total_j = total(window.energy_j for window in whole)
    phase, waiting_s, waiting_j = None, None, None
    busy = intersect(phase_windows(requests, PHASE_OF_ROLE[role]), trials) if role in PHASE_OF_ROLE else []
    if busy:
        phase = phase_energy(devices, busy)
        waiting_s = window_s - phase.busy_s
        waiting_j = None if total_j is None or phase.energy_j is None else total_j - phase.energy_j
    return RoleEnergy(
        devices=len(devices),
        window_s=window_s,
        total_j=total_j,
        active_j=total(active for active, _ in parts),
        idle_j=total(idle for _, idle in parts),
        idle_power_w=total(idle_w),
        worst_residual_pct=max(residuals, key=abs) if residuals else None,
        phase=phase,
        waiting_s=waiting_s,
        waiting_j=waiting_j,
    )


def phase_windows(requests: Iterable[RequestRecord], phase: str) -> list[Interval]:
    """The instants in which at least one request, failed ones and warm-ups among them, is in `phase`."""
    return merge([window for request in requests if (window := request.phases.get(phase)) is not None])


def phase_energy(devices: Sequence[DeviceRecord], windows: Sequence[Interval]) -> PhaseEnergy:
    """All `devices` together in `windows`."""
    busy_s = sum(end - start for start, end in windows)
    each = [energy_in(device, windows) for device in devices]
    energy_j = total(window.energy_j for window in each)
    parts = [
        active_and_idle_j(window, device.idle_power_w.get(ENGINE_READY))
        for window, device in zip(each, devices, strict=True)
    ]
    return PhaseEnergy(
        busy_s=busy_s,
        energy_j=energy_j,
        active_j=total(active for active, _ in parts),
        idle_j=total(idle for _, idle in parts),
        mean_power_w=per(energy_j, busy_s),
    )


def efficiency(
    total_j: float | None,
    *,
    output_tokens: int,
    window_s: float,
    devices: int,
    requests: int,
    mean_e2e_s: float | None = None,
    good_requests: int | None = None,
    price_kwh: float | None = None,
    gco2_kwh: float | None = None,
) -> Efficiency:
    """What the joules bought. Goodput per watt: good requests a second over mean watts, which is good requests per joule.

    Price and CO2 cover what the meters cover (GPU boards), in the currency of `price_kwh` and in grams.
    """
    kwh_per_million = None if total_j is None or not output_tokens else total_j / output_tokens * 1e6 / _J_PER_KWH
    j_per_request = per(total_j, requests)
    return Efficiency(
        output_tokens_per_j=per(output_tokens, total_j),
        output_tokens_per_s_per_device=per(output_tokens, window_s * devices),
        energy_delay_js=_times(j_per_request, mean_e2e_s),
        goodput_per_w=None if good_requests is None else per(good_requests, total_j),
        price_per_million_output_tokens=_times(kwh_per_million, price_kwh),
        gco2_per_million_output_tokens=_times(kwh_per_million, gco2_kwh),
    )


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
    ends = [-math.inf, *(end for _, end in taken)]
    starts = [*(start for start, _ in taken), math.inf]
    return intersect(first, list(zip(ends, starts, strict=True)))


def total(values: Iterable[float | None]) -> float | None:
    """The sum, or None as soon as one is not measured (or there is none)."""
    known = list(values)
    return None if not known or None in known else float(sum(value for value in known if value is not None))


def per(top: float | None, bottom: float | None) -> float | None:
    """A ratio, or None when either is not measured or nothing was delivered."""
    return None if top is None or not bottom or bottom < 0 else top / bottom


def _handoff(run: Run, by_role: dict[str, list[DeviceRecord]], trials: Sequence[Interval]) -> Handoff:
    """The handoff told apart: time in which a transfer runs and neither role has a request in its own phase."""
    received = [event for event in run.events if isinstance(event, TransferEvent) and event.side == "receive"]
    sizes = [event.bytes for event in received if _inside(event.end_s, trials)]
    busy = [*phase_windows(run.requests, "prefill"), *phase_windows(run.requests, "decode")]
    apart = without(intersect(phase_windows(run.requests, "kv_transfer"), trials), busy)
    apart_s = sum(end - start for start, end in apart)
    if apart_s < HANDOFF_S:
        why = f"only {1000 * apart_s:.0f} ms of transfers ran with no request in prefill or decode: too short for a power meter"
        if not received and not phase_windows(run.requests, "kv_transfer"):
            why = "this connector reports no transfers"
        return Handoff(bytes=sum(sizes) if sizes else None, apart_s=apart_s, active_j=None, gb_per_j=None, why=why)
    parts = [
        active_and_idle_j(energy_in(device, apart), device.idle_power_w.get(ENGINE_READY))[0]
        for devices in by_role.values()
        for device in devices
    ]
    active_j = total(parts)
    return Handoff(
        bytes=sum(sizes) if sizes else None,
        apart_s=apart_s,
        active_j=active_j,
        gb_per_j=_gb_in(received, apart, active_j),
        why=None if active_j is not None else "power or engine-ready idle was not measured",
    )


def _gb_in(received: list[TransferEvent], windows: Sequence[Interval], active_j: float | None) -> float | None:
    """GB a joule in these windows; a transfer's bytes are spread evenly over its wire time."""
    moved = 0.0
    for event in received:
        start, end, size = event.first_byte_s, event.end_s, event.bytes
        if start is not None and end is not None and end > start:
            moved += size * sum(b - a for a, b in intersect([(start, end)], windows)) / (end - start)
    return per(moved / 1e9, active_j) if moved else None


def _inside(t: float | None, windows: Sequence[Interval]) -> bool:
    return t is not None and any(start <= t <= end for start, end in windows)


def _times(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second


def _why_no_split(roles: dict[str, RoleEnergy]) -> str:
    if not roles:
        return "no GPU was sampled"
    return (
        "one instance does both phases on the same GPU and no meter splits them; "
        "`pdbench bench --phase prefill` and `--phase decode` measure each by itself"
    )
