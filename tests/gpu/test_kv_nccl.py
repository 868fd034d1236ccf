"""The nccl transport on real GPUs: blocks arrive, real vLLM continues from them, and no fault hangs or leaks.

On a host with two GPUs: python -m pytest tests/gpu/test_kv_nccl.py -m gpu
Tensor parallelism, on four: python -m pytest tests/kv/test_tensor_parallel.py -m slow
With one GPU all processes share it, and NCCL moves KV between them over sockets: all of the connector is tested, but no NVLink.
"""

import asyncio
import json
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kv_servers

from pdbench.kv.compat import SECRET_VARIABLE
from pdbench.serving.models import tiny_model
from tests.support.kv import (
    BLOCK,
    BLOCKS,
    SECRET,
    Instance,
    cancel,
    fetch,
    instances,
    new_transfer,
    prefill,
    prompt_of,
    settled,
    tiny_qwen2,
)
from tests.support.processes import free_port, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580)]
GPUS = torch.cuda.device_count()
if GPUS < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

PATIENCE_S = 60.0
TRANSFER_TIMEOUT_S = 10.0


@pytest.fixture
def pair(monkeypatch):
    """A prefill worker on GPU 0 and a decode worker on GPU 1, over nccl; 1 MiB per layer's block. With one GPU decode has a process of its
    own: NCCL joins no two workers of one process and one GPU."""
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    port, layout, decode, device = free_port(), (BLOCKS, 4, 64 * 1024), Instance, "cuda:1"
    if GPUS < 2:
        decode, device = InstanceElsewhere, "cuda:0"
        for name, value in kv_servers.of_another_host("prefill").items():
            monkeypatch.setenv(name, value)
    more = {"transport": "nccl", "layout": layout, "timeout_s": 10.0, "staging_mib": 16}
    with instances(
        lambda: Instance("prefill", port, device="cuda:0", **more), lambda: decode("decode", device=device, **more)
    ) as workers:
        yield workers


class InstanceElsewhere(Instance):
    """An instance in a process of its own, which NCCL takes for one on another host."""

    def __post_init__(self):
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve_instance, args=(there, settings), daemon=True)
        self.process.start()
        there.close()
        self.worker = self

    def _ask(self, method, *arguments, **more):
        self.connection.send((method, arguments, more))
        return self.connection.recv()

    def step(self, **plan):
        reports, self.sent, self.received, self.failed = self._ask("step", **plan)
        return reports

    def blocks(self, block_ids):
        return torch.from_numpy(self._ask("blocks", block_ids))

    def close(self):
        self.connection.close()
        self.process.join(20)
        self.process.kill()


def serve_instance(connection, settings):
    """Step an instance of these settings for another process until that closes the connection."""
    os.environ |= kv_servers.of_another_host(settings["role"])
    torch.manual_seed(1)  # not what the other's cache holds
    with instances(lambda: Instance(**settings)) as instance:
        while True:
            try:
                method, arguments, more = connection.recv()
            except EOFError:
                return
            if method == "blocks":
                connection.send(instance.blocks(*arguments).cpu().numpy())
            else:
                connection.send((instance.step(**more), instance.sent, instance.received, instance.failed))


