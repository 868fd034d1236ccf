"""Everything derived from one run, computed once and saved beside its results: all that tables, pictures, pages and exit codes read.

Nothing in it is rounded; what was not measured is None (NaN in arrays), never 0.
"""

from collections import Counter
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pdbench import __version__, documents, failures
from pdbench.analysis.curves import FIELDS, Curves, curves_of
from pdbench.analysis.device_flags import POWER_CAPS
from pdbench.analysis.energy import ROLE_ORDER, Energy, energy_of, joules, metered
from pdbench.analysis.flags import flags_of
from pdbench.analysis.meter import EnergyWindow, Meter, PowerScope, mean_powers_w
from pdbench.analysis.metrics import (
    METRICS,
    Array,
    Requests,
    Spread,
    Timings,
    Totals,
    per,
    quantiles,
    rising,
    spread,
    timings_of,
)
from pdbench.analysis.servers import PrefixCache, ServerSummary, prefix_cache_of, servers_of
from pdbench.analysis.slo import SLO
from pdbench.errors import NOT_JSON, UserError
from pdbench.files import check_name, device_files, results_files, write_whole
from pdbench.records import Clock, Flag, Gate, Interval, Run, load_run

SCHEMA = "pdbench-analysis/12"
FILE = "analysis.json"
COUNTED_SHARE = 0.01
METADATA = ("run_id", "name", "clock", "config", "host", "versions", "gate")
READINGS = (*FIELDS, "memory_used_mib", "module_power_w", "memory_power_w", "power_limit_w")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over all trials together and in each (trial index -> value) but those that were cut short; `count` values of these are
    behind a latency's quantile."""

    value: float
    trials: dict[int, float]
    count: int | None = None


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    sent: int
    succeeded: int
    failed: int


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of successful requests; `merged_pct` is the share of gaps that are 0 because tokens shared a chunk.

    `counted_by`: in which ways they were counted, each in 1 % of the requests or more.
    """

    prompt: int | None
    output: int | None
    counted_by: list[str]
    merged_pct: float | None


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """Successful requests whose first token came from one of the two phases' instances; `first_gap_ms` is from it to the second."""

    requests: int
    ttft_ms: Spread | None
    first_gap_ms: Spread | None


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that ended well and tokens that arrived inside the windows, per second; `per_device` per GPU."""

    requests_per_s: float | None
    output_tokens_per_s: float | None
    output_tokens_per_s_per_device: float | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second within the SLO, and the per cent of all requests within it; `slo_tbt_ms` limits a request's mean TBT."""

    slo_ttft_ms: float | None
    slo_tbt_ms: float | None
    slo_tbt_p90_ms: float | None
    slo_tbt_p99_ms: float | None
    slo_e2e_ms: float | None
    requests_per_s: float | None
    requests_per_s_per_device: float | None
    j_per_good_request: float | None
    met_pct: float | None


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Of samples; the mean of a power is its energy over time, None where that is not known."""

    mean: float | None
    min: float
    max: float


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A device over the measured windows. `readings` maps a sampled field (power_w, sm_clock_mhz, ...) to its range there.

    `scopes` names what a GPU's figures are of ("gpu"), and has the superchip's other meters ("module", "memory") beside them.
    `power_capped_pct` is the share of samples in which a power limit held the clock down, None where no reasons are given. `settings`
    are the record's.
    """

    name: str
    kind: str
    role: str | None
    samples: int
    energy: EnergyWindow
    scopes: dict[str, PowerScope]
    readings: dict[str, Range]
    default_power_limit_w: float | None
    settings: dict[str, bool | float]
    power_capped_pct: float | None
    sampling: dict[str, float | None]
    not_measured: dict[str, str]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run as docs/metrics.md defines them; `msgspec.to_builtins` of it is saved in the results.

    `tbt_ms` is over every gap between tokens (None where chunks held several: `inter_chunk_ms`), `ttfo_ms` to the first token
    that is no reasoning.
    """

    trials: int
    window_s: float
    requests: RequestCounts
    errors: dict[str, int]
    finish_reasons: dict[str, int]
    tokens: TokenCounts
    prefix_cache: PrefixCache | None
    ttft_ms: Spread | None
    ttfo_ms: Spread | None
    tbt_ms: Spread | None
    inter_chunk_ms: Spread | None
    mean_tbt_ms: Spread | None
    e2e_ms: Spread | None
    send_delay_ms: Spread | None
    client_ms: Spread | None
    send_ms: Spread | None
    proxy_ms: Spread | None
    api_server_ms: Spread | None
    queue_ms: Spread | None
    compute_ms: Spread | None
    prefill_ms: Spread | None
    handoff_ms: Spread | None
    kv_transfer_ms: Spread | None
    decode_wait_ms: Spread | None
    decode_step_ms: Spread | None
    decode_ms: Spread | None
    reply_ms: Spread | None
    first_token: dict[str, FirstToken]
    throughput: Throughput
    goodput: Goodput
    energy: Energy
    servers: dict[str, ServerSummary]
    devices: dict[str, DeviceSummary]


class RunAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """One run, analyzed; `source` identifies the files that it was made from, name to gate are the run's own.

    `flags` are the run's and those of its devices. `starts` maps a trial to the server start that it was measured on (None: not
    recorded); `gpus` is how many GPUs the deployment used (None: none). `figures` maps a metric's name (`metrics.METRICS`) to its
    values, where it was measured. `requests` are columns for requests.csv and scatter panels.
    """

    schema: str = SCHEMA
    pdbench: str = __version__
    source: str = ""
    run_schema: str
    run_id: str | None
    name: str
    clock: Clock
    config: dict[str, Any]
    host: dict[str, Any]
    versions: dict[str, str | None]
    gate: Gate | None
    flags: list[Flag]
    starts: dict[int, int | None]
    gpus: int | None
    summary: Summary
    figures: dict[str, Figure]
    curves: Curves
    requests: Requests

    def void(self, *, overload: bool = False) -> str | None:
        """Why its figures do not count (None: they do). In an `overload`, as a search's loads may be, any number of requests may fail."""
        return failures.void(self.flags, None if overload else self.summary.errors, self.summary.requests.sent)


