"""The truth that the simulator is compared with: every step, every sequence and every token, one after the other, in the plainest way.

The proxy's choices are those of the proxy's own code.
"""

import itertools
import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from pdbench.plan.engine import SHORT_PROMPT, Demand, Deployment, Engine, Role
from pdbench.proxy import instances as proxy


@dataclass
class Request:
    number: int
    prompt: int
    cached: int
    output: int
    token_s: list[float] = field(default_factory=list)


@dataclass
class Sequence:
    """A request at one engine. `tokens` generated (scheduled), `known` handed out; `computed` tokens are in the KV cache."""

    request: Request
    size: int
    output: int
    computed: int = 0
    tokens: int = 0
    known: int = 0
    preempted: bool = False
    joined: bool = False
    recompute: int = 0


class SlowEngine:
    def __init__(self, engine: Engine, role: Role) -> None:
        self.engine, self.costs, self.limits, self.role = engine, engine.costs, engine.limits, role
        self.s = self.d = 0.0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.in_flight: list[list[Sequence]] = []  # of each step, who gets a token; the oldest first
        self.steps: list[tuple[float, dict[int, int]]] = []  # when scheduled; request -> tokens computed
        self.preemptions = 0
        self.noise_at = 0
        self.asleep = True

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def free(self) -> float:
        if self.limits.kv_cache_tokens is None:
            return math.inf
        capacity = self.limits.kv_cache_tokens // self.limits.block_size
        return capacity - sum(self.blocks(sequence.computed) for sequence in self.running)

    def add(self, sequence: Sequence, now_s: float) -> None:
        self.waiting.append(sequence)
        if self.asleep:
            self.s = max(self.s, now_s)
            self.asleep = False

    def boundary(self) -> list[Sequence]:
        """Hand out a step's tokens and schedule the next step at `s`; returns who got a token."""
        got = self.in_flight.pop(0) if len(self.in_flight) == self.limits.lag else []
        for sequence in got:
            sequence.known += 1
            if sequence.known == sequence.output and sequence in self.running:
                self.running.remove(sequence)
        if not (self.running or self.waiting or any(self.in_flight)):
            self.in_flight = []
            self.asleep = True
            return got
        budget, scheduled, preempted = self.limits.max_num_batched_tokens, dict[int, int](), False
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            index += 1
            if sequence.tokens == sequence.output:
                continue
            # A prompt's rest (after a preemption its tokens too), or one token.
            whole = sequence.recompute or sequence.size
            count = min(whole - sequence.computed, budget) if sequence.computed < whole else 1
            while self.blocks(sequence.computed + count) - self.blocks(sequence.computed) > self.free():
                victim = self.running.pop()
                victim.computed, victim.recompute, victim.joined = 0, victim.size + victim.tokens, False
                if victim.tokens < victim.output:
                    self.waiting.insert(0, victim)
                preempted, self.preemptions = True, self.preemptions + 1
                if victim is sequence:
                    break
            if sequence not in self.running:
                break
            scheduled[sequence.request.number] = count
            sequence.computed += count
            budget -= count
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            whole = sequence.recompute or sequence.size
            if self.blocks(whole) > self.free():
                break
            self.running.append(self.waiting.pop(0))
            if not sequence.recompute:
                sequence.computed = sequence.request.cached if self.role != "decode" else sequence.size - 1
                sequence.joined = self.role == "decode"
            count = min(whole - sequence.computed, budget)
            scheduled[sequence.request.number] = count
            sequence.computed += count
            budget -= count
        self.run(scheduled)
        return got

    def run(self, scheduled: dict[int, int]) -> None:
        """The step's time, and who gets a token of it."""
        members = [sequence for sequence in self.running if sequence.request.number in scheduled]
        decoding, prompt_tokens, longest, context, joins = 0, 0, 0, 0, False
        getting = []
        for sequence in members:
            whole, count = sequence.recompute or sequence.size, scheduled[sequence.request.number]
            if sequence.computed > whole or sequence.joined:
                decoding += 1
                context += sequence.computed
                joins += sequence.joined
                sequence.joined = False
            else:
                prompt_tokens += count
                longest = max(longest, count)
            if sequence.computed >= whole:
                sequence.tokens += 1
                getting.append(sequence)
        host = gpu = 0.0
        factor = gpu_factor = 1.0
        if members:
            host = self.costs.host_decode_s
            if prompt_tokens or 0 < self.limits.captured < decoding:  # graphs of whole steps hold no prompts
                noise = list(itertools.chain(*self.costs.noise))
                gpu_noise = list(itertools.chain(*self.costs.gpu_noise)) or noise
                factor = noise[self.noise_at % len(noise)] if noise and prompt_tokens else 1.0
                gpu_factor = gpu_noise[self.noise_at % len(gpu_noise)] if noise and prompt_tokens else 1.0
                self.noise_at += prompt_tokens > 0
                eager = prompt_tokens + decoding > self.limits.captured
                launch = self.costs.beyond_graphs_s if eager else self.costs.host_prefill_s
                if prompt_tokens and (not decoding or longest <= SHORT_PROMPT):
                    launch *= self.costs.alike_launch
                host = launch * factor + self.costs.host_per_prompt_token_s * prompt_tokens
            gpu = float(self.costs.gpu_step_s(np.array(decoding), context))
            if prompt_tokens:
                gpu += (self.costs.gpu_prefill_s + self.costs.gpu_per_prompt_token_s * prompt_tokens) * gpu_factor
            self.steps.append((self.s, scheduled))
        before = self.costs.before_gpu_s if prompt_tokens else 0.0
        done = max(max(self.d, self.s + before) + gpu, self.s + host)
        self.s = max(self.s + host, self.d) if self.limits.async_scheduling else done
        self.s += self.costs.join_s * joins
        self.d = done
        self.in_flight.append(getting)


