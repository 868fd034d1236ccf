"""Arrivals against theory, prompts of exact lengths and the same bytes everywhere, trace formats and their malformed rows."""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise

import numpy
import pytest
import tokenizers
from scipy import stats

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import arrivals, plan, prompts
from pdbench.load.prompts import exact_text
from pdbench.load.request_fields import request_body
from pdbench.load.tokenizer import Tokenizer, load_tokenizer
from pdbench.serving.models import shape_model
from tests.support.servers import ScriptedServer


def gaps(instants, count: int = 4000) -> numpy.ndarray:
    return numpy.diff([0.0, *islice(instants, count)])


@pytest.mark.parametrize("arrival", ["poisson", "gamma"])
def test_arrivals_of_every_trial_come_at_their_rate(arrival):
    """n requests in n / rate seconds, whatever the trial: only their places differ."""
    plans = []
    for trial in range(3):
        config = LoadConfig(rate=8.0, requests=100, arrival=arrival, burstiness=0.5)
        plans.append([request.arrival_s for request in plan.planned_requests(config, None, trial)])
    assert all(len(instants) == 100 and 10 < instants[-1] < 100 / 8 for instants in plans)
    assert plans[0] != plans[1] != plans[2]
    config = LoadConfig(rate=8.0, duration_s=30.0, arrival=arrival)
    assert [sum(1 for _ in plan.planned_requests(config, None, trial)) for trial in range(3)] == [240] * 3


def test_scaled_poisson_arrivals_are_uniform_in_their_span():
    instants = [i for trial in range(20) for i in arrivals.scaled(arrivals.gamma(5.0, 1.0, trial), 200, 40.0)]
    assert stats.kstest(instants, stats.uniform(0, 40).cdf).pvalue > 0.01


@pytest.mark.parametrize("count", [4, 16, 100])
def test_scaled_arrivals_have_their_rate_between_the_first_and_the_last(count):
    """Uniform in their span they would come 1 / count too close together: 16 requests at 10.6/s for 10."""
    gap_s = [
        numpy.diff(list(arrivals.scaled(arrivals.gamma(3.0, 1.0, trial), count, count / 10))) for trial in range(4000)
    ]
    assert numpy.mean(gap_s) == pytest.approx(0.1, rel=0.03)
    assert list(arrivals.scaled(arrivals.gamma(3.0, 1.0, 1), 0, 1.0)) == []


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_requested_shape(burstiness):
    theory = stats.gamma(burstiness, scale=1 / (5.0 * burstiness))
    assert stats.kstest(gaps(arrivals.gamma(5.0, burstiness, 1)), theory.cdf).pvalue > 0.01


def test_constant_gaps():
    assert gaps(arrivals.constant(4.0), 100) == pytest.approx(0.25)


@pytest.mark.parametrize(("start", "end"), [(0.0, 20.0), (20.0, 2.0), (5.0, 5.0)])
def test_ramp_arrivals_follow_the_integral_of_the_rate(start, end):
    phases = [(start, end, 200.0), (end, end, math.inf)]
    instants = list(itertools.takewhile(lambda at_s: at_s < 300.0, arrivals.changing(phases, 3)))
    for until_s in (100.0, 200.0, 300.0):
        rate = start + (end - start) * min(until_s, 200.0) / 200.0
        expected = (start + rate) / 2 * min(until_s, 200.0) + end * max(0.0, until_s - 200.0)
        assert sum(at_s < until_s for at_s in instants) == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert instants == sorted(instants)


def test_a_ramp_that_hardly_rises_sends_as_its_constant_rate_does():
    level, rising = (list(arrivals.changing([(8.0, top, 10.0)], 0)) for top in (8.0, 8.000000000000002))
    assert len(level) > 50 and rising == pytest.approx(level)


def test_stages_have_their_rates_and_end():
    instants = list(arrivals.changing(arrivals.read_stages("10:100,0:50,40:50"), 2))
    counts = [
        sum(start <= at_s < start + length for at_s in instants) for start, length in [(0, 100), (100, 50), (150, 50)]
    ]
    assert counts[1] == 0 and counts[0] == pytest.approx(1000, abs=130) and counts[2] == pytest.approx(2000, abs=180)
    assert instants[-1] < 200 and instants == sorted(instants)


