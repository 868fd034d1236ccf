"""A deployment under a load: requests come, the proxy chooses instances, prefill hands over to decode. What came of it, per request.

One queue holds the instants at which something changes; between them the instances (instance.py) need nobody.
"""

import gc
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import chain

import numpy as np

from pdbench.analysis.arrivals import Array, BoolArray, IntArray
from pdbench.config import answer_timeout_s
from pdbench.load.self_check import FILLED_SHARE, closed_window, open_window
from pdbench.plan.batch import Pool, Tokens
from pdbench.plan.engine import Demand, Deployment, Role
from pdbench.plan.instance import Instance
from pdbench.plan.policies import Affinity, balance, beginnings
from pdbench.plan.prefixes import PrefixCache
from pdbench.records import Interval

_ARRIVES, _COMES, _JOINS, _WAKES = range(4)
_GAPS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One entry per request in the order of `Demand`, seconds. NaN: a request that can never run (its prompt and output exceed the KV cache).

    `sent_s` is when it was sent, its engine might schedule it its `way_in_s` later; `ttft_s` and `e2e_s` count from there, as the client sees them; `mean_tbt_s` is NaN with one token.
    `scheduled_s` is when its first step was scheduled; disaggregated, `computed_s` when prefill's answer was there, `ready_s` when its KV cache
    was at decode and `joined_s` when decode's first step was scheduled (else NaN). `gap_s` and `gap_count` are all gaps between tokens as a
    weighted histogram (values in any order, equal ones may repeat). `window` is the time at full load, as
    `load.self_check` has it. `waited_s` is from a
    request's instant in the load to its sending (0 in a closed loop). `timed_out`: the client would have ended it before. `cached_tokens` of its prompt
    needed no computing.
    """

    way_in_s: Array
    sent_s: Array
    ttft_s: Array
    e2e_s: Array
    mean_tbt_s: Array
    scheduled_s: Array
    computed_s: Array
    ready_s: Array
    joined_s: Array
    gap_s: Array
    gap_count: IntArray
    instances: list[Instance]
    window: Interval
    waited_s: Array
    is_closed: bool
    timed_out: BoolArray
    output_tokens: IntArray
    cached_tokens: IntArray
    events: int


def simulate(deployment: Deployment, demand: Demand, seed: int = 0) -> Simulated:
    """Exact in the costs and rules of engine.py. Deterministic in `seed`, which decides where instances and handoffs begin in their noise
    and whose turn is first."""
    collecting = gc.isenabled()
    gc.disable()  # millions of tuples, none in a circle
    try:
        return _simulate(deployment, demand, random.Random(seed))
    finally:
        if collecting:
            gc.enable()


def _simulate(deployment: Deployment, demand: Demand, generator: random.Random) -> Simulated:
    total, streams = len(demand), demand.streams
    prompts, outputs, due = demand.prompt_tokens.tolist(), demand.output_tokens.tolist(), demand.t_s.tolist()
    cached = np.minimum(demand.cached_tokens, demand.prompt_tokens - 1).tolist()
    tokens = Tokens([math.nan] * total, [math.nan] * total)
    layout, handoff = deployment.layout, deployment.handoff
    # The API server of an instance takes prompts in as they come, one after the other.
    fixed_s = float(deployment.way_in_s(np.zeros(1, np.int64))[0])
    taking_s = (deployment.way_in_s(demand.prompt_tokens) - fixed_s).tolist()
    split = layout.kind == "disaggregated"
    begins = beginnings(demand)

    def instances_of(role: Role, sizes: list[int], cached: list[int], outputs: list[int]) -> list[Instance]:
        pool = Pool(deployment.engines[role], role, sizes, cached, outputs)
        longest = max(len(pool.noise), len(pool.gpu_noise))
        return [Instance(pool, tokens, generator.randrange(longest)) for _ in range(layout.instances[role])]

    # Prefill's token is the client's first where the proxy passes it on, and where it is not the last one too.
    opens = handoff.prefill_opens if split else 0.0
    opens_early = [opens > 0 and count > 1 and generator.random() < opens for count in outputs]
    if split:
        early = np.array(opens_early, np.int64)
        front = instances_of("prefill", prompts, cached, [1] * total)
        sizes = (demand.prompt_tokens + early).tolist()
        back = instances_of("decode", sizes, [size - 1 for size in sizes], (demand.output_tokens - early).tolist())
        fronts = balance(deployment.prefill_policy, len(front), generator, by_tokens=True)
        backs = balance(deployment.decode_policy, len(back), generator, by_tokens=False)
    else:
        front, back = instances_of(layout.front, prompts, cached, outputs), []
        fronts = backs = balance(deployment.decode_policy, len(front), generator, by_tokens=False)
    instances = front + back
    if demand.blocks is not None and demand.block_tokens is not None:
        block_tokens = demand.block_tokens.tolist()
        for instance in front:
            instance.cache = PrefixCache(demand.blocks, block_tokens, prompts, instance.pool.block)
        for number, (blocks, tokens_each) in enumerate(demand.warm_blocks):
            chosen_by = fronts.choose(blocks) if isinstance(fronts, Affinity) else number % len(front)
            if (cache := front[chosen_by].cache) is not None:
                cache.warm(blocks, tokens_each)
    can_run = np.logical_and.reduce([each[0].pool.fits for each in (front, back) if each]).tolist()

    sent, ended, decoder = [math.nan] * total, [False] * total, [0] * total
    came, computed, ready = [math.nan] * total, [math.nan] * total, [math.nan] * total
    chosen, busy_until_s = [0] * total, [0.0] * len(front)
    noise = list(chain.from_iterable(handoff.noise))
    noise_at = generator.randrange(len(noise)) if noise else 0
    # Instant, what happens, request or instance, version of the instance's wake. Arrivals are beside it, in order of time, but for those that
    # wait for a stream.
    queue: list[tuple[float, int, int, int]] = []
    place = events = 0
    decoders_begin, arrives_s = len(front), math.inf
    if streams is None:
        sent = due
        due_in = [*(demand.t_s + fixed_s).tolist(), math.inf]
        arrives_s = due_in[0]

    def send(free_s: float) -> None:
        """The next request, when it is due and a stream is free."""
        nonlocal place
        while place < total:
            request, place = place, place + 1
            sent[request] = due[request] if due[request] > free_s else free_s
            if can_run[request]:
                heappush(queue, (sent[request] + fixed_s, _ARRIVES, request, 0))
                return

    for _ in range(streams or 0):
        send(0.0)
    while True:
        if queue and queue[0][0] < arrives_s:
            now_s, what, number, version = queue[0]  # a wake's next one takes its place
            if what != _WAKES:
                heappop(queue)
        elif place < total:
            now_s, what, number = arrives_s, _ARRIVES, place
            place += 1
            arrives_s = due_in[place]
            if not can_run[number]:
                continue
        else:
            break
        if what == _WAKES:
            instance = instances[number]
            if version != instance.version:
                heappop(queue)
                continue
            events += 1
            gone = instance.wake()
            if instance.wake_s < math.inf:
                heapreplace(queue, (instance.wake_s, _WAKES, number, version))
            else:
                heappop(queue)
            if not gone:
                continue
            if len(tokens.gaps) > _GAPS:
                tokens.count()
            if split and number < decoders_begin:
                for request in gone:
                    fronts.count(number, -1, -prompts[request])
                    if opens_early[request]:
                        tokens.first_s[request] = tokens.last_s[request]
                    computed[request] = now_s
                    took_s = handoff.steps * instances[decoders_begin + decoder[request]].step_s()
                    if noise:
                        took_s *= noise[noise_at % len(noise)]
                        noise_at += 1
                    ready[request] = now_s + (took_s + handoff.per_token_s * prompts[request])
                    heappush(queue, (ready[request], _JOINS, request, 0))
                continue
            for request in gone:
                ended[request] = True
                backs.count(number - decoders_begin if split else number, -1, -prompts[request])
                if streams is not None:
                    send(tokens.last_s[request])
            continue
        request = number
        if what == _ARRIVES:
            number = fronts.choose(begins[request])
            fronts.count(number, 1, prompts[request])
            if split:
                decoder[request] = backs.choose(begins[request])
                backs.count(decoder[request], 1, prompts[request])
            chosen[request] = number
            came[request] = busy_until_s[number] = max(now_s, busy_until_s[number]) + taking_s[request]
            if came[request] > now_s:
                heappush(queue, (came[request], _COMES, request, 0))
                continue
        else:
            number = chosen[request] if what == _COMES else decoders_begin + decoder[request]
        instance = instances[number]
        if instance.add(request, now_s):
            instance.version += 1
            heappush(queue, (instance.wake_s, _WAKES, number, instance.version))

    for instance in instances:
        instance.note()
    gaps = tokens.count()
    done = np.array(ended, bool)
    sent_s, first_s, last_s = np.array(sent), np.array(tokens.first_s), np.array(tokens.last_s)
    first_s[~done] = last_s[~done] = np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_tbt_s = np.where(demand.output_tokens > 1, (last_s - first_s) / (demand.output_tokens - 1), np.nan)
    whole_s = np.array([answer_timeout_s(demand.timeout_s, tokens) for tokens in demand.output_tokens.tolist()])
    return Simulated(
        way_in_s=np.array(came) - sent_s,
        sent_s=sent_s,
        ttft_s=first_s - sent_s,
        e2e_s=last_s - sent_s,
        mean_tbt_s=mean_tbt_s,
        gap_s=np.array(list(gaps), float) / 1e6,
        gap_count=np.array(list(gaps.values()), np.int64),
        scheduled_s=np.array(front[0].pool.scheduled_s),
        computed_s=np.array(computed),
        ready_s=np.array(ready),
        joined_s=np.array(back[0].pool.scheduled_s) if split else np.full(total, math.nan),
        instances=instances,
        window=_window(demand, sent_s[done], last_s[done]),
        timed_out=(first_s - sent_s > demand.timeout_s) | (last_s - sent_s > whole_s),
        output_tokens=demand.output_tokens,
        cached_tokens=np.array(cached, np.int64),
        waited_s=np.zeros(total) if demand.is_closed else sent_s - demand.t_s,
        is_closed=demand.is_closed,
        events=events,
    )


def _window(demand: Demand, sent_s: Array, ended_s: Array) -> Interval:
    """From the first sending to the last end where there is no time at full load."""
    if not len(sent_s):
        return 0.0, 0.0
    sent, ended = np.sort(sent_s), np.sort(ended_s)
    if demand.is_closed:
        found = closed_window([(sent, ended, ended, demand.streams or 1)])
    else:
        filled_s = sent[0] + float(np.quantile(ended_s - sent_s, FILLED_SHARE))
        found = open_window(sent, ended, ended[0], filled_s)
    return found or (float(sent[0]), float(max(ended[-1], sent[-1])))


def weighted_quantiles(
    values: Array, counts: IntArray, shares: Iterable[float], jitter: Sequence[float] = (), most: float = 1e9
) -> list[float]:
    """Quantiles of values that stand for `counts` equal ones each, to any of which any of `jitter` is added, as a share (over -1) of the
    value, or of `most` where that is less; none without any value."""
    if not len(values):
        return []
    order = np.argsort(values)
    values, below = values[order], np.append(0, np.cumsum(counts[order]))
    parts, found = np.sort(jitter or (0.0,)), []
    for share in shares:
        low, high = 0.0, float(values[-1] * (1 + max(parts[-1], 0.0)))
        while high - low > 1e-9:
            middle = (low + high) / 2
            largest = np.where(middle <= most * (1 + parts), middle / (1 + parts), middle - most * parts)
            reached = below[np.searchsorted(values, largest, side="right")].mean() >= share * below[-1]
            low, high = (low, middle) if reached else (middle, high)
        found.append(high)
    return found
