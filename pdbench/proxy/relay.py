"""Passes on the chunks of streams that are under way: one poller for all of them, one read and one write per chunk.

Once a stream's first events have passed, only its end and its faults need to be recognised. A piece that is anything but
whole chunks of whole events goes back to the stream's own connection, whose parser then is where it was left.
"""

import asyncio
import os
import select
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdbench.proxy.upstream import UpstreamRequest

_READ_BYTES = 16384
_EVENT_ENDS = (b"\n\n\r\n", b"\r\n\r\n\r\n")


class Relay:
    """The relayed streams of one worker: upstream requests between two chunks of their answers, by descriptor."""

    def __init__(self) -> None:
        self._streams: dict[int, UpstreamRequest] = {}
        self._poller = select.epoll()

    def start(self) -> None:
        """A poller can be polled: the loop calls back once per turn for all streams that have something to read."""
        asyncio.get_running_loop().add_reader(self._poller.fileno(), self._pass_on)

    def enter(self, stream: "UpstreamRequest") -> None:
        self._streams[stream.source_fd] = stream
        # Edge-triggered: the kernel need not look again at each stream that was read. It does not say twice what a read
        # leaves, so the relaying ends with a read that fills the buffer and with one beside the connection's end.
        self._poller.register(stream.source_fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def leave(self, stream: "UpstreamRequest") -> None:
        if self._streams.pop(stream.source_fd, None) is not None:
            self._poller.unregister(stream.source_fd)

    def _pass_on(self) -> None:
        streams, read, write = self._streams, os.read, os.write
        for source_fd, events in self._poller.poll(0):
            stream = streams.get(source_fd)
            if stream is None:  # ended by another one's piece in this turn
                continue
            try:
                data = read(source_fd, _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if (
                events != select.EPOLLIN
                or not is_whole_events(data)
                or len(data) == _READ_BYTES
                or (stream.stop_at is not None and stream.stop_at in data)
            ):
                self._return(stream, data)
                continue
            sink = stream.sink
            assert sink is not None
            sink.last, stream.quiet_s = data, 0.0
            try:
                written = write(stream.sink_fd, data)
            except BlockingIOError:
                written = 0
            except OSError:  # the client has left: its own connection says so
                written = len(data)
            if written < len(data):
                self._return(stream, b"")
                sink.transport.write(data[written:])

    def _return(self, stream: "UpstreamRequest", data: bytes) -> None:
        self.leave(stream)
        connection = stream.connection
        assert connection is not None
        connection.transport.resume_reading()
        if data:
            connection.data_received(data)


def is_whole_events(data: bytes) -> bool:
    """Is it whole chunks of HTTP/1.1, each of which ends where an event ends, and not the last one?"""
    at, length = 0, len(data)
    if data.startswith(_size_line(length)) and data.endswith(_EVENT_ENDS):  # nearly always
        return True
    while at < length:
        line_end = data.find(b"\r\n", at, at + 10)
        try:
            end = line_end + 4 + int(data[at:line_end], 16)
        except ValueError:
            return False
        if end > length or end <= line_end + 4 or not data.endswith(_EVENT_ENDS, at, end):
            return False
        at = end
    return length > 0


@lru_cache
def _size_line(length: int) -> bytes:
    """The size line of the one chunk that takes `length` bytes with its line ends."""
    for digits in range(1, 5):
        line = b"%x\r\n" % max(length - digits - 4, 0)
        if len(line) == digits + 2:
            return line
    return b"-"
