"""Scripted streams whose chunks are not one token each: how many tokens they are said to have, and which figures follow.

Token i of an answer is due GAP_S * i after the first one; a chunk comes when its last token is due.
"""

import json

import pytest

from pdbench.analysis.metrics import Timings, timings_of_requests
from pdbench.load.response import Response
from pdbench.records import RequestRecord
from tests.support.servers import SSE_HEAD, chunk, event, token, usage
from tests.support.streams import delta

GAP_S = 0.01
Piece = tuple[int, dict]
"""The tokens that its chunk has, and the chunk."""


def record_of(pieces: list[Piece], *ends: dict, number: int = 0, **body: object) -> RequestRecord:
    """The record of an answer of these chunks; usage and the like end it."""
    record = RequestRecord(id=f"r{number}", planned_s=0.0, sent_s=0.0)
    response = Response(record, json.dumps({"max_tokens": 2000} | body).encode())
    at_s = 1.0
    response.feed(SSE_HEAD, at_s)
    for tokens, piece in pieces:
        at_s += tokens * GAP_S
        response.feed(chunk(event(piece)), at_s)
    response.feed(b"".join(chunk(event(end)) for end in (*ends, b"[DONE]")) + chunk(b""), at_s)
    assert record.error is None, record.error
    return record


def timings(*records: RequestRecord) -> Timings:
    return timings_of_requests(list(records), {})


def ids(count: int, name: str = "content") -> list[Piece]:
    """Tokens of a chat, each with its id."""
    return [(1, delta(choice={"token_ids": [index]}, **{name: "word "})) for index in range(count)]


CALL = [{"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": json.dumps({"city": "Oslo" * 60})}}]
HELD_CALL = (60, delta(tool_calls=CALL, choice={"token_ids": [7]}))
HELD_THOUGHT = (60, delta(reasoning="so it is " * 20, choice={"token_ids": [7]}))
FINISH = delta("stop", choice={"token_ids": []})


@pytest.mark.parametrize(
    "pieces",
    [[*ids(50), HELD_CALL], [HELD_CALL, *ids(50)], [HELD_THOUGHT, *ids(50)], [*ids(25), HELD_CALL, *ids(25)]],
    ids=["text, call", "call, text", "reasoning, text", "call between"],
)
def test_tokens_that_a_parser_held_back_make_no_gap_between_tokens(pieces):
    record = record_of(pieces, FINISH, usage(5, 110))
    assert (record.counted_by, len(record.token_s), record.output_tokens) == ("token_ids", 51, 110)
    assert record.notes == ["tokens-held-back"]
    figures = timings(record)
    assert not len(figures.tbt_ms) and len(figures.inter_chunk_ms) == 50


def test_a_few_held_calls_leave_the_other_answers_their_gaps():
    plain = [record_of(ids(10), FINISH, usage(5, 10), number=number) for number in range(200)]
    figures = timings(*plain, record_of([*ids(50), HELD_CALL], FINISH, usage(5, 110), number=200))
    assert len(figures.tbt_ms) == 200 * 9 and figures.tbt_ms.max() == pytest.approx(10)


def test_a_marker_that_has_no_id_changes_nothing():
    thought = [(1, delta(reasoning="so ", choice={"token_ids": [1]}))]
    record = record_of([*thought, *ids(30)], FINISH, usage(5, 32))
    assert record.notes == [] and record.output_tokens == 32
    assert len(timings(record).tbt_ms) == 30


def test_tokens_of_one_chunk_that_has_their_ids_still_share_its_instant():
    pieces = [(1, token("a ", [1])), (4, token("b c d e ", [2, 3, 4, 5])), (1, token("f ", [6]))]
    record = record_of(pieces, token("", [], "stop"), usage(5, 6))
    assert record.notes == [] and timings(record).tbt_ms == pytest.approx([40, 0, 0, 0, 10])


def test_logprobs_and_usage_on_chunks_are_held_back_alike():
    by_logprobs = [(1, delta(content="a ", choice={"logprobs": {"content": [{"token": "a"}]}}))] * 5
    call = (60, delta(tool_calls=CALL, choice={"logprobs": {"content": [{"token": "{"}]}}))
    by_usage = [(1, token("a ", None, usage={"prompt_tokens": 5, "completion_tokens": i + 1})) for i in range(5)]
    for way, pieces in {"logprobs": [*by_logprobs, call], "usage": by_usage}.items():
        record = record_of(pieces, delta("stop"), usage(5, 65))
        assert (record.counted_by, record.output_tokens, record.notes) == (way, 65, ["tokens-held-back"])
        assert not len(timings(record).tbt_ms)


