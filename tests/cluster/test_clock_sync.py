"""Clocks of nodes that are put on the head's: pure functions."""

import random

import pytest

from pdbench.cluster.clock_sync import NodeClock, identity, move_request
from pdbench.records import RequestRecord


def test_offset_is_within_its_uncertainty_though_the_clock_drifts_and_ways_are_uneven() -> None:
    draw = random.Random(3)

    def node_reads(head_s: float) -> float:
        return (head_s - 5000.0) * (1 + 40e-6)

    clock = NodeClock()
    for beat in range(120):
        for _ in range(4):
            there_s, back_s = draw.expovariate(1 / 400e-6), draw.expovariate(1 / 200e-6)
            sent_s = 9000.0 + beat
            clock.add(sent_s, node_reads(sent_s + there_s), sent_s + there_s + back_s)
    uncertainty_s = clock.uncertainty_s
    assert uncertainty_s is not None and 0 < uncertainty_s < 1e-3
    for head_s in (9001.0, 9033.3, 9060.0, 9118.0):
        node_s = node_reads(head_s)
        assert abs(node_s + clock.offset_s(node_s) - head_s) <= uncertainty_s + 4e-6 * 40
    assert clock.facts()["drift_us_per_s"] == pytest.approx(-40, abs=15)


def test_same_clock_needs_no_estimate_and_an_unknown_one_has_no_uncertainty() -> None:
    assert identity() == identity() != ""
    same = NodeClock(same=True)
    same.add(0.0, 5.0, 1.0)
    assert same.offset_s(3.0) == 0.0 and same.uncertainty_s == 0.0
    assert NodeClock().uncertainty_s is None


def test_moved_request_keeps_its_durations_and_its_unknowns() -> None:
    request = RequestRecord(
        id="r", planned_s=1.0, sent_s=1.5, token_s=[2.0, 2.5], phases={"queue": (1.6, 1.7), "decode": None}
    )
    moved = move_request(request, lambda instant: instant + 10)
    assert (moved.planned_s, moved.sent_s, moved.token_s, moved.end_s) == (11.0, 11.5, [12.0, 12.5], None)
    assert moved.phases == {"queue": (11.6, 11.7), "decode": None}
