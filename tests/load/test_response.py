"""Answers cut anywhere give the same record; events are read as the standard says."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.load.response import Response
from pdbench.load.sse import EventReader, is_whole
from pdbench.records import RequestRecord
from tests.support.servers import SSE_HEAD, chunk, event, token, usage

PAYLOADS = [token("h\u00e9llo \u4e16\u754c \U0001f600", [1, 2]), token("", [3]), token("!", [4], "stop"), usage(7, 4)]
WHOLE = SSE_HEAD + b"".join(chunk(event(payload)) for payload in PAYLOADS) + chunk(event(b"[DONE]")) + chunk(b"")


def response_to(pieces: list[bytes]) -> RequestRecord:
    record = RequestRecord(id="r", planned_s=0.0, sent_s=0.0)
    response = Response(record)
    for index, piece in enumerate(pieces):
        response.feed(piece, float(index))
    assert response.complete and response.keep_alive
    return record


def test_cut_at_every_byte_gives_the_same_record():
    for cut in range(1, len(WHOLE)):
        record = response_to([WHOLE[:cut], WHOLE[cut:]])
        assert record.error is None and len(record.token_s) == 4, cut
        assert record.text == "h\u00e9llo \u4e16\u754c \U0001f600!"


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=40))
@settings(max_examples=200)
def test_any_cuts_give_the_same_tokens(cuts):
    edges = [0, *sorted(set(cuts)), len(WHOLE)]
    record = response_to([WHOLE[start:end] for start, end in itertools.pairwise(edges)])
    assert record.error is None and len(record.token_s) == 4 and record.output_tokens == 4
    assert record.token_s == sorted(record.token_s)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=20), st.data())
@settings(max_examples=100)
def test_any_text_in_any_chunks_comes_through(texts, data):
    """HTTP chunks need not hold whole events: the events' bytes are cut into chunks again, characters included."""
    events = b"".join(event(token(text, [1])) for text in texts) + event(token("", [], "stop"))
    cuts = data.draw(st.lists(st.integers(1, len(events) - 1), max_size=20))
    edges = [0, *sorted(set(cuts)), len(events)]
    body = b"".join(chunk(events[start:end]) for start, end in itertools.pairwise(edges))
    record = response_to([SSE_HEAD + body + chunk(b"")])
    assert record.error is None and record.text == "".join(texts) and len(record.token_s) == len(texts)


@given(
    st.lists(
        # A line that is whole, [DONE] or a JSON object, does not wait for a second one: streams without blank lines have such.
        st.lists(st.binary(max_size=12).map(lambda raw: raw.translate(None, b"\r\n")), min_size=1, max_size=3).filter(
            lambda lines: not any(map(is_whole, lines[:-1]))
        ),
        max_size=6,
    ),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
    st.data(),
)
@settings(max_examples=300)
def test_event_reader_with_all_line_ends_comments_and_cuts(events, line_end, space, data):
    lines = []
    for event_lines in events:
        lines += [b": a comment", b"event: token", b"id: 1"]
        lines += [b"data:" + (b" " if space or line.startswith(b" ") else b"") + line for line in event_lines] + [b""]
    whole = b"".join(line + line_end for line in lines)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=15))
    edges = [0, *sorted(cuts), len(whole)]
    reader, found = EventReader(), []
    for start, end in itertools.pairwise(edges):
        found += reader.feed(whole[start:end])
    assert found == [b"\n".join(event_lines) for event_lines in events]


def test_several_chunks_in_one_read_count_as_merged():
    response = Response(RequestRecord(id="r", planned_s=0.0))
    response.feed(SSE_HEAD + chunk(event(token("a", [1]))), 1.0)
    assert response.merged_reads == 0
    response.feed(chunk(event(token("b", [2]))) + chunk(event(token("c", [3]))), 2.0)
    assert response.merged_reads == 1 and response.record.token_s == [1.0, 2.0, 2.0]


def test_finish_replaces_a_missing_end_of_body():
    response = Response(RequestRecord(id="r", planned_s=0.0))
    response.feed(SSE_HEAD + chunk(event(token("a", [1], "stop"))), 1.0)
    assert not response.complete
    response.closed(5.0, "reset", "gone")
    assert response.complete and response.record.error is None and response.record.end_s == 1.0


@pytest.mark.parametrize("unfinished", [None, ""])
def test_stream_cut_before_its_finish_fails(unfinished):
    response = Response(RequestRecord(id="r", planned_s=0.0))
    response.feed(SSE_HEAD + chunk(event(token("a", [1], unfinished))), 1.0)
    response.closed(5.0, "reset", "gone")
    assert response.record.error is not None and response.record.error.kind == "reset"