def test_usage_beyond_what_a_tool_call_can_hold_is_not_believed():
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]
    pieces = [*ids(50), (1, delta(tool_calls=call, choice={"token_ids": [7]}))]
    record = record_of(pieces, FINISH, usage(5, 480), max_tokens=100)
    assert record.output_tokens == 51 and record.notes == ["usage-contradicts"]


def test_reasoning_that_was_counted_and_not_sent_is_counted_with_ids_too():
    reasoning = {"completion_tokens_details": {"reasoning_tokens": 400}}
    ends = FINISH, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 410, **reasoning}}
    record = record_of(ids(10), *ends)
    assert (record.output_tokens, record.unsent_tokens, record.notes) == (410, 400, [])
    figures = timings(record)
    assert len(figures.tbt_ms) == 9 and figures.requests.mean_tbt_ms == pytest.approx([10])


def chunked(sizes: list[int], word: str = "word ") -> list[Piece]:
    """Chunks of so many tokens each, a word per token, without ids."""
    return [(size, token(word * size, None)) for size in sizes]


def mean_tbt_ms(pieces: list[Piece], tokens: int, **body: object) -> float:
    return float(timings(record_of(pieces, token("", None, "stop"), usage(5, tokens), **body)).requests.mean_tbt_ms[0])


@pytest.mark.parametrize(
    "sizes", [[4, 4, 4], [4, 4], [8] * 20, [1, 4, 4, 4], [30, 1, 1, 1], [1, 1, 1, 30], [2, 5, 3, 7, 1]], ids=str
)
def test_mean_tbt_leaves_out_the_tokens_of_the_first_chunk(sizes):
    assert mean_tbt_ms(chunked(sizes), sum(sizes)) == pytest.approx(10)


def test_mean_tbt_is_about_right_where_tokens_are_not_equally_long():
    texts = ["One instance reads the", " prompt, another", " writes the answer,", " token by token"]
    pieces = [(4, token(text, None)) for text in texts]
    assert mean_tbt_ms(pieces, 16) == pytest.approx(10, rel=0.2)


def test_mean_tbt_of_chunks_that_are_tokens_is_as_before():
    for sent, counted, later in ((10, 10, 9), (10, 11, 9), (40, 42, 41), (10, 9, 8)):
        pieces = [(1, token("longer" if not index else " w", None)) for index in range(sent)]
        assert mean_tbt_ms(pieces, counted) == pytest.approx(10 * (sent - 1) / later)


@pytest.mark.parametrize(("finish", "later"), [("stop", 5), ("length", 6), ("max_tokens", 6)])
def test_mean_tbt_leaves_out_the_end_of_the_text_that_is_counted_and_not_sent(finish, later):
    """Of six tokens it made a sixth."""
    record = record_of(chunked([1] * 6), token("", None, finish), usage(5, 7))
    assert record.output_tokens == 7
    assert timings(record).requests.mean_tbt_ms == pytest.approx([50 / later])


@pytest.mark.parametrize("parts", [["Tell me"], ["Tell", " me"], ["T", "ell", " me"]])
def test_a_prompt_that_is_echoed_in_chunks_is_no_answer(parts):
    echo = [(1, token(text, None)) for text in parts]
    record = record_of([*echo, *chunked([1] * 6)], token("", None, "length"), usage(5, 6), prompt="Tell me", echo=True)
    assert record.notes == [] and record.output_tokens == len(record.token_s) == 6
    assert record.token_s[0] == pytest.approx(1.0 + GAP_S * (len(parts) + 1))


def test_chunks_without_text_have_equal_shares():
    audio = [(4, delta(audio={"id": "a", "data": "AAAA"})) for _ in range(5)]
    assert mean_tbt_ms(audio, 20) == pytest.approx(10)


def test_mean_tbt_of_choices_in_larger_chunks():
    pieces = []
    for _ in range(5):
        for choice in (0, 1):
            piece = token("word " * 4, None)
            piece["choices"][0]["index"] = choice
            pieces.append((4 if choice == 0 else 0, piece))
    ends = [{"choices": [{"index": index, "text": "", "finish_reason": "stop"}]} for index in (0, 1)]
    record = record_of(pieces, *ends, usage(5, 40), n=2)
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10])


def test_mean_tbt_of_a_held_back_start_leaves_its_tokens_out():
    record = record_of([HELD_THOUGHT, *ids(50)], FINISH, usage(5, 110))
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10], rel=0.25)
    record = record_of([*ids(50), HELD_CALL], FINISH, usage(5, 110))
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10], rel=0.05)


def with_reasoning(pieces: list[Piece], tokens: int, reasoning: int) -> RequestRecord:
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    counts = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, **details}}
    return record_of(pieces, token("", None, "stop"), counts)


