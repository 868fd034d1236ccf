"""Tensor parallelism in real vLLM: of one and of two on either side, grouped heads and MLA; on CPU over tcp, on four GPUs over nccl.

A pair hands over in both directions (both are kv_both), so that one start shows both and serves all tests of a shape. Without prefix
caching: each answer is from what was handed over. They take minutes: python -m pytest -m slow tests/kv/test_tensor_parallel.py
"""

import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdbench import correctness
from pdbench.serving.machine import inspect
from pdbench.serving.models import tiny_model
from tests.conftest import commands, serve_config, start
from tests.support.kv import PATIENCE_S, SMALL_CHUNKS, Server, new_id, prompt_of, tiny_qwen2, wait_free
from tests.support.processes import lines_of, wait_until

MACHINE = inspect()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(580),
    pytest.mark.skipif(0 < len(MACHINE.gpus) < 4, reason="needs four GPUs, or none"),
]

LENGTHS = [2, 31, 32, 33, 64, 65, 127, 128, 129, 200, 300, 400]
# Prefill and decode, or two widths, add up matrix products in another order: tokens whose log probabilities are closer may change places.
NEAR_TIE = 0.25 if MACHINE.on_gpu else 1e-3
ON_GPU = " --kv-cache-memory-bytes 500000000 --max-num-seqs 64 --max-num-batched-tokens 256" if MACHINE.on_gpu else ""


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(128) as executor:
        yield executor


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((True, (2, 2)), id="grouped-2-2"),
        pytest.param((True, (1, 2)), id="grouped-1-2"),
        pytest.param((False, (2, 2)), id="mla-2-2"),
        pytest.param((False, (1, 2)), id="mla-1-2"),
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    grouped, widths = request.param
    if not grouped and (MACHINE.vllm or (0,)) < (0, 29) and not MACHINE.on_gpu:
        pytest.skip("before 0.29 vLLM has no MLA on CPU")
    folder = tmp_path_factory.mktemp("pair")
    config = serve_config(
        folder,
        tensor_parallel=2,
        prefill_tensor_parallel=widths[0],
        decode_tensor_parallel=widths[1],
        model=str(tiny_qwen2(folder / "tiny-qwen2") if grouped else tiny_model()),
        dtype="bfloat16" if MACHINE.on_gpu else "float32",
        gpu_memory_utilization=0.2,
        kv_load_failure_policy="fail",
        vllm_args="--no-enable-prefix-caching" + ON_GPU,
    )
    arguments = SMALL_CHUNKS if grouped else ()  # vLLM on CPU computes MLA in one chunk
    planned = commands("disaggregated", config)[:2]
    # On two cores the four workers take longer than usual to come to each of 64 requests.
    servers = [Server(command, folder, arguments, PATIENCE_S / 2, kv_role="kv_both") for command in planned]
    for server in servers:
        server.fields = {"logprobs": 5, "return_tokens_as_token_ids": True}
    try:
        for server in servers:
            server.wait_healthy()
        yield servers
    finally:
        for server in servers:
            server.kill()


def alike(answer, expected):
    """Are the tokens equal, up to the first near tie?"""
    top = expected["logprobs"]["top_logprobs"]
    for token, other, likely in zip(answer["token_ids"], expected["token_ids"], top, strict=True):
        if token != other:
            return max(likely.values()) - likely.get(f"token_id:{token}", float("-inf")) < NEAR_TIE
    return True


def assert_handed_over_both_ways(pair, lengths):
    first, second = pair
    equal = 0
    for length in lengths:
        prompt = prompt_of(length)
        for source, target in ((first, second), (second, first)):
            expected, before, name = source.complete(prompt), target.external_tokens(), new_id()
            source.prefill(prompt, name)
            answer = target.decode(prompt, name, source)
            assert alike(answer, expected), f"{length} tokens to {target.name}: {answer} instead of {expected}"
            assert target.external_tokens() - before == length
            equal += answer["token_ids"] == expected["token_ids"]
    assert equal >= len(lengths)  # of twice as many
    wait_free(*pair)


def test_instances_hand_over_to_each_other(pair):
    assert_handed_over_both_ways(pair, LENGTHS)
    for server in pair:
        log = lines_of(server.log.with_suffix(".events.jsonl"))
        moved = [line for line in map(json.loads, log) if line["event"] == "kv_transfer" and line["error"] is None]
        width = int(server.argv[server.argv.index("--tensor-parallel-size") + 1])
        assert {line["rank"] for line in moved} == set(range(width))


def test_swapped_kv_gives_the_other_prompts_answer(pair):
    for source, target in (pair, pair[::-1]):
        for _ in range(20):  # a random model answers some prompts alike
            ours = prompt_of(200)
            theirs = prompt_of(199) + ours[-1:]
            expected, other = source.complete(ours), source.complete(theirs)
            if not alike(other, expected):
                break
        else:
            raise AssertionError("this model's answers do not depend on the prompt")
        name = new_id()
        source.prefill(ours, name, verify_prompt=False)
        answer = target.decode(theirs, name, source, verify_prompt=False)
        assert alike(answer, expected) and not alike(answer, other)
    wait_free(*pair)


def test_sixty_four_requests_at_a_time_succeed(pair, pool):
    for source, target in (pair, pair[::-1]):
        before, jobs = target.external_tokens(), []
        for _ in range(64):
            prompt, name = prompt_of(150), new_id()
            jobs.append(pool.submit(target.decode, prompt, name, source))
            jobs.append(pool.submit(source.prefill, prompt, name))
        for job in jobs:
            job.result()
        assert target.external_tokens() - before == 64 * 150
    wait_free(*pair)


def test_killed_instance_harms_no_other_and_serves_again(request, pair, pool):
    """The second one of two ranks: it decodes where both are as wide, and prefills where they are not."""
    first, victim = pair
    source, target = (first, victim) if "2-2" in request.node.name else (victim, first)
    jobs = []
    for _ in range(32):
        prompt, name = prompt_of(150), new_id()
        host, port = source.kv_address.split(":")
        there = {"do_remote_prefill": True, "remote_host": host, "remote_port": int(port)}
        jobs.append(pool.submit(target.complete, prompt, 100, transfer_id=name, **there))
        jobs.append(pool.submit(source.prefill, prompt, name))
    wait_until(lambda: target.metric("num_requests_running") > 0, PATIENCE_S, "requests run")
    victim.kill()
    for job in jobs:  # each ends: with its tokens, or with an error
        error = job.exception()
        assert error is None or isinstance(error, OSError | urllib.error.URLError), error
    wait_free(first)
    victim.start()
    victim.wait_healthy()
    assert_handed_over_both_ways(pair, LENGTHS[-4:])


@pytest.mark.skipif(MACHINE.on_gpu, reason="there, every run checks it")
def test_correctness_check_passes(tmp_path: Path):
    deployment = start("disaggregated", serve_config(tmp_path, tensor_parallel=2))
    try:
        verdict, _ = correctness.run(deployment.info(), 1, None)
        assert verdict.passed, verdict.detail
        assert verdict.equal_outputs == verdict.prompts
    finally:
        deployment.close()
