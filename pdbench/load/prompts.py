"""Prompts: real English and Chinese texts, exact token lengths, shared prefixes, ShareGPT and text files.

Same seed, same bytes, on every machine; every prompt begins with its own number, so that no prefix cache answers by chance.
"""

import functools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pdbench.errors import UserError
from pdbench.load.tokenizer import Tokenizer, exact_text

QUESTIONS = 16


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


def built_in(index: int, tag: str) -> str:
    """The built-in question of this index (20 to 100 words or characters), numbered by `tag`."""
    return f"{tag} {passages()[index % QUESTIONS]}"


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
        start += ("\n" if start else "") + _number(seed)
    if tokenizer.count(start) > tokens:
        start = tokenizer.cut(start, max(1, tokens - 1))
    return exact_text(sentences_in_random_order(seed), tokens, tokenizer, start)


def of_blocks(tokens: int, block_ids: Sequence[int], block_tokens: int, seed: str, tokenizer: Tokenizer) -> str:
    """A prompt made of blocks that are equal wherever their id is (Mooncake's hash_ids), exactly `tokens` long in all."""
    start = "".join(_shared_prefix(block_tokens, f"block/{block}", tokenizer) for block in block_ids[:-1])
    if tokenizer.count(start) >= tokens:
        start = tokenizer.cut(start, max(1, tokens - 1))
    return exact_text(sentences_in_random_order(seed), tokens, tokenizer, start)


def length(mean: int, distribution: str, spread: float, seed: str) -> int:
    """One length: fixed; uniform in mean * (1 +- spread); lognormal of this mean with sigma = spread. At least 1."""
    if distribution == "fixed":
        return mean
    uniform = random.Random(f"length/{seed}").random()
    if distribution == "uniform":
        return max(1, round(mean * (1 - spread + 2 * spread * uniform)))
    normal = NormalDist().inv_cdf(min(max(uniform, 1e-12), 1 - 1e-12))
    return max(1, round(mean * math.exp(spread * normal - spread**2 / 2)))


def read_prompt_file(path: Path) -> list[tuple[str, str | None]]:
    """(prompt, reply or None) of a ShareGPT JSON, of our own JSONL ({"prompt", "reply"}) or of a text file.

    A text file holds one prompt per paragraph; without an empty line in it, one per line. Raises UserError with the row.
    """
    pairs: list[tuple[str, str | None]] = []
    row = 0
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            pairs += [pair for conversation in json.loads(text) if (pair := _conversation(conversation))]
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                row += 1
                if line.strip():
                    fields = json.loads(line)
                    pairs.append((str(fields["prompt"]), fields.get("reply")))
        else:
            parts = re.split(r"\n\s*\n", text.strip()) if re.search(r"\n\s*\n", text.strip()) else text.splitlines()
            pairs += [(part.strip(), None) for part in parts if part.strip()]
    except (OSError, UnicodeDecodeError, ValueError, TypeError, AttributeError, KeyError) as error:
        where = f"{path}, row {row}" if row else path
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f'--prompt-file {where}: {reason}; give ShareGPT .json, .jsonl with "prompt", or text'
        ) from None
    if not pairs:
        raise UserError(f"--prompt-file {path} holds no prompt")
    return pairs


def _conversation(conversation: dict[str, Any]) -> tuple[str, str | None] | None:
    """The first question and its reply; None for a conversation that does not begin with a person's question."""
    turns = conversation.get("conversations") or conversation.get("conversation") or []
    if not turns or turns[0].get("from") not in ("human", "user") or not turns[0].get("value"):
        return None
    return turns[0]["value"], turns[1].get("value") if len(turns) > 1 else None


@functools.lru_cache(maxsize=4096)
def _shared_prefix(tokens: int, group: str, tokenizer: Tokenizer) -> str:
    start = _number(group)
    if tokenizer.count(start) > tokens:
        start = ""
    return exact_text(sentences_in_random_order(f"shared/{group}"), tokens, tokenizer, start)


def _number(seed: str) -> str:
    return f"No. {random.Random(f'number/{seed}').getrandbits(40):010x}."