def test_arrivals_depend_on_their_seed_alone():
    first, again, other = (list(islice(arrivals.gamma(3.0, 1.0, seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] == pytest.approx(0.3843090, abs=1e-6)


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2,3", "-1:5", "1:0", "nan:1"])
def test_bad_stages_are_refused_with_the_wrong_part(text):
    with pytest.raises(UserError, match="--stages"):
        arrivals.read_stages(text)


def test_trace_stages_and_ramp_are_sent_to_their_end_unless_told_otherwise(tmp_path, tokenizer):
    (tmp_path / "own.jsonl").write_text('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 1}\n' * 40)
    trace, ramp = {"trace": str(tmp_path / "own.jsonl")}, {"rate": 1.0, "ramp_to": 9.0, "ramp_s": 20.0}

    def count(**options) -> int:
        return len(list(plan.planned_requests(LoadConfig(**options), tokenizer, 0)))

    assert count(**trace) == 40 and count(**trace, requests=7) == 7
    assert count(stages="4:10,10:10") == pytest.approx(140, abs=40) and count(stages="4:10", requests=3) == 3
    assert count(**ramp) == pytest.approx(100, abs=35) and count(**ramp, requests=200) == 200
    assert count(**ramp, duration_s=2.0) == pytest.approx(3, abs=3)
    assert count(rate=3.0) == 16 == count()


def test_built_in_prompts_are_real_english_and_chinese_of_varying_length(tokenizer):
    planned = list(plan.planned_requests(LoadConfig(requests=16), tokenizer, 0))
    texts = [prompts.built_in(index, f"({index})") for index in range(16)]
    assert len(set(texts)) == 16
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts) >= 6
    assert len({request.prompt_tokens for request in planned}) > 8
    assert max(len(text.encode()) for text in texts) < 448


@pytest.mark.parametrize("tokens", [2, 5, 17, 100, 1000])
def test_prompts_have_exactly_the_requested_tokens(tokenizer, tokens):
    for index in range(5):
        assert tokenizer.count(prompts.of_length(tokens, f"seed-{index}", tokenizer)) == tokens


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b""])
def test_unreachable_hub_is_given_up_at_once(answer, tmp_path):
    with ScriptedServer(lambda peer: peer.write(answer)) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        code = "from pdbench.load import plan; from pdbench.config import LoadConfig\n"
        code += "plan.find_tokenizer(LoadConfig(input_tokens=8), 'some/model')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    assert "give --tokenizer FOLDER" in done.stderr.splitlines()[-1]
    assert hub.connections <= 2 and "Retrying" not in done.stderr  # the library connects again once


def test_impossible_length_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="0 tokens"):
        exact_text(iter(["a"]), 0, tokenizer)


