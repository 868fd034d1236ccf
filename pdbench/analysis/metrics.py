"""A run's records to arrays: the time to first token, between tokens and end to end of every request, as docs/metrics.md defines.

Durations are derived here and nowhere else. NaN in an array is None in the records: not measured.
Try: python -c "from pdbench.records import load_run as l; from pdbench.analysis.metrics import measure as m; print(m(l('single_results')))"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdbench.records import Interval, RequestRecord, Run, Trial

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
PHASES = ("client", "queue", "prefill", "kv_transfer", "decode")
TTFT_PHASES = PHASES[1:]


@dataclass(frozen=True)
class Metric:
    """A figure that runs are compared by: its name (as --fail-if takes it), title, unit and which way is better.

    A latency has the key of `Measured.latencies` and the quantile that is taken of it; all others are a property of `Totals`.
    """

    name: str
    title: str
    unit: str
    lower_is_better: bool
    latency: str | None = None
    quantile: float | None = None


METRICS = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{key}_p{percent}_ms", f"{title} p{percent}", "ms", True, key, percent / 100)
            for key, title in (("ttft", "TTFT"), ("tbt", "TBT"), ("e2e", "E2E"))
            for percent in (50, 90, 99)
        ),
        Metric("output_tokens_per_s", "Output tokens/s", "", False),
        Metric("output_tokens_per_s_per_device", "Tokens/s per GPU", "", False),
        Metric("goodput_requests_per_s", "Goodput", "requests/s", False),
        Metric("j_per_output_token", "Energy per token", "J", True),
        Metric("mean_power_w", "Mean power", "W", True),
    )
}


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of values is like; quantiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float
    count: int


def quantiles(rising: Array, shares: Array) -> Array:
    """Quantiles (share 0 to 1) of sorted values, at least one, by linear interpolation as numpy's."""
    place = shares * (len(rising) - 1)
    below = place.astype(np.int64)
    above = np.minimum(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def spread(values: Array) -> Spread | None:
    """The spread of what was measured; None when nothing was."""
    rising = np.sort(values[np.isfinite(values)])
    if not len(rising):
        return None
    p50, p90, p99 = quantiles(rising, np.array([0.5, 0.9, 0.99])).tolist()
    low, high = float(rising[0]), float(rising[-1])
    return Spread(mean=float(rising.mean()), p50=p50, p90=p90, p99=p99, min=low, max=high, count=len(rising))


def per(top: float | None, bottom: float | None) -> float | None:
    """A ratio; None when either is not known or there is nothing to divide by."""
    return None if top is None or not bottom or bottom < 0 else top / bottom


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What some windows held. None: not measured (energy), no SLO (good requests), no GPU (devices)."""

    window_s: float
    output_tokens: int
    requests: int
    good_requests: int | None
    energy_j: float | None
    devices: int | None

    @property
    def requests_per_s(self) -> float | None:
        return per(self.requests, self.window_s)

    @property
    def goodput_requests_per_s(self) -> float | None:
        return per(self.good_requests, self.window_s)

    @property
    def output_tokens_per_s(self) -> float | None:
        return per(self.output_tokens, self.window_s)

    @property
    def output_tokens_per_s_per_device(self) -> float | None:
        return per(self.output_tokens_per_s, self.devices)

    @property
    def mean_power_w(self) -> float | None:
        return per(self.energy_j, self.window_s)

    @property
    def j_per_output_token(self) -> float | None:
        return per(self.energy_j, self.output_tokens)

    @property
    def j_per_request(self) -> float | None:
        return per(self.energy_j, self.requests)

    @property
    def output_tokens_per_j(self) -> float | None:
        return per(self.output_tokens, self.energy_j)

    @property
    def goodput_per_w(self) -> float | None:
        """Good requests a second over mean watts, which is good requests per joule."""
        return per(self.good_requests, self.energy_j)


@dataclass(frozen=True)
class Measured:
    """The measured requests of a run (no warm-up), in the order of sending.

    One entry a request: `trial` (index into `trials`), `ok`, `sent_s`, `end_s`, `first_s` and `last_s` (tokens), `ttft_ms`,
    `e2e_ms`, `mean_tbt_ms`, `send_delay_ms`, `prompt_tokens`, `output_tokens`. One entry a gap between two tokens of a
    successful request: `tbt_ms`, its request `tbt_owner`, its instant `tbt_s`. `token_s` holds every token's arrival, of failed
    requests too. `phase_s` has each request's (start, end) of a phase, `phase_ms` their durations but for failed requests.
    `merged_tokens` came in another's chunk.
    """

    trials: list[Trial]
    requests: list[RequestRecord]
    trial: NDArray[np.int64]
    ok: NDArray[np.bool_]
    sent_s: Array
    end_s: Array
    first_s: Array
    last_s: Array
    ttft_ms: Array
    e2e_ms: Array
    mean_tbt_ms: Array
    send_delay_ms: Array
    prompt_tokens: Array
    output_tokens: Array
    tbt_ms: Array
    tbt_owner: NDArray[np.int64]
    tbt_s: Array
    token_s: Array
    phase_s: dict[str, Array]
    phase_ms: dict[str, Array]
    merged_tokens: int

    @property
    def windows(self) -> list[Interval]:
        """Every trial's measured window."""
        return [(trial.start_s, trial.end_s) for trial in self.trials]

    @property
    def window_s(self) -> float:
        """Seconds of all trials' measured windows together."""
        return sum(end - start for start, end in self.windows)

    @cached_property
    def window_tokens(self) -> int:
        """Tokens that arrived in the trials' windows, those of failed requests too."""
        return int(np.count_nonzero(inside(self.token_s, self.windows)))

    @property
    def latencies(self) -> dict[str, tuple[Array, IntArray]]:
        """ttft, tbt (every gap), mean_tbt, e2e: values in ms and the place in `trials` of each; NaN where there is none."""
        return {
            "ttft": (self.ttft_ms, self.trial),
            "tbt": (self.tbt_ms, self.trial[self.tbt_owner]),
            "mean_tbt": (self.mean_tbt_ms, self.trial),
            "e2e": (self.e2e_ms, self.trial),
        }

    def ended_inside(self, which: NDArray[np.bool_]) -> int:
        """How many of `which` requests ended in a trial's window."""
        return int(np.count_nonzero(inside(self.end_s[which], self.windows)))


def inside(instants: Array, windows: Sequence[Interval]) -> NDArray[np.bool_]:
    """For each instant, whether it lies in one of the windows."""
    found = np.zeros(len(instants), dtype=bool)
    for start, end in windows:
        found |= (instants >= start) & (instants <= end)
    return found


def option(config: Mapping[str, Any], name: str) -> Any:
    """The option `name` of a saved configuration, whether it lies flat or in a section; None when it is not there."""
    if name in config:
        return config[name]
    sections = [value for value in config.values() if isinstance(value, Mapping)]
    return next((section[name] for section in sections if name in section), None)


def measure(run: Run) -> Measured:
    """All of a run's requests as arrays. A failed request keeps its instants, but has no latency and no gaps."""
    requests = sorted((r for r in run.requests if not r.warmup), key=_sent_or_planned_s)
    trials = run.trials or _whole_run(requests)
    position = {trial.index: place for place, trial in enumerate(trials)}
    counted = np.fromiter((len(r.token_s) for r in requests), dtype=np.int64, count=len(requests))
    answered = np.array([r.error is None for r in requests], dtype=bool)
    ok = answered & (counted > 0)
    sent, end, planned = (_column(requests, name) for name in ("sent_s", "end_s", "planned_s"))
    tokens = np.fromiter(chain.from_iterable(r.token_s for r in requests), dtype=float, count=counted.sum())
    begin = np.cumsum(counted) - counted
    first = _where(counted > 0, tokens, begin)
    last = _where(counted > 0, tokens, begin + counted - 1)
    owner = np.repeat(np.arange(len(requests)), counted)
    gap = np.diff(tokens) * 1e3
    same = (owner[1:] == owner[:-1]) & ok[owner[1:]]
    gaps = gap[same]
    reported = {name for request in requests for name in request.phases}
    unknown = np.full((len(requests), 2), np.nan)
    phases = {name: _spans(requests, name) if name in reported else unknown for name in PHASES}
    said = _column(requests, "output_tokens")
    return Measured(
        trials=trials,
        requests=requests,
        trial=np.array([position.get(r.trial, -1) for r in requests], dtype=np.int64),
        ok=ok,
        sent_s=sent,
        end_s=end,
        first_s=first,
        last_s=last,
        ttft_ms=np.where(ok, (first - sent) * 1e3, np.nan),
        e2e_ms=np.where(ok, (end - sent) * 1e3, np.nan),
        mean_tbt_ms=np.where(ok & (counted > 1), (last - first) / np.maximum(counted - 1, 1) * 1e3, np.nan),
        send_delay_ms=(sent - planned) * 1e3,
        prompt_tokens=_column(requests, "prompt_tokens"),
        output_tokens=np.where(np.isnan(said), counted, said),
        tbt_ms=gaps,
        tbt_owner=owner[1:][same],
        tbt_s=tokens[1:][same],
        token_s=tokens,
        phase_s=phases,
        phase_ms={name: np.where(answered, span[:, 1] - span[:, 0], np.nan) * 1e3 for name, span in phases.items()},
        merged_tokens=int(np.count_nonzero(gaps == 0.0)),
    )


def mean_ttft_parts_ms(measured: Measured) -> dict[str, float] | None:
    """The mean TTFT taken apart into what the phases cover, in order and without overlap; `other` is what nobody measured.

    A part ends where a later phase begins (prefill's reply comes after its KV cache has left), decode's at the first token.
    A phase that began after every first token (the handoff, where prefill's token opens the stream) is no part.
    Over the requests that succeeded and have a phase; None where there are none.
    """
    known = {name: span for name in TTFT_PHASES if np.isfinite(span := measured.phase_s[name]).any()}
    begins = np.array([span[:, 0] for span in known.values()])
    told = np.isfinite(measured.ttft_ms) & np.isfinite(begins).any(axis=0)
    if not told.any():
        return None
    reached, parts = measured.sent_s[told], {}
    first = reached + measured.ttft_ms[told] / 1e3
    spans = [span[told].T for span in known.values()]
    for place, (name, (start, end)) in enumerate(zip(known, spans, strict=True)):
        later = [np.where(begin >= start, begin, np.inf) for begin, _ in spans[place + 1 :]]
        stop = np.minimum.reduce([end, first, *later])
        if (start < first).any():
            parts[name] = np.nan_to_num(np.maximum(stop - np.maximum(start, reached), 0.0)) * 1e3
        reached = np.fmax(reached, stop)
    parts["other"] = np.maximum(measured.ttft_ms[told] - sum(parts.values()), 0.0)
    return {name: float(part.mean()) for name, part in parts.items()}


def _column(requests: Sequence[RequestRecord], name: str) -> Array:
    """One number a request; NaN for None."""
    return np.array([getattr(request, name) for request in requests], dtype=float)


def _where(known: NDArray[np.bool_], values: Array, places: NDArray[np.int64]) -> Array:
    """The values at these places; NaN where there is none."""
    found = np.full(len(known), np.nan)
    found[known] = values[places[known]]
    return found


def _spans(requests: Sequence[RequestRecord], name: str) -> Array:
    """When each request was in this phase, shape (requests, 2); NaN where that was not measured."""
    unknown = (np.nan, np.nan)
    spans = [request.phases.get(name) or unknown for request in requests]
    return np.array(spans, dtype=float).reshape(-1, 2)


def _sent_or_planned_s(request: RequestRecord) -> float:
    return request.planned_s if request.sent_s is None else request.sent_s


def _whole_run(requests: list[RequestRecord]) -> list[Trial]:
    """A run saved without trials is one trial from its first request to its last end."""
    starts = [r.sent_s for r in requests if r.sent_s is not None]
    ends = [r.end_s for r in requests if r.end_s is not None]
    return [Trial(index=0, start_s=min(starts), end_s=max(ends))] if starts and ends else []
