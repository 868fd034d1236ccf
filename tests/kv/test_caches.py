"""KV caches of other types and layouts than the fleet's, moved by real vLLM on CPU: bytes are bytes, but where they are is vLLM's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.conftest import commands, serve_config
from tests.support.kv import (
    SMALL_CHUNKS,
    Server,
    new_id,
    prompt_of,
    tiny_gemma3,
    tiny_gpt_oss,
    tiny_mistral,
    tiny_qwen2,
    wait_free,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(280)]

LENGTHS = [2, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200, 256, 257, 300, 400]
# Where a window of 64 begins in the last slot of a block of 32, the first, the second.
WINDOW_EDGES = [95, 96, 97, 127, 159, 191, 192, 193, 255, 383, 384, 385]


@pytest.mark.parametrize(
    ("model", "dtype", "arguments"),
    [
        pytest.param(tiny_gemma3, "float32", "", id="windows", marks=pytest.mark.slow),
        pytest.param(
            tiny_gemma3, "float32", "--disable-hybrid-kv-cache-manager", id="windows-whole", marks=pytest.mark.slow
        ),
        pytest.param(tiny_mistral, "float32", "", id="windows-alone", marks=pytest.mark.slow),
        pytest.param(tiny_qwen2, "bfloat16", "--kv-cache-dtype fp8", id="fp8"),
        pytest.param(tiny_qwen2, "bfloat16", "", id="bfloat16"),
        pytest.param(tiny_gpt_oss, "bfloat16", "", id="gpt-oss", marks=pytest.mark.slow),
        # As wide as bfloat16, so laid out alike.
        pytest.param(tiny_qwen2, "float16", "", id="float16", marks=pytest.mark.slow),
    ],
)
def test_decode_continues_as_a_single_instance_would(tmp_path, model, dtype, arguments):
    if "fp8" in arguments and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's fp8 cache on CPU needs AVX-512")
    options = {"dtype": dtype, "vllm_args": arguments, "kv_load_failure_policy": "fail"}
    config = serve_config(tmp_path, connector="tcp", model=str(model(tmp_path / "model")), **options)
    (command, *_) = commands("disaggregated", config)
    # It hands over to itself, and without transfer parameters it is the single instance.
    if dtype == "float32":
        arguments, salt = (*SMALL_CHUNKS, "--no-enable-prefix-caching"), {}
    else:
        # One token alone is rounded otherwise than in its chunk: the reference is what it continues with from its own cache. As
        # decode it must not have that: by its salt the prompt is another one, which the check of prompts would refuse.
        arguments, salt = SMALL_CHUNKS, {"cache_salt": "decode", "verify_prompt": False}
    server = Server(command, tmp_path, arguments, kv_role="kv_both")
    try:
        server.wait_healthy()
        if dtype == "bfloat16":
            # On a processor with AMX vLLM 0.32 dies of an illegal instruction where a few tokens come first: none of its larger steps has asked
            # the kernel for AMX then.
            server.complete(prompt_of(150))
        before, lengths = server.external_tokens(), LENGTHS + (WINDOW_EDGES if dtype == "float32" else [])
        for length in lengths:
            prompt, name = prompt_of(length), new_id()
            server.prefill(prompt, name, verify_prompt=not salt)
            assert server.decode(prompt, name, server, **salt)["text"] == server.complete(prompt)["text"], (
                f"{length} tokens"
            )
        assert server.external_tokens() - before == sum(lengths)
        if dtype == "float32":  # batches round otherwise, too
            ours = prompt_of(200)
            theirs, name = prompt_of(199) + ours[-1:], new_id()
            server.prefill(ours, name, verify_prompt=False)
            # Tokens: after bytes that are no UTF-8, as random prompts end in, vLLM repeats the prompt in the answer's text.
            swapped = server.decode(theirs, name, server, verify_prompt=False)["token_ids"]
            assert swapped == server.complete(ours)["token_ids"] != server.complete(theirs)["token_ids"]
            with ThreadPoolExecutor(32) as pool:
                prompts = {new_id(): prompt_of(20 + 25 * index) for index in range(16)}
                for name, prompt in prompts.items():
                    pool.submit(server.prefill, prompt, name)
                texts = pool.map(lambda name: server.decode(prompts[name], name, server)["text"], prompts)
                assert list(texts) == [server.complete(prompt)["text"] for prompt in prompts.values()]
        wait_free(server)
    finally:
        server.kill()
