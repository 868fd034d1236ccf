"""Decode's half of the worker: asks prefill for blocks and puts what comes into vLLM's own, while other requests go on.

Every fetch ends exactly once, well or with an error, within `timeout_s` of its prefill's last sign of life; vLLM is told then.
"""

from __future__ import annotations

import logging
import time
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
from pdbench.kv.scheduler import Fetch, StepPlan, Transfer
from pdbench.kv.transports import Link, open_link

logger = logging.getLogger(f"vllm.{__name__}")

Address = tuple[str, int]


@dataclass(eq=False)
class _Receive:
    """A fetch under way; `alive_s` is prefill's last sign of life, `event` of the forward passes that may still use its blocks."""

    fetch: Fetch
    address: Address
    event: Any
    alive_s: float
    record: TransferEvent
    writing: bool = False
    given_up: str | None = None


@dataclass(eq=False)
class _Peer:
    """A prefill worker: messages wait in `unsent` until it is connected."""

    address: Address
    link: Link | None = None
    unsent: list[msgspec.Struct] = field(default_factory=list)


class Receiver:
    """All fetches of one decode worker. Public methods are called by the engine's thread and never wait for the network."""

    def __init__(self, context: WorkerContext) -> None:
        self._context, self._changed, self._timeout_s = context, context.changed, context.timeout_s
        self._receives: dict[str, _Receive] = {}
        self._peers: dict[Address, _Peer] = {}
        self._ended: list[_Receive] = []
        self._closed = False

    # The engine's thread

    def step(self, plan: StepPlan, event: Any) -> None:
        """Start and cancel fetches; `event` marks the forward passes after which their blocks may be written."""
        now_s = time.monotonic()
        with self._changed:
            for fetch in plan.fetches:
                transfer, (host, port) = fetch.transfer, self._address(fetch.transfer)
                tokens = transfer.tokens - fetch.start_block * self._context.identity.block_size
                name, peer = transfer.transfer_id, f"{host}:{port}"
                record = TransferEvent(side="receive", transfer_id=name, peer=peer, tokens=tokens, asked_s=now_s)
                receive = _Receive(fetch, (host, port), event, now_s, record)
                if name in self._receives:
                    self._end(receive, "another request of this instance already receives this transfer id")
                    continue
                self._receives[name] = receive
                more = (transfer.tokens, transfer.fingerprint, fetch.start_block, self._context.piece_blocks)
                self._post(receive.address, FetchRequest(name, *more))
            for transfer, reason in plan.cancelled:
                ours = self._receives.get(transfer.transfer_id)
                if ours is not None and ours.fetch.transfer.request_id == transfer.request_id:
                    self._give_up(ours, reason)
                elif ours is None and transfer.host:
                    self._post(self._address(transfer), Cancel(transfer.transfer_id, reason))

    def take_reports(self, failures: bool = True) -> tuple[set[str], dict[str, list[int]]]:
        """Requests whose fetches ended since the last call, and the blocks of those that failed. The caller holds the lock.

        Without `failures`, failed fetches wait for a later call.
        """
        ended = [receive for receive in self._ended if failures or receive.record.error is None]
        self._ended = [receive for receive in self._ended if receive not in ended]
        received, failed = set(), {}
        for receive in ended:
            receive.record.reported_s = time.monotonic()
            self._context.finish(receive.record)
            request_id = receive.fetch.transfer.request_id
            received.add(request_id)
            if receive.record.error is not None:
                failed[request_id] = receive.fetch.blocks
        return received, failed

    def tick(self) -> None:
        """Called regularly, from any thread: give up the fetches whose prefill shows no sign of life."""
        now_s = time.monotonic()
        with self._changed:
            for receive in list(self._receives.values()):
                if now_s - receive.alive_s > self._timeout_s:
                    reason = f"no sign of the transfer from prefill {receive.record.peer} in {self._timeout_s:g} s"
                    self._give_up(receive, reason)

    def close(self) -> None:
        """Disconnect all peers."""
        with self._changed:
            self._closed = True
            links = [peer.link for peer in self._peers.values() if peer.link is not None]
        for link in links:
            link.close()

    # Fetches; the caller holds the lock

    def _address(self, transfer: Transfer) -> Address:
        return transfer.host, transfer.port + self._context.identity.rank

    def _give_up(self, receive: _Receive, reason: str) -> None:
        """Stop a fetch from this side; one whose blocks are being written right now ends when that is done."""
        if receive.given_up is not None:
            return
        receive.given_up = reason
        self._post(receive.address, Cancel(receive.record.transfer_id, reason))
        if not receive.writing:
            self._end(receive, reason)

    def _end(self, receive: _Receive, error: str | None) -> None:
        """The fetch is over; the engine's thread reports it at its next step. A second call changes nothing."""
        if receive.record.end_s is not None:
            return
        transfer_id = receive.record.transfer_id
        if self._receives.get(transfer_id) is receive:
            del self._receives[transfer_id]
        receive.record.end_s, receive.record.error = time.monotonic(), error
        if error is not None:
            logger.warning("KV transfer failed: %s: %s", transfer_id, error)
        self._ended.append(receive)
        self._changed.notify_all()

    def _post(self, address: Address, message: msgspec.Struct) -> None:
        """Send now if the peer is connected, else when it is; a new peer gets a thread."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address)
            self._context.start_thread("kv-receive", self._run, peer)
        if peer.link is None:
            peer.unsent.append(message)
            return
        try:
            # These few bytes wait only when the other side has read nothing for a long time.
            peer.link.channel.send(message, wait=False)
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
        """Connect, shake hands, send what waits, receive; until the connection ends."""
        channel: Channel | None = None
        try:
            channel = connect(*peer.address, self._context.secret, self._context.identity, self._timeout_s)
            link = open_link(self._context, channel, sends=False)
            self._send_unsent(peer, link)
            logger.info("prefill worker %s is connected", channel.peer)
            while True:
                message = channel.receive(Blocks | Cancel | Waiting)
                if isinstance(message, Blocks):
                    self._receive_blocks(link, message)
                    continue
                with self._changed:
                    if (receive := self._receives.get(message.transfer_id)) is not None:
                        receive.alive_s = time.monotonic()
                        if isinstance(message, Cancel):
                            self._end(receive, message.reason)
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

    def _receive_blocks(self, link: Link, message: Blocks) -> None:
        """Take the bytes off the wire in any case; write them only if the fetch still wants them."""
        size = message.count * self._context.packer.block_bytes
        if not 0 < message.count <= self._context.piece_blocks or message.bytes != size:
            raise ChannelClosedError(f"a piece of {message.count} blocks and {message.bytes} bytes, which fits nothing")
        begun_s = time.monotonic()
        seconds = link.receive(message.bytes)
        with self._changed:
            receive = self._receives.get(message.transfer_id)
            if receive is None or receive.given_up is not None:
                return
            start = message.start - receive.fetch.start_block
            if start != receive.record.blocks or start + message.count > len(receive.fetch.blocks):
                raise ChannelClosedError(f"blocks {message.start}+{message.count} came out of order")
            receive.writing, receive.alive_s = True, time.monotonic()
        try:
            link.unpack(message.bytes, receive.fetch.blocks[start : start + message.count], receive.event)
        except BaseException as error:
            with self._changed:
                receive.writing = False
                receive.given_up = receive.given_up or f"{type(error).__name__}: {error}"
                self._end(receive, receive.given_up)
            raise
        with self._changed:
            receive.writing, receive.alive_s = False, time.monotonic()
            receive.record.moved(message.bytes, message.count, begun_s, seconds)
            if receive.given_up is not None:
                self._end(receive, receive.given_up)
            elif receive.record.blocks == len(receive.fetch.blocks):
                self._end(receive, None)
