"""Mean TBT where it is not known which chunk holds the tokens that usage counts beyond the chunks: its figure, and how the SLO judges it.

Token i of an answer is due 10 ms * i after the first one; a chunk comes when its last token is due.
"""

from math import inf

import numpy as np
import pytest

from pdbench.analysis.metrics import timings_of_requests
from pdbench.load.texts import echoed_chunks
from pdbench.records import RequestRecord
from tests.load.test_counting import Piece, chunked, record_of, timings
from tests.support.servers import token, usage
from tests.support.streams import delta


def answer(pieces: list[Piece], tokens: int, finish: str = "stop", **body: object) -> RequestRecord:
    return record_of(pieces, token("", None, finish), usage(5, tokens), **body)


def texts(*pieces: tuple[int, str]) -> list[Piece]:
    return [(tokens, token(text, None)) for tokens, text in pieces]


def judged(record: RequestRecord, limit_ms: float) -> str:
    slo = timings_of_requests([record], {"slo_tbt_ms": limit_ms}).slo
    assert slo.in_slo is not None
    return "undecided" if slo.undecided[0] else "met" if slo.in_slo[0] else "missed"


def arrived(gaps_ms: list[float]) -> RequestRecord:
    token_s = [float(at_s) for at_s in 1.1 + np.cumsum([0.0, *gaps_ms]) / 1e3]
    return saved(token_s=token_s, output_tokens=len(token_s), counted_by="token_ids")


def saved(**fields: object) -> RequestRecord:
    return RequestRecord(**({"id": "r", "planned_s": 1.0, "sent_s": 1.0, "end_s": 1000.0} | fields))


@pytest.mark.parametrize(
    "gaps_ms",
    [[10.0] * 9 + [10_000.0], [3.0] * 7 + [1000.0], [3.0, 1000.0], [1000.0, 3.0], [0.5] * 40 + [1000.0], [2.0, 20, 30]],
    ids=lambda gaps_ms: f"{gaps_ms[0]}, {gaps_ms[-1]}",
)
def test_a_stall_makes_no_tokens_come_with_the_first(gaps_ms):
    assert timings(arrived(gaps_ms)).requests.mean_tbt_ms == pytest.approx([np.mean(gaps_ms)])


@pytest.mark.parametrize("stalled_ms", [0.0, 5000.0])
@pytest.mark.parametrize("inside_ms", [0.002, 0.05, 0.3, 0.9])
@pytest.mark.parametrize(("size", "pieces"), [(2, 2), (4, 5), (8, 2), (8, 3), (16, 10)])
def test_events_of_a_gateways_first_piece_came_together(size, pieces, inside_ms, stalled_ms):
    """A token takes 20 ms; the pieces come when their last token is due."""
    gaps_ms = [inside_ms] * (size * pieces - 1)
    for place in range(1, pieces):
        gaps_ms[place * size - 1] = 20 * size - (size - 1) * inside_ms
    gaps_ms[-size] += stalled_ms
    truth_ms = (20 * size * (pieces - 1) + stalled_ms + (size - 1) * inside_ms) / (size * (pieces - 1))
    assert timings(arrived(gaps_ms)).requests.mean_tbt_ms == pytest.approx([truth_ms])


@pytest.mark.parametrize("inside_ms", [0.002, 0.3, 0.9])
@pytest.mark.parametrize(("tokens", "size", "pieces"), [(8, 8, 5), (3, 6, 10)])
def test_tokens_of_one_chunk_do_not_hide_the_pieces_of_a_gateway(tokens, size, pieces, inside_ms):
    """Chunks of so many tokens with ids, 10 ms each, so many chunks per piece: mean TBT of 8 tokens, 8 chunks was 8.2 ms."""
    chunk_ms = [0.0] * (tokens - 1)
    piece_ms = [*chunk_ms, *([inside_ms, *chunk_ms] * (size - 1))]
    whole_ms = 10.0 * tokens * size
    gaps_ms = [*piece_ms, *([whole_ms - inside_ms * (size - 1), *piece_ms] * (pieces - 1))]
    truth_ms = sum(gaps_ms) / (tokens * size * (pieces - 1))
    assert timings(arrived(gaps_ms)).requests.mean_tbt_ms == pytest.approx([truth_ms])


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("sizes", [[1, 2], [1, 1, 2], [1, 2, 1], [2, 1], [2, 1, 1]], ids=str)
def test_a_chunk_of_two_words_has_the_token_that_usage_counts(sizes, finish):
    record = answer(chunked(sizes), sum(sizes), finish)
    assert record.unsent_tokens == 0
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10])
    assert [judged(record, limit_ms) for limit_ms in (9.9, 10.1)] == ["missed", "met"]


