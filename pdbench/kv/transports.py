"""How a pair of workers moves packed blocks: over the control connection (tcp), or from GPU to GPU by NCCL (nccl); docs/kv-protocol.md.

With nccl the forward pass is over and the copy of the blocks under way when the header leaves; then prefill launches its send behind the copy,
while decode, which got the header, posts the matching receive. Pieces stay in order, and decode's GPU alone waits, for as long as a launch takes:
prefill's never waits for a header that a call which waits for all of the GPU, the send among it, could hold up.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.device_communicators import pynccl_wrapper as pynccl

from pdbench.kv.blocks import BlockNumbers, BlockPacker
from pdbench.kv.channel import Blocks, Channel, WorkerContext
from pdbench.kv.ranks import Share

# A communicator takes a second or two to make; a peer that dies meanwhile would block NCCL for good.
NCCL_OPEN_TIMEOUT_S = 60.0
NCCL_POLL_S = 0.00005


class Link(ABC):
    """What moves a pair's blocks: prefill packs and sends, decode receives and unpacks, one piece at a time, in order.

    One thread uses it at a time, `close` may come from any. The buffer is reused by the next piece. `after` is a CUDA event (blocking) of the
    forward pass that must be over first, None where there is none to wait for. Every method may raise ChannelClosedError.
    """

    _host: torch.Tensor | None = None
    """The buffer's twin in pinned memory, for a transport that sends from there."""

    def __init__(
        self, packer: BlockPacker, channel: Channel, on_gpu: bool, staging_bytes: int, piece_blocks: int
    ) -> None:
        self.channel, self._packer, self.block_bytes = channel, packer, packer.block_bytes
        # Higher priority than the model's stream: a copy of well under a millisecond does not queue behind its kernels.
        self.stream: Any = torch.cuda.Stream(self._packer.device, priority=-1) if on_gpu else None
        # They do not sleep when waited for: a copy takes less time than it takes to be woken.
        self._copying: Any
        self._copied: Any
        self._copying, self._copied = _timing() if on_gpu else (None, None)
        self._copy_s = self.sent_s = 0.0
        # Memory of the stream: what was launched may still use it when the link is closed and gone, and what gets it next comes behind that.
        self._staging = self._buffer(staging_bytes)
        with torch.cuda.stream(self.stream):
            self._numbers = BlockNumbers(piece_blocks, packer.device)

    def pack(self, block_ids: Sequence[int], after: Any) -> float:
        """Begin to copy blocks into the buffer; returns when (time.monotonic()) the pass before that was over."""
        ready_s = time.monotonic()
        with self._on_stream(after):
            packed = self._packer.gather(self._numbers.put(block_ids), self._staging)
            if self._host is not None:
                self._host[: packed.numel()].copy_(packed, non_blocking=True)
        if after is not None:
            # Sleeps in the driver without the interpreter's lock, for as long as the forward pass takes.
            after.synchronize()
            ready_s = time.monotonic()
        return ready_s

    def begin_send(self, header: Blocks) -> None:  # noqa: B027 (some transports send all at once)
        """As much of sending header and bytes as need not wait until they are `copied`."""

    def copied(self) -> float:
        """Wait for the last copy: from then on blocks that were packed may be overwritten. Returns the seconds that it took, by the GPU's clock."""
        if self._copied is None:
            return self._copy_s
        self._copied.synchronize()
        return float(self._copying.elapsed_time(self._copied)) / 1e3

    @abstractmethod
    def end_send(self, header: Blocks) -> float:
        """Send the rest; returns the seconds on the wire, when the buffer is free again. `sent_s` is when the header left."""

    @abstractmethod
    def receive(self, count: int, block_ids: Sequence[int]) -> float:
        """Receive the `count` bytes behind a header, which `unpack` shall put into these blocks; returns the seconds on the wire."""

    def unpack(self, count: int, after: Any) -> float:
        """Scatter the bytes received last; returns when they are in the cache, the seconds that it took."""
        if after is not None:
            after.synchronize()
        packed = self._staging[:count]
        with self._on_stream():
            if self._host is not None:
                packed.copy_(self._host[:count], non_blocking=True)
            self._packer.scatter(packed, self._index)
        return self.copied()

    def close(self) -> None:
        """End it; a method that waits raises ChannelClosedError."""
        self.channel.close()

    def _put(self, block_ids: Sequence[int]) -> None:
        """Have the numbers for `unpack` on the device; while the bytes come, since each call may have to wait for the interpreter's lock."""
        with torch.cuda.stream(self.stream):
            self._index = self._numbers.put(block_ids)

    @contextmanager
    def _on_stream(self, after: Any = None) -> Iterator[None]:
        """Do what follows on the link's stream and behind `after`, between the events of a copy; on CPU now."""
        begun_s = time.monotonic()
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            if self._copying is not None:
                self._copying.record()
            yield
            if self._copied is not None:
                self._copied.record()
        self._copy_s = time.monotonic() - begun_s

    def _buffer(self, size: int) -> torch.Tensor:
        with torch.cuda.stream(self.stream):
            return torch.empty(size, dtype=torch.uint8, device=self._packer.device)