@pytest.mark.parametrize("word", ["word ", "a ", "x\n"], ids=["words", "letters", "lines"])
@pytest.mark.parametrize(
    ("sizes", "reasoning"),
    [([4] * 10, 20), ([2] * 20, 20), ([4] * 10, 36), ([3] * 50, 60), ([8] * 5, 39), ([1] * 40, 20)],
)
def test_reasoning_sent_as_content_is_not_taken_for_unsent(sizes, reasoning, word):
    """Chunks of several tokens are fewer than the tokens without the reasoning, as if that had not come."""
    record = with_reasoning(chunked(sizes, word), sum(sizes), reasoning)
    assert record.unsent_tokens == 0 and record.notes == []
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10])


@pytest.mark.parametrize(
    ("texts", "reasoning"),
    [
        (["word "] * 50, 1000),
        ([" pre", "fill"] * 25, 20),
        ([" пять", "сот"] * 25, 20),
        ([" при", "вет"] * 25, 50),
        (["x"] * 3, 97),
        (["word "], 50),
    ],
    ids=lambda value: "".join(value[:2]) if isinstance(value, list) else str(value),
)
def test_reasoning_that_was_not_sent_divides_nothing(texts, reasoning):
    pieces = [(1, token(text, None)) for text in texts]
    record = with_reasoning(pieces, len(texts) + reasoning, reasoning)
    assert record.unsent_tokens == reasoning and record.notes == []
    means_ms = timings(record).requests.mean_tbt_ms
    assert means_ms == pytest.approx([10] if len(texts) > 1 else [float("nan")], nan_ok=True)


@pytest.mark.parametrize(
    ("sizes", "word", "reasoning"),
    [([4] * 10, "一句", 20), ([2] * 20, "一句", 20), ([2] * 20, "一", 20), ([4] * 10, "wo", 20), ([4] * 10, "some", 8)],
    ids=[
        "Chinese",
        "Chinese, as many chunks as visible tokens",
        "Chinese, short tokens",
        "no spaces",
        "a little reasoning",
    ],
)
def test_mean_tbt_is_unknown_where_nothing_tells_whether_reasoning_was_sent(sizes, word, reasoning):
    """Either all tokens in chunks, or fewer in smaller ones: there are too few chunks to tell, and too little text."""
    record = with_reasoning(chunked(sizes, word), sum(sizes), reasoning)
    assert record.unsent_tokens is None and record.notes == ["reasoning-unknown"]
    assert record.output_tokens == sum(sizes) and record.coarse
    span_ms, chunks = 1e3 * (record.token_s[-1] - record.token_s[0]), len(record.token_s)
    least, most = span_ms / (sum(sizes) - 1), span_ms / (chunks - 1)
    for limit, met, undecided in (
        (0.9 * least, False, False),
        ((least + most) / 2, False, True),
        (1.1 * most, True, False),
    ):
        figures = timings_of_requests([record], {"slo_tbt_ms": limit})
        assert figures.requests.mean_tbt_ms == pytest.approx([float("nan")], nan_ok=True)
        assert (figures.slo.in_slo.tolist(), figures.slo.undecided.tolist()) == ([met], [undecided])
        assert (
            figures.slo.counted.all()
            and figures.slo.nothing_judged is undecided
            and figures.slo.goodput_known is not undecided
        )


CODE = [
    "def",
    " step",
    "(self",
    ",",
    " now",
    "_s",
    ":",
    " float",
    ")",
    " ->",
    " None",
    ":\n",
    "   ",
    " self",
    ".",
    "queue",
    "[",
    "0",
    "]",
    " +=",
    " 1",
    "\n",
]
CHINESE = ["一台", "机器", "处理", "提示", "，", "另一台", "写", "出", "回答", "。", "这", "是否", "更", "快", "？"]


