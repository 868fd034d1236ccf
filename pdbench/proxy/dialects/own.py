"""pdbench's own connector (pdbench/kv): a transfer id in both requests; decode asks prefill's KV address for it."""

import msgspec

from pdbench.proxy.ask import Ask
from pdbench.proxy.dialects.handoff import Handoff, Message, decode_body, prefill_body

HAS_PREFILL = True
AT_ONCE = True
DECODE_ALONE = True
FIRST_TOKEN = True


def prefill(ask: Ask, handoff: Handoff) -> Message:
    """One token, and the blocks kept for the transfer."""
    params = {"transfer_id": handoff.transfer_id, "do_remote_decode": True}
    return Message(prefill_body(ask, msgspec.json.encode(params)), ask.request_id)


def decode(ask: Ask, handoff: Handoff, prefill_reply: bytes) -> Message:
    """The client's request, and where its KV is to be had."""
    params: dict[str, str | int | bool] = {
        "transfer_id": handoff.transfer_id,
        "do_remote_prefill": True,
        "remote_host": handoff.prefill.kv_host,
        "remote_port": handoff.prefill.kv_port,
    }
    if handoff.prefilled_tokens is not None:
        params["prefilled_tokens"] = handoff.prefilled_tokens
    return Message(decode_body(ask, msgspec.json.encode(params)), ask.request_id)
