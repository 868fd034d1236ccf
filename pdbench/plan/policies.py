"""Which instance of a role the proxy chooses, by each of its policies (`proxy.instances.choose`)."""

import random
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from pdbench.config import Policy
from pdbench.plan.engine import Demand

BEGIN_TOKENS = 256
"""About so many tokens are the 1,024 bytes by which the proxy tells whether prompts begin alike."""
_BITS = 40


class Balance(Protocol):
    """Among the instances of one role, by their numbers."""

    def choose(self, begin: Hashable) -> int:
        """For a prompt with such a beginning."""

    def count(self, index: int, requests: int, tokens: int) -> None:
        """Add to an instance's requests and prompt tokens in flight."""


def balance(policy: Policy, count: int, generator: random.Random, *, by_tokens: bool) -> Balance:
    """`by_tokens`: the least work is that of fewest prompt tokens, else of fewest requests; equal ones in turn."""
    if policy == "least-work":
        return LeastWork(count, generator, by_tokens=by_tokens)
    return InTurn(count, generator) if policy == "round-robin" else Affinity(count, generator)


def beginnings(demand: Demand) -> Sequence[Hashable]:
    """What tells the prompts' beginnings apart: the shared blocks that they consist of, else each is of its own."""
    own = range(len(demand))
    if demand.blocks is None or demand.block_tokens is None:
        return own
    begins: list[Hashable] = []
    for number, blocks, tokens in zip(own, demand.blocks, demand.block_tokens.tolist(), strict=True):
        needed = -(-BEGIN_TOKENS // max(tokens, 1))
        begins.append(tuple(blocks[:needed]) if len(blocks) >= needed else number)
    return begins


class InTurn:
    def __init__(self, count: int, generator: random.Random) -> None:
        self.instances, self.turn = count, generator.randrange(count)

    def choose(self, begin: Hashable) -> int:
        self.turn += 1
        return (self.turn - 1) % self.instances

    def count(self, index: int, requests: int, tokens: int) -> None:
        pass


class Affinity:
    """Each beginning has an order of the instances, drawn as it is needed: the first that has at most twice the mean of requests (and one over)."""

    def __init__(self, count: int, generator: random.Random) -> None:
        self.requests, self.seed, self.total = [0] * count, generator.random(), 0

    def choose(self, begin: Hashable) -> int:
        limit = 2 * self.total / len(self.requests) + 1
        order = random.Random(f"{self.seed} {begin}")
        while self.requests[index := order.randrange(len(self.requests))] > limit:
            pass
        return index

    def count(self, index: int, requests: int, tokens: int) -> None:
        self.requests[index] += requests
        self.total += requests


class LeastWork:
    """In time that does not grow with the number of instances."""

    def __init__(self, count: int, generator: random.Random, *, by_tokens: bool) -> None:
        self.instances, self.turn, self.by_tokens = count, generator.randrange(count), by_tokens
        self.bits = [1 << index for index in range(count)]
        self.loads = [0] * count  # what counts first in the upper bits, so that loads compare as numbers
        self.holders = {0: (1 << count) - 1}  # load -> the instances that have it, as bits
        self.rising = [0]  # a heap of these loads, and of some that no instance has; tidied when longer than `room`
        self.room = 4 * count + 1000

    def choose(self, begin: Hashable) -> int:
        if self.instances == 1:
            return 0
        turn = self.turn % self.instances
        self.turn += 1
        while self.rising[0] not in self.holders:
            heappop(self.rising)
        least = self.holders[self.rising[0]]
        from_turn = least >> turn << turn or least
        return (from_turn & -from_turn).bit_length() - 1

    def count(self, index: int, requests: int, tokens: int) -> None:
        """Add to an instance's requests and prompt tokens in flight."""
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
