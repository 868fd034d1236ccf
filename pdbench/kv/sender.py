"""Prefill's half of the worker: listens for decode workers and pushes each transfer's blocks as they are computed.

Every transfer ends (sent, failed, cancelled, or `timeout_s` after prefill if decode never asks); then vLLM may free its blocks.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.channel import (
    Address,
    Blocks,
    Cancel,
    Channel,
    FetchRequest,
    Identity,
    Listener,
    Waiting,
    WorkerContext,
    why_ended,
)
from pdbench.kv.ranks import Share
from pdbench.kv.scheduler import PrefillEnd, StepPlan, Transfer
from pdbench.kv.transports import Link, open_link

logger = logging.getLogger(f"vllm.{__name__}")

REMEMBERED_TRANSFERS = 10_000


@dataclass(eq=False)
class _Peer:
    """A decode worker that is connected, and the queue of the thread that writes to it.

    It is `rank` of `ranks`, of which `readers` get something from this worker.
    """

    link: Link
    rank: int
    ranks: int
    readers: int
    work: queue.SimpleQueue[Callable[[], None] | None] = field(default_factory=queue.SimpleQueue)

    def post(self, message: msgspec.Struct) -> None:
        self.work.put(lambda: self.link.channel.send(message))


@dataclass(eq=False)
class _Reader:
    """A decode worker that asked for a transfer; `sent` counts blocks from the transfer's start, `done` when the last one is."""

    peer: _Peer
    request: FetchRequest
    record: TransferEvent
    sent: int = 0
    done: bool = False


@dataclass(eq=False)
class _Send:
    """One transfer: prefill's `transfer` and decode's `readers` by rank, either of which may come first.

    `blocks` are those that are computed, from the transfer's start on; `event` is the CUDA event of the last forward pass;
    `gathering` how many copies of its blocks are under way.
    """

    transfer_id: str
    transfer: Transfer | None = None
    readers: dict[int, _Reader] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    event: Any = None
    gathering: int = 0
    prefill_end: PrefillEnd | None = None
    prefill_end_s: float = 0.0
    ended: bool = False

    def reads(self, peer: _Peer) -> bool:
        return any(reader.peer is peer and not reader.done for reader in self.readers.values())

    def missing(self) -> bool:
        """Is there a decode worker that has not asked for it yet?"""
        return not self.readers or len(self.readers) < next(iter(self.readers.values())).peer.readers


