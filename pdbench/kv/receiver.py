"""Decode's half of the worker: asks prefill for blocks and puts what comes into vLLM's own, while other requests go on.

Every fetch ends exactly once, well or with an error, within `timeout_s` of its prefill's last sign of life; vLLM is told then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.channel import (
    Address,
    Blocks,
    Cancel,
    Channel,
    ChannelClosedError,
    FetchRequest,
    Waiting,
    WorkerContext,
    connect,
    why_ended,
)
from pdbench.kv.ranks import Share
from pdbench.kv.scheduler import Fetch, StepPlan
from pdbench.kv.transports import Link, open_link

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(eq=False)
class _Part:
    """What one prefill worker sends of a fetch; `alive_s` is its last sign of life."""

    record: TransferEvent
    alive_s: float
    writing: bool = False

    @property
    def is_over(self) -> bool:
        return self.record.end_s is not None


@dataclass(eq=False)
class _Receive:
    """A fetch under way; `event` is of the forward passes that may still use its blocks.

    `parts` are by prefill worker, none until prefill has said how many ranks it has.
    """

    fetch: Fetch
    request: FetchRequest
    event: Any
    asked_s: float
    parts: dict[Address, _Part] = field(default_factory=dict)
    given_up: str | None = None

    def __post_init__(self) -> None:
        self.transfer_id = self.fetch.transfer.transfer_id
        self.instance = self.fetch.transfer.host, self.fetch.transfer.port

    def add_part(self, address: Address, tokens: int) -> _Part:
        record = TransferEvent(side="receive", transfer_id=self.transfer_id, peer="{}:{}".format(*address))
        record.direction, record.asked_s, record.tokens = self.fetch.transfer.direction, self.asked_s, tokens
        part = self.parts[address] = _Part(record, self.asked_s)
        return part

    @property
    def is_over(self) -> bool:
        return bool(self.parts) and all(part.is_over for part in self.parts.values())


@dataclass(eq=False)
class _Peer:
    """A prefill worker. `connection` is what ends it; messages wait in `unsent` until they can go to `channel` directly."""

    share: Share
    unsent: list[msgspec.Struct] = field(default_factory=list)
    connection: Channel | Link | None = None
    channel: Channel | None = None


@dataclass(eq=False)
class _Instance:
    """A prefill instance, by the address of its first rank. Its workers that send to this one are `peers`, by address, None until that
    rank has said which these are; `unplaced` waits for that. Ranks live and die together; what comes back may have others."""

    address: Address
    peers: dict[Address, _Peer] | None = None
    unplaced: list[_Receive | Cancel] = field(default_factory=list)

    def disconnect(self) -> None:
        for peer in (self.peers or {}).values():
            if peer.connection is not None:
                peer.connection.close()


class Receiver:
    """All fetches of one worker. Public methods are called by the engine's thread and never wait for the network.

    `may_report(request id)`, called with the lock when a fetch has ended: is nothing else done with the request's blocks?
    """

    def __init__(self, context: WorkerContext, may_report: Callable[[str], bool]) -> None:
        self._may_report = may_report
        self._context, self._changed, self._timeout_s = context, context.changed, context.timeout_s
        self._receives: dict[str, _Receive] = {}
        self._instances: dict[Address, _Instance] = {}
        self._ended: list[_Receive] = []
        self._closed = False

    # The engine's thread

    def step(self, plan: StepPlan, event: Any) -> None:
        """Start and cancel fetches; `event` marks the forward passes after which their blocks may be written."""
        now_s = time.monotonic()
        with self._changed:
            for fetch in plan.fetches:
                transfer, start = fetch.transfer, fetch.start_block
                returns_at = self._context.returns_at if start else None
                more = (transfer.tokens, transfer.fingerprint, start, self._context.piece_blocks, returns_at)
                receive = _Receive(fetch, FetchRequest(transfer.transfer_id, *more), event, now_s)
                if receive.transfer_id in self._receives:
                    self._give_up(receive, "another request of this instance already receives this transfer id")
                    continue
                self._receives[receive.transfer_id] = receive
                self._place(receive.instance, receive)
            for transfer, reason in plan.cancelled:
                ours = self._receives.get(transfer.transfer_id)
                if ours is not None and ours.fetch.transfer.request_id == transfer.request_id:
                    self._cancel(ours, reason)
                elif ours is None and transfer.host:
                    self._place((transfer.host, transfer.port), Cancel(transfer.transfer_id, reason))

    def take_reports(self, failures: bool = True, successes: bool = True) -> tuple[set[str], dict[str, list[int]]]:
        """Requests whose fetches ended since the last call, and the blocks of those that failed. The caller holds the lock.

        Without `failures`, failed fetches wait for a later call, without `successes` the others.
        """
        received, failed, later = set(), {}, []
        for receive in self._ended:
            request_id = receive.fetch.transfer.request_id
            is_wanted = successes if receive.given_up is None else failures
            if not is_wanted or not self._may_report(request_id):
                later.append(receive)
                continue
            for part in receive.parts.values():
                part.record.reported_s = time.monotonic()
                self._context.finish(part.record)
            received.add(request_id)
            if receive.given_up is not None:
                failed[request_id] = receive.fetch.blocks
        self._ended = later
        return received, failed

    @property
    def is_waiting(self) -> bool:
        """Is a fetch under way? The caller holds the lock."""
        return bool(self._receives)

    def tick(self) -> None:
        """Called regularly, from any thread: give up the fetches whose prefill shows no sign of life."""
        now_s = time.monotonic()
        with self._changed:
            for receive in list(self._receives.values()):
                alive_s = {address: part.alive_s for address, part in receive.parts.items() if not part.is_over}
                address, last_s = min(
                    alive_s.items(), key=lambda item: item[1], default=(receive.instance, receive.asked_s)
                )
                if now_s - last_s > self._timeout_s:
                    peer = "{}:{}".format(*address)
                    self._cancel(receive, f"no sign of the transfer from {peer} in {self._timeout_s:g} s")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for instance in self._instances.values():
                instance.disconnect()

    # Fetches; the caller holds the lock

    def _place(self, address: Address, item: _Receive | Cancel) -> None:
        """Ask all workers of a prefill instance that send to this one for a fetch, or tell them that it is not needed.

        An instance that is not known is first asked how many ranks it has.
        """
        instance = self._instances.get(address)
        if instance is None:
            instance = self._instances[address] = _Instance(address)
            try:
                self._context.start_thread("kv-receive", self._until_lost, instance, self._meet)
            except RuntimeError as error:  # no more threads on this machine
                self._lose(instance, str(error))
                return
        if instance.peers is None:
            instance.unplaced.append(item)
            return
        if isinstance(item, _Receive):
            if item.given_up is not None:
                return
            for address in instance.peers:
                item.add_part(address, item.fetch.tokens)
        for peer in instance.peers.values():
            self._post(instance, peer, item.request if isinstance(item, _Receive) else item)

    def _cancel(self, receive: _Receive, reason: str, by: Address | None = None) -> None:
        """Give a fetch up, and tell prefill's workers that still send, but for the one at `by`."""
        if receive.given_up is not None:
            return
        message, instance = Cancel(receive.transfer_id, reason), self._instances[receive.instance]
        sending = [address for address, part in receive.parts.items() if not part.is_over and address != by]
        self._give_up(receive, reason)
        if instance.peers is None:
            instance.unplaced.append(message)
        else:
            for address in sending:
                self._post(instance, instance.peers[address], message)

    def _give_up(self, receive: _Receive, reason: str) -> None:
        """Stop a fetch. A part that is being written right now ends after that."""
        if receive.given_up is not None or receive.is_over:
            return
        receive.given_up = reason
        logger.warning("KV transfer failed: %s (%s): %s", receive.transfer_id, receive.fetch.transfer.direction, reason)
        if not receive.parts:
            receive.add_part(receive.instance, 0)
        for part in receive.parts.values():
            if not part.writing:
                self._end(receive, part)

    def _end(self, receive: _Receive, part: _Part) -> None:
        """A part is over, well or because the fetch was given up; the engine's thread reports the fetch once all are, at its next step."""
        if part.is_over:
            return
        part.record.end_s, part.record.error = time.monotonic(), receive.given_up
        if receive.is_over:
            if self._receives.get(receive.transfer_id) is receive:
                del self._receives[receive.transfer_id]
            self._ended.append(receive)
            self._changed.notify_all()

    def _post(self, instance: _Instance, peer: _Peer, message: msgspec.Struct) -> None:
        """Send now if the peer is connected, else when it is."""
        if peer.channel is None:
            peer.unsent.append(message)
            return
        try:
            # These few bytes wait only when the other side has read nothing for a long time.
            peer.channel.send(message, wait=False)
        except ChannelClosedError as error:
            self._lose(instance, str(error))

    def _lose(self, instance: _Instance, reason: str) -> None:
        """A peer is gone, and its instance with it: the instance's fetches end, and the next one asks it again."""
        if self._instances.get(instance.address) is not instance:
            return
        del self._instances[instance.address]
        instance.disconnect()
        for receive in list(self._receives.values()):
            if receive.instance == instance.address:
                self._give_up(receive, reason)

    # A peer's thread

    def _until_lost(self, instance: _Instance, target: Callable[..., None], *arguments: Any) -> None:
        try:
            target(instance, *arguments)
        except Exception as error:
            reason = why_ended(error, instance.address)
            with self._changed:
                self._lose(instance, reason)

    def _meet(self, instance: _Instance) -> None:
        """Learn from an instance's first rank which of its workers send to this one; if it is among them, its connection is kept."""
        channel, shares = connect(instance.address, 0, self._context)
        host, port = instance.address
        with closing(channel):
            with self._changed:
                peers = instance.peers = {(host, port + share.rank): _Peer(share) for share in shares}
                for item in instance.unplaced:
                    self._place(instance.address, item)
                instance.unplaced.clear()
            for address in peers.keys() - {instance.address}:
                self._context.start_thread("kv-receive", self._until_lost, instance, self._run, address)
            if instance.address in peers:
                self._run(instance, instance.address, channel)

    def _run(self, instance: _Instance, address: Address, channel: Channel | None = None) -> None:
        """Connect, shake hands, send what waits, receive; until the connection ends."""
        assert instance.peers is not None
        peer = instance.peers[address]
        if channel is None:
            channel, shares = connect(address, peer.share.rank, self._context)
            if peer.share not in shares:
                raise channel.failed("prefill's tensor parallelism is not what it was")
        if not peer.share.drafts and self._context.identity.drafts:
            logger.warning(
                "prefill worker %s does not run this instance's draft model, whose KV cache of prompts stays empty: fewer drafts are "
                "accepted; give both the same --speculative-config",
                channel.peer,
            )
        with closing(channel):
            self._hold(instance, peer, channel)
            with closing(open_link(self._context, channel, peer.share, sends=False)) as link:
                self._hold(instance, peer, link)
                self._send_unsent(peer, channel)
                logger.info("prefill worker %s is connected", channel.peer)
                while True:
                    message = channel.receive(Blocks | Cancel | Waiting, idle=True)
                    if isinstance(message, Blocks):
                        self._receive_blocks(address, link, message)
                        continue
                    with self._changed:
                        if (wanted := self._wanted(message.transfer_id, address)) is not None:
                            receive, part = wanted
                            part.alive_s = time.monotonic()
                            if isinstance(message, Cancel):
                                self._cancel(receive, message.reason, by=address)

    def _hold(self, instance: _Instance, peer: _Peer, connection: Channel | Link) -> None:
        """The connection ends when the instance is lost or this worker closes, which may have happened meanwhile."""
        with self._changed:
            peer.connection = connection
            if self._closed or self._instances.get(instance.address) is not instance:
                connection.close()

    def _send_unsent(self, peer: _Peer, channel: Channel) -> None:
        """Send what waited for the connection, in order; afterwards the engine's thread sends directly."""
        while True:
            with self._changed:
                unsent, peer.unsent = peer.unsent, []
                if not unsent:
                    peer.channel = channel
                    return
            for message in unsent:
                channel.send(message)

    def _wanted(self, transfer_id: str, address: Address) -> tuple[_Receive, _Part] | None:
        """The fetch that a prefill worker means, and its part of it, unless that is over; the caller holds the lock."""
        receive = self._receives.get(transfer_id)
        part = receive.parts.get(address) if receive is not None else None
        return None if receive is None or part is None or part.is_over else (receive, part)

    def _receive_blocks(self, address: Address, link: Link, message: Blocks) -> None:
        """Take the bytes off the wire in any case; write them only if the fetch still wants them."""
        size = message.count * link.block_bytes
        if not 0 < message.count <= self._context.piece_blocks or message.bytes != size:
            raise ChannelClosedError(f"a piece of {message.count} blocks and {message.bytes} bytes, which fits nothing")
        begun_s = time.monotonic()
        with self._changed:
            wanted = self._wanted(message.transfer_id, address)
            block_ids: list[int] = []
            if wanted is not None and wanted[0].given_up is None:
                receive, part = wanted
                blocks, start = receive.fetch.blocks, message.start - receive.fetch.start_block
                if start != part.record.blocks or start + message.count > len(blocks):
                    raise ChannelClosedError(f"blocks {message.start}+{message.count} came out of order")
                block_ids = blocks[start : start + message.count]
        seconds = link.receive(message.bytes, block_ids)
        with self._changed:
            if not block_ids or part.is_over or receive.given_up is not None:
                return
            part.writing, part.alive_s = True, time.monotonic()
        try:
            copy_s = link.unpack(message.bytes, receive.event)
        except BaseException as error:
            with self._changed:
                part.writing = False
                self._give_up(receive, f"{type(error).__name__}: {error}")
                self._end(receive, part)
            raise
        with self._changed:
            part.writing, part.alive_s = False, time.monotonic()
            part.record.moved(message.bytes, message.count, begun_s, seconds, copy_s)
            if receive.given_up is not None or part.record.blocks == len(blocks):
                self._end(receive, part)
