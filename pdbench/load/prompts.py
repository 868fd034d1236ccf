"""Prompts: real English and Chinese texts, exact token lengths, shared prefixes and blocks.

Same seed, same bytes, on every machine; every prompt begins with its own number, so that no prefix cache answers by chance.
Seeds of texts hold the measurement's nonce, so that no cache knows them from an earlier one.
"""

import functools
import math
import random
import re
from collections.abc import Hashable, Iterator, Sequence
from importlib import resources
from statistics import NormalDist

from pdbench.errors import UserError
from pdbench.load.prompt_files import Prompt
from pdbench.load.tokenizer import Tokenizer

_QUESTIONS = 16
_NUMBER_TOKENS = 16
_FILLERS = (" a", "a", " 1", "1", ".", "\n", " the", "的", "e", "!")


def exact_text(sentences: Iterator[str], tokens: int, tokenizer: Tokenizer, start: str = "") -> str:
    """`start` continued by `sentences` to exactly `tokens` tokens. Raises UserError where the tokenizer allows no such text."""
    text = start
    while (missing := tokens - tokenizer.count(text)) > 0:
        # Doubling the look-ahead keeps the number of encodings small for very long prompts.
        added = 0
        while added < missing:
            sentence = next(sentences)
            text, added = text + sentence, added + max(1, len(sentence) // 4)
    text = tokenizer.cut(text, tokens).replace("\N{REPLACEMENT CHARACTER}", "")
    for _ in range(4 * tokens + 64):
        count = tokenizer.count(text)
        if count == tokens:
            return text
        if count > tokens:
            text = text[:-1]
            continue
        grown = ((text + filler, tokenizer.count(text + filler)) for filler in _FILLERS)
        text = next((longer for longer, size in grown if count < size <= tokens), text[:-1])
        if not text:
            break
    raise UserError(f"no text of exactly {tokens} tokens with this tokenizer: ask for more --input-tokens")


@functools.cache
def passages() -> tuple[str, ...]:
    """The built-in texts: the first 16 are questions, the rest is prose that long prompts are made of."""
    text = resources.files("pdbench.load").joinpath("texts.txt").read_text(encoding="utf-8")
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())


@functools.cache
def _sentences() -> tuple[str, ...]:
    return tuple(
        part
        for text in passages()
        for part in re.findall(r"[^.?!\u3002\uff1f\uff01]+[.?!\u3002\uff1f\uff01]+[\"\u201d]?", text)
    )


def built_in(index: int, seed: str) -> str:
    """The built-in question of this index (20 to 100 words or characters), numbered by `seed`."""
    return f"{number(seed)} {passages()[index % _QUESTIONS]}"


def sentences_in_random_order(seed: str) -> Iterator[str]:
    """Endless real sentences, drawn by `seed`."""
    generator = random.Random(f"text/{seed}")
    while True:
        yield " " + _sentences()[int(generator.random() * len(_sentences()))].strip()


def of_length(tokens: int, seed: str, tokenizer: Tokenizer, *, shared: float = 0.0, group: str = "0") -> str:
    """A prompt of exactly `tokens` tokens, whose first `shared` (0 to 1) is the same for all prompts of a group and length."""
    start = ""
    if shared > 0:
        prefix_tokens = round(tokens * shared)
        start = _shared_prefix(prefix_tokens, group, tokenizer) if prefix_tokens > 1 else ""
    if shared < 1:
        start += ("\n" if start else "") + number(seed)
    if tokenizer.count(start) > tokens:
        start = tokenizer.cut(start, max(1, tokens - 1))
    return exact_text(sentences_in_random_order(seed), tokens, tokenizer, start)


def of_blocks(
    tokens: int,
    block_ids: Sequence[Hashable],
    block_tokens: int,
    group: str,
    seed: str,
    tokenizer: Tokenizer,
    *,
    may_be_ids: bool = False,
) -> Prompt:
    """A prompt of blocks that are equal wherever their id is in a group (Mooncake's hash_ids), exactly `tokens` long in all.

    Equal ids and lengths give equal prompts; what no id names is this prompt's own, by `seed`. What the server puts before a
    prompt takes the first tokens' place, so that blocks stand where the server's own blocks do. It is a text; where the
    tokenizer would make other tokens of that, it is token ids with `may_be_ids`, else a text that is adjusted at its end.
    """
    ids = [id_ for block in block_ids for id_ in _block(f"{group}/block/{block!r}", block_tokens, tokenizer)]
    if len(ids) < tokens:
        ids += _block(f"{seed}/rest", tokens - len(ids), tokenizer)
    ids = ids[tokenizer.added : tokens]
    text = tokenizer.decode(ids)
    if tokenizer.encode(text) == ids:
        return text
    if may_be_ids and len(tokenizer.start) == tokenizer.added:
        return (*tokenizer.start, *ids)
    return exact_text(sentences_in_random_order(seed), tokens, tokenizer, text)


def length(mean: int, distribution: str, spread: float, seed: str) -> int:
    """One length: fixed; uniform in mean * (1 +- spread); lognormal of this mean with sigma = spread. At least 1."""
    if distribution == "fixed":
        return mean
    uniform = random.Random(f"length/{seed}").random()
    if distribution == "uniform":
        return max(1, round(mean * (1 - spread + 2 * spread * uniform)))
    normal = NormalDist().inv_cdf(min(max(uniform, 1e-12), 1 - 1e-12))
    return max(1, round(mean * math.exp(spread * normal - spread**2 / 2)))


@functools.lru_cache(maxsize=4096)
def _block(seed: str, tokens: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids by `seed`: its number, then sentences; a block too short for a number is of random tokens."""
    sentences = _sentence_ids(tokenizer)
    draw = random.Random(f"ids/{seed}").random
    if tokens < _NUMBER_TOKENS:
        known = _known_ids(tokenizer)
        return tuple(known[int(draw() * len(known))] for _ in range(tokens))
    ids = tokenizer.encode(f" {number(seed)}")
    while len(ids) < tokens:
        ids += sentences[int(draw() * len(sentences))]
    return tuple(ids[:tokens])


@functools.lru_cache(maxsize=4)
def _sentence_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """English sentences, whose tokens can be cut anywhere and remain text."""
    return [tokenizer.encode(f" {sentence.strip()}") for sentence in _sentences() if sentence.isascii()]


@functools.lru_cache(maxsize=4)
def _known_ids(tokenizer: Tokenizer) -> list[int]:
    return sorted({id_ for ids in _sentence_ids(tokenizer) for id_ in ids})


@functools.lru_cache(maxsize=4096)
def _shared_prefix(tokens: int, group: str, tokenizer: Tokenizer) -> str:
    start = number(group)
    if tokenizer.count(start) > tokens:
        start = ""
    return exact_text(sentences_in_random_order(f"shared/{group}"), tokens, tokenizer, start)


def number(seed: str) -> str:
    """What a prompt begins with: decimal digits, of which most tokenizers make the same number of tokens every time."""
    return f"No. {random.Random(f'number/{seed}').randrange(10**12):012d}."
