"""A run's records to arrays: every request's times as docs/metrics.md defines them, and what windows held, one over another (rates, joules
per token). Times of tokens are from arrivals.py, which requests meet the SLO from slo.py, joules from meter.py.

NaN in an array is None in the records: not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from pdbench.analysis.arrivals import Array, Arrivals, BoolArray, IntArray, arrivals_of, column
from pdbench.analysis.intervals import length_s
from pdbench.analysis.slo import Judged, judge
from pdbench.events import ProxyEvent, ways_of
from pdbench.failures import INTERRUPTED
from pdbench.records import Clock, Interval, RequestRecord, Run

PHASES = (
    "client", "send", "proxy", "api_server", "prefill", "queue", "compute", "handoff", "kv_transfer", "decode_wait", "decode_step",
    "decode", "reply",
)  # fmt: skip
"""A request's phases in the order in which they begin."""
FINER = {"prefill": "compute", "kv_transfer": "handoff", "decode": "decode_step"}
"""Phases whose part of TTFT is known in more detail where the other phase is."""
AFTER_PREFILL = ("handoff", "decode_wait", "decode_step")


@dataclass(frozen=True)
class Metric:
    """A figure that runs are compared by: a quantile of one of `Timings.latencies`, else one of `RATIOS`."""

    name: str
    lower_is_better: bool
    latency: str | None = None
    quantile: float | None = None

    @property
    def values_needed(self) -> int | None:
        """With fewer values a quantile is not judged: four are needed beyond it."""
        return None if self.quantile is None else round(4 / (1 - self.quantile))


METRICS = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{key}_p{percent}_ms", True, key, percent / 100)
            for key in ("ttft", "tbt", "e2e")
            for percent in (50, 90, 99)
        ),
        Metric("output_tokens_per_s", False),
        Metric("output_tokens_per_s_per_device", False),
        Metric("goodput_requests_per_s", False),
        Metric("j_per_output_token", True),
        Metric("mean_power_w", True),
    )
}


RATIOS = {
    "requests_per_s": ("requests", "window_s"),
    "output_tokens_per_s": ("output_tokens", "window_s"),
    "output_tokens_per_s_per_device": ("output_tokens", "device_s"),
    "goodput_requests_per_s": ("good_requests", "window_s"),
    "mean_power_w": ("energy_j", "window_s"),
    "j_per_output_token": ("energy_j", "output_tokens"),
    "j_per_request": ("energy_j", "requests"),
    "output_tokens_per_j": ("output_tokens", "energy_j"),
    "goodput_requests_per_s_per_device": ("good_requests", "device_s"),
    "j_per_good_request": ("energy_j", "good_requests"),
    "goodput_per_w": ("good_requests", "energy_j"),  # good requests per second over mean watts
}
"""Every figure that a window has once: what is divided by what."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of values is like; quantiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float
    count: int


class Requests(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The measured requests (no warm-up) in the order of sending, one array entry per request; NaN is not measured.

    Instants in seconds of the run's clock. A failed request (`ok` is False) has no latencies; it has an error, or no token came.
    `trial` is its Trial's index. `phase_ms` has the durations of `PHASES`, `compute_steps` the number of engine steps that computed the
    prompt. `error` is the error's kind, None without one.
    `first_token` is who sent it: prefill, decode, or decode_alone, which computed the prompt, too; None where the proxy did not tell.
    `first_gap_ms` is from the first token to the second.
    `ttfo_ms` is to the first token that is no reasoning; `counted_by` is how a request's tokens were counted.
    """

    id: list[str]
    trial: IntArray
    ok: BoolArray
    sent_s: Array
    end_s: Array
    ttft_ms: Array
    ttfo_ms: Array
    mean_tbt_ms: Array
    e2e_ms: Array
    send_delay_ms: Array
    prompt_tokens: Array
    output_tokens: Array
    phase_ms: dict[str, Array]
    compute_steps: Array
    error: list[str | None]
    finish_reason: list[str | None]
    first_token: list[str | None]
    first_gap_ms: Array
    counted_by: list[str | None]

    @property
    def cut(self) -> BoolArray:
        """Was it in flight when the load was stopped?"""
        return np.array([kind == INTERRUPTED for kind in self.error], dtype=bool)

    @property
    def lengths(self) -> tuple[Spread | None, Spread | None]:
        """Tokens of the prompts, and of the outputs, of the requests that succeeded."""
        prompt, output = (spread(rising(column[self.ok])) for column in (self.prompt_tokens, self.output_tokens))
        return prompt, output

    def first_sent_by(self, *senders: str) -> BoolArray:
        """Did one of these send the request's first token?"""
        return np.array([sender in senders for sender in self.first_token], dtype=bool)


