"""Prefill's own token as the client's first one, with decode going on from the prompt and that token.

Prefill samples a token anyway; waiting for decode to compute it once more costs a handoff and a decode step of TTFT.
docs/proxy.md says where this is exact. Try: pdbench proxy --first-token decode ... (to do without it)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from pdbench.proxy.ask import Ask, Fields

# vLLM's own number of output tokens for a completion that names none.
DEFAULT_MAX_TOKENS = 16
# Fields that mean the same to the prompt as to the prompt and one token; greedy sampling makes the sampling fields mute.
_ANY_VALUE = frozenset(
    ("model", "prompt", "max_tokens", "seed", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias",
     "allowed_token_ids", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
     "add_special_tokens", "return_token_ids", "priority", "cache_salt", "user")
)  # fmt: skip
# Every other field must say what its absence says.
_ONE_VALUE: dict[str, tuple[Any, ...]] = {
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


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")


class _Reply(msgspec.Struct):
    """Prefill's answer, as far as it is read."""

    id: str
    created: int
    model: str
    choices: list[_Choice]


_reply_decoder = msgspec.json.Decoder(_Reply)
_event_decoder = msgspec.json.Decoder(dict[str, Any])


class FirstToken(NamedTuple):
    """The client's first event, the request for what follows it, and how many tokens of its prompt prefill has computed."""

    event: bytes
    rest: Ask
    prefilled_tokens: int


def is_exact(ask: Ask) -> bool:
    """Whether a stream is the same when decode starts one token later: one greedy completion that nothing looks back on.

    A field that is not known to be harmless makes it False.
    """
    fields = ask.fields
    prompt = bytes(fields.get("prompt", b"")).lstrip(b"[ \t\r\n")[:1]
    if ask.path != b"/v1/completions" or not (prompt == b'"' or prompt.isdigit()):
        return False
    if "temperature" not in fields or bytes(fields.get("stream", b"")) != b"true":
        return False
    try:
        limit = _max_tokens(fields)
        # Without a limit the context is one: whether more follows prefill's token depends on the prompt's length.
        more_follow = type(limit) is int and limit > 1
        return more_follow and all(_is_harmless(name, value) for name, value in fields.items())
    except (msgspec.MsgspecError, RecursionError):
        return False


def prefill_ask(ask: Ask) -> Ask:
    """The request whose answer will also name its tokens."""
    return replace(ask, fields=ask.fields | {"return_token_ids": msgspec.Raw(b"true")})


def read(ask: Ask, reply: bytes) -> FirstToken | None:
    """What prefill's answer to `prefill_ask` gives the client.

    None where decode must compute the first token: it ends the answer, or it is not a piece of text by itself.
    """
    try:
        answer = _reply_decoder.decode(reply)
    except msgspec.MsgspecError:
        return None
    if len(answer.choices) != 1:
        return None
    choice = answer.choices[0]
    prompt_ids = bytes(choice.prompt_token_ids)
    # A character cut in two is shown whole only by the engine that has both its tokens.
    shown = choice.text and "\ufffd" not in choice.text
    if not shown or choice.finish_reason != "length" or not choice.token_ids or len(prompt_ids) < 3:
        return None
    with_ids = bytes(ask.fields.get("return_token_ids", b"")) == b"true"
    shown_choice = {"index": 0, "text": choice.text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    if with_ids:
        shown_choice |= {"prompt_token_ids": choice.prompt_token_ids, "token_ids": choice.token_ids}
    named = {"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model}
    event = msgspec.json.encode({**named, "choices": [shown_choice], "usage": None})
    return FirstToken(b"data: %b\n\n" % event, _rest(ask, prompt_ids, choice.token_ids[0]), prompt_ids.count(b",") + 1)


def edit(ask: Ask) -> Callable[[bytes], bytes]:
    """What turns decode's events (whole ones) into those of the client's own request: the token that decode was given as a
    prompt counts as an output, and the prompt's tokens, which the first event named, are not said again."""
    named = bytes(ask.fields.get("return_token_ids", b"")) == b"true"

    def edited(events: bytes) -> bytes:
        nonlocal named
        if not named and b'"usage":{' not in events:
            return events
        named = False
        return b"\n\n".join(_edit_event(event) for event in events.split(b"\n\n"))

    return edited


def _edit_event(event: bytes) -> bytes:
    if not event.startswith(b"data: {"):
        return event
    try:
        document = _event_decoder.decode(event[6:])
        usage = document.get("usage")
        if usage:
            usage["prompt_tokens"] -= 1
            usage["completion_tokens"] += 1
        for choice in document.get("choices", ()):
            if choice.get("prompt_token_ids"):
                choice["prompt_token_ids"] = None
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return event  # no completion's event: it is passed on as it came
    return b"data: " + msgspec.json.encode(document)


def _is_harmless(name: str, value: msgspec.Raw) -> bool:
    if name in _ANY_VALUE:
        return True
    decoded = msgspec.json.decode(value)
    if name in _ONE_VALUE:
        return decoded in _ONE_VALUE[name] or (decoded is None and name != "temperature")
    return decoded is None or decoded is False


def _max_tokens(fields: Fields) -> Any:
    """The limit as the client gave it."""
    return msgspec.json.decode(fields.get("max_tokens", msgspec.Raw(b"%d" % DEFAULT_MAX_TOKENS)))


def _rest(ask: Ask, prompt_ids: bytes, token: int) -> Ask:
    """The client's request for what comes after `token`."""
    fields: Fields = ask.fields | {
        "prompt": msgspec.Raw(b"%b,%d]" % (prompt_ids.rstrip()[:-1], token)),
        "max_tokens": msgspec.Raw(b"%d" % (_max_tokens(ask.fields) - 1)),
    }
    return replace(ask, body=msgspec.json.encode(fields), fields=fields)
