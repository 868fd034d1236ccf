"""vLLM's built-in P2pNcclConnector (0.9.2 - 0.23): both KV addresses stand in the request id, the same for both.

Prefill comes first: a decode request whose prefill never happened hangs the decode engine for good. For the same reason
decode cannot compute a prompt alone: every request it gets waits for KV.
"""

from pdbench.proxy.ask import Ask
from pdbench.proxy.dialects.handoff import Handoff, Message, decode_body, prefill_body

HAS_PREFILL = True
AT_ONCE = False
DECODE_ALONE = False
FIRST_TOKEN = False


def prefill(ask: Ask, handoff: Handoff) -> Message:
    """One token; `n` and a list of prompts stay, since the engine numbers its sequences by them on both sides."""
    return Message(prefill_body(ask, None), _request_id(handoff))


def decode(ask: Ask, handoff: Handoff, prefill_reply: bytes) -> Message:
    """The client's request, unmodified."""
    return Message(decode_body(ask, None), _request_id(handoff))


def _request_id(handoff: Handoff) -> bytes:
    return f"___prefill_addr_{handoff.prefill.kv}___decode_addr_{handoff.decode.kv}_{handoff.transfer_id}".encode()
