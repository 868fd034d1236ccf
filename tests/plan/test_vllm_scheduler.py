"""vLLM's own scheduler class, driven in simulated time: its steps are those of the simulator."""

import functools
import random
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from pdbench.plan.engine import Demand, Engine
from pdbench.plan.simulate import simulate
from pdbench.serving.models import tiny_model
from tests.plan.step_by_step import Sequence, SlowEngine, step_by_step
from tests.plan.test_prefixes import sharing
from tests.plan.test_simulate import demand, engine, of_kind

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]  # importing vLLM takes minutes on a busy machine


@functools.cache
def model_config() -> Any:
    from vllm.config import ModelConfig

    return ModelConfig(model=str(tiny_model()), max_model_len=4096, skip_tokenizer_init=True)


def scheduler_of(engine: Engine, *, caches: bool) -> Any:
    """vLLM's scheduler with an engine's limits, of a model that is never loaded."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    limits = engine.limits
    config = VllmConfig(
        model_config=model_config(),
        cache_config=CacheConfig(block_size=limits.block_size, enable_prefix_caching=caches),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=limits.max_num_batched_tokens, max_num_seqs=limits.max_num_seqs, max_model_len=4096,
            enable_chunked_prefill=True, async_scheduling=limits.async_scheduling, is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
    )  # fmt: skip
    # vLLM for CPU would compute whole prompts of this model.
    config.scheduler_config.enable_chunked_prefill = True
    config.scheduler_config.max_num_batched_tokens = limits.max_num_batched_tokens
    config.scheduler_config.max_num_scheduled_tokens = limits.max_num_batched_tokens
    spec = FullAttentionSpec(block_size=limits.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    # One block is vLLM's null block, which holds nothing.
    blocks = 1 + (limits.kv_cache_tokens or 10_000_000) // limits.block_size
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = blocks
    kind = AsyncScheduler if limits.async_scheduling else Scheduler
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=limits.block_size,
    )


class VllmEngine(SlowEngine):
    """An engine whose steps vLLM's scheduler composes; what a step costs stays that of `SlowEngine`. With `prompts`, token ids of each request, it has
    a prefix cache."""

    def __init__(self, engine: Engine, prompts: list[list[int]] | None = None) -> None:
        super().__init__(engine, "single")
        self.scheduler = scheduler_of(engine, caches=prompts is not None)
        self.prompts, self.cached = prompts, dict[int, int]()
        self.outputs: list[Any] = []
        self.known: dict[str, Sequence] = {}

    def add(self, sequence: Sequence, now_s: float) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        name = str(sequence.request.number)
        parameters = SamplingParams(max_tokens=sequence.output, ignore_eos=True)
        self.known[name] = sequence
        prompt, hasher = [1] * sequence.size, None
        if self.prompts is not None:
            init_none_hash(sha256)
            prompt = self.prompts[sequence.request.number]
            hasher = get_request_block_hasher(self.limits.block_size, sha256)
        self.scheduler.add_request(Request(name, prompt, parameters, None, block_hasher=hasher))
        if self.asleep:
            self.s, self.asleep = max(self.s, now_s), False

    def boundary(self) -> list[Sequence]:
        from vllm.v1.outputs import ModelRunnerOutput

        got = []
        if len(self.in_flight) == self.limits.lag:
            got, output = self.in_flight.pop(0), self.outputs.pop(0)
            names = list(output.num_scheduled_tokens)
            getting = {str(sequence.request.number) for sequence in got}
            sampled = [[1] if name in getting else [] for name in names]
            places = {name: place for place, name in enumerate(names)}
            self.scheduler.update_from_output(output, ModelRunnerOutput(names, places, sampled))
        if not self.scheduler.has_requests() and not any(self.in_flight):
            self.in_flight, self.outputs, self.asleep = [], [], True
            return got
        before = {
            name: (request.num_preemptions, request.num_computed_tokens)
            for name, request in self.scheduler.requests.items()
        }
        output = self.scheduler.schedule()
        self.cached |= {int(new.req_id): new.num_computed_tokens for new in output.scheduled_new_reqs}
        self.running = []
        scheduled = dict[int, int]()
        for name, count in output.num_scheduled_tokens.items():
            sequence = self.known[name]
            request = self.scheduler.requests[name]
            sequence.computed = request.num_computed_tokens
            scheduled[sequence.request.number] = count
            self.running.append(sequence)
        for name, (preemptions, _) in before.items():
            request = self.scheduler.requests[name]
            if request.num_preemptions > preemptions:
                sequence = self.known[name]
                sequence.recompute = sequence.size + sequence.tokens
                self.preemptions += 1
        self.run(scheduled)
        self.outputs.append(output)
        return got


def both(own: Engine, load: Demand, monkeypatch: pytest.MonkeyPatch) -> tuple[VllmEngine, SlowEngine]:
    """vLLM's steps and ours under the same arrivals; the simulator's times are compared with vLLM's here."""
    deployment = of_kind("single", own)
    _, (slow,) = step_by_step(deployment, load, 5, monkeypatch)
    driven = VllmEngine(own)
    with monkeypatch.context() as patch:
        patch.setattr("tests.plan.step_by_step.SlowEngine", lambda engine, role: driven)
        tokens, _ = step_by_step(deployment, load, 5, patch)
    simulated = simulate(deployment, load, 5)
    np.testing.assert_allclose(simulated.ttft_s, [token_s[0] for token_s in tokens] - load.t_s, rtol=0, atol=1e-7)
    np.testing.assert_allclose(simulated.e2e_s, [token_s[-1] for token_s in tokens] - load.t_s, rtol=0, atol=1e-7)
    return driven, slow


