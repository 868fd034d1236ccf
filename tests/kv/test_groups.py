"""Several groups of KV cache blocks: which blocks travel, shown with vLLM's own schedulers on both sides.

A prefill and a decode scheduler serve prompts with common beginnings out of few blocks. In place of a model each forward pass writes what
its tokens' KV depends on into a table, and finds there what its attention reads. Transfers copy entries at random times.
"""

import random
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import vllm
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from pdbench.kv import compat
from pdbench.kv.blocks import make_packer
from pdbench.kv.groups import Group, transfer_order
from pdbench.serving.models import tiny_model

LIMIT = 256
hybrid = pytest.mark.skipif(
    tuple(int(part) for part in vllm.__version__.split(".")[:2]) < compat.HYBRID, reason="vLLM makes one group"
)


@pytest.mark.parametrize(
    ("groups", "tokens", "places"),
    [
        ([Group(16)], 33, [(16, 0, 0), (32, 0, 1), (33, 0, 2)]),
        ([Group(16), Group(16, 16)], 48, [(16, 0, 0), (32, 0, 1), (48, 0, 2), (48, 1, 2)]),
        ([Group(16), Group(16, 17)], 48, [(16, 0, 0), (32, 0, 1), (32, 1, 1), (48, 0, 2), (48, 1, 2)]),
        ([Group(32), Group(16, 64)], 40, [(16, 1, 0), (32, 0, 0), (32, 1, 1), (40, 0, 1), (40, 1, 2)]),
        ([Group(16, 4)], 3, [(3, 0, 0)]),
    ],
)
def test_blocks_travel_by_their_ends(groups, tokens, places):
    assert transfer_order(groups, tokens) == places


SIZES = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def full(size=16):
    return FullAttentionSpec(block_size=size, **SIZES)


def window(tokens, size=16):
    return SlidingWindowSpec(block_size=size, sliding_window=tokens, **SIZES)


def config_of(role):
    """vLLM's configuration of an instance with the connector; its scheduler and caches do not depend on the model."""
    transfer = KVTransferConfig(
        kv_connector="PdKvConnector",
        kv_connector_module_path="pdbench.kv.connector",
        kv_role=role,
        kv_load_failure_policy="recompute",
    )
    model = {"model": str(tiny_model()), "max_model_len": LIMIT, "skip_tokenizer_init": True}
    return EngineArgs(**model, kv_transfer_config=transfer).create_engine_config()


