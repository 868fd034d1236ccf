"""How many engine steps pass from decode's request for KV to the step that uses it: vLLM's asynchronous scheduler in virtual time.

A forward pass takes 1. The engine loop is that of vLLM's `step_with_batch_queue`: a step is launched while the one before runs, then the
older one's output is read. KV is on the wire for 0.3, and is written once the passes are over that it has to wait for.
"""

import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from pdbench.kv import compat
from pdbench.kv.connector import PdKvConnector
from pdbench.kv.worker import KvWorker
from pdbench.serving.models import tiny_model
from tests.support.kv import new_id, prompt_of

pytestmark = pytest.mark.usefixtures("kv_secret")
WIRE, WRITE = 0.3, 0.01


@pytest.fixture(scope="module")
def vllm_config():
    transfer = KVTransferConfig(
        kv_connector="PdKvConnector", kv_connector_module_path="pdbench.kv.connector", kv_role="kv_consumer"
    )
    model = {"model": str(tiny_model()), "max_model_len": 256, "skip_tokenizer_init": True}
    config = EngineArgs(**model, enable_prefix_caching=False, kv_transfer_config=transfer).create_engine_config()
    config.scheduler_config.async_scheduling = True  # vLLM switches it off on CPU
    config.cache_config.num_gpu_blocks = 64
    return config


class Engine:
    """vLLM's scheduler, the worker's half of the connector, and a GPU that runs one pass after the other."""

    def __init__(self, config, new_blocks_idle, monkeypatch):
        size = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = AsyncScheduler(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=size,
        )
        self.now, self.launch_time, self.ends, self.passes, self.queue = 0.0, 0.0, [], [], deque()
        self.arrivals, self.asked_in = {}, None
        worker = object.__new__(KvWorker)
        worker._changed, worker._sender, worker._receiver = threading.Condition(), None, self
        worker._new_blocks_idle, worker._mark = new_blocks_idle, lambda: len(self.ends)
        worker._loaded, worker._taken = None, False
        self.worker, half = worker, object.__new__(PdKvConnector)
        half._worker = worker
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", half)

    # In the place of the Receiver

    def step(self, plan, event):
        for fetch in plan.fetches:
            self.asked_in = len(self.ends)
            over = self.ends[event - 1] if event else 0.0
            self.arrivals[fetch.transfer.request_id] = max(self.now + WIRE, over) + WRITE

    def take_reports(self, failures=True, successes=True):
        arrived = {name for name, at in self.arrivals.items() if at <= self.now and successes}
        for name in arrived:
            del self.arrivals[name]
        return arrived, {}

    @property
    def is_waiting(self):
        return bool(self.arrivals)

    # The engine's loop

    def add(self, tokens, **parameters):
        sampling = SamplingParams(max_tokens=64, ignore_eos=True, extra_args={"kv_transfer_params": parameters})
        request = Request(new_id(), prompt_of(tokens), sampling, None)
        self.scheduler.add_request(request)
        return request.request_id

    def launch(self):
        output = self.scheduler.schedule()
        self.worker.before_forward(output.kv_connector_metadata)
        assert output.total_num_scheduled_tokens, "another request is decoding all the time"
        self.now += self.launch_time
        self.ends.append(max([self.now, *self.ends[-1:]]) + 1)
        self.passes.append(set(output.num_scheduled_tokens))
        self.worker.load(output.kv_connector_metadata)  # vLLM's own hook, from 0.29 on after the launch
        received = self.worker.after_forward(output.kv_connector_metadata).received
        self.queue.append((output, KVConnectorOutput(finished_recving=received or None), self.ends[-1]))
        if len(self.queue) < 2:
            return
        output, reports, end = self.queue.popleft()
        self.now = max(self.now, end)
        names = list(output.num_scheduled_tokens)
        places = {name: place for place, name in enumerate(names)}
        sampled = ModelRunnerOutput(names, places, [[7] for _ in names], kv_connector_output=reports)
        self.scheduler.update_from_output(output, sampled)

    def steps_to_first_use(self):
        """From the step with which decode asks for the KV of a prompt to the first one that computes on it."""
        self.add(8)
        for _ in range(5):
            self.launch()
        name = self.add(100, transfer_id="t", do_remote_prefill=True, remote_host="127.0.0.1", remote_port=1)
        while name not in self.passes[-1]:
            assert len(self.passes) < 30
            self.launch()
        return len(self.passes) - 1 - self.asked_in


def test_arrival_is_used_in_the_step_after_the_request_for_it(vllm_config, monkeypatch):
    assert Engine(vllm_config, True, monkeypatch).steps_to_first_use() == 1


def test_arrival_during_a_launch_is_told_with_the_output_before(vllm_config, monkeypatch):
    """It would reach the scheduler with the output of the step that is being launched, one later."""
    engine = Engine(vllm_config, True, monkeypatch)
    engine.launch_time = 0.5  # more than KV takes
    assert engine.steps_to_first_use() == 1


def test_block_that_a_pass_may_use_is_written_behind_earlier_passes_only(vllm_config, monkeypatch):
    """A vLLM that reserves such blocks: the step's own pass, launched before the fetch starts, is not waited for."""
    assert Engine(vllm_config, False, monkeypatch).steps_to_first_use() == 2


def test_arrival_that_only_the_worker_reports_is_used_two_steps_later(vllm_config, monkeypatch):
    monkeypatch.setattr(PdKvConnector, "update_connector_output", lambda self, output: None)
    assert Engine(vllm_config, True, monkeypatch).steps_to_first_use() == 3


def test_blocks_that_vllm_reserves_are_idle_from_032_on(vllm_config):
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    assert compat.new_blocks_are_idle(vllm_config) or version < (0, 32)
    drafting = SimpleNamespace(speculative_config=object())
    assert not compat.new_blocks_are_idle(drafting), "the draft model may still write when the step's output is there"
