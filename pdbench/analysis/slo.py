"""Which requests meet the SLO. Where a request's figure is not known, bounds of it are held against the limit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdbench.analysis.arrivals import Array, Arrivals, BoolArray, IntArray
from pdbench.config import most_output_tokens
from pdbench.records import Flag

SLO = {
    "slo_ttft_ms": "TTFT",
    "slo_tbt_ms": "mean TBT",
    "slo_tbt_p90_ms": "TBT p90 of a request",
    "slo_tbt_p99_ms": "TBT p99 of a request",
    "slo_e2e_ms": "E2E",
}
"""Option -> what it limits, for each request on its own."""
UNDECIDED = 0.05
"""Up to this share of answers that nobody can judge, goodput is given: as what it is at least, with a flag."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One entry per request: `in_slo` (met the SLO for certain; None without one), `ratios` (option -> figure over limit, above 1 missed; the
    least it can be where it is not known, and of a request that was cut off what it had reached), `counted` (all but those cut off before
    they had missed: what shares are of), `undecided` (an answer that may be within the limits or not: counted, as missed)."""

    in_slo: BoolArray | None
    ratios: dict[str, Array]
    counted: BoolArray
    undecided: BoolArray

    @property
    def met_pct(self) -> float | None:
        """Per cent of the counted requests that met the SLO for certain; None without an SLO, or when nothing is counted."""
        counted = int(self.counted.sum())
        return None if self.in_slo is None or not counted else 100 * int(self.in_slo.sum()) / counted

    @property
    def nothing_judged(self) -> bool:
        """Is there no request of which it is known whether it met the limits?"""
        return bool(self.undecided.any()) and not (self.counted & ~self.undecided).any()

    @property
    def goodput_known(self) -> bool:
        return self.in_slo is not None and self.undecided.sum() <= UNDECIDED * len(self.undecided)


def undecided_flag(slo: Judged) -> Iterator[Flag]:
    """How many answers nobody can judge, and what that makes of goodput."""
    if few := int(slo.undecided.sum()):
        given = (
            "they do not count as good: goodput is what it is at least" if slo.goodput_known else "no goodput is given"
        )
        yield Flag(
            "slo-undecided",
            f"{few} of {len(slo.undecided)} requests may be within the limits of TBT or not, as nobody knows how many tokens their chunks hold; {given}",
        )


def judge(load: dict[str, Any], arrivals: Arrivals, ttft_ms: Array, e2e_ms: Array, cut: BoolArray) -> Judged:
    """Of all requests, failed ones too. `cut` requests had not ended when the load was stopped; a request of one token has no TBT to miss (NaN is above no limit)."""
    ok, no = arrivals.ok, np.zeros(len(cut), dtype=bool)
    limits = {name: limit for name in SLO if (limit := load.get(name)) is not None}
    # A request that was cut off took at least this long.
    first_ms = np.where(np.isfinite(ttft_ms), ttft_ms, e2e_ms)
    first_ms, took_ms = (np.where(cut | ok, known_ms, np.nan) for known_ms in (first_ms, e2e_ms))
    least_mean_ms, most_mean_ms = arrivals.mean_tbt_bounds_ms
    # Cut off after its first token: as if all tokens that were asked for had come; not known where nobody knows how many.
    gaps = (most_output_tokens(load) or 1) - 1
    cut_mean_ms = (e2e_ms - ttft_ms) / gaps if gaps > 0 else np.nan
    bounds = {
        "slo_ttft_ms": (first_ms, first_ms),
        "slo_tbt_ms": (np.where(cut, cut_mean_ms, least_mean_ms), most_mean_ms),
        "slo_e2e_ms": (took_ms, took_ms),
    }
    quantiles = {"slo_tbt_p90_ms": 0.9, "slo_tbt_p99_ms": 0.99}
    bounds |= {name: _gap_bounds_ms(arrivals, share) for name, share in quantiles.items() if name in limits}
    ratios = {name: bounds[name][0] / limit for name, limit in limits.items()}
    missed = np.any([ratio > 1 for ratio in ratios.values()], axis=0) if limits else no
    may_miss = np.any([bounds[name][1] > limit for name, limit in limits.items()], axis=0) if limits else no
    undecided = ok & may_miss & ~missed
    return Judged(
        in_slo=ok & ~may_miss & ~missed if limits else None,
        ratios=ratios,
        counted=~cut | missed,
        undecided=undecided,
    )


def _gap_bounds_ms(arrivals: Arrivals, share: float) -> tuple[Array, Array]:
    """The least and the most that the quantile of each answer's gaps is. Where chunks hold several tokens, at least as if the others' gaps were 0
    (tokens of one chunk share its arrival), at most that of the gaps between chunks alone."""
    gaps_ms, row = (np.diff(arrivals.token_s) * 1e3)[arrivals.is_gap], arrivals.request[1:][arrivals.is_gap]
    more = arrivals.sent_tokens - np.bincount(arrivals.request, minlength=len(arrivals.ok))
    zeros = np.where(arrivals.coarse, np.where(np.isnan(more), np.inf, np.maximum(more, 0)), 0)
    most_ms = _quantile_of_each(gaps_ms, row, np.zeros(len(zeros)), share)
    return _quantile_of_each(gaps_ms, row, zeros, share), most_ms


def _quantile_of_each(values: Array, group: IntArray, zeros: Array, share: float) -> Array:
    """The quantile of each group's values and so many zeros beside them, by linear interpolation; NaN for a group without any value."""
    ordered, counts = values[np.lexsort((values, group))], np.bincount(group, minlength=len(zeros))
    found, some = np.full(len(zeros), np.nan), counts > 0
    count, begin, beside = counts[some], (np.cumsum(counts) - counts)[some], zeros[some]
    place = np.maximum(share * (count - 1) - (1 - share) * beside, -1.0)
    below = np.floor(place).astype(np.int64)
    low = np.where(below < 0, 0.0, ordered[begin + np.maximum(below, 0)])
    high = ordered[begin + np.minimum(below + 1, count - 1)]
    found[some] = low + (place - below) * (high - low)
    return found
