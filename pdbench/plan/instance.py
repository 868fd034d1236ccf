"""One vLLM engine in simulated time: the steps of engine.py, where one event stands for all steps between two changes of the batch.

Between two changes all steps are alike but for their growing context, so the time of a row of steps is a sum in closed form (`_walk`).
The rules are those of vLLM's scheduler; tests/plan compares every step with a token-by-token simulation and with vLLM's own class.
"""

import math
from collections import deque
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from pdbench.plan.engine import Engine, InstanceUse, Role

OPENS, ENDS, PAUSES = 1, 2, 4
"""What a token that is handed out is to its request: the first (after a preemption: the first again), the last, the last before a preemption."""


class Sequence(NamedTuple):
    """A sequence that decodes: its context in step k is `base` + k tokens, its last token is computed in step `end` - 1."""

    end: int
    order: int
    request: int
    base: int


class Partial(NamedTuple):
    """A prompt of which `computed` of `size` tokens were computed."""

    request: int
    computed: int
    size: int


class Instance:
    """An engine at the boundary before step `k`, at `s`; the step before is done at `d`. It wants to be woken at `wake_s`.

    `sizes`, `cached` and `outputs` are by request: tokens of the prompt as this engine gets it, how many of them need no computing,
    tokens to generate. A decode instance gets all but the last token computed. `gaps` counts gaps between tokens by microseconds.
    """

    def __init__(
        self,
        engine: Engine,
        role: Role,
        sizes: list[int],
        cached: list[int],
        outputs: list[int],
        gaps: dict[int, int],
        noise_at: int,
    ) -> None:
        limits = engine.limits
        self.engine, self.costs, self.box = engine, engine.costs, engine.box
        self.sizes, self.cached, self.outputs, self.gaps = sizes, cached, outputs, gaps
        self.use = InstanceUse(role=role)
        self.lag = 2 if limits.async_scheduling else 1  # steps until a step's tokens are handed out
        self.budget, self.block = limits.max_num_batched_tokens, limits.block_size
        self.most = min(limits.max_num_seqs, self.budget)
        self.blocks = None if limits.kv_cache_tokens is None else limits.kv_cache_tokens // self.block
        self.noise_at = noise_at
        self.decode_s: list[tuple[float, float]] = [
            (0.0, 0.0)
        ]  # host and GPU time of a decode step by sequences, without context
        self.k = self.order = 0
        self.s = self.d = self.wake_s = 0.0
        self.version = 0  # of wake_s, for the queue of events
        self.weight = 0  # sequences that got a token in the last step and in the one before it
        self.steps = 0  # decode steps until wake_s
        self.walked: tuple[float, float, list[tuple[float, int]]] = (0.0, 0.0, [])  # s, d and gaps after them
        self.running: list[Sequence] = []  # a heap, the first to end on top
        self.base = 0  # the sum of their bases
        self.ending: dict[int, Sequence] = {}  # by request: all is computed, the last token not yet handed out
        self.partial: Partial | None = None
        self.waiting: deque[int] = deque()
        self.blocked = False  # the first that waits needs a slot or KV blocks of one that ends
        self.resumed: dict[int, int] = {}  # preempted request -> tokens generated before
        self.handouts: deque[tuple[int, int, int]] = deque()  # boundary, request, what the token is to it

    def never_fits(self, request: int) -> bool:
        return self.blocks is not None and self.sizes[request] + self.outputs[request] - 1 > self.blocks * self.block

    def add(self, request: int, now_s: float) -> bool:
        """A request arrives; is `wake_s` another one now?"""
        self.waiting.append(request)
        if self.blocked or len(self.waiting) > 1:
            return False  # the next wake is the one that may schedule it
        if not (self.running or self.handouts or self.partial):
            self.s = self.wake_s = max(self.s, now_s)
            return True
        if not self.steps:
            return False
        before, self.steps = self.steps, 0
        if self.s < now_s:
            self._plan(before, now_s)
        else:
            self.wake_s = self.s
        return self.steps != before

    def wake(self) -> list[tuple[int, int]]:
        """Come to `wake_s`, hand out tokens, schedule what waits, and set the next `wake_s`. (request, what the token is to it) of each."""
        if self.steps:
            self._advance()
        k, running, handouts = self.k, self.running, self.handouts
        while running and running[0].end == k:
            sequence = heappop(running)
            self.base -= sequence.base
            self.ending[sequence.request] = sequence
            handouts.append((k - 1 + self.lag, sequence.request, ENDS))
        tokens = []
        while handouts and handouts[0][0] <= k:
            _, request, kind = handouts.popleft()
            tokens.append((request, kind))
            if kind & ENDS:
                self.ending.pop(request, None)
                self.blocked = False
        if self.blocks is not None and self._free(1) < 0:
            self._preempt()
        elif self.partial or (self.waiting and not self.blocked):
            self._schedule()
        if self.k > k and (self.partial or (self.waiting and not self.blocked)):
            self.steps, self.wake_s = 0, self.s
        elif running or handouts:
            limit = 1 if self.waiting and not self.blocked else 1 << 60
            if running:
                limit = min(limit, running[0].end - self.k)
            if handouts:
                limit = min(limit, handouts[0][0] - self.k)
            if self.blocks is not None and running:
                limit = self._steps_that_fit(limit)
            self.steps = 0
            self._plan(limit, math.inf)
        else:
            self.steps, self.wake_s = 0, math.inf
        return tokens

    def _plan(self, limit: int, until_s: float) -> None:
        """Set `wake_s` to the boundary after `limit` decode steps, or to the first one at `until_s` or later."""
        self.steps, self.walked = self._walk(limit, until_s)
        self.wake_s = self.walked[0]

    def _costs_of(self, sequences: int) -> tuple[float, float]:
        table, costs = self.decode_s, self.costs
        while len(table) <= sequences:
            captured = len(table) <= self.engine.limits.captured
            table.append(
                (costs.host_decode_s if captured else costs.host_prefill_s, self.engine.gpu_decode_s(len(table)))
            )
        return table[sequences]

    def _walk(self, limit: int, until_s: float) -> tuple[int, tuple[float, float, list[tuple[float, int]]]]:
        """Decode steps from here: how many, s and d after them, gaps with their counts (the context's growth only in their mean)."""
        s, d, n = self.s, self.d, len(self.running)
        host, gpu = self._costs_of(n)
        growth = self.costs.gpu_per_context_token_s * n
        gpu += self.costs.gpu_per_context_token_s * (self.base + n * self.k)
        steps, gaps, weight = 0, [], self.weight
        while steps < limit and s < until_s:
            count = limit - steps
            if self.lag == 1:
                count = _rows(count, max(gpu, host), growth if gpu >= host else 0.0, until_s - s)
                if gpu < host and growth:
                    count = min(count, int((host - gpu) / growth) + 1)
                took = count * max(gpu, host) + (growth * count * (count - 1) / 2 if gpu >= host else 0.0)
                gaps.append((took / count, count * n))
                s = d = s + took
            elif d <= s and gpu <= host and n:  # the host sets the pace
                if growth:
                    count = min(count, int((host - gpu) / growth) + 1)
                count = _rows(count, host, 0.0, until_s - s)
                gaps.append((host, weight + (count - 1) * n))
                s = d = s + count * host
            elif d >= s + host and gpu >= host and n:  # the GPU does
                count = 1 + _rows(count - 1, gpu, growth, until_s - d)
                took = (count - 1) * gpu + growth * (count - 1) * (count - 2) / 2
                gaps.append((d - s, weight))
                if count > 1:
                    gaps.append((took / (count - 1), (count - 1) * n))
                s = d + took
                d = s + gpu + growth * (count - 1)
            else:
                count = 1
                launched = s + host
                after = max(launched, d)
                gaps.append((after - s, weight))
                s, d = after, max(max(d, s) + gpu, launched)
            gpu += growth * count
            steps += count
            weight = n
        return steps, (s, d, gaps)

    def _advance(self) -> None:
        """Do the planned steps."""
        (s, d, gaps), use, n, steps = self.walked, self.use, len(self.running), self.steps
        counts = self.gaps
        for gap_s, count in gaps:
            if count:
                key = int(gap_s * 1e6 + 0.5)
                counts[key] = counts.get(key, 0) + count
        if n:
            took = d - max(self.d, self.s)
            use.decode_s += took
            use.sequence_s += n * took
            use.output_tokens += n * steps
            if self.box is not None:
                context = self.base + n * self.k
                over = context + n * steps - self.box.context_tokens
                self._outside("context_tokens", took * min(1.0, over / (n * steps)) if over > 0 else 0.0)
                self._outside("sequences", took if n > self.box.sequences else 0.0)
        self.s, self.d, self.weight = s, d, n
        self.k += steps

    def _outside(self, name: str, seconds: float) -> None:
        if seconds > 0:
            self.use.outside_s[name] = self.use.outside_s.get(name, 0.0) + seconds

    def _schedule(self) -> None:
        """One step with as many prompt tokens and joining sequences as have room; no step if none has."""
        k, costs, running, n = self.k, self.costs, self.running, len(self.running)
        room, prompt_tokens, joining, prompts, context = self.budget - n, 0, 0, 0, self.base + n * k
        complete: list[tuple[int, int]] = []
        limited = self.blocks is not None
        held = -(-self.partial.computed // self.block) if self.partial else 0
        free, taken, exact = (self._free(1), 0, False) if limited else (1 << 60, 0, True)
        while room > 0 and (self.partial or self.waiting):
            if self.partial:
                request, computed, size = self.partial
                needed = -(-min(size, computed + room) // self.block) - held
            else:
                request = self.waiting[0]
                size = self.sizes[request] + self.resumed.get(request, 0)
                if n + len(self.ending) + len(complete) >= self.most:
                    self.blocked = True
                    break
                computed, needed = 0 if request in self.resumed else self.cached[request], -(-size // self.block)
            if needed > free - taken and not exact:
                free, exact = self._free(1, exact=True), True
            if needed > free - taken:
                if self.partial:
                    self._put_back(request)
                else:
                    self.blocked = True
                break
            if self.partial:
                self.partial = None
                free += held  # `taken` has them all
            else:
                self.waiting.popleft()
            count = min(size - computed, room)
            taken += -(-(computed + count) // self.block)
            room -= count
            if self.use.role == "decode" and computed == size - 1 and request not in self.resumed:
                joining += 1
                context += size
            else:
                prompt_tokens += count
                prompts += 1
            if computed + count < size:
                self.partial = Partial(request, computed + count, size)
                break
            complete.append((request, size))
        if not prompt_tokens and not joining:
            return
        host = costs.host_decode_s
        if n + joining + prompt_tokens > self.engine.limits.captured:
            noise = costs.noise[self.noise_at % len(costs.noise)] if costs.noise and prompt_tokens else 1.0
            self.noise_at += prompt_tokens > 0
            host = costs.host_prefill_s * noise + costs.host_per_prompt_token_s * prompt_tokens
        gpu = (
            self._costs_of(n + joining)[1]
            + costs.gpu_per_context_token_s * context
            + (costs.join_s if joining else 0.0)
        )
        if prompt_tokens:
            gpu += costs.gpu_prefill_s + costs.gpu_per_prompt_token_s * prompt_tokens
        done = max(max(self.d, self.s) + gpu, self.s + host)
        self._note(done - max(self.d, self.s), n + joining + prompts, prompt_tokens, context)
        after = done if self.lag == 1 else max(self.s + host, self.d)
        if weight := n if self.lag == 1 else self.weight:
            key = int((after - self.s) * 1e6 + 0.5)
            self.gaps[key] = self.gaps.get(key, 0) + weight
        self.s, self.d, self.weight, self.k = after, done, n, k + 1
        for request, size in complete:
            left = self.outputs[request] - self.resumed.get(request, 0)
            self.handouts.append((k + self.lag, request, OPENS if left > 1 else OPENS | ENDS))
            self.order += 1
            sequence = Sequence(k + left, self.order, request, size - k)
            if left > 1:
                heappush(running, sequence)
                self.base += size - k
            else:
                self.ending[request] = sequence
        self.use.output_tokens += n + len(complete)

    def _note(self, took_s: float, sequences: int, prompt_tokens: int, context: int) -> None:
        use, box = self.use, self.box
        use.sequence_s += sequences * took_s
        use.prompt_tokens += prompt_tokens
        if prompt_tokens:
            use.prefill_s += took_s
        else:
            use.decode_s += took_s
        if box is not None:
            for name, value in (
                ("prompt_tokens", prompt_tokens),
                ("sequences", sequences),
                ("context_tokens", context),
            ):
                self._outside(name, took_s if value > getattr(box, name) else 0.0)

    def _free(self, steps: int, *, exact: bool = False) -> int:
        """KV blocks that are free once every decoding sequence has computed `steps` tokens more; so many or more unless `exact`."""
        assert self.blocks is not None
        before, block = self.k - 1 + steps, self.block
        held = [sequence.base + sequence.end - 1 for sequence in self.ending.values()]
        if self.partial:
            held.append(self.partial.computed)
        tokens = self.base + len(self.running) * before + sum(held)
        least = (
            self.blocks - tokens // block - len(self.running) - len(held)
        )  # each sequence has one block that is not full
        if least >= 0 and not exact:
            return least
        used = sum(-(-(sequence.base + before) // block) for sequence in self.running)
        return self.blocks - used - sum(-(-tokens // block) for tokens in held)

    def _steps_that_fit(self, limit: int) -> int:
        """How many of `limit` decode steps the KV cache has blocks for."""
        if self._free(limit) >= 0:
            return limit
        fits, too_many = 0, limit
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self._free(middle) >= 0 else (fits, middle)
        return fits

    def _put_back(self, request: int) -> None:
        """A sequence that lost its blocks is the first that waits, and computes all its tokens again."""
        self.partial = None
        self.waiting.appendleft(request)
        self.use.preemptions += 1

    def _preempt(self) -> None:
        """The next step needs more blocks than there are: the sequences that came last lose theirs, as long as an earlier one needs one."""
        k, block = self.k, self.block
        queue = deque(sorted([*self.running, *self.ending.values()], key=lambda sequence: sequence.order))
        free = self._free(0, exact=True)
        while queue:
            sequence = queue[0]
            needed = sequence.request not in self.ending and (sequence.base + k - 1) % block == 0
            while needed and free <= 0 and queue:
                if self.partial:
                    free += -(-self.partial.computed // block)
                    self._put_back(self.partial.request)
                    continue
                victim = queue.pop()
                free += -(-(victim.base + min(k, victim.end) - 1) // block)
                if self.ending.pop(victim.request, None):
                    continue
                self.running.remove(victim)
                self.base -= victim.base
                self.resumed[victim.request] = victim.base + k - self.sizes[victim.request]
                self.handouts.append((k - 1 + self.lag, victim.request, PAUSES))
                self._put_back(victim.request)
            if queue:
                queue.popleft()
                free -= needed
        heapify(self.running)


def _rows(most: int, step_s: float, growth_s: float, until_s: float) -> int:
    """The fewest steps, each `growth_s` longer than the one before it, that take `until_s` or more; at most `most`."""
    if until_s == math.inf or step_s <= 0:
        return most
    if until_s <= 0:
        return 0
    if not growth_s:
        return min(most, math.ceil(until_s / step_s))
    first = step_s - growth_s / 2
    return min(most, math.ceil((math.sqrt(first * first + 2 * growth_s * until_s) - first) / growth_s))
