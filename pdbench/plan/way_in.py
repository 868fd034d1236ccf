"""A prompt's way in: from the client's sending until its engine may schedule it, through HTTP and tokenizing."""

from collections.abc import Mapping

import numpy as np
from scipy.stats import theilslopes

from pdbench.analysis.arrivals import Array, IntArray
from pdbench.plan.engine import Limits
from pdbench.plan.steps import Steps

MOST_PER_TOKEN_S = 6e-6
"""A tokenizer that takes longer than this for a token is not one."""


def schedulable(
    steps: Steps, came_s: Mapping[str, float], limits: Limits, computed: Mapping[str, int] | None = None
) -> dict[str, tuple[float, float]]:
    """(earliest, latest) seconds from the instant in `came_s` until the engine could schedule a request, of requests that met running
    streams; `computed` are their prompts' tokens, which may take several steps until the first token's.

    With asynchronous scheduling step k is scheduled as step k-2 is handed out, else as step k-1 is; a request of step k came after
    the scheduling before. Between its instants nothing is known.
    """
    lag, since, handed, found = limits.lag, steps.since, steps.handed_s, dict[str, tuple[float, float]]()
    room = limits.max_num_batched_tokens - (steps.sequences - steps.firsts)
    for name, k in steps.first_step.items():
        rest = (computed or {}).get(name, 0)
        while (rest := rest - room[k]) > 0 and since[k] > lag:
            k -= 1
        if since[k] > lag and name in came_s:
            found[name] = float(handed[k - lag - 1]) - came_s[name], float(handed[k - lag]) - came_s[name]
    return found


def of_idle(tokens: IntArray, took_s: Array) -> tuple[float, float]:
    """(seconds, and per token) of a robust line; the median of prompts that are about as long."""
    if not _differ(tokens):
        return float(np.median(took_s)), 0.0
    some = np.linspace(0, len(tokens) - 1, min(len(tokens), 1000)).astype(int)  # the slopes of all pairs
    line = theilslopes(took_s[some], tokens[some])
    slope = max(0.0, float(line.slope))
    return max(0.0, float(np.median(took_s - slope * tokens))), slope


def of_busy(tokens: IntArray, intervals: Array) -> tuple[float, float]:
    """The same where only the intervals (rows of earliest and latest) are known in which prompts came: of the slopes that the one is chosen
    with which one value lies in most of them (the middle of where that holds)."""
    found = []
    for per_token_s in np.linspace(0, MOST_PER_TOKEN_S, 31) if _differ(tokens) else (0.0,):
        rest = intervals - per_token_s * tokens[:, None]
        edges = np.sort(rest.ravel())
        middles = (edges[1:] + edges[:-1]) / 2
        counts = np.searchsorted(np.sort(rest[:, 0]), middles, "right") - np.searchsorted(
            np.sort(rest[:, 1]), middles, "left"
        )
        best = np.flatnonzero(counts == counts.max())
        found.append((int(counts.max()), -float(per_token_s), float(middles[best].mean())))
    _, slope, value = max(found)
    return max(0.0, value), -slope


def _differ(tokens: IntArray) -> bool:
    return bool(len(tokens) and np.ptp(tokens) > 0.2 * tokens.mean())
