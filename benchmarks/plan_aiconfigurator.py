"""NVIDIA's AIConfigurator beside `pdbench plan` and what was measured, for the recorded runs: one table (Markdown).

AIConfigurator takes a batch size, not a rate: it gets the mean number of requests that ran at once in the measurement (per engine), which
a prediction would not know. `pdbench plan` gets arrivals and lengths, and is calibrated by the other deployment of the same recording.
Try: python -m venv /tmp/aic; /tmp/aic/bin/pip install aiconfigurator
     python -m pdbench.serving.models deepseek-v2-lite /tmp/deepseek-v2-lite
     python benchmarks/plan_aiconfigurator.py --python /tmp/aic/bin/python --model /tmp/deepseek-v2-lite --out docs/results/plan/aiconfigurator.md
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdbench.analysis.run_analysis import analyze
from pdbench.files import write_whole
from pdbench.plan.calibration import calibrate
from pdbench.plan.check import check
from pdbench.records import Run, load_run
from pdbench.report import tables, text

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECORDINGS = {"h200x2-p2p-nccl": ("single", "disaggregated"), "h200x2-replicas": ("replicas", "disaggregated")}
FIGURES = ("ttft_p50_ms", "tbt_p50_ms", "e2e_p50_ms", "mean_power_w", "j_per_output_token")
MODES = ("SILICON", "HYBRID", "SOL")
DENSE = "meta-llama/Meta-Llama-3.1-8B"
# Runs in AIConfigurator's own environment: a list of cli_estimate()'s arguments in, for each its figures or its words out.
ASK = """
import contextlib, importlib.metadata, json, sys
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
print(json.dumps({"version": importlib.metadata.version("aiconfigurator"), "answers": answers}))
"""


@dataclass
class Point:
    """A measured run: mean requests at once in an engine that prefills or does both, and in one that decodes."""

    recording: str
    run: Run
    measured: dict[str, float]
    predicted: dict[str, float]
    instances: int
    batch: float

    @property
    def name(self) -> str:
        return "1p1d" if self.run.name == "disaggregated" else self.run.name

    def arguments(self, model: str, mode: str) -> dict[str, Any]:
        batch = max(1, round(self.batch))
        common = {
            "model_path": model,
            "system_name": "h200_sxm",
            "backend_name": "vllm",
            "database_mode": mode,
            "isl": 2048,
            "osl": 128,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
        }
        if self.run.name != "disaggregated":
            return common | {"mode": "agg", "batch_size": batch}
        workers = {
            "prefill_batch_size": 1,
            "prefill_num_workers": 1,
            "decode_batch_size": batch,
            "decode_num_workers": 1,
        }
        return common | {"mode": "disagg"} | workers


def points_of(recording: str, kinds: tuple[str, str], folder: Path) -> list[Point]:
    with tarfile.open(RESULTS / recording / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    runs = {kind: load_run(folder / f"{kind}_results") for kind in kinds}
    points = []
    for kind, other in (kinds, kinds[::-1]):
        run, path = runs[kind], Path(recording) / kind
        measured = {name: figure.value for name, figure in analyze(run).figures.items()}
        predicted: dict[str, float] = {}
        answer = check(calibrate({Path(other): runs[other]}), path, run, draws=12).predicted
        if answer.figures:
            predicted = {name: figure.value for name, figure in answer.figures.items()}
        requests = [request for request in run.requests if request.token_s and request.sent_s is not None]
        begin_s = [request.token_s[0] if kind == "disaggregated" else request.sent_s or 0.0 for request in requests]
        busy_s = sum(request.token_s[-1] - start_s for request, start_s in zip(requests, begin_s, strict=True))
        instances = 2 if kind == "replicas" else 1
        batch = busy_s / sum(trial.end_s - trial.start_s for trial in run.trials) / instances
        points.append(Point(recording, run, measured, predicted, instances, batch))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with aiconfigurator")
    parser.add_argument("--model", required=True, help="the folder of DeepSeek-V2-Lite's shape")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    points: list[Point] = []
    for recording, kinds in RECORDINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            points += points_of(recording, kinds, Path(folder))
    asked = [(model, mode, point) for model in (options.model, DENSE) for mode in MODES for point in points]
    arguments = [point.arguments(model, mode) for model, mode, point in asked]
    done = subprocess.run([options.python, "-c", ASK], input=json.dumps(arguments), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    reply = json.loads(done.stdout.splitlines()[-1])
    answers = dict(zip([(model, mode, id(point)) for model, mode, point in asked], reply["answers"], strict=True))
    shown = [
        table_of(points, answers, options.model, "DeepSeek-V2-Lite's shape, as measured"),
        dense_table(points, answers),
    ]
    words = (
        f"AIConfigurator {reply['version']}, vLLM back end, h200_sxm, 2,048 tokens in and 128 out, one GPU per engine."
    )
    text_of = "\n\n".join([words, *map(tables.markdown, shown)]) + "\n"
    write_whole(options.out, text_of.encode())
    print(text_of)


Answers = dict[tuple[str, str, int], dict[str, Any]]


def figures_of(answer: dict[str, Any]) -> dict[str, float]:
    """An answer's figures under the names of a run's; it gives means, and no power where it has none for the operations."""
    if "error" in answer:
        return {}
    found = {"ttft_p50_ms": answer["ttft"], "tbt_p50_ms": answer["tpot"]}
    found["e2e_p50_ms"] = answer["raw"]["request_latency"]
    return found | ({"mean_power_w": answer["power_w"]} if answer["power_w"] else {})


def table_of(points: list[Point], answers: Answers, model: str, title: str) -> tables.Table:
    rows: list[list[tables.Value]] = []
    for point in points:
        own = [figures_of(answers[model, mode, id(point)]) for mode in MODES]
        for metric in FIGURES:
            cells = [figures.get(metric, "refused") if figures else "refused" for figures in own]
            measured, predicted = point.measured.get(metric), point.predicted.get(metric)
            error = 100 * (predicted / measured - 1) if measured and predicted else None
            told = "refused" if predicted is None else predicted
            rows.append([f"{point.recording}: {point.name}", text.label(metric), measured, told, error, *cells])
    refusals = {answer["error"] for (name, _, _), answer in answers.items() if name == model and "error" in answer}
    lines = ["pdbench plan refuses 1p1d: a run of the other deployment alone does not show the handoff."]
    note = "\n\n".join([*lines, *(f"AIConfigurator: {words}" for words in sorted(refusals))])
    header = [
        "run",
        "figure",
        "measured",
        "pdbench plan",
        "its error, %",
        *(f"AIConfigurator, {mode}" for mode in MODES),
    ]
    return tables.Table(title=title, header=header, rows=rows, left=(0, 1), note=note)


def dense_table(points: list[Point], answers: Answers) -> tables.Table:
    """What it says of a dense model of 8B at the same points: nothing was measured beside it."""
    rows: list[list[tables.Value]] = []
    for point in points:
        for mode in ("SILICON", "SOL"):
            answer = answers[DENSE, mode, id(point)]
            figures = figures_of(answer)
            place = f"{point.name}, batch {max(1, round(point.batch))}"
            rows.append([place, mode, *(figures.get(metric) for metric in FIGURES[:4])])
    known = [answer for (name, mode, _), answer in answers.items() if name == DENSE and mode == "SILICON"]
    coverage = [answer["raw"].get("power_coverage") for answer in known if "raw" in answer]
    note = (
        f"Not measured by pdbench. Its data of power cover {max(coverage, default=0):.0%} of these operations, so that it gives none. "
        "It takes a batch size instead of arrivals; its figures are means, without intervals."
    )
    header = ["batch of", "database", "TTFT, ms", "TPOT, ms", "request latency, ms", "power, W"]
    return tables.Table(
        title=f"{DENSE} at the same batches, AIConfigurator only", header=header, rows=rows, left=(0, 1), note=note
    )


if __name__ == "__main__":
    main()
