"""NVIDIA's AIConfigurator beside `pdbench plan` and what was measured, for the recorded runs: one table (Markdown).

AIConfigurator takes a batch size, not a rate: it gets the mean number of requests that ran at once in the measurement (per engine), which
a prediction would not know. `pdbench plan` gets arrivals and lengths, and is calibrated by other runs of the same recording.
It is installed into an environment of its own, which the first call makes.
Try: python benchmarks/plan_aiconfigurator.py --out docs/results/plan/aiconfigurator-table.md
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdbench.analysis.run_analysis import analyze
from pdbench.files import write_whole
from pdbench.plan.calibration import calibrate
from pdbench.plan.check import check
from pdbench.plan.records import Prediction
from pdbench.records import Run, load_run
from pdbench.report import tables, text
from pdbench.serving.models import shape_model

VERSION = "0.12.0"
RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHAPE, DENSE = "DeepSeek-V2-Lite", "meta-llama/Meta-Llama-3.1-8B"
FIGURES = ("ttft_p50_ms", "mean_tbt_p50_ms", "e2e_p50_ms", "mean_power_w", "j_per_output_token")
MODES = ("SILICON", "HYBRID", "SOL")
# Runs in AIConfigurator's own environment: a list of cli_estimate()'s arguments in, for each its figures or its words out.
ASK = """
import contextlib, json, sys
from aiconfigurator.cli.api import cli_estimate
answers = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = cli_estimate(**arguments)
            raw = {k: v for k, v in dict(found.raw).items() if isinstance(v, (int, float, str))}
            answers.append({"ttft": found.ttft, "tpot": found.tpot, "power_w": found.power_w, "raw": raw})
        except BaseException as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Recording:
    """Runs of one model, by folder, each with those that calibrate what is predicted of it."""

    model: str
    calibrated: dict[str, tuple[str, ...]]


