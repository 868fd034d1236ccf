"""Tokens that usage counts and nobody sent, beside answers of the same chunks and usage in which they were sent.

Token i of an answer is due 10 ms * i after the first one; a chunk comes when its last token is due.
"""

from math import nan

import pytest

from pdbench.load.texts import fewest_tokens
from pdbench.records import RequestRecord
from tests.load.test_counting import FINISH, Piece, ids, record_of, timings, with_reasoning
from tests.load.test_mean_tbt import answer, judged
from tests.support.servers import token, usage
from tests.support.streams import delta

TEXT = "One| in|stance| reads| the| prompt|,| another| writes| the| answer|.| Dis|agg|regation| pays| where| pre|fill| dist|urbs| decode|."
TOKENS = TEXT.split("|")
WORDS = ["word "] * 10
STOP = {"stop": ["\n\n", "</answer>"]}


def chunks(texts: list[str], size: int = 1) -> list[Piece]:
    """One chunk per text, each of so many tokens."""
    return [(size, token(text, None)) for text in texts]


def with_ids(texts: list[str]) -> list[Piece]:
    return [(1, token(text, [place])) for place, text in enumerate(texts)]


def mean_tbt_ms(record: RequestRecord) -> object:
    return pytest.approx(float(timings(record).requests.mean_tbt_ms[0]), nan_ok=True)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("word", ["word ", " пятьсот", "word\n"])
def test_whole_words_may_be_any_number_of_tokens(word, size):
    """40 tokens beside reasoning that was not sent, or 80 with it: mean TBT of the second was 20 ms for 10."""
    record = with_reasoning(chunks([word] * 40, size), 80, 40)
    assert record.unsent_tokens is None and record.notes == ["reasoning-unknown"]
    assert mean_tbt_ms(record) == nan and judged(record, 9.95) == "undecided"


@pytest.mark.parametrize("unsent", [1, 2, 3, 8])
@pytest.mark.parametrize("way", [chunks, with_ids])
def test_a_stop_string_that_is_counted_and_not_sent_divides_nothing(way, unsent):
    record = answer(way(TOKENS), len(TOKENS) + unsent, **STOP)
    assert (record.output_tokens, record.unsent_tokens, record.notes) == (len(TOKENS) + unsent, unsent, [])
    assert mean_tbt_ms(record) == 10 and not record.coarse


@pytest.mark.parametrize("signs", ["：**", "”.", "，{", "🎉!", '…")'])
def test_signs_of_ascii_and_others_are_one_token(signs):
    """Taken for two, they held the end of the text: mean TBT was 8.6 ms."""
    record = answer(chunks(["要点", signs, "预", "填充", " and", " de", "code"]), 8)
    assert record.unsent_tokens == 1 and mean_tbt_ms(record) == 10
    assert fewest_tokens([signs, "नमस्ते", " x", "²"]) == 4


@pytest.mark.parametrize(("texts", "size", "tokens"), [(WORDS, 1, 13), (["lowor"] * 10, 2, 20), (WORDS, 2, 23)])
def test_mean_tbt_is_unknown_where_nothing_tells_a_stop_string_from_larger_chunks(texts, size, tokens):
    record = answer(chunks(texts, size), tokens, **STOP)
    assert record.unsent_tokens is None and record.notes == ["unsent-unknown"]
    assert mean_tbt_ms(record) == nan and judged(record, 9.95) == judged(record, 9.5) == "undecided"


@pytest.mark.parametrize("stop", ["</answer>", "<|im_end|>\n<|im_start|>user"])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("count", [10, 22])
def test_a_server_that_holds_back_what_may_begin_a_stop_string_cuts_tokens(stop, ended, count):
    """Halves of words are no tokens: mean TBT was judged by one for each, as if all tokens had come after the first chunk."""
    tokens = [*TOKENS[:count], *(["</", "answer", ">"] if ended else [])]
    whole, sent, pieces, waits = "".join(TOKENS[:count]), 0, [], 1
    for place in range(1, len(tokens) + 1):
        safe = len(whole) if place == len(tokens) else min(len("".join(tokens[:place])) - len(stop) + 1, len(whole))
        if safe > sent:
            pieces.append((waits, token(whole[sent:safe], None)))
            sent, waits = safe, 0
        waits += 1
    record = record_of(pieces, token("", None, "stop" if ended else "length"), usage(5, len(tokens)), stop=[stop])
    assert record.output_tokens == len(tokens)
    assert judged(record, 9.95) in ("undecided", "missed") and judged(record, 10.05) in ("undecided", "met")


def test_the_text_after_the_first_chunk_bounds_its_tokens_beside_a_stop_string():
    record = record_of(chunks(["word " * 4] * 10, 4), token("", None, "length"), usage(5, 40), stop=["</answer>"])
    assert [judged(record, limit_ms) for limit_ms in (9.0, 10.0, 12.0)] == ["missed", "undecided", "met"]