def test_shared_prefix_is_shared_within_its_group_only(tokenizer):
    def made(group: str, seed: str) -> str:
        prompt = prompts.of_length(200, seed, tokenizer, shared=0.5, group=group)
        assert tokenizer.count(prompt) == 200
        return prompt

    first, second, other = made("a", "1"), made("a", "2"), made("b", "3")
    common = next(index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert 95 <= tokenizer.count(first[:common]) <= 110
    assert first[:20] != other[:20]


def test_same_seed_gives_same_bytes_on_every_machine():
    texts = [prompts.built_in(index, f"(0-{index})") for index in range(32)]
    texts += list(islice(prompts.sentences_in_random_order("0/0/1"), 50))
    assert hashlib.sha256("".join(texts).encode()).hexdigest()[:16] == DIGEST


DIGEST = "d8bb64d861d0a7b4"


# Warm-up and load of `planned_texts`, by whether prompts share a prefix.
PROMPT_DIGESTS = {0.0: "be48647188f2b52d", 0.5: "07e3ab78fda8771c"}


def planned_texts(tokenizer: Tokenizer, **options) -> list[str]:
    config = LoadConfig(rate=16.0, output_tokens=8, nonce="abc", seed=3, **options)
    return [
        request.text
        for request in (*plan.warmup_requests(config, tokenizer, 0)[:3], *plan.planned_requests(config, tokenizer, 0))
    ]


def test_same_seed_and_nonce_give_the_same_long_prompts(tmp_path):
    tokenizer = load_tokenizer(str(shape_model(tmp_path)))
    assert tokenizer is not None
    texts = {
        0.0: planned_texts(tokenizer, input_tokens=2048, requests=5),
        0.5: planned_texts(tokenizer, input_tokens=700, shared_prefix=0.5, prefix_groups=2, requests=8),
    }
    digests = {share: hashlib.sha256("\0".join(each).encode()).hexdigest()[:16] for share, each in texts.items()}
    assert digests == PROMPT_DIGESTS
    assert {tokenizer.count(text) for text in texts[0.0]} == {2048}
    lasts = {tokenizer.decode(tokenizer.encode(text)[-1:]) for part in texts.values() for text in part}
    assert all("\ufffd" not in last for last in lasts), (
        "a model that repeats a piece of a character answers without text"
    )


def trained(kind: str) -> Tokenizer:
    """A tokenizer trained on the built-in texts: of words, of whatever (tokens go on over spaces), or as Llama 2's."""
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    alphabet = [*"0123456789No."] if kind == "llama" else tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>"], initial_alphabet=alphabet)
    if kind == "llama":
        encoder.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        )
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.Split("\u2581", "merged_with_next")
        decoders = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Fuse()]
        encoder.decoder = tokenizers.decoders.Sequence([*decoders, tokenizers.decoders.Strip(" ", 1, 0)])
    else:
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "words")
        encoder.decoder = tokenizers.decoders.ByteLevel()
    encoder.train_from_iterator(prompts.passages(), trainer)
    return Tokenizer(lambda text: encoder.encode(text).ids, encoder.decode, added=0)


@pytest.mark.parametrize(("kind", "is_known"), [("words", True), ("llama", True), ("across spaces", False)])
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_known_sentences_are_those_whose_whole_text_is_encoded(kind, is_known, chat):
    tokenizer = trained(kind).for_chat(9) if chat else trained(kind)
    assert (prompts._known_sentences(tokenizer) is not None) == is_known
    for tokens in (90, 91, 92, 150, 400, 401):
        seed = f"seed-{tokens}"
        whole = exact_text(prompts.sentences_in_random_order(seed), tokens, tokenizer, prompts.number(seed))
        assert prompts.of_length(tokens, seed, tokenizer) == whole
        assert tokenizer.count(whole) == tokens


def test_tokenizer_whose_sentences_are_not_their_words_tokens_is_not_trusted(tokenizer):
    """What stands before a sentence changes its tokens."""
    ids = tokenizer.encode

    def encode(text: str) -> list[int]:
        return [*ids(text), *([0] if "tea" in text.partition("day")[0] else [])]

    assert prompts._known_sentences(replace(tokenizer, encode=encode)) is None
    assert prompts._known_sentences(replace(tokenizer, is_remote=True)) is None


def test_length_distributions():
    uniform = [prompts.length(100, "uniform", 0.5, f"{index}") for index in range(3000)]
    assert min(uniform) >= 50 and max(uniform) <= 150 and numpy.mean(uniform) == pytest.approx(100, rel=0.03)
    lognormal = [prompts.length(100, "lognormal", 0.8, f"{index}") for index in range(8000)]
    assert numpy.mean(lognormal) == pytest.approx(100, rel=0.06)
    assert numpy.std(numpy.log(lognormal)) == pytest.approx(0.8, rel=0.05)
    assert prompts.length(100, "fixed", 0.8, "x") == 100


