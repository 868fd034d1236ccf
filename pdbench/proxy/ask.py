"""What a client asks for: the request as it came, and the few facts of its JSON that steer its way.

Try: python -c "from pdbench.proxy.ask import fields_of; print(fields_of(b'{\"prompt\": \"Hi\"}'))"
"""

import re
from dataclasses import dataclass, field

import msgspec

from pdbench.proxy.errors import RefusedError
from pdbench.proxy.wire import Headers

Fields = dict[str, msgspec.Raw]
_decoder = msgspec.json.Decoder(Fields)
_LIST_OF_PROMPTS = re.compile(rb'\s*\[\s*["\[]')
PREFIX_BYTES = 1024


@dataclass(slots=True)
class Ask:
    """One request of a client, read to its end."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes
    received_s: float
    keep_alive: bool
    http_1_0: bool
    request_id: bytes
    authorization: bytes | None
    fields: Fields = field(default_factory=dict)

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.split(b"?", 1)[0]


def fields_of(body: bytes) -> Fields:
    """The body's top-level fields, their values left as they are; raises RefusedError(400) if it is no JSON object."""
    try:
        # Values are kept as they came, unread; an instance would stumble over what is no UTF-8 in them.
        body.decode()
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RefusedError(400, "the body is not a JSON object: send one with content-type application/json") from None


def prompt_of(fields: Fields) -> bytes:
    """The prompt or the messages as they stand in the JSON."""
    return bytes(fields.get("prompt") or fields.get("messages") or b"")


def prompt_tokens(prompt: bytes) -> int:
    """An estimate of the prompt's tokens for balancing: exact for one list of ids, four bytes a token for text."""
    if prompt[:1] == b"[" and b'"' not in prompt[:64] and b"{" not in prompt[:64]:
        return prompt.count(b",") + 1
    return len(prompt) // 4 + 1


def is_one_sequence(fields: Fields) -> bool:
    """Whether the request is one prompt with one continuation, which is what one KV transfer carries. Prompt
    log-probabilities need the prompt's logits, which no transfer brings."""
    listed = _LIST_OF_PROMPTS.match(fields.get("prompt", b"")) is not None
    several = listed or any(_number(fields, name) > 1 for name in ("n", "best_of"))
    looks_back = _number(fields, "echo") or fields.get("prompt_logprobs", b"null") != b"null"
    return not (several or looks_back or _number(fields, "use_beam_search"))


def _number(fields: Fields, name: str) -> float:
    text = bytes(fields.get(name, b"0"))
    if text == b"true":
        return 1
    try:
        return float(text)
    except ValueError:
        return 0
