"""A deployment under a load: requests come, the proxy chooses instances, prefill hands over to decode. What came of it, per request.

One queue holds the instants at which something changes; between them the instances (instance.py) need nobody.
"""

import math
import random
from heapq import heapify, heappop, heappush

import numpy as np

from pdbench.plan.engine import Demand, Deployment, Policy, Role, Simulated
from pdbench.plan.instance import ENDS, OPENS, Instance

_ARRIVES, _JOINS, _WAKES = range(3)


class Balance:
    """The choice of `proxy.instances.choose` among instances of one role, by the same loads, in time that does not grow with their number.

    Every prompt has a prefix of its own: prefix-affinity then has a random order of instances for each.
    """

    def __init__(self, policy: Policy, count: int, generator: random.Random, *, by_tokens: bool) -> None:
        self.policy, self.generator, self.by_tokens = policy, generator, by_tokens
        self.turn, self.requests = generator.randrange(count), 0
        self.loads = [(0, 0)] * count
        self.holders = {(0, 0): (1 << count) - 1}  # load -> the instances that have it, as bits
        self.rising = [(0, 0)]  # a heap of these loads, and of some that no instance has

    def choose(self) -> int:
        if len(self.loads) == 1:
            return 0
        turn = self.turn % len(self.loads)
        self.turn += 1
        if self.policy == "round-robin":
            return turn
        if self.policy == "prefix-affinity":
            limit = 2 * self.requests / len(self.loads) + 1
            while True:
                index = self.generator.randrange(len(self.loads))
                if self.loads[index][self.by_tokens] <= limit:
                    return index
        while self.rising[0] not in self.holders:
            heappop(self.rising)
        least = self.holders[self.rising[0]]
        from_turn = least >> turn << turn or least
        return (from_turn & -from_turn).bit_length() - 1

    def count(self, index: int, requests: int, tokens: int) -> None:
        """Add to an instance's requests and prompt tokens in flight."""
        self.requests += requests
        first, second = self.loads[index]
        holders, bit = self.holders, 1 << index
        if left := holders.pop((first, second)) ^ bit:
            holders[first, second] = left
        load = (first + tokens, second + requests) if self.by_tokens else (first + requests, second + tokens)
        self.loads[index] = load
        if load in holders:
            holders[load] |= bit
            return
        holders[load] = bit
        heappush(self.rising, load)
        if len(self.rising) > 4 * len(holders) + 1000:
            self.rising = list(holders)
            heapify(self.rising)