@pytest.mark.parametrize("tokens", [CODE, CHINESE], ids=["code", "Chinese"])
@pytest.mark.parametrize("is_sent", [True, False])
def test_code_and_chinese_tell_whether_reasoning_was_sent_or_leave_it_unknown(tokens, is_sent):
    """As many chunks of two tokens as there are tokens without the reasoning, or these alone."""
    tokens = tokens * 8
    half = len(tokens) // 2
    pieces = [(2, token(first + second, None)) for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    record = with_reasoning(
        pieces if is_sent else [(1, token(text, None)) for text in tokens[half:]], len(tokens), half
    )
    right = 0 if is_sent else half
    assert record.unsent_tokens in ((right, None) if tokens[0] == CHINESE[0] else (right,))
    if record.unsent_tokens is not None:
        assert timings(record).requests.mean_tbt_ms == pytest.approx([10], rel=0.02)
    assert record.unsent_tokens is not None or is_sent


def test_a_summary_of_reasoning_leaves_mean_tbt_unknown():
    """The servers of some models send a summary as reasoning, and count all that was thought."""
    pieces = [(1, delta(reasoning="so ")), *((1, delta(content="word ")) for _ in range(20))]
    record = with_reasoning(pieces, 1020, 1000)
    assert record.unsent_tokens is None and record.notes == ["reasoning-unknown"]


def finals(*texts: str, ids: bool = False, **more: object) -> list[Piece]:
    """Chunks of a server that gives all after the first a finish reason."""
    return [
        (1, token(text, [7] if ids else None, "stop" if index else None, **more)) for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    "texts",
    [[" a", *[" the"] * 9], [" a", " the", " the", " cat", " the", " the", " the"], [" a", " the", " b", " the"]],
)
def test_equal_chunks_with_a_finish_reason_are_tokens(texts, counted, ids):
    record = record_of(finals(*texts, ids=ids), *[usage(5, len(texts))] * counted)
    assert record.text == "".join(texts) and len(record.token_s) == record.output_tokens == len(texts)
    figures = timings(record)
    assert figures.tbt_ms == pytest.approx([10] * (len(texts) - 1))
    assert figures.requests.mean_tbt_ms == pytest.approx([10])


def test_equal_chunks_of_several_tokens_with_a_finish_reason_are_chunks():
    pieces = [(4, token("a b c d ", None, "stop" if index else None)) for index in range(10)]
    record = record_of(pieces, usage(5, 40))
    assert len(record.token_s) == 10 and timings(record).requests.mean_tbt_ms == pytest.approx([10])


def test_usage_on_every_chunk_tells_repeats_from_tokens():
    pieces = [
        (1, token(" the", None, "stop" if index else None, usage={"prompt_tokens": 5, "completion_tokens": index + 1}))
        for index in range(5)
    ]
    record = record_of(pieces)
    assert record.counted_by == "usage" and len(record.token_s) == 5 and record.text == " the" * 5
    record = record_of([*pieces, (0, pieces[-1][1])])
    assert len(record.token_s) == 5 and record.text == " the" * 5


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("counted", [True, False])
def test_a_final_chunk_that_is_sent_twice_is_one(counted, ids):
    last = [7] if ids else None
    pieces = [(1, token("a ", last)), (1, token("b ", last)), *[(1, token("c ", last, "stop"))] * 2]
    record = record_of(pieces, *[usage(5, 3)] * counted)
    assert record.text == "a b c " and len(record.token_s) == record.output_tokens == 3


def test_one_more_equal_chunk_is_a_token_where_usage_counts_it():
    record = record_of([(1, token("a ", None)), *[(1, token("so ", None, "stop"))] * 2], usage(5, 3))
    assert record.text == "a so so " and len(record.token_s) == 3


def test_each_choice_may_send_its_final_chunk_twice():
    def piece(choice: int, finish: str | None = None) -> Piece:
        made = token("x ", None, finish)
        made["choices"][0]["index"] = choice
        return 1, made

    pieces = [piece(0), piece(1), *[piece(0, "stop")] * 2, *[piece(1, "stop")] * 2]
    record = record_of(pieces, usage(5, 4), n=2)
    assert record.token_choice == [0, 1, 0, 1] and record.output_tokens == 4


def test_ids_tell_reasoning_that_was_not_sent_however_long_the_words_are():
    """Russian words have more bytes than most tokens."""
    pieces = [(1, token("пятьсот ", [index])) for index in range(40)]
    hidden = {"completion_tokens_details": {"reasoning_tokens": 64}}
    record = record_of(pieces, token("", [], "stop"), {"choices": [], "usage": {"completion_tokens": 104} | hidden})
    assert (record.output_tokens, record.unsent_tokens, record.notes) == (104, 64, [])
    assert timings(record).requests.mean_tbt_ms[0] == pytest.approx(1e3 * GAP_S)


@pytest.mark.parametrize(
    "after", [token("", [9], "length"), token(" the", [7])], ids=["half a character", "equal, no finish"]
)
def test_instants_stay_in_order_after_equal_chunks_with_a_finish_reason(after):
    pieces = [(1, token(" a", [1], "length")), *[(1, token(" the", [7], "length"))] * 2, (1, after)]
    record = record_of([*pieces, (1, token(" b", [2], "length"))])
    assert record.token_s == sorted(record.token_s) and len(record.token_s) == 5


@pytest.mark.parametrize(
    ("pieces", "ends", "output_tokens"),
    [
        ([*ids(5), HELD_CALL], [FINISH], 6),
        (ids(99), [FINISH, usage(5, 100)], 100),
        ([(1, delta(content="word ")) for _ in range(100)], [delta("stop"), usage(5, 99)], 99),
    ],
    ids=["a held call and no usage", "a marker without id", "usage leaves one out"],
)
def test_answers_that_may_have_all_their_tokens_are_not_short(pieces, ends, output_tokens):
    record = record_of(pieces, *ends, max_tokens=100, ignore_eos=True)
    assert record.output_tokens == output_tokens and record.notes == []
