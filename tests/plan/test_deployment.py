"""What a calibration does not carry, and what clients would not wait for."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.plan.demand import demand_of_load
from pdbench.plan.deployment import deployment_of, parse_layout, unfit
from pdbench.plan.engine import Launch
from pdbench.plan.predict import draw_of, predict
from pdbench.plan.simulate import simulate
from tests.plan.test_predict import calibration, role


@pytest.mark.parametrize(
    ("launches", "sure", "limits", "words"),
    [
        (("beyond",), 1.0, {}, None),
        (("beyond",), 1.0, {"max_num_batched_tokens": 512}, "512 tokens at a time"),
        (("beyond",), 0.05, {"max_num_batched_tokens": 512}, None),
        (("beyond",), 0.05, {"captured": 2048}, "within the CUDA graphs"),
        (("within",), 0.05, {}, "beyond the CUDA graphs"),
        (("within",), 0.05, {"captured": 4096}, None),
        (("beyond", "within"), 0.05, {"captured": 4096}, None),
    ],
)
def test_steps_of_a_kind_that_did_not_calibrate_are_refused(
    launches: tuple[Launch, ...], sure: float, limits: dict[str, int], words: str | None
) -> None:
    """Chunks of prompts whose tokens' cost is not known, and launches on the other side of the CUDA graphs' end: --check takes a run's own limits."""
    engine = role().engine
    engine = msgspec.structs.replace(engine, limits=msgspec.structs.replace(engine.limits, **limits))
    known = msgspec.structs.replace(role(sure), engine=engine, chunks=(900, 2100), launches=launches)
    why = unfit(
        calibration(roles={"single": known}),
        parse_layout("single"),
        [demand_of_load(LoadConfig(rate=2.0, requests=40, input_tokens=1500), 0)],
    )
    assert why is None if words is None else why is not None and words in why


def test_an_engine_put_together_launches_decode_s_steps_in_every_draw() -> None:
    prefill = msgspec.structs.replace(role(host_decode_s=0.0), samples=[[*row[:-1], 0.0] for row in role().samples])
    together = calibration(roles={"prefill": prefill, "decode": role()})
    for random in (None, np.random.default_rng(0)):
        engine = deployment_of(together, parse_layout("single"), random).engines["single"]
        assert engine.costs.host_decode_s == 0.002


@pytest.mark.parametrize(
    ("timeout_s", "is_ended"), [(1e-3, True), (0.5, True), (5.0, False)], ids=["first", "whole", "none"]
)
def test_requests_that_a_client_would_have_ended_are_not_good(timeout_s: float, is_ended: bool) -> None:
    """All had met an SLO, after --request-timeout-s too: to the first token, or as a whole for each 256 tokens."""
    load = LoadConfig(rate=1.0, requests=40, input_tokens=1500, output_tokens=512, request_timeout_s=timeout_s)
    single, known = parse_layout("single"), calibration()
    result = simulate(deployment_of(known, single), demand_of_load(load, 0))
    assert draw_of([result], known, (1e6, None)).figures["slo_met_pct"] == (0 if is_ended else 100)
    refusal = predict(known, single, lambda draw: [demand_of_load(load, draw)], "", draws=4).refusal
    words = "100 % of the requests would be ended by --request-timeout-s: give a lower load, or a longer limit"
    assert refusal == (words if is_ended else None)


def test_load_that_may_end_before_its_duration_is_refused() -> None:
    load = LoadConfig(rate=2.0, input_tokens=100, duration_s=20.0)
    assert len(demand_of_load(load, 0)) > 20
    with pytest.raises(UserError, match="--steady-s ends a load by time"):
        demand_of_load(replace(load, steady_s=5.0), 0)
