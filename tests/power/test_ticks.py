"""When the energy counter is read: its own ticks, and one read that fails."""

import math

from pdbench.power.ticks import RETRY_S, TickFollower


def test_one_read_that_fails_does_not_end_the_counter() -> None:
    follower = TickFollower()
    for step in range(3):
        follower.seen(0.1 * step, 100.0 * (step + 1), 0.1 * step)
    before = len(follower.ticks)
    follower.missed(1.0)
    assert follower.due_s == 1.0 + RETRY_S
    follower.seen(1.1, 900.0, 1.1)
    assert len(follower.ticks) > before


def test_a_counter_that_is_none_is_never_asked_again() -> None:
    follower = TickFollower()
    follower.seen(0.0, None, 0.0)
    follower.missed(1.0)
    assert follower.due_s == math.inf and follower.settled
