"""A deployment under a load: requests come, the proxy chooses instances, prefill hands over to decode. What came of it, per request.

One queue holds the instants at which something changes; between them the instances (instance.py) need nobody.
"""

import gc
import math
import random
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from pdbench.plan.batch import Costed, Tokens
from pdbench.plan.engine import Demand, Deployment, Policy, Role, Simulated
from pdbench.plan.instance import Instance

_ARRIVES, _JOINS, _WAKES = range(3)
_BITS = 40
_LOWER = (1 << _BITS) - 1
_GAPS = 1 << 15


class Balance:
    """The choice of `proxy.instances.choose` among instances of one role, by the same loads, in time that does not grow with their number.

    Every prompt has a prefix of its own: prefix-affinity then has a random order of instances for each.
    """

    def __init__(self, policy: Policy, count: int, generator: random.Random, *, by_tokens: bool) -> None:
        self.policy, self.generator, self.by_tokens = policy, generator, by_tokens
        self.instances, self.turn, self.requests = count, generator.randrange(count), 0
        self.bits = [1 << index for index in range(count)]
        self.loads = [0] * count  # what counts first in the upper bits, so that loads compare as numbers
        self.holders = {0: (1 << count) - 1}  # load -> the instances that have it, as bits
        self.rising = [0]  # a heap of these loads, and of some that no instance has; tidied when longer than `room`
        self.room = 4 * count + 1000

    def choose(self) -> int:
        count = self.instances
        if count == 1:
            return 0
        turn = self.turn % count
        self.turn += 1
        if self.policy == "round-robin":
            return turn
        if self.policy == "prefix-affinity":
            limit = 2 * self.requests / count + 1
            while True:
                index = self.generator.randrange(count)
                load = self.loads[index]
                if (load & _LOWER if self.by_tokens else load >> _BITS) <= limit:
                    return index
        while self.rising[0] not in self.holders:
            heappop(self.rising)
        least = self.holders[self.rising[0]]
        from_turn = least >> turn << turn or least
        return (from_turn & -from_turn).bit_length() - 1

    def count(self, index: int, requests: int, tokens: int) -> None:
        """Add to an instance's requests and prompt tokens in flight."""
        self.requests += requests
        before, holders, bit = self.loads[index], self.holders, self.bits[index]
        if left := holders.pop(before) ^ bit:
            holders[before] = left
        load = before + ((tokens << _BITS) + requests if self.by_tokens else (requests << _BITS) + tokens)
        self.loads[index] = load
        if load in holders:
            holders[load] |= bit
            return
        holders[load] = bit
        heappush(self.rising, load)
        if len(self.rising) > self.room:
            self.rising = list(holders)
            heapify(self.rising)


def simulate(deployment: Deployment, demand: Demand, seed: int = 0) -> Simulated:
    """Exact in the costs and rules of engine.py. Deterministic in `seed`, which decides where each instance begins in `Costs.noise`
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
    split = deployment.kind == "disaggregated"

    def pool(role: Role, sizes: list[int], cached: list[int], outputs: list[int]) -> list[Instance]:
        costed = Costed(deployment.engines[role], role, sizes, cached, outputs)
        starts = len(costed.engine.costs.noise) or 1
        return [Instance(costed, tokens, generator.randrange(starts)) for _ in range(deployment.instances[role])]

    # Prefill's token is the client's first where the proxy passes it on, and where it is not the last one too.
    may_open = split and deployment.first_token == "prefill"
    opens_early = [may_open and count > 1 and generator.random() < deployment.prefill_opens for count in outputs]
    early = np.array(opens_early, np.int64)
    if split:
        front = pool("prefill", prompts, cached, [1] * total)
        sizes = (demand.prompt_tokens + early).tolist()
        back = pool("decode", sizes, [size - 1 for size in sizes], (demand.output_tokens - early).tolist())
        fronts = Balance(deployment.prefill_policy, len(front), generator, by_tokens=True)
        backs = Balance(deployment.decode_policy, len(back), generator, by_tokens=False)
    else:
        front, back = pool("single" if deployment.kind == "single" else "replica", prompts, cached, outputs), []
        fronts = backs = Balance(deployment.decode_policy, len(front), generator, by_tokens=False)
    instances = front + back
    can_run = np.logical_and.reduce([pool[0].costed.fits for pool in (front, back) if pool]).tolist()
    way_in_s = instances[0].costs.ingress_s + (deployment.proxy_s if deployment.kind != "single" else 0.0)

    sent, ended, decoder = [math.nan] * total, [False] * total, [0] * total
    computed, ready = [math.nan] * total, [math.nan] * total
    noise = deployment.handoff_noise
    noise_at = generator.randrange(len(noise)) if noise else 0
    # Instant, what happens, request or instance, version of the instance's wake. Arrivals are beside it, in order of time, but for those
    # that wait for a stream.
    queue: list[tuple[float, int, int, int]] = []
    place = events = 0
    decoders_begin, arrives_s = len(front), math.inf
    if streams is None:
        sent = due
        due_in = [*(at_s + way_in_s for at_s in due), math.inf]
        arrives_s = due_in[0]

    def send(free_s: float) -> None:
        """The next request, when it is due and a stream is free."""
        nonlocal place
        while place < total:
            request, place = place, place + 1
            sent[request] = due[request] if due[request] > free_s else free_s
            if can_run[request]:
                heappush(queue, (sent[request] + way_in_s, _ARRIVES, request, 0))
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
                    handoff_s = deployment.handoff_s
                    if deployment.handoff_steps:
                        handoff_s += deployment.handoff_steps * instances[decoders_begin + decoder[request]].step_s()
                    if noise:
                        handoff_s *= noise[noise_at % len(noise)]
                        noise_at += 1
                    ready[request] = now_s + (handoff_s + deployment.handoff_per_token_s * prompts[request])
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
            number = fronts.choose()
            fronts.count(number, 1, prompts[request])
            if split:
                decoder[request] = backs.choose()
                backs.count(decoder[request], 1, prompts[request])
        else:
            number = decoders_begin + decoder[request]
        instance = instances[number]
        if instance.add(request, now_s):
            instance.version += 1
            heappush(queue, (instance.wake_s, _WAKES, number, instance.version))

    gaps = tokens.count()
    done = np.array(ended, bool)
    sent_s, first_s, last_s = np.array(sent), np.array(tokens.first_s), np.array(tokens.last_s)
    first_s[~done] = last_s[~done] = np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_tbt_s = np.where(demand.output_tokens > 1, (last_s - first_s) / (demand.output_tokens - 1), np.nan)
    return Simulated(
        sent_s=sent_s,
        ttft_s=first_s - sent_s,
        e2e_s=last_s - sent_s,
        mean_tbt_s=mean_tbt_s,
        gap_s=np.array(list(gaps), float) / 1e6,
        gap_count=np.array(list(gaps.values()), np.int64),
        scheduled_s=np.array(front[0].costed.scheduled_s),
        computed_s=np.array(computed),
        ready_s=np.array(ready),
        joined_s=np.array(back[0].costed.scheduled_s) if split else np.full(total, math.nan),
        instances=[instance.use for instance in instances],
        span_s=float(last_s[done].max()) if done.any() else 0.0,
        events=events,
    )
