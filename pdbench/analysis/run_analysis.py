"""Everything derived from one run, computed once and saved beside its results: figures, energy, curves, flags.

Every table, picture, page, CSV and exit code reads a `RunAnalysis` and nothing else. Nothing in it is rounded; what was not
measured is None (NaN in arrays), never 0.
"""

from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pdbench import __version__
from pdbench.analysis.curves import Curves, curves_of, reasons
from pdbench.analysis.energy import Energy, EnergyWindow, Meter, device_name, energy_of, metered, total
from pdbench.analysis.flags import device_flags
from pdbench.analysis.metrics import (
    METRICS,
    PHASES,
    Array,
    BoolArray,
    IntArray,
    Measured,
    Spread,
    Totals,
    inside,
    measure,
    per,
    quantiles,
    spread,
)
from pdbench.errors import UserError
from pdbench.records import Clock, Flag, Gate, Interval, Run, Trial, load_run, write_whole

SCHEMA = "pdbench-analysis/1"
FILE = "analysis.json"
READINGS = (
    "power_w",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "gpu_utilization_pct",
    "cpu_utilization_pct",
    "cpu_clock_mhz",
    "temperature_c",
    "memory_used_mib",
)


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One metric: `value` over all trials together, `trials` that of each (trial index -> value; missing where it has none).

    `count` is how many values are behind a latency quantile, None for other metrics.
    """

    value: float
    trials: dict[int, float]
    count: int | None = None


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """The measured requests (no warm-up) in the order of sending, one array entry per request; NaN is not measured.

    Instants in seconds of the run's clock. A failed request has no latencies. `trial` is its Trial's index. `phase_ms` has client,
    queue, prefill, kv_transfer and decode. `error` is the error's kind, None for success.
    """

    id: list[str]
    trial: IntArray
    ok: BoolArray
    sent_s: Array
    end_s: Array
    ttft_ms: Array
    mean_tbt_ms: Array
    e2e_ms: Array
    send_delay_ms: Array
    prompt_tokens: Array
    output_tokens: Array
    phase_ms: dict[str, Array]
    error: list[str | None]
    finish_reason: list[str | None]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    sent: int
    succeeded: int
    failed: int


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of successful requests; `merged_pct` is the share of gaps that are 0 because tokens shared a chunk."""

    prompt: int | None
    output: int | None
    merged_pct: float | None


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that ended well and tokens that arrived inside the windows, per second; `per_device` per GPU."""

    requests_per_s: float | None
    output_tokens_per_s: float | None
    output_tokens_per_s_per_device: float | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second within the SLO, and the per cent of all requests within it; `slo_tbt_ms` limits a request's mean TBT."""

    slo_ttft_ms: float | None
    slo_tbt_ms: float | None
    requests_per_s: float | None
    met_pct: float | None


class Range(msgspec.Struct, frozen=True, kw_only=True):
    mean: float
    min: float
    max: float


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A device over the measured windows. `readings` maps a sampled field (power_w, sm_clock_mhz, ...) to its range there."""

    name: str
    kind: str
    role: str | None
    samples: int
    energy: EnergyWindow
    readings: dict[str, Range]
    sampling: dict[str, float | None]
    not_measured: dict[str, str]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run as docs/metrics.md defines them; `msgspec.to_builtins` of it is saved in the results.

    `tbt_ms` is over every gap, `mean_tbt_ms` over the requests' means (TPOT). `window_s` is that of all trials together.
    """

    trials: int
    window_s: float
    requests: RequestCounts
    errors: dict[str, int]
    tokens: TokenCounts
    ttft_ms: Spread | None
    tbt_ms: Spread | None
    mean_tbt_ms: Spread | None
    e2e_ms: Spread | None
    send_delay_ms: Spread | None
    client_ms: Spread | None
    queue_ms: Spread | None
    prefill_ms: Spread | None
    kv_transfer_ms: Spread | None
    decode_ms: Spread | None
    throughput: Throughput
    goodput: Goodput
    energy: Energy
    devices: dict[str, DeviceSummary]


class RunAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """One run, analyzed. `name` is the deployment; config, host, versions, roles, gate, trials and clock are the run's own.

    `flags` are the run's and those of its devices. `figures` maps a metric's name (`metrics.METRICS`) to its values; a metric
    that was not measured is not in it. `requests` are columns for requests.csv and scatter panels. `source` identifies the files
    that it was made from.
    """

    schema: str = SCHEMA
    pdbench: str = __version__
    source: str = ""
    run_schema: str
    name: str
    clock: Clock
    config: dict[str, Any]
    host: dict[str, Any]
    versions: dict[str, str | None]
    roles: dict[str, list[str]]
    gate: Gate | None
    flags: list[Flag]
    trials: list[Trial]
    summary: Summary
    figures: dict[str, Figure]
    curves: Curves
    requests: Requests


