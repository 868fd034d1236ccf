"""Who is in an engine: sequences that decode, prompts under way and waiting, KV blocks, and who loses them when they run out."""

import math
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter

import msgspec
import numpy as np

from pdbench.analysis.arrivals import BoolArray
from pdbench.plan.engine import Engine, Role
from pdbench.plan.prefixes import PrefixCache

Sequence = tuple[int, int, int, int]
"""(end, order of admission, request, base): its last token is computed in step end - 1, its context in step k is base + k tokens."""

NEAR_BUDGET = 0.95
"""Steps with prompts that reached so much of the token budget show what a full one takes."""
LAST, ONLY, PAUSES = range(3)
"""A token that is handed out: a request's last one, its first and last one here, its last one before a preemption."""


@dataclass
class Tokens:
    """What the client got, of all requests and instances: instants of first and latest tokens (NaN: none yet), and `gaps`, an interval and
    how many gaps had it by turns."""

    first_s: list[float]
    last_s: list[float]
    gaps: list[float] = field(default_factory=list)
    counted: dict[int, int] = field(default_factory=dict)

    def opens(self, request: int, at_s: float) -> None:
        """An instance's first token of a request: the client's first, or one after a handoff or a preemption."""
        if self.first_s[request] != self.first_s[request]:
            self.first_s[request] = at_s
        else:
            self.gaps += (at_s - self.last_s[request], 1)

    def count(self) -> dict[int, int]:
        """All gaps so far by microseconds; the list is emptied."""
        pairs = np.fromiter(self.gaps, float, len(self.gaps)).reshape(-1, 2)
        values, places = np.unique(np.rint(1e6 * pairs[:, 0]).astype(np.int64), return_inverse=True)
        for value, count in zip(values.tolist(), np.bincount(places, pairs[:, 1]).tolist(), strict=True):
            if count:
                self.counted[value] = self.counted.get(value, 0) + round(count)
        self.gaps.clear()
        return self.counted


