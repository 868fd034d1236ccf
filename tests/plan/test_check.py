"""A run beside its prediction: what is taken of the run itself."""

import msgspec
import numpy as np
import pytest

from pdbench.events import EngineFacts, ProxyEvent
from pdbench.plan.check import own_speed, unmeasured
from pdbench.plan.engine import Limits
from pdbench.plan.steps import Part, Stream, visits_of
from pdbench.records import Clock, Run
from tests.plan.test_predict import calibration, role


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


@pytest.mark.parametrize(
    ("then", "now", "known", "words"),
    [
        ({}, {}, False, None),
        ({}, {"max_num_batched_tokens": 512}, False, "512 tokens at a time"),
        ({}, {"max_num_batched_tokens": 512}, True, None),
        ({}, {"captured": 2048}, True, "within the CUDA graphs"),
        ({"captured": 2048}, {}, True, "beyond the CUDA graphs"),
        ({"captured": 2048}, {"captured": 4096}, True, None),
        ({"captured": 2048}, {"captured": 4096, "max_num_batched_tokens": 512}, True, None),
    ],
)
def test_steps_of_a_kind_that_did_not_calibrate_are_refused(
    then: dict[str, int], now: dict[str, int], known: bool, words: str | None
) -> None:
    """Chunks of prompts whose tokens' cost is not known, and launches on the other side of the CUDA graphs' end."""
    usual = {"max_num_batched_tokens": 8192, "max_num_seqs": 64, "captured": 16}
    engine = role().engine
    engine = msgspec.structs.replace(engine, limits=Limits(**(usual | then)))
    calibrated = msgspec.structs.replace(
        role(sure=0.05 if known else 1.0), engine=engine, prompt_lengths=(1000, 2000) if known else (1500, 1500)
    )
    engines = {
        "single-0": EngineFacts(role="single", graph_sizes=[(usual | now)["captured"]], **usual_facts(usual | now))
    }
    run = Run(name="single", clock=Clock(0.0, 0.0), config={}, host={"gpus": [{}]}, versions={}, engines=engines)
    why = unmeasured(calibration(roles={"single": calibrated}), run, "single", np.array([1500] * 20))
    assert why is None if words is None else why is not None and words in why


def usual_facts(limits: dict[str, int]) -> dict[str, int]:
    return {name: limits[name] for name in ("max_num_batched_tokens", "max_num_seqs")}
