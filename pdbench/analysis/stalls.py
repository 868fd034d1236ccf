"""Servers that stood still under load: every stream of one got nothing for far longer than a step takes, all at the same time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pdbench.analysis.arrivals import BoolArray
from pdbench.analysis.metrics import Timings
from pdbench.analysis.servers import instant, loads_of
from pdbench.events import ProxyEvent, ways_of
from pdbench.records import Flag, Run

STALL_S, STALL_GAPS, STREAMS = 1.0, 100.0, 2
"""A silence of a second, and of 100 usual gaps, in which so many streams wait, is no step."""
PROMPT_SHARE, LONG_PROMPT = 0.25, 4.0
"""Prompts that would take this share of the silence, or one of so many times the usual length, explain it."""
LOGGED_S, BATCH_S = 2.0, 0.05
"""Logs are read this late; prompts that come within so many seconds may share a step."""


class Silence(NamedTuple):
    """Nothing came from a server between two instants; `whose`: all of its 4 streams."""

    begin_s: float
    end_s: float
    server: str
    whose: str


def server_stalled(run: Run, timings: Timings) -> Iterator[Flag]:
    """Silences of one instance in which two streams or more waited for their next token, or of prefill, two prompts or more for their end:
    it, or what passes its tokens on, stood still.

    Not where prompts that it had before explain it (their step may take that long), its log says that it compiled, or the client
    itself stood still. With one stream, or where streams of several unnamed instances mix, nothing can be told.
    """
    if any(flag.name in ("client-stalled", "host-slept") for flag in run.flags):
        return
    ways = ways_of(run.events)
    found = [*_of_streams(run, timings, ways)]
    # Prefill may wait for a decode instance that stands still.
    found = found or [*_of_prompts(timings, ways)]
    compiled_s = [line.t_s for series in run.servers for line in series.lines if line.flag == "compiled-under-load"]
    found = [each for each in found if not any(each.begin_s <= at_s <= each.end_s + LOGGED_S for at_s in compiled_s)]
    if found:
        longest = max(found, key=lambda each: each.end_s - each.begin_s)
        loads = loads_of(run)
        # By a server's clock it may have begun a little before the first load.
        load = next((load for load in reversed(loads) if load.start_s <= longest.begin_s), loads[0])
        more = f" (and {len(found) - 1} shorter ones)" if len(found) > 1 else ""
        yield Flag(
            "server-stalled",
            f"{longest.server}: {longest.whose} got nothing for {longest.end_s - longest.begin_s:.1f} s, {instant(load, longest.begin_s)}{more}, "
            "far longer than a step takes: it stood still (stopped, or without a core), or what passes its tokens on did; "
            "latencies hold that time: measure again",
        )


def _of_streams(run: Run, timings: Timings, ways: dict[str, ProxyEvent]) -> Iterator[Silence]:
    token_s, request = timings.arrivals.token_s, timings.arrivals.request
    gap_s, of_one = np.diff(token_s), np.diff(request) == 0
    steps_s = gap_s[of_one & (gap_s > 0)]
    limit_s = max(STALL_S, STALL_GAPS * float(np.median(steps_s))) if len(steps_s) else np.inf
    long = np.flatnonzero(of_one & (gap_s > limit_s))
    if len(long) < STREAMS:
        return
    served_by = [ways[name].decode if name in ways else None for name in timings.requests.id]
    # A step takes no more tokens than its budget; without one it takes whole prompts.
    budgets = [engine.max_num_batched_tokens if engine.chunked_prefill else None for engine in run.engines.values()]
    budget = max(filter(None, budgets)) if budgets and None not in budgets else np.inf
    own, through_prefill = _sent_by_decode(timings), timings.requests.first_sent_by("prefill", "decode")
    for server in dict.fromkeys(served_by[row] for row in request[long]):
        here = np.array([name == server for name in served_by], dtype=bool)
        arrivals_s = np.sort(token_s[here[request] & own])
        waiting = long[here[request[long]]]
        for place in np.flatnonzero(np.diff(arrivals_s) > limit_s):
            begin_s, end_s = float(arrivals_s[place]), float(arrivals_s[place + 1])
            streams = int(np.count_nonzero((token_s[waiting] <= begin_s) & (token_s[waiting + 1] >= end_s)))
            ended = (timings.arrivals.first_s <= begin_s) | (timings.requests.end_s <= begin_s)
            prompts = here & ~through_prefill & (timings.requests.sent_s <= begin_s) & ~ended
            if streams >= STREAMS and not _explain(timings, prompts, end_s - begin_s, budget):
                yield Silence(begin_s, end_s, server or run.name, f"all of its {streams} streams")


def _of_prompts(timings: Timings, ways: dict[str, ProxyEvent]) -> Iterator[Silence]:
    spans_s = timings.phase_s["prefill"]
    if not np.isfinite(spans_s).any():
        return
    served_by = [ways[name].prefill if name in ways else None for name in timings.requests.id]
    for server in filter(None, dict.fromkeys(served_by)):
        here = np.array([name == server for name in served_by], dtype=bool) & np.isfinite(spans_s[:, 1])
        sent_s, done_s = spans_s.T
        instants_s = np.sort(done_s[here])
        for place in np.flatnonzero(np.diff(instants_s) > STALL_S):
            end_s = float(instants_s[place + 1])
            waiting = here & (sent_s <= end_s - STALL_S) & (done_s >= end_s)
            if np.count_nonzero(waiting) < STREAMS:
                continue
            begin_s = max(float(instants_s[place]), float(sent_s[waiting].min()))
            if not _explain(timings, waiting & (sent_s <= begin_s + BATCH_S), end_s - begin_s, np.inf):
                yield Silence(begin_s, end_s, server, f"all of its {np.count_nonzero(waiting)} prompts")


def _sent_by_decode(timings: Timings) -> BoolArray:
    """Is an arrival no first token that prefill sent? These come while decode stands still."""
    request = timings.arrivals.request
    first = np.diff(request, prepend=-1) != 0
    return ~(first & timings.requests.first_sent_by("prefill")[request])


def _explain(timings: Timings, waits: BoolArray, silent_s: float, budget: float) -> bool:
    """Can prompts that an instance had when a silence began, and had not answered, be why? `budget`: the most tokens of a step."""
    requests, tokens = timings.requests, timings.requests.prompt_tokens
    if not waits.any():
        return False
    if not np.isfinite(tokens[waits]).all():
        return True  # nobody knows how long they are
    known = np.isfinite(requests.ttft_ms) & (tokens > 0)
    ms_per_token = (requests.ttft_ms / np.where(known, tokens, np.nan))[known]
    # The quickest tenth did not wait in a queue.
    step_ms = float(np.quantile(ms_per_token, 0.1)) * min(tokens[waits].sum(), budget) if known.any() else np.inf
    long = budget == np.inf and tokens[waits].max() > LONG_PROMPT * np.nanmedian(tokens)
    return bool(long or step_ms > PROMPT_SHARE * 1e3 * silent_s)
