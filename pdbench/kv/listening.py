"""Prefill's open door: accepts connections, shakes hands, and lets no stranger hold it up.

Try: python -m pytest tests/test_kv_connections.py -k stranger
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from pdbench.kv.control import HANDSHAKE_TIMEOUT_S, Channel, Identity, accept_handshake
from pdbench.kv.threads import Threads

logger = logging.getLogger(f"vllm.{__name__}")

STRANGERS_AT_ONCE = 32


class Listener:
    """A listening socket on `address` alone; every connection that shakes hands is served by a thread of its own.

    Raises OSError when the address is taken or not this host's.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        identity: Identity,
        timeout_s: float,
        serve: Callable[[Channel], None],
        threads: Threads,
    ) -> None:
        self._threads = threads
        self._secret, self._identity, self._timeout_s, self._serve = secret, identity, timeout_s, serve
        self._strangers = threading.BoundedSemaphore(STRANGERS_AT_ONCE)
        self._closing = False
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=128)
        threads.start("kv-listen", self._accept)

    def close(self) -> None:
        """Let nobody in any more; who is in stays."""
        self._closing = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(), which would hold the port open
        except OSError:
            pass
        self._socket.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if not self._closing:
                    time.sleep(0.1)  # out of file descriptors, say
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            try:
                self._threads.start("kv-peer", self._admit, connection)
            except RuntimeError as error:  # no more threads on this machine
                logger.warning("a KV connection was left: %s", error)
                self._strangers.release()
                connection.close()

    def _admit(self, connection: socket.socket) -> None:
        """Shake hands, then serve."""
        try:
            channel = self._shake_hands(connection)
        except Exception as error:
            connection.close()
            logger.warning("a KV connection was refused: %s", error)
            return
        finally:
            self._strangers.release()
        self._serve(channel)

    def _shake_hands(self, connection: socket.socket) -> Channel:
        """Within a bounded time, however slowly the other side talks. Raises ChannelClosedError."""
        channel = Channel(connection, self._timeout_s)
        deadline = threading.Timer(2 * HANDSHAKE_TIMEOUT_S, channel.close)
        deadline.start()
        try:
            accept_handshake(channel, self._secret, self._identity)
        finally:
            deadline.cancel()
        channel.set_timeout(self._timeout_s)
        return channel
