"""Two greedy answers to one prompt: are they the same but for choices between tokens that nearly tie?

Batches, and prefill and decode, change sums in the last bits, and with them such choices: an answer may part from the reference there, and
the reference then goes on from the answer's own tokens. Any other difference is wrong (docs/correctness.md has the error rates).
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdbench.errors import NOT_JSON

NEAR_TIE_NATS = 0.5
"""Up to this difference of log probabilities another batch may choose the other token: docs/correctness.md has what was measured."""
MOST_UNDECIDED, FEWEST_UNDECIDED = 0.5, 3
"""More than this share of the answers, and so many at least, part at near ties too often for chance."""
TOKENS = 16
"""Tokens of an answer that are compared, by the gate and of canaries."""
LIKELIEST = 5
"""How many of the likeliest tokens a reference names at every place."""


@dataclass(frozen=True)
class Answer:
    """A reference's answer: its text and tokens, and at each place the log probabilities of the likeliest tokens.

    Tokens are "token_id:N" where the server says so, else texts; there are none where it gives no logprobs.
    """

    text: str
    tokens: list[str] = field(default_factory=list)
    likeliest: list[dict[str, float]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    salted: bool = True


def read(body: bytes, *, salted: bool = True) -> Answer:
    """The answer in a whole (not streamed) response of either endpoint. Raises OSError for anything else."""
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        logprobs = choice.get("logprobs") or {}
        if "message" in choice:
            text, places = choice["message"].get("content") or "", logprobs.get("content") or []
            tokens = [str(each["token"]) for each in places]
            likeliest = [
                {str(each["token"]): float(each["logprob"]) for each in place["top_logprobs"]} for place in places
            ]
        else:
            text, tokens = choice.get("text") or "", [str(token) for token in logprobs.get("tokens") or []]
            likeliest = [dict(place or {}) for place in logprobs.get("top_logprobs") or []]
        prompt_ids = choice.get("prompt_token_ids") or document.get("prompt_token_ids") or []
        return Answer(text, tokens, likeliest, list(choice.get("token_ids") or []), list(prompt_ids), salted)
    except (*NOT_JSON, LookupError, TypeError, AttributeError) as error:
        begin = body[:60].decode("utf-8", "replace")
        raise OSError(f"{begin!r}, which is no completion in JSON ({type(error).__name__})") from None


def compare(answer: Answer, token_ids: Sequence[int], text: str) -> tuple[str, int | None, float | None]:
    """(verdict, equal tokens before the first difference, gap there in nats) of another answer to the same prompt; see Canary.

    By token ids where both have them, else by text.
    """
    if answer.token_ids and token_ids:
        for place, (theirs, other) in enumerate(zip(answer.token_ids, token_ids, strict=False)):
            if theirs != other:
                return _parted(answer, place, f"token_id:{other}".__eq__)
        return "equal", min(len(answer.token_ids), len(token_ids)), None
    whole = answer.text.rstrip("\ufffd")  # half a character, which the next token would complete
    if text.startswith(whole) or whole.startswith(text):
        return "equal", None, None
    at = 0
    if "".join(answer.tokens) == answer.text:
        for place, token in enumerate(answer.tokens):
            if not text.startswith(token, at):
                return _parted(answer, place, functools.partial(_begins, text[at:]))
            at += len(token)
    return "undecided", None, None


def _begins(text: str, token: str) -> bool:
    """Can this token be the text's first? Of one without a text of its own nobody can say."""
    return not token.strip("\ufffd") or text.startswith(token)


def _parted(answer: Answer, place: int, chosen: Callable[[str], bool]) -> tuple[str, int, float | None]:
    """The verdict on an answer whose token at `place`, which `chosen` recognises, is not the reference's."""
    likeliest = answer.likeliest[place] if place < len(answer.likeliest) else {}
    own = likeliest.get(answer.tokens[place]) if place < len(answer.tokens) else None
    if own is None:
        return "undecided", place, None
    gaps = [own - logprob for token, logprob in likeliest.items() if token != answer.tokens[place] and chosen(token)]
    gap = min(gaps, default=None)
    # A token that is not among the likeliest is less likely than all of them: with five near ties that says nothing.
    least = own - min(likeliest.values()) if gap is None else gap
    return "undecided" if least <= NEAR_TIE_NATS else "wrong", place, gap


def follow(
    answer: Answer, token_ids: Sequence[int], place: int | None, ask: Callable[[Sequence[int], int], Answer]
) -> tuple[str, int | None, float | None]:
    """As `compare`, of an answer that parted at `place` in what may be a near tie: `ask(prompt, tokens)` has the reference go on from the
    answer's own tokens, as often as they part. "near-tie" where all that follows is equal, "undecided" where nobody can say."""
    ids = token_ids[: len(answer.token_ids)]
    while answer.prompt_ids and ids and answer.likeliest and place is not None:
        begun, rest = ids[: place + 1], ids[place + 1 :]
        if not rest:
            return "near-tie", place, None
        try:
            second = ask((*answer.prompt_ids, *begun), len(rest))
        except OSError:
            break
        verdict, equal, gap = compare(second, rest, "")
        if not second.token_ids or not second.likeliest:
            break
        if verdict != "undecided":
            return "near-tie" if verdict == "equal" else verdict, len(begun) + (equal or 0), gap
        place = len(begun) + (equal or 0)
    return "undecided", place, None


def too_many(near_ties: int, answers: int) -> bool:
    return near_ties >= FEWEST_UNDECIDED and near_ties > MOST_UNDECIDED * answers
