"""Where a request's time goes, predicted and measured: the parts of the mean request, in ms, which add up to its E2E."""

from collections.abc import Sequence

import numpy as np

from pdbench.analysis.arrivals import Array
from pdbench.plan.simulate import Simulated
from pdbench.records import Run

PARTS = ("way_in", "queue", "compute", "handoff", "decode_wait", "decode")
"""From the client to the engine; until its first step; steps with its prompt, until its token; prefill to decode; until decode's first step;
decode's steps."""


def of_simulated(results: Sequence[Simulated]) -> dict[str, float]:
    """Of all requests of some trials of one deployment."""
    rows = []
    for each in results:
        came_s = np.where(np.isnan(each.computed_s), each.sent_s + each.ttft_s, each.computed_s)
        way_s = each.sent_s, each.sent_s + each.way_in_s, each.scheduled_s
        rows.append([*way_s, came_s, each.ready_s, each.joined_s, each.sent_s + each.e2e_s])
    return _means([*np.concatenate(rows, axis=1)])


def of_run(run: Run, names: set[str]) -> dict[str, float]:
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
