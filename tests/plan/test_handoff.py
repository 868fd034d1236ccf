"""Handoffs from prefill to decode: measured in decode's steps, and as long as these are at another load."""

import msgspec
import numpy as np
import pytest

from pdbench.events import ProxyEvent
from pdbench.plan.calibration import handoff_of
from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Handoff, Layout, Limits
from pdbench.plan.simulate import simulate
from pdbench.plan.steps import Part, Stream, rebuild
from pdbench.records import Clock, RequestRecord, Run

LIMITS = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=16)


def engine(step_s: float) -> Engine:
    costs = Costs(
        host_decode_s=0.001, host_prefill_s=0.03, gpu_decode_s={16: step_s}, gpu_prefill_s=0.001, gpu_per_prompt_token_s=1e-6
    )  # fmt: skip
    return Engine(costs=costs, limits=LIMITS)


def decode_part(step_s: float, steps_each: list[int]) -> Part:
    """One long stream, and others that join it so many steps after prefill had answered."""
    long = Stream("long", (step_s * np.arange(1, 40 * len(steps_each))).tolist(), 100, 0)
    streams, requests, ways = [long], {}, {}
    for number, steps in enumerate(steps_each):
        # Its first token is handed out as step `first` is, so it was scheduled two steps earlier, and could be some time in the step before.
        first = 20 + 30 * number
        came_s = step_s * (first - 1.5 - steps)
        stream = Stream(f"{number}", (step_s * (first + 1 + np.arange(5))).tolist(), 100, 0)
        streams.append(stream)
        ways[stream.id] = ProxyEvent(request_id=stream.id, prefill_done_s=came_s, first_token_s=came_s)
    for stream in streams:
        requests[stream.id] = RequestRecord(
            id=stream.id, planned_s=0.0, token_s=list(stream.token_s), prompt_tokens=100, warmup=stream is long
        )
        ways.setdefault(stream.id, ProxyEvent(request_id=stream.id))
    run = Run(name="disaggregated", clock=Clock(0.0, 0.0), config={}, host={}, versions={})
    return Part(run, 0, "decode", 0, streams, requests, ways, rebuild(streams))


@pytest.mark.parametrize("step_s", [0.004, 0.012])
def test_handoff_is_a_number_of_decode_steps(step_s: float) -> None:
    handoff = handoff_of([decode_part(step_s, [4, 4, 2, 4, 6, 4, 4])], engine(step_s))
    assert handoff and handoff.steps == pytest.approx(4, abs=0.01)
    assert handoff.noise == (pytest.approx((1, 1, 0.5, 1, 1.5, 1, 1), abs=0.01),)
    assert handoff.prefill_opens > 0.8


def test_simulated_handoff_takes_as_many_steps_of_any_length() -> None:
    count = 60
    load = Demand(
        t_s=np.arange(count) * 0.1,
        prompt_tokens=np.full(count, 100),
        output_tokens=np.full(count, 40),
        cached_tokens=np.zeros(count, int),
    )
    took_ms = []
    for step_s in (0.004, 0.012):
        deployment = Deployment(
            layout=Layout("disaggregated", {"prefill": 1, "decode": 1}),
            engines={"prefill": engine(0.004), "decode": engine(step_s)}, handoff=Handoff(steps=4.0),
        )  # fmt: skip
        result = simulate(deployment, load)
        assert result.ready_s - result.computed_s == pytest.approx(4 * step_s)
        assert (result.joined_s >= result.ready_s).all()
        handoff = Handoff(steps=4.0, noise=((0.5, 1.0), (2.0,)))
        noisy = simulate(msgspec.structs.replace(deployment, handoff=handoff), load)
        assert sorted(noisy.ready_s - noisy.computed_s)[::20] == pytest.approx([2 * step_s, 4 * step_s, 8 * step_s])
        took_ms.append(1e3 * (result.joined_s - result.computed_s).mean())
    assert took_ms[1] == pytest.approx(3 * took_ms[0], rel=0.2)