@pytest.mark.parametrize("unsent", [2, 5, 8])
@pytest.mark.parametrize("texts", [TOKENS, WORDS])
def test_a_limit_is_judged_by_a_stop_string_of_the_servers_own_too(texts, unsent):
    assert judged(answer(chunks(texts), len(texts) + unsent), 9.95) == "undecided"


@pytest.mark.parametrize("best_of", [2, 4])
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("way", [chunks, with_ids])
def test_choices_that_are_counted_and_not_sent_divide_nothing(way, end, best_of):
    count = len(TOKENS)
    record = answer(way(TOKENS), best_of * (count + end), best_of=best_of, max_tokens=count + 1)
    assert (record.output_tokens, record.notes) == (best_of * (count + end), [])
    assert record.unsent_tokens == record.output_tokens - count and mean_tbt_ms(record) == 10
    unknown = answer(chunks(WORDS), best_of * (10 + end), best_of=best_of)
    assert unknown.notes == ["unsent-unknown"] and mean_tbt_ms(unknown) == nan


def test_usage_on_every_chunk_that_counts_choices_which_are_not_sent_counts_no_tokens():
    pieces = [
        (1, token(text, None, usage={"prompt_tokens": 5, "completion_tokens": 4 * (place + 1)}))
        for place, text in enumerate(TOKENS)
    ]
    record = record_of(pieces, token("", None, "stop"), best_of=4)
    assert len(record.token_s) == len(TOKENS) and timings(record).tbt_ms == pytest.approx([10] * (len(TOKENS) - 1))
    assert record.unsent_tokens == 3 * len(TOKENS) and mean_tbt_ms(record) == 10


def test_choices_that_only_finish_and_the_best_two_of_four():
    def piece(choice: int, text: str, finish: str | None = None) -> dict:
        return {"choices": [{"index": choice, "text": text, "finish_reason": finish}]}

    ends = [piece(choice, "", "stop") for choice in (0, 1)]
    record = record_of(chunks(TOKENS), *ends, usage(5, 2 * len(TOKENS)), n=2)
    assert record.unsent_tokens == len(TOKENS) and mean_tbt_ms(record) == 10
    pieces = [(1 - choice, piece(choice, text)) for text in TOKENS for choice in (0, 1)]
    record = record_of(pieces, *ends, usage(5, 4 * len(TOKENS)), n=2, best_of=4)
    assert record.unsent_tokens == 2 * len(TOKENS) and mean_tbt_ms(record) == 10


@pytest.mark.parametrize("way", [chunks, with_ids])
def test_the_end_of_the_text_divides_nothing_beside_hidden_reasoning(way):
    record = with_reasoning(way(TOKENS), len(TOKENS) + 301, 300)
    assert record.unsent_tokens == 301 and mean_tbt_ms(record) == 10


CALL = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]
CALLS = [(1, delta(tool_calls=CALL, choice={"token_ids": [7]}))] * 3


@pytest.mark.parametrize("pieces", [[*ids(4, "reasoning"), *ids(4)], [*ids(4), *CALLS]], ids=["reasoning", "calls"])
def test_an_end_without_an_id_divides_nothing_after_what_a_parser_may_hold_back(pieces):
    """Or a marker had none: the limit is judged by both."""
    count = len(pieces)
    record = record_of(pieces, FINISH, usage(5, count + 1))
    assert record.unsent_tokens == 1 and mean_tbt_ms(record) == 10 and len(timings(record).tbt_ms) == count - 1
    limits_ms = 9.9 * (count - 1) / count, 9.9, 10.1
    assert [judged(record, limit_ms) for limit_ms in limits_ms] == ["missed", "undecided", "met"]


@pytest.mark.parametrize(("end", "unsent"), [(FINISH, 1), (delta("stop", choice={"token_ids": [9]}), 0)])
def test_a_marker_that_a_parser_holds_back_is_one_of_the_tokens_between(end, unsent):
    pieces = [*ids(4, "reasoning"), (2, ids(1)[0][1]), *ids(4), (1, end)]
    record = record_of(pieces, usage(5, len(pieces) + 1))
    assert record.unsent_tokens == unsent and mean_tbt_ms(record) == 10


@pytest.mark.parametrize("several", [" b c", "foo(bar", ", so", " 12 a"])
def test_chunks_of_several_pieces_hold_more_tokens_than_one_each(several):
    """Without ids and usage, an answer of which two chunks in five have two tokens had 100 of 140, and the rate of so many."""
    pieces = [*chunks([" word"] * 3), *chunks([several] * 2, 2)] * 20
    record = record_of(pieces, token("", None, "stop"))
    assert (record.output_tokens, record.notes) == (None, ["tokens-unknown"])


def test_markers_of_several_pieces_leave_one_token_per_chunk():
    texts = ["<think>", " word", "s", " so", "</think>", " yes", ",", " it", "'s", " 12", "\n"]
    record = record_of(chunks(texts), token("", None, "stop"))
    assert (record.output_tokens, record.notes) == (11, [])
