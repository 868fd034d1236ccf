"""The scheduler's half with vLLM's own request and step objects: what is planned, kept and dropped."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, RSWASpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from pdbench.kv import compat
from pdbench.kv.messages import Options, fingerprint
from pdbench.kv.scheduler import KvScheduler

BLOCK = 16


@dataclass
class Blocks:
    """The one method of vLLM's KVCacheBlocks that matters here."""

    ids: list

    def get_block_ids(self):
        return (self.ids,)


def request_of(tokens, name="r", **parameters):
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": parameters} if parameters else None)
    request = Request(name, list(range(tokens)), sampling, None)
    request.status = RequestStatus.RUNNING
    return request


def prefill_of(tokens, name="r", transfer_id="t"):
    return request_of(tokens, name, transfer_id=transfer_id, do_remote_decode=True)


def decode_of(tokens, name="r", transfer_id="t"):
    there = {"remote_host": "127.0.0.1", "remote_port": 14579}
    return request_of(tokens, name, transfer_id=transfer_id, do_remote_prefill=True, **there)


def step_of(scheduled, new=(), cached=(), resumed=(), preempted=()):
    """vLLM's step: {request id: tokens}, new [(id, blocks, computed)], cached [(id, new blocks or None, computed)]."""
    news = [NewRequestData(name, None, [], None, None, (blocks,), computed, None) for name, blocks, computed in new]
    names = [name for name, _, _ in cached]
    blocks = [None if blocks is None else (blocks,) for _, blocks, _ in cached]
    counts = [computed for _, _, computed in cached]
    old = CachedRequestData(names, set(resumed), [], {}, blocks, counts, [0] * len(names))
    return replace(
        SchedulerOutput.make_empty(),  # whatever else this vLLM's steps have
        scheduled_new_reqs=news,
        scheduled_cached_reqs=old,
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=set(preempted),
    )


@pytest.fixture
def producer():
    return KvScheduler(Options(), BLOCK, produces=True, consumes=False)


@pytest.fixture
def consumer():
    return KvScheduler(Options(), BLOCK, produces=False, consumes=True)


def test_a_prefill_in_chunks_is_reported_as_it_is_computed(producer):
    request = prefill_of(100)
    producer.new_request(request)
    plan = producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    assert [prompt.transfer_id for prompt in plan.expected] == ["t"] and not plan.idle
    assert (plan.prefilled[0].blocks, plan.prefilled[0].replace, plan.prefilled[0].computed_tokens) == (
        [1, 2, 3],
        True,
        40,
    )
    plan = producer.plan_step(step_of({"r": 40}, cached=[("r", [4, 5], 40)]))
    assert (plan.prefilled[0].blocks, plan.prefilled[0].replace, plan.prefilled[0].computed_tokens) == (
        [4, 5],
        False,
        80,
    )
    plan = producer.plan_step(step_of({"r": 20}, cached=[("r", None, 80)]))  # no new block: the chunk fits the old ones
    assert (plan.prefilled[0].blocks, plan.prefilled[0].computed_tokens) == ([], 100)
    assert (
        producer.plan_step(step_of({"r": 1}, cached=[("r", [6], 100)])).prefilled == []
    )  # it decodes: nothing to hand over
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert producer.finished(request) is True and producer.has_unsent_plan()
    plan = producer.plan_step(step_of({}))
    assert plan.idle and plan.ended[0].kept and plan.ended[0].error is None
    assert not producer.has_unsent_plan()


def test_a_preempted_prefill_starts_again(producer):
    producer.new_request(prefill_of(100))
    producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    assert producer.plan_step(step_of({}, preempted=["r", "another"])).preempted == ["r"]
    plan = producer.plan_step(step_of({"r": 100}, cached=[("r", [9, 8, 7, 6, 5, 4, 3], 0)], resumed=["r"]))
    assert plan.prefilled[0].replace and plan.prefilled[0].computed_tokens == 100


