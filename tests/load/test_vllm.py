"""The load client against real vLLM on the CPU: its token counts are the server's."""

from dataclasses import replace

import pytest

from pdbench.config import LoadConfig
from pdbench.load import plan
from pdbench.load.clients import LoadResult, run_load
from pdbench.records import Clock
from pdbench.serving.deployment import DeploymentInfo

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


def run(single: DeploymentInfo, config: LoadConfig) -> LoadResult:
    config = replace(config, tokenizer=single.model_path)
    return run_load(plan.TrialLoad(config, single.url, single.model_name, Clock.start()))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_token_counts_equal_the_servers_usage(single: DeploymentInfo, endpoint, ignore_eos):
    config = LoadConfig(requests=8, concurrency=4, output_tokens=20, endpoint=endpoint, ignore_eos=ignore_eos, seed=31)
    result = run(single, config)
    for record in result.requests:
        assert record.error is None and record.counted_by == "token_ids" and record.stamp == "kernel"
        # output_tokens is the server's usage, token_s what the client counted.
        assert len(record.token_s) == record.output_tokens <= 20
        assert not ignore_eos or record.output_tokens == 20


def test_exact_prompt_lengths_equal_the_servers_count(single: DeploymentInfo):
    config = LoadConfig(
        requests=6, concurrency=3, input_tokens=100, input_distribution="uniform", output_tokens=4, seed=32
    )
    tokenizer = plan.find_tokenizer(config, single.model_path)
    planned = [request.prompt_tokens for request in plan.planned_requests(config, tokenizer, 0)]
    result = run(single, config)
    assert [record.prompt_tokens for record in result.requests if not record.warmup] == planned


def test_prompt_that_is_too_long_is_a_failed_request(single: DeploymentInfo):
    config = LoadConfig(requests=2, input_tokens=600, output_tokens=4, warmup=0)
    result = run(single, config)
    assert [record.error.kind for record in result.requests] == ["http_400", "http_400"]
    assert result.trial.client["failures"] == {"http_400": 2}
