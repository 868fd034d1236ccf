"""The control connection between a prefill and a decode worker: framed JSON messages, which they are, and the handshake before.

Both sides prove that they know the deployment's secret (HMAC-SHA256 over both sides' fresh nonces and the sender's identity;
the secret itself never travels), then compare what must be equal. After that the connection is plain TCP.
Try: python -m pytest tests/test_kv_control.py
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

PROTOCOL = "pdbench-kv/1"
MESSAGE_LIMIT_BYTES = 1 << 20
HANDSHAKE_LIMIT_BYTES = 1 << 16
HANDSHAKE_TIMEOUT_S = 5.0
_LENGTH = struct.Struct("!I")


class ChannelClosedError(ConnectionError):
    """The other side is gone, stalled or does not speak the protocol."""


class RefusedError(ChannelClosedError):
    """The other side, or this one, refused the handshake; the message says why."""


@dataclass(frozen=True)
class Identity:
    """What prefill and decode must have in common; `layout` describes every layer's block, `model` its configuration."""

    transport: str
    tensor_parallel: int
    rank: int
    block_size: int
    layout: str
    model: str

    def differences(self, other: Identity) -> str:
        """The first field that differs, in words; empty when there is none."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {theirs} on the decode side and {mine} on the prefill side; they must be equal"
        return ""


class Ask(msgspec.Struct, frozen=True, tag="ask", tag_field="type"):
    """Decode wants a transfer's blocks from the prompt's block `start_block` on, at most `piece_blocks` at once."""

    transfer_id: str
    tokens: int
    fingerprint: str
    start_block: int
    piece_blocks: int


class Forget(msgspec.Struct, frozen=True, tag="drop", tag_field="type"):
    """Decode does not want a transfer any more."""

    transfer_id: str
    reason: str


class Blocks(msgspec.Struct, frozen=True, tag="blocks", tag_field="type"):
    """The next `count` blocks of a transfer, from the prompt's block `start` on; `bytes` follow on the transport."""

    transfer_id: str
    start: int
    count: int
    bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="type"):
    """Prefill will not send a transfer."""

    transfer_id: str
    reason: str


class Waiting(msgspec.Struct, frozen=True, tag="waiting", tag_field="type"):
    """Prefill knows the transfer and still computes, or has it queued."""

    transfer_id: str


Message = msgspec.Struct | dict[str, Any]
"""What a channel sends: one of the above, or the handshake's and the transport's own words."""


class Channel:
    """One connected socket. One thread may receive while others send; a read or write that stalls for `timeout_s` closes it.

    Its descriptor is free only when no thread uses it any more: one that was about to read or write would meet the descriptor's
    next owner, another peer's connection.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._send_lock = threading.Lock()
        self.set_timeout(timeout_s)
        if self._is_tcp:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        try:
            self.peer = "{}:{}".format(*connection.getpeername()[:2])
        except (OSError, IndexError):
            self.peer = "unknown"

    @property
    def _is_tcp(self) -> bool:
        return self._socket.family in (socket.AF_INET, socket.AF_INET6)

    def send(self, message: Message, payload: memoryview | None = None) -> None:
        """Send a message, and its payload's bytes right behind it. Raises ChannelClosedError."""
        data = msgspec.json.encode(message)
        try:
            with self._send_lock, self._using():
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
                if payload is not None:
                    self._socket.sendall(payload)
        except OSError as error:
            self.close()
            raise ChannelClosedError(f"{self.peer}: {_words(error, 'took no data')}") from error

    def send_now(self, message: Message) -> None:
        """Send a short message without waiting. Raises ChannelClosedError when the socket does not take it whole."""
        data = msgspec.json.encode(message)
        data = _LENGTH.pack(len(data)) + data
        try:
            with self._send_lock, self._using():
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                taken = self._socket.send(data) if poll.poll(0) else 0
        except OSError as error:
            self.close()
            raise ChannelClosedError(f"{self.peer}: {_words(error, 'took no data')}") from error
        if taken < len(data):
            self.close()
            raise ChannelClosedError(f"{self.peer}: the other side took no data in time")

    def receive(self, limit_bytes: int = MESSAGE_LIMIT_BYTES, idle: bool = True) -> dict[str, Any]:
        """The next message; with `idle` it may take any time to begin. Raises ChannelClosedError."""
        head = bytearray(_LENGTH.size)
        self.receive_into(memoryview(head), idle=idle)
        (size,) = _LENGTH.unpack(head)
        if size > limit_bytes:
            self.close()
            raise ChannelClosedError(f"{self.peer}: a message of {size} bytes, which is no {PROTOCOL}")
        body = bytearray(size)
        self.receive_into(memoryview(body))
        try:
            message = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.close()
            raise ChannelClosedError(f"{self.peer}: not a message of {PROTOCOL}") from error
        if not isinstance(message, dict):
            self.close()
            raise ChannelClosedError(f"{self.peer}: not a message of {PROTOCOL}")
        return message

    def receive_into(self, buffer: memoryview, idle: bool = False) -> None:
        """Fill `buffer`; with `idle` its first byte may take any time. Raises ChannelClosedError."""
        filled = 0
        while filled < len(buffer):
            try:
                with self._using():
                    count = self._socket.recv_into(buffer[filled:])
            except TimeoutError as error:
                if idle and filled == 0:
                    continue
                self.close()
                raise ChannelClosedError(f"{self.peer}: {_words(error, 'sent no data')}") from error
            except OSError as error:
                self.close()
                raise ChannelClosedError(f"{self.peer}: {_words(error, '')}") from error
            if count == 0:
                self.close()
                raise ChannelClosedError(f"{self.peer}: the connection was closed by the other side")
            filled += count

    def set_timeout(self, timeout_s: float) -> None:
        """How long a read or write may stall from now on, and for how long a host may not answer at all (tcp(7)).

        Raises ChannelClosedError when another thread has closed it.
        """
        self.timeout_s = timeout_s
        try:
            with self._using():
                self._socket.settimeout(timeout_s)
                if self._is_tcp:
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(timeout_s / 2)))
        except OSError as error:
            raise ChannelClosedError(f"the connection was closed ({error})") from error

    def close(self) -> None:
        """Close it; threads that wait in `receive` or `send` get ChannelClosedError."""
        with self._lock:
            self._closed = True
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            if not self._users:
                self._socket.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """While inside, the descriptor stays this connection's. Raises OSError once it is closed."""
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


