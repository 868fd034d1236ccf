"""One keep-alive connection of the load client, and when its bytes really arrived.

A busy client reads late, but the kernel has stamped each segment on arrival (SO_TIMESTAMPING; Linux only, as all of pdbench:
Documentation/networking/timestamping.rst). TLS runs over memory buffers, so that its bytes too are read with recvmsg and stamps.
"""

import contextlib
import errno
import os
import resource
import socket
import ssl
import struct
import time
from array import array
from math import inf
from pathlib import Path
from select import EPOLLIN, EPOLLOUT, epoll

from pdbench.load.response import Response

Address = tuple[socket.AddressFamily, tuple]
_READ_BYTES = 65536
_ANCILLARY_BYTES = 128
_SO_TIMESTAMPING = 37
_RECEIVE_SOFTWARE, _REPORT_SOFTWARE = 1 << 3, 1 << 4
_TIMESPEC = struct.Struct("@qq")
_KINDS = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ETIMEDOUT: "timeout"}
_REMEDIES = {
    errno.EADDRNOTAVAIL: "no local port is free: widen net.ipv4.ip_local_port_range, or send fewer streams",
    errno.EMFILE: "`ulimit -n` bounds the connections",
}
# A stamp this little in the future is the two clocks' reading error, not a stepped clock.
_CLOCK_ERROR_S = 1e-4
_OWN_FILES = 8
"""That a client opens besides its connections."""
_STEP_S = 0.02
"""From a delay like this on, the offset of the wall clock is measured again before the stamp is believed."""


def words(error: OSError) -> str:
    """What went wrong, and the remedy where it lies on this host."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error}: {remedy}" if remedy else str(error)


def enable_stamps(sock: socket.socket) -> None:
    """Let the kernel stamp what this socket receives; where it refuses, the reader's own clock counts."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RECEIVE_SOFTWARE | _REPORT_SOFTWARE)


class ArrivalClock:
    """Turns a read's ancillary data into an instant on the run's clock, and keeps how late user space was each time."""

    def __init__(self, zero_s: float) -> None:
        self.zero_s = zero_s
        self.read_delays_s = array("d")
        self.refresh()

    def now(self) -> float:
        return time.monotonic() - self.zero_s

    def refresh(self) -> None:
        """Measure the wall clock's offset again (it may be stepped or slewed); call it every second or so."""
        readings = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(5)]
        # The tightest, so that preemption between two readings does not count.
        before, unix, after = min(readings, key=lambda reading: reading[2] - reading[0])
        self._unix_minus_run_s = unix - (before + after) / 2 + self.zero_s

    def arrival(self, ancillary: list[tuple[int, int, bytes]]) -> tuple[float, bool]:
        """(instant in seconds, does it come from the kernel?); the caller's own clock where there is no stamp.

        When one read returns several segments, the stamp is the last one's.
        """
        now_s = time.monotonic() - self.zero_s
        if not ancillary:
            return now_s, False
        data = ancillary[0][2]
        seconds, nanoseconds = _TIMESPEC.unpack_from(data)
        at_s = seconds - self._unix_minus_run_s + nanoseconds * 1e-9
        delay_s = now_s - at_s
        if delay_s > _STEP_S:  # read late, or the wall clock was stepped back
            self.refresh()
            at_s = seconds - self._unix_minus_run_s + nanoseconds * 1e-9
            delay_s = now_s - at_s
        if -_CLOCK_ERROR_S < delay_s < 0:
            at_s, delay_s = now_s, 0.0
        elif delay_s < 0:
            self.refresh()
            return now_s, False
        self.read_delays_s.append(delay_s)
        return at_s, True


