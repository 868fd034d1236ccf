"""Prompts: real English and Chinese texts, exact token lengths, shared prefixes, ShareGPT and text files.

Same seed, same bytes, on every machine; every prompt begins with its own number, so that no prefix cache answers by chance.
Seeds of texts hold the measurement's nonce, so that no cache knows them from an earlier one.
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

_QUESTIONS = 16
_HUB_TIMEOUT_S = 5.0
_FILLERS = (" a", "a", " 1", "1", ".", "\n", " the", "的", "e", "!")


class Tokenizer:
    """Counts as the server does: with the special tokens that the model's tokenizer puts around a prompt."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def count(self, text: str) -> int:
        """Number of tokens the server makes of a completion prompt."""
        return len(self._encoder.encode(text).ids)

    def cut(self, text: str, tokens: int) -> str:
        """About the first `tokens` tokens of `text`."""
        return str(self._encoder.decode(self._encoder.encode(text).ids[:tokens], skip_special_tokens=True))


def load_tokenizer(name: str, *, hub: bool = True) -> Tokenizer | None:
    """The tokenizer of a model folder (tokenizer.json) or hub name; None when there is none to be had.

    With `hub` False only a local folder is looked at.
    """
    path = Path(name) / "tokenizer.json"
    try:
        import tokenizers

        if not path.is_file():
            if Path(name).exists() or not hub:
                return None
            import huggingface_hub

            try:
                path = Path(huggingface_hub.hf_hub_download(name, path.name, local_files_only=True))
            except huggingface_hub.errors.LocalEntryNotFoundError:
                # A download without a network is tried again for a minute; this question is asked once.
                url = huggingface_hub.hf_hub_url(name, path.name)
                huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S)
                path = Path(huggingface_hub.hf_hub_download(name, path.name))
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception:
        # The libraries raise bare Exception for everything: a broken file, no network, no such model.
        return None
    encoder.no_truncation()
    encoder.no_padding()
    return Tokenizer(encoder)


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


def of_blocks(tokens: int, block_ids: Sequence[int], block_tokens: int, group: str, tokenizer: Tokenizer) -> str:
    """A prompt made of blocks that are equal wherever their id is in a group (Mooncake's hash_ids), exactly `tokens` long in all.

    Equal ids and lengths give equal prompts.
    """
    *whole, last = (f"{group}/block/{block}" for block in block_ids)
    start = "".join(_shared_prefix(block_tokens, block, tokenizer) for block in whole)
    if tokenizer.count(start) >= tokens:
        start = tokenizer.cut(start, max(1, tokens - 1))
    return exact_text(sentences_in_random_order(f"shared/{last}"), tokens, tokenizer, start + number(last))


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
            for conversation in json.loads(text):
                turns = conversation.get("conversations") or conversation.get("conversation") or []
                # A conversation that does not begin with a person's question is left out.
                if turns and turns[0].get("from") in ("human", "user") and turns[0].get("value"):
                    pairs.append((turns[0]["value"], turns[1].get("value") if len(turns) > 1 else None))
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                row += 1
                if line.strip():
                    fields = json.loads(line)
                    pairs.append((str(fields["prompt"]), fields.get("reply")))
        else:
            parts = re.split(r"\n\s*\n", text.strip()) if re.search(r"\n\s*\n", text.strip()) else text.splitlines()
            pairs += [(part.strip(), None) for part in parts if part.strip()]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        where = f"{path}, row {row}" if row else path
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f'--prompt-file {where}: {reason}; give ShareGPT .json, .jsonl with "prompt", or text'
        ) from None
    if not pairs:
        raise UserError(f"--prompt-file {path} holds no prompt")
    return pairs


@functools.lru_cache(maxsize=4096)
def _shared_prefix(tokens: int, group: str, tokenizer: Tokenizer) -> str:
    start = number(group)
    if tokenizer.count(start) > tokens:
        start = ""
    return exact_text(sentences_in_random_order(f"shared/{group}"), tokens, tokenizer, start)


def number(seed: str) -> str:
    """What a prompt begins with: decimal digits, of which most tokenizers make the same number of tokens every time."""
    return f"No. {random.Random(f'number/{seed}').randrange(10**12):012d}."
