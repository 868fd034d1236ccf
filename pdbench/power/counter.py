"""When an energy counter is read: as it moves."""

import math

POLL_S, SLOW_POLL_S = 0.0005, 0.05
"""Between two readings of a counter that is about to move; ... of one that has not moved for a second, which a driver may refresh as rarely."""
RETRY_S = 0.1
ANCHOR_S, UNSHAPED_S = 5.0, 0.2
"""A counter is read so often, between two readings the power curve has its joules' shape; ... and where no power can be read."""
_LEAD_S, _LEAD_SHARE = 0.005, 0.05
_STILL_S, _STOPPED_S = 1.0, 10.0
_MOST_BLURRED, _USUAL_S = 4, 0.1
"""So many moves that fell between readings far apart are skipped; then one counts: what is read is a period old at most, usually this."""


class CounterEdgeTracker:
    """When to read an energy counter that its device refreshes at intervals of its own: at the moment it moves.

    A counter that moves every 100 ms is up to 100 ms old when it is read at any other moment, which is 10 % of a 1 s window. The tracker polls
    until it sees the counter move, learns the period, sleeps, and wakes shortly before a later move. Each reading kept is good to about one
    poll; only of a counter that does not move for ten seconds, or whose moves all fall into other readings, any are kept. `due_s` is when it
    wants a reading, `anchor_s` apart at most; `edges` are (monotonic s, joules), at most `error_s` from the moves.
    """

    def __init__(self) -> None:
        self.edges: list[tuple[float, float]] = []
        self.due_s, self.anchor_s = 0.0, ANCHOR_S
        self.finishing = False
        self.period_s: float | None = None  # None before two edges
        self.error_s = 0.0
        self._last: tuple[float, float] | None = None
        self._awake_s = 0.0
        self._stride, self._blurred = 1, 0

    @property
    def settled(self) -> bool:
        """The first edge is known, or there is no counter."""
        return bool(self.edges) or self.due_s == math.inf

    def observe(self, at_s: float, energy_j: float | None, now_s: float) -> None:
        """A reading whose middle was `at_s` and which ended at `now_s`; None means that there is no counter."""
        if energy_j is None:
            self.due_s, self.finishing = math.inf, False
        elif self._last is None:
            self._last, self._awake_s, self.due_s = (at_s, energy_j), at_s, now_s + POLL_S
        elif energy_j != self._last[1]:
            unread_s = at_s - self._last[0]
            if unread_s <= SLOW_POLL_S * (2 if self._last[0] - self._awake_s > _STILL_S else 1):
                self._edge((self._last[0] + at_s) / 2, energy_j)
                self.error_s = max(self.error_s, unread_s / 2 + now_s - at_s)
            elif self._blurred < _MOST_BLURRED:  # other devices were read meanwhile: its next move may be seen
                self._last, self._awake_s, self.due_s = (at_s, energy_j), at_s, now_s + POLL_S
                self._blurred += 1
            else:
                old_s = min(unread_s, self.period_s or _USUAL_S)
                self._keep(at_s - old_s / 2, energy_j, at_s + self.anchor_s)
                self.error_s = max(self.error_s, old_s / 2 + now_s - at_s)
        elif at_s - self._awake_s > (_STILL_S if self.edges and self.edges[-1][1] == energy_j else _STOPPED_S):
            # It does not move at all. What it was first seen at is not known better than that; then any moment is as good.
            if not self.edges or self.edges[-1][1] != energy_j:
                self.edges.append((self._awake_s, energy_j))
            self._keep(at_s, energy_j, at_s + self.anchor_s)
        else:
            is_slow = at_s - self._awake_s > _STILL_S
            self._last, self.due_s = (at_s, energy_j), now_s + (SLOW_POLL_S if is_slow else POLL_S)

    def skip(self, now_s: float) -> None:
        """One reading failed: try again soon."""
        if self.due_s < math.inf:
            self.due_s = now_s + RETRY_S

    def finish(self, now_s: float) -> None:
        """Sampling ends: take the very next edge, then no more."""
        if self.due_s < math.inf:
            self.finishing, self.due_s, self._last = True, now_s, None

    def _edge(self, edge_s: float, energy_j: float) -> None:
        if self.edges:
            passed_s = edge_s - self.edges[-1][0]
            self.period_s = passed_s / (max(1, round(passed_s / self.period_s)) if self.period_s else 1)
        if self.period_s is None:
            self._keep(edge_s, energy_j, edge_s + POLL_S)
            return
        # The period is known better after every stride, so the strides may grow.
        self._stride = min(2 * self._stride, max(1, round(self.anchor_s / self.period_s)))
        lead_s = max(_LEAD_S, _LEAD_SHARE * self.period_s)
        self._keep(edge_s, energy_j, edge_s + self._stride * self.period_s - lead_s)

    def _keep(self, at_s: float, energy_j: float, due_s: float) -> None:
        """One more edge, and sleep until the next is due."""
        self.edges.append((at_s, energy_j))
        self.finishing, self._last, self.due_s, self._blurred = False, None, due_s, 0
