"""The model's own tokenizer, and text of an exact number of its tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdbench.errors import UserError

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
    try:
        import tokenizers
    except ImportError:
        return None
    path = Path(name) / "tokenizer.json"
    try:
        if path.is_file():
            encoder = tokenizers.Tokenizer.from_file(str(path))
        elif hub and not Path(name).exists():
            encoder = tokenizers.Tokenizer.from_file(_from_hub(name))
        else:
            return None
    except Exception:
        # The library raises bare Exception for everything: a broken file, no network, no such model.
        return None
    encoder.no_truncation()
    encoder.no_padding()
    return Tokenizer(encoder)


def _from_hub(name: str) -> str:
    """The path of a hub model's tokenizer.json: the cached one, else a fresh one if the hub answers within seconds."""
    import huggingface_hub as hub

    try:
        return str(hub.hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        # A download without a network is tried again for a minute; this question is asked once.
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "tokenizer.json"), timeout=_HUB_TIMEOUT_S)
        return str(hub.hf_hub_download(name, "tokenizer.json"))


def exact_text(sentences: Iterator[str], tokens: int, tokenizer: Tokenizer, start: str = "") -> str:
    """`start` continued by `sentences` to exactly `tokens` tokens. Raises UserError where the tokenizer allows no such text."""
    text = start
    while tokenizer.count(text) < tokens:
        # Doubling the look-ahead keeps the number of encodings small for very long prompts.
        missing = tokens - tokenizer.count(text)
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
