"""When tokens arrived, as arrays: first and last ones, gaps, and how many tokens an instant stands for.

Where there are more tokens than instants (a server without token ids, or one that holds tokens back), an instant is a chunk's and usage
says how many tokens the answer has: it weighs the instants and divides the time from first to last, but it makes no gaps between tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pdbench.records import RequestRecord

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
COARSE_REQUESTS = 0.01
"""Above this share of answers in larger chunks, no gap of a run is one between tokens."""
AT_ONCE, AT_ONCE_S = 0.05, (1e-4, 1e-3)
"""Up to this share of an answer's usual gap (the median, or where that is one within pieces, the usual large one), and within these limits, an arrival is of the same piece as the one before it."""
USUAL_LARGE = 0.95
"""The quantile of an answer's gaps that is its usual large one: between the pieces of a gateway that holds back up to 20 events, and no single stall."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """One entry per request: `answered` (no error), `ok` (and a token), `first_s`, `second_s`,
    `answer_s` (first token that is no reasoning), `mean_tbt_ms`, `mean_tbt_bounds_ms` (the least and the most it can be where nobody knows how many
    tokens came after the first arrival; else itself), `output_tokens`, `sent_tokens` of them, `coarse` (chunks hold several tokens); NaN is unknown.

    One entry per instant, failed requests' too: `token_s`, `request`, its row, and `weight`, how many tokens it stands for (1 unless counted by
    chunks; NaN: unknown). One per pair of neighbours: `is_gap` (of one successful answer),
    `coarse_gap` (between chunks of several tokens).
    """

    answered: BoolArray
    ok: BoolArray
    first_s: Array
    second_s: Array
    answer_s: Array
    mean_tbt_ms: Array
    mean_tbt_bounds_ms: tuple[Array, Array]
    output_tokens: Array
    sent_tokens: Array
    coarse: BoolArray
    token_s: Array
    request: IntArray
    weight: Array
    is_gap: BoolArray
    coarse_gap: BoolArray


def arrivals_of(records: Sequence[RequestRecord]) -> Arrivals:
    counts = np.array([len(record.token_s) for record in records], dtype=np.int64)
    token_s = np.fromiter(chain.from_iterable(map(_instants, records)), dtype=float, count=counts.sum())
    answered = np.array([record.error is None for record in records], dtype=bool)
    ok = answered & (counts > 0)
    request = np.repeat(np.arange(len(records)), counts)
    begin = np.cumsum(counts) - counts
    # A sequence is one choice of one request: its first token is at `head`, its last at `tail`.
    starts = np.diff(request, prepend=-1) != 0
    first_s, second_s = np.full((2, len(records)), np.nan)
    first_s[counts > 0] = token_s[begin[counts > 0]]
    second_s[counts > 1] = token_s[begin[counts > 1] + 1]
    answer_s = first_s.copy()
    for row, record in enumerate(records):
        if record.token_choice:
            starts[begin[row] + 1 : begin[row] + counts[row]] = np.diff(sorted(record.token_choice)) != 0
            first_s[row] = answer_s[row] = record.token_s[0]
            opened = np.array(record.token_choice) == record.token_choice[0]
            second_s[row] = np.append(np.array(record.token_s)[opened], np.nan)[1]
        if record.answer_index != 0:
            place = record.answer_index
            answer_s[row] = record.token_s[place] if place is not None and place < counts[row] else np.nan
    head = np.flatnonzero(starts)
    tail = np.append(head[1:], len(token_s))[: len(head)] - 1
    reported = column(records, "output_tokens")
    counted = np.array([record.counted_by is not None for record in records], dtype=bool)
    chunks = np.array([record.counted_by in ("chunks", "mixed") for record in records], dtype=bool)
    output_tokens = np.where(np.isnan(reported) & ~(chunks & answered), counts, reported)
    # From the first instant to the last there are all tokens but those that came at the first, or were never sent.
    choices = np.bincount(request[head], minlength=len(records))
    lasted_s = token_s[tail] - token_s[head]
    span_s = np.bincount(request[head], lasted_s, minlength=len(records))
    sent = np.where(counted, output_tokens - column(records, "unsent_tokens"), counts)
    coarse = ok & np.array([record.coarse for record in records], dtype=bool)
    at_first = np.bincount(request[head], _in_first_piece(token_s, head, tail), minlength=len(records)).astype(float)
    first_chunk = column(records, "first_tokens")
    with np.errstate(divide="ignore", invalid="ignore"):
        of_chunks = first_chunk + (at_first - 1) * (sent - first_chunk) / (counts - 1)
        heads = np.where(chunks, first_chunk + at_first - 1, np.maximum(first_chunk, at_first))
        heads = np.where(coarse & chunks, of_chunks, heads)
        heads = np.where(choices > 1, at_first * np.where(coarse, sent / counts, 1.0), heads)
        fewest, most = _later_bounds(records, counts, at_first, choices, np.where(np.isnan(sent), output_tokens, sent))
        bounded = np.array([bool(record.later_tokens) for record in records], dtype=bool)
        estimated = np.isnan(sent) | coarse | bounded | chunks & (output_tokens > counts)
        later = np.where(estimated, np.clip(sent - heads, fewest, most), sent - heads)
        mean_tbt_ms, least_ms, most_ms = (
            np.where(ok & (span_s > 0) & (tokens > 0), span_s / tokens * 1e3, np.nan)
            for tokens in (later, np.where(estimated, most, later), np.where(estimated, fewest, later))
        )
        weight = np.where(counted & (counts > 0), output_tokens / counts, 1.0)
    # Of answers that were cut nobody said how many tokens their chunks held: as many as the others'.
    whole = ok & chunks
    if whole.any():
        weight[chunks & ~answered & np.isnan(reported)] = output_tokens[whole].sum() / counts[whole].sum()
    # A few answers in larger chunks are left out; where there are more, the run has none.
    no_gaps = coarse | (coarse.sum() > COARSE_REQUESTS * ok.sum())
    return Arrivals(
        answered=answered,
        ok=ok,
        first_s=first_s,
        second_s=np.where(no_gaps, np.nan, second_s),
        answer_s=answer_s,
        mean_tbt_ms=mean_tbt_ms,
        mean_tbt_bounds_ms=(least_ms, most_ms),
        output_tokens=output_tokens,
        sent_tokens=sent,
        coarse=coarse,
        token_s=token_s,
        request=request,
        weight=weight[request],
        is_gap=~starts[1:] & ok[request[1:]],
        coarse_gap=no_gaps[request[1:]],
    )


def _in_first_piece(token_s: Array, head: IntArray, tail: IntArray) -> IntArray:
    """How many arrivals of each sequence came with its first: a gateway that holds events back writes them as one piece or one right after the
    other. (The last piece's are among those after the first.)"""
    count = np.ones(len(head), dtype=np.int64)
    for row in np.flatnonzero((tail > head) & (token_s[np.minimum(head + 1, tail)] - token_s[head] <= AT_ONCE_S[1])):
        gaps_s = np.diff(token_s[head[row] : tail[row] + 1])
        apart_s = gaps_s[gaps_s > 0] if gaps_s.any() else gaps_s  # tokens of one chunk say nothing of pieces
        median_s = np.quantile(apart_s, 0.5, method="lower")
        large_s = np.quantile(apart_s, USUAL_LARGE, method="higher")
        usual_s = median_s if median_s > AT_ONCE_S[1] else large_s  # most gaps are within pieces, or none is
        limit_s = min(max(AT_ONCE * usual_s, min(AT_ONCE * gaps_s.mean(), AT_ONCE_S[0])), AT_ONCE_S[1])
        later = gaps_s > limit_s
        count[row] += later.argmax() if later.any() else len(gaps_s)
    return count


def _later_bounds(
    records: Sequence[RequestRecord], counts: IntArray, at_first: Array, choices: IntArray, sent: Array
) -> tuple[Array, Array]:
    """How many tokens came after the first arrival: the instants at least, at most all others that were sent; or what the text says."""
    fewest, most = counts - at_first, np.where(np.isnan(sent), np.inf, sent - at_first)
    for row, record in enumerate(records):
        if record.later_tokens:
            least, beyond = record.later_tokens
            by_chunks = record.counted_by in ("chunks", "mixed")
            first_chunk = choices[row] if by_chunks else max(choices[row], record.first_tokens)
            more = max(0, at_first[row] - first_chunk)  # pieces of the first arrival beside it
            fewest[row] = max(fewest[row], least) if not more else fewest[row]
            most[row] = max(fewest[row], beyond - more)
    return fewest, most


def column(records: Sequence[RequestRecord], name: str) -> Array:
    """One field of the records; None is NaN."""
    return np.array([getattr(record, name) for record in records], dtype=float)


def _instants(record: RequestRecord) -> list[float]:
    """A record's arrivals; of several choices, each choice's together."""
    if not record.token_choice:
        return record.token_s
    return [at_s for _, at_s in sorted(zip(record.token_choice, record.token_s, strict=True))]
