"""Transport tcp: the packed blocks follow their header on the control connection. For CPU, and for hosts without P2P.

Try: python -m pytest tests/test_kv_exchange.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from pdbench.kv.control import Blocks, Channel
from pdbench.kv.pack import BlockPacker


class TcpLink:
    """One pair's wire. One thread uses it at a time; the buffers are reused by the next piece."""

    def __init__(self, channel: Channel, packer: BlockPacker, staging_bytes: int) -> None:
        self.channel = channel
        self.packer = packer
        on_device = packer.device.type != "cpu"
        # Host memory that the socket reads and writes directly; on a GPU pinned, with a twin on the device.
        self._host = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=on_device)
        self._bytes = memoryview(self._host.numpy())
        self._device = torch.empty(staging_bytes, dtype=torch.uint8, device=packer.device) if on_device else None
        self._stream = torch.cuda.Stream(packer.device) if on_device else None

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        """Gather the blocks once the CUDA event `after` has passed; returns the bytes, and when (time.monotonic()) it had."""
        count = len(block_ids) * self.packer.block_bytes
        if self._device is None or self._stream is None:
            begun_s = time.monotonic()
            self.packer.gather(block_ids, self._host)
            return count, begun_s
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            packed = self.packer.gather(block_ids, self._device)
            self._host[:count].copy_(packed, non_blocking=True)
        if after is not None:
            after.synchronize()
        ready_s = time.monotonic()
        self._stream.synchronize()
        return count, ready_s

    def send(self, header: Blocks, count: int) -> float:
        """Send the header and the `count` bytes packed last; returns the seconds it took. Raises ChannelClosedError."""
        begun_s = time.monotonic()
        self.channel.send(header, self._bytes[:count])
        return time.monotonic() - begun_s

    def receive(self, count: int) -> float:
        """Read the `count` bytes behind a header; returns the seconds it took. Raises ChannelClosedError."""
        begun_s = time.monotonic()
        self.channel.receive_into(self._bytes[:count])
        return time.monotonic() - begun_s

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        """Scatter the bytes received last into the blocks, once the CUDA event `after` has passed; returns when it is done."""
        if self._device is None or self._stream is None:
            self.packer.scatter(self._host[:count], block_ids)
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            packed = self._device[:count]
            packed.copy_(self._host[:count], non_blocking=True)
            self.packer.scatter(packed, block_ids)
        self._stream.synchronize()

    def close(self) -> None:
        """Nothing but the channel to close."""
        self.channel.close()
