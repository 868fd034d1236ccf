"""Prefill's half of the worker: listens for decode workers and pushes each transfer's blocks as they are computed.

A transfer lives from `expect` (its request arrived) to the report that vLLM may free its blocks. Every one ends: sent, failed,
dropped by decode, or `transfer_timeout_s` after prefill was done when nobody asked for it.
Try: python -m pytest tests/test_kv_exchange.py
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.control import Ask, Blocks, Channel, ChannelClosedError, Failed, Forget, Identity, Message, Waiting
from pdbench.kv.link import Link, OpenLink
from pdbench.kv.listening import Listener
from pdbench.kv.messages import Prefilled, PrefillEnd, Prompt
from pdbench.kv.threads import Threads

logger = logging.getLogger(f"vllm.{__name__}")

REMEMBERED_TRANSFERS = 10_000


@dataclass(eq=False)
class _Peer:
    """A decode worker that is connected, and the queue of the thread that writes to it."""

    link: Link
    work: queue.SimpleQueue[Callable[[], None] | None] = field(default_factory=queue.SimpleQueue)


@dataclass
class _Asked:
    """An ask and who made it."""

    ask: Ask
    peer: _Peer
    asked_s: float


@dataclass(eq=False)
class _Send:
    """A prefill's transfer. Block counts are positions in the prompt; `event` is the CUDA event of the last forward pass."""

    prompt: Prompt
    blocks: list[int] = field(default_factory=list)
    ready: int = 0
    event: Any = None
    sent: int = 0
    asked: _Asked | None = None
    gathering: bool = False
    over: PrefillEnd | None = None
    over_s: float = 0.0
    outcome: str | None = None
    ended: bool = False
    record: TransferEvent = field(default_factory=lambda: TransferEvent(side="send", transfer_id=""))


