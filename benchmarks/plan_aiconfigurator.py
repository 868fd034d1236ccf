"""NVIDIA's AIConfigurator beside `pdbench plan` and what was measured, for the recorded runs: one table (Markdown).

AIConfigurator takes a batch size, not a rate: it gets the mean number of requests that ran at once in the measurement (per engine), which
a prediction would not know. `pdbench plan` gets arrivals and lengths, and is calibrated by the other deployment of the same recording.
It is installed into an environment of its own, which the first call makes.
Try: python benchmarks/plan_aiconfigurator.py --out docs/results/plan/aiconfigurator-table.md
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdbench.analysis.run_analysis import analyze
from pdbench.files import write_whole
from pdbench.plan.calibration import calibrate
from pdbench.plan.check import check
from pdbench.records import Run, load_run
from pdbench.report import tables, text
from pdbench.serving.models import shape_model

VERSION = "0.12.0"
RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECORDINGS = {"h200x2-p2p-nccl": ("single", "disaggregated"), "h200x2-replicas": ("replicas", "disaggregated")}
FIGURES = ("ttft_p50_ms", "tbt_p50_ms", "e2e_p50_ms", "mean_power_w", "j_per_output_token")
MODES = ("SILICON", "HYBRID", "SOL")
DENSE = "meta-llama/Meta-Llama-3.1-8B"
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


@dataclass
class Point:
    """A measured run; `batch` is the mean number of requests at once in an engine that does both, or decodes."""

    recording: str
    run: Run
    measured: dict[str, float]
    predicted: dict[str, float]
    batch: int

    @property
    def name(self) -> str:
        return "1p1d" if self.run.name == "disaggregated" else self.run.name

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


def points_of(recording: str, kinds: tuple[str, str], folder: Path) -> list[Point]:
    with tarfile.open(RESULTS / recording / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    runs = {kind: load_run(folder / f"{kind}_results") for kind in kinds}
    points = []
    for kind, other in (kinds, kinds[::-1]):
        run, path = runs[kind], Path(recording) / kind
        measured = {name: figure.value for name, figure in analyze(run).figures.items()}
        answer = check(calibrate({Path(other): runs[other]}), path, run, draws=12).predicted
        predicted = {name: figure.value for name, figure in answer.figures.items()}
        busy_s = sum(
            request.token_s[-1] - (request.token_s[0] if kind == "disaggregated" else request.sent_s)
            for request in run.requests
            if request.token_s and request.sent_s is not None
        )
        batch = busy_s / sum(trial.end_s - trial.start_s for trial in run.trials) / (2 if kind == "replicas" else 1)
        points.append(Point(recording, run, measured, predicted, max(1, round(batch))))
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
        for recording, kinds in RECORDINGS.items():
            points += points_of(recording, kinds, Path(folder) / recording)
        model = Path(folder) / "deepseek-v2-lite"
        shape_model(model)
        asked = [(name, mode, point) for name in (str(model), DENSE) for mode in MODES for point in points]
        found = ask(options.environment, [point.arguments(name, mode) for name, mode, point in asked])
    answers = {
        ("dense" if name == DENSE else "measured", mode, id(point)): answer
        for (name, mode, point), answer in zip(asked, found, strict=True)
    }
    shown = [measured_table(points, answers), dense_table(points, answers)]
    words = f"AIConfigurator {VERSION}, vLLM back end, h200_sxm, 2,048 tokens in and 128 out, one GPU per engine."
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


def measured_table(points: list[Point], answers: Answers) -> tables.Table:
    rows: list[list[tables.Value]] = []
    for point in points:
        own = [figures_of(answers["measured", mode, id(point)]) for mode in MODES]
        for metric in FIGURES:
            measured, predicted = point.measured[metric], point.predicted.get(metric)
            error = predicted and 100 * (predicted / measured - 1)
            cells = [figures.get(metric, "refused") for figures in own]
            name = f"{point.recording}: {point.name}"
            rows.append([name, text.label(metric), measured, predicted or "refused", error, *cells])
    refusals = {answer["error"] for (name, _, _), answer in answers.items() if name == "measured" and "error" in answer}
    lines = ["pdbench plan refuses 1p1d: a run of the other deployment alone does not show the handoff."]
    modes = [f"AIConfigurator, {mode}" for mode in MODES]
    return tables.Table(
        title="DeepSeek-V2-Lite's shape, as measured",
        header=["run", "figure", "measured", "pdbench plan", "its error, %", *modes],
        rows=rows,
        left=(0, 1),
        note="\n\n".join([*lines, *(f"AIConfigurator: {words}" for words in sorted(refusals))]),
    )


def dense_table(points: list[Point], answers: Answers) -> tables.Table:
    """What it says of a dense model of 8B at the same points: nothing was measured beside it."""
    rows: list[list[tables.Value]] = []
    for point in points:
        for mode in ("SILICON", "SOL"):
            answer = answers["dense", mode, id(point)]
            figures = figures_of(answer)
            rows.append([f"{point.name}, batch {point.batch}", mode, *(figures.get(metric) for metric in FIGURES[:4])])
    known = [answer for (name, mode, _), answer in answers.items() if name == "dense" and mode == "SILICON"]
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
