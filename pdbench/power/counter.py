"""When to read an energy counter that its device refreshes at intervals of its own: at the moment it moves.

A counter that moves every 100 ms is up to 100 ms old when it is read at any other moment, which is 10 % of a 1 s window. The
tracker polls until it sees the counter move, learns the period, sleeps, and wakes shortly before a later move. Each reading
kept is good to about one poll.
"""

import math

POLL_S = 0.0005
RETRY_S = 0.1
ANCHOR_S = 5.0
_LEAD_S = 0.005
_STILL_S = 1.0


class CounterEdgeTracker:
    """A state machine: `due_s` is when it wants a reading, `observe` takes one; `edges` are (monotonic s, joules)."""

    def __init__(self) -> None:
        self.edges: list[tuple[float, float]] = []
        self.due_s = 0.0
        self.finishing = False
        self._last: tuple[float, float] | None = None
        self._awake_s: float | None = None
        self._period_s: float | None = None
        self._stride = 1

    @property
    def settled(self) -> bool:
        """The first edge is known, or there is no counter."""
        return bool(self.edges) or self.due_s == math.inf

    @property
    def refresh_ms(self) -> float | None:
        """The counter's own period; None before two edges."""
        return None if self._period_s is None else 1000 * self._period_s

    def observe(self, at_s: float, energy_j: float | None, now_s: float) -> None:
        """A reading whose middle was `at_s` and which ended at `now_s`; None means that there is no counter."""
        if energy_j is None:
            self.due_s, self.finishing = math.inf, False
        elif self._last is None or self._awake_s is None:
            self._last, self._awake_s, self.due_s = (at_s, energy_j), at_s, now_s + POLL_S
        elif energy_j != self._last[1]:
            self._edge((self._last[0] + at_s) / 2, energy_j)
        elif at_s - self._awake_s > _STILL_S:
            # It does not move at all: any moment is as good as an edge.
            self._keep(at_s, energy_j)
            self._sleep_until(at_s + ANCHOR_S)
        else:
            self._last, self.due_s = (at_s, energy_j), now_s + POLL_S

    def skip(self, now_s: float) -> None:
        """One reading failed: try again soon."""
        if self.due_s < math.inf:
            self.due_s = now_s + RETRY_S

    def finish(self, now_s: float) -> None:
        """Sampling ends: take the very next edge, then no more."""
        if self.due_s < math.inf:
            self.finishing, self.due_s = True, now_s
            self._last = None

    def _edge(self, edge_s: float, energy_j: float) -> None:
        if self.edges:
            passed_s = edge_s - self.edges[-1][0]
            count = 1 if self._period_s is None else max(1, round(passed_s / self._period_s))
            self._period_s = passed_s / count
        self._keep(edge_s, energy_j)
        if self._period_s is None:
            self._sleep_until(edge_s + POLL_S)
            return
        # The period is known better after every stride, so the strides may grow.
        self._stride = min(2 * self._stride, max(1, round(ANCHOR_S / self._period_s)))
        self._sleep_until(edge_s + self._stride * self._period_s - _LEAD_S)

    def _keep(self, at_s: float, energy_j: float) -> None:
        self.edges.append((at_s, energy_j))
        self.finishing = False

    def _sleep_until(self, due_s: float) -> None:
        self._last = self._awake_s = None
        self.due_s = due_s