def of_other_rates(rates: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Runs of a sweep, each calibrated by those of the other rates."""
    return {
        f"rate={rate}/{kind}": tuple(f"rate={other}/{each}" for other in rates if other != rate for each in kinds)
        for rate in rates
        for kind in kinds
    }


RECORDINGS = {
    "h200x2-p2p-nccl": Recording(SHAPE, {"single": ("disaggregated",), "disaggregated": ("single",)}),
    "h200x2-replicas": Recording(SHAPE, {"replicas": ("disaggregated",), "disaggregated": ("replicas",)}),
    "h200x2-dense": Recording(DENSE, of_other_rates(("2.0", "4.0", "8.0"), ("replicas", "disaggregated"))),
}


@dataclass
class Point:
    """A measured run; `batch` is the mean number of requests at once in an engine that does both, or decodes."""

    name: str
    model: str
    run: Run
    measured: dict[str, float]
    predicted: Prediction
    batch: int

    def arguments(self, model: str, mode: str) -> dict[str, Any]:
        common = {
            "model_path": model,
            "system_name": "h200_sxm",
            "backend_name": "vllm",
            "database_mode": mode,
            "isl": 2048,
            "osl": 128,
        }
        common |= {"moe_tp_size": 1, "moe_ep_size": 1}
        if self.run.name != "disaggregated":
            return common | {"mode": "agg", "batch_size": self.batch}
        prefill = {"mode": "disagg", "prefill_batch_size": 1, "prefill_num_workers": 1}
        return common | prefill | {"decode_batch_size": self.batch, "decode_num_workers": 1}


def points_of(name: str, recording: Recording, folder: Path) -> list[Point]:
    with tarfile.open(RESULTS / name / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    points = []
    for target, others in recording.calibrated.items():
        run, path = load_run(folder / f"{target}_results"), Path(name) / target
        analysis = analyze(run)
        measured = {metric: found for metric in FIGURES if (found := text.value(analysis, metric)) is not None}
        calibration = calibrate({Path(other): load_run(folder / f"{other}_results") for other in others})
        predicted = check(calibration, path, run, draws=12).predicted
        busy_s = sum(
            request.token_s[-1] - (request.token_s[0] if run.name == "disaggregated" else request.sent_s)
            for request in run.requests
            if request.token_s and request.sent_s is not None
        )
        batch = busy_s / sum(trial.end_s - trial.start_s for trial in run.trials) / (2 if run.name == "replicas" else 1)
        points.append(Point(str(path), recording.model, run, measured, predicted, max(1, round(batch))))
    return points


def ask(environment: Path, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AIConfigurator's answers, from its environment, which is made where there is none."""
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"aiconfigurator=={VERSION}"], check=True)
    done = subprocess.run([python, "-c", ASK], input=json.dumps(arguments), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    environment = Path(tempfile.gettempdir()) / f"aiconfigurator-{VERSION}"
    parser.add_argument("--environment", type=Path, default=environment, help="with AIConfigurator; made if missing")
    options = parser.parse_args()
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, recording in RECORDINGS.items():
            points += points_of(name, recording, Path(folder) / name)
        shape = Path(folder) / "deepseek-v2-lite"
        shape_model(shape)
        asked = [(point, mode) for point in points for mode in MODES]
        models = {SHAPE: str(shape), DENSE: DENSE}
        found = ask(options.environment, [point.arguments(models[point.model], mode) for point, mode in asked])
    answers = {(point.name, mode): answer for (point, mode), answer in zip(asked, found, strict=True)}
    shown = [table(model, [point for point in points if point.model == model], answers) for model in (SHAPE, DENSE)]
    words = f"""AIConfigurator {VERSION}, vLLM back end, h200_sxm, 2,048 tokens in and 128 out, one GPU per engine. Errors are predicted over measured - 1.

It takes a batch size instead of arrivals, and got the one that was measured; its figures are means, without intervals: its TPOT stands beside the
median of the requests' mean TBT, its latency beside E2E p50. In brackets: 90 % intervals."""
    text_of = "\n\n".join([words, *map(tables.markdown, shown)]) + "\n"
    write_whole(options.out, text_of.encode())
    print(text_of)


Answers = dict[tuple[str, str], dict[str, Any]]


def figures_of(answer: dict[str, Any]) -> dict[str, float]:
    """An answer's figures under the names of a run's; it gives means, and no power where it has none for the operations."""
    if "error" in answer:
        return {}
    found = {"ttft_p50_ms": answer["ttft"], "mean_tbt_p50_ms": answer["tpot"]}
    found["e2e_p50_ms"] = answer["raw"]["request_latency"]
    return found | ({"mean_power_w": answer["power_w"]} if answer["power_w"] else {})


def table(model: str, points: list[Point], answers: Answers) -> tables.Table:
    rows: list[list[tables.Value]] = []
    refusals = {f"pdbench plan, {point.name}: {point.predicted.refusal}" for point in points if point.predicted.refusal}
    modes = [mode for mode in MODES if mode != "HYBRID" or any("error" in answers[each.name, mode] for each in points)]
    for point in points:
        own = point.predicted.figures
        for metric in FIGURES:
            measured = point.measured[metric]
            row: list[tables.Value] = [f"{point.name}, batch {point.batch}", text.label(metric), measured]
            if point.predicted.refusal or metric not in own:
                row += ["refused", None]
            else:
                figure = own[metric]
                interval = f"({text.number(figure.low)}-{text.number(figure.high)})"
                row += [f"{text.number(figure.value)} {interval}", error(figure.value, measured)]
            for mode in modes:
                answer = answers[point.name, mode]
                value = figures_of(answer).get(metric)
                row += ["refused" if "error" in answer else value, error(value, measured)]
            rows.append(row)
    refusals |= {f"AIConfigurator: {answers[each.name, mode].get('error')}" for each in points for mode in modes}
    known = [answer["raw"] for each in points if "raw" in (answer := answers[each.name, MODES[0]])]
    notes = sorted(each for each in refusals if not each.endswith("None"))
    if known:
        covered = max(raw.get("power_coverage") or 0 for raw in known)
        notes.append(f"AIConfigurator's data of power cover {covered:.0%} of these operations, so that it gives none.")
    columns = [words for mode in modes for words in (f"AIConfigurator, {mode}", "error")]
    return tables.Table(
        title=f"{model}'s shape, as measured",
        header=["run", "figure", "measured", "pdbench plan", "error", *columns],
        rows=rows,
        left=(0, 1),
        note="\n\n".join(notes),
    )


def error(value: float | None, measured: float) -> str | None:
    return None if value is None else f"{100 * (value / measured - 1):+.1f} %"


if __name__ == "__main__":
    main()