@pytest.mark.parametrize("tokens", [1, 4, 33, 120])
def test_blocks_arrive(pair, tokens):
    p, d = pair
    transfer, count = new_transfer(tokens), -(-tokens // BLOCK)
    here, there = list(range(count)), list(range(BLOCKS - count, BLOCKS))[::-1]
    fetch(d, transfer, there, p.port)
    prefill(p, transfer, here, sorted({min(tokens, 18), tokens}))
    settled(p, d, transfer)
    assert torch.equal(p.blocks(here).cpu(), d.blocks(there).cpu())


def test_many_transfers_share_one_communicator(pair):
    p, d = pair
    jobs = []
    for index in range(40):
        transfer = new_transfer(8)
        here, there = [2 * (index % 20), 2 * (index % 20) + 1], [2 * (index % 30), 2 * (index % 30) + 1]
        prefill(p, transfer, here)
        fetch(d, transfer, there, p.port)
        settled(p, d, transfer)
        jobs.append(torch.equal(p.blocks(here).cpu(), d.blocks(there).cpu()))
    assert all(jobs)


def test_decode_cancels_between_the_chunks(pair):
    p, d = pair
    transfer = new_transfer(120)
    fetch(d, transfer, list(range(30)), p.port)
    prefill(p, transfer, list(range(30)), [60], ended=False)
    cancel(d, transfer, p.port)
    d.until(lambda: transfer.request_id in d.received)
    after = new_transfer(8)
    prefill(p, after, [40, 41])
    fetch(d, after, [50, 51], p.port)
    settled(p, d, after)
    assert torch.equal(p.blocks([40, 41]).cpu(), d.blocks([50, 51]).cpu())


def test_peer_leaves_and_returns(pair):
    p, d = pair
    first, second = new_transfer(8), new_transfer(8)
    prefill(p, first, [1, 2])
    fetch(d, first, [10, 11], p.port)
    settled(p, d, first)
    fetch(d, second, [12, 13], p.port)
    p.worker.close()
    d.until(lambda: d.failed == [second.request_id])
    more = {"transport": "nccl", "layout": p.layout, "timeout_s": 10.0, "staging_mib": 16}
    with instances(lambda: Instance("prefill", p.port, device="cuda:0", **more)) as returned:
        third = new_transfer(8)
        prefill(returned, third, [3, 4])
        fetch(d, third, [14, 15], p.port)
        settled(returned, d, third)
        assert torch.equal(returned.blocks([3, 4]).cpu(), d.blocks([14, 15]).cpu())


def test_engine_may_free_memory_while_a_transfer_waits_for_its_pass(pair):
    """That waits for all that is launched on the GPU and may hold a lock of the driver meanwhile; decode has no header yet."""
    p, d = pair
    for _ in range(10):
        transfer = new_transfer(16)
        fetch(d, transfer, [10, 11, 12, 13], p.port)
        p.step(expected=[transfer])
        with torch.cuda.device(0):
            spare = torch.empty(256 << 20, dtype=torch.uint8, device="cuda:0")
            torch.cuda._sleep(200_000_000)  # the forward pass
            p.compute(transfer, [1, 2, 3, 4], replace=True)
            del spare
            time.sleep(0.02)  # the copy is launched by now
            engine = threading.Thread(target=torch.cuda.empty_cache, daemon=True)
        engine.start()
        engine.join(20)
        assert not engine.is_alive()
        p.end(transfer)
        settled(p, d, transfer)
        assert torch.equal(p.blocks([1, 2, 3, 4]).cpu(), d.blocks([10, 11, 12, 13]).cpu())


@contextmanager
def started(folder, model=None, arguments=()):
    """Real vLLM: prefill on the first GPU, decode on the second, a tiny model, failed transfers fail their request."""
    arguments = ["--enforce-eager", "--max-model-len", "2048", "--max-num-batched-tokens", "256", *arguments]
    # With a size of its own for the cache, vLLM does not take for its own what another pair on the same GPUs takes or frees meanwhile.
    arguments += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", "2G"]
    shared = GPUS < 2
    model = str(model or tiny_model())
    running = kv_servers.start("p2p-nccl", model, folder, False, arguments, TRANSFER_TIMEOUT_S, shared_gpu=shared)
    try:
        failure = kv_servers.wait_healthy(running, 400)
        assert failure is None, failure
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The tiny DeepSeek-V2 (MLA) in bfloat16, one GPU per side."""
    with started(tmp_path_factory.mktemp("servers")) as running:
        yield running


def output_of(servers, index, prompt, output_tokens=16, **transfer):
    """The token ids that one server answers with, not streamed (half a character has no text)."""
    url = servers.urls[index]

    async def ask():
        reader, writer = await kv_servers.post(
            url, kv_servers.request_body(prompt, output_tokens, False, transfer or None, return_token_ids=True), None
        )
        answer = await reader.read()
        writer.close()
        return answer

    answer = asyncio.run(ask())
    return json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])["choices"][0]["token_ids"]


def through_both(servers, prompt, decoded=None):
    """Prefill `prompt`, then decode it (or `decoded` instead, without the check that both are the same)."""
    name, more = secrets.token_hex(8), {} if decoded is None else {"verify_prompt": False}
    host, port = servers.kv[0].split(":")
    output_of(servers, 0, prompt, 1, transfer_id=name, do_remote_decode=True, **more)
    there = {"remote_host": host, "remote_port": int(port), "do_remote_prefill": True}
    return output_of(servers, 1, decoded or prompt, transfer_id=name, **there, **more)


def is_free(servers, index):
    metrics = kv_servers.metrics(servers.urls[index])
    return metrics["vllm:kv_cache_usage_perc"] == 0 and metrics["vllm:num_requests_running"] == 0


def assert_equal_to_prefills_own(servers, lengths):
    equal = 0
    for length in lengths:
        prompt = prompt_of(length)
        # Prefill's own answer: decode's would come from the very blocks that are to be checked, by its prefix cache.
        equal += through_both(servers, prompt) == output_of(servers, 0, prompt)
    # In bfloat16 prefill's and decode's kernels round differently, so a near tie between two tokens may fall either way.
    assert equal >= len(lengths) - 3
    wait_until(lambda: is_free(servers, 0) and is_free(servers, 1), PATIENCE_S)


def test_equal_to_a_single_instance(servers):
    edges = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 700, 1000, 1023, 1024, 1025]
    assert_equal_to_prefills_own(servers, [*edges, *range(30, 40)])


@pytest.mark.parametrize(
    ("make_model", "arguments"),
    [
        pytest.param(lambda folder: tiny_model(), ["--kv-cache-dtype", "fp8"], id="mla-fp8"),
        pytest.param(tiny_qwen2, [], id="grouped-bfloat16"),
        pytest.param(tiny_qwen2, ["--dtype", "float16"], id="grouped-float16"),
        pytest.param(tiny_qwen2, ["--kv-cache-dtype", "fp8"], id="grouped-fp8"),
    ],
)
def test_other_caches(tmp_path, make_model, arguments):
    with started(tmp_path, model=make_model(tmp_path / "model"), arguments=arguments) as running:
        assert_equal_to_prefills_own(running, [1, 63, 64, 65, 300, 1000, *range(30, 40)])


def test_swapped_kv_gives_the_other_prompts_answer(servers):
    ours = prompt_of(200)
    theirs = prompt_of(199) + ours[-1:]
    assert through_both(servers, ours, decoded=theirs) == through_both(servers, ours)


def test_sixty_four_requests_at_a_time_succeed(servers):
    async def all_of_them():
        return await asyncio.gather(*(servers.ask(prompt_of(900), 16) for _ in range(64)))

    assert [timed.error for timed in asyncio.run(all_of_them()) if timed.error] == []
    wait_until(lambda: is_free(servers, 0) and is_free(servers, 1), PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("victim", [0, 1])
def test_victim_under_load_harms_no_other_and_returns(servers, victim, number):
    async def load():
        requests = [asyncio.create_task(servers.ask(prompt_of(900), 64, timeout_s=90)) for _ in range(32)]
        await asyncio.sleep(0.3)
        servers.signal(victim, number)
        if number == signal.SIGSTOP:
            await asyncio.sleep(1.5 * TRANSFER_TIMEOUT_S)
            servers.signal(victim, signal.SIGCONT)
        return await asyncio.gather(*requests)

    asyncio.run(load())  # each ends: with its tokens, or with an error
    wait_until(lambda: is_free(servers, 1 - victim), PATIENCE_S)
    if number == signal.SIGKILL:
        servers.processes[victim].wait()
        servers.launch(victim)
        assert kv_servers.wait_healthy(servers, 300) is None
    wait_until(lambda: is_free(servers, victim), PATIENCE_S)
    before = kv_servers.metrics(servers.urls[1]).get("vllm:pdbench_kv_bytes_total", 0.0)
    prompts = [prompt_of(300) for _ in range(6)]
    assert sum(through_both(servers, prompt) == output_of(servers, 0, prompt) for prompt in prompts) >= 5
    assert kv_servers.metrics(servers.urls[1])["vllm:pdbench_kv_bytes_total"] > before
