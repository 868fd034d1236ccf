"""Where requests' time goes, predicted and measured: the parts of the mean request, which add up to its E2E, and how long all took; in ms."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pdbench.analysis.arrivals import Array
from pdbench.analysis.metrics import quantiles, timings_of_requests
from pdbench.plan.simulate import Simulated, weighted_quantiles
from pdbench.records import RequestRecord, Run

PARTS = ("way_in", "queue", "compute", "handoff", "decode_wait", "decode")
"""From the client to the engine; until its first step; steps with its prompt, until its token; prefill to decode; until decode's first step;
decode's steps."""
SHARES = tuple(percent / 100 for percent in range(1, 100))
"""Of the requests, or of the gaps between tokens: distributions are their quantiles there."""


def parts_of_simulated(results: Sequence[Simulated]) -> dict[str, float]:
    """Of all requests of some trials of one deployment."""
    rows = []
    for each in results:
        came_s = np.where(np.isnan(each.computed_s), each.sent_s + each.ttft_s, each.computed_s)
        way_s = each.sent_s, each.sent_s + each.way_in_s, each.scheduled_s
        rows.append([*way_s, came_s, each.ready_s, each.joined_s, each.sent_s + each.e2e_s])
    return _means([*np.concatenate(rows, axis=1)])


def parts_of_run(run: Run, names: set[str]) -> dict[str, float]:
    """Of these requests, by what client, proxy and servers noted; empty where that does not tell the steps."""
    rows = []
    for request in run.requests:
        phases = request.phases
        queue, compute, wait = (phases.get(name) for name in ("queue", "compute", "decode_wait"))
        if request.id not in names or not queue or not compute or request.sent_s is None:
            continue
        if run.name == "disaggregated":
            if wait:
                rows.append((request.sent_s, *queue, compute[1], *wait, request.token_s[-1]))
        else:
            rows.append((request.sent_s, *queue, compute[1], np.nan, np.nan, request.token_s[-1]))
    return _means(list(np.array(rows).T)) if len(rows) > len(names) / 2 else {}


def _means(instants: list[Array]) -> dict[str, float]:
    """Of the time from each instant to the next; without a handoff decode's steps follow the prompt's."""
    parts = dict(zip(PARTS, np.diff(instants, axis=0), strict=True))
    if np.isnan(parts["handoff"]).all():
        parts["decode"] = instants[-1] - instants[3]
    return {name: 1e3 * float(np.nanmean(part)) for name, part in parts.items() if np.isfinite(part).any()}


def distributions_of_simulated(
    results: Sequence[Simulated], jitter: Sequence[float], slowest_s: float
) -> dict[str, list[float]]:
    """`jitter` is decode's pauses as shares of a step of at most `slowest_s` (`weighted_quantiles`)."""
    ttft_s, e2e_s, gap_s, gap_count = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("ttft_s", "e2e_s", "gap_s", "gap_count")
    )
    tbt_s = np.array(weighted_quantiles(gap_s, gap_count, SHARES, jitter, slowest_s))
    return _in_ms(np.quantile(ttft_s, SHARES), tbt_s, np.quantile(e2e_s, SHARES))


def distributions_of_requests(requests: Sequence[RequestRecord], load: dict[str, Any]) -> dict[str, list[float]]:
    """Of measured requests, every one answered; `load` is their LoadConfig's, as a run saves it."""
    measured = timings_of_requests([*requests], load).latencies
    rising = {name: measured[name].rising for name in ("ttft", "tbt", "e2e")}
    return {name: quantiles(values, np.array(SHARES)).tolist() for name, values in rising.items() if len(values)}


def _in_ms(ttft_s: Array, tbt_s: Array, e2e_s: Array) -> dict[str, list[float]]:
    found = {"ttft": ttft_s, "tbt": tbt_s, "e2e": e2e_s}
    return {name: (1e3 * values).tolist() for name, values in found.items() if np.isfinite(values).any()}