def loaded(**lengths: int) -> Demand:
    """Nothing is cached: the class would need texts."""
    load = demand(60, 12.0, **lengths)
    return Demand(**(vars(load) | {"cached_tokens": np.zeros(len(load), np.int64)}))


@pytest.mark.parametrize(
    ("limits", "host_bound"),
    [
        ({}, True),
        ({}, False),
        ({"async_scheduling": False}, True),
        ({"max_num_seqs": 5}, True),
        ({"max_num_batched_tokens": 256}, True),
        ({"kv_cache_tokens": 3200}, True),
    ],
    ids=str,
)
def test_every_step_holds_what_vllm_puts_into_it(
    limits: dict[str, int], host_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, slow = both(engine(host_bound=host_bound, **limits), loaded(prompt=400), monkeypatch)
    assert [scheduled for _, scheduled in driven.steps if scheduled] == [scheduled for _, scheduled in slow.steps]
    np.testing.assert_allclose(
        [at_s for at_s, scheduled in driven.steps if scheduled], [at_s for at_s, _ in slow.steps], atol=1e-7
    )
    assert driven.preemptions == slow.preemptions
    assert (driven.preemptions > 0) == ("kv_cache_tokens" in limits)


def token_ids(load: Demand) -> list[list[int]]:
    """Prompts of which equal blocks have equal tokens."""
    generator = random.Random(9)
    texts: dict[Hashable, list[int]] = {}

    def words(count: int) -> list[int]:
        return [generator.randrange(1000, 30000) for _ in range(count)]

    assert load.blocks is not None and load.block_tokens is not None
    found = []
    for tokens, blocks, each in zip(load.prompt_tokens.tolist(), load.blocks, load.block_tokens.tolist(), strict=True):
        ids = [id_ for block in blocks for id_ in texts.setdefault(block, words(2000))[:each]][:tokens]
        found.append(ids + words(tokens - len(ids)))
    return found


@pytest.mark.parametrize("kv_cache_tokens", [4000, 8000, 16000, None])
@pytest.mark.parametrize("kind", ["prefixes", "lengths", "sessions"])
def test_prompts_find_cached_what_vllm_would_have(
    kind: str, kv_cache_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, load = engine(host_bound=False, kv_cache_tokens=kv_cache_tokens), sharing(kind, 200, 5.0)
    driven, deployment = VllmEngine(own, token_ids(load)), of_kind("single", own)
    with monkeypatch.context() as patch:
        patch.setattr("tests.plan.step_by_step.SlowEngine", lambda engine, role: driven)
        tokens, _ = step_by_step(deployment, load, 5, patch)
    simulated = simulate(deployment, load, 5)
    cached = np.array([driven.cached[number] for number in range(len(load))])
    off = np.abs(cached - simulated.cached_tokens)
    assert off.sum() <= (0.03 if kind == "lengths" else 0.005) * cached.sum()
    ttft_s = np.array([token_s[0] for token_s in tokens]) - load.t_s
    assert np.median(simulated.ttft_s) == pytest.approx(np.median(ttft_s), rel=0.01)
    if kv_cache_tokens is None:
        np.testing.assert_allclose(simulated.ttft_s, ttft_s, rtol=0, atol=1e-7)
