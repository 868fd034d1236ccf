"""The dialects: how prefill and decode are told that they serve one request. Each is a module with the names below.

Try: pdbench proxy --connector nixl --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
"""

from typing import Protocol

from pdbench.proxy.ask import Ask
from pdbench.proxy.dialects import builtin_p2p_nccl, nixl, own, plain
from pdbench.proxy.dialects.handoff import Handoff, Message

__all__ = ["DIALECTS", "Dialect", "Handoff", "Message"]


class Dialect(Protocol):
    """What a dialect's module offers.

    HAS_PREFILL: it knows prefill instances. AT_ONCE: decode may be asked before prefill has answered. DECODE_ALONE: a
    decode instance computes a prompt by itself when it is asked without a handoff. FIRST_TOKEN: decode can be handed the KV
    of all tokens but the prompt's last, which prefill sampled.
    """

    HAS_PREFILL: bool
    AT_ONCE: bool
    DECODE_ALONE: bool
    FIRST_TOKEN: bool

    def prefill(self, ask: Ask, handoff: Handoff) -> Message:
        """What the prefill instance gets."""

    def decode(self, ask: Ask, handoff: Handoff, prefill_reply: bytes) -> Message:
        """What the decode instance gets; `prefill_reply` is prefill's answer, empty with AT_ONCE."""


DIALECTS: dict[str, Dialect] = {
    "p2p-nccl": own,
    "tcp": own,
    "builtin-p2p-nccl": builtin_p2p_nccl,
    "nixl": nixl,
    "none": plain,
}
