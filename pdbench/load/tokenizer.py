"""Tokenizers that measure prompts as the server does: the model's tokenizer.json, else the server's own /tokenize."""

import functools
import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdbench.config import LoadConfig
from pdbench.errors import NOT_JSON, UserError
from pdbench.http import authorization, split_url
from pdbench.load.client import fetch

_HUB_TIMEOUT_S = 5.0
_SERVER_TIMEOUT_S = 30.0
# The names of text and special tokens in a request to /tokenize: vLLM and SGLang, llama.cpp.
_NAMES = (("prompt", "add_special_tokens"), ("content", "add_special"))
# Two texts, so that a template whose tokens merge with the message's is noticed.
_PROBES = ("Which river is the longest?", "No. 7. Prefill and decode take turns, and one of them waits.")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Counts a prompt's tokens as the server does: with those that it adds, special tokens or a chat template's.

    `encode` gives ids without these, `added` is how many they are; `start` are the ids that stand before a completion's prompt.
    `is_remote`: every call asks a server.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    added: int
    start: tuple[int, ...] = ()
    is_remote: bool = False

    def count(self, text: str) -> int:
        """Number of tokens that the server makes of a prompt, or of a chat's one message."""
        return len(self.encode(text)) + self.added

    def cut(self, text: str, tokens: int) -> str:
        """About the first `tokens` tokens of a prompt."""
        return self.decode(self.encode(text)[: max(0, tokens - self.added)])

    def after(self, head: str) -> "Tokenizer":
        """The same for what follows `head`, whose tokens are left out."""
        ids = self.encode(head)
        return replace(
            self,
            encode=lambda text: self.encode(head + text)[len(ids) :],
            decode=lambda rest: self.decode(ids + rest)[len(head) :],
            added=0,
            start=(),
        )

    @functools.lru_cache(maxsize=8)  # noqa: B019 (few tokenizers, which are kept for the next load anyway)
    def for_chat(self, added: int) -> "Tokenizer":
        """The same for the chat endpoint, whose template adds this many tokens and strips a message of blanks at its ends."""
        return replace(self, encode=lambda text: self.encode(text.strip()), added=added, start=())


def load_tokenizer(name: str, *, hub: bool = True) -> Tokenizer | None:
    """The tokenizer of a model folder (tokenizer.json) or, with `hub`, of a name on the hub; None when there is none to be had."""
    path = Path(name) / "tokenizer.json"
    try:
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
        stat = path.stat()
        return _of_file(str(path), stat.st_mtime_ns, stat.st_size)
    except Exception:
        # The libraries raise bare Exception for everything: a broken file, no network, no such model.
        return None


@functools.lru_cache(maxsize=4)
def _of_file(path: str, _changed_ns: int, _size: int) -> Tokenizer:
    """Kept for the next load: a large vocabulary takes half a second."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(path)
    encoder.no_truncation()
    encoder.no_padding()
    specials, text = encoder.encode("").ids, encoder.encode("a").ids
    # What stands after the text is the same for every prompt and cannot be sent within one.
    start = specials[: next((n for n, id_ in enumerate(text) if id_ not in specials), 0)]
    return Tokenizer(
        lambda text: encoder.encode(text, add_special_tokens=False).ids,
        lambda ids: encoder.decode(ids, skip_special_tokens=True),
        len(specials),
        tuple(start),
    )


def server_tokenizer(url: str, model: str, *, verify_tls: bool = True) -> Tokenizer | None:
    """The server's /tokenize and /detokenize (vLLM, SGLang, llama.cpp): exact for every kind; None when it has none."""
    server = _TokenizeServer(url, verify_tls=verify_tls)

    def ids_of(names: tuple[str, str], text: str, *, special: bool = False) -> list[int]:
        return server.tokenize({"model": model, names[0]: text, names[1]: special})

    def decode(ids: list[int]) -> str:
        answer = server.ask("/detokenize", {"model": model, "tokens": ids}) if ids else {"text": ""}
        texts = [answer[key] for key in ("prompt", "text", "content") if isinstance(answer.get(key), str)]
        if not texts:
            raise UserError(f"{url}/detokenize gives no text: give --tokenizer FOLDER with the model's tokenizer.json")
        return str(texts[0])

    try:
        for names in _NAMES:
            if plain := ids_of(names, "Paris"):
                break
        else:
            return None
        whole = ids_of(names, "Paris", special=True)
    except (OSError, ValueError):
        return None
    added = len(whole) - len(plain)
    encoded = functools.lru_cache(maxsize=256)(lambda text: tuple(ids_of(names, text)) if text else ())
    start = tuple(whole[:added]) if whole[added:] == plain else ()
    return Tokenizer(lambda text: list(encoded(text)), decode, added, start, is_remote=True) if added >= 0 else None


class _TokenizeServer:
    """Asks a server about tokens over one connection. Raises OSError or ValueError when it does not tell."""

    def __init__(self, url: str, *, verify_tls: bool = True) -> None:
        self._url, self._server = url, split_url(url, verify_tls=verify_tls)
        self._connection = self._server.connect(_SERVER_TIMEOUT_S)

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        ids = self.ask("/tokenize", body).get("tokens")
        if not isinstance(ids, list) or not all(type(id_) is int for id_ in ids):
            raise ValueError("no token ids in the answer of /tokenize")
        return ids

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | authorization()
        was_open = self._connection.sock is not None
        try:
            self._connection.request("POST", self._server.base + path, data, headers)
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if was_open:  # a connection kept open may have been closed meanwhile
                return self.ask(path, body)
            raise OSError(f"{self._url}{path}: {error or type(error).__name__}") from None
        try:
            answer = json.loads(text) if response.status == 200 else None
        except NOT_JSON as error:
            raise ValueError(f"{self._url}{path} answers what is no JSON: {error}") from None
        if not isinstance(answer, dict):
            raise ValueError(f"{self._url}{path} answers {response.status}")
        return answer


def template_tokens(
    url: str, model: str, tokenizer: Tokenizer, config: LoadConfig, extra: dict[str, Any]
) -> int | None:
    """Tokens that the server's chat template adds to a message: by its /tokenize, else by the usage of short answers.

    None when neither tells it, or it is not the same for every message. `extra` are further fields of each request.
    """
    bodies = [{"model": model, "messages": [{"role": "user", "content": probe}], **extra} for probe in _PROBES]
    counts: list[int | None]
    try:
        server = _TokenizeServer(url, verify_tls=config.tls_verify)
        counts = [len(server.tokenize({"add_generation_prompt": True, **body})) for body in bodies]
    except (OSError, ValueError):  # SGLang's /tokenize takes no messages
        counts = [fetch(url, {**body, config.max_tokens_field: 1}, config).prompt_tokens for body in bodies]
    plain = [len(tokenizer.encode(probe)) for probe in _PROBES]
    added = {-1 if count is None else count - length for count, length in zip(counts, plain, strict=True)}
    return added.pop() if len(added) == 1 and min(added) >= 0 else None
