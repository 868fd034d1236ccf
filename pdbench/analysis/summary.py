"""A run to its summary: the dictionary that is saved in the results and printed; every entry is defined in docs/metrics.md.

Try: python -c "from pdbench.records import load_run as l; from pdbench.analysis.summary import summarize as s; print(s(l('single_results')))"
"""

from collections import Counter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdbench.analysis.attribution import attribute, efficiency
from pdbench.analysis.energy import EnergyWindow, energy_in
from pdbench.analysis.metrics import Array, Measured, measure, option
from pdbench.records import DeviceRecord, Run

QUANTILES = (50, 90, 99)
SAMPLE_FIELDS = (
    "power_w",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "gpu_utilization_pct",
    "cpu_utilization_pct",
    "cpu_clock_mhz",
    "temperature_c",
    "memory_used_mib",
)


def summarize(run: Run, measured: Measured | None = None) -> dict[str, Any]:
    """The figures of a run; None where something was not measured or nothing succeeded. Times in ms, energy in J."""
    measured = measured or measure(run)
    windows = {_name(device): energy_in(device, measured.windows) for device in run.devices}
    joules = energy(run, measured, windows)
    return {
        "trials": len(measured.trials),
        "window_s": _tidy(measured.window_s),
        "requests": {
            "sent": len(measured.requests),
            "succeeded": int(measured.ok.sum()),
            "failed": int((~measured.ok).sum()),
        },
        "errors": errors_by_kind(measured),
        "tokens": {
            "prompt": _total(measured.prompt_tokens[measured.ok]),
            "output": _total(measured.output_tokens[measured.ok]),
            "merged_pct": _ratio(100.0 * measured.merged_tokens, len(measured.tbt_ms)),
        },
        "ttft_ms": describe(measured.ttft_ms),
        "tbt_ms": describe(measured.tbt_ms),
        "mean_tbt_ms": describe(measured.mean_tbt_ms),
        "e2e_ms": describe(measured.e2e_ms),
        "send_delay_ms": describe(measured.send_delay_ms),
        **{f"{name}_ms": describe(values) for name, values in measured.phase_ms.items()},
        "throughput": throughput(run, measured),
        "goodput": goodput(run, measured),
        "energy": joules,
        "attribution": _rounded(msgspec.to_builtins(attribute(run, measured=measured))),
        "efficiency": bought(run, measured, joules["total_j"]),
        "devices": {_name(one): _device(one, measured, windows[_name(one)]) for one in run.devices},
    }


def _name(device: DeviceRecord) -> str:
    """A device's id, with its host where a run has several: every host counts its GPUs from 0."""
    return device.id if device.host is None else f"{device.host}/{device.id}"


def describe(values: Array) -> dict[str, float | int] | None:
    """Mean, p50, p90, p99 (linear interpolation), min, max and count of what was measured; None when nothing was."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    quantiles = np.percentile(known, QUANTILES)
    figures = {"mean": known.mean(), **{f"p{q}": v for q, v in zip(QUANTILES, quantiles, strict=True)}}
    figures |= {"min": known.min(), "max": known.max()}
    return {name: round(float(value), 4) for name, value in figures.items()} | {"count": len(known)}


def errors_by_kind(measured: Measured) -> dict[str, int]:
    """How many requests failed, by the error's kind; a stream that ended well but empty counts as `no_tokens`."""
    failed = [request for request, ok in zip(measured.requests, measured.ok, strict=True) if not ok]
    return dict(Counter("no_tokens" if r.error is None else r.error.kind for r in failed).most_common())


def throughput(run: Run, measured: Measured) -> dict[str, float | None]:
    """Requests completed and tokens that arrived inside the windows, a second; the same per device."""
    devices = device_count(run)
    requests = measured.ended_inside(measured.ok)
    tokens_per_s = _ratio(measured.window_tokens, measured.window_s)
    return {
        "requests_per_s": _ratio(requests, measured.window_s),
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_device": None if tokens_per_s is None else _ratio(tokens_per_s, devices),
    }


def goodput(run: Run, measured: Measured) -> dict[str, float | None]:
    """Requests a second that met the SLO (`slo_ttft_ms`, and `slo_tbt_ms` on a request's mean TBT), and their share of all.

    A failed request misses it. All None when the run was given no SLO.
    """
    limits = {name: option(run.config, name) for name in ("slo_ttft_ms", "slo_tbt_ms")}
    met = meets_slo(run, measured)
    if met is None:
        return {**limits, "requests_per_s": None, "met_pct": None}
    return {
        **limits,
        "requests_per_s": _ratio(measured.ended_inside(met), measured.window_s),
        "met_pct": _ratio(100.0 * int(met.sum()), len(met)),
    }


