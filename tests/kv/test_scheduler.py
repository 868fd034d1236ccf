"""The scheduler's half with vLLM's own request and step objects: what is planned, kept and cancelled."""

from dataclasses import astuple, dataclass, replace
from types import SimpleNamespace

import msgspec
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from pdbench.kv.channel import FetchRequest
from pdbench.kv.compat import Options
from pdbench.kv.groups import Group
from pdbench.kv.scheduler import KvScheduler, fingerprint

BLOCK = 16


@dataclass
class Blocks:
    """The method of vLLM's KVCacheBlocks that the scheduler calls."""

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


def cancelled_by(plan):
    return [transfer.transfer_id for transfer, _ in plan.cancelled]


@pytest.fixture
def producer():
    return KvScheduler(Options(), [Group(BLOCK)], produces=True, consumes=False)


@pytest.fixture
def consumer():
    return KvScheduler(Options(), [Group(BLOCK)], produces=False, consumes=True)


def test_prefill_in_chunks_is_reported_as_it_is_computed(producer):
    request = prefill_of(100)
    producer.new_request(request)
    plan = producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    assert [transfer.transfer_id for transfer in plan.expected] == ["t"] and not plan.idle
    assert astuple(plan.prefilled[0]) == ("r", [1, 2], True)  # the third holds 8 tokens of 16
    plan = producer.plan_step(step_of({"r": 40}, cached=[("r", [4, 5], 40)]))
    assert astuple(plan.prefilled[0]) == ("r", [3, 4, 5], False)
    plan = producer.plan_step(step_of({"r": 10}, cached=[("r", [6, 7], 80)]))
    assert astuple(plan.prefilled[0]) == ("r", [], False)
    plan = producer.plan_step(step_of({"r": 10}, cached=[("r", None, 90)]))  # no new block: the chunk fits the old ones
    assert astuple(plan.prefilled[0]) == ("r", [6, 7], False)  # the prompt ends within the last
    # It decodes: nothing to hand over.
    assert producer.plan_step(step_of({"r": 1}, cached=[("r", [8], 100)])).prefilled == []
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert producer.finished(request) is True and producer.has_unsent_plan()
    plan = producer.plan_step(step_of({}))
    assert plan.idle and plan.ended[0].kept and plan.ended[0].error is None
    assert not producer.has_unsent_plan()


def test_preempted_prefill_starts_again(producer):
    producer.new_request(prefill_of(100))
    producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    assert producer.plan_step(step_of({}, preempted=["r", "another"])).preempted == ["r"]
    plan = producer.plan_step(step_of({"r": 100}, cached=[("r", [9, 8, 7, 6, 5, 4, 3], 0)], resumed=["r"]))
    assert plan.prefilled[0].replace and plan.prefilled[0].blocks == [9, 8, 7, 6, 5, 4, 3]


@pytest.mark.parametrize("scheduled", [True, False])
def test_aborted_prefill_is_reported_and_kept_only_if_it_had_blocks(producer, scheduled):
    request = prefill_of(100)
    producer.new_request(request)
    if scheduled:
        producer.plan_step(step_of({"r": 40}, new=[("r", [1, 2, 3], 0)]))
    request.status = RequestStatus.FINISHED_ABORTED
    assert producer.finished(request) is scheduled
    assert producer.plan_step(step_of({})).ended[0].error == "prefill ended as aborted"


def test_transfer_id_in_use_is_not_handed_over_twice(producer):
    producer.new_request(prefill_of(20, "a"))
    producer.new_request(prefill_of(20, "b"))
    assert len(producer.plan_step(step_of({})).expected) == 1


def test_requests_without_transfer_are_ignored(producer, consumer):
    for half in (producer, consumer):
        request = request_of(50)
        half.new_request(request)
        assert half.matched_tokens(request, 0) == (0, False)
        half.allocated(request, Blocks([1, 2, 3, 4]), 0)
        request.status = RequestStatus.FINISHED_STOPPED
        assert half.finished(request) is False and not half.has_unsent_plan()


