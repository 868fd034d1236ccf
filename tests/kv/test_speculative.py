"""Speculative decoding in real vLLM on CPU: drafts on decode only, on both sides, on prefill only. Answers are those of an instance without
drafts, and as many drafts are accepted as in a single instance.

One instance without drafts and one with them hand over to each other and to themselves (kv_both), so that two starts prove every
combination. Decode's salts make a prompt new to the prefix cache of the instance that also was prefill. Counts of external tokens say
that answers are from what was handed over.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import ANY

import pytest

from pdbench import server_metrics
from pdbench.serving.machine import inspect
from tests.conftest import commands, serve_config
from tests.support import drafts
from tests.support.kv import SMALL_CHUNKS, Server, new_id, prompt_of, tiny_qwen2, wait_free

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(420),
    pytest.mark.skipif((inspect().vllm or (0,)) < (0, 32), reason="drafts on CPU were tried with vLLM 0.32 only"),
]

LENGTHS = [2, 31, 32, 33, 64, 65, 127, 128, 129, 200, 300, 400]
TOKENS = 40


def counts(server):
    """Drafted and accepted tokens, as a record keeps them, and prompt tokens that came from another instance."""
    figures = server_metrics.figures(server_metrics.scrape(server.url))
    return [figures.get(name, 0) for name in ("drafted_tokens", "accepted_tokens", "external_tokens")]


def counted(server, before):
    return [after - count for after, count in zip(counts(server), before, strict=True)]


def configured(method, folder):
    """The model, vLLM's --speculative-config, and which further arguments it is served with."""
    if method == "mtp":
        return drafts.mtp(folder), {"method": "mtp", "num_speculative_tokens": 1}, ()
    if method == "ngram":
        pytest.importorskip("numba", reason="vLLM's n-gram drafts need numba")
        lookup = {"num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
        return tiny_qwen2(folder / "qwen2"), {"method": "ngram", **lookup}, SMALL_CHUNKS
    model, head = drafts.eagle(folder)
    drafter = head if method == "eagle" else model  # a model that drafts for itself is always right
    return model, {"method": method, "model": str(drafter), "num_speculative_tokens": 3}, SMALL_CHUNKS


def handed_over(source, target, prompts, expected):
    """Let `target` answer with the KV of `source`, and compare; what it counted meanwhile."""
    before = counts(target)
    for prompt, tokens in zip(prompts, expected, strict=True):
        name = new_id()
        source.prefill(prompt, name, verify_prompt=False)  # its salt would say that it is another one
        options = {"max_tokens": TOKENS, "cache_salt": "decode", "verify_prompt": False}
        got = target.decode(prompt, name, source, **options)["token_ids"]
        assert got == tokens, f"{len(prompt)} tokens from {source.log} to {target.log}"
    return counted(target, before)


def continued(source, target, prompt, tokens):
    """Let `target` go on behind the token that `source` sampled, and compare."""
    name = new_id()
    assert source.prefill(prompt, name, verify_prompt=False)["token_ids"] == tokens[:1]
    rest = {"max_tokens": TOKENS - 1, "prefilled_tokens": len(prompt), "cache_salt": "goes on", "verify_prompt": False}
    assert target.decode([*prompt, tokens[0]], name, source, **rest)["token_ids"] == tokens[1:], f"{len(prompt)} tokens"


@pytest.mark.parametrize(
    "method", ["eagle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mtp", "draft_model", "ngram"))]
)
def test_drafts_change_no_answer_and_are_as_good_as_a_single_instances(tmp_path, method):
    model, config, arguments = configured(method, tmp_path)
    options = {"connector": "tcp", "model": str(model), "kv_load_failure_policy": "fail"}
    plain = {"vllm_args": "--no-enable-prefix-caching"}
    drafting = {"vllm_args": f"--speculative-config '{json.dumps(config)}'"}
    servers = []
    for name, more in (("plain", plain), ("drafting", drafting)):
        folder = tmp_path / name
        folder.mkdir()
        (command, *_) = commands("disaggregated", serve_config(folder, **options, **more))
        servers.append(Server(command, folder, arguments, kv_role="kv_both"))
    try:
        for server in servers:
            server.wait_healthy()
        without, drafter = servers
        # Drafts by n-grams need something to repeat.
        repeats = 100 if method == "ngram" else 1
        prompts, others = (
            [(prompt_of(-(-length // repeats)) * repeats)[:length] for length in LENGTHS] for _ in range(2)
        )
        expected = [without.complete(prompt, TOKENS)["token_ids"] for prompt in prompts]
        before = counts(drafter)
        assert [drafter.complete(prompt, TOKENS)["token_ids"] for prompt in prompts] == expected
        _, accepted, _ = counted(drafter, before)
        assert accepted > 0

        assert handed_over(drafter, drafter, prompts, expected) == [ANY, accepted, sum(LENGTHS)]
        # The prefix that decode has does not travel; vLLM gives up a hit's last block where EAGLE's head needs what is behind it.
        prefix = [*prompts[LENGTHS.index(200)][:160], *prompt_of(40)]
        moved = {"eagle": 72, "mtp": 200}.get(method, 40)  # on CPU vLLM has no prefix caching with MLA
        assert handed_over(drafter, drafter, [prefix], [without.complete(prefix, TOKENS)["token_ids"]])[2] == moved

        expected = [without.complete(prompt, TOKENS)["token_ids"] for prompt in others]
        alone = handed_over(without, drafter, others, expected)
        assert alone[0] > 0 and alone[2] == sum(LENGTHS)
        # As the proxy does where it passes prefill's own token on; several at once.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(partial(continued, drafter, drafter), others, expected))
        assert handed_over(drafter, without, others, expected) == [0, 0, sum(LENGTHS)]
        wait_free(*servers)
    finally:
        for server in servers:
            server.kill()
