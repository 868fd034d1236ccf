"""What prefill and decode are sent so that decode gets the KV of one request: one row of PROTOCOLS per connector."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pdbench.config import ProxyConfig
from pdbench.proxy.instances import Address
from pdbench.proxy.messages import ClientRequest, value_of

# Fields that contradict one token without streaming, and the field that only the proxy may write.
_NOT_FOR_PREFILL = frozenset(("stream_options", "min_tokens", "kv_transfer_params"))
# And those of a token that nobody sees: what ends an answer, what is told of its tokens, what its text has to be.
_NOT_FOR_UNSEEN_TOKEN = _NOT_FOR_PREFILL.union(
    ("stop", "stop_token_ids", "stop_sequences", "include_stop_str_in_output", "logprobs", "top_logprobs", "return_token_ids",
     "return_tokens_as_token_ids", "store", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
     "guided_decoding_backend", "guided_whitespace_pattern")
)  # fmt: skip
_NIXL_PREFILL = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_decode_answer = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Handoff(NamedTuple):
    """One request's KV transfer. `prefilled_tokens`: how many tokens of decode's prompt are in the KV, None if all.

    `return_kv`: decode is sent the request at once, so prefill may wait for its word on what it has of the prompt.
    """

    transfer_id: str
    prefill: Address
    decode: Address
    prefilled_tokens: int | None = None
    return_kv: bool = False


class KvProtocol(NamedTuple):
    """How requests look with one connector; the first two give the kv_transfer_params, None for none.

    `decode_params` also gets prefill's answer, which is empty where decode is sent its request before. `request_id`: what both instances
    are told to call the request, from what the client calls it; None where they need not agree. `decode_can_prefill`: decode computes the
    prompt of a request without handoff. `at_once`: decode may be sent its request before prefill has answered.

    `is_pdbench`: decode accepts a prompt whose last token, which prefill sampled, has no KV, takes no KV of another prompt than its own,
    and lets prefill fetch what it has of a prompt.
    """

    prefill_params: Callable[[Handoff], bytes | None] = lambda handoff: None
    decode_params: Callable[[Handoff, bytes], bytes | None] = lambda handoff, prefill_answer: None
    has_prefill: bool = True
    request_id: Callable[[Handoff, bytes], bytes] | None = None
    decode_can_prefill: bool = True
    at_once: bool = False
    is_pdbench: bool = False


def prefill_body(request: ClientRequest, protocol: KvProtocol, handoff: Handoff, *, wants_token: bool) -> bytes:
    """The client's body with one token and no stream, without what only concerns the answer.

    `wants_token`: the token is the client's first one, so what concerns it stays.
    """
    dropped = _NOT_FOR_PREFILL if wants_token else _NOT_FOR_UNSEEN_TOKEN
    fields = {name: value for name, value in request.fields.items() if name not in dropped}
    fields |= {"stream": msgspec.Raw(b"false"), request.dialect.limit: msgspec.Raw(b"1")}
    if "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = msgspec.Raw(b"1")
    if wants_token:
        fields["return_token_ids"] = msgspec.Raw(b"true")
    else:
        # An end of the text as the one token would be no handoff for NIXL, which hands over what reached its limit.
        fields["ignore_eos"] = msgspec.Raw(b"true")
        if protocol.is_pdbench:  # what a chat template may tell the model can go, too
            fields.pop("response_format", None)
            # vLLM may answer 500 when a tool call must fit into one token; the tools themselves are part of the prompt.
            choice = value_of(fields, "tool_choice")
            if choice not in (b"null", b'"auto"', b'"none"') and request.path == b"/v1/chat/completions":
                fields["tool_choice"] = msgspec.Raw(b'"none"')
    params = protocol.prefill_params(handoff)
    if params is not None:
        fields["kv_transfer_params"] = msgspec.Raw(params)
    return msgspec.json.encode(fields)


def decode_body(request: ClientRequest, kv_transfer_params: bytes | None) -> bytes:
    """The client's body, byte for byte, with the proxy's kv_transfer_params added; without them decode prefills."""
    body = request.body
    if "kv_transfer_params" in request.fields:
        # A client's parameters would make an instance connect to an address of the client's choice.
        fields = {name: value for name, value in request.fields.items() if name != "kv_transfer_params"}
        body = msgspec.json.encode(fields)
    if kv_transfer_params is None:
        return body
    comma = b"," if body.strip()[1:-1].strip() else b""
    return b'%b%b"kv_transfer_params":%b}' % (body.rstrip()[:-1], comma, kv_transfer_params)


def _pdbench_prefill(handoff: Handoff) -> bytes:
    params = {"transfer_id": handoff.transfer_id, "do_remote_decode": True}
    return msgspec.json.encode(params | ({"return_kv": True} if handoff.return_kv else {}))


def _pdbench_decode(handoff: Handoff, prefill_answer: bytes) -> bytes:
    source = {"remote_host": handoff.prefill.kv_host, "remote_port": handoff.prefill.kv_port}
    prefilled = {} if handoff.prefilled_tokens is None else {"prefilled_tokens": handoff.prefilled_tokens}
    return msgspec.json.encode({"transfer_id": handoff.transfer_id, "do_remote_prefill": True, **source, **prefilled})


def _nixl_decode(handoff: Handoff, prefill_answer: bytes) -> bytes | None:
    """The parameters of prefill's answer, verbatim; a prompt that is shorter than a block has none."""
    params = bytes(_decode_answer(prefill_answer).get("kv_transfer_params", b"null"))
    return None if params == b"null" else params


