"""What instances' prefix caches have of prompts that begin alike; tests/plan/test_vllm_scheduler.py has vLLM's own beside it."""

import random
from collections.abc import Hashable

import numpy as np
import pytest

from pdbench.config import LoadConfig
from pdbench.plan.demand import demand_of_load
from pdbench.plan.engine import Demand
from pdbench.plan.prefixes import PrefixCache
from pdbench.plan.simulate import simulate
from tests.plan.test_simulate import engine, of_kind


def sharing(kind: str, count: int, rate: float) -> Demand:
    """Requests with one of 12 prefixes, of one length or of different ones; or sessions that go on and begin with one of three prefixes."""
    generator, choices = np.random.default_rng(1), random.Random(1)
    blocks: list[tuple[Hashable, ...]] = [(int(group),) for group in generator.integers(0, 12, count)]
    prompts, block_tokens = np.full(count, 600), np.full(count, 400)
    if kind == "lengths":
        prompts = np.maximum(30, generator.lognormal(np.log(500), 0.5, count)).astype(int)
        block_tokens = np.rint(0.7 * prompts).astype(int)
    if kind == "sessions":
        sessions: dict[int, tuple[Hashable, ...]] = {}
        for turn in range(count):
            session = choices.randrange(25)
            before = sessions.get(session) or tuple((session % 3, place) for place in range(4))
            added = tuple((session, turn, place) for place in range(choices.randrange(1, 4)))
            sessions[session] = blocks[turn] = (before if len(before) < 16 else before[:6]) + added
        prompts = np.array([64 * len(each) - choices.randrange(64) for each in blocks])
        block_tokens = np.full(count, 64)
    return Demand(
        t_s=np.cumsum(generator.exponential(1 / rate, count)),
        prompt_tokens=prompts,
        output_tokens=np.maximum(1, generator.lognormal(np.log(60), 0.8, count)).astype(int),
        cached_tokens=np.zeros(count, int),
        blocks=blocks,
        block_tokens=block_tokens,
    )


def contexts(count: int, times: int, tokens: int) -> Demand:
    """Contexts that come one after the other, again and again."""
    total = count * times
    return Demand(
        t_s=np.arange(total) * 1.0,
        prompt_tokens=np.full(total, tokens + 100),
        output_tokens=np.full(total, 8),
        cached_tokens=np.zeros(total, int),
        blocks=[(place % count,) for place in range(total)],
        block_tokens=np.full(total, tokens),
    )


@pytest.mark.parametrize("kind", ["single", "replicas", "3p2d"])
def test_contexts_that_do_not_fit_into_the_cache_are_computed_again(kind: str) -> None:
    """300 contexts of 6,912 tokens are twice as many tokens as the cache has: when one comes again, it is evicted."""
    own = engine(max_num_batched_tokens=8192, kv_cache_tokens=1_060_944)
    few, many = (simulate(of_kind("single", own), contexts(count, 2, 6912)) for count in (140, 300))
    assert few.cached_tokens.tolist() == [0] * 140 + [6912] * 140
    assert not many.cached_tokens.any()
    unlimited = simulate(of_kind("single", engine(max_num_batched_tokens=8192)), contexts(300, 2, 6912))
    assert unlimited.cached_tokens.sum() == 300 * 6912
    # Three instances have room for all, if each gets its own.
    split = simulate(of_kind(kind, own), contexts(300, 2, 6912))
    assert (split.cached_tokens.sum() == 300 * 6912) == (kind != "single")


def test_what_one_request_alone_has_pushes_shared_blocks_out() -> None:
    """In between come prompts that share nothing, and take all of the cache."""
    load = contexts(1, 30, 640)
    alone = np.arange(30) % 2 == 1
    blocks = [() if own else (0,) for own in alone]
    mixed = Demand(**(vars(load) | {"blocks": blocks, "prompt_tokens": np.where(alone, 1513, 740)}))
    small, large = (
        simulate(of_kind("single", engine(kv_cache_tokens=tokens)), mixed).cached_tokens for tokens in (1520, 16_000)
    )
    assert not small.any()
    assert large.sum() == 14 * 640


def test_requests_at_a_time_hold_their_common_prefix_once() -> None:
    """30 requests with 4,800 of 4,900 tokens in common have 8,000 in the cache together, not 150,000."""
    load = contexts(1, 30, 4800)
    together = Demand(**(vars(load) | {"t_s": np.arange(30) * 1e-3, "output_tokens": np.full(30, 100)}))
    simulated = simulate(of_kind("single", engine(max_num_batched_tokens=8192, kv_cache_tokens=12_000)), together)
    assert simulated.instances[0].preemptions == 0
    assert max(simulated.ttft_s) < 2.0
    assert simulated.cached_tokens.sum() == 29 * 4800


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    cache = PrefixCache([("a", "b"), ("a", "b"), ("a", "c")], [64] * 3, [128] * 3, block=16)
    assert cache.take(0) == 0
    cache.release(0, 8)
    cache.shrink(6)
    assert cache.take(1) == 6
    cache.release(1, 8)
    cache.shrink(3)
    assert cache.take(2) == 3


def test_equal_blocks_after_another_beginning_are_others() -> None:
    cache = PrefixCache([("a", "b"), ("c", "d"), ("a", "d")], [64] * 3, [128] * 3, block=16)
    assert [cache.take(request) for request in range(3)] == [0, 0, 4]


def test_shorter_prefix_that_came_before_is_all_that_is_found() -> None:
    """With lengths that differ prompts of a group share a part as long as the shorter one's."""
    config = LoadConfig(
        rate=5.0, requests=200, input_tokens=1600, input_distribution="lognormal", shared_prefix=0.5, warmup=1
    )
    load = demand_of_load(config, 0)
    assert load.block_tokens is not None
    longest = np.maximum.accumulate(np.concatenate([[load.warm_blocks[0][1]], load.block_tokens]))[:-1]
    assert load.cached_tokens.tolist() == np.minimum(longest, load.block_tokens).tolist()