def test_decode_fetches_what_it_lacks_once(consumer):
    request = decode_of(100)
    consumer.new_request(request)
    assert consumer.matched_tokens(request, 32) == (68, True)
    assert consumer.matched_tokens(request, 32) == (68, True)  # vLLM repeats it until there is room
    consumer.allocated(request, Blocks([1, 2, 3, 4, 5, 6, 7, 8]), 68)
    (fetch,) = consumer.plan_step(step_of({})).fetches
    assert (fetch.start_block, fetch.blocks) == (2, [3, 4, 5, 6, 7])
    assert (fetch.transfer.host, fetch.transfer.port) == ("127.0.0.1", 14579)
    assert consumer.matched_tokens(request, 0) == (0, False)  # after a failure or a preemption decode computes them
    request.status = RequestStatus.FINISHED_STOPPED
    assert consumer.finished(request) is False and not consumer.has_unsent_plan()


@pytest.mark.parametrize("fetched", [True, False])
def test_aborted_decode_cancels_its_transfer(consumer, fetched):
    request = decode_of(100)
    consumer.new_request(request)
    if fetched:
        consumer.allocated(request, Blocks(list(range(1, 8))), 100)
        consumer.plan_step(step_of({}))
    request.status = RequestStatus.FINISHED_ABORTED
    assert consumer.finished(request) is False
    assert cancelled_by(consumer.plan_step(step_of({}))) == ["t"]


def test_decode_that_needs_nothing_cancels_its_transfer(consumer):
    request = decode_of(100)
    consumer.new_request(request)
    consumer.allocated(request, Blocks([1]), 0)
    plan = consumer.plan_step(step_of({"r": 100}, new=[("r", [1], 0)]))
    assert cancelled_by(plan) == ["t"] and not plan.fetches


class Asked:
    """What a decode instance has asked, for the prefill half of a pair."""

    def __init__(self):
        self.by_transfer = {}

    def __call__(self, transfer_id):
        return self.by_transfer.get(transfer_id)


@pytest.fixture
def returning():
    """A producer and a consumer that return KV, and what the latter has asked."""
    asked, options = Asked(), Options(return_kv=True, return_wait_s=30)
    producer = KvScheduler(options, [Group(BLOCK)], produces=True, consumes=False, asked=asked)
    return producer, KvScheduler(options, [Group(BLOCK)], produces=False, consumes=True), asked


def request_for(plan, returns_at=("127.0.0.2", 99)):
    """What decode's worker sends for the fetch of a plan."""
    (fetch,) = plan.fetches
    transfer = fetch.transfer
    return FetchRequest("t", transfer.tokens, transfer.fingerprint, fetch.start_block, 10, returns_at)


def asking(consumer):
    """The step in which decode, which has 64 tokens of a prompt of 100, asks for the others."""
    consumer.new_request(decode_of(100))
    consumer.allocated(decode_of(100), Blocks([11, 12, 13, 14, 15, 16, 17]), 100 - 64)
    return consumer.plan_step(step_of({}))


def returning_prefill(**more):
    return request_of(100, transfer_id="t", do_remote_decode=True, return_kv=True, **more)


def test_prefill_fetches_what_decode_has_of_a_prompt(returning):
    producer, consumer, asked = returning
    request = returning_prefill()
    producer.new_request(request)
    assert producer.matched_tokens(request, 16) == (None, False)  # decode has not asked yet
    plan = asking(consumer)
    asked.by_transfer["t"] = request_for(plan)
    (offer,), (progress,) = plan.offers, plan.prefilled
    assert progress.blocks == [11, 12, 13, 14] and progress.replace and offer.returned
    assert producer.matched_tokens(request, 16) == (48, True)
    producer.allocated(request, Blocks([1, 2, 3, 4, 5, 6, 7]), 48)
    (fetch,) = producer.plan_step(step_of({})).fetches
    assert (fetch.start_block, fetch.blocks, fetch.tokens) == (1, [2, 3, 4], 48)
    assert (fetch.transfer.host, fetch.transfer.port) == ("127.0.0.2", 99)
    same = ("request_id", "transfer_id", "tokens", "fingerprint", "ends", "returned")
    assert all(getattr(offer, name) == getattr(fetch.transfer, name) for name in same)
    assert producer.matched_tokens(request, 0) == (0, False)  # after a failure or a preemption prefill computes them
    plan = producer.plan_step(step_of({"r": 36}, new=[("r", [1, 2, 3, 4, 5, 6, 7], 64)]))
    assert plan.prefilled[0].blocks == [1, 2, 3, 4, 5, 6, 7]
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert producer.finished(request) is True
    assert not cancelled_by(producer.plan_step(step_of({})))


