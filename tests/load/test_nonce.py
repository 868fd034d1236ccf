"""The nonce makes every prompt of a measurement new and changes nothing else; what prompts share on purpose they still share."""

import json
from itertools import takewhile

import pytest

from pdbench.config import LoadConfig
from pdbench.load import plan
from pdbench.load.plan import PlannedRequest
from pdbench.load.prompts import Tokenizer
from tests.load.test_generator import load
from tests.support.servers import ScriptedServer, stream, tokens


def planned(tokenizer: Tokenizer, nonce: str | None, trial: int = 0, **options) -> list[PlannedRequest]:
    return list(plan.planned_requests(LoadConfig(nonce=nonce, **options), tokenizer, trial))


def common(first: str, second: str) -> int:
    """Letters that two texts have in common at their front."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def trace_file(tmp_path, *rows: tuple[int, list[int]]) -> str:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(
        "".join(
            json.dumps({"timestamp": 100 * index, "input_length": length, "output_length": 3, "hash_ids": ids}) + "\n"
            for index, (length, ids) in enumerate(rows)
        )
    )
    return str(path)


@pytest.mark.parametrize("kind", ["built-in", "short", "exact", "lognormal", "shared", "trace", "blocks", "file"])
def test_every_prompt_is_new_with_another_nonce_and_nothing_else_changes(kind, tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "own.jsonl").write_text('{"arrival_s": 0, "input_tokens": 300, "output_tokens": 9}\n' * 3)
    options = {
        "built-in": {"rate": 3.0},
        "short": {"input_tokens": 30},
        "exact": {"input_tokens": 500, "rate": 2.0},
        "lognormal": {"input_tokens": 200, "input_distribution": "lognormal", "output_distribution": "uniform"},
        "shared": {"input_tokens": 300, "shared_prefix": 0.5, "prefix_groups": 2},
        "trace": {"trace": str(tmp_path / "own.jsonl")},
        "blocks": {"trace": trace_file(tmp_path, (1500, [1, 2, 3]), (1100, [1, 2, 9]))},
        "file": {"prompt_file": str(tmp_path / "prompts.txt")},
    }[kind]
    first, again, other = (planned(tokenizer, nonce, **options) for nonce in ("a", "a", "b"))
    assert first == again
    assert not {request.prompt for request in first} & {request.prompt for request in other}
    # A block of 16 tokens is the least that vLLM caches: the prompts differ in their first.
    assert all(tokenizer.count(a.prompt[: common(a.prompt, b.prompt)]) < 16 for a in first for b in other)
    for a, b in zip(first, other, strict=True):
        assert (a.arrival_s, a.output_tokens, a.shared_tokens) == (b.arrival_s, b.output_tokens, b.shared_tokens)
        if kind not in ("built-in", "file"):
            assert a.prompt_tokens == b.prompt_tokens == tokenizer.count(a.prompt)


def test_trials_and_warm_up_share_no_prompt(tokenizer):
    config = LoadConfig(nonce="a", input_tokens=100, warmup=8)
    parts = [list(plan.planned_requests(config, tokenizer, trial)) for trial in (0, 1)]
    parts += [plan.warmup_requests(config, tokenizer, trial) for trial in (0, 1)]
    texts = [request.prompt for part in parts for request in part]
    assert len(set(texts)) == len(texts)


def test_prefix_groups_stay_shared_within_their_trial(tokenizer):
    options = {"input_tokens": 200, "shared_prefix": 0.5, "prefix_groups": 2, "requests": 4}
    first, second, third, _ = planned(tokenizer, "a", **options)
    warmup = plan.warmup_requests(LoadConfig(nonce="a", **options), tokenizer, 0)
    assert first.shared_tokens == 100
    for sharing in (third, warmup[0]):
        assert tokenizer.count(first.prompt[: common(first.prompt, sharing.prompt)]) >= 98
    other_trial = planned(tokenizer, "a", 1, **options)[0]
    for apart in (second, other_trial):
        assert tokenizer.count(first.prompt[: common(first.prompt, apart.prompt)]) < 16


def test_blocks_of_a_trace_stay_shared_and_the_shared_ones_are_counted(tokenizer, tmp_path):
    """Equal ids and lengths are equal prompts; a longer prompt continues a shorter one's last block."""
    rows = [(1024, [1, 2]), (1024, [1, 2]), (1400, [1, 2, 3]), (700, [1, 9]), (700, [8, 2])]
    requests = planned(tokenizer, "a", trace=trace_file(tmp_path, *rows))
    assert [request.shared_tokens for request in requests] == [0, 1024, 1024, 512, 0]
    assert [request.prompt_tokens for request in requests] == [length for length, _ in rows]
    assert requests[0].prompt == requests[1].prompt
    for place, tokens_shared in ((2, 1000), (3, 500)):
        both = requests[0].prompt[: common(requests[0].prompt, requests[place].prompt)]
        assert tokenizer.count(both) >= tokens_shared
    assert common(requests[0].prompt, requests[4].prompt) < 20


def flags(result):
    """Without what a busy machine makes of the client."""
    return [flag for flag in result.flags if not flag.name.startswith("client-")]


def test_prompts_of_a_file_are_numbered_unless_verbatim_where_repeats_are_told(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {index}\n" for index in range(12)))
    with ScriptedServer(stream(tokens(2))) as server:
        options = {"prompt_file": str(path), "requests": 36, "concurrency": 4, "warmup": 0, "nonce": "a"}
        result = load(server, **options)
        sent = [peer.json["prompt"] for peer in server.requests]
        assert len(set(sent)) == 36 and all(text.partition("\n")[2].startswith("prompt ") for text in sent)
        assert not flags(result)
        server.requests.clear()
        result = load(server, **options, verbatim_prompts=True)
        assert {peer.json["prompt"] for peer in server.requests} == set(path.read_text().splitlines())
    assert [flag.detail for flag in flags(result)] == ["36 requests from 12 prompts: 24 repeat"]


def test_repeated_prompts_of_token_ids_are_told(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8, 9]}\n')
    with ScriptedServer(stream(tokens(2))) as server:
        result = load(server, prompt_file=str(tmp_path / "ids.jsonl"), requests=3, warmup=0)
    assert [flag.name for flag in flags(result)] == ["prompts-repeat"]
