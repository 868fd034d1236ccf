"""Servers that stood still while they decoded: every stream of one got nothing for far longer than a step takes, all at the same time."""

from collections.abc import Iterator

import numpy as np

from pdbench.analysis.arrivals import BoolArray
from pdbench.analysis.metrics import Timings
from pdbench.analysis.servers import loads_of
from pdbench.events import ProxyEvent
from pdbench.records import Flag, Run

STALL_S, STALL_GAPS, STREAMS = 1.0, 100.0, 2
"""A silence of a second, and of 100 usual gaps, in which so many streams wait, is no step."""
PROMPT_SHARE, LONG_PROMPT = 0.25, 4.0
"""Prompts that would take this share of the silence, or one of so many times the usual length, explain it."""
LOGGED_S = 2.0
"""Logs are read this late."""


def server_stalled(run: Run, timings: Timings) -> Iterator[Flag]:
    """Silences of one instance in which two streams or more waited for their next token: it, or what passes its tokens on, stood still.

    Not where prompts that it had before explain it (their step may take that long), its log says that it compiled, or the client
    itself stood still. With one stream, or where streams of several unnamed instances mix, nothing can be told.
    """
    token_s, request, requests = timings.token_s, timings.token_request, timings.requests
    gap_s, of_one = np.diff(token_s), np.diff(request) == 0
    steps_s = gap_s[of_one & (gap_s > 0)]
    limit_s = max(STALL_S, STALL_GAPS * float(np.median(steps_s))) if len(steps_s) else np.inf
    long = np.flatnonzero(of_one & (gap_s > limit_s))
    if len(long) < STREAMS or any(flag.name in ("client-stalled", "host-slept") for flag in run.flags):
        return
    ways = {event.request_id: event for event in run.events if isinstance(event, ProxyEvent)}
    served_by = [ways[name].decode if name in ways else None for name in requests.id]
    own = _sent_by_decode(timings)
    compiled_s = [line.t_s for series in run.servers for line in series.lines if line.flag == "compiled-under-load"]
    silences: list[tuple[float, float, str | None, int]] = []
    for server in dict.fromkeys(served_by[row] for row in request[long]):
        here = np.array([name == server for name in served_by], dtype=bool)
        arrivals_s = np.sort(token_s[here[request] & own])
        waiting = long[here[request[long]]]
        for place in np.flatnonzero(np.diff(arrivals_s) > limit_s):
            begin_s, end_s = float(arrivals_s[place]), float(arrivals_s[place + 1])
            streams = int(np.count_nonzero((token_s[waiting] <= begin_s) & (token_s[waiting + 1] >= end_s)))
            logged = any(begin_s <= at_s <= end_s + LOGGED_S for at_s in compiled_s)
            if streams >= STREAMS and not logged and not _has_prompt(run, timings, here, begin_s, end_s):
                silences.append((begin_s, end_s, server, streams))
    if silences:
        begin_s, end_s, server, streams = max(silences, key=lambda silence: silence[1] - silence[0])
        load = max((load for load in loads_of(run) if load.start_s <= begin_s), key=lambda load: load.start_s)
        more = f" (and {len(silences) - 1} shorter ones)" if len(silences) > 1 else ""
        yield Flag(
            "server-stalled",
            f"{server or run.name}: all of its {streams} streams got nothing for {end_s - begin_s:.1f} s, {begin_s - load.start_s:.1f} s into "
            f"trial {load.trial + 1}{more}, where a token usually comes every {1e3 * float(np.median(steps_s)):.3g} ms: it stood still (stopped, or "
            "without a core), or what passes its tokens on did; TTFT, TBT and E2E hold that time: measure again",
        )


def _sent_by_decode(timings: Timings) -> BoolArray:
    """Is an arrival no first token that prefill sent? These come while decode stands still."""
    first = np.ones(len(timings.token_request), dtype=bool)
    first[1:] = np.diff(timings.token_request) != 0
    by_prefill = np.array([sender == "prefill" for sender in timings.requests.first_token], dtype=bool)
    return ~(first & by_prefill[timings.token_request])


def _has_prompt(run: Run, timings: Timings, here: BoolArray, begin_s: float, end_s: float) -> bool:
    """Do prompts explain the silence: those that an instance that computes prompts had at its begin, without a first token?"""
    requests, tokens = timings.requests, timings.requests.prompt_tokens
    elsewhere = np.array([sender in ("prefill", "decode") for sender in requests.first_token], dtype=bool)
    waits = (
        here & ~elsewhere & (requests.sent_s <= begin_s) & ~(timings.first_s <= begin_s) & ~(requests.end_s <= begin_s)
    )
    if not waits.any():
        return False
    if not np.isfinite(tokens[waits]).all():
        return True  # nobody knows how long they are
    known = np.isfinite(requests.ttft_ms) & (tokens > 0)
    ms_per_token = (requests.ttft_ms / np.where(known, tokens, np.nan))[known]
    # A step takes no more than its budget; without one it takes whole prompts.
    budgets = [engine.max_num_batched_tokens if engine.chunked_prefill else None for engine in run.engines.values()]
    budget = max(filter(None, budgets)) if budgets and None not in budgets else np.inf
    # The quickest tenth did not wait in a queue.
    step_ms = float(np.quantile(ms_per_token, 0.1)) * min(tokens[waits].sum(), budget) if known.any() else np.inf
    long = budget == np.inf and tokens[waits].max() > LONG_PROMPT * np.nanmedian(tokens)
    return bool(long or step_ms > PROMPT_SHARE * 1e3 * (end_s - begin_s))
