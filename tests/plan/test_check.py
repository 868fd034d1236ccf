"""A run beside its prediction: what is taken of the run itself."""

import numpy as np
import pytest

from pdbench.events import ProxyEvent
from pdbench.plan.check import own_speed
from pdbench.plan.steps import Part, Stream, visits_of
from pdbench.records import Clock, Run
from tests.plan.test_predict import calibration


def prefill_part(took_s: float) -> Part:
    """An instance that got ten prompts, one at a time."""
    run = Run(name="disaggregated", clock=Clock(0.0, 0.0), config={}, host={}, versions={})
    ways = {
        str(number): ProxyEvent(request_id=str(number), prefill_sent_s=number, prefill_done_s=number + took_s)
        for number in range(10)
    }
    streams = [Stream(name, [float(name) + took_s], 1000, 1000) for name in ways]
    return Part(run, 0, "prefill", 0, streams, {}, ways, visits=visits_of(run, streams, ways))


def test_own_speed_is_that_of_all_instances_of_a_role() -> None:
    usual_s = 0.005 + 0.03 + 0.001  # way in, host, host's part per token
    fast, slow = prefill_part(usual_s), prefill_part(0.005 + 2 * 0.031)
    costs = calibration().roles["prefill"].engine.costs
    alone = own_speed(calibration(), [slow])
    both = own_speed(calibration(), [fast, slow])
    assert alone["host_prefill_s"] == pytest.approx(2 * costs.host_prefill_s)
    speed = both["host_prefill_s"] / costs.host_prefill_s
    assert 1 < speed < 2
    assert sorted(np.multiply(speed, both["noise"][0])) == pytest.approx([1.0] * 10 + [2.0] * 10)
