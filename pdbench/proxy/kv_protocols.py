"""What prefill and decode are sent so that decode gets the KV of one request: one row of PROTOCOLS per connector."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pdbench.proxy.instances import Address
from pdbench.proxy.messages import ClientRequest

# Fields that contradict one token without streaming, and the field that only the proxy may write.
_NOT_FOR_PREFILL = ("stream_options", "min_tokens", "kv_transfer_params")
_NIXL_PREFILL = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_decode_answer = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Handoff(NamedTuple):
    """One request's KV transfer. `prefilled_tokens`: how many tokens of decode's prompt are in the KV, None if all."""

    transfer_id: str
    prefill: Address
    decode: Address
    prefilled_tokens: int | None = None


class Message(NamedTuple):
    """The body and the request id that an instance gets."""

    body: bytes
    request_id: bytes


class KvProtocol(NamedTuple):
    """How requests look with one connector.

    `decode` also gets prefill's answer, empty with `concurrent_dispatch`: decode may be sent its request before prefill
    has answered. `prefill` is None without prefill instances. `decode_can_prefill`: decode computes the prompt of a
    request without handoff. `first_token`: decode accepts a prompt whose last token, which prefill sampled, has no KV.
    """

    decode: Callable[[ClientRequest, Handoff, bytes], Message]
    prefill: Callable[[ClientRequest, Handoff], Message] | None
    concurrent_dispatch: bool = False
    decode_can_prefill: bool = True
    first_token: bool = False


def prefill_body(request: ClientRequest, kv_transfer_params: bytes | None) -> bytes:
    """The client's body with one token and no stream; every other field unchanged."""
    fields = {name: value for name, value in request.fields.items() if name not in _NOT_FOR_PREFILL}
    fields["stream"] = msgspec.Raw(b"false")
    fields["max_tokens"] = msgspec.Raw(b"1")
    if "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = msgspec.Raw(b"1")
    if kv_transfer_params is not None:
        fields["kv_transfer_params"] = msgspec.Raw(kv_transfer_params)
    return msgspec.json.encode(fields)


def decode_body(request: ClientRequest, kv_transfer_params: bytes | None) -> bytes:
    """The client's body, byte for byte, with the proxy's kv_transfer_params added."""
    body = request.body
    if "kv_transfer_params" in request.fields:
        # A client's parameters would make an instance connect to an address of the client's choice.
        fields = {name: value for name, value in request.fields.items() if name != "kv_transfer_params"}
        body = msgspec.json.encode(fields)
    if kv_transfer_params is None:
        return body
    comma = b"," if body.strip()[1:-1].strip() else b""
    return b'%b%b"kv_transfer_params":%b}' % (body.rstrip()[:-1], comma, kv_transfer_params)


def plain_decode(request: ClientRequest, handoff: Handoff, prefill_answer: bytes) -> Message:
    """The client's request without a handoff: the instance computes the prompt."""
    return Message(decode_body(request, None), request.request_id)


def _pdbench_prefill(request: ClientRequest, handoff: Handoff) -> Message:
    params = {"transfer_id": handoff.transfer_id, "do_remote_decode": True}
    return Message(prefill_body(request, msgspec.json.encode(params)), request.request_id)


def _pdbench_decode(request: ClientRequest, handoff: Handoff, prefill_answer: bytes) -> Message:
    params: dict[str, str | int | bool] = {
        "transfer_id": handoff.transfer_id,
        "do_remote_prefill": True,
        "remote_host": handoff.prefill.kv_host,
        "remote_port": handoff.prefill.kv_port,
    }
    if handoff.prefilled_tokens is not None:
        params["prefilled_tokens"] = handoff.prefilled_tokens
    return Message(decode_body(request, msgspec.json.encode(params)), request.request_id)


def _builtin_request_id(handoff: Handoff) -> bytes:
    return f"___prefill_addr_{handoff.prefill.kv}___decode_addr_{handoff.decode.kv}_{handoff.transfer_id}".encode()


def _builtin_prefill(request: ClientRequest, handoff: Handoff) -> Message:
    # `n` and a list of prompts stay: both engines number their sequences by them.
    return Message(prefill_body(request, None), _builtin_request_id(handoff))


def _builtin_decode(request: ClientRequest, handoff: Handoff, prefill_answer: bytes) -> Message:
    return Message(decode_body(request, None), _builtin_request_id(handoff))


def _nixl_prefill(request: ClientRequest, handoff: Handoff) -> Message:
    return Message(prefill_body(request, _NIXL_PREFILL), request.request_id)


def _nixl_decode(request: ClientRequest, handoff: Handoff, prefill_answer: bytes) -> Message:
    # The parameters of prefill's answer, verbatim; a prompt that is shorter than a block has none.
    params = bytes(_decode_answer(prefill_answer).get("kv_transfer_params", b"null"))
    return Message(decode_body(request, None if params == b"null" else params), request.request_id)


# pdbench/kv: a transfer id in both requests; decode fetches from prefill's KV address.
_PDBENCH = KvProtocol(_pdbench_decode, _pdbench_prefill, concurrent_dispatch=True, first_token=True)
PROTOCOLS = {
    "p2p-nccl": _PDBENCH,
    "tcp": _PDBENCH,
    # vLLM's P2pNcclConnector (0.9.2 to 0.23): both KV addresses are in the request id. Every decode request waits for
    # KV: one whose prefill never happened hangs the engine for good.
    "builtin-p2p-nccl": KvProtocol(_builtin_decode, _builtin_prefill, decode_can_prefill=False),
    "nixl": KvProtocol(_nixl_decode, _nixl_prefill),
    "none": KvProtocol(plain_decode, prefill=None),
}
