"""vLLM's NixlConnector: prefill's answer carries kv_transfer_params, which go to decode verbatim."""

import msgspec

from pdbench.proxy.ask import Ask
from pdbench.proxy.dialects.handoff import Handoff, Message, decode_body, prefill_body

HAS_PREFILL = True
AT_ONCE = False
DECODE_ALONE = True
FIRST_TOKEN = False

_ASK_FOR_KV = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_reply_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def prefill(ask: Ask, handoff: Handoff) -> Message:
    """One token, and the blocks kept until decode has read them."""
    return Message(prefill_body(ask, _ASK_FOR_KV), ask.request_id)


def decode(ask: Ask, handoff: Handoff, prefill_reply: bytes) -> Message:
    """The client's request and prefill's own words; a prompt too short for a block comes with none."""
    params = bytes(_reply_decoder.decode(prefill_reply).get("kv_transfer_params", b"null"))
    return Message(decode_body(ask, None if params == b"null" else params), ask.request_id)
