"""Which of the tokens that usage counts were not sent, and how many came with the first chunk: what ids, chunks and text tell of it.

Not sent are reasoning that stays with the server, the token or the stop string that ends a text, and choices beside those that are streamed
(`best_of`). No gap between arrivals was theirs, so they divide no mean. What a parser held back to send it as one was sent.
"""

from math import inf

import msgspec

from pdbench.load.texts import TOKEN_BYTES, are_tokens, bytes_of, fewest_tokens
from pdbench.records import COARSE_SHARE, RequestRecord

UNSEEN_TOKENS = 16
"""Markers and special tokens that a server may count beside the text that it sends."""


class Answer(msgspec.Struct, kw_only=True, gc=False):
    """What a stream says of its tokens beside their instants: `reasoning` that usage counts; is any `marked` as such, are there `tools`;
    `ends`, choices that ended before their limit without a token for it, each of `end_tokens` at most; does usage count `hidden` choices;
    `first_text` of the chunk with the first token."""

    texts: list[str]
    first_text: str
    reasoning: int
    marked: bool
    tools: bool
    ends: int
    end_tokens: int
    hidden: bool

    @property
    def parsed(self) -> bool:
        """May a parser of the server have held tokens back?"""
        return self.marked or self.tools

    @property
    def cut(self) -> bool:
        """May chunks end anywhere in a token? A server holds back what may begin a stop string, as many letters as that has at most."""
        return self.end_tokens > 1

    @property
    def fewest(self) -> int:
        """A lower bound for the tokens in the chunks, by their text."""
        return fewest_tokens(["".join(self.texts)] if self.cut else self.texts)

    @property
    def most_at_end(self) -> float:
        return inf if self.hidden else self.ends * self.end_tokens


def unsent_reasoning(record: RequestRecord, answer: Answer, total: int) -> int | None:
    """Of `total` tokens, the reasoning that was counted but not sent: its time was before the first token. None where nothing
    tells: chunks of several tokens are as few as tokens without the reasoning."""
    instants, size = len(record.token_s), bytes_of(answer.texts)
    rest = total - answer.reasoning
    if not answer.reasoning:
        return 0
    if not _by_chunks(record):
        return 0 if answer.marked else min(answer.reasoning, total - instants)
    if instants > rest and total - instants <= _few(total):
        return 0
    if size < total:  # a token has a byte at least: none came, or a summary
        return None if answer.marked else answer.reasoning
    if answer.marked or answer.fewest > rest or size > TOKEN_BYTES * rest:
        return 0
    if rest - instants <= max(_few(rest), answer.most_at_end) and are_tokens(answer.texts):
        return answer.reasoning
    return None if answer.reasoning > _few(total) else 0


def unsent_at_end(record: RequestRecord, answer: Answer, total: int) -> int | None:
    """Of `total` tokens without hidden reasoning, those of ends and hidden choices. None where nothing tells whether they are in chunks of
    several tokens instead."""
    instants, by_chunks = len(record.token_s), _by_chunks(record)
    missing = max(0, total - (max(instants, answer.fewest) if by_chunks else instants))
    if total - instants <= answer.ends:
        return missing
    if answer.most_at_end <= answer.ends:
        return min(missing, answer.ends) if answer.parsed else 0
    one_each = are_tokens(answer.texts) if by_chunks else not answer.parsed
    if missing <= answer.most_at_end and one_each:
        return missing
    return 0 if min(missing, answer.most_at_end) <= _few(total) else None


def bound_first(record: RequestRecord, answer: Answer, most: int) -> None:
    """The tokens of the first chunk where chunks may hold several: by its share of the text if they do, within what the text allows; and the
    fewest and the most that came after it, where at most `most` tokens were sent."""
    instants, known, choices = len(record.token_s), record.first_tokens, len(set(record.token_choice)) or 1
    sent = (record.output_tokens or 0) - (record.unsent_tokens or 0)
    first, size, first_size = [answer.first_text], bytes_of(answer.texts), bytes_of([answer.first_text])
    pieces, least_first, later = answer.fewest, known, instants - known
    if (_by_chunks(record) or record.coarse) and not answer.cut:
        least_first = max(known, fewest_tokens(first))
        later = max(later, pieces - fewest_tokens(first))
    elif _by_chunks(record):  # all but what may have been there, held back, and a token that was begun
        rest = "".join(answer.texts)[len(answer.first_text) + answer.end_tokens - 1 :]
        later = max(later, fewest_tokens([rest]) - 1)
    share = first_size / size if size else 1 / instants
    record.first_tokens = max(known, min(max(round(share * sent) if record.coarse else 1, least_first), sent - later))
    if choices > 1:
        record.later_tokens = [instants - choices, max(instants, most) - choices]
    elif record.unsent_tokens is not None:
        if first_size and not answer.parsed:  # a token has a byte at least
            # A stop string of the server's own may have ended the text, too, unless chunks plainly hold several tokens.
            end_tokens = answer.end_tokens if pieces > instants else max(answer.end_tokens, UNSEEN_TOKENS)
            held_back = answer.end_tokens - 1  # of them a token each
            later = max(later, most - answer.ends * end_tokens - max(known, first_size + held_back))
        later = max(0, min(later, most - known))
        record.later_tokens = [later, max(later, most - least_first)]


def _by_chunks(record: RequestRecord) -> bool:
    return record.counted_by in ("chunks", "mixed")


def _few(tokens: int) -> float:
    """So many more or fewer make no difference."""
    return max(1, COARSE_SHARE * tokens)