def test_first_turn_does_not_wait_for_decodes_word(returning):
    producer, _, _ = returning
    request = returning_prefill()
    producer.new_request(request)
    assert producer.matched_tokens(request, 0) == (0, False)
    producer.allocated(request, Blocks([1, 2, 3, 4, 5, 6, 7]), 0)
    plan = producer.plan_step(step_of({}))
    assert not plan.fetches and not plan.cancelled


def test_prefill_waits_for_decodes_word_no_longer_than_the_option_says():
    producer = KvScheduler(Options(return_kv=True, return_wait_s=0), [Group(BLOCK)], produces=True, consumes=False)
    request = returning_prefill()
    producer.new_request(request)
    assert producer.matched_tokens(request, 16) == (0, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start_block": 0},
        {"start_block": 1},
        {"start_block": 7},
        {"returns_at": None},
        {"tokens": 99},
        {"fingerprint": "x"},
    ],
    ids=str,
)
def test_prefill_computes_what_decode_has_not_or_does_not_return(returning, wrong):
    producer, consumer, asked = returning
    asked.by_transfer["t"] = msgspec.structs.replace(request_for(asking(consumer)), **wrong)
    request = returning_prefill()
    producer.new_request(request)
    assert producer.matched_tokens(request, 16) == (0, False)


@pytest.mark.parametrize("parameter", [True, False])
def test_nothing_returns_without_the_option_and_the_parameter(returning, parameter):
    producer, consumer, asked = returning
    asked.by_transfer["t"] = request_for(asking(consumer))
    producer.options = Options(return_kv=not parameter)
    request = request_of(100, transfer_id="t", do_remote_decode=True, return_kv=parameter)
    producer.new_request(request)
    assert producer.matched_tokens(request, 16) == (0, False)
    consumer.options = Options()
    plan = asking(consumer)
    assert plan.fetches and not plan.offers and not plan.prefilled


def test_aborted_prefill_cancels_what_it_takes_back(returning):
    producer, consumer, asked = returning
    asked.by_transfer["t"] = request_for(asking(consumer))
    request = returning_prefill()
    producer.new_request(request)
    assert producer.matched_tokens(request, 0) == (64, True)  # decode's word is there already: no wait
    producer.allocated(request, Blocks([1, 2, 3, 4, 5, 6, 7]), 64)
    producer.plan_step(step_of({}))
    request.status = RequestStatus.FINISHED_ABORTED
    assert producer.finished(request) is False
    plan = producer.plan_step(step_of({}))
    assert plan.cancelled[0][0].returned and plan.ended[0].error == "prefill ended as aborted"


def test_window_alone_travels_and_prefill_stops_at_the_prompts_end(caplog):
    """Of the window's layers only the blocks that the last token sees, each when the chunk that ends it is computed."""
    groups = [Group(BLOCK), Group(BLOCK, 32)]
    producer = KvScheduler(Options(), groups, produces=True, consumes=False)
    producer.new_request(prefill_of(80))
    both = ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15])
    step = step_of({"r": 60}, new=[("r", [], 0)])
    step.scheduled_new_reqs[0].block_ids = both
    assert producer.plan_step(step).prefilled[0].blocks == [1, 2, 3]
    assert producer.plan_step(step_of({"r": 20}, cached=[("r", None, 60)])).prefilled[0].blocks == [4, 14, 5, 15]
    consumer = KvScheduler(Options(), groups, produces=False, consumes=True)
    for external, start, blocks in ((80, 0, [21, 22, 23, 24, 34, 25, 35]), (16, 5, [25, 35])):
        consumer.new_request(decode_of(80))
        tables = SimpleNamespace(get_block_ids=lambda: ([21, 22, 23, 24, 25, 26], [0, 0, 0, 34, 35, 36]))
        consumer.allocated(decode_of(80), tables, external)
        (fetch,) = consumer.plan_step(step_of({})).fetches
        assert (fetch.start_block, fetch.tokens, fetch.blocks) == (start, external, blocks)
    longer = prefill_of(80)
    longer.max_tokens = 2
    producer.new_request(longer)
    assert not producer.plan_step(step_of({})).expected and "max_tokens 1" in caplog.text


