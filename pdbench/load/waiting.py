"""Waiting for sockets: epoll at its bare cost where there is one, any selector elsewhere; wakes within microseconds of a deadline.

Try: python -c "from pdbench.load.waiting import Waiter; print(Waiter().wait(0.01))"
"""

import select
import selectors
import socket
from typing import Any

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
# epoll_wait counts whole milliseconds: what remains of a wait is left to select(2), which counts microseconds.
_MILLISECOND_S = 0.001
_HIGHEST_FOR_SELECT = 1023


class _EpollWaiter:
    """`wait` gives (owner, events) of the sockets that are ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._owners: dict[int, Any] = {}
        self._fine = self._epoll.fileno() <= _HIGHEST_FOR_SELECT

    def add(self, sock: socket.socket, events: int, owner: Any) -> None:
        self._owners[sock.fileno()] = owner
        self._epoll.register(sock, _to_epoll(events))

    def change(self, sock: socket.socket, events: int, owner: Any) -> None:
        self._epoll.modify(sock, _to_epoll(events))

    def remove(self, sock: socket.socket) -> None:
        self._epoll.unregister(sock)
        del self._owners[sock.fileno()]

    def wait(self, wait_s: float) -> list[tuple[Any, int]]:
        """The ready ones, after at most `wait_s` seconds (0 or less: at once)."""
        coarse_s = wait_s - 2 * _MILLISECOND_S
        found = self._epoll.poll(coarse_s if coarse_s > 0 else 0)
        if not found and wait_s > 0 and coarse_s <= 0:
            if self._fine:
                select.select([self._epoll], [], [], wait_s)
                found = self._epoll.poll(0)
            else:
                found = self._epoll.poll(wait_s)
        owners = self._owners
        return [(owners[number], READ if flags == select.EPOLLIN else _from_epoll(flags)) for number, flags in found]

    def close(self) -> None:
        self._epoll.close()


class _SelectorWaiter:
    """The same for systems without epoll."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, sock: socket.socket, events: int, owner: Any) -> None:
        self._selector.register(sock, events, owner)

    def change(self, sock: socket.socket, events: int, owner: Any) -> None:
        self._selector.modify(sock, events, owner)

    def remove(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)

    def wait(self, wait_s: float) -> list[tuple[Any, int]]:
        """The ready ones, after at most `wait_s` seconds (0 or less: at once)."""
        return [(key.data, events) for key, events in self._selector.select(max(0.0, wait_s))]

    def close(self) -> None:
        self._selector.close()


Waiter = _EpollWaiter if hasattr(select, "epoll") else _SelectorWaiter


def _to_epoll(events: int) -> int:
    return (select.EPOLLIN if events & READ else 0) | (select.EPOLLOUT if events & WRITE else 0)


def _from_epoll(flags: int) -> int:
    """Errors and hang-ups count as readable: the read then says what happened."""
    return (READ if flags & ~select.EPOLLOUT else 0) | (WRITE if flags & select.EPOLLOUT else 0)
