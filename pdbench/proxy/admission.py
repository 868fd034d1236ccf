"""How many requests are forwarded at once, and how many may wait for that.

Try: pdbench proxy --max-in-flight 8 --queue-size 16 ...
"""

import asyncio
from collections import deque

from pdbench.proxy.errors import RefusedError


class Admission:
    """A bounded number of requests in flight and a bounded, fair queue before them."""

    def __init__(self, max_in_flight: int, queue_size: int, queue_timeout_s: float) -> None:
        self.in_flight = 0
        self._max_in_flight = max_in_flight
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Wait for a place; raises RefusedError(429) when the queue is full or the wait too long."""
        if self.in_flight < self._max_in_flight:
            self.in_flight += 1
            return
        if len(self._waiting) >= self._queue_size:
            raise RefusedError(429, "the proxy's queue is full: try again later", stage="queue", retry_after_s=1)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await place
        except TimeoutError:
            self._give_up(place)
            text = f"no place within {self._queue_timeout_s:g} s: try again later"
            raise RefusedError(429, text, stage="queue", retry_after_s=1) from None
        except asyncio.CancelledError:
            self._give_up(place)
            raise

    def leave(self) -> None:
        """Give the place to the next in the queue."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_flight -= 1

    def _give_up(self, place: "asyncio.Future[None]") -> None:
        if place in self._waiting:
            self._waiting.remove(place)
        elif not place.cancelled():
            self.leave()