@pytest.mark.parametrize(
    "pieces",
    [[(1, "Hel"), (2, "lowor")], [(1, "我们"), (1, "一起"), (2, "工作了")], [(2, "lowor"), (1, "ld"), (1, "ly")]],
)
def test_one_token_that_may_be_in_a_chunk_or_the_end_of_the_text_is_judged_by_bounds(pieces):
    record = answer(texts(*pieces), sum(tokens for tokens, _ in pieces))
    span_ms, chunks = 1e3 * (record.token_s[-1] - record.token_s[0]), len(pieces)
    least_ms, most_ms = span_ms / chunks, span_ms / (chunks - 1)
    assert timings(record).requests.mean_tbt_ms == pytest.approx([most_ms])
    limits_ms = least_ms * 0.99, (least_ms + most_ms) / 2, most_ms * 1.01
    assert [judged(record, limit_ms) for limit_ms in limits_ms] == ["missed", "undecided", "met"]


def test_one_token_too_many_of_choices_reasoning_and_calls_is_judged_by_bounds():
    thought = [(1, delta(reasoning="so ")), *((1, delta(content="a ")) for _ in range(4))]
    record = record_of(thought, delta("stop"), usage(5, 6))
    assert [judged(record, limit_ms) for limit_ms in (7.9, 9.0, 10.1)] == ["missed", "undecided", "met"]
    pieces = []
    for place in range(10):
        piece = token("a ", None)
        piece["choices"][0]["index"] = place % 2
        pieces.append((place % 2, piece))
    ends = [{"choices": [{"index": index, "text": "", "finish_reason": "stop"}]} for index in (0, 1)]
    record = record_of(pieces, *ends, usage(5, 12), n=2)
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10])
    assert [judged(record, limit_ms) for limit_ms in (7.9, 9.0, 10.1)] == ["missed", "undecided", "met"]


def test_text_bounds_the_tokens_of_the_first_chunk():
    record = answer(texts((8, "a " * 8), (1, " internationaliz")), 9)
    assert record.first_tokens == 8 and timings(record).requests.mean_tbt_ms == pytest.approx([10])
    assert judged(record, 5.0) == "missed" and judged(record, 10.1) == "met"
    record = answer(texts((1, "a"), (8, "internationalization")), 9, "length")
    assert record.first_tokens == 1 and judged(record, 9.9) == "missed" and judged(record, 10.1) == "met"


def test_mean_tbt_by_the_share_of_text_is_judged_by_bounds():
    record = answer(texts((8, "abcdefgh"), (1, "internationalization")), 9)
    least_ms, most_ms = (10 / later for later in (8, 1))
    assert least_ms < timings(record).requests.mean_tbt_ms[0] < most_ms
    limits_ms = 0.99 * least_ms, 5.0, 1.01 * most_ms
    assert [judged(record, limit_ms) for limit_ms in limits_ms] == ["missed", "undecided", "met"]


def test_records_without_bounds_are_judged_by_their_instants():
    record = saved(token_s=[1.1 + 0.04 * i for i in range(10)], output_tokens=40, counted_by="chunks", first_tokens=4)
    assert timings(record).requests.mean_tbt_ms == pytest.approx([10])
    assert [judged(record, limit_ms) for limit_ms in (9.2, 20.0, 40.1, inf)] == ["missed", "undecided", "met", "met"]


@pytest.mark.parametrize(
    ("prompt", "texts", "echoed"),
    [
        ("Tell me\n", ["Tell", " me", "\n", "Once"], 3),
        ("Tell me\n", ["Tell", " me\n", "\n", "Once"], 2),
        ("Tell me", ["Tell", " me", "\n", "Once"], 2),
        ("Tell me \n\n", ["Tell", " me", " ", "\n", "\n", "\n", "Once"], 5),
        ("Tell me\n", ["Tell", " me", "Once"], 2),
        ("\nTell me\n", ["Tell", " me", "\n", "Once"], 3),
        ("Tell me\n", ["Once"], 0),
    ],
)
def test_whitespace_at_an_echoed_prompts_end_is_no_answer(prompt, texts, echoed):
    assert echoed_chunks(texts, prompt) == echoed