class Sender:
    """All transfers of one prefill worker. Public methods are called by the engine's thread and never wait for the network.

    Raises OSError when `address` is taken or not this host's.
    """

    def __init__(self, address: Address, context: WorkerContext) -> None:
        self._context, self._changed, self._timeout_s = context, context.changed, context.timeout_s
        self._by_request: dict[str, _Send] = {}  # prefills whose blocks may be in use
        self._by_transfer: dict[str, _Send] = {}  # transfers that have not ended
        self._past: dict[str, str] = {}  # the latest: transfer id -> how it ended
        self._reports: set[str] = set()
        self._peers: set[_Peer] = set()
        self._stepped_s: float | None = None
        self._closed = False
        self._listener = Listener(address, context, self._serve)

    # The engine's thread

    def step(self, plan: StepPlan, event: Any) -> None:
        """After a forward pass was launched: what it computes, which requests came and went."""
        with self._changed:
            if self._stepped_s is None:
                self._changed.notify_all()
            self._stepped_s = time.monotonic()
            for transfer in plan.expected:
                send = self._by_transfer.get(transfer.transfer_id)
                # The scheduler forgets a prefill that is over, while its blocks still wait here for decode.
                used = transfer.transfer_id in self._past or (send is not None and send.transfer is not None)
                if send is None or used:
                    send = _Send(transfer.transfer_id)
                send.transfer, send.ended = transfer, used
                self._by_request[transfer.request_id] = send
                if not used:
                    self._by_transfer[transfer.transfer_id] = send
                    for reader in list(send.readers.values()):
                        self._match(send, reader)
            for progress in plan.prefilled:
                send = self._by_request.get(progress.request_id)
                if send is None or send.transfer is None or send.ended:
                    continue
                send.blocks = progress.blocks if progress.replace else send.blocks + progress.blocks
                send.event = event
                for reader in send.readers.values():
                    self._wake(send, reader)
            for end in plan.ended:
                send = self._by_request.get(end.request_id)
                if send is None or send.transfer is None:
                    continue
                send.prefill_end, send.prefill_end_s = end, self._stepped_s
                error = end.error
                if error is None and len(send.blocks) < len(send.transfer.ends):
                    # Preempted while its last step was under way.
                    error = "prefill lost its blocks before they were sent"
                if error is not None:
                    self._end(send, error)
                self._settle(send)

    def preempted(self, request_ids: list[str]) -> None:
        """Before a forward pass: these requests lost their blocks, which it may overwrite; waits for a copy under way."""
        with self._changed:
            for name in request_ids:
                send = self._by_request.get(name)
                if send is not None:
                    send.blocks = []
                    while send.gathering:
                        self._changed.wait()

    def take_reports(self) -> set[str]:
        """Requests whose kept blocks vLLM may free now. The caller holds the lock."""
        taken, self._reports = self._reports, set()
        return taken

    def asked(self, transfer_id: str) -> FetchRequest | None:
        """The first request for a transfer, one for nothing where that is over, None if none came yet. The caller holds the lock."""
        if transfer_id in self._past:
            return FetchRequest(transfer_id, 0, "", 0, 0)
        send = self._by_transfer.get(transfer_id)
        return next((reader.request for reader in send.readers.values()), None) if send is not None else None

    def withdraw(self, request_id: str) -> bool:
        """Nobody needs any more what decode offered to return of a request; False while it is being copied. The caller holds the lock."""
        send = self._by_request.get(request_id)
        if send is None or send.transfer is None or not send.transfer.returned:
            return True
        send.prefill_end = PrefillEnd(request_id=request_id, kept=False, error=None)
        self._end(send, "decode's fetch of the rest of the prompt is over")
        self._settle(send)
        return not send.gathering

    def tick(self) -> None:
        """Called regularly, from any thread: end what is overdue, and tell decode that its prefill still waits or computes."""
        now_s = time.monotonic()
        with self._changed:
            for send in list(self._by_transfer.values()):
                asked_s = min((reader.record.asked_s or 0.0 for reader in send.readers.values()), default=0.0)
                if send.transfer is None and now_s - asked_s > self._timeout_s:
                    self._end(send, f"no such prefill came in {self._timeout_s:g} s")
                elif send.missing() and send.prefill_end and now_s - send.prefill_end_s > self._timeout_s:
                    self._end(send, f"decode never asked for it in {self._timeout_s:g} s after prefill")
            # An engine that hangs makes no steps: then decode gets no sign of life and gives up in time.
            if self._stepped_s is not None and now_s - self._stepped_s < self._timeout_s:
                for send in self._by_transfer.values():
                    for reader in send.readers.values():
                        if send.transfer is not None and not reader.done:
                            reader.peer.post(Waiting(send.transfer_id))

    def close(self) -> None:
        self._listener.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            peers = list(self._peers)
        for peer in peers:
            peer.link.close()

    # Transfers; the caller holds the lock

    def _request(self, request: FetchRequest, peer: _Peer) -> None:
        """Decode asks for a transfer, perhaps before its prefill came."""
        send = self._by_transfer.get(request.transfer_id)
        if (reason := self._past.get(request.transfer_id)) is not None:
            peer.post(Cancel(request.transfer_id, f"this transfer id was used before ({reason})"))
            return
        if send is None:
            send = self._by_transfer[request.transfer_id] = _Send(request.transfer_id)
        if peer.rank in send.readers or any(reader.peer.ranks != peer.ranks for reader in send.readers.values()):
            peer.post(Cancel(request.transfer_id, "another request asked for this transfer id before"))
            return
        record = TransferEvent(side="send", transfer_id=request.transfer_id, asked_s=time.monotonic())
        reader = send.readers[peer.rank] = _Reader(peer, request, record)
        self._match(send, reader)

    def _match(self, send: _Send, reader: _Reader) -> None:
        """Once both sides are here: start if they mean the same prompt; else refuse the request, so that another one may come."""
        transfer, request = send.transfer, reader.request
        if transfer is None:
            return
        start, blocks = request.start_block, len(transfer.ends)
        if (request.tokens, request.fingerprint) != (transfer.tokens, transfer.fingerprint):
            reason = f"the prompts of this transfer id differ (prefill's {transfer.tokens} tokens, decode's {request.tokens})"
        elif not 0 <= start < blocks:
            reason = f"decode asked for block {start} of a prompt of {blocks} blocks"
        else:
            reader.sent, reader.record.peer = start, reader.peer.link.channel.peer
            reader.record.direction = transfer.direction
            reader.record.tokens = transfer.tokens - (transfer.ends[start - 1] if start else 0)
            self._wake(send, reader)
            return
        reader.peer.post(Cancel(transfer.transfer_id, reason))
        del send.readers[reader.peer.rank]

    def _wake(self, send: _Send, reader: _Reader) -> None:
        if len(send.blocks) > reader.sent:
            reader.peer.work.put(lambda: self._push(send, reader))

    def _end(self, send: _Send, error: str | None, by: _Peer | None = None) -> None:
        """The transfer is over; `error` is None when all is sent, else all of decode's workers are told but the one that ended it."""
        if send.ended:
            return
        send.ended = True
        self._by_transfer.pop(send.transfer_id, None)
        self._remember(send.transfer_id, error or "it was sent")
        unfinished = [reader for reader in send.readers.values() if not reader.done]
        for reader in unfinished:
            if reader.peer is not by:
                reader.peer.post(Cancel(send.transfer_id, error or ""))
        if send.transfer is not None:
            records = [reader.record for reader in unfinished]
            if not send.readers and not send.transfer.returned:  # prefill may need nothing of what decode offers
                records = [TransferEvent(side="send", transfer_id=send.transfer_id)]
            for record in records:
                record.error = error
                self._context.finish(record)
            self._settle(send)

    def _settle(self, send: _Send) -> None:
        """Forget the transfer once prefill and transfer are both over and nothing reads its blocks; report kept blocks."""
        if send.ended and send.prefill_end is not None and not send.gathering:
            name = send.prefill_end.request_id
            if self._by_request.pop(name, None) is not None and send.prefill_end.kept:
                self._reports.add(name)
            self._changed.notify_all()

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._past[transfer_id] = reason
        while len(self._past) > REMEMBERED_TRANSFERS:
            del self._past[next(iter(self._past))]

    # A peer's two threads

    def _serve(self, channel: Channel, decode: Identity, shares: list[Share]) -> None:
        """One decode worker, from handshake to its end; `shares` is what this worker sends to all of its instance's."""
        share = next((share for share in shares if share.reader == decode.rank), None)
        if share is None:  # it only asked how many ranks there are
            return
        with self._changed:
            # While vLLM captures CUDA graphs, which is over at its first step, no kernel may run and nothing be allocated on a GPU.
            self._changed.wait_for(lambda: self._stepped_s is not None or self._closed, self._timeout_s)
            if self._stepped_s is None or self._closed:
                return
        try:
            link = open_link(self._context, channel, share, sends=True)
        except Exception as error:
            logger.warning("no link to decode worker %s: %s", channel.peer, error)
            return
        peer = _Peer(link, decode.rank, decode.tensor_parallel, len(shares))
        with self._changed:
            self._peers.add(peer)
            if self._closed:
                peer.link.close()
        logger.info("decode worker %s is connected", channel.peer)
        self._until_lost(peer, self._read)

    def _until_lost(self, peer: _Peer, loop: Callable[[_Peer], None]) -> None:
        try:
            loop(peer)
            return
        except Exception as error:
            reason = why_ended(error, peer.link.channel.peer)
        peer.link.close()
        with self._changed:
            if peer in self._peers:
                self._peers.discard(peer)
                peer.work.put(None)
            # Its next request comes over a connection of its own.
            for send in [send for send in self._by_transfer.values() if send.reads(peer)]:
                self._end(send, reason, by=peer)

    def _read(self, peer: _Peer) -> None:
        self._context.start_thread("kv-send", self._until_lost, peer, self._write)
        while True:
            message = peer.link.channel.receive(FetchRequest | Cancel, idle=True)
            with self._changed:
                if isinstance(message, FetchRequest):
                    self._request(message, peer)
                elif (send := self._by_transfer.get(message.transfer_id)) is None:
                    self._remember(message.transfer_id, message.reason)
                elif not send.readers or send.reads(peer):  # what another worker asked for is not its to give up
                    self._end(send, message.reason, by=peer)

    def _write(self, peer: _Peer) -> None:
        for task in iter(peer.work.get, None):
            task()

    def _push(self, send: _Send, reader: _Reader) -> None:
        link, request = reader.peer.link, reader.request
        while True:
            with self._changed:
                if send.ended or reader.done or len(send.blocks) <= reader.sent:
                    return
                assert send.transfer is not None
                piece_blocks = min(self._context.piece_blocks, max(1, request.piece_blocks))
                start, stop = reader.sent, min(len(send.blocks), reader.sent + piece_blocks)
                event, block_ids = send.event, send.blocks[start:stop]
                last = stop == len(send.transfer.ends)
                send.gathering += 1
            header = Blocks(send.transfer_id, start, stop - start, len(block_ids) * link.block_bytes)
            try:
                ready_s = link.pack(block_ids, event)
                with self._changed:
                    ended = send.ended
                if not ended:
                    link.begin_send(header)
                copy_s = link.copied()
            finally:
                with self._changed:
                    send.gathering -= 1
                    if send.ended:
                        self._settle(send)
                    self._changed.notify_all()
            if ended:
                return
            seconds = link.end_send(header)
            with self._changed:
                reader.sent = stop
                reader.record.ready_s = ready_s
                reader.record.moved(header.bytes, header.count, link.sent_s, seconds, copy_s)
                if last and not send.ended:
                    reader.done = True
                    self._context.finish(reader.record)
                    if not send.missing() and all(other.done for other in send.readers.values()):
                        self._end(send, None)
