"""The energy of a run: what each role used over the trials' windows, what a token cost, what the KV transfers took."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

import msgspec
import numpy as np

from pdbench.analysis.intervals import difference, intersection, length_s, union
from pdbench.analysis.meter import COARSE, REFUSED_SHARE, Meter
from pdbench.analysis.metrics import RATIOS, Timings, Totals, inside, per, total
from pdbench.analysis.servers import PrefixCache
from pdbench.events import TransferEvent
from pdbench.records import DeviceRecord, Flag, Interval, Run

ENGINE_READY = "engine_ready"
ROLE_ORDER = {"prefill": 0, "decode": 1}
"""The roles with a phase of their own, in the order of a request's way; all other roles come after."""
PHASES_COARSE_SHARE = 0.1
"""Phases whose edges leave more of their joules uncertain are flagged: those shorter than about five points of the power curve."""
ALONE_S = 0.2
"""A power meter needs this much time with transfers and nothing else."""
J_PER_KWH = 3.6e6
NO_IDLE = "power or engine-ready idle was not measured"
NO_GPU = "no GPU was sampled"
ONE_INSTANCE = (
    "one instance does both phases on the same GPU and no meter splits them; "
    "`pdbench bench --phase prefill` and `--phase decode` measure each alone"
)

SHARED_GPU = "prefill and decode share their GPUs and no meter splits them; a GPU for each role measures each alone"


class RoleEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """The metered devices of one role over the trials' windows (`window_s` together). total_j = active_j + idle_j + waiting_j.

    For prefill and decode, `active_j` and `idle_j` are of the `phase_s` seconds in which at least one request (failed ones too)
    was in the role's phase: what lies above the engine-ready idle draw, and that draw; `waiting_j` is all it drew in the other
    `waiting_s`. Other roles have no phase: phase_s, phase_j, waiting_s and waiting_j are None, the split is of the whole window.
    `phase_uncertain_j` of phase_j may belong to waiting_j, at most, or the other way round; where that is over half, both are None.
    `waiting_uncertain_j` is the same of waiting_j, which alone is None where that is over half of it.
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
    phase_uncertain_j: float | None = None
    waiting_uncertain_j: float | None = None
    idle_power_w: float | None
    j_per_output_token: float | None


class TransferEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """The KV transfers of the windows: bytes of all to decode, and of all back to prefill; joules above idle only of the `alone_s`
    seconds in which a transfer to decode ran and no request was in prefill or decode, and only where those are 0.2 s or more;
    `uncertain_j` of them, at most, may lie outside of those seconds: over half of them, there are none. `not_measured` says why."""

    bytes: int | None
    returned_bytes: int | None = None
    alone_s: float
    active_j: float | None
    uncertain_j: float | None = None
    not_measured: str | None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """All metered devices (the GPUs; on a host without, the CPU's RAPL domains) over the trials' windows; roles, prefill first.

    Failed requests' joules are in every numerator, only what was delivered in a denominator. `j_per_computed_prompt_token` is of
    the prefill role alone, the share that its prefix cache had left out. `energy_delay_js` is J per request times mean E2E seconds; `goodput_per_w` good requests per joule.
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


class Joules(NamedTuple):
    """What several devices used together: in total, and apart what lies above the engine-ready idle draw, and that draw."""

    energy_j: float | None
    active_j: float | None
    idle_j: float | None
    uncertain_j: float | None


def joules(meters: Sequence[Meter], windows: Sequence[Interval]) -> Joules:
    """None where there is no device, no window, or a device was not measured (or its idle power, for the parts)."""
    each = []
    for meter in meters:
        window, idle_power_w = meter.energy_in(windows), meter.device.idle_power_w.get(ENGINE_READY)
        if window.energy_j is None or idle_power_w is None:
            each.append(Joules(window.energy_j, None, None, window.uncertain_j))
        else:
            idle_j = min(idle_power_w * window.duration_s, window.energy_j)
            each.append(Joules(window.energy_j, window.energy_j - idle_j, idle_j, window.uncertain_j))
    return Joules(*map(total, zip(*each, strict=True))) if each and windows else Joules(*[None] * 4)


def metered(meters: Sequence[Meter]) -> list[Meter]:
    """Those whose energy counts: the GPUs, or the CPU's RAPL domains on a host without."""
    gpus = [meter for meter in meters if meter.device.kind == "gpu"]
    return gpus or [meter for meter in meters if meter.device.kind in ("cpu", "dram")]


def energy_of(run: Run, timings: Timings, meters: Sequence[Meter], totals: Totals, cache: PrefixCache | None) -> Energy:
    """The energy of a run over its trials' windows, of which `totals` are the counts."""
    windows, counted = union(timings.windows), metered(meters)
    by_role: dict[str, list[Meter]] = {}
    for meter in sorted(counted, key=lambda meter: ROLE_ORDER.get(meter.device.role or "", 2)):
        by_role.setdefault(meter.device.role or "host", []).append(meter)
    # The instants in which at least one request, failed ones and warm-ups among them, is in the phase.
    phases = {
        name: union([window for request in run.requests if (window := request.phases.get(name)) is not None])
        for name in ("prefill", "decode", "decode_alone", "kv_transfer")
    }
    phases["decode"] = union([*phases["decode"], *phases.pop("decode_alone")])
    roles = {
        role: _role_energy(of_role, windows, intersection(phases[role], windows) if role in ROLE_ORDER else [], totals)
        for role, of_role in by_role.items()
    }
    split = ROLE_ORDER.keys() <= roles.keys()
    prefilled_s = timings.phase_s["prefill"][:, 1]
    # A prompt had been computed at prefill's end, or (where that was not measured) when its first token came.
    computed_s = np.where(np.isfinite(prefilled_s), prefilled_s, timings.arrivals.first_s)
    # Not those that decode computed alone.
    by_prefill = ~timings.requests.first_sent_by("decode_alone")
    prompt_tokens = timings.requests.prompt_tokens[by_prefill & inside(computed_s, windows)].sum() * (
        1 - cache.cached_pct / 100 if cache else 1.0
    )
    e2e_ms = timings.latencies["e2e"].rising
    kwh_per_million = per(totals.ratio("j_per_output_token"), J_PER_KWH / 1e6)
    power, not_split = run.config.get("power") or {}, None
    if not split:
        no_gpu = all(device.kind != "gpu" for device in run.devices)
        not_split = SHARED_GPU if "prefill+decode" in roles else NO_GPU if no_gpu else ONE_INSTANCE
    return Energy(
        total_j=totals.energy_j,
        **{name: totals.ratio(name) for name in Energy.__struct_fields__ if name in RATIOS},
        j_per_computed_prompt_token=per(roles["prefill"].total_j, prompt_tokens) if split else None,
        decode_j_per_output_token=roles["decode"].j_per_output_token if split else None,
        energy_delay_js=_product(totals.ratio("j_per_request"), float(e2e_ms.mean()) / 1e3 if len(e2e_ms) else None),
        price_per_million_output_tokens=_product(kwh_per_million, power.get("price_kwh")),
        gco2_per_million_output_tokens=_product(kwh_per_million, power.get("gco2_kwh")),
        roles=roles,
        kv_transfer=_transfer_energy(run, counted, windows, phases) if split else None,
        not_measured=_why_no_energy(run, counted, windows) if totals.energy_j is None else None,
        not_split=not_split,
    )


def _why_no_energy(run: Run, meters: Sequence[Meter], windows: Sequence[Interval]) -> str:
    """Of the devices that count, where there are any: others (the CPU's use on a host with GPUs) never have one."""
    if why := next((why for meter in meters if (why := meter.why_silent(windows))), None):
        return why
    silent = [meter.device for meter in meters if meter.energy_in(windows).energy_j is None]
    why = why_not_measured(silent or run.devices, ("power_w", "energy_j"))
    if 0 < len(silent) < len(meters):
        why = f"{', '.join(device.label for device in silent)}: {why}"
    with_gaps = [device.label for device in silent if not device.not_measured.keys() & {"power_w", "energy_j"}]
    if with_gaps and windows:
        why = f"{', '.join(with_gaps)} could not be read all through the measured windows"
    return why


def why_not_measured(devices: Sequence[DeviceRecord], fields: Sequence[str]) -> str:
    reasons = {reason for device in devices for name, reason in device.not_measured.items() if name in fields}
    return "; ".join(sorted(reasons)) or ("no meter on this machine" if devices else "no device was sampled")


def _role_energy(
    meters: Sequence[Meter], windows: Sequence[Interval], phase: Sequence[Interval], totals: Totals
) -> RoleEnergy:
    """A role's devices in the windows, in those of its own phase (empty: it has none), and in between."""
    whole, in_phase = joules(meters, windows), joules(meters, phase or windows)
    between = difference(windows, phase) if phase else []
    waiting, waiting_j = joules(meters, between), None
    if phase and whole.energy_j is not None and in_phase.energy_j is not None:
        # As the parts add up to the total; the meters say whether it is known.
        waiting_j = whole.energy_j - in_phase.energy_j if waiting.energy_j is not None or not between else None
    return RoleEnergy(
        devices=len(meters),
        window_s=length_s(windows),
        total_j=whole.energy_j,
        active_j=in_phase.active_j,
        idle_j=in_phase.idle_j,
        waiting_j=waiting_j,
        phase_j=in_phase.energy_j if phase else None,
        phase_s=length_s(phase) if phase else None,
        phase_uncertain_j=in_phase.uncertain_j if phase else None,
        waiting_uncertain_j=waiting.uncertain_j,
        waiting_s=length_s(windows) - length_s(phase) if phase else None,
        idle_power_w=total([meter.device.idle_power_w.get(ENGINE_READY) for meter in meters]),
        j_per_output_token=replace(totals, energy_j=whole.energy_j).ratio("j_per_output_token"),
    )


def phase_flags(energy: Energy) -> Iterator[Flag]:
    """Roles whose phases, or the waits between them, are too short for the power's readings; one flag per role."""
    for name, role in energy.roles.items():
        phase = _uncertain_share(role.phase_j, role.phase_uncertain_j)
        waiting = _uncertain_share(role.waiting_j, role.waiting_uncertain_j)
        words = "short for how far readings of power are apart"
        if phase == inf:
            detail = f"phases are {words}; energy by phase is not given"
        elif phase > PHASES_COARSE_SHARE:
            share_pct = 100 * (phase if waiting == inf else max(phase, waiting))
            detail = f"phases are {words}; its energy by phase may be off by up to {share_pct:.0f} %"
        elif waiting == inf:
            detail = f"waits between phases are {words}; their energy is not given"
        elif waiting > PHASES_COARSE_SHARE:
            detail = f"waits between phases are {words}; their energy may be off by up to {100 * waiting:.0f} %"
        else:
            continue
        yield Flag("energy-coarse", f"{name}: its {detail}")


def _uncertain_share(used_j: float | None, uncertain_j: float | None) -> float:
    """Of what was used; infinite where that is not given because so much is uncertain, 0 where no meter says."""
    if uncertain_j is None:
        return 0.0
    return inf if used_j is None else uncertain_j / used_j if used_j else 0.0


def _transfer_energy(
    run: Run, meters: Sequence[Meter], windows: Sequence[Interval], phases: dict[str, list[Interval]]
) -> TransferEnergy:
    received = [event for event in run.events if isinstance(event, TransferEvent) and event.side == "receive"]
    ends = np.array([np.nan if event.end_s is None else event.end_s for event in received])
    arrived = [event for event, here in zip(received, inside(ends, windows), strict=True) if here]
    sizes = ([event.bytes for event in arrived if event.direction == way] for way in ("handoff", "return"))
    moved, returned = (sum(of_way) if of_way else None for of_way in sizes)
    alone = difference(intersection(phases["kv_transfer"], windows), [*phases["prefill"], *phases["decode"]])
    alone_s, why, active_j = length_s(alone), None, None
    used = joules(meters, alone if alone_s >= ALONE_S else [])
    if not received and not phases["kv_transfer"]:
        why = "this connector reports no transfers"
    elif alone_s < ALONE_S:
        only = f"only {1000 * alone_s:.0f} ms of transfers ran with no request in prefill or decode"
        why = f"{only}: too short for a power meter"
    elif used.active_j is None and (used.energy_j is not None or used.uncertain_j is None):
        why = NO_IDLE
    elif _uncertain_share(used.active_j, used.uncertain_j) > REFUSED_SHARE:
        why = COARSE
    else:
        active_j = used.active_j
    return TransferEnergy(
        bytes=moved,
        returned_bytes=returned,
        alone_s=alone_s,
        active_j=active_j,
        uncertain_j=used.uncertain_j,
        not_measured=why,
    )


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second
