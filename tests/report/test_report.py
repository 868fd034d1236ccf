"""Pictures by their structure, tables and CSV by their content, the page by its data; nothing compared by bytes."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import plotly.graph_objects
import pytest
from fontTools.ttLib import TTFont
from PIL import Image
from rich.console import Console

from pdbench.analysis import verdicts
from pdbench.analysis.compare import compare
from pdbench.analysis.metrics import measure
from pdbench.analysis.run_analysis import analyze
from pdbench.analysis.summary import summarize
from pdbench.errors import UserError
from pdbench.records import Flag, Gate, save_run
from pdbench.report import commands, comparison_figure, figures, fonts, html, tables
from pdbench.report.digest import digest
from pdbench.report.export import requests_csv
from pdbench.report.language import WORDS
from pdbench.report.timeline import Timeline, lanes
from pdbench.report.words import load_in_words
from tests.support.runs import build_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    runs = [
        build_run("single", ttft_ms=20, tbt_ms=3.3),
        build_run(tbt_ms=1.5, seed=2, failed=1, flags=[Flag("client-limited", "a < b & c")]),
    ]
    for run in runs:
        save_run(run, place / f"{run.name}_results")
    return [place / f"{run.name}_results" for run in runs]


RUNS = {
    "usual": lambda: build_run(),
    "on a CPU": lambda: build_run("single", gpu=False),
    "one trial, many at once": lambda: build_run(trials=1, requests=200, concurrency=32, tokens=8),
    "one request": lambda: build_run(trials=1, requests=1),
    "one token": lambda: build_run(trials=1, requests=2, tokens=1),
    "empty": lambda: build_run(trials=0),
    "all failed": lambda: build_run(trials=1, requests=3, failed=3),
    "gate failed": lambda: build_run(
        gate=Gate(passed=False, prompts=4, equal_outputs=0, prompt_tokens=1, external_kv_tokens=0, detail="none equal")
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_analysis_is_drawn_for_every_kind_of_run(name, tmp_path):
    path = figures.performance_analysis(RUNS[name](), tmp_path / "picture.png")
    with Image.open(path) as picture:
        assert picture.size == (1600, 1500)
        assert len(picture.convert("RGB").resize((160, 150)).getcolors(100_000)) > 50
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", RUNS)
def test_the_comparison_is_drawn_for_every_kind_of_run(name, tmp_path):
    with Image.open(figures.comparison([RUNS["usual"](), RUNS[name]()], tmp_path / "picture.png")) as picture:
        assert picture.width == 1600


def test_three_deployments_share_a_comparison_with_different_colours():
    with figures.matplotlib.rc_context(figures.STYLE):
        picture = comparison_figure.draw([build_run("single"), build_run("replicas"), build_run()])
    heading = min(text.get_position()[1] for text in picture.texts if text.get_text())
    assert max(axis.get_position().y1 for axis in picture.axes) < heading - 0.03
    bars = next(axis for axis in picture.axes if axis.get_title(loc="left") == "Output tokens a second")
    assert len({patch.get_facecolor() for patch in bars.patches}) == 3


def test_no_text_of_the_pictures_is_cut_off():
    """Every text lies within the picture, long names and reasons included."""
    runs = [build_run("single", gpu=False, spread=0.5), build_run(gpu=False, spread=0.5, seed=3)]
    with figures.matplotlib.rc_context(figures.STYLE):
        picture = comparison_figure.draw(runs)
        figures.FigureCanvasAgg(picture).draw()
    width, height = picture.bbox.width, picture.bbox.height
    for axis in picture.axes:
        for text in axis.texts:
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()


def test_time_leaves_out_the_pauses_between_trials():
    run = build_run(trials=3, pause_s=1000.0)
    timeline = Timeline(run)
    assert len(timeline.stretches) == 3 and timeline.length_s < 60
    placed = timeline.place([run.trials[0].start_s, run.trials[0].end_s + 500.0, run.trials[2].end_s])
    assert placed[0] < placed[2] <= timeline.length_s and np.isnan(placed[1])


def test_lanes_never_overlap():
    requests = measure(build_run(trials=1, requests=60, concurrency=7)).requests
    rows, count = lanes(requests)
    assert count == 7
    for row in range(count):
        mine = [one for one, place in zip(requests, rows, strict=True) if place == row]
        assert all(a.end_s <= b.sent_s for a, b in pairwise(mine))


def test_the_csv_holds_every_measured_request():
    run = build_run(failed=1)
    rows = list(csv.DictReader(io.StringIO(requests_csv(run))))
    assert len(rows) == len(run.requests)
    assert rows[0]["error"] == "timeout" and rows[0]["ttft_ms"] == "" and rows[0]["queue_ms"] == ""
    assert float(rows[1]["ttft_ms"]) == pytest.approx((run.requests[1].token_s[0] - run.requests[1].sent_s) * 1e3)


def test_the_csv_quotes_what_needs_it_and_may_be_empty():
    run = build_run(trials=1, requests=2)
    run.requests[0].id = 'a "b", c'
    run.requests[1].finish_reason = "two\nlines"
    rows = list(csv.DictReader(io.StringIO(requests_csv(run), newline="")))
    assert rows[0]["id"] == 'a "b", c' and rows[1]["finish_reason"] == "two\nlines"
    assert requests_csv(build_run(trials=0), header=False) == ""


def test_tables_carry_flags_and_fit_eighty_columns():
    run = build_run(flags=[Flag("throttled", "GPU 0 was too hot")])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.summary_table(run))
    console.print(tables.comparison_table(build_run("single"), run))
    text = console.export_text()
    assert text.count("throttled") == 2 and "TTFT p50" in text and max(map(len, text.splitlines())) <= 80


def test_models_side_by_side_are_sorted_by_the_metric_asked_for():
    runs = [build_run(tbt_ms=tbt, model=f"m{tbt}") for tbt in (4, 2, 3)]
    rows = tables.side_by_side_rows(runs, ["a", "b", "c"], "tbt_p50_ms")
    assert [row[0] for row in rows.rows] == ["b", "c", "a"]
    assert [row[0] for row in tables.side_by_side_rows(runs, ["a", "b", "c"], "output_tokens_per_s").rows] == [
        "b",
        "c",
        "a",
    ]
    with pytest.raises(UserError, match="choose from"):
        tables.side_by_side_rows(runs, ["a", "b", "c"], "speed")


def test_a_report_leaves_page_markdown_csv_and_pictures(folders, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    commands.report(folders, tmp_path, None, "en", console)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "report.md", "requests.csv", "performance_comparison.png"} <= made
    assert "disaggregated_performance_analysis.png" in made
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 1 + 96
    assert "client-limited" in (tmp_path / "report.md").read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / "sweep" / point / "single_results" for point in ("concurrency=1", "concurrency=2")]
    for folder in folders:
        save_run(build_run("single", trials=1, requests=2), folder)
    names = commands.names_of([digest(folder) for folder in folders])
    assert names == ["concurrency=1_single_results", "concurrency=2_single_results"]
    assert commands.names_of([digest(folders[0])]) == ["single"]


def test_every_figure_of_the_page_is_valid_plotly(folders):
    page = html.page([digest(folder) for folder in folders], ["single", "disaggregated"])
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.S)[1].replace("\\u003c", "<"))
    assert {"distributions", "ttft", "tbt", "devices-0", "devices-1", "energy", "trade-off"} == set(plots)
    for plot in plots.values():
        figure = plotly.graph_objects.Figure(plot)
        assert figure.data and all(trace.hovertemplate or trace.hoverinfo for trace in figure.data)


def test_the_page_escapes_names_and_loads_nothing_from_elsewhere(folders):
    page = html.page([digest(folder) for folder in folders], ["<script>alert(1)</script>", "b"])
    assert "<script>alert" not in page and "a &lt; b &amp; c" in page
    before_plotly = page[: page.index('<script type="application/json"')]
    before_plotly = before_plotly.replace("http://127.0.0.1:8000", "")  # where the server answered
    assert "http://" not in before_plotly and "https://" not in before_plotly


def test_the_page_speaks_chinese(folders):
    page = html.page([digest(folder) for folder in folders], ["single", "disaggregated"], language="zh")
    assert 'lang="zh-Hans"' in page and "更好" in page and "延迟分布" in page
    assert all(english and chinese for english, chinese in WORDS.values())


def test_one_trial_shows_its_change_and_what_to_do(tmp_path):
    runs = [build_run("single", trials=1, ttft_ms=20), build_run(trials=1, ttft_ms=35, seed=2)]
    comparison = compare(*map(analyze, runs))
    folders = [save_run(run, tmp_path / run.name).parent for run in runs]
    page = html.page([digest(folder) for folder in folders], ["single", "disaggregated"])
    assert "--trials 3" in page and "worse so far" in page and "not judged" not in page
    assert page.index("--trials 3") < page.index("worse so far") < page.index("<table")
    rows = tables.comparison_rows(comparison)
    assert re.fullmatch(r"\+\d\d\.\d %", rows.rows[0][-1]) and "--trials 3" in rows.note
    assert verdicts.line(comparison.differences[0]).startswith(f"TTFT p50: {rows.rows[0][-1]}, one trial: no interval")
    with figures.matplotlib.rc_context(figures.STYLE):
        picture = comparison_figure.draw(runs)
    points = [line for line in picture.axes[0].lines if line.get_marker() == "o"]
    assert len(points) == len(comparison.differences)


@pytest.mark.parametrize("passed", [True, False, None])
def test_the_page_opens_with_the_gate(passed, tmp_path):
    gate = None if passed is None else Gate(
        passed=passed, prompts=4, equal_outputs=4, prompt_tokens=1, external_kv_tokens=1, detail="4 of 4 < 5"
    )  # fmt: skip
    save_run(build_run(gate=gate), tmp_path)
    page = html.page([digest(tmp_path)], ["disaggregated"])
    words = {True: "Correctness gate passed: 4 of 4 &lt; 5", False: "CORRECTNESS GATE FAILED", None: "gate not run"}
    assert words[passed] in page[page.index("<header") : page.index("</header")]


@pytest.mark.parametrize(
    ("load", "told"),
    [
        ({"concurrency": 4}, "4 at a time"),
        ({}, "1 at a time"),
        ({"rate": 2.5}, "2.5 requests/s"),
        ({"rate": 2.0, "ramp_to": 8.0, "concurrency": 16}, "2 → 8 requests/s, at most 16 at a time"),
        ({"stages": "1:60,4:30"}, "stages 1:60,4:30 (requests/s:s)"),
        ({"trace": "traces/AzureLLMInferenceTrace_conv.csv"}, "trace AzureLLMInferenceTrace_conv.csv"),
    ],
)
def test_the_heading_says_how_requests_came(load, told):
    assert load_in_words(build_run(load=load)).split("  ·  ")[1] == told


def test_warm_up_is_drawn_behind_the_curves(tmp_path):
    run = build_run(trials=1, requests=8)
    run.requests[0].warmup = True
    save_run(run, tmp_path)
    assert len(digest(tmp_path).spans) == 8


def test_pictures_are_chinese_where_a_font_is(tmp_path):
    """A font made for this test, found in a folder that matplotlib's own list does not know yet."""
    made = TTFont(Path(figures.matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    for record in made["name"].names:
        if record.nameID in (1, 4, 16):
            record.string = "WenQuanYi Test"
    (tmp_path / "fonts").mkdir()
    made.save(tmp_path / "fonts/wqy-test.ttf")
    command = [sys.executable, "-c", "from pdbench.report.fonts import chinese_font; print(chinese_font())"]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() not in ("", "None")


def test_without_a_chinese_font_the_pictures_are_english_and_it_says_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "chinese_font", lambda: None)
    console = Console(file=io.StringIO(), width=200)
    commands.compare_folders(folders, [], False, "zh", tmp_path / "picture.png", console)
    assert console.file.getvalue().count(fonts.NO_FONT) == 1 and (tmp_path / "picture.png").exists()


def test_a_condition_on_an_unknown_metric_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no metric tbt_p98_ms; there are ttft_p50_ms, .*mean_power_w"):
        commands.compare_folders([tmp_path, tmp_path], ["tbt_p98_ms > +5%"], False, "en", None, Console())


def test_a_folder_without_results_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.compare_folders([], [], False, "en", None, console)
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.report([], tmp_path / "report", None, "en", console)
    with pytest.raises(UserError, match="two results folders"):
        commands.compare_folders([tmp_path], [], False, "en", None, console)


def test_compare_returns_the_gates_exit_code(folders):
    console = Console(file=io.StringIO())
    assert commands.compare_folders(folders, ["ttft_p50_ms > +5%"], False, "en", None, console) == 1
    assert commands.compare_folders(folders, ["tbt_p50_ms > +500%"], False, "zh", None, console) == 0


def test_energy_is_told_by_role_or_says_why_not(folders):
    made = html.page([digest(folder) for folder in folders], ["single", "disaggregated"])
    assert "no meter splits them" in made and "J per computed prompt token" in made
    on_cpu = tables.energy_tables.both([summarize(build_run("single", gpu=False))], ["single"])
    assert len(on_cpu) == 1 and "no RAPL on this machine" in on_cpu[0].note
    assert {row[1] for row in on_cpu[0].rows} == {"not measured"}


def test_a_roles_parts_add_up_to_its_total():
    run = build_run(seed=2)
    for device in run.devices:
        device.idle_power_w = {"engine_ready": 100.0}
    roles = tables.energy_tables.roles_of(summarize(run))
    assert list(roles) == ["prefill", "decode"]
    for role in roles.values():
        parts = tables.energy_tables.parts_j(role)
        assert list(parts) == ["active", "idle", "waiting"]
        assert sum(parts.values()) == pytest.approx(role["total_j"], rel=1e-6)
