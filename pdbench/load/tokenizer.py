"""Tokenizers that measure prompts as the server does: the model's tokenizer.json, else the server's own /tokenize."""

import functools
import http.client
import json
from pathlib import Path
from typing import Any

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.http import authorization, split_url
from pdbench.load.client import fetch

_HUB_TIMEOUT_S = 5.0
_SERVER_TIMEOUT_S = 30.0
# The names of text and special tokens in a request to /tokenize: vLLM and SGLang, llama.cpp.
_NAMES = (("prompt", "add_special_tokens"), ("content", "add_special"))
# Two texts, so that a template whose tokens merge with the message's is noticed.
_PROBES = ("Which river is the longest?", "No. 7. Prefill and decode take turns, and one of them waits.")


class Tokenizer:
    """Counts a prompt's tokens as the server does: with those that it adds, special tokens or a chat template's.

    `added` is how many these are; `start` are the ids that stand before a completion's prompt.
    """

    def __init__(self, encoder: Any, added: int | None = None) -> None:
        self._encoder = encoder
        self.start: tuple[int, ...] = ()
        if added is None:
            specials = encoder.encode("").ids
            text = encoder.encode("a").ids
            # What stands after the text is the same for every prompt and cannot be sent within one.
            self.start = tuple(specials[: next((n for n, id_ in enumerate(text) if id_ not in specials), 0)])
            added = len(specials)
        self.added = added

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._encoder.decode(ids, skip_special_tokens=True))

    def count(self, text: str) -> int:
        """Number of tokens that the server makes of a prompt, or of a chat's one message."""
        return len(self.encode(text)) + self.added

    def cut(self, text: str, tokens: int) -> str:
        """About the first `tokens` tokens of a prompt."""
        return self.decode(self.encode(text)[: max(0, tokens - self.added)])

    def for_chat(self, added: int) -> "Tokenizer":
        """The same for the chat endpoint, whose template adds this many tokens."""
        return _ChatTokenizer(self, added)


class _ChatTokenizer(Tokenizer):
    """Templates strip a message: blanks at its ends are no tokens."""

    def __init__(self, tokenizer: Tokenizer, added: int) -> None:
        self._tokenizer, self.added, self.start = tokenizer, added, ()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.strip())

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


class ServerTokenizer(Tokenizer):
    """The server's /tokenize and /detokenize (vLLM, SGLang, llama.cpp): exact for every kind of tokenizer."""

    def __init__(self, url: str, model: str, *, verify_tls: bool = True) -> None:
        """Raises OSError or ValueError when the server has no /tokenize."""
        self._url, self._model, self._server = url, model, split_url(url, verify_tls=verify_tls)
        self._connection: http.client.HTTPConnection | None = None
        plain: list[int] = []
        for self._names in _NAMES:
            plain = self._ids("Paris", special=False)
            if plain:
                break
        whole = self._ids("Paris", special=True)
        self.added = len(whole) - len(plain)
        if not plain or self.added < 0:
            raise ValueError("no token for a word")
        self.start = tuple(whole[: self.added]) if whole[self.added :] == plain else ()
        self._encoded = functools.lru_cache(maxsize=256)(lambda text: tuple(self._ids(text, special=False)))

    def encode(self, text: str) -> list[int]:
        return list(self._encoded(text)) if text else []

    def decode(self, ids: list[int]) -> str:
        answer = self._ask("/detokenize", {"model": self._model, "tokens": ids}) if ids else {"text": ""}
        for key in ("prompt", "text", "content"):
            if isinstance(answer.get(key), str):
                return str(answer[key])
        raise UserError(
            f"{self._url}/detokenize gives no text: give --tokenizer FOLDER with the model's tokenizer.json"
        )

    def count_chat(self, body: dict[str, Any]) -> int:
        """Tokens of a chat with the template. Raises OSError or ValueError when the server cannot tell."""
        return len(_ids_of(self._ask("/tokenize", {"add_generation_prompt": True, **body})))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        text_name, special_name = self._names
        return _ids_of(self._ask("/tokenize", {"model": self._model, text_name: text, special_name: special}))

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | authorization()
        for is_last_try in (False, True):
            fresh = self._connection is None
            try:
                if self._connection is None:
                    server, timeout_s = self._server, _SERVER_TIMEOUT_S
                    self._connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
                    if server.tls:
                        self._connection = http.client.HTTPSConnection(
                            server.host, server.port, timeout=timeout_s, context=server.tls
                        )
                self._connection.request("POST", self._server.base + path, data, headers)
                response = self._connection.getresponse()
                text = response.read()
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection = None  # a connection kept open may have been closed meanwhile
                if is_last_try or fresh:
                    raise OSError(f"{self._url}{path}: {error or type(error).__name__}") from None
        answer = json.loads(text) if response.status == 200 else None
        if not isinstance(answer, dict):
            raise ValueError(f"{self._url}{path} answers {response.status}")
        return answer


def _ids_of(answer: dict[str, Any]) -> list[int]:
    """Raises ValueError where the answer holds no token ids."""
    ids = answer.get("tokens")
    if not isinstance(ids, list) or not all(type(id_) is int for id_ in ids):
        raise ValueError("no token ids in the answer of /tokenize")
    return ids


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


def server_tokenizer(url: str, model: str, *, verify_tls: bool = True) -> ServerTokenizer | None:
    """The tokenizer that the server at `url` offers; None when it offers none."""
    try:
        return ServerTokenizer(url, model, verify_tls=verify_tls)
    except (OSError, ValueError):
        return None


def template_tokens(
    url: str, model: str, tokenizer: Tokenizer, config: LoadConfig, extra: dict[str, Any]
) -> int | None:
    """Tokens that the server's chat template adds to a message: by its /tokenize, else by the usage of short answers.

    None when neither tells it, or it is not the same for every message. `extra` are further fields of each request.
    """
    bodies = [{"model": model, "messages": [{"role": "user", "content": probe}], **extra} for probe in _PROBES]
    plain = [len(tokenizer.encode(probe)) for probe in _PROBES]
    asked = server_tokenizer(url, model, verify_tls=config.tls_verify)
    if asked is not None:
        try:
            return _added([asked.count_chat(body) for body in bodies], plain)
        except (OSError, ValueError):
            pass  # SGLang's /tokenize takes no messages
    counts = [fetch(url, {**body, config.max_tokens_field: 1}, config).prompt_tokens for body in bodies]
    return _added(counts, plain)


def _added(counts: list[int | None], plain: list[int]) -> int | None:
    added = {None if count is None else count - length for count, length in zip(counts, plain, strict=True)}
    only = added.pop()
    return only if only is not None and only >= 0 and not added else None