def embedded(value):
    """The fingerprint of a prompt that was given as embeddings, which has no token ids."""
    half = KvScheduler(Options(), [Group(BLOCK)], produces=True, consumes=False)
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    embeddings = torch.full((20, 8), value, dtype=torch.bfloat16)
    half.new_request(Request("r", None, sampling, None, prompt_embeds=embeddings))
    (transfer,) = half.plan_step(step_of({})).expected
    assert transfer.tokens == 20
    return transfer.fingerprint


def test_fingerprints_differ_by_prompt_and_circumstances(consumer, producer):
    assert fingerprint([1, 2, 3]) == fingerprint((1, 2, 3)) != fingerprint([1, 2, 4])
    assert fingerprint([1, 2], "lora") != fingerprint([1, 2], None) != fingerprint([1, 2, 0])
    assert embedded(1.0) == embedded(1.0) != embedded(2.0)
    producer.new_request(prefill_of(20))
    consumer.new_request(decode_of(20))
    consumer.allocated(decode_of(20), Blocks([1, 2]), 20)
    here, there = producer.plan_step(step_of({})).expected[0], consumer.plan_step(step_of({})).fetches[0].transfer
    assert (here.transfer_id, here.tokens, here.fingerprint) == (there.transfer_id, there.tokens, there.fingerprint)


def test_decode_fetches_what_prefill_computed_of_a_longer_prompt(consumer, producer):
    there = {"remote_host": "127.0.0.1", "remote_port": 14579}
    longer = request_of(33, transfer_id="t", do_remote_prefill=True, prefilled_tokens=32, **there)
    consumer.new_request(longer)
    assert consumer.matched_tokens(longer, 0) == (32, True)
    consumer.allocated(longer, Blocks([7, 8, 9]), 32)
    (fetch,) = consumer.plan_step(step_of({})).fetches
    assert fetch.blocks == [7, 8]
    producer.new_request(prefill_of(32))
    (expected,) = producer.plan_step(step_of({})).expected
    assert (expected.tokens, expected.fingerprint) == (fetch.transfer.tokens, fetch.transfer.fingerprint)


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
def test_parameters_that_make_no_sense_are_logged_and_ignored(consumer, producer, wrong, caplog):
    good = {"transfer_id": "t", "do_remote_prefill": True, "do_remote_decode": True, "remote_host": "127.0.0.1"}
    request = request_of(33, **{**good, "remote_port": 14579, **wrong})
    for half in (consumer, producer):
        half.new_request(request)
        assert half.matched_tokens(request, 0) == (0, False)
        half.allocated(request, Blocks([1, 2, 3]), 0)
        request.status = RequestStatus.FINISHED_ABORTED
        assert half.finished(request) is False and not half.has_unsent_plan()
    assert caplog.text.count("kv_transfer_params of r are ignored") == 2
    assert next(iter(wrong)) in caplog.text


@pytest.mark.parametrize("prefilled_tokens", [0, -1, 34, None])
def test_prefilled_tokens_that_make_no_sense_mean_the_whole_prompt(consumer, prefilled_tokens):
    request = request_of(33, do_remote_prefill=True, prefilled_tokens=prefilled_tokens)
    consumer.new_request(request)
    assert consumer.matched_tokens(request, 0) == (33, True)