def files_left() -> float:
    """How many connections this process may open: descriptors up to `ulimit -n`, without those in use and a few that it needs besides."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_use = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return inf if most == resource.RLIM_INFINITY else most - in_use - _OWN_FILES


class Connection:
    """A socket to the server, connecting from its creation on. A failure sets `broken` to (class, message) for its owner."""

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None, server_name: str, clock: ArrivalClock, poller: epoll
    ) -> None:
        self.sock = socket.socket(address[0], socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        enable_stamps(self.sock)
        self.response: Response | None = None
        self.broken: tuple[str, str] | None = None
        self.last_byte_s: float | None = None
        self.idle_since_s = 0.0
        self.unsent = memoryview(b"")
        self._clock, self._poller, self._watched = clock, poller, 0
        self._recvmsg = self.sock.recvmsg
        self._connecting = True
        self._request = b""
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        result = self.sock.connect_ex(address[1])
        if result not in (0, errno.EINPROGRESS):
            self._break(OSError(result, os.strerror(result)))

    def request(self, data: bytes, response: Response) -> None:
        """Send one whole HTTP request; the bytes that come go to `response` from now on."""
        self.response, self.last_byte_s, self._request = response, None, data
        if self._connecting:
            # On loopback the connection stands at once, which saves a turn of the loop.
            try:
                self.sock.getpeername()
            except OSError:
                self._watch(EPOLLIN | EPOLLOUT)
                return
            self._connecting = False
        self._send()

    def ready(self, events: int) -> None:
        """The socket can be written or read; errors and hang-ups count as readable: the read says what happened."""
        try:
            if events & EPOLLOUT:
                if self._connecting and (result := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    raise OSError(result, os.strerror(result))
                self._connecting = False
                self._send()
                if events == EPOLLOUT or self.broken is not None:
                    return
            data, ancillary, _, _ = self._recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
            at_s, from_kernel = self._clock.arrival(ancillary)
            ended = not data
            if self._tls is not None and data:
                self._incoming.write(data)
                if self._request:  # it waits for the handshake
                    self._send()
                data = b""
                ended = True
                try:
                    while piece := self._tls.read(_READ_BYTES):
                        data += piece
                except ssl.SSLWantReadError:
                    ended = False
        except BlockingIOError:
            return
        except OSError as error:
            self._break(error)
            return
        response = self.response
        if data and response is not None and not response.complete:
            if not from_kernel:
                response.record.stamp = "user"
            self.last_byte_s = at_s
            response.feed(data, at_s)
        elif data:
            self.broken = ("closed", "bytes came that belong to no request")
        if ended:
            self.broken = self.broken or ("closed", "the server closed the connection")

    def idle(self, since_s: float) -> None:
        """The response is complete: wait for the next request, or for the server to close."""
        self.response, self.idle_since_s = None, since_s
        self._watch(EPOLLIN)

    def stale(self) -> bool:
        """Has the server closed this idle connection (or, without TLS, sent what belongs to no request)?"""
        try:
            waiting = self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return not waiting or self._tls is None

    def close(self) -> None:
        if self._watched:
            self._poller.unregister(self.sock)
        with contextlib.suppress(OSError):
            self.sock.close()

    def _watch(self, events: int) -> None:
        if events != self._watched:
            (self._poller.modify if self._watched else self._poller.register)(self.sock, events)
            self._watched = events

    def _send(self) -> None:
        """Send what is unsent and the request; over TLS, what the handshake needs before it."""
        data = self._request
        if self._tls is None:
            self._request = b""
        else:
            if data:
                with contextlib.suppress(ssl.SSLWantReadError):  # while the handshake is not done
                    self._tls.write(data)
                    self._request = b""
            data = self._outgoing.read()
        if data:
            self.unsent = memoryview(bytes(self.unsent) + data if self.unsent else data)
        try:
            while self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)
            return
        self._watch(EPOLLIN | EPOLLOUT if self.unsent else EPOLLIN)

    def _break(self, error: OSError) -> None:
        otherwise = "connect" if self._connecting else "reset"
        kind = "tls" if isinstance(error, ssl.SSLError) else _KINDS.get(error.errno or 0, otherwise)
        self.broken = (kind, words(error))