def _mooncake_prefill(handoff: Handoff) -> bytes:
    return msgspec.json.encode(
        {"transfer_id": handoff.transfer_id, "do_remote_decode": True, "do_remote_prefill": False}
    )


def _mooncake_decode(handoff: Handoff, prefill_answer: bytes) -> bytes:
    """Prefill's engine id is its KV address, under which its bootstrap server listens: what starts it has to name it so."""
    source = {"remote_engine_id": handoff.prefill.kv, "remote_bootstrap_addr": f"http://{handoff.prefill.kv}"}
    return msgspec.json.encode(
        {"transfer_id": handoff.transfer_id, "do_remote_decode": False, "do_remote_prefill": True, **source}
    )


def _builtin_id(handoff: Handoff, name: bytes) -> bytes:
    return f"___prefill_addr_{handoff.prefill.kv}___decode_addr_{handoff.decode.kv}_{handoff.transfer_id}".encode()


def _nixl_push_id(handoff: Handoff, name: bytes) -> bytes:
    """Prefill writes to the decode request of the same name, whoever sent it: a client's own name would let it read others' KV."""
    return b"%b-%b" % (name, handoff.transfer_id.encode())


def may_open(config: ProxyConfig) -> bool:
    """May prefill's token open a client's stream?"""
    return PROTOCOLS[config.connector].is_pdbench and config.first_token != "decode"


# pdbench/kv: a transfer id in both requests; decode fetches from prefill's KV address.
_PDBENCH = KvProtocol(_pdbench_prefill, _pdbench_decode, at_once=True, is_pdbench=True)
PROTOCOLS = {
    "p2p-nccl": _PDBENCH,
    "tcp": _PDBENCH,
    # vLLM's P2pNcclConnector (0.9.2 to 0.23): both engines number a request's sequences alike, so `n` and a list of
    # prompts stay. Every decode request waits for KV: one whose prefill never happened hangs the engine for good.
    "builtin-p2p-nccl": KvProtocol(request_id=_builtin_id, decode_can_prefill=False),
    "nixl": KvProtocol(lambda handoff: _NIXL_PREFILL, _nixl_decode),
    # vLLM's NixlPushConnector (from 0.26 on): decode tells prefill which blocks to write to, and the names of both requests must be equal
    # but for vLLM's random digits. Decode could be asked at once, but one that waits for a prefill that never ends waits for good.
    "nixl-push": KvProtocol(lambda handoff: _NIXL_PREFILL, _nixl_decode, request_id=_nixl_push_id),
    # vLLM's MooncakeConnector: decode asks prefill, which writes into decode's memory, as soon as it knows the request.
    "mooncake": KvProtocol(_mooncake_prefill, _mooncake_decode, at_once=True),
    "none": KvProtocol(has_prefill=False),
}
