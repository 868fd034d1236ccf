"""How a pair of workers moves packed blocks: over the control connection (tcp), or from GPU to GPU by NCCL (nccl).

tcp: the bytes follow their header on the connection. For CPU, and for hosts without P2P between GPUs.

nccl: ncclSend and ncclRecv on streams of their own beside the model's. A pair has one communicator of two; its NCCL id travels over
the authenticated connection, so there is no open rendezvous port. Prefill launches its send before the header leaves; decode
posts the matching receive when the header arrives: pieces stay in order, and no GPU waits for longer than a header takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.distributed.device_communicators import pynccl_wrapper as pynccl

from pdbench.events import TransferEvent
from pdbench.kv.blocks import BlockPacker
from pdbench.kv.channel import Blocks, Channel, ChannelClosedError, Identity, StartThread
from pdbench.kv.compat import UnsupportedError

# A communicator takes a second or two to make; a peer that dies meanwhile would block NCCL for good.
NCCL_OPEN_TIMEOUT_S = 60.0
NCCL_POLL_S = 0.00005


class Link(Protocol):
    """What moves a pair's blocks: prefill packs and sends, decode receives and unpacks, one piece at a time, in order.

    One thread uses it at a time, `close` may come from any. The buffer is reused by the next piece. `after` is a CUDA event of the
    forward pass that must be over first, None on CPU. Every method may raise ChannelClosedError.
    """

    channel: Channel

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        """Gather blocks, which may be overwritten then; returns the bytes, and when (time.monotonic()) the pass was over."""

    def send(self, header: Blocks, count: int) -> float:
        """Send header and the `count` bytes packed last; returns the seconds on the wire, when the buffer is free again."""

    def receive(self, count: int) -> float:
        """Receive the `count` bytes behind a header; returns the seconds on the wire."""

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        """Scatter the bytes received last; returns when they are in the cache."""

    def close(self) -> None:
        """End it; a method that waits raises ChannelClosedError."""


OpenLink = Callable[[Channel, bool], Link]
"""Makes the link of a channel after its handshake; True on the side that sends."""


@dataclass(frozen=True)
class WorkerContext:
    """What the sending and the receiving half of one worker share. `changed` is the lock of all transfers' states."""

    secret: bytes
    identity: Identity
    open_link: OpenLink
    block_bytes: int
    piece_blocks: int
    timeout_s: float
    changed: threading.Condition
    finish: Callable[[TransferEvent], None]
    start_thread: StartThread


def link_opener(transport: str, packer: BlockPacker, staging_bytes: int, start_thread: StartThread) -> OpenLink:
    """Opens links of this worker's cache, with a buffer of `staging_bytes` per peer. Raises UnsupportedError."""
    size = max(staging_bytes, packer.block_bytes)
    if transport == "tcp":
        return lambda channel, sends: TcpLink(channel, packer, size)
    if packer.device.type != "cuda":
        raise UnsupportedError(f"transport nccl moves KV between GPUs and this cache is on {packer.device}: use tcp")
    return lambda channel, sends: NcclLink(channel, packer, size, sends, start_thread)


class TcpLink:
    """Link over the control connection."""

    def __init__(self, channel: Channel, packer: BlockPacker, staging_bytes: int) -> None:
        self.channel, self._packer = channel, packer
        on_device = packer.device.type != "cpu"
        # Host memory that the socket reads and writes directly; on a GPU pinned, with a twin on the device.
        self._host = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=on_device)
        self._bytes = memoryview(self._host.numpy())
        self._device = torch.empty(staging_bytes, dtype=torch.uint8, device=packer.device) if on_device else None
        self._stream = torch.cuda.Stream(packer.device) if on_device else None

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        count = len(block_ids) * self._packer.block_bytes
        if self._device is None or self._stream is None:
            begun_s = time.monotonic()
            self._packer.gather(block_ids, self._host)
            return count, begun_s
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            packed = self._packer.gather(block_ids, self._device)
            self._host[:count].copy_(packed, non_blocking=True)
        if after is not None:
            after.synchronize()
        ready_s = time.monotonic()
        self._stream.synchronize()
        return count, ready_s

    def send(self, header: Blocks, count: int) -> float:
        begun_s = time.monotonic()
        self.channel.send(header, self._bytes[:count])
        return time.monotonic() - begun_s

    def receive(self, count: int) -> float:
        begun_s = time.monotonic()
        self.channel.receive_into(self._bytes[:count])
        return time.monotonic() - begun_s

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        if self._device is None or self._stream is None:
            self._packer.scatter(self._host[:count], block_ids)
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            packed = self._device[:count]
            packed.copy_(self._host[:count], non_blocking=True)
            self._packer.scatter(packed, block_ids)
        self._stream.synchronize()

    def close(self) -> None:
        self.channel.close()


