"""What a refusal names as its remedy, and the command below refusals."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.plan.demand import demand_of_load
from pdbench.plan.deployment import parse_layout
from pdbench.plan.engine import Box, Role
from pdbench.plan.predict import PREEMPTED, predict
from pdbench.plan.records import Calibration, Prediction, RoleCalibration
from pdbench.plan.remedy import command_for
from pdbench.plan.search import search
from pdbench.planning import CALIBRATION, plan
from pdbench.report import plan as report
from tests.plan.test_predict import calibration, role

COMMAND = "pdbench calibrate --against replicas,disaggregated --max-model-len=4096 --input-tokens=2048"
LOAD = LoadConfig(rate=60.0, requests=100, input_tokens=2048, output_tokens=100)


def refused(layout: str, **changes: object) -> Prediction:
    made = Prediction(layout=parse_layout(layout), load="60 requests/s", refusal="too large")
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("layout", "ramp_to"), [("4p4d", "18.8"), ("2p6d", "37.5"), ("replicas:10", "15"), ("single", "150")]
)
def test_ramp_ends_beyond_what_an_instance_gets(layout: str, ramp_to: str) -> None:
    command = command_for(calibration(command=COMMAND), [refused(layout)], LOAD) or ""
    assert command.endswith(f"--ramp-to={ramp_to}")
    assert "--input-tokens=2048 --output-tokens=100 " in command and "--max-model-len=4096" in command


def test_ramp_for_decode_has_prefill_instances_that_serve_it() -> None:
    command = command_for(calibration(command=COMMAND), [refused("4p1d")], LOAD) or ""
    costs = calibration().roles["prefill"].engine.costs
    needed = 75 * float(costs.gpu_prompt_s(np.array([2048]))[0])
    assert 1 < needed < 2 and command.endswith("--prefill-instances=2 --rate=7.5 --ramp-to=75")


@pytest.mark.parametrize(
    ("layouts", "kinds"),
    [
        (("2p1d",), "disaggregated"),
        (("replicas:3", "single"), "replicas"),
        (("2p1d", "single"), "replicas,disaggregated"),
    ],
)
def test_deployments_that_need_no_measurement_are_left_out(layouts: tuple[str, ...], kinds: str) -> None:
    every = [refused("single", saturated=True), *map(refused, layouts)]
    command = command_for(calibration(command=COMMAND), every, LOAD) or ""
    assert command.startswith(f"pdbench calibrate --against {kinds} --max-model-len")


def test_lengths_are_those_of_the_load() -> None:
    long = LoadConfig(concurrency=4, requests=20, input_tokens=6000, output_tokens=100)
    command = command_for(calibration(command=COMMAND), [refused("1p1d")], long) or ""
    assert "--max-model-len=7168" in command and command.endswith("--input-tokens=6000 --output-tokens=100")
    assert command.count("--input-tokens") == 1 and "--rate" not in command
    outputs = LoadConfig(rate=2.0, requests=20, input_tokens=2048, output_tokens=5000)
    command = command_for(calibration(command=COMMAND), [refused("1p1d")], outputs) or ""
    assert "--max-model-len=12288 " in command and "--max-output-tokens=10000 " in command
    many = LoadConfig(concurrency=64, requests=200, input_tokens=2048, output_tokens=100)
    assert command_for(calibration(command=COMMAND), [refused("1p1d")], many) is None, "its full load has 32 at a time"


def test_no_queue_grows_in_a_closed_loop() -> None:
    load = LoadConfig(concurrency=400, requests=200, input_tokens=2048, output_tokens=100)
    answer = predict(wide(8), parse_layout("single"), lambda draw: [demand_of_load(load, draw)], "", draws=4)
    assert "than any run" in (answer.refusal or "") and not answer.saturated


def test_no_queue_grows_in_a_burst(tmp_path: Path) -> None:
    """All of it comes at once: it is the closed loop of as many streams."""
    trace = tmp_path / "burst.jsonl"
    row = json.dumps({"timestamp": 0, "input_length": 1500, "output_length": 100})
    trace.write_text("\n".join([row] * 40))
    burst = LoadConfig(trace=str(trace))
    closed = LoadConfig(concurrency=40, requests=40, input_tokens=1500, output_tokens=100)
    for layout in ("single", "replicas:4"):
        one, other = (
            predict(wide(20), parse_layout(layout), lambda draw, load=load: [demand_of_load(load, draw)], "", draws=4)
            for load in (burst, closed)
        )
        assert (one.refusal, one.saturated) == (other.refusal, False)
        assert ("than any run" in (one.refusal or "")) == (layout == "single")


def test_many_prefill_instances_do_not_hide_a_decode_beyond_its_range() -> None:
    answer, _ = overloaded(wide(sequences=8), "16p1d", rate=20, requests=400, output_tokens=60)
    assert "than any run" in (answer.refusal or ""), "7 % of decode's time, 4 % of all engines'"


def test_ramp_of_a_trace_is_of_its_mean_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * number, "input_length": 1000, "output_length": 40} for number in range(101)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    command = command_for(calibration(command=COMMAND), [refused("2p2d")], LoadConfig(trace=str(trace))) or ""
    assert command.endswith("--input-tokens=1000 --output-tokens=40 --rate=0.631 --ramp-to=6.31")


def test_no_command_is_given_that_would_not_help() -> None:
    found = calibration(command=COMMAND)
    growing, full = refused("1p1d", saturated=True), refused("1p1d", refusal=PREEMPTED, measurable=False)
    assert command_for(found, [growing, full], LOAD) is None
    assert command_for(calibration(), [refused("1p1d")], LOAD) is None, "nobody knows how the servers were started"
    table = report.predictions([refused("1p1d")], on_gpus=True, remedy=command_for(found, [refused("1p1d")], LOAD))
    assert "measured by `pdbench calibrate" in table.note


@pytest.mark.parametrize(
    ("timeout_s", "kv_cache_tokens", "words"), [(1.0, None, "timeout-s"), (600.0, 1024, "KV cache")]
)
def test_what_no_measurement_changes_has_no_command(
    timeout_s: float, kv_cache_tokens: int | None, words: str, tmp_path: Path
) -> None:
    made = wide().roles["single"]
    limits = msgspec.structs.replace(made.engine.limits, kv_cache_tokens=kv_cache_tokens)
    engine = msgspec.structs.replace(made.engine, limits=limits)
    found = calibration(roles={"single": msgspec.structs.replace(made, engine=engine)}, command=COMMAND)
    load = LoadConfig(rate=1.0, requests=40, input_tokens=1500, output_tokens=400, request_timeout_s=timeout_s)
    answer = predict(found, parse_layout("single"), lambda draw: [demand_of_load(load, draw)], "", draws=4)
    assert words in (answer.refusal or "") and not answer.saturated
    (searched,) = search(found, lambda draw: demand_of_load(load, draw), "", slo=(500.0, None), most_gpus=1).candidates
    for refused_one in (answer, searched):
        assert refused_one.refusal == answer.refusal and command_for(found, [refused_one], load) is None
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(found))
    with pytest.raises(UserError, match="no deployment is predicted"):
        plan([tmp_path], (), [], replace(load, slo_ttft_ms=500.0), tmp_path / "out", Console(quiet=True), most_gpus=1)
    assert (tmp_path / "out" / "plan.md").exists()


def wide(sequences: int = 64, sure: float = 0.05) -> Calibration:
    """Engines calibrated in steps of so many sequences, with as many prompt tokens and context as any load has."""
    box = Box(prompt_tokens=8192, sequences=sequences, context_tokens=1_000_000)
    made: dict[Role, RoleCalibration] = {"prefill": role(sure), "decode": role(ingress_s=0.0), "single": role(sure)}
    roles = {
        name: msgspec.structs.replace(each, engine=msgspec.structs.replace(each.engine, box=box))
        for name, each in made.items()
    }
    return calibration(roles=roles, command=COMMAND)


def overloaded(found: Calibration, layout: str, **load: int) -> tuple[Prediction, str | None]:
    """Its prediction, and the command that measures what is missing."""
    config = LoadConfig(input_tokens=1500, **load)
    answer = predict(found, parse_layout(layout), lambda draw: [demand_of_load(config, draw)], "", draws=12)
    return answer, command_for(found, [answer], config)


def test_a_ttft_that_a_queue_near_its_limit_decides_is_no_missing_measurement() -> None:
    answer, command = overloaded(wide(), "1p4d", rate=62, requests=600, output_tokens=32)
    assert answer.refusal == (
        "TTFT p50 anywhere from 66 to 1,472 ms: the load is near the limit of the prefill instances, or beyond it: "
        "give more of them, or a lower load"
    )
    assert not answer.saturated and command is None
    unsure, command = overloaded(wide(sure=1.0), "single", rate=30, requests=300, output_tokens=32)
    assert "measure spread lengths and more trials" in (unsure.refusal or "")
    assert command and command.endswith("--ramp-to=75")


@pytest.mark.parametrize(("layout", "where"), [("replicas:2", "the instances"), ("4p1d", "the decode instances")])
def test_larger_steps_of_a_queue_that_grows_are_an_overload(layout: str, where: str) -> None:
    answer, command = overloaded(wide(sequences=16), layout, rate=60, requests=300, output_tokens=400)
    assert answer.refusal == (
        f"the load is beyond what {where} serve, and their queue grows: give more of them, or a lower load"
    )
    assert answer.saturated and command is None
    assert report.predictions([answer], on_gpus=True).note.count("queue grows") == 1


def test_a_queue_in_front_of_decode_grows_too() -> None:
    """Though prefill gives the first token, so that TTFT does not show it."""
    answer, _ = overloaded(wide(), "4p1d", rate=38, requests=300, output_tokens=200)
    assert answer.saturated and answer.figures["ttft_p50_ms"].high < 100
    assert "the queue grows" in report.predictions([answer], on_gpus=True).note


@pytest.mark.parametrize(("reached", "guess"), [(7900, False), (6000, True)])
def test_box_that_reached_the_token_budget_holds_every_step(reached: int, guess: bool) -> None:
    """A closed loop begins with steps as large as the budget (8,192 tokens)."""
    made = role()
    box = Box(prompt_tokens=reached, sequences=64, context_tokens=400_000)
    found = calibration(
        roles={"single": msgspec.structs.replace(made, engine=msgspec.structs.replace(made.engine, box=box))}
    )
    load = LoadConfig(concurrency=16, requests=60, input_tokens=2048, output_tokens=8)
    answer = predict(found, parse_layout("single"), lambda draw: [demand_of_load(load, draw)], "", draws=4)
    assert ("prompt tokens in one step than any run" in (answer.refusal or "")) == guess
