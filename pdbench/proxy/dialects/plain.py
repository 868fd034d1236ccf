"""No connector: every request goes whole to one of the --decode instances (replicas behind one port)."""

from pdbench.proxy.ask import Ask
from pdbench.proxy.dialects.handoff import Handoff, Message, decode_body

HAS_PREFILL = False
AT_ONCE = False
DECODE_ALONE = True
FIRST_TOKEN = False


def prefill(ask: Ask, handoff: Handoff) -> Message:
    """There is no prefill instance to ask."""
    raise NotImplementedError("the plain dialect has no prefill")


def decode(ask: Ask, handoff: Handoff, prefill_reply: bytes) -> Message:
    """The client's request."""
    return Message(decode_body(ask, None), ask.request_id)