class Pool:
    """What all instances of a role share: the engine with its decode steps' costs by number of sequences, and the requests as the role
    gets them: tokens of each prompt, how many need no computing, tokens to generate. A decode instance gets all but the last token of a
    prompt computed."""

    def __init__(self, engine: Engine, role: Role, sizes: list[int], cached: list[int], outputs: list[int]) -> None:
        costs, limits = engine.costs, engine.limits
        self.engine, self.box, self.role = engine, engine.box, role
        if engine.box.prompt_tokens > NEAR_BUDGET * engine.limits.max_num_batched_tokens:  # no step can hold many more
            self.box = msgspec.structs.replace(engine.box, prompt_tokens=engine.limits.max_num_batched_tokens)
        self.sizes, self.cached, self.outputs = sizes, cached, outputs
        self.most = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        replayed = limits.captured or self.most
        self.host_s = [costs.host_decode_s if n <= replayed else costs.beyond_graphs_s for n in range(self.most + 1)]
        self.host_s[0] = 0.0  # an empty step, while the last tokens are awaited
        self.gpu_s = costs.gpu_step_s(np.arange(self.most + 1)).tolist()
        self.noise = list(chain.from_iterable(costs.noise)) or [1.0]
        self.gpu_noise = list(chain.from_iterable(costs.gpu_noise)) or self.noise
        self.budget, self.block, self.captured = limits.max_num_batched_tokens, limits.block_size, limits.captured
        self.joins, self.per_context_s = role == "decode", costs.gpu_per_context_token_s
        self.scheduled_s = [math.nan] * len(sizes)  # when each request's first step here was scheduled
        self.blocks: float = math.inf
        self.most_blocks = [0] * len(sizes)  # of each request at its end
        if limits.kv_cache_tokens is not None:
            self.blocks = limits.kv_cache_tokens // limits.block_size
            self.most_blocks = (-(-(np.array(sizes) + np.array(outputs) - 1) // limits.block_size)).tolist()

    @property
    def fits(self) -> BoolArray:
        """Which requests the KV cache can hold at all."""
        return np.array(self.most_blocks) <= self.blocks


class Batch:
    """An engine's sequences before step `k`. Its subclass has their time."""

    __slots__ = (
        "base", "blocked", "cache", "ending", "handouts", "k", "lag", "order", "partial", "pool",
        "preemptions", "reserved", "resumed", "running", "waiting",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.lag = pool.engine.limits.lag  # boundaries until a step's tokens are handed out
        self.k = self.order = 0
        self.running: list[Sequence] = []  # those that decode, in order
        self.base = 0  # the sum of their bases
        self.ending: dict[int, Sequence] = {}  # by request: all is computed, the last token not yet handed out
        # A prompt that is computed in part: request, tokens computed, of how many.
        self.partial: tuple[int, int, int] | None = None
        self.waiting: list[int] = []
        self.blocked = False  # the first that waits needs a slot or KV blocks of one that ends
        self.resumed: dict[int, int] = {}  # preempted request -> tokens generated before
        self.reserved = 0  # KV blocks of all that is here, if nothing is preempted
        self.preemptions = 0
        self.cache: PrefixCache | None = None  # where requests share parts of their prompts
        # Tokens to hand out, first tokens aside that others follow: boundary, request, what the token is.
        self.handouts: list[tuple[int, int, int]] = []

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.block)

    def _free(self, steps: int) -> float:
        """KV blocks that are free once every decoding sequence has computed `steps` tokens more."""
        before = self.k - 1 + steps
        held = [base + before for _, _, _, base in self.running]
        held += [base + end - 1 for end, _, _, base in self.ending.values()]
        if self.partial:
            held.append(self.partial[1])
        free = self.pool.blocks - sum(map(self._blocks, held))
        return free if self.cache is None else free + self.cache.saved_blocks

    def _steps_that_fit(self, limit: int) -> int:
        """How many of `limit` decode steps the KV cache has blocks for."""
        if self._free(limit) >= 0:
            return limit
        fits, too_many = 0, limit
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self._free(middle) >= 0 else (fits, middle)
        return fits

    def _put_back(self, request: int, tokens: int) -> int:
        """A sequence that lost the blocks of its `tokens` is the first that waits, and computes all its own tokens again; how many blocks are free now."""
        self.partial = None
        self.waiting.insert(0, request)
        self.reserved -= self.pool.most_blocks[request]
        self.preemptions += 1
        return self._release(request, tokens)

    def _release(self, request: int, tokens: int) -> int:
        """A sequence of so many computed tokens leaves the KV cache; how many blocks nobody holds any more."""
        if self.cache is None:
            return self._blocks(tokens)
        before = self.cache.saved_blocks
        self.cache.release(request, tokens // self.pool.block)
        return self._blocks(tokens) + self.cache.saved_blocks - before

    def _find(self, request: int) -> int:
        """Prompt tokens of a request that begins here which need no computing, whole KV blocks of them."""
        pool, cache = self.pool, self.cache
        if cache is None:
            return pool.cached[request]
        hits = cache.take(request) * pool.block
        return min(hits, (pool.sizes[request] - 1) // pool.block * pool.block)

    def _preempt(self) -> None:
        """The next step needs more blocks than there are: the sequences that came last lose theirs, as long as an earlier one needs one."""
        k = self.k
        queue = sorted([*self.ending.values(), *self.running], key=itemgetter(1))
        free = self._free(0)
        while queue:
            _, _, request, base = queue[0]
            needed = request not in self.ending and self._blocks(base + k) > self._blocks(base + k - 1)
            while needed and free <= 0 and queue:
                if self.partial:
                    free += self._put_back(*self.partial[:2])
                    continue
                victim = queue.pop()
                end, _, request, base = victim
                tokens = base + min(k, end) - 1
                if self.ending.pop(request, None):  # nothing is computed again, but vLLM counts it
                    free += self._release(request, tokens)
                    self.preemptions += 1
                    continue
                self.running.remove(victim)
                self.base -= base
                self.resumed[request] = base + k - self.pool.sizes[request]
                self.handouts.append((k - 1 + self.lag, request, PAUSES))
                free += self._put_back(request, tokens)
            if queue:
                queue.pop(0)
                free -= needed
