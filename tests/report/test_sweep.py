"""Saved sweeps, one or several, as one table and one picture."""

import csv
import io
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from pdbench import sweep
from pdbench.analysis.run_analysis import RunAnalysis, analyze
from pdbench.config import Options
from pdbench.records import Flag, load_run, save_run
from pdbench.report import mpl, text
from pdbench.report import sweep as sweeps
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


TRACES = [f"/data/loads/{name}.jsonl" for name in ("rate-4", "rate-12", "rate-20", "bursts-12", "conversations-long")]


def rows_of_traces(*names: str, void: str = "") -> list[tuple[dict[str, Any], RunAnalysis]]:
    """A run per trace and deployment, slower from trace to trace; that of `void` does not count."""
    return [
        ({"trace": trace}, analyze(run))
        for name in names
        for number, trace in enumerate(TRACES, 1)
        for flags in [[Flag("gate-failed", "3 of 4")] * (trace == void)]
        for load in [{"concurrency": number, "trace": trace, "slo_ttft_ms": 200.0}]
        for run in [
            build_run(name, trials=1, requests=6, load=load, concurrency=number, ttft_ms=20.0 * number**3, flags=flags)
        ]
    ]


def test_files_have_short_names_and_the_csv_their_paths():
    rows = rows_of_traces("replicas", "disaggregated")
    assert [row[0] for row in sweeps.table(rows).cells[:2]] == ["rate-4", "rate-12"]
    chart = sweeps.curves(rows)
    assert chart.caption == "names at the points: trace"
    assert chart.panels[0].series[0].labels[:2] == ("rate-4", "rate-12")
    assert chart.panels[-1].y.names[0] == "replicas, trace rate-4"
    assert [row["trace"] for row in csv.DictReader(io.StringIO(sweeps.csv_of(rows)))] == TRACES * 2
    assert sweeps.missing(rows[:-1]) == ["not measured of disaggregated: trace conversations-long"]


def test_words_have_no_lines_and_no_knee_and_each_is_a_row():
    panels = sweeps.curves(rows_of_traces("replicas", "disaggregated", void=TRACES[1])).panels
    for panel in panels[:4]:
        assert [series.name for series in panel.series] == ["replicas", "disaggregated", "does not count"]
        assert [series.width for series in panel.series[:2]] == [0, 0]
    names = ["rate-4", "rate-12", "rate-20", "bursts-12", "conversations-long"]
    for panel in panels[2:4]:
        one, other, void = (series.y for series in panel.series)
        assert panel.y.names == names and panel.x.label and panel.x.low == 0
        assert [round(y) for y in one] == [round(y) for y in other] == [0, 2, 3, 4] and void == (1, 1)
        assert not {*one} & {*other}


@pytest.mark.parametrize("last", [4, None])
def test_numbers_have_lines_with_a_knee_beside_none_too(last):
    rows = [
        ({"concurrency": value}, analyze(build_run(trials=1, requests=8, concurrency=number, ttft_ms=5.0 * 3**number)))
        for number, value in enumerate((1, 2, 3, last), 1)
    ]
    chart = sweeps.curves(rows)
    assert chart.caption.startswith("numbers at the points")
    assert [series.name for series in chart.panels[0].series] == ["disaggregated", "knee"]
    for panel in (chart.panels[0], chart.panels[3]):
        assert panel.series[0].width and not panel.y.names


def test_names_of_values_do_not_overlap_in_the_picture():
    with matplotlib.rc_context(mpl.STYLE):
        figure = mpl.chart(sweeps.curves(rows_of_traces("replicas", "disaggregated")), 16, 15)
        FigureCanvasAgg(figure).draw()
    for axis in figure.axes[2:4]:
        ticks = [tick.get_window_extent() for tick in axis.get_yticklabels()]
        assert [tick.get_text() for tick in axis.get_yticklabels()][-1] == "conversations-long"
        assert not any(a.overlaps(b) for place, a in enumerate(ticks) for b in ticks[:place])
    (beside,) = [axis.get_tightbbox() for axis in figure.axes[3:4]]
    assert beside.x0 > figure.axes[2].get_window_extent().x1 and figure.axes[2].get_tightbbox().x0 > 0
