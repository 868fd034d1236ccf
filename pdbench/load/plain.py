"""The last chunks of an answer (finish reason, usage) in the form in which nearly all servers send them: one typed decode."""

import msgspec

from pdbench.load.chunks import Event, Part, Usage


class _Cached(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    cached_tokens: int | None = None


class _PlainUsage(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int = 0
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: None = None


class _PlainDelta(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None


class _PlainChoice(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    index: int = 0
    text: str | None = None
    delta: _PlainDelta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: None = None
    stop_reason: msgspec.Raw = msgspec.Raw(b"null")
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")
    prompt_logprobs: None = None
    matched_stop: msgspec.Raw = msgspec.Raw(b"null")


class _PlainEnd(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    choices: list[_PlainChoice]
    usage: _PlainUsage | None = None
    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    service_tier: str | None = None
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")


_decode_end = msgspec.json.Decoder(_PlainEnd).decode


def plain_end(payload: bytes) -> Event | None:
    """The last chunks of an answer in the form in which nearly all servers send them, as `chunks.read` would; None for any other form."""
    try:
        chunk = _decode_end(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    event, sent = Event(), chunk.usage
    if sent is not None:
        details = sent.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        if min(sent.prompt_tokens, sent.completion_tokens, cached or 0) < 0:
            return None
        event.usage = Usage(sent.prompt_tokens, sent.completion_tokens, cached)
    if len(chunk.choices) > 1:
        return None
    for choice in chunk.choices:
        if choice.finish_reason not in ("stop", "length") or choice.index < 0 or chunk.object == "error":
            return None
        text = choice.text or (choice.delta.content if choice.delta else None) or ""
        part = Part(choice=choice.index, text=text, filled=bool(text), finish=choice.finish_reason)
        if choice.token_ids is not None:
            part.tokens, part.way, part.token_ids = len(choice.token_ids), "token_ids", choice.token_ids
        event.parts.append(part)
    return event if sent is not None or chunk.choices else None
