"""What a scheduler logs of its prompts, with vLLM's own request and step objects and a scripted clock."""

import time
from pathlib import Path

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from pdbench.events import PromptEvent, parse
from pdbench.kv import prompt_log
from tests.kv.test_scheduler import prefill_of, request_of, step_of


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
