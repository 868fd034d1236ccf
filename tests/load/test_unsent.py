"""Tokens that usage counts and nobody sent, beside answers of the same chunks and usage in which they were sent.

Token i of an answer is due 10 ms * i after the first one; a chunk comes when its last token is due.
"""

import pytest

from pdbench.analysis.metrics import timings_of_requests
from tests.load.test_counting import Piece, with_reasoning
from tests.support.servers import token


def chunks(texts: list[str], size: int = 1) -> list[Piece]:
    """One chunk per text, each of so many tokens."""
    return [(size, token(text, None)) for text in texts]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("word", ["word ", " пятьсот", "word\n"])
def test_whole_words_may_be_any_number_of_tokens(word, size):
    """40 tokens beside reasoning that was not sent, or 80 with it: mean TBT of the second was 20 ms for 10."""
    record = with_reasoning(chunks([word] * 40, size), 80, 40)
    assert record.unsent_tokens is None and record.notes == ["reasoning-unknown"]
    figures = timings_of_requests([record], {"slo_tbt_ms": 9.95})
    assert figures.requests.mean_tbt_ms == pytest.approx([float("nan")], nan_ok=True)
    assert figures.slo.undecided.all()