def simulate(deployment: Deployment, demand: Demand, seed: int = 0) -> Simulated:
    """Exact in the costs and rules of engine.py. Deterministic in `seed`, which decides where each instance begins in `Costs.noise`
    and whose turn is first."""
    generator = random.Random(seed)
    total, gaps = len(demand), dict[int, int]()
    prompts, outputs = demand.prompt_tokens.tolist(), demand.output_tokens.tolist()
    due = demand.t_s.tolist()
    cached = [min(tokens, prompt - 1) for tokens, prompt in zip(demand.cached_tokens.tolist(), prompts, strict=True)]
    split = deployment.kind == "disaggregated"
    # Prefill's token is the client's first where it is not the last one too.
    opens_early = [split and deployment.first_token == "prefill" and tokens > 1 for tokens in outputs]

    def pool(role: Role, sizes: list[int], cached: list[int], outputs: list[int]) -> list[Instance]:
        engine = deployment.engines[role]
        starts = len(engine.costs.noise) or 1
        return [
            Instance(engine, role, sizes, cached, outputs, gaps, generator.randrange(starts))
            for _ in range(deployment.instances[role])
        ]

    if split:
        front = pool("prefill", prompts, cached, [1] * total)
        sizes = [prompt + early for prompt, early in zip(prompts, opens_early, strict=True)]
        left = [tokens - early for tokens, early in zip(outputs, opens_early, strict=True)]
        back = pool("decode", sizes, [size - 1 for size in sizes], left)
        fronts = Balance(deployment.prefill_policy, len(front), generator, by_tokens=True)
        backs = Balance(deployment.decode_policy, len(back), generator, by_tokens=False)
    else:
        front = pool("single" if deployment.kind == "single" else "replica", prompts, cached, outputs)
        back, fronts = [], Balance(deployment.decode_policy, len(front), generator, by_tokens=False)
        backs = fronts
    instances = front + back
    way_in_s = instances[0].costs.ingress_s + (deployment.proxy_s if deployment.kind != "single" else 0.0)

    sent = [math.nan] * total
    first, last = sent.copy(), sent.copy()  # the client's instants of the first token and of the last one that it got
    place, decode_place = [0] * total, [0] * total
    queue: list[tuple[float, int, int, int]] = []
    next_to_send = events = 0
    ended: list[bool] = [False] * total

    def send(free_s: float) -> None:
        """The next request, now that a stream is free."""
        nonlocal next_to_send
        if next_to_send < total:
            sent[next_to_send] = max(due[next_to_send], free_s)
            heappush(queue, (sent[next_to_send] + way_in_s, _ARRIVES, next_to_send, 0))
            next_to_send += 1

    def add(number: int, request: int, now_s: float) -> None:
        instance = instances[number]
        if instance.add(request, now_s):
            instance.version += 1
            heappush(queue, (instance.wake_s, _WAKES, number, instance.version))

    for _ in range(1 if demand.streams is None else demand.streams):
        send(0.0)
    while queue:
        now_s, kind, number, version = heappop(queue)
        if kind == _WAKES:
            instance = instances[number]
            if version != instance.version:
                continue
            events += 1
            tokens = instance.wake()
            if instance.wake_s < math.inf:
                instance.version += 1
                heappush(queue, (instance.wake_s, _WAKES, number, instance.version))
            if not tokens:
                continue
            out_s = now_s + instance.costs.egress_s
            for request, what in tokens:
                if split and number < len(front):
                    if not what & ENDS:
                        continue
                    fronts.count(number, -1, -prompts[request])
                    if opens_early[request]:
                        first[request] = last[request] = out_s
                        backs.count(decode_place[request], 1, prompts[request])
                    handoff_s = deployment.handoff_s + deployment.handoff_per_token_s * prompts[request]
                    heappush(queue, (now_s + handoff_s, _JOINS, request, 0))
                    continue
                if what & OPENS:
                    if first[request] != first[request]:
                        first[request] = out_s
                    else:
                        gap = int((out_s - last[request]) * 1e6 + 0.5)
                        gaps[gap] = gaps.get(gap, 0) + 1
                last[request] = out_s
                if what & ENDS:
                    ended[request] = True
                    if split:
                        backs.count(number - len(front), -1, -prompts[request])
                    else:
                        fronts.count(number, -1, -prompts[request])
                    if demand.streams is not None:
                        send(out_s)
        elif kind == _ARRIVES:
            request = number
            if demand.streams is None:
                send(0.0)
            if front[0].never_fits(request) or (back and back[0].never_fits(request)):
                if demand.streams is not None:
                    send(now_s)
                continue
            index = place[request] = fronts.choose()
            fronts.count(index, 1, prompts[request])
            if split:
                # Chosen when the request comes, counted when it is sent there (proxy/handler.py).
                decode_place[request] = backs.choose()
                if not opens_early[request]:
                    backs.count(decode_place[request], 1, prompts[request])
            add(index, request, now_s)
        else:
            add(len(front) + decode_place[number], number, now_s)

    done = np.array(ended, bool)
    sent_s, first_s, last_s = (np.array(values) for values in (sent, first, last))
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
        instances=[instance.use for instance in instances],
        span_s=float(np.nanmax(last_s)) if done.any() else 0.0,
        events=events,
    )
