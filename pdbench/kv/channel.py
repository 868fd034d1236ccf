"""The connection between a prefill and a decode worker: messages, framing, handshake, and prefill's listening socket.

Before anything else both sides prove that they know the deployment's secret and compare what must be equal. After that the connection
is plain TCP. docs/kv-protocol.md has the protocol.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from pdbench.events import TransferEvent
from pdbench.kv.blocks import BlockPacker
from pdbench.kv.ranks import Identity, Share, matching_shares

logger = logging.getLogger(f"vllm.{__name__}")

PROTOCOL = "pdbench-kv/4"
MESSAGE_LIMIT_BYTES = 1 << 16
READ_BYTES = 4096
HANDSHAKE_TIMEOUT_S = 5.0
# Connections that have not proved the secret yet; further ones are closed at once.
UNAUTHENTICATED_LIMIT = 32
_LENGTH = struct.Struct("!I")

Address = tuple[str, int]


class ChannelClosedError(ConnectionError):
    """The other side is gone, stalled, does not speak the protocol or was refused; the message says which."""


def why_ended(error: Exception, peer: object) -> str:
    """Why a connection's thread ended, in one line; what nobody expected is logged with its traceback."""
    if isinstance(error, ChannelClosedError):
        return str(error)
    logger.exception("the KV connection to %s failed", peer)
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class WorkerContext:
    """What all parts of one worker share. `staging_bytes` of buffer per peer; `changed` is the lock of all transfers' states.

    `start_thread(name, target, *arguments)` starts a thread that the worker waits for when it closes. `returns_at`: where prefill gets
    blocks that decode has.
    """

    secret: bytes
    identity: Identity
    packer: BlockPacker
    staging_bytes: int
    timeout_s: float
    changed: threading.Condition
    finish: Callable[[TransferEvent], None]
    start_thread: Callable[..., threading.Thread]
    returns_at: Address | None = None

    @property
    def piece_blocks(self) -> int:
        return self.staging_bytes // self.packer.block_bytes


class FetchRequest(msgspec.Struct, frozen=True, tag="request", tag_field="type"):
    """Decode asks for a transfer's blocks from the `start_block`-th on (groups.py has their order), at most `piece_blocks` at once.

    Those before it, which it has, may be fetched at `returns_at`.
    """

    transfer_id: str
    tokens: int
    fingerprint: str
    start_block: int
    piece_blocks: int
    returns_at: Address | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="type"):
    """Decode does not need a transfer any more, or prefill will not send it."""

    transfer_id: str
    reason: str


class Blocks(msgspec.Struct, frozen=True, tag="blocks", tag_field="type"):
    """The next `count` blocks of a transfer, from the `start`-th on; `bytes` follow on the transport."""

    transfer_id: str
    start: int
    count: int
    bytes: int


class Waiting(msgspec.Struct, frozen=True, tag="waiting", tag_field="type"):
    """A sign of life: prefill knows the transfer and still computes it, or has it queued."""

    transfer_id: str