def is_foreign(run: Run | RunAnalysis) -> bool:
    """Was the server given by its URL alone? Then `host` and `versions` are those of the client's host, of the server nothing is known
    but the devices that were measured and what it told of its engines."""
    return run.name == "bench" and not run.config.get("serve")


def analyze(run: Run) -> RunAnalysis:
    """The analysis of a run in memory; it does not change the run."""
    timings = timings_of(run)
    meters = [Meter(device) for device in run.devices]
    # Of a run that does not say, those that were sampled.
    gpus = run.config.get("gpus") or sum(device.kind == "gpu" for device in run.devices)
    cache = prefix_cache_of(run)

    def totals_in(windows: list[Interval]) -> Totals:
        return timings.totals(windows, joules(metered(meters), windows).energy_j, gpus)

    totals = totals_in(timings.windows)
    cut = failures.cut_short(run)
    whole = [trial for trial in run.trials if trial.index not in cut]
    in_trial = {trial.index: totals_in([(trial.start_s, trial.end_s)]) for trial in whole}
    summary = _summary(run, timings, meters, totals, cache)
    return RunAnalysis(
        run_schema=run.schema,
        **{name: getattr(run, name) for name in METADATA},
        flags=flags_of(run, timings, meters, cache, summary.energy),
        starts={trial.index: trial.start for trial in whole},
        gpus=gpus or None,
        summary=summary,
        figures=_figures(timings, totals, in_trial),
        curves=curves_of(run, timings),
        requests=timings.requests,
    )


def save_analysis(analysis: RunAnalysis, folder: Path | str, source: str | None = None) -> Path:
    """Write `analysis.json` beside the results that it was made from (None: those that are there). Raises UserError when the
    folder takes no file."""
    path = Path(folder) / FILE
    analysis = msgspec.structs.replace(analysis, source=source or _source(Path(folder)))
    write_whole(path, documents.sealed(msgspec.json.encode(analysis, enc_hook=lambda array: array.tolist())))
    return path


def load_analysis(folder: Path | str) -> RunAnalysis:
    """The analysis saved in `folder` when it is this version's and of the results there, else made again and saved where that
    can be. Raises UserError with the remedy when `folder` holds no results, or files of several runs."""
    folder = Path(folder)
    # Of the files before they are read: when others are swapped in meanwhile, what is saved is made again.
    source = _source(folder)
    try:
        data = (folder / FILE).read_bytes()
        saved = msgspec.json.decode(data, type=RunAnalysis, dec_hook=_array)
        is_of_these = (saved.schema, saved.pdbench, saved.source) == (SCHEMA, __version__, source)
        if source and is_of_these and not documents.is_edited(data):
            check_name(saved.name, f"{folder / FILE}: name")
            return saved
    except (OSError, *NOT_JSON):
        pass
    analysis = analyze(load_run(folder))
    try:
        save_analysis(analysis, folder, source)
    except UserError:
        pass  # a folder that may only be read
    return analysis


def _figures(timings: Timings, totals: Totals, in_trial: dict[int, Totals]) -> dict[str, Figure]:
    figures = {}
    for metric in METRICS.values():
        if metric.latency is None:
            value, count = totals.ratio(metric.name), None
            each = {index: trial.ratio(metric.name) for index, trial in in_trial.items()}
        else:
            latency, share = timings.latencies[metric.latency], np.array(metric.quantile)
            value = float(quantiles(latency.rising, share)) if len(latency.rising) else None
            by_trial = {index: values for index, values in latency.by_trial.items() if index in in_trial}
            count = sum(map(len, by_trial.values()))
            each = {index: float(quantiles(values, share)) for index, values in by_trial.items()}
        if value is not None:
            trials = {index: figure for index, figure in each.items() if figure is not None}
            figures[metric.name] = Figure(value=value, trials=trials, count=count)
    return figures


