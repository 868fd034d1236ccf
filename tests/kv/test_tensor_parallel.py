"""Tensor parallelism of two on both sides, in real vLLM on CPU: each rank moves its own share of the KV cache.

Eight processes on two cores take minutes: python -m pytest -m slow tests/kv/test_tensor_parallel.py
"""

import json
from pathlib import Path

import pytest

from pdbench import correctness
from tests.conftest import serve_config, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


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