def analyze(run: Run) -> RunAnalysis:
    """The analysis of a run in memory; it does not change the run."""
    measured = measure(run)
    meters = [Meter(device) for device in run.devices]
    met = within_slo(run, measured)
    in_all = totals_in(measured, met, meters, measured.windows)
    each = {trial.index: totals_in(measured, met, meters, [(trial.start_s, trial.end_s)]) for trial in measured.trials}
    return RunAnalysis(
        run_schema=run.schema,
        name=run.name,
        clock=run.clock,
        config=run.config,
        host=run.host,
        versions=run.versions,
        roles=run.roles,
        gate=run.gate,
        flags=list(dict.fromkeys([*run.flags, *device_flags(run)])),
        trials=run.trials,
        summary=_summary(run, measured, meters, in_all, met),
        figures=_figures(measured, in_all, each),
        curves=curves_of(run, measured),
        requests=_requests(measured),
    )


def save_analysis(analysis: RunAnalysis, folder: Path | str) -> Path:
    """Write `analysis.json` beside the results that it was made from. Raises UserError when the folder takes no file."""
    path = Path(folder) / FILE
    analysis = msgspec.structs.replace(analysis, source=_source(Path(folder)))
    write_whole(path, msgspec.json.encode(analysis, enc_hook=lambda array: array.tolist()))
    return path


def load_analysis(folder: Path | str) -> RunAnalysis:
    """The analysis saved in `folder` when it is this version's and of the results there, else made again and saved where that
    can be. Raises UserError with the remedy when `folder` holds no results."""
    folder = Path(folder)
    try:
        saved = msgspec.json.decode((folder / FILE).read_bytes(), type=RunAnalysis, dec_hook=_array)
        if (saved.schema, saved.pdbench, saved.source) == (SCHEMA, __version__, _source(folder)):
            return saved
    except (OSError, msgspec.MsgspecError):
        pass
    analysis = analyze(load_run(folder))
    try:
        save_analysis(analysis, folder)
    except UserError:
        pass  # a folder that may only be read
    return analysis


def totals_in(measured: Measured, met: BoolArray | None, meters: list[Meter], windows: list[Interval]) -> Totals:
    """What these windows held; `met` says which requests met the SLO, None without one."""
    ended = inside(measured.end_s, windows)
    counted = metered(meters) if windows else []
    return Totals(
        window_s=sum(end - start for start, end in windows),
        output_tokens=int(np.count_nonzero(inside(measured.token_s, windows))),
        requests=int(np.count_nonzero(ended & measured.ok)),
        good_requests=None if met is None else int(np.count_nonzero(ended & met)),
        energy_j=total(meter.energy_in(windows).energy_j for meter in counted),
        devices=sum(meter.device.kind == "gpu" for meter in meters) or None,
    )


def within_slo(run: Run, measured: Measured) -> BoolArray | None:
    """Which requests met the run's SLO (a failed one does not); None when it was given none. A request of one token has no TBT."""
    load = run.config.get("load") or {}
    ttft_ms, tbt_ms = load.get("slo_ttft_ms"), load.get("slo_tbt_ms")
    if ttft_ms is None and tbt_ms is None:
        return None
    met = measured.ok.copy()
    if ttft_ms is not None:
        met &= measured.ttft_ms <= ttft_ms
    if tbt_ms is not None:
        met &= ~(measured.mean_tbt_ms > tbt_ms)
    return met


def _figures(measured: Measured, in_all: Totals, each: dict[int, Totals]) -> dict[str, Figure]:
    """Every metric that the run has: the latencies' quantiles, then what a window has once."""
    figures = {}
    by_latency = {key: _by_trial(*pair) for key, pair in measured.latencies.items()}
    for metric in METRICS.values():
        if metric.latency is None:
            value = getattr(in_all, metric.name)
            trials = {index: rate for index, one in each.items() if (rate := getattr(one, metric.name)) is not None}
            count = None
        else:
            assert metric.quantile is not None
            share, rising = np.array(metric.quantile), by_latency[metric.latency]
            count = len(rising[None]) if None in rising else 0
            value = float(quantiles(rising[None], share)) if count else None
            trials = {
                trial.index: float(quantiles(rising[place], share))
                for place, trial in enumerate(measured.trials)
                if place in rising
            }
        if value is not None:
            figures[metric.name] = Figure(value=value, trials=trials, count=count)
    return figures