class Sender:
    """All transfers of one prefill worker. Public methods are called by the engine's thread and never wait for the network."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        identity: Identity,
        open_link: OpenLink,
        piece_blocks: int,
        timeout_s: float,
        changed: threading.Condition,
        finish: Callable[[TransferEvent], None],
        threads: Threads,
    ) -> None:
        self._threads = threads
        self._identity, self._open_link = identity, open_link
        self._piece_blocks, self._timeout_s = piece_blocks, timeout_s
        self._changed, self._finish = changed, finish
        self._sends: dict[str, _Send] = {}
        self._by_transfer: dict[str, _Send] = {}
        self._early: dict[str, _Asked] = {}
        self._past: OrderedDict[str, str] = OrderedDict()
        self._reports: set[str] = set()
        self._peers: set[_Peer] = set()
        self._stepped_s: float | None = None
        self._closed = False
        self._listener = Listener(address, secret, identity, timeout_s, self._serve, threads)

    # The engine's thread

    def step(self, expected: list[Prompt], prefilled: list[Prefilled], ended: list[PrefillEnd], event: Any) -> None:
        """After a forward pass was launched: what it computes, which requests came and went."""
        with self._changed:
            if self._stepped_s is None:
                self._changed.notify_all()
            self._stepped_s = time.monotonic()
            for prompt in expected:
                self._expect(prompt)
            for progress in prefilled:
                self._advance(progress, event)
            for end in ended:
                self._prefill_over(end)

    def preempted(self, request_ids: list[str]) -> None:
        """Before a forward pass: these requests lost their blocks, which it may overwrite; waits for a copy under way."""
        with self._changed:
            for name in request_ids:
                send = self._sends.get(name)
                if send is not None:
                    send.ready, send.blocks = 0, []
                    while send.gathering:
                        self._changed.wait()

    def take_reports(self) -> set[str]:
        """Requests whose kept blocks vLLM may free now. The caller holds the lock."""
        taken, self._reports = self._reports, set()
        return taken

    def tick(self) -> None:
        """Now and then, from any thread: end what is overdue, and tell decode that its prefill still waits or computes."""
        now = time.monotonic()
        with self._changed:
            for send in list(self._by_transfer.values()):
                if send.asked is None and send.over and now - send.over_s > self._timeout_s:
                    self._end(send, f"decode never asked for it in {self._timeout_s:g} s after prefill")
            for transfer_id, asked in list(self._early.items()):
                if now - asked.asked_s > self._timeout_s:
                    del self._early[transfer_id]
                    reason = f"no such prefill came in {self._timeout_s:g} s"
                    self._remember(transfer_id, reason)
                    self._refuse(asked.peer, transfer_id, reason)
            # An engine that hangs makes no steps: then decode is told nothing and gives up in time.
            if self._stepped_s is not None and now - self._stepped_s < self._timeout_s:
                for send in self._by_transfer.values():
                    if send.asked is not None:
                        self._post(send.asked.peer, Waiting(send.prompt.transfer_id))

    def close(self) -> None:
        """Stop listening and leave all peers."""
        self._listener.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            peers = list(self._peers)
        for peer in peers:
            peer.link.close()

    # Transfers; the caller holds the lock

    def _expect(self, prompt: Prompt) -> None:
        send = self._sends[prompt.request_id] = _Send(prompt)
        send.record.transfer_id = prompt.transfer_id
        reason = self._past.get(prompt.transfer_id)
        if reason is not None or prompt.transfer_id in self._by_transfer:
            # The scheduler forgets a prefill that is over, while its blocks still wait here for decode.
            send.ended, send.outcome = True, f"its transfer id was used before ({reason or 'it is not sent yet'})"
            return
        self._by_transfer[prompt.transfer_id] = send
        if (asked := self._early.pop(prompt.transfer_id, None)) is not None:
            self._attach(send, asked)

    def _advance(self, progress: Prefilled, event: Any) -> None:
        send = self._sends.get(progress.request_id)
        if send is None or send.ended:
            return
        send.blocks = progress.blocks if progress.replace else send.blocks + progress.blocks
        whole = progress.computed_tokens >= send.prompt.tokens
        size = self._identity.block_size
        send.ready = send.prompt.blocks(size) if whole else progress.computed_tokens // size
        send.event = event
        self._wake(send)

    def _prefill_over(self, end: PrefillEnd) -> None:
        send = self._sends.get(end.request_id)
        if send is None:
            return
        send.over, send.over_s = end, time.monotonic()
        error = end.error
        if error is None and send.ready * self._identity.block_size < send.prompt.tokens:
            error = "prefill lost its blocks before they were sent"  # preempted while its last step was under way
        if error is not None:
            self._end(send, error)
        self._settle(send)

    def _attach(self, send: _Send, asked: _Asked) -> None:
        """Join an ask with its prefill, after checking that both speak of the same prompt."""
        ask, prompt = asked.ask, send.prompt
        blocks = prompt.blocks(self._identity.block_size)
        if (ask.tokens, ask.fingerprint) != (prompt.tokens, prompt.fingerprint):
            reason = (
                f"prefill's prompt under this transfer id is another one ({prompt.tokens} tokens, asked {ask.tokens})"
            )
            self._refuse(asked.peer, ask.transfer_id, reason)
        elif send.asked is not None:
            self._refuse(asked.peer, ask.transfer_id, "another request already receives this transfer id")
        elif not 0 <= ask.start_block < blocks:
            self._refuse(asked.peer, ask.transfer_id, f"block {ask.start_block} asked of a prompt of {blocks} blocks")
        else:
            send.asked, send.sent = asked, ask.start_block
            send.record.asked_s, send.record.peer = asked.asked_s, asked.peer.link.channel.peer
            send.record.tokens = prompt.tokens - ask.start_block * self._identity.block_size
            self._wake(send)

    def _wake(self, send: _Send) -> None:
        if send.asked is not None and send.ready > send.sent:
            send.asked.peer.work.put(lambda: self._push(send))

    def _end(self, send: _Send, error: str | None) -> None:
        """The transfer is over; `error` is None when all is sent. Decode is told of failures."""
        if send.ended:
            return
        send.ended, send.outcome = True, error
        transfer_id = send.prompt.transfer_id
        self._by_transfer.pop(transfer_id, None)
        self._remember(transfer_id, error or "it was sent")
        if error is not None and send.asked is not None:
            self._refuse(send.asked.peer, transfer_id, error)
        send.record.error = error
        self._finish(send.record)
        self._settle(send)

    def _settle(self, send: _Send) -> None:
        """Forget the transfer once prefill and transfer are both over and nothing reads its blocks; report kept blocks."""
        if send.ended and send.over is not None and not send.gathering:
            if self._sends.pop(send.prompt.request_id, None) is not None and send.over.kept:
                self._reports.add(send.prompt.request_id)
            self._changed.notify_all()

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._past[transfer_id] = reason
        while len(self._past) > REMEMBERED_TRANSFERS:
            self._past.popitem(last=False)

    def _refuse(self, peer: _Peer, transfer_id: str, reason: str) -> None:
        self._post(peer, Failed(transfer_id, reason))

    def _post(self, peer: _Peer, message: Message) -> None:
        peer.work.put(lambda: peer.link.channel.send(message))

    # A peer's writing thread

    def _push(self, send: _Send) -> None:
        """Send all blocks that are ready, piece by piece."""
        while True:
            with self._changed:
                if send.ended or send.asked is None or send.ready <= send.sent:
                    return
                stop = min(send.ready, send.sent + min(self._piece_blocks, max(1, send.asked.ask.piece_blocks)))
                link, start, event = send.asked.peer.link, send.sent, send.event
                block_ids = send.blocks[start:stop]
                last = stop == send.prompt.blocks(self._identity.block_size)
                send.gathering = True
            try:
                count, ready_s = link.pack(block_ids, event)
            finally:
                with self._changed:
                    send.gathering = False
                    if send.ended:
                        self._settle(send)
                    self._changed.notify_all()
            packed_s = time.monotonic()
            with self._changed:
                if send.ended:
                    return
            seconds = link.send(Blocks(send.prompt.transfer_id, start, stop - start, count), count)
            with self._changed:
                send.sent = stop
                send.record.ready_s = ready_s
                send.record.moved(count, stop - start, packed_s, seconds)
                if last:
                    self._end(send, None)

    def _write(self, peer: _Peer) -> None:
        """Do what is queued for a peer, until it is gone."""
        try:
            while (task := peer.work.get()) is not None:
                task()
        except ChannelClosedError as error:
            self._lose(peer, str(error))
        except Exception as error:
            logger.exception("sending KV to %s failed", peer.link.channel.peer)
            self._lose(peer, f"{type(error).__name__}: {error}")

    def _lose(self, peer: _Peer, reason: str) -> None:
        """A peer is gone: end what it asked for; its next ask comes over a connection of its own."""
        peer.link.close()
        with self._changed:
            if peer in self._peers:
                self._peers.discard(peer)
                peer.work.put(None)
            for send in list(self._by_transfer.values()):
                if send.asked is not None and send.asked.peer is peer:
                    self._end(send, reason)
            for transfer_id, asked in list(self._early.items()):
                if asked.peer is peer:
                    del self._early[transfer_id]
                    self._remember(transfer_id, reason)

    # A peer's reading thread

    def _serve(self, channel: Channel) -> None:
        """One decode worker, from handshake to its end."""
        with self._changed:
            # No kernel may run and nothing be allocated on a GPU beside vLLM's capture of CUDA graphs, which is over at its first step.
            self._changed.wait_for(lambda: self._stepped_s is not None or self._closed, self._timeout_s)
            if self._stepped_s is None or self._closed:
                channel.close()
                return
        try:
            peer = _Peer(self._open_link(channel, True))
        except Exception as error:
            logger.warning("no link to decode worker %s: %s", channel.peer, error)
            channel.close()
            return
        with self._changed:
            self._peers.add(peer)
            if self._closed:
                peer.link.close()
        logger.info("decode worker %s is connected", channel.peer)
        self._threads.start("kv-send", self._write, peer)
        self._read(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            while True:
                message = msgspec.convert(peer.link.channel.receive(), Ask | Forget)
                with self._changed:
                    if isinstance(message, Ask):
                        self._asked(message, peer)
                    else:
                        self._dropped(message, peer)
        except ChannelClosedError as error:
            self._lose(peer, str(error))
        except msgspec.ValidationError as error:
            self._lose(peer, f"not a message of the protocol: {error}")
        except Exception as error:
            logger.exception("reading from %s failed", peer.link.channel.peer)
            self._lose(peer, f"{type(error).__name__}: {error}")

    def _asked(self, ask: Ask, peer: _Peer) -> None:
        asked = _Asked(ask, peer, time.monotonic())
        if (reason := self._past.get(ask.transfer_id)) is not None:
            self._refuse(peer, ask.transfer_id, f"this transfer id was used before ({reason})")
        elif (send := self._by_transfer.get(ask.transfer_id)) is not None:
            self._attach(send, asked)
        elif ask.transfer_id in self._early:
            self._refuse(peer, ask.transfer_id, "another request already waits for this transfer id")
        else:
            self._early[ask.transfer_id] = asked

    def _dropped(self, message: Forget, peer: _Peer) -> None:
        """Decode gave a transfer up; one that another worker asked for is not its to give up."""
        transfer_id = message.transfer_id
        send, early = self._by_transfer.get(transfer_id), self._early.get(transfer_id)
        if send is None and early is None:
            self._remember(transfer_id, message.reason)
        if early is not None and early.peer is peer:
            del self._early[transfer_id]
            self._remember(transfer_id, message.reason)
        if send is not None and (send.asked is None or send.asked.peer is peer):
            send.asked = None  # it knows already
            self._end(send, message.reason)
