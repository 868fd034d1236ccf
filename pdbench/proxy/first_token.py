"""Prefill's own token as the client's first one; decode goes on from the prompt and that token: docs/proxy.md."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pdbench.proxy.messages import ClientRequest, Fields, value_of

if TYPE_CHECKING:
    from pdbench.proxy.client import EventStream
    from pdbench.proxy.upstream import UpstreamRequest

# vLLM's default for a completion that names no number of output tokens.
DEFAULT_MAX_TOKENS = 16
# Fields that mean the same for the prompt as for the prompt and one token; greedy sampling ignores the sampling fields.
_ANY_VALUE = frozenset(
    ("model", "prompt", "max_tokens", "seed", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias",
     "allowed_token_ids", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
     "add_special_tokens", "return_token_ids", "priority", "cache_salt", "user")
)  # fmt: skip
# Fields that are harmless with the values that mean the same as leaving them out; other fields are with null or false.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "stream": (True,),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_tokens": (0,),
    "echo": (False,),
    "stop": ([], ""),
}
EDITED = b'"usage":{'
"""What an event contains that `event_editor` may change, all but the first."""


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")


class _Answer(msgspec.Struct):
    """Prefill's answer, as far as it is read."""

    id: str
    created: int
    model: str
    choices: list[_Choice]


class First(NamedTuple):
    """Prefill's token: the client's first event, the request for the tokens after it, how many of its prompt's tokens have KV,
    how many tokens prompt and answer may have together, and the token."""

    event: bytes
    rest: ClientRequest
    prompt_tokens: int
    total_tokens: int
    text: str
    token_id: int


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_event = msgspec.json.Decoder(dict[str, Any]).decode


def is_exact(request: ClientRequest) -> bool:
    """Whether a stream is the same when decode starts one token later; False if a field is not known to be harmless."""
    fields = request.fields
    prompt = bytes(fields.get("prompt", b"")).lstrip(b"[ \t\r\n")[:1]
    if request.path != b"/v1/completions" or not (prompt == b'"' or prompt.isdigit()):
        return False
    if "temperature" not in fields or value_of(fields, "stream") != b"true":
        return False
    try:
        # Without a limit the context is the limit: whether a second token fits depends on the prompt's length.
        limit = _max_tokens(fields)
        return type(limit) is int and limit > 1 and all(_is_harmless(name, value) for name, value in fields.items())
    except (msgspec.MsgspecError, RecursionError):
        return False


def read(request: ClientRequest, answer_body: bytes) -> First | None:
    """Prefill's token; None if it ends the answer or is no text without the next one."""
    try:
        answer = _decode_answer(answer_body)
    except msgspec.MsgspecError:
        return None
    if len(answer.choices) != 1:
        return None
    choice = answer.choices[0]
    prompt_ids = bytes(choice.prompt_token_ids)
    # Only the engine that has both tokens of a character shows it whole.
    is_text = choice.text and "\ufffd" not in choice.text
    if not is_text or choice.finish_reason != "length" or not choice.token_ids or len(prompt_ids) < 3:
        return None
    event_choice = {"index": 0, "text": choice.text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    if value_of(request.fields, "return_token_ids") == b"true":
        event_choice |= {"prompt_token_ids": choice.prompt_token_ids, "token_ids": choice.token_ids}
    event = {"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model}
    encoded = msgspec.json.encode({**event, "choices": [event_choice], "usage": None})
    limit = _max_tokens(request.fields)
    fields: Fields = request.fields | {
        "prompt": msgspec.Raw(b"%b,%d]" % (prompt_ids.rstrip()[:-1], choice.token_ids[0])),
        "max_tokens": msgspec.Raw(b"%d" % (limit - 1)),
    }
    rest = replace(request, body=msgspec.json.encode(fields), fields=fields)
    tokens = prompt_ids.count(b",") + 1
    return First(b"data: %b\n\n" % encoded, rest, tokens, tokens + limit, choice.text, choice.token_ids[0])


@dataclass(slots=True)
class Check:
    """Decode was sent the same request and samples a first token, too: it is taken out of the stream that prefill's has opened.

    `differs`: it is another one, and decode's request was ended before any of its events was passed on.
    """

    first: First
    stream: "EventStream"
    decode: "UpstreamRequest"
    differs: bool = False

    def first_events(self, events: bytes) -> bytes:
        """Decode's first whole events, without the first token; later ones are not edited."""
        self.stream.edit = None
        event, end, others = events.partition(b"\n\n")
        try:
            document = _decode_event(event.removeprefix(b"data: "))
            (choice,) = document["choices"]
            text, ids = choice["text"], choice.get("token_ids")
            is_equal = text.startswith(self.first.text) and (not ids or ids[0] == self.first.token_id)
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError):
            if b'"error"' in event:
                return events
            is_equal = False  # no completion's event
        # Equal texts make the client's text decode's own, whatever the tokens are; a client that sees ids gets equal ids.
        if not is_equal:
            self.differs = True
            self.decode.end("decode chose another first token")
            return b""
        text = text.removeprefix(self.first.text)
        if not text and not choice["finish_reason"] and not (ids and ids[1:]):
            return others
        choice["text"] = text  # several tokens came as one event
        if ids:
            choice["prompt_token_ids"], choice["token_ids"] = None, ids[1:]
        return b"data: " + msgspec.json.encode(document) + end + others


def event_editor(request: ClientRequest) -> Callable[[bytes], bytes]:
    """A function that turns decode's whole events into those of the client's request."""
    # The token that decode got in its prompt counts as output, and the prompt's ids were in the first event.
    has_prompt_ids = value_of(request.fields, "return_token_ids") == b"true"

    def edit(events: bytes) -> bytes:
        nonlocal has_prompt_ids
        if not has_prompt_ids and EDITED not in events:
            return events
        has_prompt_ids = False
        return b"\n\n".join(_edit_event(event) for event in events.split(b"\n\n"))

    return edit


def _edit_event(event: bytes) -> bytes:
    if not event.startswith(b"data: {"):
        return event
    try:
        document = _decode_event(event[6:])
        usage = document.get("usage")
        if usage:
            usage["prompt_tokens"] -= 1
            usage["completion_tokens"] += 1
        for choice in document.get("choices", ()):
            if choice.get("prompt_token_ids"):
                choice["prompt_token_ids"] = None
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return event  # not a completion's event
    return b"data: " + msgspec.json.encode(document)


def _is_harmless(name: str, value: msgspec.Raw) -> bool:
    if name in _ANY_VALUE:
        return True
    decoded = msgspec.json.decode(value)
    if name in _HARMLESS_VALUES:
        return decoded in _HARMLESS_VALUES[name] or (decoded is None and name != "temperature")
    return decoded is None or decoded is False


def _max_tokens(fields: Fields) -> Any:
    return msgspec.json.decode(fields.get("max_tokens", msgspec.Raw(b"%d" % DEFAULT_MAX_TOKENS)))
