"""Decode's half of the worker: asks prefill for blocks and puts what comes into vLLM's own, while other requests go on.

Every fetch ends exactly once, well or with the reason why not, and is then reported to vLLM: within `transfer_timeout_s` of
the last sign of life of its prefill.
Try: python -m pytest tests/test_kv_exchange.py
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.control import (
    Ask,
    Blocks,
    Channel,
    ChannelClosedError,
    Failed,
    Forget,
    Identity,
    Message,
    Waiting,
    dial,
    offer_handshake,
)
from pdbench.kv.link import Link, OpenLink
from pdbench.kv.messages import Drop, Fetch
from pdbench.kv.threads import Threads

logger = logging.getLogger(f"vllm.{__name__}")

Address = tuple[str, int]


@dataclass(eq=False)
class _Receive:
    """A fetch under way; `got` blocks are in the cache, `alive_s` is the last sign of life."""

    fetch: Fetch
    address: Address
    event: Any
    alive_s: float
    record: TransferEvent
    got: int = 0
    writing: bool = False
    given_up: str | None = None


@dataclass(eq=False)
class _Peer:
    """A prefill worker: messages wait in `unsent` until the connection stands."""

    address: Address
    link: Link | None = None
    unsent: list[Message] = field(default_factory=list)


class Receiver:
    """All fetches of one decode worker. Public methods are called by the engine's thread and never wait for the network."""

    def __init__(
        self,
        secret: bytes,
        identity: Identity,
        open_link: OpenLink,
        piece_blocks: int,
        block_bytes: int,
        timeout_s: float,
        changed: threading.Condition,
        finish: Callable[[TransferEvent], None],
        threads: Threads,
    ) -> None:
        self._threads = threads
        self._secret, self._identity, self._open_link = secret, identity, open_link
        self._piece_blocks, self._block_bytes = piece_blocks, block_bytes
        self._timeout_s, self._changed, self._finish = timeout_s, changed, finish
        self._receives: dict[str, _Receive] = {}
        self._peers: dict[Address, _Peer] = {}
        self._ended: list[_Receive] = []
        self._closed = False

    # The engine's thread

    def step(self, fetches: list[Fetch], drops: list[Drop], event: Any) -> None:
        """Start and give up fetches; `event` marks the forward passes after which their blocks may be written."""
        now = time.monotonic()
        with self._changed:
            for fetch in fetches:
                self._start(fetch, event, now)
            for drop in drops:
                self._give_up(drop)

    def take_reports(self, failures: bool = True) -> tuple[dict[str, Fetch], dict[str, Fetch]]:
        """Fetches that ended since the last call, by request id: all of them, and those that failed. The caller holds the lock.

        Without `failures`, those wait for a later call.
        """
        ended = [receive for receive in self._ended if failures or receive.record.error is None]
        self._ended = [receive for receive in self._ended if not (failures or receive.record.error is None)]
        now = time.monotonic()
        for receive in ended:
            receive.record.reported_s = now
            self._finish(receive.record)
        everything = {receive.fetch.prompt.request_id: receive.fetch for receive in ended}
        failed = {r.fetch.prompt.request_id: r.fetch for r in ended if r.record.error is not None}
        return everything, failed

    def tick(self) -> None:
        """Now and then, from any thread: give up the fetches whose prefill shows no sign of life."""
        now = time.monotonic()
        with self._changed:
            for receive in list(self._receives.values()):
                if now - receive.alive_s > self._timeout_s:
                    host, port = receive.address
                    reason = f"no sign of the transfer from prefill {host}:{port} in {self._timeout_s:g} s"
                    self._abandon(receive, reason)

    def close(self) -> None:
        """Leave all peers."""
        with self._changed:
            self._closed = True
            links = [peer.link for peer in self._peers.values() if peer.link is not None]
        for link in links:
            link.close()

    # Fetches; the caller holds the lock

    def _start(self, fetch: Fetch, event: Any, now: float) -> None:
        address = (fetch.host, fetch.port + self._identity.rank)
        size, prompt = self._identity.block_size, fetch.prompt
        record = TransferEvent(
            side="receive",
            transfer_id=prompt.transfer_id,
            peer=f"{address[0]}:{address[1]}",
            tokens=prompt.tokens - fetch.start_block * size,
            asked_s=now,
        )
        receive = _Receive(fetch, address, event, now, record)
        if prompt.transfer_id in self._receives:
            self._end(receive, "another request of this instance already receives this transfer id")
            return
        self._receives[prompt.transfer_id] = receive
        ask = Ask(prompt.transfer_id, prompt.tokens, prompt.fingerprint, fetch.start_block, self._piece_blocks)
        self._post(address, ask)

    def _give_up(self, drop: Drop) -> None:
        receive = self._receives.get(drop.transfer_id)
        if receive is not None and receive.fetch.prompt.request_id == drop.request_id:
            self._abandon(receive, drop.reason)
        elif receive is None and drop.host:
            self._tell_drop((drop.host, drop.port + self._identity.rank), drop.transfer_id, drop.reason)

    def _abandon(self, receive: _Receive, reason: str) -> None:
        """Stop a fetch from this side; blocks that are being written right now are reported when that is done."""
        if receive.given_up is not None:
            return
        receive.given_up = reason
        self._tell_drop(receive.address, receive.fetch.prompt.transfer_id, reason)
        if not receive.writing:
            self._end(receive, reason)

    def _tell_drop(self, address: Address, transfer_id: str, reason: str) -> None:
        self._post(address, Forget(transfer_id, reason))

    def _end(self, receive: _Receive, error: str | None) -> None:
        """The fetch is over; the engine's thread reports it at its next step. Again, it changes nothing."""
        if receive.record.end_s is not None:
            return
        transfer_id = receive.fetch.prompt.transfer_id
        if self._receives.get(transfer_id) is receive:
            del self._receives[transfer_id]
        receive.record.end_s, receive.record.error = time.monotonic(), error
        if error is not None:
            logger.warning("KV transfer %s failed: %s", transfer_id, error)
        self._ended.append(receive)
        self._changed.notify_all()

    def _post(self, address: Address, message: Message) -> None:
        """Send now if the connection stands, else when it does; a new peer gets a thread."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address)
            self._threads.start("kv-receive", self._run, peer)
        if peer.link is None:
            peer.unsent.append(message)
            return
        try:
            # These few bytes wait only when the other side has read nothing for a long time.
            peer.link.channel.send_now(message)
        except ChannelClosedError as error:
            self._lose(peer, str(error))

    def _lose(self, peer: _Peer, reason: str) -> None:
        """A peer is gone: its fetches end, and the next one makes a connection of its own."""
        if peer.link is not None:
            peer.link.close()
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
            for receive in [r for r in self._receives.values() if r.address == peer.address]:
                receive.given_up = receive.given_up or reason
                if not receive.writing:
                    self._end(receive, receive.given_up)

    # A peer's thread

    def _run(self, peer: _Peer) -> None:
        """Connect, prove, ask, receive; until the connection ends."""
        channel: Channel | None = None
        try:
            channel = dial(*peer.address, timeout_s=self._timeout_s)
            offer_handshake(channel, self._secret, self._identity)
            channel.set_timeout(self._timeout_s)
            link = self._open_link(channel, False)
            self._send_unsent(peer, link)
            logger.info("prefill worker %s is connected", channel.peer)
            while True:
                self._handle(link, msgspec.convert(channel.receive(), Blocks | Failed | Waiting))
        except (ChannelClosedError, msgspec.ValidationError) as error:
            reason = str(error)
        except Exception as error:
            logger.exception("receiving KV from %s failed", peer.address)
            reason = f"{type(error).__name__}: {error}"
        if channel is not None:
            channel.close()
        with self._changed:
            self._lose(peer, reason)

    def _send_unsent(self, peer: _Peer, link: Link) -> None:
        """What waited for the connection, in order; from then on the engine's thread sends by itself."""
        while True:
            with self._changed:
                unsent, peer.unsent = peer.unsent, []
                if not unsent:
                    peer.link = link
                    if self._closed:
                        link.close()
                    return
            for message in unsent:
                link.channel.send(message)

    def _handle(self, link: Link, message: Blocks | Failed | Waiting) -> None:
        if isinstance(message, Blocks):
            self._receive_blocks(link, message)
            return
        with self._changed:
            receive = self._receives.get(message.transfer_id)
            if receive is None:
                return
            receive.alive_s = time.monotonic()
            if isinstance(message, Failed):
                self._end(receive, message.reason)

    def _receive_blocks(self, link: Link, message: Blocks) -> None:
        """Take the bytes off the wire in any case; write them only if the fetch still wants them."""
        if not 0 < message.count <= self._piece_blocks or message.bytes != message.count * self._block_bytes:
            raise ChannelClosedError(f"a piece of {message.count} blocks and {message.bytes} bytes, which fits nothing")
        begun_s = time.monotonic()
        seconds = link.receive(message.bytes)
        with self._changed:
            receive = self._receives.get(message.transfer_id)
            if receive is None or receive.given_up is not None:
                return
            at = message.start - receive.fetch.start_block
            if at != receive.got or at + message.count > len(receive.fetch.blocks):
                raise ChannelClosedError(f"blocks {message.start}+{message.count} came out of order")
            receive.writing, receive.alive_s = True, time.monotonic()
        try:
            link.unpack(message.bytes, receive.fetch.blocks[at : at + message.count], receive.event)
        except BaseException as error:
            with self._changed:
                receive.writing = False
                receive.given_up = receive.given_up or f"{type(error).__name__}: {error}"
                self._end(receive, receive.given_up)
            raise
        with self._changed:
            receive.writing, receive.alive_s = False, time.monotonic()
            receive.got += message.count
            receive.record.moved(message.bytes, message.count, begun_s, seconds)
            if receive.given_up is not None:
                self._end(receive, receive.given_up)
            elif receive.got == len(receive.fetch.blocks):
                self._end(receive, None)