class NcclLink:
    """Link over an NCCL communicator of two."""

    def __init__(
        self, channel: Channel, packer: BlockPacker, staging_bytes: int, sends: bool, start_thread: StartThread
    ) -> None:
        self.channel = channel
        self._packer, self._sends, self._start_thread = packer, sends, start_thread
        self._library = pynccl.NCCLLibrary()
        self._using = threading.Lock()
        self._closed = threading.Event()
        self._comm: Any = None
        with torch.cuda.device(packer.device):
            # Higher priority than the model's stream: a copy of well under a millisecond does not queue behind its kernels.
            self._stream = torch.cuda.Stream(packer.device, priority=-1)
            self._staging = self._buffer(1)
            self._begun, self._ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Sleeps in the driver without the interpreter's lock, for as long as the forward pass takes.
            self._passed = torch.cuda.Event(blocking=True)
        try:
            self._open_in_time()
            # Only now: a peer that dies while NCCL opens can leave a thread behind in NCCL, which must not hold much.
            self._staging = self._buffer(staging_bytes)
        except BaseException:
            self.close()
            raise

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            packed = self._packer.gather(block_ids, self._staging)
            self._passed.record()
        if after is not None:
            after.synchronize()
        ready_s = time.monotonic()
        self._passed.synchronize()
        return packed.numel(), ready_s

    def send(self, header: Blocks, count: int) -> float:
        """The seconds returned are from launch to end, the peer's answer included."""
        self._launch(count)
        self.channel.send(header)
        return self._finish()

    def receive(self, count: int) -> float:
        """The seconds returned are by the GPU's clock."""
        self._launch(count)
        return self._finish()

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._packer.scatter(self._staging[:count], block_ids)
            self._passed.record()
        self._passed.synchronize()

    def close(self) -> None:
        """End it: what waits raises ChannelClosedError, and the communicator is aborted in the background."""
        self.channel.close()
        if not self._closed.is_set():
            self._closed.set()
            self._start_thread("kv-nccl-abort", self._abort)

    def _buffer(self, size: int) -> torch.Tensor:
        with torch.cuda.device(self._packer.device), torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._packer.device)

    def _open_in_time(self) -> None:
        """Open in a thread of its own and wait for it. Raises ChannelClosedError when that fails or does not end."""
        failures: list[Exception] = []

        def run() -> None:
            try:
                self._open()
            except Exception as error:
                failures.append(error)

        thread = self._start_thread("kv-nccl-open", run)
        thread.join(NCCL_OPEN_TIMEOUT_S)
        if thread.is_alive():
            raise ChannelClosedError(f"{self.channel.peer}: no NCCL communicator in {NCCL_OPEN_TIMEOUT_S:g} s")
        if failures:
            raise ChannelClosedError(f"{self.channel.peer}: no NCCL communicator ({failures[0]})") from failures[0]

    def _open(self) -> None:
        """Make the communicator and move one byte through it, so that NCCL connects now and not in the first transfer."""
        if self._sends:
            unique_id = self._library.ncclGetUniqueId()
            self.channel.send({"type": "nccl", "id": bytes(unique_id.internal).hex()})
        else:
            message = self.channel.receive(idle=False)
            try:
                unique_id = self._library.unique_id_from_bytes(bytes.fromhex(message["id"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ChannelClosedError(f"{self.channel.peer}: no NCCL id came") from error
        with torch.cuda.device(self._packer.device):
            self._comm = self._library.ncclCommInitRank(2, unique_id, 0 if self._sends else 1)
            if self._closed.is_set():  # given up meanwhile, perhaps before there was anything to abort
                self._abort()
            self._launch(1)
            self._finish()

    def _launch(self, count: int) -> None:
        """Put one send or receive of `count` bytes on the stream, between the two timing events."""
        pointer = pynccl.buffer_type(self._staging.data_ptr())
        stream = pynccl.cudaStream_t(self._stream.cuda_stream)
        call = self._library.ncclSend if self._sends else self._library.ncclRecv
        with self._using, torch.cuda.stream(self._stream):
            if self._closed.is_set() or self._comm is None:
                raise ChannelClosedError(f"{self.channel.peer}: the connection is closed")
            self._begun.record()
            call(pointer, count, pynccl.ncclDataTypeEnum.ncclUint8, 1 if self._sends else 0, self._comm, stream)
            self._ended.record()

    def _finish(self) -> float:
        """Wait for what was launched; a kernel of NCCL whose peer is gone never ends, so close and deadline end it."""
        deadline_s = time.monotonic() + self.channel.timeout_s
        while not self._ended.query():
            if self._closed.is_set() or time.monotonic() > deadline_s:
                self.close()
                raise ChannelClosedError(f"{self.channel.peer}: the GPU transfer was not finished by the other side")
            time.sleep(NCCL_POLL_S)
        return float(self._begun.elapsed_time(self._ended)) / 1e3

    def _abort(self) -> None:
        """Stop NCCL's kernels and free the communicator. A call that hangs inside NCCL is not waited for: this ends it."""
        held = self._using.acquire(timeout=2.0)
        try:
            comm, self._comm = self._comm, None
            if comm is not None:
                with torch.cuda.device(self._packer.device):
                    self._library.ncclCommAbort(comm)
        finally:
            if held:
                self._using.release()
