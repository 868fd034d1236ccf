"""How long requests took, predicted and measured: quantiles in ms by figure, at `SHARES` of the requests, or of the gaps between tokens."""

from collections.abc import Sequence

import numpy as np

from pdbench.analysis.arrivals import Array
from pdbench.plan.simulate import Simulated, weighted_quantiles
from pdbench.records import RequestRecord

SHARES = tuple(percent / 100 for percent in range(1, 100))
Distributions = dict[str, list[float]]


def of_simulated(results: Sequence[Simulated], jitter: Sequence[float], slowest_s: float) -> Distributions:
    """`jitter` is decode's pauses as shares of a step of at most `slowest_s` (`weighted_quantiles`)."""
    ttft_s, e2e_s, gap_s, gap_count = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("ttft_s", "e2e_s", "gap_s", "gap_count")
    )
    names = {str(share): share for share in SHARES}
    gaps_s = [*weighted_quantiles(gap_s, gap_count, names, jitter or (0.0,), slowest_s).values()]
    return _in_ms(np.quantile(ttft_s, SHARES), np.array(gaps_s), np.quantile(e2e_s, SHARES))


def of_requests(requests: Sequence[RequestRecord]) -> Distributions:
    """Of measured requests, every one answered."""
    sent_s = np.array([request.sent_s for request in requests], dtype=float)
    first_s, last_s = (np.array([request.token_s[place] for request in requests]) for place in (0, -1))
    gaps_s = np.concatenate([np.diff(request.token_s) for request in requests])
    tbt_s = np.quantile(gaps_s, SHARES) if len(gaps_s) else np.empty(0)
    return _in_ms(np.quantile(first_s - sent_s, SHARES), tbt_s, np.quantile(last_s - sent_s, SHARES))


def _in_ms(ttft_s: Array, tbt_s: Array, e2e_s: Array) -> Distributions:
    found = {"ttft": ttft_s, "tbt": tbt_s, "e2e": e2e_s}
    return {name: (1e3 * values).tolist() for name, values in found.items() if np.isfinite(values).any()}