@dataclass(frozen=True)
class Latency:
    """Sorted milliseconds of what was measured: all of it, and by trial index where a trial has any."""

    rising: Array
    by_trial: dict[int, Array]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What some windows held. None: not measured (energy, tokens; requests of one batch that decodes, which ends after its window), no SLO
    (good requests), no GPU (device seconds)."""

    window_s: float
    device_s: float | None
    output_tokens: float | None
    requests: int | None
    good_requests: int | None
    energy_j: float | None

    def ratio(self, name: str) -> float | None:
        """One of `RATIOS`; None where a part of it is unknown or there is nothing to divide by."""
        above, below = RATIOS[name]
        return per(getattr(self, above), getattr(self, below))


@dataclass(frozen=True, kw_only=True)
class Timings:
    """All of a run's measured instants and durations; `windows` are its trials'; `is_batch`: its requests decode together and end after those.

    One entry per request: `slo` (which met the SLO), `phase_s` (phase -> rows of start, end).
    One entry per gap between two tokens of a successful request: `tbt_ms`, its request's row `tbt_request`, its instant `tbt_s`.
    Gaps between chunks of several tokens are no token gaps: they are in `inter_chunk_ms`.
    """

    windows: list[Interval]
    is_batch: bool
    requests: Requests
    arrivals: Arrivals
    slo: Judged
    phase_s: dict[str, Array]
    tbt_ms: Array
    tbt_request: IntArray
    tbt_s: Array
    inter_chunk_ms: Array

    @cached_property
    def latencies(self) -> dict[str, Latency]:
        """ttft, ttfo (first answer token), tbt (every gap), mean_tbt (TPOT) and e2e."""
        trial = self.requests.trial
        values = {
            "ttft": (self.requests.ttft_ms, trial),
            "ttfo": (self.requests.ttfo_ms, trial),
            "tbt": (self.tbt_ms, trial[self.tbt_request]),
            "mean_tbt": (self.requests.mean_tbt_ms, trial),
            "e2e": (self.requests.e2e_ms, trial),
        }
        return {
            name: Latency(rising(ms), {int(i): of_i for i in np.unique(of) if len(of_i := rising(ms[of == i]))})
            for name, (ms, of) in values.items()
        }

    def totals(self, windows: Sequence[Interval], energy_j: float | None, gpus: int) -> Totals:
        """What windows held: tokens that arrived in them (failed requests' too), requests that ended in them."""
        ended = inside(self.requests.end_s, windows)
        tokens = float(self.arrivals.weight[inside(self.arrivals.token_s, windows)].sum())
        good = None if self.is_batch or not self.slo.goodput_known else self.slo.in_slo
        window_s = length_s(windows)
        return Totals(
            window_s=window_s,
            device_s=window_s * gpus if gpus else None,
            output_tokens=None if np.isnan(tokens) else round(tokens),
            requests=None if self.is_batch else int(np.count_nonzero(ended & self.requests.ok)),
            good_requests=None if good is None else int(np.count_nonzero(ended & good)),
            energy_j=energy_j,
        )


def timings_of_requests(requests: list[RequestRecord], load: dict[str, Any]) -> Timings:
    """Those of requests of which no run is saved (yet); `load` is their LoadConfig's, as a run saves it."""
    run = Run(name="", clock=Clock(0, 0), config={"load": load}, host={}, versions={}, requests=requests)
    return timings_of(run)


def timings_of(run: Run) -> Timings:
    """All of a run's requests as arrays. A failed request keeps its instants, but has no latency and no gaps."""
    records = [record for record in run.requests if not record.warmup]
    records.sort(key=lambda record: record.planned_s if record.sent_s is None else record.sent_s)
    sent_s, end_s, planned_s = (column(records, name) for name in ("sent_s", "end_s", "planned_s"))
    arrivals = arrivals_of(records)
    ok, gaps_ms, is_gap = arrivals.ok, np.diff(arrivals.token_s) * 1e3, arrivals.is_gap & ~arrivals.coarse_gap
    ttft_ms, e2e_ms = ((until_s - sent_s) * 1e3 for until_s in (arrivals.first_s, end_s))
    # A canary's prompt that a cache may know says nothing of prefill.
    fresh = ok & np.array([record.canary is None or not record.canary.repeated for record in records], dtype=bool)
    unknown = (np.nan, np.nan)
    phase_s = {
        name: np.array([record.phases.get(name) or unknown for record in records], dtype=float).reshape(-1, 2)
        for name in PHASES
    }
    senders = {name: _sender(way) for name, way in ways_of(run.events).items()}
    requests = Requests(
        id=[record.id for record in records],
        trial=np.array([record.trial for record in records], dtype=np.int64),
        ok=ok,
        sent_s=sent_s,
        end_s=end_s,
        ttft_ms=np.where(fresh, ttft_ms, np.nan),
        ttfo_ms=np.where(fresh, (arrivals.answer_s - sent_s) * 1e3, np.nan),
        mean_tbt_ms=arrivals.mean_tbt_ms,
        e2e_ms=np.where(fresh, e2e_ms, np.nan),
        send_delay_ms=(sent_s - planned_s) * 1e3,
        prompt_tokens=column(records, "prompt_tokens"),
        output_tokens=arrivals.output_tokens,
        phase_ms={
            name: np.where(arrivals.answered, span[:, 1] - span[:, 0], np.nan) * 1e3 for name, span in phase_s.items()
        },
        compute_steps=np.array(
            [sum(name.startswith("compute_") for name in record.phases) or np.nan for record in records], dtype=float
        ),
        error=[None if record.error is None else record.error.kind for record in records],
        finish_reason=[record.finish_reason for record in records],
        first_token=[senders.get(record.id) if is_ok else None for record, is_ok in zip(records, ok, strict=True)],
        first_gap_ms=np.where(ok, (arrivals.second_s - arrivals.first_s) * 1e3, np.nan),
        counted_by=[record.counted_by for record in records],
    )
    return Timings(
        windows=[(trial.start_s, trial.end_s) for trial in run.trials],
        is_batch=(run.config.get("load") or {}).get("phase") == "decode",
        requests=requests,
        arrivals=arrivals,
        slo=judge(run.config.get("load") or {}, arrivals, ttft_ms, e2e_ms, requests.cut),
        phase_s=phase_s,
        tbt_ms=gaps_ms[is_gap],
        tbt_request=arrivals.request[1:][is_gap],
        tbt_s=arrivals.token_s[1:][is_gap],
        inter_chunk_ms=gaps_ms[arrivals.is_gap & arrivals.coarse_gap],
    )


def _sender(way: ProxyEvent) -> str | None:
    if way.first_token_s is not None:  # also where decode then went on alone, as instances failed
        return "prefill"
    if way.decode_alone is not None:
        return "decode_alone"
    return None if way.prefill_sent_s is None else "decode"


def mean_ttft_parts_ms(timings: Timings) -> dict[str, float] | None:
    """The mean TTFT split into what the phases cover, in order and without overlap; `other` is what nobody measured.

    A part ends where a later phase begins (prefill's reply comes after its KV cache has left), decode's at the first token.
    A phase that began after every first token, or of a stream that prefill's token opened, after prefill, is no part.
    Over the requests that succeeded and have a phase; None where there are none.
    """
    phase_s = timings.phase_s
    by_prefill = timings.requests.first_sent_by("prefill")
    spans = {}
    for name in PHASES[1:]:
        hidden = by_prefill & (name in AFTER_PREFILL)
        if name in FINER:
            hidden = np.isfinite(phase_s[FINER[name]][:, 0])
        span = np.where(hidden[:, np.newaxis], np.nan, phase_s[name])
        if np.isfinite(span).any():
            spans[name] = span
    ttft_ms = timings.requests.ttft_ms
    begins = np.array([span[:, 0] for span in spans.values()])
    split = np.isfinite(ttft_ms) & np.isfinite(begins).any(axis=0)
    if not split.any():
        return None
    reached, parts = timings.requests.sent_s[split], {}
    first = timings.arrivals.first_s[split]
    edges = [span[split].T for span in spans.values()]
    for place, (name, (start, end)) in enumerate(zip(spans, edges, strict=True)):
        later = [np.where(begin >= start, begin, np.inf) for begin, _ in edges[place + 1 :]]
        stop = np.minimum.reduce([end, first, *later])
        if (start < first).any():
            parts[name] = np.nan_to_num(np.maximum(stop - np.maximum(start, reached), 0.0)) * 1e3
        reached = np.fmax(reached, stop)
    rest = np.round(ttft_ms[split] - sum(parts.values()), 9)  # without the last bits of the sum
    parts["other"] = np.maximum(rest, 0.0)
    return {name: float(part.mean()) for name, part in parts.items()}


def inside(instants: Array, windows: Sequence[Interval]) -> BoolArray:
    """For each instant, whether it lies in one of the windows."""
    here = np.zeros(len(instants), dtype=bool)
    for start, end in windows:
        here |= (instants >= start) & (instants <= end)
    return here


def quantiles(rising: Array, shares: Array) -> Array:
    """Quantiles (share 0 to 1) of sorted values, at least one, by linear interpolation as numpy's."""
    place = shares * (len(rising) - 1)
    below = place.astype(np.int64)
    above = np.minimum(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def rising(values: Array) -> Array:
    """What was measured, sorted."""
    return np.sort(values[np.isfinite(values)])


def spread(rising: Array) -> Spread | None:
    """The spread of sorted values; None when there are none."""
    if not len(rising):
        return None
    p50, p90, p99 = quantiles(rising, np.array([0.5, 0.9, 0.99])).tolist()
    low, high = float(rising[0]), float(rising[-1])
    return Spread(mean=float(rising.mean()), p50=p50, p90=p90, p99=p99, min=low, max=high, count=len(rising))


def per(top: float | None, bottom: float | None) -> float | None:
    """A ratio; None when either is not known or there is nothing to divide by."""
    return None if top is None or bottom is None or not bottom > 0 else float(top / bottom)


def total(parts: Sequence[float | None]) -> float | None:
    """None as soon as a part is not measured: a total with a piece missing is no total."""
    numbers = [part for part in parts if part is not None]
    return float(sum(numbers)) if len(numbers) == len(parts) else None
