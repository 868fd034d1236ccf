"""One keep-alive connection of the load client: non-blocking socket, TLS that keeps the kernel's stamps, one answer at a time.

TLS runs over memory buffers, so that the encrypted bytes are still read with recvmsg and their arrival instants.
Try: pytest tests/test_load_client.py
"""

import contextlib
import errno
import socket
import ssl
from collections.abc import Callable

from pdbench.load import stamps
from pdbench.load.answer import Answer
from pdbench.load.waiting import READ, WRITE

_READ_BYTES = 65536
Address = tuple[socket.AddressFamily, tuple]


class Connection:
    """A socket to the server, connecting from its first breath.

    `watch(connection, events)` is called whenever it begins to wait for other events than before. A failure sets `broken`
    to (class, message); whoever owns the connection then closes it.
    """

    __slots__ = (
        "_clock",
        "_connecting",
        "_handshaking",
        "_incoming",
        "_outgoing",
        "_recvmsg",
        "_request",
        "_tls",
        "_unsent",
        "_watch",
        "answer",
        "broken",
        "last_byte_s",
        "sock",
        "watched",
    )

    def __init__(
        self,
        address: Address,
        tls: ssl.SSLContext | None,
        server_name: str,
        clock: stamps.ArrivalClock,
        watch: Callable[["Connection", int], None],
    ) -> None:
        self.sock = socket.socket(address[0], socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stamps.enable(self.sock)
        self.answer: Answer | None = None
        self.broken: tuple[str, str] | None = None
        self.watched = 0
        self.last_byte_s: float | None = None
        self._clock = clock
        self._recvmsg = self.sock.recvmsg
        self._request = b""
        self._unsent = memoryview(b"")
        self._watch = watch
        self._connecting = True
        self._handshaking = tls is not None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        result = self.sock.connect_ex(address[1])
        if result not in (0, errno.EINPROGRESS):
            self._break(OSError(result, errno.errorcode.get(result, "")))

    def request(self, data: bytes, answer: Answer) -> None:
        """Send one whole HTTP request; its answer's bytes go to `answer` from now on."""
        self.answer = answer
        self.last_byte_s = None
        self._request = data
        if self._connecting:
            self._begin()
        elif not self._handshaking:
            self._send_request()

    def ready(self, events: int) -> None:
        """The socket can be written or read (selector events)."""
        try:
            if events == READ:
                self._readable()
                return
            self._writable()
            if events & READ and self.broken is None:
                self._readable()
        except (OSError, ssl.SSLError) as error:
            self._break(error)

    def idle(self) -> None:
        """The answer is complete: wait for the next request, or for the server to close."""
        self.answer = None
        self._wait_for(READ)

    def stale(self) -> bool:
        """Has the server closed this idle connection (or, without TLS, sent what nobody asked for)?"""
        try:
            waiting = self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return not waiting or self._tls is None

    def close(self) -> None:
        """Close the socket at once; what has not been read is lost."""
        with contextlib.suppress(OSError):
            self.sock.close()

    def _send_request(self) -> None:
        if self._tls is not None:
            self._tls.write(self._request)
            self._unsent = memoryview(self._outgoing.read())
        else:
            self._unsent = memoryview(self._request)
        self._request = b""
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)
            return
        self._wait_for(READ | WRITE if self._unsent else READ)

    def _wait_for(self, events: int) -> None:
        if events != self.watched:
            self._watch(self, events)
            self.watched = events

    def _begin(self) -> None:
        """Go on as soon as the connection stands; on loopback that is at once, which saves a turn of the loop."""
        try:
            self.sock.getpeername()
        except OSError:
            self._wait_for(READ | WRITE)
            return
        self._connected()

    def _connected(self) -> None:
        self._connecting = False
        if self._handshaking:
            self._handshake()
        else:
            self._send_request()

    def _writable(self) -> None:
        if not self._connecting:
            self._flush()
            return
        result = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            raise OSError(result, errno.errorcode.get(result, ""))
        self._connected()

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
            self._handshaking = False
        except ssl.SSLWantReadError:
            pass
        self._unsent = memoryview(bytes(self._unsent) + self._outgoing.read())
        if not self._handshaking and self._request:
            self._tls.write(self._request)
            self._request = b""
            self._unsent = memoryview(bytes(self._unsent) + self._outgoing.read())
        self._flush()

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._recvmsg(_READ_BYTES, stamps.ANCILLARY_BYTES)
        except BlockingIOError:
            return
        at_s, kernel = self._clock.arrival(ancillary)
        if self._tls is not None and data:
            data, ended = self._decrypt(data)
        else:
            ended = not data
        answer = self.answer
        if data and answer is not None and not answer.complete:
            if not kernel:
                answer.user_stamps += 1
            self.last_byte_s = at_s
            answer.feed(data, at_s)
        elif data:
            self.broken = ("closed", "bytes came that belong to no request")
        if ended:
            self.broken = self.broken or ("closed", "the server closed the connection")

    def _decrypt(self, data: bytes) -> tuple[bytes, bool]:
        assert self._tls is not None
        self._incoming.write(data)
        if self._handshaking:
            self._handshake()
            if self._handshaking:
                return b"", False
        pieces = []
        try:
            while piece := self._tls.read(_READ_BYTES):
                pieces.append(piece)
            return b"".join(pieces), True
        except ssl.SSLWantReadError:
            return b"".join(pieces), False

    def _break(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLError):
            kind = "tls"
        elif error.errno == errno.ECONNREFUSED:
            kind = "refused"
        elif error.errno in (errno.ECONNRESET, errno.EPIPE):
            kind = "reset"
        elif error.errno == errno.ETIMEDOUT:
            kind = "timeout"
        else:
            kind = "connect" if self._connecting else "reset"
        self.broken = (kind, str(error))