@pytest.mark.parametrize(
    ("payloads", "output_tokens"),
    [
        ([token("a ", None), token("b ", None), usage(5, 8)], 8),  # said at the end, of these tokens
        ([usage(5, 128), token("a ", None), token("b ", None)], None),  # said of what was to come
        ([token("a ", None, usage=usage(5, 128)["usage"]) for _ in range(2)], None),
        ([token("a ", None), token("b ", None), usage(5, 1)], None),  # fewer than came
    ],
)
def test_tokens_of_an_answer_that_was_cut_are_those_that_came(payloads, output_tokens):
    record = RequestRecord(id="r", planned_s=0.0, sent_s=0.0)
    response = Response(record, b'{"max_tokens": 128}')
    for piece in (SSE_HEAD, *(chunk(event(payload)) for payload in payloads), chunk(event({"error": "engine died"}))):
        response.feed(piece, 1.0)
    assert (record.error.kind, len(record.token_s), record.output_tokens) == ("server_error", 2, output_tokens)


@pytest.mark.parametrize("odd", [{"object": ["x"]}, {"type": {"of": 1}}, {"object": [], "type": []}])
def test_an_error_whose_type_is_no_text_is_the_servers(odd):
    record = RequestRecord(id="r", planned_s=0.0)
    Response(record).feed(SSE_HEAD + chunk(event(token("a", [1]))) + chunk(event(odd | {"message": "boom"})), 1.0)
    assert record.error is not None and (record.error.kind, record.error.message) == ("server_error", "boom")


def test_error_messages_of_all_forms():
    for body, text in [
        (json.dumps({"error": {"message": "a"}}).encode(), "a"),
        (b'{"detail": "b"}', "b"),
        (b"plain", "plain"),
        (b"", "no message"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ]:
        response = Response(RequestRecord(id="r", planned_s=0.0))
        response.feed(b"HTTP/1.1 500 X\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), 1.0)
        assert response.complete and response.record.error.kind == "http_500" and response.record.error.message == text


def test_stamps_that_a_stepped_clock_made_too_early_do_not_run_backwards():
    record = RequestRecord(id="r", planned_s=0.0, sent_s=1.0)
    response = Response(record)
    pieces = [
        SSE_HEAD,
        *(chunk(event(token("x", [1]))) for _ in range(3)),
        chunk(event(token("", [], "stop"))),
        chunk(b""),
    ]
    for piece, at_s in zip(pieces, (0.95, 1.5, 1.45, 1.6, 1.7, 1.8), strict=True):
        response.feed(piece, at_s)
    assert record.error is None and record.token_s == [1.5, 1.5, 1.6]


LIMITS = {"max_tokens": 8}


@pytest.mark.parametrize(
    ("asked", "came", "fewest"),
    [
        (LIMITS | {"min_tokens": 4}, 3, 4),
        (LIMITS | {"min_tokens": 4}, 4, None),
        (LIMITS | {"min_tokens": 4}, 6, None),
        (LIMITS | {"min_tokens": 8}, 6, 8),
        (LIMITS | {"min_tokens": 0}, 1, None),
        (LIMITS | {"min_tokens": 4, "ignore_eos": True}, 6, 8),
        ({"max_completion_tokens": 8, "min_tokens": 4}, 6, None),
        ({"max_completion_tokens": 8, "min_tokens": 4}, 3, 4),
        ({"min_tokens": 4}, 3, 4),
        ({"min_tokens": 4}, 6, None),
        (LIMITS | {"min_tokens": 4, "n": 2}, 7, 8),
        (LIMITS, 1, None),
    ],
)
@pytest.mark.parametrize("by_ids", [True, False], ids=["token ids", "chunks"])
def test_answer_of_fewer_tokens_than_it_must_have_is_short(asked, came, fewest, by_ids):
    """Chunks may hold several tokens: of them only what ends before a limit that must be reached is known to be short."""
    record = RequestRecord(id="r", planned_s=0.0, sent_s=0.0)
    payloads = [token("a", [1] if by_ids else None) for _ in range(came)]
    payloads += [
        {"choices": [{"index": choice, "text": "", "finish_reason": "stop"}]} for choice in range(asked.get("n", 1))
    ]
    body = b"".join(map(event, payloads)) + event(b"[DONE]")
    Response(record, json.dumps(asked).encode()).feed(SSE_HEAD + chunk(body) + chunk(b""), 1.0)
    is_known = fewest is not None and (by_ids or (fewest == 8 and "n" not in asked))
    assert (record.error is not None) == is_known
    assert record.error is None or (record.error.kind, f"{came} of {fewest} tokens" in record.error.message) == (
        "short",
        True,
    )
