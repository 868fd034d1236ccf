"""Putting a node's monotonic clock on the head's: offsets by round trips, joined by straight lines, with their uncertainty.

A round trip that left the head at a, was answered at the node's n and came back at b gives the offset (a + b) / 2 - n, wrong by
(b - a) / 2 at most (Cristian 1989). The quickest of every few seconds counts. Pure.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy

from pdbench.load.clients import ClientResult
from pdbench.records import RequestRecord

WINDOW_S = 5.0
_INSTANTS = ("planned_s", "due_s", "sent_s", "end_s")


class NodeClock:
    """What is known of one node's clock, as of `compared_s`. `same`: it is the head's own, and nothing needs an estimate."""

    def __init__(self, same: bool = False) -> None:
        self.same, self.compared_s = same, 0.0
        self._best: dict[int, tuple[float, float, float]] = {}

    def add(self, sent_s: float, node_s: float, received_s: float) -> None:
        """One round trip: `sent_s` and `received_s` on the head's monotonic clock, `node_s` on the node's."""
        half_s = (received_s - sent_s) / 2
        window = int(sent_s // WINDOW_S)
        if window not in self._best or half_s < self._best[window][0]:
            self._best[window] = (half_s, node_s, (sent_s + received_s) / 2 - node_s)

    def offset_s(self, node_s: float) -> float:
        """What to add to the node's reading `node_s` to have the head's; 0 when nothing was measured."""
        if self.same or not self._best:
            return 0.0
        points = sorted((node, offset) for _, node, offset in self._best.values())
        return float(numpy.interp(node_s, [node for node, _ in points], [offset for _, offset in points]))

    def latest_offset_s(self) -> float:
        """The offset of the last window."""
        return self.offset_s(float("inf"))

    @property
    def uncertainty_s(self) -> float | None:
        """The largest error that an offset may have; None when nothing was measured."""
        return 0.0 if self.same else max((half for half, _, _ in self._best.values()), default=None)

    def facts(self) -> dict[str, Any]:
        """For the result: offset in seconds, uncertainty in milliseconds, drift in microseconds a second."""
        uncertainty = self.uncertainty_s
        points = sorted((node, offset) for _, node, offset in self._best.values())
        drift = None
        if len(points) > 1 and not self.same:
            drift = 1e6 * (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        return {
            "offset_s": self.latest_offset_s(),
            "uncertainty_ms": None if uncertainty is None else 1e3 * uncertainty,
            "drift_us_per_s": drift,
            "windows": len(points),
        }


def identity() -> str:
    """Equal for processes that share one monotonic clock: the kernel's boot and the time namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/time")
    return f"{boot.read_text().strip() if boot.exists() else ''} {space.readlink() if space.is_symlink() else ''}"


def move_result(result: ClientResult, move: Callable[[float], float]) -> ClientResult:
    """A client's result with every instant moved."""
    window = result.steady_window
    return msgspec.structs.replace(
        result,
        requests=[move_request(request, move) for request in result.requests],
        begin_s=move(result.begin_s),
        steady_window=(move(window[0]), move(window[1])) if window else None,
    )


def move_request(request: RequestRecord, move: Callable[[float], float]) -> RequestRecord:
    """A request with every instant moved."""
    instants = {name: instant_s for name in _INSTANTS if (instant_s := getattr(request, name)) is not None}
    return msgspec.structs.replace(
        request,
        token_s=[move(instant_s) for instant_s in request.token_s],
        phases={name: span and (move(span[0]), move(span[1])) for name, span in request.phases.items()},
        **{name: move(instant_s) for name, instant_s in instants.items()},
    )