@pytest.mark.parametrize("scheduled", [True, False])
def test_an_aborted_prefill_is_told_and_kept_only_if_it_had_blocks(producer, scheduled):
    request = prefill_of(100)
    producer.new_request(request)
    if scheduled:
        producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    request.status = RequestStatus.FINISHED_ABORTED
    assert producer.finished(request) is scheduled
    assert producer.plan_step(step_of({})).ended[0].error == "prefill ended as aborted"


def test_a_transfer_id_in_use_is_not_handed_over_twice(producer):
    producer.new_request(prefill_of(20, "a"))
    producer.new_request(prefill_of(20, "b"))
    assert len(producer.plan_step(step_of({})).expected) == 1


def test_requests_without_transfer_are_left_alone(producer, consumer):
    for half in (producer, consumer):
        request = request_of(50)
        half.new_request(request)
        assert half.matched_tokens(request, 0) == (0, False)
        half.allocated(request, Blocks([1, 2, 3, 4]), 0)
        request.status = RequestStatus.FINISHED_STOPPED
        assert half.finished(request) is False and not half.has_unsent_plan()


def test_decode_fetches_what_it_lacks_once(consumer):
    request = decode_of(100)
    assert consumer.matched_tokens(request, 32) == (68, True)
    assert consumer.matched_tokens(request, 32) == (68, True)  # asked again until there is room
    consumer.allocated(request, Blocks([1, 2, 3, 4, 5, 6, 7, 8]), 68)
    (fetch,) = consumer.plan_step(step_of({})).fetches
    assert (fetch.start_block, fetch.blocks, fetch.host, fetch.port) == (2, [3, 4, 5, 6, 7], "127.0.0.1", 14579)
    assert consumer.matched_tokens(request, 0) == (0, False)  # after a failure or a preemption it computes by itself
    request.status = RequestStatus.FINISHED_STOPPED
    assert consumer.finished(request) is False and not consumer.has_unsent_plan()


@pytest.mark.parametrize("fetched", [True, False])
def test_an_aborted_decode_is_told_to_prefill(consumer, fetched):
    request = decode_of(100)
    if fetched:
        consumer.allocated(request, Blocks(list(range(7))), 100)
        consumer.plan_step(step_of({}))
    request.status = RequestStatus.FINISHED_ABORTED
    assert consumer.finished(request) is False
    assert [drop.transfer_id for drop in consumer.plan_step(step_of({})).drops] == ["t"]


def test_decode_that_needs_nothing_lets_prefill_free_its_blocks(consumer):
    request = decode_of(100)
    consumer.allocated(request, Blocks([1]), 0)
    plan = consumer.plan_step(step_of({"r": 100}, new=[("r", [1], 0)]))
    assert [drop.transfer_id for drop in plan.drops] == ["t"] and not plan.fetches


def embedded(value):
    """The fingerprint of a prompt that was given as embeddings, which has no token ids."""
    half = KvScheduler(Options(), BLOCK, produces=True, consumes=False)
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    embeddings = torch.full((20, 8), value, dtype=torch.bfloat16)
    half.new_request(Request("r", None, sampling, None, prompt_embeds=embeddings))
    (prompt,) = half.plan_step(step_of({})).expected
    assert prompt.tokens == 20
    return prompt.fingerprint


def test_fingerprints_tell_prompts_and_their_circumstances_apart(consumer, producer):
    assert fingerprint([1, 2, 3]) == fingerprint((1, 2, 3)) != fingerprint([1, 2, 4])
    assert fingerprint([1, 2], "lora") != fingerprint([1, 2], None) != fingerprint([1, 2, 0])
    assert embedded(1.0) == embedded(1.0) != embedded(2.0)
    producer.new_request(prefill_of(20))
    consumer.allocated(decode_of(20), Blocks([1, 2]), 20)
    here, there = producer.plan_step(step_of({})).expected[0], consumer.plan_step(step_of({})).fetches[0].prompt
    assert (here.transfer_id, here.tokens, here.fingerprint) == (there.transfer_id, there.tokens, there.fingerprint)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.9.2", "dev"])
