"""What a scheduler logs of its prompts: with a scripted clock, and vLLM's own scheduler classes without an engine."""

import time
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pdbench.events import PromptEvent, parse
from pdbench.kv import prompt_log
from pdbench.server_metrics import parse_facts
from pdbench.serving.models import tiny_model
from tests.kv.test_scheduler import decode_of, prefill_of, request_of, step_of


class Engine:
    """A scheduler that logs, and the clock of its steps."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(prompt_log.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(prompt_log.time, "time", lambda: self.now_s + 5000.0)
        self._path, self.log = path, prompt_log.PromptLog(str(path))

    def add(self, request, *, waited_s: float = 0.0) -> None:
        request.arrival_time = time.time() - waited_s
        self.log.added(request)

    def schedule(self, **tokens: int) -> SchedulerOutput:
        step = step_of(tokens)
        self.log.scheduled(step)
        return step

    def compute(self, step: SchedulerOutput, *, samples=()) -> None:
        """The step's output; these requests get a token in it."""
        at_s = self.now_s
        for request in samples:
            request.append_output_token_ids(7)
        self.log.computed(step, at_s)

    def events(self) -> list[PromptEvent]:
        self.log.close()
        return parse(self._path.read_bytes().splitlines())


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(tmp_path / "logs" / "prefill-1.events.jsonl", monkeypatch)


def test_queue_and_every_step_of_a_prompt_are_logged_at_its_first_token(engine: Engine) -> None:
    request = prefill_of(300, "cmpl-r-0", "t1")
    engine.add(request, waited_s=0.5)
    engine.now_s = 102.0
    first = engine.schedule(**{"cmpl-r-0": 256})
    engine.now_s = 103.0
    engine.compute(first)
    second = engine.schedule(**{"cmpl-r-0": 44})
    engine.now_s = 104.0
    engine.compute(second, samples=[request])
    (event,) = engine.events()
    assert event == PromptEvent(
        server="prefill-1",
        request_id="cmpl-r-0",
        transfer_id="t1",
        prompt_tokens=300,
        arrived_s=99.5,
        taken_s=100.0,
        begin_s=[102.0, 103.0],
        end_s=[103.0, 104.0],
        tokens=[256, 44],
        first_token_s=104.0,
    )


def test_step_scheduled_ahead_begins_when_the_one_before_is_over(engine: Engine) -> None:
    running, request = request_of(10, "a"), request_of(20, "b")
    engine.add(running)
    before = engine.schedule(a=10)
    engine.now_s = 101.0
    engine.add(request)
    step = engine.schedule(a=1, b=20)  # asynchronous scheduling: while `before` runs
    engine.now_s = 103.0
    engine.compute(before, samples=[running])
    ahead = engine.schedule(a=1, b=1)
    engine.now_s = 104.0
    engine.compute(step, samples=[running, request])
    engine.compute(ahead, samples=[running, request])
    first, second = engine.events()
    assert (first.begin_s, first.end_s, first.tokens) == ([100.0], [103.0], [10])
    assert (second.begin_s, second.end_s, second.tokens) == ([103.0], [104.0], [20]), "not the token scheduled ahead"


@pytest.mark.parametrize(
    ("before_ends_s", "begin_s"),
    [(102.6, 101.1), (104.5, 103.0)],
    ids=["over before this one was launched", "still running then"],
)
def test_launch_is_no_wait_for_the_step_before(engine: Engine, before_ends_s: float, begin_s: float) -> None:
    """On a GPU with asynchronous scheduling: launched from 101.1 to 102.6, and only then the output before is read."""
    running, request = request_of(10, "a"), request_of(20, "b")
    engine.add(running)
    before = engine.schedule(a=10)
    engine.log.launched(before)
    engine.now_s = 101.0
    engine.add(request)
    engine.now_s = 101.1
    step = engine.schedule(a=1, b=20)
    engine.now_s = 102.6
    engine.log.launched(step)
    engine.now_s = before_ends_s
    engine.compute(before, samples=[running])
    engine.now_s = 105.0
    engine.compute(step, samples=[running, request])
    event = engine.events()[1]
    assert event.begin_s == [pytest.approx(begin_s)] and event.end_s == [105.0]