class Channel:
    """One connected socket. One thread may receive while others send; a read or write that stalls for `timeout_s` closes it."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        # The last thread that uses the descriptor closes it. Closed earlier, its number could go to another peer's connection
        # while a thread is about to read or write.
        self._users = 0
        self._closed = False
        self._send_lock = threading.Lock()
        self._buffer, self._unread = memoryview(bytearray(READ_BYTES)), bytearray()
        self.set_timeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        try:
            self.peer = "{}:{}".format(*connection.getpeername()[:2])
        except OSError:  # it left already
            self.peer = "unknown"

    def send(
        self, message: msgspec.Struct | dict[str, Any], payload: memoryview | None = None, wait: bool = True
    ) -> None:
        """Send a message, and its payload's bytes right behind it. Raises ChannelClosedError.

        Without `wait`, that is when the socket does not take all of a short message at once.
        """
        data = msgspec.json.encode(message)
        data = _LENGTH.pack(len(data)) + data
        try:
            with self._send_lock, self._using():
                if wait:
                    self._socket.sendall(data)
                    if payload is not None:
                        self._socket.sendall(payload)
                    return
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if (self._socket.send(data) if poll.poll(0) else 0) < len(data):
                    raise TimeoutError
        except OSError as error:
            raise self.failed(error, "took no data") from error

    def receive(self, kind: Any = dict[str, Any], idle: bool = False) -> Any:
        """The next message, of a type in `kind`; with `idle` it may take any time to begin. Raises ChannelClosedError."""
        (size,) = _LENGTH.unpack(self._take(_LENGTH.size, idle))
        if size > MESSAGE_LIMIT_BYTES:
            raise self.failed(f"a message of {size} bytes, which is not {PROTOCOL}")
        body = self._take(size)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.failed(f"not a message of {PROTOCOL} ({error})") from error

    def receive_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with what follows a message. Raises ChannelClosedError."""
        filled = min(len(buffer), len(self._unread))
        buffer[:filled] = self._take(filled)
        while filled < len(buffer):
            filled += self._read(buffer[filled:])

    def _take(self, count: int, idle: bool = False) -> bytes:
        """The next `count` bytes. A message is mostly read whole: each read may have to wait for the interpreter's lock."""
        while len(self._unread) < count:
            read = self._read(self._buffer, idle and not self._unread)
            self._unread += self._buffer[:read]
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken

    def _read(self, buffer: memoryview, idle: bool = False) -> int:
        """Read what has come into the front of `buffer`, one byte or more; returns how many."""
        while True:
            try:
                with self._using():
                    count = self._socket.recv_into(buffer)
            except OSError as error:
                if isinstance(error, TimeoutError) and idle:
                    continue
                raise self.failed(error, "sent no data") from error
            if count == 0:
                raise self.failed("the connection was closed by the other side")
            return count

    def set_timeout(self, timeout_s: float) -> None:
        """How long a read or write may stall from now on, and for how long a host may not answer at all (tcp(7)).

        Raises ChannelClosedError when another thread has closed it.
        """
        self.timeout_s = timeout_s
        try:
            with self._using():
                self._socket.settimeout(timeout_s)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(timeout_s / 2)))
        except OSError as error:
            raise ChannelClosedError(f"the connection was closed ({error})") from error

    def close(self) -> None:
        """Close it; threads that wait in `receive` or `send` get ChannelClosedError."""
        with self._lock:
            self._closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if not self._users:
                self._socket.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """While inside, the descriptor remains this connection's. Raises OSError once it is closed."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "closed here")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._socket.close()

    def failed(self, error: OSError | str, stalled: str = "") -> ChannelClosedError:
        """Close the connection; returns the error to raise."""
        self.close()
        if isinstance(error, TimeoutError):
            error = f"the other side {stalled} in time"
        elif isinstance(error, OSError):
            error = f"the connection broke ({error})"
        return ChannelClosedError(f"{self.peer}: {error}")


def _proof(secret: bytes, side: str, their_nonce: str, our_nonce: str, identity: Identity) -> str:
    """HMAC-SHA256 (RFC 2104) over side, both nonces and the identity; the side's name keeps proofs from being reflected."""
    text = "\n".join((PROTOCOL, side, their_nonce, our_nonce, msgspec.json.encode(identity).decode()))
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _proved(secret: bytes, side: str, our_nonce: str, their_nonce: str, message: dict[str, Any]) -> Identity:
    """The identity that the other side sent and proved. Raises ValueError."""
    try:
        identity = msgspec.convert(message.get("identity"), Identity)
    except msgspec.ValidationError as error:
        raise ValueError(f"the {side} side's identity is not one of {PROTOCOL}: {error}") from error
    expected = _proof(secret, side, our_nonce, their_nonce, identity)
    if not hmac.compare_digest(expected.encode(), str(message.get("proof", "")).encode()):
        remedy = "PDBENCH_KV_SECRET must be the same on all instances"
        raise ValueError(f"the {side} side did not prove that it knows the shared secret ({remedy})")
    return identity


def accept_handshake(channel: Channel, context: WorkerContext) -> tuple[Identity, list[Share]]:
    """Prefill's side of the handshake: who decode is, and what travels to its rank from this one; nothing where it only asks how many
    ranks there are. Raises ChannelClosedError, with the channel closed."""
    secret, identity, nonce = context.secret, context.identity, secrets.token_hex(16)
    channel.set_timeout(HANDSHAKE_TIMEOUT_S)
    channel.send({"protocol": PROTOCOL, "nonce": nonce})
    answer = channel.receive()
    their_nonce = str(answer.get("nonce", ""))
    try:
        theirs = _proved(secret, "decode", nonce, their_nonce, answer)
        found = matching_shares(identity, theirs, context.packer.target_parts)
    except ValueError as refusal:
        channel.send({"refused": str(refusal)})
        raise channel.failed(str(refusal)) from None
    channel.send({"identity": identity, "proof": _proof(secret, "prefill", their_nonce, nonce, identity)})
    channel.set_timeout(context.timeout_s)
    return theirs, [share for share in found if share.rank == identity.rank]