def test_vllm_outside_the_range_is_refused_with_the_range(version):
    with pytest.raises(compat.UnsupportedError, match=r"0\.26 to 0\.33"):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1rc1+cpu", "0.30.0.dev3"])
def test_vllm_of_the_range_is_accepted(version):
    compat.check_version(version)
    compat.check_version()


def deployment_of(specs, sleep=False, **parallel):
    """(vLLM configuration, KV cache configuration), as far as the connector reads them; the groups' specs are vLLM's own."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(enable_sleep_mode=sleep)
    )
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


SIZES = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float16}
FULL, WINDOW = FullAttentionSpec(**SIZES), SlidingWindowSpec(**SIZES, sliding_window=64)


@pytest.mark.parametrize("spec", [FULL, MLAAttentionSpec(**SIZES), FullAttentionSpec(**SIZES, sliding_window=64)])
def test_full_attention_is_accepted_mla_and_whole_blocks_of_a_window_included(spec):
    compat.check_deployment(*deployment_of([spec], pipeline_parallel_size=1))


@pytest.mark.parametrize(
    ("specs", "more", "words"),
    [
        ([FULL, WINDOW], {}, "a hybrid model"),
        ([WINDOW], {}, "SlidingWindowSpec"),
        ([RSWASpec(**SIZES, rswa_window=64)], {}, "RSWASpec"),  # a FullAttentionSpec whose blocks are evicted
        ([MambaSpec(block_size=BLOCK, shapes=((1, 1),), dtypes=(torch.float16,))], {}, "MambaSpec"),
        ([FULL], {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ([FULL], {"data_parallel_size": 4}, "--data-parallel-size 4"),
        ([FULL], {"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ([FULL], {"sleep": True}, "--enable-sleep-mode"),
    ],
)
def test_what_cannot_be_moved_block_by_block_is_refused_by_name(specs, more, words):
    with pytest.raises(compat.UnsupportedError, match=words):
        compat.check_deployment(*deployment_of(specs, **more))


def test_decode_fetches_what_prefill_computed_of_a_longer_prompt(consumer, producer):
    there = {"remote_host": "127.0.0.1", "remote_port": 14579}
    longer = request_of(33, transfer_id="t", do_remote_prefill=True, prefilled_tokens=32, **there)
    assert consumer.matched_tokens(longer, 0) == (32, True)
    consumer.allocated(longer, Blocks([7, 8, 9]), 32)
    (fetch,) = consumer.plan_step(step_of({})).fetches
    assert fetch.blocks == [7, 8]
    producer.new_request(prefill_of(32))
    (expected,) = producer.plan_step(step_of({})).expected
    assert (expected.tokens, expected.fingerprint) == (fetch.prompt.tokens, fetch.prompt.fingerprint)


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_port": None},
        {"remote_port": "x"},
        {"remote_port": 70_000},
        {"remote_host": 7},
        {"transfer_id": "x" * 300},
        {"transfer_id": ["t"]},
        {"prefilled_tokens": "32"},
        {"do_remote_prefill": "yes"},
    ],
    ids=str,
)
def test_parameters_that_make_no_sense_are_told_and_leave_the_request_to_itself(consumer, producer, wrong, caplog):
    asked = {"transfer_id": "t", "do_remote_prefill": True, "do_remote_decode": True}
    request = request_of(33, **{**asked, "remote_host": "127.0.0.1", "remote_port": 14579, **wrong})
    for half in (consumer, producer):
        half.new_request(request)
        assert half.matched_tokens(request, 0) == (0, False)
        half.allocated(request, Blocks([1, 2, 3]), 0)
        request.status = RequestStatus.FINISHED_ABORTED
        assert half.finished(request) is False and not half.has_unsent_plan()
    assert caplog.text.count("kv_transfer_params of r are left unused") == 2
    assert next(iter(wrong)) in caplog.text


@pytest.mark.parametrize("said", [0, -1, 34, None])
def test_a_length_that_makes_no_sense_is_the_whole_prompt(consumer, said):
    assert consumer.matched_tokens(request_of(33, do_remote_prefill=True, prefilled_tokens=said), 0) == (33, True)