def test_drafts_that_fill_a_step_up_are_no_part_of_the_prompt(engine: Engine) -> None:
    """vLLM does so with the last token of a prompt whose KV came from prefill."""
    request = decode_of(300, "a")
    engine.add(request)
    step = step_of({"a": 4})
    step.scheduled_spec_decode_tokens["a"] = [-1, -1, -1]
    engine.log.scheduled(step)
    engine.compute(step, samples=[request])
    (event,) = engine.events()
    assert event.tokens == [1]


def test_prompt_that_ends_without_a_token_is_logged_with_its_end(engine: Engine) -> None:
    request, other = request_of(10, "a"), request_of(10, "b")
    engine.add(request)
    engine.add(other)
    request.status = RequestStatus.FINISHED_ABORTED
    engine.log.freed(request)
    step = engine.schedule(b=10)
    other.append_output_token_ids(7)  # its only token: vLLM frees it within the step
    other.status = RequestStatus.FINISHED_LENGTH_CAPPED
    engine.log.freed(other)
    engine.compute(step)
    aborted, ended = engine.events()
    assert (aborted.request_id, aborted.error, aborted.first_token_s) == ("a", "aborted", None)
    assert (ended.request_id, ended.error, ended.first_token_s) == ("b", None, 100.0)


def scheduler_of(monkeypatch: pytest.MonkeyPatch, path: Path, *, ahead: bool):
    """What vLLM constructs for --scheduler-cls, with 128 tokens per step, of a model that is never loaded."""
    length = 4096
    limits = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": length, "is_encoder_decoder": False}
    config = VllmConfig(
        model_config=ModelConfig(model=str(tiny_model()), max_model_len=length, skip_tokenizer_init=True),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        scheduler_config=SchedulerConfig(**limits, enable_chunked_prefill=True),
        device_config=DeviceConfig("cpu"),
    )
    # vLLM for CPU would compute whole prompts of this model, one step at a time.
    config.scheduler_config.enable_chunked_prefill, config.scheduler_config.async_scheduling = True, ahead
    config.scheduler_config.max_num_batched_tokens = config.scheduler_config.max_num_scheduled_tokens = 128
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = 100
    monkeypatch.setenv(prompt_log.LOG_VARIABLE, str(path))
    return prompt_log.scheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["one step at a time", "a step ahead"])
def test_vllms_own_scheduler_logs_its_prompts(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = scheduler_of(monkeypatch, tmp_path / "single-0.events.jsonl", ahead=ahead)
    facts = parse_facts("single", capfd.readouterr().out, "")
    assert (facts.max_num_seqs, facts.async_scheduling) == (8, ahead), "also where both are vLLM's defaults"
    assert isinstance(scheduler, Scheduler) and isinstance(scheduler, AsyncScheduler) == ahead
    for name, tokens in (("long", 300), ("short", 20), ("left", 10)):
        request = Request(name, [1] * tokens, SamplingParams(max_tokens=3, ignore_eos=True), None)
        scheduler.add_request(request)
    scheduler.finish_requests("left", RequestStatus.FINISHED_ABORTED)
    steps, computed = [], dict.fromkeys(("long", "short"), 0)
    while scheduler.has_requests() or steps:
        while len(steps) < (2 if ahead else 1):
            steps.append(scheduler.schedule())
        step = steps.pop(0)
        names = list(step.num_scheduled_tokens)
        for name, tokens in step.num_scheduled_tokens.items():
            computed[name] += tokens
        # A prompt's last step, and each after it, gives a token.
        sampled = [[1] if computed[name] >= {"long": 300, "short": 20}[name] else [] for name in names]
        places = {name: place for place, name in enumerate(names)}
        scheduler.update_from_output(step, ModelRunnerOutput(names, places, sampled))
        if not scheduler.has_requests():
            break
    scheduler.shutdown()
    events = {
        event.request_id: event for event in parse((tmp_path / "single-0.events.jsonl").read_bytes().splitlines())
    }
    assert {name: (event.tokens, event.error) for name, event in events.items()} == {
        "left": ([], "aborted"),
        "long": ([128, 128, 44], None),
        "short": ([20], None),
    }
    for name in ("long", "short"):
        event = events[name]
        ends = [at_s for step in zip(event.begin_s, event.end_s, strict=True) for at_s in step]
        assert ends == sorted(ends) and event.first_token_s == event.end_s[-1]
        assert event.arrived_s <= event.taken_s <= event.begin_s[0]
