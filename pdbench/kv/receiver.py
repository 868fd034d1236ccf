"""Decode's half of the worker: asks prefill for blocks and puts what comes into vLLM's own, while other requests go on.

Every fetch ends exactly once, well or with an error, within `timeout_s` of its prefill's last sign of life; vLLM is told then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.channel import (
    Blocks,
    Cancel,
    Channel,
    ChannelClosedError,
    FetchRequest,
    Waiting,
    WorkerContext,
    connect,
)
from pdbench.kv.ranks import Share
from pdbench.kv.scheduler import Fetch, StepPlan, Transfer
from pdbench.kv.transports import Link, open_link

logger = logging.getLogger(f"vllm.{__name__}")

Address = tuple[str, int]


@dataclass(eq=False)
class _Part:
    """What one prefill worker sends of a fetch; `alive_s` is its last sign of life."""

    record: TransferEvent
    alive_s: float
    writing: bool = False


@dataclass(eq=False)
class _Receive:
    """A fetch under way; `event` is of the forward passes that may still use its blocks.

    `parts` are by prefill worker, none until prefill has said how many ranks it has.
    """

    fetch: Fetch
    event: Any
    asked_s: float
    parts: dict[Address, _Part] = field(default_factory=dict)
    records: list[TransferEvent] = field(default_factory=list)
    given_up: str | None = None

    @property
    def transfer_id(self) -> str:
        return self.fetch.transfer.transfer_id

    def record(self, address: Address, tokens: int = 0) -> TransferEvent:
        """One more, of what comes from `address`."""
        record = TransferEvent(side="receive", transfer_id=self.transfer_id, peer=_name(address), asked_s=self.asked_s)
        record.tokens, record.direction = tokens, self.fetch.transfer.direction
        self.records.append(record)
        return record


@dataclass(eq=False)
class _Instance:
    """A prefill instance: what its workers send to this one, known once its first rank has answered; `unplaced` waits for that."""

    shares: dict[Address, Share] | None = None
    unplaced: list[_Receive | Cancel] = field(default_factory=list)


@dataclass(eq=False)
class _Peer:
    """A prefill worker: messages wait in `unsent` until it is connected."""

    address: Address
    share: Share
    link: Link | None = None
    unsent: list[msgspec.Struct] = field(default_factory=list)


class Receiver:
    """All fetches of one worker. Public methods are called by the engine's thread and never wait for the network.

    `may_report(request id)`, called with the lock when a fetch has ended: is nothing else done with the request's blocks?
    """

    def __init__(self, context: WorkerContext, may_report: Callable[[str], bool] = lambda request_id: True) -> None:
        self._may_report = may_report
        self._context, self._changed, self._timeout_s = context, context.changed, context.timeout_s
        self._receives: dict[str, _Receive] = {}
        self._instances: dict[Address, _Instance] = {}  # by the address of its first rank
        self._peers: dict[Address, _Peer] = {}
        self._ended: list[_Receive] = []
        self._closed = False

    # The engine's thread

    def step(self, plan: StepPlan, event: Any) -> None:
        """Start and cancel fetches; `event` marks the forward passes after which their blocks may be written."""
        now_s = time.monotonic()
        with self._changed:
            for fetch in plan.fetches:
                receive = _Receive(fetch, event, now_s)
                if receive.transfer_id in self._receives:
                    self._give_up(
                        receive, "another request of this instance already receives this transfer id", tell=False
                    )
                    continue
                self._receives[receive.transfer_id] = receive
                self._place(self._instance(fetch.transfer), receive)
            for transfer, reason in plan.cancelled:
                ours = self._receives.get(transfer.transfer_id)
                if ours is not None and ours.fetch.transfer.request_id == transfer.request_id:
                    self._give_up(ours, reason)
                elif ours is None and transfer.host:
                    self._place(self._instance(transfer), Cancel(transfer.transfer_id, reason))

    def take_reports(self, failures: bool = True) -> tuple[set[str], dict[str, list[int]]]:
        """Requests whose fetches ended since the last call, and the blocks of those that failed. The caller holds the lock.

        Without `failures`, failed fetches wait for a later call.
        """
        ended = [receive for receive in self._ended if failures or receive.given_up is None]
        ended = [receive for receive in ended if self._may_report(receive.fetch.transfer.request_id)]
        self._ended = [receive for receive in self._ended if receive not in ended]
        received, failed = set(), {}
        for receive in ended:
            for record in receive.records:
                record.reported_s = time.monotonic()
                self._context.finish(record)
            request_id = receive.fetch.transfer.request_id
            received.add(request_id)
            if receive.given_up is not None:
                failed[request_id] = receive.fetch.blocks
        return received, failed

    def tick(self) -> None:
        """Called regularly, from any thread: give up the fetches whose prefill shows no sign of life."""
        now_s = time.monotonic()
        with self._changed:
            for receive in list(self._receives.values()):
                alive_s = {_name(at): part.alive_s for at, part in receive.parts.items() if part.record.end_s is None}
                alive_s = alive_s or {_name(_first(receive)): receive.asked_s}
                peer = min(alive_s, key=alive_s.__getitem__)
                if now_s - alive_s[peer] > self._timeout_s:
                    self._give_up(receive, f"no sign of the transfer from {peer} in {self._timeout_s:g} s")

    def close(self) -> None:
        """Disconnect all peers."""
        with self._changed:
            self._closed = True
            links = [peer.link for peer in self._peers.values() if peer.link is not None]
        for link in links:
            link.close()

    # Fetches; the caller holds the lock

    def _instance(self, transfer: Transfer) -> _Instance:
        """The prefill instance of a transfer; one that is not known is asked how many ranks it has."""
        address = (transfer.host, transfer.port)
        instance = self._instances.get(address)
        if instance is None:
            instance = self._instances[address] = _Instance()
            self._context.start_thread("kv-receive", self._meet, address, instance)
        return instance

    def _place(self, instance: _Instance, item: _Receive | Cancel) -> None:
        """Ask all workers of a prefill instance that send to this one for a fetch, or tell them that it is not needed."""
        if instance.shares is None:
            instance.unplaced.append(item)
            return
        if isinstance(item, Cancel):
            for address, share in instance.shares.items():
                self._post(address, item, share)
            return
        transfer, start = item.fetch.transfer, item.fetch.start_block
        if item.given_up is not None:
            return
        for address in instance.shares:
            item.parts[address] = _Part(item.record(address, item.fetch.tokens), item.asked_s)
        returns_at = self._context.returns_at if start else None
        more = (transfer.tokens, transfer.fingerprint, start, self._context.piece_blocks, returns_at)
        for address, share in instance.shares.items():
            self._post(address, FetchRequest(item.transfer_id, *more), share)

    def _give_up(self, receive: _Receive, reason: str, gone: Address | None = None, tell: bool = True) -> None:
        """Stop a fetch; prefill's workers are told, but for the one at `gone`. A part that is being written right now ends after that."""
        if receive.given_up is not None or self._is_over(receive):
            return
        receive.given_up = reason
        logger.warning("KV transfer failed: %s (%s): %s", receive.transfer_id, receive.fetch.transfer.direction, reason)
        cancel = Cancel(receive.transfer_id, reason)
        if not receive.parts:
            record = receive.record(_first(receive))
            record.end_s, record.error = time.monotonic(), reason
            if tell and (instance := self._instances.get(_first(receive))) is not None:
                self._place(instance, cancel)
            self._end_if_over(receive)
        for address, part in receive.parts.items():
            if part.record.end_s is None:
                if address != gone:
                    self._post(address, cancel)
                if not part.writing:
                    self._end(receive, part)

    def _end(self, receive: _Receive, part: _Part) -> None:
        """A part is over, well or because the fetch was given up."""
        if part.record.end_s is None:
            part.record.end_s, part.record.error = time.monotonic(), receive.given_up
            self._end_if_over(receive)

    def _is_over(self, receive: _Receive) -> bool:
        return bool(receive.records) and all(record.end_s is not None for record in receive.records)

    def _end_if_over(self, receive: _Receive) -> None:
        """With its last part a fetch is over; the engine's thread reports it at its next step."""
        if self._is_over(receive):
            if self._receives.get(receive.transfer_id) is receive:
                del self._receives[receive.transfer_id]
            self._ended.append(receive)
            self._changed.notify_all()

    def _post(self, address: Address, message: msgspec.Struct, share: Share | None = None) -> None:
        """Send now if the peer is connected, else when it is; a new peer gets a thread, or without a `share` no message."""
        peer = self._peers.get(address)
        if peer is None:
            if share is None:
                return
            peer = self._peers[address] = _Peer(address, share)
            self._context.start_thread("kv-receive", self._run, peer, None)
        if peer.link is None:
            peer.unsent.append(message)
            return
        try:
            # These few bytes wait only when the other side has read nothing for a long time.
            peer.link.channel.send(message, wait=False)
        except ChannelClosedError as error:
            self._lose(peer, str(error))

    def _lose(self, peer: _Peer, reason: str) -> None:
        """A peer is gone: its fetches end, and the next one asks its instance again."""
        if peer.link is not None:
            peer.link.close()
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
            for first, instance in list(self._instances.items()):
                if peer.address in (instance.shares or ()):
                    # Ranks live and die together; what comes back may have others.
                    self._instances.pop(first, None)
                    for address in instance.shares or ():
                        if (other := self._peers.get(address)) is not None:
                            self._lose(other, reason)
            for receive in list(self._receives.values()):
                part = receive.parts.get(peer.address)
                if part is not None and part.record.end_s is None:
                    self._give_up(receive, reason, gone=peer.address)

    # A peer's thread

    def _meet(self, address: Address, instance: _Instance) -> None:
        """Learn from an instance's first rank what its workers send to this one; if it is among them, its connection is kept."""
        try:
            channel, shares = connect(address, 0, self._context)
        except ChannelClosedError as error:
            reason = str(error)
        except Exception as error:
            logger.exception("asking prefill %s for its ranks failed", address)
            reason = f"{type(error).__name__}: {error}"
        else:
            host, port = address
            with self._changed:
                instance.shares = {(host, port + share.rank): share for share in shares}
                unplaced, instance.unplaced = instance.unplaced, []
                peer = None
                if address in instance.shares and address not in self._peers:
                    peer = self._peers[address] = _Peer(address, instance.shares[address])
                for item in unplaced:
                    self._place(instance, item)
            if peer is None:
                channel.close()
            else:
                self._run(peer, channel)
            return
        with self._changed:
            del self._instances[address]
            for item in instance.unplaced:
                if isinstance(item, _Receive):
                    self._give_up(item, reason, tell=False)

    def _run(self, peer: _Peer, channel: Channel | None) -> None:
        """Connect, shake hands, send what waits, receive; until the connection ends."""
        try:
            if channel is None:
                channel, shares = connect(peer.address, peer.share.rank, self._context)
                if peer.share not in shares:
                    raise channel.failed("prefill's tensor parallelism is not what it was")
            if not peer.share.drafts and self._context.identity.drafts:
                logger.warning(
                    "prefill worker %s does not run this instance's draft model, whose KV cache of prompts stays empty: fewer drafts are "
                    "accepted; give both the same --speculative-config",
                    channel.peer,
                )
            link = open_link(self._context, channel, peer.share, sends=False)
            self._send_unsent(peer, link)
            logger.info("prefill worker %s is connected", channel.peer)
            while True:
                message = channel.receive(Blocks | Cancel | Waiting)
                if isinstance(message, Blocks):
                    self._receive_blocks(peer.address, link, message)
                    continue
                with self._changed:
                    receive, part = self._part(message.transfer_id, peer.address)
                    if receive is not None and part is not None:
                        part.alive_s = time.monotonic()
                        if isinstance(message, Cancel):
                            self._give_up(receive, message.reason, gone=peer.address)
        except ChannelClosedError as error:
            reason = str(error)
        except Exception as error:
            logger.exception("receiving KV from %s failed", peer.address)
            reason = f"{type(error).__name__}: {error}"
        if channel is not None:
            channel.close()
        with self._changed:
            self._lose(peer, reason)

    def _send_unsent(self, peer: _Peer, link: Link) -> None:
        """Send what waited for the connection, in order; afterwards the engine's thread sends directly."""
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

    def _part(self, transfer_id: str, address: Address) -> tuple[_Receive | None, _Part | None]:
        """The fetch that a prefill worker means, and its part of it; the caller holds the lock."""
        receive = self._receives.get(transfer_id)
        part = receive.parts.get(address) if receive is not None else None
        return receive, part if part is not None and part.record.end_s is None else None

    def _receive_blocks(self, address: Address, link: Link, message: Blocks) -> None:
        """Take the bytes off the wire in any case; write them only if the fetch still wants them."""
        size = message.count * link.block_bytes
        if not 0 < message.count <= self._context.piece_blocks or message.bytes != size:
            raise ChannelClosedError(f"a piece of {message.count} blocks and {message.bytes} bytes, which fits nothing")
        begun_s = time.monotonic()
        seconds = link.receive(message.bytes)
        with self._changed:
            receive, part = self._part(message.transfer_id, address)
            if receive is None or part is None or receive.given_up is not None:
                return
            start = message.start - receive.fetch.start_block
            if start != part.record.blocks or start + message.count > len(receive.fetch.blocks):
                raise ChannelClosedError(f"blocks {message.start}+{message.count} came out of order")
            part.writing, part.alive_s = True, time.monotonic()
        try:
            link.unpack(message.bytes, receive.fetch.blocks[start : start + message.count], receive.event)
        except BaseException as error:
            with self._changed:
                part.writing = False
                self._give_up(receive, f"{type(error).__name__}: {error}", gone=address)
                self._end(receive, part)
            raise
        with self._changed:
            part.writing, part.alive_s = False, time.monotonic()
            part.record.moved(message.bytes, message.count, begun_s, seconds)
            if receive.given_up is not None or part.record.blocks == len(receive.fetch.blocks):
                self._end(receive, part)


def _first(receive: _Receive) -> Address:
    """Where the first rank of its prefill instance listens."""
    return receive.fetch.transfer.host, receive.fetch.transfer.port


def _name(address: Address) -> str:
    host, port = address
    return f"{host}:{port}"
