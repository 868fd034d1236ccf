"""Tensor parallelism in real vLLM on CPU: of one and of two on either side, grouped heads and MLA.

A pair hands over in both directions (both are kv_both), so that one start of each proves both. Without prefix caching: each answer is
from what was handed over. They take minutes: python -m pytest -m slow tests/kv/test_tensor_parallel.py
"""

import json
from pathlib import Path

import pytest

from pdbench import correctness
from pdbench.serving.machine import inspect
from pdbench.serving.models import tiny_model
from tests.conftest import commands, serve_config, start
from tests.support.kv import SMALL_CHUNKS, Server, new_id, prompt_of, tiny_qwen2, wait_free

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(580)]

LENGTHS = [2, 31, 32, 33, 64, 65, 127, 128, 129, 200, 300, 400]


@pytest.mark.parametrize(
    ("grouped", "widths"),
    [
        pytest.param(True, (1, 2), id="grouped-heads"),
        pytest.param(False, (1, 2), id="mla"),
        pytest.param(True, (2, 2), id="grouped-heads-equal"),
    ],
)
def test_instances_hand_over_to_each_other(tmp_path: Path, grouped: bool, widths: tuple[int, int]):
    if not grouped and (inspect().vllm or (0,)) < (0, 29):
        pytest.skip("before 0.29 vLLM has no MLA on CPU")
    config = serve_config(
        tmp_path,
        tensor_parallel=2,
        prefill_tensor_parallel=widths[0],
        decode_tensor_parallel=widths[1],
        connector="tcp",
        model=str(tiny_qwen2(tmp_path / "tiny-qwen2") if grouped else tiny_model()),
        kv_load_failure_policy="fail",
        vllm_args="--no-enable-prefix-caching",
    )
    arguments = SMALL_CHUNKS if grouped else ()  # vLLM on CPU computes MLA in one chunk
    planned = commands("disaggregated", config)[:2]
    servers = [Server(command, tmp_path, arguments, kv_role="kv_both") for command in planned]
    try:
        for server in servers:
            server.wait_healthy()
        first, second = servers
        for length in LENGTHS:
            prompt = prompt_of(length)
            expected = first.complete(prompt)["text"]
            for source, target in ((first, second), (second, first)):
                before, name = target.external_tokens(), new_id()
                source.prefill(prompt, name)
                assert target.decode(prompt, name, source)["text"] == expected, f"{length} tokens to {target.name}"
                assert target.external_tokens() - before == length
        wait_free(*servers)
    finally:
        for server in servers:
            server.kill()


def test_both_ranks_transfer_and_the_correctness_check_passes(tmp_path: Path):
    deployment = start("disaggregated", serve_config(tmp_path, tensor_parallel=2))
    try:
        running = deployment.running()
        verdict, _ = correctness.run(running, 1, None)
        assert verdict.passed, verdict.detail
        assert verdict.equal_outputs == verdict.prompts
    finally:
        deployment.close()
    for role in ("prefill", "decode"):
        lines = [json.loads(line) for line in (tmp_path / f"{role}-0.events.jsonl").read_text().splitlines()]
        assert [line["error"] for line in lines] == [None] * len(lines)
        transfers = [{line["transfer_id"] for line in lines if line["rank"] == rank} for rank in (0, 1)]
        assert len(transfers[0]) >= verdict.prompts
        assert transfers[0] == transfers[1]