def layers_of(config, specs):
    """The caches that vLLM makes of one kind of layer per name, filled with random numbers, and the number of each layer's group."""
    from vllm.v1.kv_cache_interface import create_kv_cache_views  # vLLM before 0.29 has none

    at = (
        "kv_cache_utils" if find_spec("vllm.v1.core.kv_cache_planning") is None else "kv_cache_planning"
    )  # from 0.33 on
    planning = import_module(f"vllm.v1.core.{at}")
    cache = planning.get_kv_cache_config_from_groups(config, planning.get_kv_cache_groups(config, dict(specs)), 1 << 20)
    group_of = {name: number for number, group in enumerate(cache.kv_cache_groups) for name in group.layer_names}
    memory = torch.randn(cache.kv_cache_tensors[0].size // 4).view(torch.int8)
    layout, layers = config.cache_config.get_resolved_kv_cache_layout(), {}
    for tensor in cache.kv_cache_tensors:
        spec = cache.kv_cache_groups[group_of[tensor.layers[0]]].kv_cache_spec
        views = create_kv_cache_views(memory, spec, cache.num_blocks, layout, tensor)
        layers |= dict(zip(tensor.layers, views, strict=True))
    return cache.num_blocks, layers, group_of


@hybrid
@pytest.mark.usefixtures("kv_secret")
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("windows", [1, 4, 5])
def test_block_of_a_group_is_that_of_all_its_layers(windows, layout):
    """Groups share memory: a block is one group's at a time, and all bytes of it travel, whichever group has it."""
    config = config_of("kv_both")
    config.cache_config.kv_cache_layout = layout
    specs = {f"full.{index}": full() for index in range(2)} | {
        f"window.{index}": window(24) for index in range(windows)
    }
    (blocks, here, group_of), (_, there, _) = layers_of(config, specs), layers_of(config, specs)
    assert len(set(group_of.values())) > 1
    source, target = make_packer(here, blocks), make_packer(there, blocks)
    before = {name: cache.clone() for name, cache in there.items()}
    target.scatter(source.gather(torch.tensor([3, 5]), torch.empty(1 << 20, dtype=torch.uint8)), torch.tensor([7, 4]))
    for name, cache in there.items():
        assert torch.equal(cache[[7, 4]], here[name][[3, 5]])
        rest = [block for block in range(blocks) if block not in (7, 4)]
        assert torch.equal(cache[rest], before[name][rest])


class Side:
    """One instance: vLLM's scheduler with its connector, and a table of what is in which slot of which block."""

    def __init__(self, specs, blocks, role, asynchronous):
        config = config_of(role)
        steps = config.scheduler_config
        steps.async_scheduling, steps.enable_chunked_prefill = asynchronous, True
        steps.max_num_batched_tokens = steps.max_num_scheduled_tokens = 40
        config.cache_config.num_gpu_blocks, config.cache_config.enable_prefix_caching = blocks, True
        groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
        self.sizes = [spec.block_size for spec in specs]
        self.windows = [getattr(spec, "sliding_window", None) or LIMIT for spec in specs]
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(min(self.sizes), sha256)
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=max(self.sizes),
            hash_block_size=min(self.sizes),
        )
        self.steps_ahead = 2 if asynchronous else 1
        self.requests, self.tables, self.slots, self.queue = {}, {}, {}, []
        self.sent, self.received, self.failed, self.preemptions = set(), set(), set(), 0

    def add(self, name, prompt, answer, **parameters):
        extra = {"kv_transfer_params": {"transfer_id": name} | parameters}
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True, extra_args=extra)
        self.requests[name] = Request(name, list(prompt), sampling, None, block_hasher=self.hasher)
        self.scheduler.add_request(self.requests[name])

    def step(self):
        """Launch a step and read the output of the one before; returns what the worker must know."""
        output = self.scheduler.schedule()
        scheduled = [(new.req_id, True, new.block_ids, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            scheduled.append((name, name in cached.resumed_req_ids, blocks or (), computed))
        self.preemptions += len(output.preempted_req_ids or ())
        sampled, chunks = {}, []
        for name, replace, blocks, computed in scheduled:
            if replace:
                self.tables[name] = [[] for _ in self.sizes]
            for table, new in zip(self.tables[name], blocks, strict=False):
                table += new
            end = computed + output.num_scheduled_tokens[name]
            chunks.append((name, computed, end))
            sampled[name] = [7] if end >= self.requests[name].num_tokens else []
        for write in (True, False):  # a request may read what another one writes in the same pass
            for chunk in chunks:
                self.compute(*chunk, write)
        reports = KVConnectorOutput(
            finished_sending=self.sent, finished_recving=self.received, failed_recving=self.failed
        )
        self.sent, self.received, self.failed = set(), set(), set()
        places = {name: place for place, name in enumerate(sampled)}
        result = ModelRunnerOutput(list(sampled), places, list(sampled.values()), kv_connector_output=reports)
        self.queue.append((output, result))
        if len(self.queue) >= self.steps_ahead:
            self.scheduler.update_from_output(*self.queue.pop(0))
        return output.kv_connector_metadata

    def compute(self, name, computed, end, write):
        """Write what the tokens from `computed` to `end` leave in the cache, or read what their attention reads."""
        request = self.requests[name]
        tokens = [*request.prompt_token_ids, *(end - request.num_prompt_tokens) * [7]]
        for group, (size, span) in enumerate(zip(self.sizes, self.windows, strict=True)):
            for position in range(computed if write else max(0, computed - span + 1), end):
                slot = (self.tables[name][group][position // size], position % size)
                expected = (group, hash(tuple(tokens[: position + 1])))
                if write:
                    assert slot[0], f"{name}: no block of group {group} for token {position}"
                    self.slots[slot] = expected
                assert self.slots.get(slot) == expected, f"{name}: group {group} reads another token than {position}"


@dataclass
class Handoff:
    """What the two workers know of a transfer."""

    blocks: list = field(default_factory=list)
    ended: bool = False
    fetch: object = None
    moved: int = 0


def serve(seed, specs, asynchronous, blocks, failures, requests=24):
    """Serve random prompts through a pair until all are answered and all blocks free; `failures` is the share of transfers that fail."""
    luck = random.Random(seed)
    pair = p, d = [Side(specs, blocks, role, asynchronous) for role in ("kv_producer", "kv_consumer")]
    handoffs, common, waiting = {}, [[luck.randrange(2, 9) for _ in range(LIMIT)] for _ in range(3)], []
    for number in range(requests):
        length, name = luck.randrange(2, 200), f"r{number}"
        prompt = luck.choice(common)[: luck.randrange(length)]
        prompt = prompt + [luck.randrange(2, 9) for _ in range(length - len(prompt))]
        handoffs[name] = Handoff()
        waiting.append((p, name, prompt, 1, {"do_remote_decode": True}))
        there = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1}
        if luck.random() < 0.5:  # the first token comes from prefill
            prompt, there = [*prompt, 7], there | {"prefilled_tokens": length}
        waiting.append((d, name, prompt, luck.randrange(1, 30), there))
    for _ in range(20_000):
        if waiting and luck.random() < 0.5:
            side, name, prompt, answer, parameters = waiting.pop(0)
            side.add(name, prompt, answer, **parameters)
        side = luck.choice(pair)
        plan = side.step()
        for name in plan.preempted:
            handoffs[name].blocks = []
        for progress in plan.prefilled:
            handoff = handoffs[progress.request_id]
            handoff.blocks = progress.blocks if progress.replace else handoff.blocks + progress.blocks
        for end in plan.ended:
            assert end.error is None and end.kept
            handoffs[end.request_id].ended = True
        for fetch in plan.fetches:
            handoffs[fetch.transfer.transfer_id].fetch = fetch
        for transfer, _ in plan.cancelled:
            handoffs[transfer.transfer_id].fetch = "not needed"
        for name, handoff in list(handoffs.items()):
            if luck.random() < 0.3 and advance(handoff, name, p, d, luck, failures):
                del handoffs[name]
        if not waiting and not handoffs and not any(one.scheduler.has_unfinished_requests() for one in pair):
            for one in pair:
                for _ in range(4):
                    one.step()
                pool = one.scheduler.kv_cache_manager.block_pool
                assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            return
    raise AssertionError(f"not served: {handoffs}")


def advance(handoff, name, p, d, luck, failures):
    """Move some blocks of a transfer that are computed; True once it is over and both sides have it reported."""
    if handoff.fetch is None:
        return False
    if handoff.fetch != "not needed":
        fetch = handoff.fetch
        start = fetch.start_block + handoff.moved
        for here, there in list(zip(handoff.blocks[start:], fetch.blocks[handoff.moved :], strict=False))[
            : luck.randrange(9)
        ]:
            for slot in range(max(p.sizes)):
                d.slots[there, slot] = p.slots.get((here, slot))
            handoff.moved += 1
        failed = luck.random() < failures
        if handoff.moved < len(fetch.blocks) and not failed:
            return False
        d.received.add(name)
        d.failed |= {name} if failed else set()
        handoff.fetch = "not needed"
    if handoff.ended:
        p.sent.add(name)
    return handoff.ended


KINDS = {
    "full": [full()],
    "window": [window(24)],
    "window and full": [full(), window(24)],
    "window of whole blocks": [full(), window(32), window(32)],
    "window longer than prompts": [full(), window(LIMIT)],
    "two windows": [full(), window(17), window(50)],
    "blocks of two sizes": [full(32), window(24, 16)],
}


@hybrid
@pytest.mark.usefixtures("kv_secret")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_what_prefill_wrote(kind, asynchronous):
    serve(1, KINDS[kind], asynchronous, blocks=30 + 10 * len(KINDS[kind]), failures=0.0)  # few: requests are preempted
    serve(2, KINDS[kind], asynchronous, blocks=200, failures=0.1)
