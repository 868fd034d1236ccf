"""What servers counted while the loads ran: queues, KV and prefix caches, preemptions; what of it a reader must know; and lines of logs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

import msgspec
import numpy as np

from pdbench.analysis.metrics import Array, per
from pdbench.config import TEMPLATE_TOKENS
from pdbench.events import LogLine, ServerSeries
from pdbench.records import Flag, Run

KV_FULL = 0.95
"""Of the KV cache: a prompt of a few hundred tokens may not find its blocks beyond this."""
QUEUE_SIGMAS = 2.5
"""Simulated queues at 0.8 to 0.95 of what a server takes on are flagged in under 1 of 100 runs of equal requests, in up to 3 where lengths
vary as an exponential does; at 1.4 in 63 of 100 runs of 120 requests and in all of 400."""
QUEUE_READINGS = 12
MOST_COMPUTED = 0.01
"""Share of a load's prompt tokens that decode may compute itself beside one per request."""
MOST_OTHERS, OTHER_TOKENS = 0.05, 256
"""Share of a load's output tokens, and tokens, that its servers may generate beside them: health checks, a token that nobody sees."""
SERVER_CLOCK_ERROR_S = 0.01
"""A server's clock may be so far from the client's."""
WHOLE = (
    "preemptions", "prompt_tokens", "external_tokens", "output_tokens", "kv_transfers", "kv_failures", "kv_bytes"
)  # fmt: skip
"""Figures that are a counter's rise."""
CACHED_TOO_MUCH_PCT = 1.0


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One server during loads, their warm-ups left out; None: it does not tell.

    `queue_ms` is the mean wait of the requests that ended. `cached_pct`: of its prompt tokens, by its own prefix cache;
    `accepted_pct`: of drafted tokens (speculative decoding); `external_tokens`: prompt tokens whose KV cache came from elsewhere.
    """

    readings: int
    running_mean: float | None
    running_max: float | None
    waiting_mean: float | None
    waiting_max: float | None
    kv_used_max_pct: float | None
    preemptions: int | None
    queue_ms: float | None
    cached_pct: float | None
    accepted_pct: float | None
    prompt_tokens: int | None
    external_tokens: int | None
    output_tokens: int | None
    kv_transfers: int | None
    kv_failures: int | None
    kv_bytes: int | None


class ServerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One server over all loads and in each (trial index -> figures); `missed` readings had no answer, warm-ups included."""

    role: str
    missed: int
    loads: ServerFigures
    trials: dict[int, ServerFigures]


