"""Predictions and refusals as tables."""

import io

from rich.console import Console

from pdbench.report import plan as report
from pdbench.report.tables import Terminal, markdown
from tests.plan.test_predict import calibration, predicted, role


def test_refusals_stand_below_their_load_each_in_a_paragraph() -> None:
    unsure = calibration(roles={"single": role(sure=1.0)})
    refused = [predicted(unsure, wanted, input_tokens=4000) for wanted in ("single", "replicas:2000")]
    assert all("prompts of 4,000 tokens" in (each.refusal or "") for each in refused)
    table = report.predictions(refused, on_gpus=True)
    written = io.StringIO()
    Console(file=written, width=400).print(Terminal(table))
    lines = written.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines if line] == ["Predicted", "single", "replicas"]
    assert "\n\nreplicas:2000: refused" in markdown(table)
    answered = predicted(calibration(), "replicas:2000")
    assert "replicas:2000 (2,000 GPUs)" in report.predictions([answered], on_gpus=True).header
