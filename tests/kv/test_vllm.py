"""The connector inside real vLLM on CPU: the same tokens as a single instance, and no hang, leak or wrong token in any fault.

Two prefill and two decode instances of a tiny Qwen2 (MLA: the last test); a decode instance without transfer parameters is the
single instance to compare with. Processes are really stopped, killed and restarted.
"""

import json
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdbench.kv import compat
from pdbench.serving.machine import inspect
from tests.support.kv import OUTPUT_TOKENS, PATIENCE_S, new_id, prompt_of, wait_free
from tests.support.processes import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as executor:
        yield executor


def test_equal_to_a_single_instance_at_block_edges_in_every_order(fleet, pool):
    p, _, d, single = fleet
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 126, 127, 128, 129, 130]
    lengths += [143, 144, 145, 255, 256, 257, 383, 400]
    before = d.external_tokens()
    for index, length in enumerate(lengths):
        prompt, name = prompt_of(length), new_id()
        expected = single.complete(prompt)["text"]
        if index % 3 == 0:
            p.prefill(prompt, name)
            got = d.decode(prompt, name, p)
        else:
            first = pool.submit(d.decode, prompt, name, p)
            time.sleep(0.2 * (index % 3 - 1))
            p.prefill(prompt, name)
            got = first.result()
        assert got["text"] == expected, f"{length} tokens"
    assert d.external_tokens() - before == sum(lengths) - 1  # not the 1
    assert d.metric("pdbench_kv_transfers_total", 'side="receive"') >= len(lengths)
    if compat.cache_hit_source() is not None:
        counted = d.metric("prompt_tokens_cached_by_source_total", 'source="p2p"')
        assert counted in (sum(lengths) - 1, sum(lengths))  # vLLM 0.33 counts the prompt of 1, too
    wait_free(p, d)


