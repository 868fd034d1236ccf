"""An engine's limits from what vLLM logs and counts."""

from pdbench.engine_facts import parse
from pdbench.records import EngineFacts

LOG = """\
(APIServer pid=1) INFO non-default args: {'model': '/m', 'max_num_seqs': 8, 'max_num_batched_tokens': 512}
(APIServer pid=1) INFO Chunked prefill is enabled with max_num_batched_tokens=512.
(EngineCore pid=2) INFO Initializing a V1 LLM engine (v0.32.0) with config: model='/m', enable_prefix_caching=True, enable_chunked_prefill=True, \
compilation_config={'mode': 3, 'cudagraph_capture_sizes': [1, 2, 4, 8], 'cudagraph_num_of_warmups': 1}
(EngineCore pid=2) INFO GPU KV cache size: 1,234,560 tokens, Maximum concurrency for 512 tokens per request: 9.00x
"""
PAGE = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",num_gpu_blocks="100"} 1.0\n'


def test_log_tells_the_limits() -> None:
    assert parse("single", LOG, PAGE) == EngineFacts(
        role="single",
        max_num_batched_tokens=512,
        max_num_seqs=8,
        prefix_caching=True,
        chunked_prefill=True,
        graph_sizes=[1, 2, 4, 8],
        kv_cache_tokens=1_234_560,
        block_size=16,
    )


def test_metrics_alone_tell_cache_and_block_size() -> None:
    facts = parse("replica", "", PAGE)
    assert (facts.kv_cache_tokens, facts.block_size, facts.prefix_caching) == (1600, 16, True)
    assert facts.max_num_batched_tokens is None


def test_server_that_says_nothing_has_unknown_limits() -> None:
    assert parse("server", "hello", "") == EngineFacts(role="server")