class PrefixCache(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens of the loads (warm-ups left out), those that a prefix cache had, and at most how many the load shares on purpose.

    `source`: counters of the instances that compute prompts, or the usage of the answers where a server has no counters. What
    decode has of prefill's KV cache counts as computed.
    """

    prompt_tokens: int
    cached_tokens: int
    cached_pct: float
    shared_tokens: int
    source: Literal["counters", "usage"]


@dataclass(frozen=True)
class Load:
    """One trial's requests: from the first one sent to the last end. `before_s`: from then on nothing else was sent, `until_s`:
    something else is; `arrivals_s` is when the last one was sent."""

    trial: int
    before_s: float
    start_s: float
    arrivals_s: float
    end_s: float
    until_s: float
    requests: int


def loads_of(run: Run) -> list[Load]:
    """In the order of time; of trials that sent something."""
    spans: list[tuple[float, float, bool, int]] = sorted(
        (request.sent_s, request.end_s or request.sent_s, request.warmup, request.trial)
        for request in run.requests
        if request.sent_s is not None
    )
    loads = []
    for trial in sorted({trial for _, _, warmup, trial in spans if not warmup}):
        measured = [span for span in spans if span[3] == trial and not span[2]]
        start_s, end_s = measured[0][0], max(end for _, end, _, _ in measured)
        loads.append(
            Load(
                trial=trial,
                before_s=max((end for begin, end, _, _ in spans if begin < start_s), default=-inf)
                - SERVER_CLOCK_ERROR_S,
                start_s=start_s,
                arrivals_s=measured[-1][0],
                end_s=end_s,
                until_s=min((begin for begin, _, _, _ in spans if begin > end_s), default=inf),
                requests=len(measured),
            )
        )
    return sorted(loads, key=lambda load: load.start_s)


def servers_of(run: Run) -> dict[str, ServerSummary]:
    """Server -> its figures; of those that answered."""
    loads = loads_of(run)
    return {
        series.server: ServerSummary(
            role=series.role,
            missed=series.missed,
            loads=_figures(series, loads),
            trials={load.trial: _figures(series, [load]) for load in loads},
        )
        for series in run.servers
        if series.t_s
    }


def prefix_cache_of(run: Run) -> PrefixCache | None:
    """None where neither counters nor usage tell."""
    measured = [request for request in run.requests if not request.warmup and request.sent_s is not None]
    prefill = [[each for each in trial.prefix_cache.values() if each.role != "decode"] for trial in run.trials]
    asked = {series.server for series in run.servers if series.role != "decode"}
    # The counts of some instances say nothing of the others' prompts.
    if prefill and all(prefill) and all(asked <= trial.prefix_cache.keys() for trial in run.trials):
        source: Literal["counters", "usage"] = "counters"
        told = [(each.prompt_tokens, each.cached_tokens) for of_trial in prefill for each in of_trial]
    else:
        source = "usage"
        told = [(r.prompt_tokens or 0, cached) for r in measured if (cached := r.cached_prompt_tokens) is not None]
    prompt_tokens, cached_tokens = sum(prompt for prompt, _ in told), sum(cached for _, cached in told)
    # Of a request that two instances share, decode tells usage: what it calls cached came from prefill.
    if source == "usage" and (not prompt_tokens or run.name == "disaggregated"):
        return None
    return PrefixCache(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        # A server without prefix caching asks its cache nothing.
        cached_pct=per(100.0 * cached_tokens, prompt_tokens) or 0.0,
        shared_tokens=sum(request.shared_prompt_tokens for request in measured),
        source=source,
    )


def _figures(series: ServerSeries, loads: Sequence[Load]) -> ServerFigures:
    t_s = np.array(series.t_s)
    during = np.zeros(len(t_s), dtype=bool)
    for load in loads:
        during |= (t_s >= load.start_s) & (t_s <= load.end_s)

    def gauge(key: str) -> tuple[float | None, float | None]:
        """Mean and largest."""
        values = _column(series, key)[during]
        values = values[np.isfinite(values)]
        return (float(values.mean()), float(values.max())) if len(values) else (None, None)

    def count(key: str) -> float | None:
        counts = [_counted(series, key, load) for load in loads]
        return None if None in counts or not counts else sum(filter(None, counts))

    def percent(top: float | None, bottom: float | None) -> float | None:
        return None if top is None else per(100 * top, bottom)

    (running_mean, running_max), (waiting_mean, waiting_max) = gauge("running"), gauge("waiting")
    kv_used, accept_rate, queued_s = gauge("kv_used")[1], gauge("accept_rate")[0], count("queued_s")
    accepted_pct = percent(count("accepted_tokens"), count("drafted_tokens"))
    return ServerFigures(
        readings=int(during.sum()),
        running_mean=running_mean,
        running_max=running_max,
        waiting_mean=waiting_mean,
        waiting_max=waiting_max,
        kv_used_max_pct=None if kv_used is None else 100 * kv_used,
        queue_ms=None if queued_s is None else per(1e3 * queued_s, count("queued")),
        cached_pct=percent(count("cache_hits"), count("cache_queries")),
        accepted_pct=100 * accept_rate if accepted_pct is None and accept_rate is not None else accepted_pct,
        **{name: None if (counted := count(name)) is None else round(counted) for name in WHOLE},
    )


def _column(series: ServerSeries, key: str) -> Array:
    """Its value at each reading, NaN where it was not told."""
    values = series.values.get(key)
    return np.full(len(series.t_s), np.nan) if values is None else np.array(values, dtype=float)


def _rise(series: ServerSeries, key: str, load: Load) -> tuple[Array, Array] | None:
    """Instants from the last reading before the load to the first after it, and how far a counter had risen by each; None where no
    reading came between the warm-up and the load, or the server was started again."""
    t_s = np.array(series.t_s)
    before = np.flatnonzero((t_s >= load.before_s) & (t_s <= load.start_s))
    after = np.flatnonzero((t_s > load.start_s) & (t_s < load.until_s))
    if key not in series.values or not len(before) or not len(after):
        return None
    last = next((place for place in after if t_s[place] >= load.end_s), after[-1])
    values = _column(series, key)[before[-1] : last + 1]
    # A series with labels is there from its first count on.
    values = values if np.isfinite(values[0]) else np.nan_to_num(values)
    known = np.isfinite(values)
    rise = values[known] - values[0]
    return None if (np.diff(rise) < 0).any() else (t_s[before[-1] : last + 1][known], rise)


def _counted(series: ServerSeries, key: str, load: Load) -> float | None:
    rise = _rise(series, key, load)
    if rise is None or rise[0][-1] < load.end_s - SERVER_CLOCK_ERROR_S:
        return None  # what came after the last reading is not known
    return float(rise[1][-1])


def server_flags(run: Run) -> Iterator[Flag]:
    """Preemptions, a full KV cache, a queue that grows, and lines of logs: one of each for a server, with the instant of the first;
    and prompts that decode computed itself."""
    loads, options = loads_of(run), run.config.get("load") or {}
    if not (run.config.get("serve") or {}).get("disaggregate_above"):  # else decode computes short prompts on purpose
        yield from _computed_by_decode(run, loads)
    yield from _others_served(run, loads)
    steady = options.get("rate") and not any(options.get(name) for name in ("trace", "stages", "ramp_to"))
    for series in run.servers:
        yield from _preempted(series, loads)
        yield from _kv_full(series, loads)
        peers = sum(other.role == series.role for other in run.servers)
        growing = [grown for load in loads if steady and (grown := _growth(series, load, load.requests / peers))]
        if growing:
            more = f" (and in {len(growing) - 1} more trials)" if len(growing) > 1 else ""
            yield Flag(
                "queue-grows",
                f"{series.server}: {growing[0]}{more}; the rate is not sustained, and TTFT depends on how long it lasts",
            )
        lines: dict[str, list[tuple[Load, LogLine]]] = {}
        for line in series.lines:
            for load in loads:
                if load.before_s <= line.t_s < load.until_s:
                    lines.setdefault(line.flag, []).append((load, line))
        for flag, of_flag in lines.items():
            load, line = of_flag[0]
            more = f" and {len(of_flag) - 1} more" if len(of_flag) > 1 else ""
            text = line.text.replace(";", ",")  # a flag's parts have semicolons between them
            where = f'{series.server}: "{text}"{more} in its log, first seen {instant(load, line.t_s)}'
            yield Flag(flag, f"{where}: {line.meaning}")


def marks_of(run: Run) -> dict[str, Array]:
    """Flag -> the instants of its log lines; of preemptions those of the readings that had more than the one before."""
    marks: dict[str, list[float]] = {}
    loads = loads_of(run)
    for series in run.servers:
        for line in series.lines:
            marks.setdefault(line.flag, []).append(line.t_s)
        for t_s, rise in filter(None, (_rise(series, "preemptions", load) for load in loads)):
            if (more := t_s[1:][np.diff(rise) > 0]).size:
                marks.setdefault("preempted", []).extend(more.tolist())
    return {flag: np.array(instants) for flag, instants in marks.items()}


def _computed_by_decode(run: Run, loads: Sequence[Load]) -> Iterator[Flag]:
    decode = [series for series in run.servers if series.role == "decode"]
    for load in loads:
        prompts, external = (
            [_counted(series, key, load) for series in decode] for key in ("prompt_tokens", "external_tokens")
        )
        if not decode or None in prompts or None in external:
            continue
        cached = [_counted(series, "cache_hits", load) for series in decode]
        tokens, others = sum(filter(None, prompts)), sum(filter(None, [*external, *cached]))
        if tokens - others - load.requests > MOST_COMPUTED * tokens:
            what = f"trial {load.trial + 1}: decode computed {tokens - others:.0f} of {tokens:.0f} prompt tokens itself, their KV did not come"
            yield Flag("kv-not-external", f"{what} from prefill: read the logs of prefill and decode")


def _others_served(run: Run, loads: Sequence[Load]) -> Iterator[Flag]:
    """Servers that generated more than this load's answers have: somebody else used them, and shared what is measured."""
    counting = [series for series in run.servers if series.role != "prefill"]
    for load in loads:
        generated = [_counted(series, "output_tokens", load) for series in counting]
        ours = [request for request in run.requests if request.trial == load.trial and not request.warmup]
        lengths = [len(request.token_s) if request.output_tokens is None else request.output_tokens for request in ours]
        # Of an answer that was cut off, more was generated than came; of chunks without a count, nobody knows.
        cut = sum(request.error is not None for request in ours)
        unknown = any(request.error is None and request.output_tokens is None for request in ours)
        if not counting or None in generated or unknown:
            continue
        tokens, most = sum(filter(None, generated)), sum(lengths) + cut * max(lengths)
        if tokens > (1 + MOST_OTHERS) * most + OTHER_TOKENS:
            yield Flag(
                "other-traffic",
                f"trial {load.trial + 1}: the servers generated {tokens:.0f} tokens, this load's answers have {sum(lengths)}: somebody else uses "
                "them, and latencies, throughput and energy are of both; measure again while nobody does",
            )


def _preempted(series: ServerSeries, loads: Sequence[Load]) -> Iterator[Flag]:
    first, count = None, 0.0
    for load in loads:
        rise = _rise(series, "preemptions", load)
        if rise is not None and rise[1][-1] > 0:
            first = first or instant(load, float(rise[0][np.flatnonzero(rise[1])[0]]))
            count += float(rise[1][-1])
    if first:
        detail = f"{series.server}: {count:.0f} preemptions, first seen {first}: their requests were computed again"
        yield Flag("preempted", f"{detail}; lower the load, or give more memory to KV")


def _kv_full(series: ServerSeries, loads: Sequence[Load]) -> Iterator[Flag]:
    first, readings = None, []
    for load in loads:
        t_s, used = np.array(series.t_s), _column(series, "kv_used")
        during = (t_s >= load.start_s) & (t_s <= load.end_s) & np.isfinite(used)
        readings.append(used[during])
        if (full := t_s[during][used[during] >= KV_FULL]).size:
            first = first or instant(load, float(full[0]))
    if first:
        used = np.concatenate(readings)
        share_pct, limit_pct = 100 * np.count_nonzero(used >= KV_FULL) / len(used), 100 * KV_FULL
        detail = f"{series.server}: KV cache up to {100 * used.max():.0f} % full, in {share_pct:.0f} % of the readings over {limit_pct:.0f} %"
        yield Flag(
            "kv-full", f"{detail}, first seen {first}: prompts wait for room; lower the load, or give more memory to KV"
        )


def _growth(series: ServerSeries, load: Load, requests: float) -> str | None:
    """How a queue grew: it is longer in each quarter of the arrivals than in the one before, and by more than chance explains.

    A server that keeps up exactly has a queue like a random walk: after n Poisson arrivals at a steady rate it has moved by
    sqrt(n) (one standard deviation). Between the middles of the first and the last quarter three quarters of the requests arrive.
    """
    t_s, waiting = np.array(series.t_s), _column(series, "waiting")
    during = (t_s >= load.start_s) & (t_s <= load.arrivals_s) & np.isfinite(waiting)
    if during.sum() < QUEUE_READINGS:
        return None
    t_s, waiting, length_s = t_s[during], waiting[during], load.arrivals_s - load.start_s
    quarter = np.minimum((4 * (t_s - load.start_s) / length_s).astype(int), 3)
    means = [float(waiting[quarter == number].mean()) for number in range(4) if (quarter == number).any()]
    growth = means[-1] - means[0]
    if len(means) < 4 or (np.diff(means) <= 0).any() or growth <= QUEUE_SIGMAS * sqrt(0.75 * requests):
        return None
    half = instant(load, float(t_s[waiting > (means[0] + means[-1]) / 2][0]))
    came, left = requests / length_s, growth / (0.75 * length_s)
    return (
        f"its queue grew from {means[0]:.0f} to {means[-1]:.0f} requests, past half of that {half}: of {came:.3g} requests/s that came, "
        f"{left:.2g} were left over"
    )


def instant(load: Load, t_s: float) -> str:
    """A server's clock may be a little ahead of the client's."""
    return f"{max(0.0, t_s - load.start_s):.1f} s into trial {load.trial + 1}"


def prefix_cache_flags(run: Run, cache: PrefixCache | None) -> Iterator[Flag]:
    """More prompt tokens were cached than the load shares: by 1 % of the prompt tokens, a chat template's left out."""
    if cache is None:
        return
    load = run.config.get("load") or {}
    requests = sum(not request.warmup for request in run.requests)
    template_tokens = requests * TEMPLATE_TOKENS.get(load.get("endpoint", "completions"), 0)
    excess = cache.cached_tokens - cache.shared_tokens - template_tokens
    if 100.0 * excess > CACHED_TOO_MUCH_PCT * cache.prompt_tokens:
        shared_pct = 100.0 * cache.shared_tokens / cache.prompt_tokens
        yield Flag(
            "prefix-cache-hit",
            f"{cache.cached_pct:.0f} % of the prompt tokens came from a prefix cache, the load shares {shared_pct:.0f} %: "
            "measure with fresh prompts (no --nonce, no --verbatim-prompts), or start the servers again",
        )
