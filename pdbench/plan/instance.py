"""One vLLM engine in simulated time: the steps of engine.py, where one event stands for all steps between two changes of the batch.

Between two changes all steps are alike but for their growing context, so the time of a row of steps is a sum in closed form (`_plan`).
The rules are those of vLLM's scheduler; tests/plan compares every token with a step-by-step simulation, and every step with vLLM's class.
"""

import math
from bisect import insort

from pdbench.plan.batch import LAST, ONLY, PAUSES, Batch, Pool, Tokens
from pdbench.plan.engine import SHORT_PROMPT

MOST_NOTES, APART_S = 300, 0.1
"""So many instants, so far apart, keep what was done until then; beyond, every second one goes, and later ones are twice as far apart."""


class Instance(Batch):
    """An engine at the boundary before step `k`, at `s`; the step before is done at `d`. It wants to be woken at `wake_s`.

    What it did, for its power and for trust: `prefill_s` is the time in steps with prompt tokens, `decode_s` in steps without; the rest it
    was idle. `sequence_s` is the integral of its running sequences over time. `done` has rows of (instant, decode_s, sequence_s, prefill_s,
    prompt_tokens) until then. `outside_s` maps a field of `Box` to the time in steps beyond it (a step beyond two counts for both).
    """

    __slots__ = (
        "apart_s", "before_d", "before_s", "costs", "d", "decode_s", "done", "extended", "first_s", "gaps", "next_d", "next_s",
        "noise_at", "noted_s", "opening", "outside_s", "prefill_s", "prompt_tokens", "role", "s", "sequence_s", "steps", "tokens",
        "version", "wake_s", "weight",
    )  # fmt: skip

    def __init__(self, pool: Pool, tokens: Tokens, noise_at: int) -> None:
        super().__init__(pool)
        self.costs, self.role, self.tokens = pool.engine.costs, pool.role, tokens
        self.noise_at, self.version = noise_at, 0
        self.prefill_s = self.decode_s = self.sequence_s = 0.0
        self.prompt_tokens = 0
        self.done: list[tuple[float, float, float, float, float]] = []
        self.noted_s, self.apart_s = 0.0, APART_S
        self.outside_s: dict[str, float] = {}
        self.s = self.d = self.wake_s = 0.0
        self.weight = 0  # sequences that got a token in the last step and in the one before it
        # First tokens of the last step that others follow: handed out at the boundary k + lag - 1.
        self.opening: list[int] = []
        # The planned decode steps: how many, s and d after them, s after the first, their gaps. If `extended`, the step in which those
        # that end are missing begins at `before_s`.
        self.steps, self.extended = 0, False
        self.next_s = self.next_d = self.first_s = self.before_s = self.before_d = 0.0
        self.gaps: list[float] = []

    def step_s(self) -> float:
        """A decode step's time now."""
        n, pool = len(self.running), self.pool
        one = n or 1
        return max(pool.host_s[one], pool.gpu_s[one] + pool.per_context_s * (self.base + n * self.k))

    def add(self, request: int, now_s: float) -> bool:
        """A request arrives; is `wake_s` another one now?"""
        self.waiting.append(request)
        if self.blocked or len(self.waiting) > 1:
            return False  # the next wake is the one that may schedule it
        if not (self.running or self.handouts or self.opening or self.partial):
            if now_s > self.s:
                self.s = now_s
            self.wake_s = self.s
            return True
        if not self.steps or (self.extended and self.before_s < now_s):
            return False
        if self.s >= now_s:
            self.steps, self.extended, self.wake_s = 0, False, self.s
            return True
        before_s = self.wake_s
        self._plan(self.steps - self.extended, now_s, extend=False)
        return self.wake_s != before_s

    def wake(self) -> list[int]:
        """Come to `wake_s`, hand out tokens, schedule what waits, and set the next `wake_s`; the requests that end here now."""
        lag = self.lag
        if lag == 1 and self.opening:
            self._open(self.s)
        ended = self._advance() if self.steps else []
        if self.s - self.noted_s >= self.apart_s:
            self.note()
        k, handouts, running, pool = self.k, self.handouts, self.running, self.pool
        while running and running[0][0] == k:
            sequence = running.pop(0)
            self.base -= sequence[3]
            self.ending[sequence[2]] = sequence
            handouts.append((k - 1 + lag, sequence[2], LAST))
        while handouts and handouts[0][0] <= k:
            _, request, token = handouts.pop(0)
            if token == ONLY and self.role != "prefill":
                self.tokens.opens(request, self.s)
            self.tokens.last_s[request] = self.s
            if token != PAUSES:
                ended.append(request)
                self.ending.pop(request, None)
        if ended:
            self.blocked = False
            for request in ended:
                self.reserved -= pool.most_blocks[request]
                if self.cache is not None:
                    self._release(request, pool.sizes[request] + pool.outputs[request] - 1)
        if self.reserved > pool.blocks and self._free(1) < 0:
            self._preempt()
        elif self.partial or (self.waiting and not self.blocked):
            self._schedule()
        tight = self.reserved > pool.blocks
        waits = self.partial or (self.waiting and not self.blocked)
        if (waits and self.k > k) or (handouts and handouts[0][0] == self.k):
            self.steps, self.wake_s = 0, self.s
        elif running or handouts or self.opening:
            limit = 1 if waits else 1 << 60
            extend = False
            if handouts and handouts[0][0] - self.k < limit:
                limit = handouts[0][0] - self.k
            if running:
                if running[0][0] - self.k <= limit:
                    limit = running[0][0] - self.k
                    extend = lag == 2 and not (tight or waits or handouts)
                if tight:
                    limit = self._steps_that_fit(limit)
            elif not handouts:
                limit = 1
            self._plan(limit, math.inf, extend=extend)
        else:
            self.steps, self.wake_s = 0, math.inf
        return ended

    def note(self) -> None:
        """Keep what was done until now in `done`."""
        self.noted_s = at_s = self.d if self.d > self.s else self.s
        self.done.append((at_s, self.decode_s, self.sequence_s, self.prefill_s, self.prompt_tokens))
        if len(self.done) > MOST_NOTES:
            del self.done[1::2]
            self.apart_s *= 2

    def _plan(self, limit: int, until_s: float, *, extend: bool) -> None:
        """Plan decode steps from here until `until_s`, at most `limit`; `extend`: and the step without the sequences that end with
        these. The context's growth is in the gaps' mean only."""
        s, d, n, weight, pool = self.s, self.d, len(self.running), self.weight, self.pool
        gaps = self.gaps
        gaps.clear()
        if not n and not weight:  # nothing but last tokens to wait for
            self.steps, self.extended = limit, False
            self.next_s = self.first_s = self.wake_s = d if d > s else s
            self.next_d = d
            return
        steps, first_s, per_context_s = 0, s, pool.per_context_s
        host, growth = pool.host_s[n], per_context_s * n
        gpu = pool.gpu_s[n] + per_context_s * (self.base + n * self.k)
        if self.lag == 1:
            while steps < limit and s < until_s:
                count = limit - steps
                if gpu >= host:
                    count = _rows(count, gpu, growth, until_s - s)
                    took = count * gpu + growth * count * (count - 1) / 2
                else:
                    if growth:
                        count = min(count, int((host - gpu) / growth) + 1)
                    count = _rows(count, host, 0.0, until_s - s)
                    took = count * host
                gaps += (took / count, count * n)
                s += took
                d = s
                gpu += growth * count
                steps += count
        while steps < limit and s < until_s:
            count = limit - steps
            if n and gpu <= host and d <= s:  # the host sets the pace
                if not steps:
                    first_s = s + host
                if growth:
                    count = min(count, int((host - gpu) / growth) + 1)
                count = _rows(count, host, 0.0, until_s - s)
                gaps += (host, weight + (count - 1) * n)
                s += count * host
                d = s
            elif n and gpu >= host and d >= s + host:  # the GPU does
                if not steps:
                    first_s = d
                gaps += (d - s, weight)
                count = 1 + _rows(count - 1, gpu, growth, until_s - d)
                s = d
                if count > 1:
                    took = (count - 1) * gpu + growth * (count - 1) * (count - 2) / 2
                    gaps += (took / (count - 1), (count - 1) * n)
                    s += took
                d = s + gpu + growth * (count - 1)
            else:
                count = 1
                launched = s + host
                after = launched if launched > d else d
                gaps += (after - s, weight)
                done = d + gpu if d > s else s + gpu
                s, d = after, (done if done > launched else launched)
                if not steps:
                    first_s = after
            gpu += growth * count
            steps += count
            weight = n
        if extend:
            self.before_s, self.before_d = s, d
            host = gpu = 0.0
            end, rest, base = self.k + limit, n, self.base
            for sequence in self.running:
                if sequence[0] > end:
                    host = pool.host_s[rest]
                    gpu = pool.gpu_s[rest] + per_context_s * (base + rest * end)
                    break
                rest -= 1
                base -= sequence[3]
            launched = s + host
            after = launched if launched > d else d
            done = d + gpu if d > s else s + gpu
            gaps += (after - s, n if limit else weight)
            if not limit:
                first_s = after
            s, d = after, (done if done > launched else launched)
            steps += 1
        self.steps, self.extended, self.first_s = steps, extend, first_s
        self.next_s = self.wake_s = s
        self.next_d = d

    def _advance(self) -> list[int]:
        """Do the planned steps; the requests that end with them."""
        running, steps, tokens, next_s, next_d = self.running, self.steps, self.tokens, self.next_s, self.next_d
        n = len(running)
        tokens.gaps += self.gaps
        if self.opening and self.lag == 2:
            self._open(self.first_s)
        if n:
            took = next_d - (self.d if self.d > self.s else self.s)
            self.decode_s += took
            self.sequence_s += n * took
            pool, context = self.pool, self.base + n * self.k
            if n > pool.box.sequences or context + n * steps > pool.box.context_tokens:
                self._note_box(took, n, 0, context, n * steps)
        self.weight = n
        self.k += steps
        self.s, self.d, self.steps = next_s, next_d, 0
        if not self.extended:
            return []
        self.extended = False
        ended = []
        k = running[0][0]
        while running and running[0][0] == k:
            _, _, request, base = running.pop(0)
            self.base -= base
            ended.append(request)
            tokens.last_s[request] = next_s
        self.weight = len(running)
        self.sequence_s -= len(ended) * (next_d - self.before_d)  # not in the last step
        return ended

    def _open(self, at_s: float) -> None:
        for request in self.opening:
            self.tokens.opens(request, at_s)
        self.opening = []

    def _schedule(self) -> None:
        """One step with as many prompt tokens and joining sequences as there is room for; no step if there is room for none."""
        k, running, pool, costs, waiting = self.k, self.running, self.pool, self.costs, self.waiting
        n, opening = len(running), list[int]()
        room = pool.budget - n
        prompt_tokens = prompts = joining = longest = 0
        context = self.base + n * k
        while room > 0 and (self.partial or waiting):
            if self.partial:
                request, computed, size = self.partial
                needed = self._blocks(min(size, computed + room)) - self._blocks(computed)
                if self.reserved > pool.blocks and needed > self._free(1):
                    self._put_back(request, computed)
                    break
                self.partial = None
                count = size - computed
            else:
                request = waiting[0]
                again = self.resumed.get(request) if self.resumed else None
                size = pool.sizes[request] + (again or 0)
                if len(running) + len(self.ending) >= pool.most:
                    self.blocked = True
                    break
                reserved = self.reserved + pool.most_blocks[request]
                needed = self._blocks(size)
                if self.cache is not None and reserved + self.cache.unheld_blocks > pool.blocks:
                    self.cache.shrink(self._free(1))
                    needed -= self.cache.held_by_others(request)
                if reserved > pool.blocks and needed > self._free(1):
                    self.blocked = True
                    break
                self.reserved = reserved
                waiting.pop(0)
                if again is None:
                    pool.scheduled_s[request] = self.s
                    computed = pool.cached[request] = self._find(request)
                else:
                    computed = 0 if self.cache is None else self._find(request)
                count = size - computed
                if pool.joins and again is None:
                    joining += 1
                    context += size
                    count = 0
                    room -= 1
            if count:
                prompts += 1
                if count > room:
                    prompt_tokens += room
                    longest = max(longest, room)
                    self.partial = request, computed + room, size
                    break
                prompt_tokens += count
                longest = max(longest, count)
                room -= count
            self.order += 1
            end = k + pool.outputs[request]
            if self.resumed:
                end -= self.resumed.get(request, 0)
            sequence = (end, self.order, request, size - k)
            if end == k + 1:
                self.ending[request] = sequence
                self.handouts.append((k + self.lag, request, ONLY))
                continue
            opening.append(request)
            insort(running, sequence)
            self.base += size - k
        if not prompt_tokens and not joining:
            return
        host, gpu = pool.host_s[n + joining], pool.gpu_s[n + joining] + costs.gpu_per_context_token_s * context
        if prompt_tokens:
            noise = pool.noise[self.noise_at % len(pool.noise)]
            gpu_noise = pool.gpu_noise[self.noise_at % len(pool.gpu_noise)]
            self.noise_at += 1
            launch = costs.host_prefill_s if prompt_tokens + n <= pool.captured else costs.beyond_graphs_s
            if not n + joining or longest <= SHORT_PROMPT:
                launch *= costs.alike_launch
            host = launch * noise + costs.host_per_prompt_token_s * prompt_tokens
            gpu += (costs.gpu_prefill_s + costs.gpu_per_prompt_token_s * prompt_tokens) * gpu_noise
        s, d = self.s, self.d
        ready = s + costs.before_gpu_s if prompt_tokens else s
        begins, launched = (d if d > ready else ready), s + host
        done = begins + gpu if begins + gpu > launched else launched
        took = done - (d if d > s else s)  # before the GPU begins the instance works on the step, too
        after, weight = (done, n) if self.lag == 1 else (launched if launched > d else d, self.weight)
        after += costs.join_s * joining
        if weight:
            self.tokens.gaps += (after - s, weight)
        if self.opening:
            self._open(after)
        self.opening = opening
        self.s, self.d, self.weight, self.k = after, done, n, k + 1
        if prompt_tokens:
            self.prompt_tokens += prompt_tokens
            self.prefill_s += took
        else:
            self.decode_s += took
        sequences = n + joining + prompts
        box = pool.box
        if prompt_tokens > box.prompt_tokens or sequences > box.sequences or context > box.context_tokens:
            self._note_box(took, sequences, prompt_tokens, context, 0)
        self.sequence_s += sequences * took

    def _note_box(self, took_s: float, sequences: int, prompt_tokens: int, context: int, growth: int) -> None:
        """Time in steps beyond the calibrated box; the context grew from `context` by `growth`."""
        box, outside = self.pool.box, self.outside_s
        over = context + growth - box.context_tokens
        shares = {
            "prompt_tokens": float(prompt_tokens > box.prompt_tokens),
            "sequences": float(sequences > box.sequences),
            "context_tokens": (min(1.0, over / growth) if growth else 1.0) if over > 0 else 0.0,
        }
        for name, share in shares.items():
            if share:
                outside[name] = outside.get(name, 0.0) + share * took_s


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
