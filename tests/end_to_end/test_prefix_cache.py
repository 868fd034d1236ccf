"""Benches one after the other against the same real vLLM with its prefix cache on: fresh prompts miss it, repeated ones are flagged."""

from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.analysis.run_analysis import RunAnalysis, analyze
from pdbench.config import DeploymentKind, LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.records import Run
from pdbench.site import Site
from tests.conftest import serve_config, start
from tests.support.kv import tiny_qwen2

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]
PROMPT_TOKENS = 400


@pytest.mark.parametrize("kind", ["single", pytest.param("disaggregated", marks=pytest.mark.slow)])
def test_only_a_repeated_nonce_meets_the_prefix_cache(
    kind: DeploymentKind, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # vLLM for CPU has no prefix cache for the tiny DeepSeek-V2's attention.
    log_dir = tmp_path / "logs"

    def bench(nonce: str | None = None, **options: object) -> RunAnalysis:
        load = LoadConfig(
            requests=6,
            concurrency=2,
            input_tokens=PROMPT_TOKENS,
            output_tokens=3,
            nonce=nonce,
            tokenizer=model,
            **options,
        )
        runs: dict[Path, Run] = {}
        measured = Options(ServeConfig(log_dir=str(log_dir)), load, PowerConfig(power=False))
        experiment.bench(url, 1, measured, tmp_path, Console(quiet=True), Site(), runs)
        (run,) = runs.values()
        assert all(request.prompt_tokens == PROMPT_TOKENS and not request.error for request in run.requests)
        return analyze(run)

    def flags(analysis: RunAnalysis) -> list[str]:
        return [flag.name for flag in analysis.flags if flag.name == "prefix-cache-hit"]

    with ExitStack() as stack:
        if kind == "single":
            server = request.getfixturevalue("fleet")[3]
            url, model = server.url, server.argv[server.argv.index("--model") + 1]
        else:
            model = str(tiny_qwen2(tmp_path / "tiny-qwen2"))
            config = serve_config(log_dir, model=model, vllm_args="--enable-prefix-caching --block-size 32")
            url = stack.enter_context(closing(start(kind, config))).info().url
        first, second = bench(), bench()
        for analysis in (first, second):
            assert analysis.summary.prefix_cache.source == "counters"
            assert analysis.summary.prefix_cache.prompt_tokens == 6 * PROMPT_TOKENS
            assert analysis.summary.prefix_cache.cached_tokens == 0 and flags(analysis) == []
            counted = [server.loads for server in analysis.summary.servers.values() if server.role != "decode"]
            assert sum(server.prompt_tokens or 0 for server in counted) == 6 * PROMPT_TOKENS
            assert all(server.preemptions == 0 and (server.queue_ms or 0) > 0 for server in counted)
        again = bench(first.config["load"]["nonce"])
        assert again.summary.prefix_cache.cached_pct > 90 and flags(again) == ["prefix-cache-hit"]
        shared = bench(shared_prefix=0.7)
        assert 30 < shared.summary.prefix_cache.cached_pct < 70 and flags(shared) == []