def test_two_prefill_and_two_decode_instances_at_once(fleet, pool):
    p0, p1, d0, d1 = fleet
    jobs = []
    for index in range(16):
        prompt, name = prompt_of(20 + 23 * index), new_id()
        p, d = (p0, p1)[index % 2], (d0, d1)[index // 2 % 2]
        jobs.append((prompt, pool.submit(p.prefill, prompt, name), pool.submit(d.decode, prompt, name, p)))
    for prompt, first, second in jobs:
        first.result()
        assert second.result()["text"] == d0.complete(prompt)["text"]
    wait_free(*fleet)


def test_prefix_that_decode_has_does_not_travel(fleet, pool):
    p, _, d, single = fleet
    first = prompt_of(200)
    second = first[:160] + prompt_of(40)
    for prompt, moved in ((first, 200), (second, 40)):
        before = d.external_tokens()
        name = new_id()
        p.prefill(prompt, name)
        assert d.decode(prompt, name, p)["text"] == single.complete(prompt)["text"]
        assert d.external_tokens() - before == moved


def test_second_turn_fetches_what_decode_has_not_and_prefill_computes_the_answer_again(fleet):
    p, _, d, single = fleet
    first, name = prompt_of(200), new_id()
    p.prefill(first, name)
    answer = d.decode(first, name, p, max_tokens=41)["token_ids"]
    second, name = [*first, *answer, *prompt_of(59)], new_id()
    before = d.external_tokens(), d.metric("pdbench_kv_bytes_total"), p.metric("prefix_cache_hits_total")
    p.prefill(second, name)
    assert d.decode(second, name, p)["text"] == single.complete(second)["text"]
    # Blocks have 32 tokens: decode has 7 of 240 tokens (the last one of the answer was never computed on), prefill has 6 of 200.
    assert d.external_tokens() - before[0] == 300 - 7 * 32
    assert p.metric("prefix_cache_hits_total") - before[2] == 6 * 32
    block_bytes = 4 * 2 * 32 * 2 * 64 * 4  # layers, K and V, tokens, heads, their size, float32
    assert d.metric("pdbench_kv_bytes_total") - before[1] == 3 * block_bytes


def turn(fleet, pool, prompt, max_tokens=OUTPUT_TOKENS, **parameters):
    """One turn for which prefill may fetch what decode has; decode's answer."""
    p, _, d, _ = fleet
    name = new_id()
    answer = pool.submit(d.decode, prompt, name, p, max_tokens=max_tokens)
    p.prefill(prompt, name, return_kv=True, **parameters)
    return answer.result()


def computed(server):
    return server.metric("prompt_tokens_by_source_total", "local_compute")


def forget(server):
    """Empty its prefix cache."""
    request = urllib.request.Request(f"{server.url}/reset_prefix_cache", method="POST")
    wait_until(server.is_free, PATIENCE_S, "all blocks freed")
    urllib.request.urlopen(request, timeout=PATIENCE_S).close()


def test_prefill_fetches_the_answer_of_the_first_turn_from_decode(fleet, pool):
    p, _, d, single = fleet
    first = prompt_of(200)
    before = computed(p), p.external_tokens(), d.external_tokens()
    answer = turn(fleet, pool, first, max_tokens=41)["token_ids"]
    assert (computed(p), p.external_tokens()) == (before[0] + 200, before[1])  # a first turn fetches nothing
    second = [*first, *answer, *prompt_of(59)]
    assert turn(fleet, pool, second)["text"] == single.complete(second)["text"]
    # Blocks have 32 tokens: prefill has 6 of the first prompt, decode 7; the other way go 3 of 10.
    assert p.external_tokens() - before[1] == 32
    assert computed(p) - before[0] == 200 + 300 - 7 * 32
    assert d.external_tokens() - before[2] == 200 + 300 - 7 * 32
    third = [*second, *prompt_of(100)]
    before = p.external_tokens()
    assert turn(fleet, pool, third)["text"] == single.complete(third)["text"]
    assert p.external_tokens() == before  # prefill has all that decode has
    wait_free(*fleet)


def test_blocks_that_decode_has_lost_are_computed(fleet, pool):
    p, _, d, single = fleet
    first = prompt_of(200)
    answer = turn(fleet, pool, first, max_tokens=41)["token_ids"]
    second = [*first, *answer, *prompt_of(59)]
    forget(d)
    before = computed(p), p.external_tokens()
    assert turn(fleet, pool, second)["text"] == single.complete(second)["text"]
    assert (computed(p) - before[0], p.external_tokens() - before[1]) == (300 - 192, 0)
    wait_free(*fleet)


def test_prefill_continues_from_the_kv_that_decode_returns(fleet, pool):
    """Proof by another prompt's blocks: decode has those of `theirs`, and prefill's answer is that of `theirs` up to where they end."""
    p, _, d, single = fleet
    common = prompt_of(32)
    for _ in range(20):  # a random model answers some prompts alike
        ours, theirs = [*common, *prompt_of(68)], [*common, *prompt_of(68)]
        mixed = [*theirs[:96], *ours[96:]]
        expected = single.complete(mixed)["token_ids"]
        if expected != single.complete(ours)["token_ids"]:
            break
    else:
        raise AssertionError("this model's answers do not depend on the prompt")
    d.complete(theirs)
    p.complete(common, max_tokens=1)
    name, before = new_id(), p.external_tokens()
    other = pool.submit(d.decode, theirs, name, p, verify_prompt=False)
    got = p.complete(ours, transfer_id=name, do_remote_decode=True, return_kv=True, verify_prompt=False)["token_ids"]
    assert got == expected
    assert p.external_tokens() - before == 64
    other.result()
    wait_free(p, d)


def test_second_turns_of_many_conversations_at_once(fleet, pool):
    p0, p1, d0, d1 = fleet
    turns = []
    for index in range(8):
        p, d = (p0, p1)[index % 2], (d0, d1)[index // 2 % 2]
        first = prompt_of(40 + 23 * index)
        turns.append(((p, None, d, None), first, pool.submit(turn, (p, None, d, None), pool, first, 70)))
    seconds = []
    for pair, first, answer in turns:
        prompt = [*first, *answer.result()["token_ids"], *prompt_of(33)]
        seconds.append((prompt, pool.submit(turn, pair, pool, prompt)))
    for prompt, answer in seconds:
        answer.result()
        assert answer.result()["text"] == d1.complete(prompt)["text"]
    wait_free(*fleet)


@pytest.mark.parametrize("leaves", ["prefill", "decode"])
def test_client_that_leaves_in_a_second_turn_leaves_nothing_behind(fleet, pool, leaves):
    p, other, d, _ = fleet
    host, port = p.kv_address.split(":")
    sends = {"do_remote_decode": True, "return_kv": True}
    fetches = {"do_remote_prefill": True, "remote_host": host, "remote_port": int(port)}
    for after_s in (0.0, 0.01, 0.03, 0.1):
        first, name = prompt_of(200), new_id()
        second = [*first, *turn(fleet, pool, first, max_tokens=41)["token_ids"], *prompt_of(50)]
        expected = other.complete(second)["text"]
        gone, stays = (p, d) if leaves == "prefill" else (d, p)
        parameters = {p: sends, d: fetches}
        answer = pool.submit(stays.complete, second, transfer_id=name, **parameters[stays])
        gone.abandon(second, after_s, transfer_id=name, **parameters[gone])
        assert answer.result()["text"] == expected
    wait_free(p, d)


def test_stopped_decode_returns_nothing_and_prefill_computes(fleet, pool):
    p, other, d, _ = fleet
    first = prompt_of(200)
    answer = turn(fleet, pool, first, max_tokens=41)["token_ids"]
    second, name = [*first, *answer, *prompt_of(59)], new_id()
    expected = other.complete(second)["text"]
    p.signal(signal.SIGSTOP)
    try:
        continued = pool.submit(d.decode, second, name, p)
        wait_until(lambda: continued.done() or d.metric("kv_cache_usage_perc") > 0, PATIENCE_S, "decode has asked")
        d.signal(signal.SIGSTOP)
        asked = pool.submit(p.complete, second, transfer_id=name, do_remote_decode=True, return_kv=True)
    finally:
        p.signal(signal.SIGCONT)
    try:
        assert asked.result()["text"] == expected
    finally:
        d.signal(signal.SIGCONT)
    assert continued.result()["text"] == expected
    wait_free(p, d)
    third = [*second, *prompt_of(70)]
    assert turn(fleet, pool, third)["text"] == other.complete(third)["text"]


def test_swapped_kv_gives_the_other_prompts_answer(fleet):
    """Proof that decode continues from what prefill computed: only the last token is decode's own."""
    p, _, d, single = fleet
    ours = prompt_of(100)
    theirs = prompt_of(99) + ours[-1:]
    name = new_id()
    p.prefill(ours, name, verify_prompt=False)
    # Tokens: after bytes that are no UTF-8, as random prompts end in, vLLM repeats the prompt in the answer's text.
    got = d.decode(theirs, name, p, verify_prompt=False)["token_ids"]
    assert got == single.complete(ours)["token_ids"] != single.complete(theirs)["token_ids"]


def test_mixed_up_transfer_id_never_gives_a_wrong_token(fleet):
    p, _, d, failing = fleet
    ours, theirs, name = prompt_of(50), prompt_of(50), new_id()
    p.prefill(ours, name)
    expected = p.complete(theirs)["text"]
    assert d.decode(theirs, name, p)["text"] == expected
    with pytest.raises(urllib.error.HTTPError):
        failing.decode(theirs, name, p)
    assert d.decode(ours, name, p)["text"] == p.complete(ours)["text"]  # its own request is still served
    assert d.decode(ours, name, p)["text"] == p.complete(ours)["text"]  # and a replay recomputes
    wait_free(p, d, failing)


def test_decode_without_prefill_recomputes_or_fails_within_the_timeout(fleet, pool):
    p, _, d, failing = fleet
    prompt = prompt_of(60)
    refused = pool.submit(failing.decode, prompt_of(60), new_id(), p)
    assert d.decode(prompt, new_id(), p)["text"] == p.complete(prompt)["text"]
    with pytest.raises(urllib.error.HTTPError):
        refused.result()
    wait_free(d, failing)


@pytest.mark.parametrize("wrong", [{"remote_port": None}, {"remote_port": "x"}, {"transfer_id": "t" * 300}], ids=str)
def test_parameters_that_make_no_sense_are_ignored(fleet, wrong):
    p, _, d, failing = fleet
    prompt = prompt_of(60)
    parameters = {"transfer_id": new_id(), "remote_host": "127.0.0.1", "remote_port": 14579, **wrong}
    expected = p.complete(prompt)["text"]
    p.complete(prompt, max_tokens=1, **parameters, do_remote_decode=True)
    for server in (d, failing):
        assert server.complete(prompt, **parameters, do_remote_prefill=True)["text"] == expected
    wait_free(p, d, failing)


def test_prefill_that_is_sent_twice_is_freed_twice(fleet):
    p, _, d, _ = fleet
    prompt, name = prompt_of(100), new_id()
    p.prefill(prompt, name)
    p.prefill(prompt, name)
    assert d.decode(prompt, name, p)["text"] == p.complete(prompt)["text"]
    wait_free(p, d)


def test_prefill_without_decode_is_freed(fleet):
    p, *_ = fleet
    p.prefill(prompt_of(300), new_id())
    assert p.metric("kv_cache_usage_perc") > 0
    wait_free(p)


def test_disconnected_clients_leave_nothing_behind(fleet, pool):
    p, _, d, _ = fleet
    host, port = p.kv_address.split(":")
    name = new_id()
    d.abandon(prompt_of(100), 0.5, transfer_id=name, do_remote_prefill=True, remote_host=host, remote_port=int(port))
    wait_free(d)
    for after_s in (0.0, 0.02, 0.05):
        prompt, name = prompt_of(450), new_id()
        answer = pool.submit(d.decode, prompt, name, p)
        p.abandon(prompt, after_s, transfer_id=name, do_remote_decode=True)
        assert answer.result()["text"] == p.complete(prompt)["text"]
    wait_free(p, d)


def test_stopped_prefill_is_not_waited_for_and_serves_again(fleet, pool):
    p, other, d, _ = fleet
    prompt, name = prompt_of(80), new_id()
    expected = other.complete(prompt)["text"]
    p.signal(signal.SIGSTOP)
    try:
        first = pool.submit(p.prefill, prompt, name)
        assert d.decode(prompt, name, p)["text"] == expected
    finally:
        p.signal(signal.SIGCONT)
    first.result()
    wait_free(p, d)
    prompt, name = prompt_of(80), new_id()
    p.prefill(prompt, name)
    before = d.external_tokens()
    assert d.decode(prompt, name, p)["text"] == other.complete(prompt)["text"]
    assert d.external_tokens() - before == 80


def test_stopped_decode_does_not_hold_prefills_blocks(fleet, pool):
    p, _, d, _ = fleet
    prompt, name = prompt_of(80), new_id()
    d.signal(signal.SIGSTOP)
    try:
        answer = pool.submit(d.decode, prompt, name, p)
        p.prefill(prompt, name)
        wait_free(p)
    finally:
        d.signal(signal.SIGCONT)
    assert answer.result()["text"] == p.complete(prompt)["text"]
    wait_free(d)


def test_killed_instances_harm_no_other_and_serve_again_after_a_restart(fleet, pool):
    p, doomed_prefill, d, doomed_decode = fleet
    prompt = prompt_of(90)
    waiting = pool.submit(d.decode, prompt, new_id(), doomed_prefill)
    held = new_id()
    other = pool.submit(doomed_decode.decode, prompt_of(70), held, p)
    time.sleep(1.0)
    doomed_prefill.kill()
    doomed_decode.kill()
    assert waiting.result()["text"] == p.complete(prompt)["text"]
    with pytest.raises((OSError, urllib.error.URLError)):
        other.result()
    p.prefill(prompt_of(70), held)
    wait_free(p, d)
    doomed_prefill.start()
    doomed_decode.start()
    doomed_prefill.wait_healthy()
    doomed_decode.wait_healthy()
    for source, target in ((doomed_prefill, d), (p, doomed_decode)):
        prompt, name = prompt_of(90), new_id()
        source.prefill(prompt, name)
        before = target.external_tokens()
        assert target.decode(prompt, name, source)["text"] == p.complete(prompt)["text"]
        assert target.external_tokens() - before == 90
    wait_free(*fleet)


@pytest.mark.skipif((inspect().vllm or (0,)) < (0, 29), reason="before 0.29 vLLM has no MLA on CPU")
def test_mla_equals_a_single_instance(disaggregated, single):
    """The same over the shared deployment's tiny DeepSeek-V2, whose cache has one part a layer, through the proxy."""
    for length in [2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 255, 257, 400]:
        prompt = prompt_of(length)
        texts = []
        for running in (single, disaggregated):
            body = {
                "model": running.model_name,
                "prompt": prompt,
                "max_tokens": OUTPUT_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{running.url}/v1/completions", data, headers)
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                texts.append(json.load(answer)["choices"][0]["text"])
        assert texts[0] == texts[1], f"{length} tokens"
