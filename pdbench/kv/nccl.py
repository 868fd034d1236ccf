"""Transport nccl: packed blocks go from GPU to GPU by ncclSend and ncclRecv, on streams of their own beside the model's.

A pair of workers has one communicator of two. Its NCCL id travels over the authenticated control connection, so that no
rendezvous port is open to strangers. Prefill launches its send before the header leaves; decode posts the matching receive
when the header arrives: pieces stay in order, and neither GPU waits for longer than a header's way.
Try, on a host with two GPUs: python -m pytest tests/gpu/test_kv_nccl.py -m gpu
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.device_communicators.pynccl_wrapper import (
    NCCLLibrary,
    buffer_type,
    cudaStream_t,
    ncclDataTypeEnum,
)

from pdbench.kv.control import Blocks, Channel, ChannelClosedError
from pdbench.kv.pack import BlockPacker
from pdbench.kv.threads import Threads

SENDER, RECEIVER = 0, 1
# A communicator takes a second or two to make; a peer that dies meanwhile would block NCCL for good.
OPEN_TIMEOUT_S = 60.0
POLL_S = 0.00005


class NcclLink:
    """One pair's wire. One thread uses it at a time; `close` may come from any."""

    def __init__(
        self, channel: Channel, packer: BlockPacker, staging_bytes: int, sends: bool, threads: Threads
    ) -> None:
        self.channel = channel
        self._packer, self._sends, self._threads = packer, sends, threads
        self._library = NCCLLibrary()
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
            # Only now: a peer that dies amid the opening can leave a thread behind in NCCL, which must not hold much.
            self._staging = self._buffer(staging_bytes)
        except BaseException:
            self.close()
            raise

    def pack(self, block_ids: Sequence[int], after: Any) -> tuple[int, float]:
        """Gather the blocks once the forward pass marked by `after` is over; returns the bytes, and when it was over."""
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
        """Send the bytes packed last; returns the seconds from launch to end, the peer's answer included."""
        self._launch(count)
        self.channel.send(header)
        return self._finish()

    def receive(self, count: int) -> float:
        """Receive the bytes behind a header; returns the seconds they took on the wire, by the GPU's clock."""
        self._launch(count)
        return self._finish()

    def unpack(self, count: int, block_ids: Sequence[int], after: Any) -> None:
        """Scatter the bytes received last, behind the forward pass marked by `after`; returns when it is done."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._packer.scatter(self._staging[:count], block_ids)
            self._passed.record()
        self._passed.synchronize()

    def close(self) -> None:
        """End it: what waits raises ChannelClosedError, and the communicator is given back in the background."""
        self.channel.close()
        if not self._closed.is_set():
            self._closed.set()
            self._threads.start("kv-nccl-abort", self._abort)

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

        thread = self._threads.start("kv-nccl-open", run)
        thread.join(OPEN_TIMEOUT_S)
        if thread.is_alive():
            raise ChannelClosedError(f"{self.channel.peer}: no NCCL communicator in {OPEN_TIMEOUT_S:g} s")
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
            self._comm = self._library.ncclCommInitRank(2, unique_id, SENDER if self._sends else RECEIVER)
            if self._closed.is_set():  # given up meanwhile, perhaps before there was anything to abort
                self._abort()
            self._launch(1)
            self._finish()

    def _launch(self, count: int) -> None:
        """Put one send or receive of `count` bytes on the stream, between the two timing events."""
        pointer = buffer_type(self._staging.data_ptr())
        stream = cudaStream_t(self._stream.cuda_stream)
        call = self._library.ncclSend if self._sends else self._library.ncclRecv
        with self._using, torch.cuda.stream(self._stream):
            if self._closed.is_set() or self._comm is None:
                raise ChannelClosedError(f"{self.channel.peer}: the connection is closed")
            self._begun.record()
            other = RECEIVER if self._sends else SENDER
            call(pointer, count, ncclDataTypeEnum.ncclUint8, other, self._comm, stream)
            self._ended.record()

    def _finish(self) -> float:
        """Wait for what was launched; a kernel of NCCL whose peer is gone never ends, so close and deadline end it."""
        deadline_s = time.monotonic() + self.channel.timeout_s
        while not self._ended.query():
            if self._closed.is_set() or time.monotonic() > deadline_s:
                self.close()
                raise ChannelClosedError(f"{self.channel.peer}: the GPU transfer was not finished by the other side")
            time.sleep(POLL_S)
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