def _timing() -> tuple[Any, Any]:
    """Two events with the GPU's clock."""
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def open_link(context: WorkerContext, channel: Channel, share: Share, sends: bool) -> Link:
    """Make the link for a share of the cache, after the channel's handshake.

    Raises ChannelClosedError, or whatever a GPU without room raises.
    """
    packer = context.packer.share(share, context.identity.heads.start)
    if context.identity.transport == "tcp":
        link: Link = TcpLink(context, packer, channel)
    else:
        link = NcclLink(context, packer, channel, sends)
    if packer is not context.packer:
        with torch.cuda.stream(link.stream):
            packer.warm_up()
    return link


class TcpLink(Link):
    def __init__(self, context: WorkerContext, packer: BlockPacker, channel: Channel) -> None:
        on_gpu = packer.device.type != "cpu"
        super().__init__(packer, channel, on_gpu, context.staging_bytes, context.piece_blocks)
        # The socket reads and writes host memory directly.
        if on_gpu:
            self._host = torch.empty(context.staging_bytes, dtype=torch.uint8, pin_memory=True)
        self._bytes = memoryview((self._staging if self._host is None else self._host).numpy())

    def end_send(self, header: Blocks) -> float:
        self.sent_s = time.monotonic()
        self.channel.send(header, self._bytes[: header.bytes])
        return time.monotonic() - self.sent_s

    def receive(self, count: int, block_ids: Sequence[int]) -> float:
        self._put(block_ids)
        begun_s = time.monotonic()
        self.channel.receive_into(self._bytes[:count])
        return time.monotonic() - begun_s


class NcclLink(Link):
    def __init__(self, context: WorkerContext, packer: BlockPacker, channel: Channel, sends: bool) -> None:
        super().__init__(packer, channel, True, 1, context.piece_blocks)
        self._sends, self._start_thread = sends, context.start_thread
        self._library = pynccl.NCCLLibrary()
        self._using = threading.Lock()
        self._closed = threading.Event()
        self._comm: Any = None
        self._begun, self._ended = _timing()
        try:
            self._open_in_time()
            # Only now: a peer that dies while NCCL opens can leave a thread behind in NCCL, which must not hold much.
            self._staging = self._buffer(context.staging_bytes)
        except BaseException:
            self.close()
            raise

    def begin_send(self, header: Blocks) -> None:
        self.sent_s = time.monotonic()
        # Before vLLM may overwrite blocks it waits for the copy, and so for this, but never for the network (`Sender.preempted`).
        self.channel.send(header, wait=False)
        self._launch(header.bytes)

    def end_send(self, header: Blocks) -> float:
        """The seconds returned are the GPU's, from the end of the copy to the end, the peer's answer included."""
        return self._finish()

    def receive(self, count: int, block_ids: Sequence[int]) -> float:
        """The seconds returned are by the GPU's clock."""
        self._launch(count)
        self._put(block_ids)
        return self._finish()

    def close(self) -> None:
        """End it: what waits raises ChannelClosedError, and the communicator is aborted in the background."""
        self.channel.close()
        if not self._closed.is_set():
            self._closed.set()
            try:
                self._start_thread("kv-nccl-abort", self._abort)
            except RuntimeError:  # no more threads on this machine
                self._abort()

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
            raise self.channel.failed(f"no NCCL communicator in {NCCL_OPEN_TIMEOUT_S:g} s")
        if failures:
            raise self.channel.failed(f"no NCCL communicator ({failures[0]})") from failures[0]

    def _open(self) -> None:
        """Make the communicator and move one byte through it, so that NCCL connects now and not in the first transfer."""
        if self._sends:
            unique_id = self._library.ncclGetUniqueId()
            self.channel.send({"type": "nccl", "id": bytes(unique_id.internal).hex()})
        else:
            message = self.channel.receive()
            try:
                unique_id = self._library.unique_id_from_bytes(bytes.fromhex(message["id"]))
            except (KeyError, TypeError, ValueError) as error:
                raise self.channel.failed("no NCCL id came") from error
        with torch.cuda.device(self._packer.device):
            self._comm = self._library.ncclCommInitRank(2, unique_id, 0 if self._sends else 1)
            if self._closed.is_set():  # given up meanwhile, perhaps before there was anything to abort
                self._abort()
            self._launch(1)
            self._finish()

    def _launch(self, count: int) -> None:
        """Put one send or receive of `count` bytes on the stream, between the two timing events."""
        pointer = pynccl.buffer_type(self._staging.data_ptr())
        stream = pynccl.cudaStream_t(self.stream.cuda_stream)
        call = self._library.ncclSend if self._sends else self._library.ncclRecv
        with self._using, torch.cuda.stream(self.stream):
            if self._closed.is_set() or self._comm is None:
                raise self.channel.failed("the connection is closed")
            self._begun.record()
            call(pointer, count, pynccl.ncclDataTypeEnum.ncclUint8, 1 if self._sends else 0, self._comm, stream)
            self._ended.record()

    def _finish(self) -> float:
        """Wait for what was launched; a kernel of NCCL whose peer is gone never ends, so close and deadline end it."""
        deadline_s = time.monotonic() + self.channel.timeout_s
        while not self._ended.query():
            if self._closed.is_set() or time.monotonic() > deadline_s:
                self.close()
                raise self.channel.failed("the GPU transfer was not finished by the other side")
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