def _words(error: Exception, stalled: str) -> str:
    return f"the other side {stalled} in time" if isinstance(error, TimeoutError) else f"the connection broke ({error})"


def _proof(secret: bytes, side: str, theirs: str, mine: str, identity: Identity) -> str:
    """HMAC-SHA256 (RFC 2104) over side, both nonces and the identity; the side's name keeps proofs from being reflected."""
    text = "\n".join((PROTOCOL, side, theirs, mine, msgspec.json.encode(identity).decode()))
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _read_identity(message: dict[str, Any]) -> Identity:
    try:
        return msgspec.convert(message.get("identity"), Identity)
    except msgspec.ValidationError as error:
        raise RefusedError(f"the other side's identity is not one of {PROTOCOL}: {error}") from error


def accept_handshake(channel: Channel, secret: bytes, identity: Identity) -> None:
    """Prefill's side of the handshake. Raises RefusedError, or ChannelClosedError, and closes the channel on any doubt."""
    nonce = secrets.token_hex(16)
    channel.set_timeout(HANDSHAKE_TIMEOUT_S)
    channel.send({"protocol": PROTOCOL, "nonce": nonce})
    answer = channel.receive(HANDSHAKE_LIMIT_BYTES, idle=False)
    try:
        theirs, other = str(answer.get("nonce", "")), _read_identity(answer)
        proof = _proof(secret, "decode", nonce, theirs, other)
        if not hmac.compare_digest(proof.encode(), str(answer.get("proof", "")).encode()):
            raise RefusedError("the shared secret differs (PDBENCH_KV_SECRET must be the same on all instances)")
        if difference := identity.differences(other):
            raise RefusedError(difference)
    except RefusedError as refusal:
        try:
            channel.send({"refused": str(refusal)})
        finally:
            channel.close()
        raise
    channel.send(
        {"identity": msgspec.to_builtins(identity), "proof": _proof(secret, "prefill", theirs, nonce, identity)}
    )


def offer_handshake(channel: Channel, secret: bytes, identity: Identity) -> None:
    """Decode's side of the handshake. Raises RefusedError, or ChannelClosedError, and closes the channel on any doubt."""
    nonce = secrets.token_hex(16)
    channel.set_timeout(HANDSHAKE_TIMEOUT_S)
    hello = channel.receive(HANDSHAKE_LIMIT_BYTES, idle=False)
    theirs = str(hello.get("nonce", ""))
    if hello.get("protocol") != PROTOCOL:
        channel.close()
        raise RefusedError(f"{channel.peer} speaks {hello.get('protocol')!r}, not {PROTOCOL}")
    proof = _proof(secret, "decode", theirs, nonce, identity)
    channel.send({"nonce": nonce, "proof": proof, "identity": msgspec.to_builtins(identity)})
    answer = channel.receive(HANDSHAKE_LIMIT_BYTES, idle=False)
    if "refused" in answer:
        channel.close()
        raise RefusedError(f"prefill {channel.peer} refused the handshake: {answer['refused']}")
    expected = _proof(secret, "prefill", nonce, theirs, _read_identity(answer))
    if not hmac.compare_digest(expected.encode(), str(answer.get("proof", "")).encode()):
        channel.close()
        raise RefusedError(f"{channel.peer} did not prove that it knows the shared secret")


def dial(host: str, port: int, timeout_s: float) -> Channel:
    """Connect to a prefill worker. Raises ChannelClosedError."""
    begun = time.monotonic()
    try:
        connection = socket.create_connection((host, port), timeout=min(timeout_s, HANDSHAKE_TIMEOUT_S))
    except (OSError, ValueError, OverflowError) as error:
        waited = time.monotonic() - begun
        raise ChannelClosedError(f"prefill {host}:{port} is not reachable ({error}, after {waited:.1f} s)") from error
    return Channel(connection, timeout_s)