def step_by_step(
    deployment: Deployment, demand: Demand, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[float]], list[SlowEngine]]:
    """Every request's instants of tokens at the client, from the load's start."""
    generator = random.Random(seed)
    layout = deployment.layout
    split = layout.kind == "disaggregated"
    opens = deployment.handoff.prefill_opens if split else 0
    opens_early = [opens > 0 and int(tokens) > 1 and generator.random() < opens for tokens in demand.output_tokens]
    roles: list[Role] = ["prefill", "decode"] if split else ["single" if layout.kind == "single" else "replica"]
    engines: dict[Role, list[SlowEngine]] = {}
    for role in roles:
        engines[role] = [SlowEngine(deployment.engines[role], role) for _ in range(layout.instances[role])]
        for engine in engines[role]:  # in the order in which simulate() draws
            series = engine.costs.noise, engine.costs.gpu_noise
            engine.noise_at = generator.randrange(max(sum(map(len, each)) for each in series) or 1)
    table = proxy.InstanceTable()
    turns = {}
    for role in roles:
        turns["prefill" if role == "prefill" else "decode"] = itertools.count(
            generator.randrange(layout.instances[role])
        )
    monkeypatch.setattr(proxy, "_turns", turns)
    for role in roles:
        for number in range(layout.instances[role]):
            name = "prefill" if role == "prefill" else "decode"
            table.passed(table.add(name, proxy.Address(f"{role}-{number}", 1, "kv", 1)))
    slots = {role: table.ready("prefill" if role == "prefill" else "decode") for role in roles}
    costs = deployment.engines[roles[0]].costs
    proxy_s = deployment.proxy_s if layout.kind != "single" else 0.0

    columns = zip(demand.prompt_tokens, demand.cached_tokens, demand.output_tokens, strict=True)
    requests = [Request(i, int(p), min(int(c), int(p) - 1), int(o)) for i, (p, c, o) in enumerate(columns)]
    fixed_s = costs.ingress_s + proxy_s
    arrivals = [(float(t_s) + fixed_s, 0, request) for t_s, request in zip(demand.t_s, requests, strict=True)]
    taken_in_s = [0.0] * layout.instances[roles[0]]  # an API server takes prompts in one after the other
    later: list[tuple[float, int, Request]] = []
    counted: dict[int, proxy.Instance] = {}
    chosen: dict[int, int] = {}
    every = [(role, number, engine) for role in roles for number, engine in enumerate(engines[role])]

    def sequence_at_decode(request: Request) -> Sequence:
        early = opens_early[request.number]
        return Sequence(request, request.prompt + early, request.output - early)

    while True:
        awake = [entry for entry in every if not entry[2].asleep]
        soonest = min(awake, key=lambda entry: entry[2].s, default=None)
        external = min(
            arrivals[:1] + sorted(later, key=lambda event: event[:2])[:1], key=lambda event: event[:2], default=None
        )
        if external is None and soonest is None:
            return [request.token_s for request in requests], [engine for _, _, engine in every]
        if external is not None and (soonest is None or external[0] <= soonest[2].s):
            now_s, what, request = external
            if what == 1:
                later.remove(external)
                size = Sequence(request, request.prompt, 1 if split else request.output)
                engines[roles[0]][slots[roles[0]].index(counted[request.number])].add(size, now_s)
                continue
            if what == 2:
                later.remove(external)
                engines["decode"][chosen[request.number]].add(sequence_at_decode(request), now_s)
                continue
            arrivals.pop(0)
            name = "prefill" if split else "decode"
            instance = proxy.choose("least-work", name, table, b"", set())
            assert instance is not None
            table.count(instance, 1, request.prompt)
            counted[request.number] = instance
            place = slots[roles[0]].index(instance)
            taken_in_s[place] = max(now_s, taken_in_s[place]) + costs.ingress_per_token_s * request.prompt
            later.append((taken_in_s[place], 1, request))
            if split:
                decode = proxy.choose("least-work", "decode", table, b"", set())
                assert decode is not None
                chosen[request.number] = slots["decode"].index(decode)
                table.count(decode, 1, request.prompt)
            continue
        assert soonest is not None
        role, number, engine = soonest
        now_s = engine.s
        for sequence in engine.boundary():
            request = sequence.request
            if role == "prefill":
                table.count(counted[request.number], -1, -request.prompt)
                if opens_early[request.number]:
                    request.token_s.append(now_s)
                later.append((now_s + deployment.handoff.per_token_s * request.prompt, 2, request))
                continue
            request.token_s.append(now_s)
            if sequence.known == sequence.output:
                instance = slots["decode"][number] if split else counted[request.number]
                table.count(instance, -1, -request.prompt)
