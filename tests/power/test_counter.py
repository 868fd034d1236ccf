"""When the energy counter is read: as it moves, and again after a read that fails."""

import math

from pdbench.power.counter import RETRY_S, CounterEdgeTracker


def test_failed_read_does_not_end_the_counter() -> None:
    tracker = CounterEdgeTracker()
    for step in range(3):
        tracker.observe(0.1 * step, 100.0 * (step + 1), 0.1 * step)
    before = len(tracker.edges)
    tracker.skip(1.0)
    assert tracker.due_s == 1.0 + RETRY_S
    tracker.observe(1.1, 900.0, 1.1)
    assert len(tracker.edges) > before


def test_missing_counter_is_not_read_again() -> None:
    tracker = CounterEdgeTracker()
    tracker.observe(0.0, None, 0.0)
    tracker.skip(1.0)
    assert tracker.due_s == math.inf and tracker.settled