def test_plan_is_the_same_for_every_process(tokenizer):
    config = LoadConfig(
        rate=5.0, input_tokens=50, input_distribution="lognormal", output_distribution="uniform", requests=20
    )
    first, again, other = (list(plan.planned_requests(config, tokenizer, trial)) for trial in (0, 0, 1))
    assert first == again and first != other and len(first) == 20
    assert all(earlier.arrival_s < later.arrival_s for earlier, later in pairwise(first))
    shares = [list(plan.planned_requests(config, tokenizer, 0, client, 3)) for client in range(3)]
    assert [share == first[client::3] for client, share in enumerate(shares)] == [True] * 3
    warmup = plan.warmup_requests(config, tokenizer, 0)
    assert warmup[1::4] == plan.warmup_requests(config, tokenizer, 0, 1, 4)
    assert len(warmup) == 10 and warmup[0].prompt not in {request.prompt for request in first}


def test_streams_of_a_closed_loop_get_as_many_requests_in_several_processes() -> None:
    config = LoadConfig(concurrency=5, requests=40)
    shares = [[each.index for each in plan.planned_requests(config, None, 0, client, 4)] for client in range(4)]
    assert [len(share) for share in shares] == [16, 8, 8, 8] and sorted(
        index for share in shares for index in share
    ) == [*range(40)]


def test_request_bodies():
    body = json.loads(request_body(LoadConfig(extra_body='{"top_k": 1}'), "m", "Hi", 7))
    assert body["prompt"] == "Hi" and body["max_tokens"] == 7 and body["return_token_ids"] and body["top_k"] == 1
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and "ignore_eos" not in body
    config = LoadConfig(endpoint="chat", input_tokens=5, token_ids=False)
    body = json.loads(request_body(config, "m", "Hi", 7))
    assert (
        body["messages"] == [{"role": "user", "content": "Hi"}]
        and body["ignore_eos"]
        and "return_token_ids" not in body
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 1.0, "stages": "1:1"},
        {"ramp_to": 2.0},
        {"trace": "t.csv", "prompt_file": "p.txt"},
        {"client_processes": 3, "concurrency": 2},
        {"client_processes": 2, "concurrency": 2, "steady_s": 1.0},
        {"stages": "1:0"},
        {"extra_body": "[1]"},
        {"extra_body": "{"},
        {"extra_body": '{"top_k": NaN}'},
        {"extra_body": '{"user": "\\ud83d"}'},
        {"extra_body": '{"prompt": "the same for all"}'},
        {"extra_body": '{"stream": false}'},
        {"stages": "1:x"},
        {"shared_prefix": 0.5},
    ],
)
def test_contradicting_options_are_a_user_error(options):
    with pytest.raises(UserError, match="--"):
        plan.check(LoadConfig(**options))


@pytest.mark.parametrize("option", ["trace", "prompt_file", "tokenizer"])
def test_missing_file_is_found_before_anything_starts(tmp_path, option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}.*"):
        plan.check_files(LoadConfig(**{option: str(tmp_path / "none.csv")}))


def test_exact_lengths_need_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="--tokenizer"):
        plan.find_tokenizer(LoadConfig(input_tokens=5), str(tmp_path))
    assert plan.find_tokenizer(LoadConfig(), str(tmp_path)) is None


def test_prefill_phase_generates_one_token_and_decode_phase_needs_one_batch() -> None:
    (planned,) = plan.planned_requests(LoadConfig(phase="prefill", requests=1), None, 0)
    body = json.loads(request_body(LoadConfig(phase="prefill"), "m", planned.prompt, planned.output_tokens))
    assert body["max_tokens"] == 1
    plan.check(LoadConfig(phase="decode", requests=4, concurrency=4))
    for mixed in (
        LoadConfig(phase="decode", requests=5, concurrency=4),
        LoadConfig(phase="decode", requests=1, rate=1.0),
    ):
        with pytest.raises(UserError, match="one batch"):
            plan.check(mixed)


def test_prompt_file_of_another_node_is_left_out_of_the_description() -> None:
    words = plan.describe(LoadConfig(prompt_file="/only/on/another/node.jsonl", requests=8, nonce="n"))
    assert words == "1 at a time, 8 requests, at most 64 tokens out, after a warm-up of 2, nonce n"
