"""Saved sweeps, one or several, as one table and one picture."""

import csv
import io
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdbench import sweep
from pdbench.analysis.run_analysis import analyze
from pdbench.config import Options
from pdbench.records import load_run, save_run
from pdbench.report import sweep as sweeps
from pdbench.report import text
from tests.support.processes import call_pdbench
from tests.support.runs import build_run


def saved_sweep(out: Path, vary: str, runs: Mapping[str, Mapping[str, Any]]) -> Path:
    """A sweep of these deployments' runs, built by these arguments."""

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        load = {"concurrency": options.load.concurrency, "slo_ttft_ms": 50.0}
        seed = zlib.crc32(f"{out.name} {part} {load}".encode())
        built = runs[part] | {"load": load | runs[part].get("load", {})}
        save_run(build_run(part, seed=seed, **built), folder / f"{part}_results")
        return [folder / f"{part}_results"]

    list(sweep.run(sweep.points(Options(), [vary]), out, measure, Console(quiet=True), parts=[*runs]))
    return out


def test_saved_sweeps_are_reported_as_one(tmp_path):
    one = saved_sweep(tmp_path / "one", "concurrency=2,1", {"single": {}})
    both = saved_sweep(tmp_path / "both", "concurrency=1,2", {"replicas": {}, "disaggregated": {}})
    for older in one.glob("*/point*.json"):
        known = json.loads(older.read_text())
        older.write_text(json.dumps({key: value for key, value in known.items() if key != "varied"}))
    out = tmp_path / "out"
    told = call_pdbench("report", one, both, "--out", out, cwd=tmp_path)
    assert told.returncode == 0 and (out / "sweep_curves.png").stat().st_size > 10_000
    assert "single (1 GPU)" in told.stdout and "disaggregated (2 GPUs)" in told.stdout
    rows = [*csv.DictReader(io.StringIO((out / "sweep_summary.csv").read_text()))]
    order = [(row["concurrency"], row["deployment"]) for row in rows]
    single = [("1", "single"), ("2", "single")]
    assert order == single + [(count, name) for name in ("replicas", "disaggregated") for count in "12"]
    for row in rows:
        folder = (one if row["deployment"] == "single" else both) / f"concurrency={row['concurrency']}"
        run = analyze(load_run(folder / f"{row['deployment']}_results"))
        assert float(row["tbt_p99_ms"]) == text.value(run, "tbt_p99_ms")


def test_deployments_of_one_name_keep_their_curves(tmp_path):
    def rows(name: str) -> list[str]:
        made = []
        for count in (1, 2):
            serve = {"prefill_instances": count, "decode_instances": 1}
            made.append(saved_sweep(tmp_path / f"{name}-{count}", "concurrency=1,2", {name: {"serve": serve}}))
        return [run.name for _varied, run in sweeps.joined({folder: sweep.load(folder) for folder in made})[0]]

    assert rows("disaggregated") == ["1P1D", "1P1D", "2P1D", "2P1D"]
    assert rows("single") == ["single single-1", "single single-1", "single single-2", "single single-2"]


@pytest.mark.parametrize(
    ("vary", "built", "words"),
    [
        ("seed=1,2", {}, "one varies concurrency and .*other seed: report them apart"),
        ("concurrency=1,2", {"model": "another"}, "not measured alike .*model"),
        ("concurrency=1,2", {"load": {"slo_ttft_ms": 90.0}}, "not measured alike .*slo_ttft_ms: 50.0 against 90.0"),
    ],
)
def test_sweeps_that_do_not_compare_are_refused(tmp_path, vary, built, words):
    one = saved_sweep(tmp_path / "one", "concurrency=1,2", {"single": {}})
    other = saved_sweep(tmp_path / "other", vary, {"replicas": built})
    told = call_pdbench("report", one, other, "--out", "out", cwd=tmp_path)
    assert told.returncode == 1 and re.search(words, told.stderr) and not (tmp_path / "out").exists()


def test_what_else_differs_between_sweeps_is_named(tmp_path):
    one = saved_sweep(tmp_path / "one", "concurrency=1,2", {"single": {}})
    other = saved_sweep(tmp_path / "other", "concurrency=1,2", {"replicas": {"serve": {"enforce_eager": False}}})
    told = call_pdbench("report", one, other, "--out", "out", cwd=tmp_path)
    assert told.returncode == 0 and "enforce_eager: True against False" in " ".join(told.stdout.split())
    assert "ran on" not in told.stdout
    alone = call_pdbench("report", one, "--out", "alone", cwd=tmp_path)
    assert alone.returncode == 0 and "differs" not in alone.stdout


def test_title_names_no_limit_that_the_sweep_varies():
    rows = []
    for limit in (50.0, 90.0):
        load = {"concurrency": 1, "requests": 16, "slo_ttft_ms": limit, "slo_tbt_ms": 9.0}
        rows.append(({"slo_ttft_ms": limit}, analyze(build_run("single", load=load))))
    titles = [panel.title for panel in sweeps.curves(rows).panels]
    assert "Goodput: requests/s with mean TBT ≤ 9 ms" in titles


def test_sweep_over_a_layout_keeps_its_points_apart_from_another_sweeps(tmp_path):
    def runs(*counts):
        serve = {"prefill_instances": counts[0], "decode_instances": 1}
        return {"disaggregated": {"serve": serve}}

    made = [saved_sweep(tmp_path / name / "s", "concurrency=1,2", runs(count)) for name, count in (("a", 1), ("b", 1))]
    names = [run.name for _varied, run in sweeps.joined({folder: sweep.load(folder) for folder in made})[0]]
    assert names == [f"disaggregated {made[0]}"] * 2 + [f"disaggregated {made[1]}"] * 2


def test_points_that_are_missing_are_named_and_no_other_sweep_is_replaced(tmp_path):
    both = saved_sweep(tmp_path / "both", "concurrency=1,2", {"replicas": {}, "disaggregated": {}})
    (both / "concurrency=2" / "point-replicas.json").unlink()
    told = call_pdbench("report", "both", "--out", "out", cwd=tmp_path)
    assert told.returncode == 0 and "not measured of replicas: concurrency 2" in told.stdout
    saved_sweep(tmp_path / "one", "concurrency=1,2", {"single": {}})
    told = call_pdbench("report", "both", "one", "--out", "one", cwd=tmp_path)
    assert told.returncode == 1 and "one holds a sweep of its own" in told.stderr