def _by_trial(values: Array, place: IntArray) -> dict[int | None, Array]:
    """Sorted values of each trial that has any, by its place in `Measured.trials`, and of all of them under None."""
    known = np.isfinite(values) & (place >= 0)
    values, place = values[known], place[known]
    groups: dict[int | None, Array] = {int(number): np.sort(values[place == number]) for number in np.unique(place)}
    return {**groups, None: np.sort(values)} if len(values) else {}


def _summary(run: Run, measured: Measured, meters: list[Meter], totals: Totals, met: BoolArray | None) -> Summary:
    failed = [request for request, ok in zip(measured.requests, measured.ok, strict=True) if not ok]
    errors = Counter("no_tokens" if request.error is None else request.error.kind for request in failed)
    load = run.config.get("load") or {}
    no_meter = reasons([meter.device for meter in meters], ("power_w", "energy_j"))
    return Summary(
        trials=len(measured.trials),
        window_s=totals.window_s,
        requests=RequestCounts(
            sent=len(measured.requests), succeeded=int(measured.ok.sum()), failed=int((~measured.ok).sum())
        ),
        errors=dict(errors.most_common()),
        tokens=TokenCounts(
            prompt=_count(measured.prompt_tokens[measured.ok]),
            output=_count(measured.output_tokens[measured.ok]),
            merged_pct=per(100.0 * measured.merged_tokens, len(measured.tbt_ms)),
        ),
        **{f"{name}_ms": spread(values) for name, (values, _) in measured.latencies.items()},
        send_delay_ms=spread(measured.send_delay_ms),
        **{f"{name}_ms": spread(measured.phase_ms[name]) for name in PHASES},
        throughput=Throughput(
            requests_per_s=totals.requests_per_s,
            output_tokens_per_s=totals.output_tokens_per_s,
            output_tokens_per_s_per_device=totals.output_tokens_per_s_per_device,
        ),
        goodput=Goodput(
            slo_ttft_ms=load.get("slo_ttft_ms"),
            slo_tbt_ms=load.get("slo_tbt_ms"),
            requests_per_s=totals.goodput_requests_per_s,
            met_pct=None if met is None else per(100.0 * int(met.sum()), len(met)),
        ),
        energy=energy_of(run, measured, meters, totals, no_meter),
        devices={device_name(meter.device): _device(meter, measured.windows) for meter in meters},
    )


def _device(meter: Meter, windows: list[Interval]) -> DeviceSummary:
    device = meter.device
    here = inside(np.array([sample.t_s for sample in device.samples], dtype=float), windows)
    during = [sample for sample, is_here in zip(device.samples, here, strict=True) if is_here]
    readings = {}
    for field in READINGS:
        values = [value for sample in during if (value := getattr(sample, field)) is not None]
        if values:
            readings[field] = Range(mean=float(np.mean(values)), min=min(values), max=max(values))
    return DeviceSummary(
        name=device.name,
        kind=device.kind,
        role=device.role,
        samples=len(during),
        energy=meter.energy_in(windows),
        readings=readings,
        sampling=device.sampling,
        not_measured=device.not_measured,
    )


def _requests(measured: Measured) -> Requests:
    return Requests(
        id=[request.id for request in measured.requests],
        trial=np.array([request.trial for request in measured.requests], dtype=np.int64),
        ok=measured.ok,
        sent_s=measured.sent_s,
        end_s=measured.end_s,
        ttft_ms=measured.ttft_ms,
        mean_tbt_ms=measured.mean_tbt_ms,
        e2e_ms=measured.e2e_ms,
        send_delay_ms=measured.send_delay_ms,
        prompt_tokens=measured.prompt_tokens,
        output_tokens=measured.output_tokens,
        phase_ms=measured.phase_ms,
        error=[None if request.error is None else request.error.kind for request in measured.requests],
        finish_reason=[request.finish_reason for request in measured.requests],
    )


def _count(values: Array) -> int | None:
    return int(values.sum()) if len(values) and np.isfinite(values).all() else None


def _source(folder: Path) -> str:
    """A hash of the results and the device files."""
    digest = blake2b(digest_size=16)
    for path in sorted([*folder.glob("*_results.json"), *folder.glob("*_gpu_data.json")]):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _array(kind: Any, values: Any) -> Any:
    """A saved list as the array type of its field; null becomes NaN."""
    return np.array(values, dtype=kind.__args__[1].__args__[0])
