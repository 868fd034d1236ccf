"""What is a server that stood still, and what is not: runs with a pause put into the streams that an instance decodes."""

import pytest

from pdbench.analysis.run_analysis import analyze
from pdbench.events import EngineFacts, LogLine, ProxyEvent, ServerSeries
from pdbench.records import Flag, RequestRecord, Run
from tests.support.runs import build_run

PAUSE_S = 3.0


def pausing(run: Run, at_s: float, instance: str | None = None) -> Run:
    """The run whose instance (None: all) stood still from `at_s` on: what it would have sent then comes PAUSE_S later."""
    served_by = {event.request_id: event.decode for event in run.events if isinstance(event, ProxyEvent)}
    for request in run.requests:
        if instance is None or served_by[request.id] == instance:
            request.token_s = [t_s + PAUSE_S * (t_s > at_s) for t_s in request.token_s]
            request.end_s += PAUSE_S * (request.end_s > at_s)
    return run


def middle(run: Run, count: int = 10) -> float:
    """An instant at which the first request has some tokens."""
    return run.requests[0].token_s[count]


def decoding(concurrency: int = 4, **more: object) -> Run:
    return build_run("single", trials=1, requests=16, concurrency=concurrency, gpu=False, **more)


def stalls(run: Run) -> list[str]:
    return [flag.detail for flag in analyze(run).flags if flag.name == "server-stalled"]


def test_silence_of_all_streams_is_flagged() -> None:
    run = decoding()
    (detail,) = stalls(pausing(run, middle(run)))
    assert detail.startswith("single: all of its 4 streams got nothing for 3.0 s, ") and "s into trial 1, " in detail


def test_nothing_is_said_of_what_is_no_stalled_server() -> None:
    run = decoding()
    assert stalls(run) == []
    run = decoding(concurrency=1)
    assert stalls(pausing(run, middle(run))) == []
    run = decoding()
    slow = run.requests[0]
    slow.token_s = [t_s + PAUSE_S * (i > 10) for i, t_s in enumerate(slow.token_s)]
    slow.end_s += PAUSE_S
    assert stalls(run) == []  # one slow stream
    run = decoding()
    run.flags = [Flag("client-stalled", "it stood still")]
    assert stalls(pausing(run, middle(run))) == []
    run = build_run("single", trials=2, requests=16, concurrency=4, gpu=False, pause_s=40.0)
    assert stalls(run) == []  # idle between its trials
    run = decoding()
    line = LogLine(t_s=middle(run) + PAUSE_S, flag="compiled-under-load", text="compiled", meaning="kernels")
    run.servers = [ServerSeries(server="single-0", role="single", lines=[line])]
    assert stalls(pausing(run, middle(run))) == []


@pytest.mark.parametrize(("prompt_tokens", "silent"), [(40_000, True), (200, False)])
def test_a_long_prompt_explains_a_silence(prompt_tokens: int, silent: bool) -> None:
    """It was there before the silence; one of the usual length takes milliseconds."""
    run = decoding()
    at_s = middle(run)
    last_s = max(t_s for request in run.requests for t_s in request.token_s if t_s <= at_s)
    run.requests.append(
        RequestRecord(
            id="long", planned_s=last_s - 0.001, sent_s=last_s - 0.001, token_s=[at_s + 0.001, at_s + 0.005], end_s=at_s + 0.006,
            prompt_tokens=prompt_tokens, output_tokens=2,
        )
    )  # fmt: skip
    assert (stalls(pausing(run, at_s)) == []) == silent


def test_one_instance_of_several_is_named() -> None:
    """Prefill goes on, and opens streams in the meantime."""
    run = build_run("disaggregated", trials=1, requests=32, concurrency=8, gpu=False)
    run.events = [
        ProxyEvent(
            request_id=request.id, prefill="http://p", decode=f"http://d{i % 2}", prefill_sent_s=request.sent_s, first_token_s=request.token_s[0]
        )
        for i, request in enumerate(run.requests)
    ]  # fmt: skip
    at_s = middle(run)
    opened = next(request for request in run.requests if request.token_s[0] > at_s)
    first_s = opened.token_s[0]
    pausing(run, at_s, "http://d0")
    opened.token_s[0] = first_s
    (detail,) = stalls(run)
    assert detail.startswith("http://d0: all of its 4 streams got nothing for ")


@pytest.mark.parametrize(
    ("pause_s", "tokens", "flagged"), [(3.0, 1024, True), (0.0, 1024, False), (3.0, 60_000, False)]
)
def test_prefill_that_stood_still_is_named(pause_s: float, tokens: int, flagged: bool) -> None:
    """Prompts come all the time and wait for it; what decode streams goes on. The first that waits may be long: it takes many steps."""
    run = build_run("disaggregated", trials=1, requests=1, gpu=False)
    run.requests, at_s = [], 10.0
    run.engines = {"prefill-0": EngineFacts(role="prefill", max_num_batched_tokens=2048, chunked_prefill=True)}
    for i in range(200):
        sent_s = i / 10
        done_s = (at_s + pause_s if at_s - 0.05 < sent_s <= at_s + pause_s else sent_s) + 0.05
        token_s = [done_s + 0.01 * k for k in range(32)]
        run.requests.append(
            RequestRecord(
                id=str(i), planned_s=sent_s, sent_s=sent_s, token_s=token_s, end_s=token_s[-1], prompt_tokens=tokens if i == 100 else 1024, output_tokens=32,
                phases={"prefill": (sent_s, done_s)},
            )
        )  # fmt: skip
        run.events.append(
            ProxyEvent(
                request_id=str(i), prefill="http://p", decode="http://d", prefill_sent_s=sent_s, first_token_s=done_s
            )
        )
    run.trials[0].start_s, run.trials[0].end_s = 0.0, 21.0
    details = stalls(run)
    assert [detail.partition(" got")[0] for detail in details] == ["http://p: all of its 21 prompts"] * flagged


def test_silence_that_begins_with_the_first_request_is_of_the_first_trial() -> None:
    """On a host whose clock is a millisecond ahead."""
    run = build_run("disaggregated", trials=1, requests=1, gpu=False)
    run.requests = []
    for i in range(60):
        sent_s, done_s = 10.0 + i / 10, max(15.0, 10.0 + i / 10) + 0.05
        if i == 1:
            done_s = 10.2
        token_s = [done_s + 0.01 * k for k in range(8)]
        run.requests.append(
            RequestRecord(
                id=str(i), planned_s=sent_s, sent_s=sent_s, token_s=token_s, end_s=token_s[-1], prompt_tokens=1024, output_tokens=8,
                phases={"prefill": (sent_s - 0.3, done_s)},
            )
        )  # fmt: skip
        run.events.append(
            ProxyEvent(
                request_id=str(i), prefill="http://p", decode="http://d", prefill_sent_s=sent_s, first_token_s=done_s
            )
        )
    run.requests[1].phases = {"prefill": (9.5, 9.6)}
    (detail,) = stalls(run)
    assert ", 0.0 s into trial 1" in detail
