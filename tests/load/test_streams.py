"""Every scripted stream of tests/support/stream_cases.py over a real socket, all at once: its class, counts and instants."""

from concurrent.futures import ThreadPoolExecutor
from math import isnan

import msgspec
import pytest

from pdbench.analysis.metrics import timings_of
from pdbench.config import LoadConfig
from pdbench.load.client import fetch
from pdbench.records import Clock, RequestRecord, Run
from tests.support.servers import ScriptedServer
from tests.support.stream_cases import CASES
from tests.support.streams import Case

_SLACK_S = 0.03


def ask(case: Case) -> tuple[RequestRecord, list[float]]:
    """The record, and the instants at which the server read the request and wrote each piece."""
    body = {"model": "m", "prompt": "Hello", "max_tokens": case.max_tokens}
    if case.forced:
        body["ignore_eos"] = True
    if case.choices > 1:
        body["n"] = case.choices
    with ScriptedServer(case.answer) as server:
        record = fetch(server.url, body, LoadConfig(endpoint="chat" if case.chat else "completions"))
        return record, server.requests[0].written_s


def mean_tbt_ms(record: RequestRecord) -> float | None:
    """The request's mean TBT as the analysis has it."""
    run = Run(name="r", clock=Clock(0.0, 0.0), config={}, host={}, versions={}, requests=[record])
    value = float(timings_of(run).requests.mean_tbt_ms[0])
    return None if isnan(value) else value


def check_instants(case: Case, record: RequestRecord, read_s: float, written_s: list[float]) -> None:
    """First token, first answer token and last token came when the server wrote them."""
    first, answer, last = case.truth.first, case.truth.answer, case.truth.last
    assert record.token_s == sorted(record.token_s)
    assert record.token_s[0] - record.sent_s == pytest.approx(written_s[first] - read_s, abs=_SLACK_S)
    if last is not None:
        span_s = written_s[last] - written_s[first]
        assert record.token_s[-1] - record.token_s[0] == pytest.approx(span_s, abs=_SLACK_S)
    if case.truth.mean_tbt_ms is None:
        assert mean_tbt_ms(record) is None
    else:
        span_s = case.truth.choices * (written_s[last] - written_s[first])
        truth_ms = span_s / (case.truth.tokens - case.truth.in_first) * 1e3
        assert mean_tbt_ms(record) == pytest.approx(truth_ms, rel=0.2, abs=1.0)
    if answer is not None and answer >= 0:
        wait_s = record.token_s[record.answer_index] - record.token_s[0]
        assert wait_s == pytest.approx(written_s[answer] - written_s[first], abs=_SLACK_S)
    elif answer is not None:
        assert record.answer_index is None


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple[RequestRecord, list[float]]]:
    """Each case's answer; several are requested at once, because they mostly wait."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip([case.name for case in CASES], pool.map(ask, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stream_is_seen_as_it_is(case, asked):
    truth = case.truth
    record, (read_s, *written_s) = asked[case.name]
    assert (record.error.kind if record.error else None) == truth.error, record.error
    msgspec.json.encode(record)
    if truth.error is not None:
        assert truth.tokens is None or len(record.token_s) == truth.tokens
        return
    assert record.output_tokens == truth.tokens
    for name, value in {
        "prompt_tokens": truth.prompt,
        "cached_prompt_tokens": truth.cached,
        "reasoning_tokens": truth.reasoning,
        "text": truth.text,
    }.items():
        assert value is None or getattr(record, name) == value, name
    assert record.notes == ([truth.note] if truth.note else [])
    for attempts_left in range(20, -1, -1):
        try:
            check_instants(case, record, read_s, written_s)
            break
        except AssertionError:  # on a busy machine: again, alone
            if not attempts_left:
                raise
            record, (read_s, *written_s) = ask(case)


def test_cases_have_their_own_names():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
