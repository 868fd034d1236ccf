"""When bytes really arrived: the kernel's receive stamps (SO_TIMESTAMPING), brought to the monotonic clock.

A busy client reads late, but the kernel has stamped the segment on arrival. Where the platform gives no stamps (not Linux)
the caller falls back to its own clock and the record says so.
Source: Linux Documentation/networking/timestamping.rst. Try: pytest tests/test_load_client.py
"""

import contextlib
import socket
import struct
import sys
import time
from array import array

_SO_TIMESTAMPING = 37
_RECEIVE_SOFTWARE, _REPORT_SOFTWARE = 1 << 3, 1 << 4
_TIMESPEC = struct.Struct("@qq")
ANCILLARY_BYTES = 128
# A stamp this little in the future is the two clocks' reading error, not a stepped clock.
_CLOCK_ERROR_S = 1e-4


def enable(sock: socket.socket) -> bool:
    """Ask the kernel to stamp what this socket receives; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RECEIVE_SOFTWARE | _REPORT_SOFTWARE)
        return True
    return False


def unix_minus_monotonic_s() -> float:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC in seconds, from the tightest of five readings, so that preemption does not count."""
    best_width, best = float("inf"), 0.0
    for _ in range(5):
        before, unix, after = time.monotonic(), time.time(), time.monotonic()
        if after - before < best_width:
            best_width, best = after - before, unix - (before + after) / 2
    return best


class ArrivalClock:
    """Turns a read's ancillary data into an instant on the run's clock, and keeps how late user space was each time."""

    __slots__ = ("_unix_minus_run_s", "read_delays_s", "zero_s")

    def __init__(self, zero_s: float) -> None:
        self.zero_s = zero_s
        self.read_delays_s = array("d")
        self.refresh()

    def now(self) -> float:
        """Seconds since the run's zero."""
        return time.monotonic() - self.zero_s

    def refresh(self) -> None:
        """Measure the wall clock's offset again (it may be stepped or slewed); call it every second or so."""
        self._unix_minus_run_s = unix_minus_monotonic_s() + self.zero_s

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
        if -_CLOCK_ERROR_S < delay_s < 0:
            at_s, delay_s = now_s, 0.0
        elif delay_s < 0:
            self.refresh()
            return now_s, False
        self.read_delays_s.append(delay_s)
        return at_s, True