def offer_handshake(channel: Channel, context: WorkerContext, rank: int) -> list[Share]:
    """Decode's side of the handshake, with prefill's `rank`: what travels to this rank from all of prefill's.

    Raises ChannelClosedError, with the channel closed.
    """
    secret, identity, nonce = context.secret, context.identity, secrets.token_hex(16)
    channel.set_timeout(HANDSHAKE_TIMEOUT_S)
    hello = channel.receive()
    if hello.get("protocol") != PROTOCOL:
        raise channel.failed(f"it speaks {hello.get('protocol')!r}, not {PROTOCOL}")
    their_nonce = str(hello.get("nonce", ""))
    proof = _proof(secret, "decode", their_nonce, nonce, identity)
    channel.send({"nonce": nonce, "proof": proof, "identity": identity})
    answer = channel.receive()
    if "refused" in answer:
        raise channel.failed(f"prefill refused the handshake: {answer['refused']}")
    try:
        theirs = _proved(secret, "prefill", nonce, their_nonce, answer)
        if theirs.rank != rank:
            raise ValueError(f"it is rank {theirs.rank} of a prefill instance, not {rank}: their KV ports overlap")
        found = matching_shares(theirs, identity, context.packer.target_parts)
    except ValueError as refusal:
        raise channel.failed(str(refusal)) from None
    channel.set_timeout(context.timeout_s)
    return [share for share in found if share.reader == identity.rank]


def connect(address: Address, rank: int, context: WorkerContext) -> tuple[Channel, list[Share]]:
    """Decode's connection to prefill's `rank`, ready after the handshake, and what this worker gets from all ranks of that instance.

    Raises ChannelClosedError.
    """
    begun_s = time.monotonic()
    try:
        connection = socket.create_connection(address, timeout=min(context.timeout_s, HANDSHAKE_TIMEOUT_S))
    except (OSError, ValueError, OverflowError) as error:
        waited_s = time.monotonic() - begun_s
        host, port = address
        raise ChannelClosedError(f"{host}:{port} is not reachable ({error}, after {waited_s:.1f} s)") from error
    channel = Channel(connection, HANDSHAKE_TIMEOUT_S)
    return channel, offer_handshake(channel, context, rank)


class Listener:
    """Prefill's listening socket, on `address` alone; every authenticated connection is served by a thread of its own.

    Raises OSError when the address is taken or not this host's.
    """

    def __init__(
        self, address: Address, context: WorkerContext, serve: Callable[[Channel, Identity, list[Share]], None]
    ) -> None:
        self._context, self._serve = context, serve
        self._unauthenticated = threading.BoundedSemaphore(UNAUTHENTICATED_LIMIT)
        self._closing = False
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=128)
        context.start_thread("kv-listen", self._accept)

    def close(self) -> None:
        """Accept no more connections; those that are open remain."""
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(), which would hold the port open
        self._socket.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if not self._closing:
                    time.sleep(0.1)  # out of file descriptors, say
                continue
            if not self._unauthenticated.acquire(blocking=False):
                connection.close()
                continue
            try:
                self._context.start_thread("kv-peer", self._authenticate, connection)
            except RuntimeError as error:  # no more threads on this machine
                logger.warning("a KV connection was closed: %s", error)
                self._unauthenticated.release()
                connection.close()

    def _authenticate(self, connection: socket.socket) -> None:
        """Shake hands within a bounded time, however slowly the other side sends, then serve."""
        try:
            channel = Channel(connection, HANDSHAKE_TIMEOUT_S)
            deadline = threading.Timer(2 * HANDSHAKE_TIMEOUT_S, channel.close)
            deadline.start()
            try:
                decode, found = accept_handshake(channel, self._context)
            finally:
                deadline.cancel()
        except Exception as error:
            connection.close()
            logger.warning("a KV connection was refused: %s", error)
            return
        finally:
            self._unauthenticated.release()
        with closing(channel):
            self._serve(channel, decode, found)
