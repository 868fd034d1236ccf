"""The command below refusals."""

import json
from pathlib import Path

import msgspec
import pytest

from pdbench.config import LoadConfig
from pdbench.plan.deployment import parse_layout
from pdbench.plan.predict import PREEMPTED
from pdbench.plan.records import Prediction
from pdbench.plan.remedy import command_for
from pdbench.report import plan as report
from tests.plan.test_predict import calibration

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


def test_lengths_are_those_of_the_load() -> None:
    long = LoadConfig(concurrency=4, requests=20, input_tokens=6000, output_tokens=100)
    command = command_for(calibration(command=COMMAND), [refused("1p1d")], long) or ""
    assert "--max-model-len=7168" in command and command.endswith("--input-tokens=6000 --output-tokens=100")
    assert command.count("--input-tokens") == 1 and "--rate" not in command


def test_ramp_of_a_trace_is_of_its_mean_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * number, "input_length": 1000, "output_length": 40} for number in range(101)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    command = command_for(calibration(command=COMMAND), [refused("2p2d")], LoadConfig(trace=str(trace))) or ""
    assert command.endswith("--input-tokens=1000 --output-tokens=40 --rate=0.631 --ramp-to=6.31")


def test_no_command_is_given_that_would_not_help() -> None:
    found = calibration(command=COMMAND)
    growing, full = refused("1p1d", saturated=True), refused("1p1d", refusal=PREEMPTED)
    assert command_for(found, [growing, full], LOAD) is None
    assert command_for(calibration(), [refused("1p1d")], LOAD) is None, "nobody knows how the servers were started"
    table = report.predictions([refused("1p1d")], on_gpus=True, remedy=command_for(found, [refused("1p1d")], LOAD))
    assert "measured by `pdbench calibrate" in table.note