def meets_slo(run: Run, measured: Measured) -> NDArray[np.bool_] | None:
    """Which requests met the run's SLO; None when it was given none. A request of one token has no TBT to miss."""
    ttft, tbt = option(run.config, "slo_ttft_ms"), option(run.config, "slo_tbt_ms")
    if ttft is None and tbt is None:
        return None
    met = measured.ok.copy()
    if ttft is not None:
        met &= measured.ttft_ms <= ttft
    if tbt is not None:
        met &= ~(measured.mean_tbt_ms > tbt)
    return met


def energy(run: Run, measured: Measured, windows: dict[str, EnergyWindow]) -> dict[str, Any]:
    """Joules of the measured windows, failed requests' included: all devices that have a meter, each role, each token.

    GPUs where there are any, else the CPU's RAPL domains. None, with the reasons, as soon as one of them was not measured.
    """
    devices = meters(run)
    joules = {_name(device): windows[_name(device)].energy_j for device in devices}
    missing = not devices or not measured.trials or any(value is None for value in joules.values())
    total = None if missing else sum(value for value in joules.values() if value is not None)
    by_role: dict[str, float | None] = {}
    for device in devices:
        known, value = by_role.get(device.role or "host", 0.0), joules[_name(device)]
        by_role[device.role or "host"] = None if known is None or value is None else _tidy(known + value)
    return {
        "total_j": None if total is None else _tidy(total),
        "by_role_j": by_role,
        "mean_power_w": None if total is None else _ratio(total, measured.window_s),
        "j_per_output_token": None if total is None else _ratio(total, measured.window_tokens),
        "j_per_request": None if total is None else _ratio(total, measured.ended_inside(measured.ok)),
        "output_tokens_per_j": None if total is None else _ratio(measured.window_tokens, total),
        "not_measured": power_reasons(run) if total is None else None,
    }


def bought(run: Run, measured: Measured, total_j: float | None) -> dict[str, float | None]:
    """What the joules bought, as `attribution.Efficiency`; price and CO2 with --price-kwh and --gco2-kwh."""
    e2e_ms, met = measured.e2e_ms[np.isfinite(measured.e2e_ms)], meets_slo(run, measured)
    found = efficiency(
        total_j,
        output_tokens=measured.window_tokens,
        window_s=measured.window_s,
        devices=device_count(run) or 0,
        requests=measured.ended_inside(measured.ok),
        mean_e2e_s=float(e2e_ms.mean()) / 1e3 if len(e2e_ms) else None,
        good_requests=None if met is None else measured.ended_inside(met),
        price_kwh=option(run.config, "price_kwh"),
        gco2_kwh=option(run.config, "gco2_kwh"),
    )
    rounded: dict[str, float | None] = _rounded(msgspec.to_builtins(found))
    return rounded


def meters(run: Run) -> list[DeviceRecord]:
    """The devices whose energy counts: the GPUs, or the CPU's RAPL domains on a host without."""
    gpus = [device for device in run.devices if device.kind == "gpu"]
    return gpus or [device for device in run.devices if device.kind in ("cpu", "dram")]


def power_reasons(run: Run) -> str:
    """Why there is no power curve or energy, in a few words."""
    reasons = {
        reason for d in run.devices for name, reason in d.not_measured.items() if name in ("power_w", "energy_j")
    }
    return "; ".join(sorted(reasons)) or ("no meter on this machine" if run.devices else "no device was sampled")


def device_count(run: Run) -> int | None:
    """GPUs that the deployment holds; None on a host without, where the roles share the CPU."""
    return sum(device.kind == "gpu" for device in run.devices) or None


def _device(device: DeviceRecord, measured: Measured, window: EnergyWindow) -> dict[str, Any]:
    """A device over the measured windows: mean, min and max of each of its fields, energy, sampling, reasons."""
    during = [s for s in device.samples if any(trial.start_s <= s.t_s <= trial.end_s for trial in measured.trials)]
    fields = {}
    for name in SAMPLE_FIELDS:
        known = [value for value in (getattr(sample, name) for sample in during) if value is not None]
        spread = {"mean": np.mean(known), "min": min(known), "max": max(known)} if known else {}
        fields[name] = {key: _tidy(value) for key, value in spread.items()} or None
    return {
        "name": device.name,
        "kind": device.kind,
        "role": device.role,
        "samples": len(during),
        "energy": {
            "total_j": window.energy_j,
            "counter_j": window.counter_j,
            "integral_j": window.integral_j,
            "residual_pct": window.residual_pct,
            "mean_power_w": window.mean_power_w,
        },
        **fields,
        "sampling": device.sampling,
        "not_measured": device.not_measured,
    }


def _rounded(value: Any) -> Any:
    """Every float inside with six decimals."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _total(values: Array) -> int | None:
    return int(values.sum()) if len(values) and np.isfinite(values).all() else None


def _ratio(top: float, bottom: float | None) -> float | None:
    return _tidy(top / bottom) if bottom else None


def _tidy(value: float) -> float:
    return round(float(value), 4)
