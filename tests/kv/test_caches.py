"""KV caches of other types than float32, moved by real vLLM on CPU: bytes are bytes, but their layout is vLLM's.

The reference is prefill's own answer. Decode's would do as well until it has the prompt in its prefix cache.
"""

import pytest
import torch

from tests.conftest import commands, serve_config
from tests.support.kv import Server, new_id, prompt_of, tiny_qwen2, wait_free

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(280)]

LENGTHS = [2, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200, 256, 257, 300, 400]


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        pytest.param("bfloat16", "--kv-cache-dtype fp8", id="fp8"),
        pytest.param("bfloat16", "", id="bfloat16"),
        # As wide as bfloat16, so laid out alike.
        pytest.param("float16", "", id="float16", marks=pytest.mark.slow),
    ],
)
def test_decode_continues_as_prefill_would(tmp_path, dtype, arguments):
    if arguments and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's fp8 cache on CPU needs AVX-512")
    model = str(tiny_qwen2(tmp_path / "tiny-qwen2"))
    options = {"dtype": dtype, "vllm_args": arguments, "kv_load_failure_policy": "fail"}
    config = serve_config(tmp_path, connector="tcp", model=model, **options)
    servers = [Server(command, tmp_path) for command in commands("disaggregated", config)[:2]]
    p, d = servers
    try:
        for server in servers:
            server.wait_healthy()
        before = d.external_tokens()
        for length in LENGTHS:
            prompt, name = prompt_of(length), new_id()
            p.prefill(prompt, name)
            assert d.decode(prompt, name, p)["text"] == p.complete(prompt)["text"], f"{length} tokens"
        assert d.external_tokens() - before == sum(LENGTHS)
        wait_free(p, d)
    finally:
        for server in servers:
            server.kill()
