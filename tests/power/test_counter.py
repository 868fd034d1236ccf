"""When the energy counter is read: as it moves, and again after a read that fails."""

import math
import threading
from typing import Any

import pytest

from pdbench.power.counter import RETRY_S, CounterEdgeTracker
from pdbench.power.device import Reader
from pdbench.power.sampler import Sampler, SystemTime, merge_records
from tests.support.runs import energy_over

BUSY_S, BUSY_W, IDLE_W = (5.0, 10.0), 500.0, 100.0


def drawn_j(t_s: float) -> float:
    return IDLE_W * t_s + (BUSY_W - IDLE_W) * (min(max(t_s, BUSY_S[0]), BUSY_S[1]) - BUSY_S[0])


class Script(SystemTime):
    """A clock that waiting and readings move on."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    unix = monotonic

    def cpu(self) -> float:
        return 0.0

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self.now_s += max(1e-5, seconds)
        if self.now_s > 15:
            stop.set()


class SlowReader(Reader):
    """A GPU whose every reading takes `read_s`; its counter moves every 100 ms, its buffer has an entry each 20 ms."""

    def __init__(self, index: int, script: Script, read_s: float) -> None:
        super().__init__(f"gpu{index}", "gpu", "G", index=index)
        self._script, self._read_s, self._phase_s, self._buffered = script, read_s, 0.013 * index, 0

    def read(self, now_s: float) -> dict[str, Any]:
        self._script.now_s += self._read_s
        at_s = self._script.now_s - self._read_s / 2
        return {"power_w": BUSY_W if BUSY_S[0] <= at_s < BUSY_S[1] else IDLE_W}

    def counter_j(self) -> float:
        self._script.now_s += 0.0024
        at_s = self._script.now_s - 0.0012
        return drawn_j((at_s - self._phase_s) // 0.1 * 0.1 + self._phase_s)

    def buffer(self, now_s: float) -> list[tuple[float, float]]:
        begin, self._buffered = self._buffered, int(now_s / 0.02)
        return [
            (n * 0.02, (drawn_j(n * 0.02) - drawn_j((n - 1) * 0.02)) / 0.02)
            for n in range(begin + 1, self._buffered + 1)
        ]


@pytest.mark.parametrize("read_s", [0.003, 0.03, 0.06, 0.1, 0.2])
def test_counters_of_eight_slow_gpus_are_caught_as_they_move(read_s: float) -> None:
    """Moves that fell into the readings of the other GPUs had been put into the middle of these: 88 J too many of 2,500, uncertain by 4."""
    script = Script()
    sampler = Sampler([SlowReader(index, script, read_s) for index in range(8)], 0.1, script)
    sampler.run()
    for device in merge_records(sampler.take()):
        assert len(device.energy_ticks) > 1
        for at_s, joules in device.energy_ticks:
            assert joules == pytest.approx(drawn_j(at_s), abs=0.055 * BUSY_W)
        window = energy_over(device, *BUSY_S)
        assert window.uncertain_j is not None
        assert window.energy_j == pytest.approx(2500, abs=window.uncertain_j)
        error_s = (device.sampling["energy_tick_error_ms"] or 0.0) / 1000
        assert all(abs(joules - drawn_j(at_s)) <= error_s * BUSY_W + 1e-6 for at_s, joules in device.energy_ticks)


def test_failed_read_does_not_end_the_counter() -> None:
    tracker = CounterEdgeTracker()
    for step in range(3):
        tracker.observe(0.04 * step, 100.0 * (step + 1), 0.04 * step)
    before = len(tracker.edges)
    tracker.skip(1.0)
    assert tracker.due_s == 1.0 + RETRY_S
    tracker.observe(1.1, 900.0, 1.1)
    tracker.observe(1.12, 910.0, 1.12)
    assert len(tracker.edges) > before


def test_missing_counter_is_not_read_again() -> None:
    tracker = CounterEdgeTracker()
    tracker.observe(0.0, None, 0.0)
    tracker.skip(1.0)
    assert tracker.due_s == math.inf and tracker.settled