def _summary(run: Run, timings: Timings, meters: list[Meter], totals: Totals, cache: PrefixCache | None) -> Summary:
    requests, slo, load = timings.requests, timings.slo, run.config.get("load") or {}
    errors = Counter(error or "no_tokens" for error, ok in zip(requests.error, requests.ok, strict=True) if not ok)
    finished = Counter(reason or "none" for reason, ok in zip(requests.finish_reason, requests.ok, strict=True) if ok)
    ways = Counter(way for way, ok in zip(requests.counted_by, requests.ok, strict=True) if ok and way)
    merged = int(np.count_nonzero(timings.tbt_ms == 0.0))
    sent, succeeded = len(requests.ok), int(requests.ok.sum())
    return Summary(
        trials=len(run.trials),
        window_s=totals.window_s,
        requests=RequestCounts(sent=sent, succeeded=succeeded, failed=sent - succeeded),
        errors=dict(errors.most_common()),
        finish_reasons=dict(finished.most_common()),
        tokens=TokenCounts(
            prompt=_count(requests.prompt_tokens[requests.ok]),
            output=_count(requests.output_tokens[requests.ok]),
            counted_by=sorted(way for way, count in ways.items() if count >= COUNTED_SHARE * succeeded),
            merged_pct=per(100.0 * merged, len(timings.tbt_ms)),
        ),
        prefix_cache=cache,
        **{f"{name}_ms": spread(latency.rising) for name, latency in timings.latencies.items()},
        inter_chunk_ms=spread(rising(timings.inter_chunk_ms)),
        send_delay_ms=spread(rising(requests.send_delay_ms)),
        **{f"{name}_ms": spread(rising(values)) for name, values in requests.phase_ms.items()},
        first_token={
            sender: FirstToken(
                requests=int(from_it.sum()),
                ttft_ms=spread(rising(requests.ttft_ms[from_it])),
                first_gap_ms=spread(rising(requests.first_gap_ms[from_it])),
            )
            for sender in (*ROLE_ORDER, "decode_alone")
            if (from_it := requests.first_sent_by(sender)).any()
        },
        throughput=Throughput(**{name: totals.ratio(name) for name in Throughput.__struct_fields__}),
        goodput=Goodput(
            **{name: load.get(name) for name in SLO},
            requests_per_s=totals.ratio("goodput_requests_per_s"),
            requests_per_s_per_device=totals.ratio("goodput_requests_per_s_per_device"),
            j_per_good_request=totals.ratio("j_per_good_request"),
            met_pct=slo.met_pct if slo.goodput_known else None,
        ),
        energy=energy_of(run, timings, meters, totals, cache),
        servers=servers_of(run),
        devices={meter.device.label: _device(meter, timings.windows) for meter in meters},
    )


def _device(meter: Meter, windows: list[Interval]) -> DeviceSummary:
    device, during, readings = meter.device, meter.samples_in(windows), {}
    energy, scopes = meter.energy_in(windows), meter.scopes_in(windows)
    mean_w = mean_powers_w(energy, scopes)
    for field in READINGS:
        values = [value for sample in during if (value := getattr(sample, field)) is not None]
        if values:
            mean = mean_w[field] if field in mean_w else float(np.mean(values))
            readings[field] = Range(mean=mean, min=min(values), max=max(values))
    reasons = [sample.throttle for sample in during if sample.throttle is not None]
    capped = sum(not POWER_CAPS.isdisjoint(of_sample) for of_sample in reasons)
    silent = meter.why_silent(windows)
    return DeviceSummary(
        name=device.name,
        kind=device.kind,
        role=device.role,
        samples=len(during),
        energy=energy,
        scopes=scopes,
        readings=readings,
        default_power_limit_w=device.default_power_limit_w,
        settings=device.settings,
        power_capped_pct=per(100.0 * capped, len(reasons)),
        sampling=device.sampling,
        not_measured=device.not_measured | ({"energy_j": silent} if silent else {}),
    )


def _count(values: Array) -> int | None:
    return int(values.sum()) if len(values) and np.isfinite(values).all() else None


def _source(folder: Path) -> str:
    """A hash of the results, the device files and this package, whose figures may be others in the next commit; empty where they
    cannot be read."""
    digest = blake2b(_code(), digest_size=16)
    try:
        for path in (*results_files(folder), *device_files(folder)):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)} ".encode())
            digest.update(data)
    except OSError:
        return ""
    return digest.hexdigest()


@cache
def _code() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))


def _array(kind: Any, values: Any) -> Any:
    """A saved list as the array type of its field; null becomes NaN."""
    return np.array(values, dtype=kind.__args__[1].__args__[0])
