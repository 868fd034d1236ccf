"""The interface that both transports fill: how a pair of workers moves packed blocks, behind a header on their channel.

Try: python -c "import pdbench.kv.link as link; help(link.Link)"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pdbench.kv.compat import UnsupportedError
from pdbench.kv.control import Blocks, Channel
from pdbench.kv.pack import BlockPacker
from pdbench.kv.threads import Threads


class Link(Protocol):
    """A pair's wire: prefill packs and sends, decode receives and unpacks, one piece at a time, in order.

    `after` is a CUDA event of the forward pass that must be over first, None on CPU. Every method may raise ChannelClosedError.
    """

    channel: Channel

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        """Gather blocks, which may be overwritten then; returns the number of bytes and when the forward pass was over."""

    def send(self, header: Blocks, count: int) -> float:
        """Send header and packed bytes; returns the seconds on the wire, when the buffer is free again."""

    def receive(self, count: int) -> float:
        """Receive the bytes behind a header; returns the seconds on the wire."""

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        """Scatter what was received; returns when it stands in the cache."""

    def close(self) -> None:
        """End it from any thread; a method that waits raises ChannelClosedError."""


OpenLink = Callable[[Channel, bool], Link]
"""Makes the link of a channel after its handshake; True on the side that sends."""


def transport(name: str, packer: BlockPacker, staging_bytes: int, threads: Threads) -> OpenLink:
    """The transport called `name` for this worker's cache, with buffers of `staging_bytes` for every peer.

    Raises UnsupportedError when it cannot work here.
    """
    size = max(staging_bytes, packer.block_bytes)
    if name == "tcp":
        from pdbench.kv.tcp import TcpLink

        return lambda channel, sends: TcpLink(channel, packer, size)
    if packer.device.type != "cuda":
        raise UnsupportedError(f"transport nccl moves KV between GPUs and this cache is on {packer.device}: use tcp")
    from pdbench.kv.nccl import NcclLink

    return lambda channel, sends: NcclLink(channel, packer, size, sends, threads)
