"""What the dialects have in common: a handoff's names, and the JSON of a prefill request."""

from typing import NamedTuple

import msgspec

from pdbench.proxy.ask import Ask
from pdbench.proxy.instances import Address

# Fields that contradict one token without streaming, and the field that is the proxy's to write.
_DROPPED = ("stream_options", "min_tokens", "kv_transfer_params")


class Handoff(NamedTuple):
    """One request's KV on its way: the transfer's own id and both instances. `prefilled_tokens`: how many tokens of decode's
    prompt prefill has computed, None when it is the whole prompt."""

    transfer_id: str
    prefill: Address
    decode: Address
    prefilled_tokens: int | None = None


class Message(NamedTuple):
    """What an instance gets: the body and the request id."""

    body: bytes
    request_id: bytes


def prefill_body(ask: Ask, kv_transfer_params: bytes | None) -> bytes:
    """The client's body, asking for one token and no stream; every other field stays as it came."""
    fields = {name: value for name, value in ask.fields.items() if name not in _DROPPED}
    fields["stream"] = msgspec.Raw(b"false")
    fields["max_tokens"] = msgspec.Raw(b"1")
    if "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = msgspec.Raw(b"1")
    if kv_transfer_params is not None:
        fields["kv_transfer_params"] = msgspec.Raw(kv_transfer_params)
    return msgspec.json.encode(fields)


def decode_body(ask: Ask, kv_transfer_params: bytes | None) -> bytes:
    """The client's body byte for byte, with the proxy's kv_transfer_params at its end. A client's own are left out:
    they would make an instance connect to an address of the client's choice."""
    body = ask.body
    if "kv_transfer_params" in ask.fields:
        body = msgspec.json.encode({name: value for name, value in ask.fields.items() if name != "kv_transfer_params"})
    if kv_transfer_params is None:
        return body
    comma = b"," if body.strip()[1:-1].strip() else b""
    return b'%b%b"kv_transfer_params":%b}' % (body.rstrip()[:-1], comma, kv_transfer_params)
