"""Pictures by their structure, tables and CSV by their content, the page by its data; nothing compared by bytes."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import plotly.graph_objects
import pytest
from fontTools.ttLib import TTFont
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from pdbench.analysis import run_analysis
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze, load_analysis
from pdbench.errors import UserError
from pdbench.records import Flag, Gate, load_run, save_run
from pdbench.report import commands, mpl, run_charts, tables, text
from pdbench.report.page import page
from tests.support.runs import build_run


def gate(passed: bool, detail: str = "4 of 4 < 5") -> Gate:
    return Gate(passed=passed, prompts=4, equal_outputs=4, prompt_tokens=1, external_kv_tokens=1, detail=detail)


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


@pytest.fixture(scope="module")
def analyses(folders):
    return [load_analysis(folder) for folder in folders]


def page_of(analyses, names=None):
    names = names or [analysis.name for analysis in analyses]
    comparisons = [compare(analyses[0], other, anyway=True, names=(names[0], "b")) for other in analyses[1:]]
    return page(analyses, names, comparisons, tables.side_by_side(analyses, names))


def drawn(figure_of, *arguments):
    """The figure after it was drawn, so that its texts have their places."""
    with matplotlib.rc_context(mpl.STYLE):
        figure = figure_of(*arguments)
        FigureCanvasAgg(figure).draw()
    return figure


RUNS = {
    "usual": lambda: build_run(),
    "on a CPU": lambda: build_run("single", gpu=False),
    "one trial, many at once": lambda: build_run(trials=1, requests=200, concurrency=32, tokens=8),
    "one token": lambda: build_run(trials=1, requests=2, tokens=1),
    "empty": lambda: build_run(trials=0),
    "all failed": lambda: build_run(trials=1, requests=3, failed=3),
    "check failed": lambda: build_run(gate=gate(False)),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_drawn(name):
    usual, other = analyze(build_run("single")), analyze(RUNS[name]())
    with Image.open(io.BytesIO(mpl.picture(mpl.performance_analysis, other, other.name))) as picture:
        assert picture.size == (1600, 1500)
        assert len(picture.convert("RGB").resize((160, 150)).getcolors(100_000)) > 50
    compared = [compare(usual, other, anyway=True, names=("a", "b"))]
    with Image.open(io.BytesIO(mpl.picture(mpl.comparison, [usual, other], ["a", "b"], compared))) as picture:
        assert picture.width == 1600
    assert "<table" in page_of([usual, other], ["a", "b"])


def test_three_deployments_share_a_comparison_with_different_colours():
    runs = [analyze(build_run(name)) for name in ("single", "replicas", "disaggregated")]
    names = [run.name for run in runs]
    figure = drawn(mpl.comparison, runs, names, [None, None])
    heading = min(label.get_position()[1] for label in figure.texts if label.get_text())
    assert max(axis.get_position().y1 for axis in figure.axes) < heading - 0.03
    bars = next(axis for axis in figure.axes if axis.get_title(loc="left") == "Output tokens/s")
    assert len({patch.get_facecolor() for patch in bars.patches}) == 3


@pytest.mark.parametrize("gpu", [True, False])
def test_no_text_of_the_comparison_is_cut_off(gpu):
    """Long names, reasons and warnings included."""
    flags = [Flag("short-window", ""), Flag("throttled", ""), Flag("interrupted", "")]
    runs = [
        analyze(build_run(name, gpu=gpu, spread=0.5, seed=len(name), flags=flags))
        for name in ("single", "disaggregated")
    ]
    figure = drawn(mpl.comparison, runs, ["single", "disaggregated"], [compare(*runs, anyway=True)])
    for label in [*figure.texts, *(label for axis in figure.axes for label in axis.texts)]:
        box = label.get_window_extent()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 1600 and box.y1 <= figure.bbox.height, label.get_text()


def test_pictures_name_the_flags(analyses):
    figure = drawn(mpl.performance_analysis, analyses[1], "disaggregated")
    assert "warnings: client-limited, short-window" in [label.get_text() for label in figure.texts]


def test_every_panel_has_titles_and_labels_that_do_not_collide():
    run = analyze(build_run())
    figure = drawn(mpl.chart, run_charts.latency_distributions([run], ["a"]), 15, 10)
    title = figure.texts[0].get_window_extent()
    assert not any(axis.title.get_window_extent().overlaps(title) for axis in figure.axes)


def test_csv_holds_every_measured_request():
    run = build_run(failed=1)
    rows = list(csv.DictReader(io.StringIO(requests_csv(run))))
    assert len(rows) == len(run.requests)
    assert rows[0]["error"] == "timeout" and rows[0]["ttft_ms"] == "" and rows[0]["queue_ms"] == ""
    assert float(rows[1]["ttft_ms"]) == pytest.approx((run.requests[1].token_s[0] - run.requests[1].sent_s) * 1e3)
    assert rows[1]["output_tokens"] == "64"


def requests_csv(run):
    return ",".join(tables.REQUEST_COLUMNS) + "\n" + tables.requests_csv(analyze(run))


def test_csv_quotes_what_needs_it_and_may_be_empty():
    run = build_run(trials=1, requests=2)
    run.requests[0].id = 'a "b", c'
    run.requests[1].finish_reason = "two\nlines"
    rows = list(csv.DictReader(io.StringIO(requests_csv(run), newline="")))
    assert rows[0]["id"] == 'a "b", c' and rows[1]["finish_reason"] == "two\nlines"
    assert tables.requests_csv(analyze(build_run(trials=0))) == ""


def test_tables_fit_eighty_columns():
    single, run = analyze(build_run("single")), analyze(build_run(flags=[Flag("throttled", "GPU 0 was too hot")]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*map(tables.terminal, tables.run_summary(run)), *tables.warnings("disaggregated", run), sep="\n")
    console.print(tables.terminal(tables.comparison(compare(single, run))))
    shown = console.export_text()
    assert "throttled: GPU 0 was too hot" in shown and "TTFT p50" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_none_is_a_dash_and_zero_is_zero():
    table = tables.Table(title="t", header=["", "a", "b"], rows=[["x", None, 0.0], ["y", 12345.6, 7]])
    assert table.cells == [["x", "–", "0"], ["y", "12,346", "7"]]
    assert tables.csv_text(table) == ",a,b\nx,,0.0\ny,12345.6,7\n"
    assert tables.markdown(table).splitlines()[2:] == [
        "|  | a | b |",
        "| --- | ---: | ---: |",
        "| x | – | 0 |",
        "| y | 12,346 | 7 |",
    ]


def test_models_side_by_side_are_sorted_by_the_metric():
    runs = [analyze(build_run(tbt_ms=tbt, model=f"m{tbt}")) for tbt in (4, 2, 3)]
    for metric in ("tbt_p50_ms", "output_tokens_per_s"):
        assert [row[0] for row in tables.side_by_side(runs, ["a", "b", "c"], metric).rows] == ["b", "c", "a"]
    with pytest.raises(UserError, match="choose from"):
        tables.side_by_side(runs, ["a", "b", "c"], "speed")


def test_merged_tokens_are_shown_where_they_are_many():
    run = build_run(trials=1, requests=4)
    assert "Gaps of 0 ms" not in str(tables.run_summary(analyze(run))[0].rows)
    for request in run.requests:
        request.token_s[1::2] = request.token_s[::2]
    assert "Gaps of 0 ms" in str(tables.run_summary(analyze(run))[0].rows)


def test_report_leaves_page_markdown_csv_and_pictures(folders, tmp_path):
    commands.report(folders, tmp_path, None, Console(file=io.StringIO(), width=200))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "report.md", "requests.csv", "performance_comparison.png"} <= names
    assert "disaggregated_performance_analysis.png" in names
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 1 + 96
    markdown = (tmp_path / "report.md").read_text()
    assert "client-limited" in markdown and "3 of 48: timeout 3" in markdown


def test_markdown_and_page_say_what_differs_between_the_runs(tmp_path):
    for name, load in (("single", {"concurrency": 1}), ("disaggregated", {"concurrency": 4})):
        save_run(build_run(name, load=load, trials=2), tmp_path / name)
    commands.report([tmp_path / "single", tmp_path / "disaggregated"], tmp_path, None, Console(file=io.StringIO()))
    differs = "load, concurrency: 1 against 4"
    assert f"**differs: **{differs}" in (tmp_path / "report.md").read_text()
    assert differs in (tmp_path / "report.html").read_text()


def test_brackets_in_a_path_are_no_markup(folders, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    commands.report(folders[:1], tmp_path / "r [bold]", None, console)
    assert f"{tmp_path}/r [bold]/report.html" in console.file.getvalue()


def test_runs_of_one_name_are_named_by_their_folders(tmp_path):
    folders = [tmp_path / "sweep" / point / "single_results" for point in ("concurrency=1", "concurrency=2")]
    runs = [analyze(build_run("single", trials=1, requests=2))] * 3
    names = commands.names_of(runs[:2], folders)
    assert names == ["concurrency=1_single_results", "concurrency=2_single_results"]
    assert commands.names_of(runs[:1], folders[:1]) == ["single"]
    assert len(set(commands.names_of(runs, [*folders, folders[0]]))) == 3


def test_a_name_from_a_file_does_not_choose_the_folder(tmp_path):
    run = build_run("single", trials=1, requests=2)
    save_run(run, tmp_path / "run")
    saved = tmp_path / "run" / "single_results.json"
    saved.write_text(saved.read_text().replace('"name": "single"', '"name": "../../outside"'))
    commands.report([tmp_path / "run"], tmp_path / "a" / "report", None, Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.rglob("*outside*")] == [".._.._outside_performance_analysis.png"]


def test_one_measurement_is_analyzed_and_drawn_once_and_read_from_no_disk(tmp_path, monkeypatch):
    runs = {tmp_path / f"{run.name}_results": run for run in (build_run("single"), build_run())}
    for folder, run in runs.items():
        save_run(run, folder)
    calls = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (calls.append(name), function(*arguments))[1])

    for module, name in (
        (commands, "analyze"),
        (mpl, "performance_analysis"),
        (mpl, "comparison"),
        (run_analysis, "timings_of"),
    ):
        counted(module, name)
    monkeypatch.setattr("pdbench.records.load_run", None)
    monkeypatch.setattr(run_analysis, "load_run", None)
    console = Console(file=io.StringIO(), width=200)
    analyses = commands.finish(runs, tmp_path, console)
    assert [analysis.name for analysis in analyses] == ["single", "disaggregated"]
    assert {name: calls.count(name) for name in calls} == {
        "analyze": 2, "timings_of": 2, "performance_analysis": 2, "comparison": 1,
    }  # fmt: skip
    monkeypatch.undo()
    for analysis, folder in zip(analyses, runs, strict=True):
        assert load_run(folder).summary["ttft_ms"]["p50"] == analysis.summary.ttft_ms.p50
        assert (folder / "analysis.json").exists() and (folder / f"{analysis.name}_performance_analysis.png").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"performance_comparison.png", "report"}
    assert (tmp_path / "report" / "report.html").exists()
    assert "TTFT p50" in console.file.getvalue() and "results: " in console.file.getvalue()


def test_flags_with_which_figures_do_not_count_are_errors():
    commands.exit_on_flags([analyze(build_run(trials=1, requests=2))])
    with pytest.raises(UserError, match="gate-failed: none equal"):
        commands.exit_on_flags([analyze(build_run(trials=1, requests=2, gate=gate(False, "none equal")))])


def plots_of(html):
    return json.loads(re.search(r'id="plots">(.*?)</script>', html, re.S)[1].replace("\\u003c", "<"))


def test_every_chart_of_the_page_is_valid_plotly(analyses):
    plots = plots_of(page_of(analyses))
    assert {"verdicts", "distributions", "ttft", "tbt", "devices-0", "devices-1", "energy", "trade-off"} == set(plots)
    for plot in plots.values():
        for layout in ("wide", "narrow"):
            figure = plotly.graph_objects.Figure({"data": plot["data"], "layout": plot[layout]})
            assert figure.data and all(trace.hovertemplate or trace.hoverinfo for trace in figure.data)


def test_panels_are_below_each_other_in_a_narrow_window(analyses):
    plot = plots_of(page_of(analyses))["distributions"]
    assert [plot["wide"][axis]["domain"][0] for axis in ("xaxis", "xaxis2", "xaxis3")] == pytest.approx([0, 0.35, 0.7])
    assert "domain" not in plot["narrow"]["xaxis2"]
    tops = [plot["narrow"][axis]["domain"][1] for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert tops == sorted(tops, reverse=True) and plot["narrow"]["height"] > 2 * plot["wide"]["height"]


def test_every_gap_of_a_short_run_is_drawn():
    run = build_run(trials=1, requests=3, tokens=20)
    chart = run_charts.tbt_over_time([analyze(run)], ["a"])
    assert [len(series.x) for series in chart.panels[0].series] == [3 * 19]
    assert np.isfinite(chart.panels[0].series[0].x).all()


def test_page_escapes_names_and_loads_nothing_from_elsewhere(analyses):
    html = page_of(analyses, ["<script>alert(1)</script>", "b"])
    assert "<script>alert" not in html and "a &lt; b &amp; c" in html
    before_plotly = html[: html.index('<script type="application/json"')]
    before_plotly = before_plotly.replace("http://127.0.0.1:8000", "")  # where the server answered
    assert "http://" not in before_plotly and "https://" not in before_plotly


def test_page_separates_not_judged_from_not_significant(analyses):
    answer = page_of(analyses)
    answer = answer[answer.index('class="answer"') : answer.index("<table")]
    assert re.search(r"not judged</b>\s*TTFT p99, E2E p99", answer)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_chinese_leaves_no_text_in_english(folders, tmp_path, monkeypatch):
    missing = set()
    translate_saved = text._translate_saved

    def recorded(english):
        chinese = translate_saved(english)
        # Names (of options, devices, GPU models) stay as they are.
        if chinese == english and " " in english and english != "Synthetic H200":
            missing.add(english)
        return chinese

    monkeypatch.setattr(text, "_translate_saved", recorded)
    monkeypatch.setattr(mpl, "chinese_font", lambda: "DejaVu Sans")
    for gpu in (True, False):
        for run in (
            build_run("single", gpu=gpu, load={"rate": 2.0}),
            build_run(
                gpu=gpu,
                trials=2,
                failed=1,
                gate=gate(True, "4 of 4 greedy outputs equal; 3 of 3 prompt tokens came to decode as external KV"),
            ),
        ):
            save_run(run, tmp_path / f"{gpu}" / run.name)
        places = [tmp_path / f"{gpu}" / name for name in ("single", "disaggregated")]
        console = Console(file=io.StringIO(), width=200)
        with text.language("zh"):
            commands.report(places, tmp_path / "out", None, console)
            commands.compare_folders(places, ["ttft_p50_ms > +5%"], True, None, console)
            commands.plot(places[1], tmp_path / "devices.png", console)
        html = (tmp_path / "out" / "report.html").read_text()
        assert 'lang="zh-Hans"' in html and "更好" in html and "延迟分布" in html
    assert missing == set()


def test_one_trial_shows_its_change_and_what_to_do():
    runs = [analyze(build_run("single", trials=1, ttft_ms=20)), analyze(build_run(trials=1, ttft_ms=35, seed=2))]
    compared, html = compare(*runs), page_of(runs)
    assert "--trials 3" in html and "worse so far" in html and "not judged" not in html
    assert html.index("--trials 3") < html.index("worse so far") < html.index("<table")
    table = tables.comparison(compared)
    assert re.fullmatch(r"\+\d\d\.\d %", table.rows[0][-1]) and "--trials 3" in table.note
    figure = drawn(mpl.comparison, runs, ["single", "disaggregated"], [compared])
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(points) == len(compared.differences)


@pytest.mark.parametrize("passed", [True, False, None])
def test_page_opens_with_the_correctness_check(passed):
    html = page_of([analyze(build_run(gate=None if passed is None else gate(passed)))])
    words = {
        True: "Correctness check passed: 4 of 4 &lt; 5",
        False: "CORRECTNESS CHECK FAILED",
        None: "Correctness check not run",
    }
    assert words[passed] in html[html.index("<header") : html.index("</header")]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"concurrency": 4}, "4 at a time"),
        ({}, "1 at a time"),
        ({"rate": 2.5}, "2.5 requests/s"),
        ({"rate": 2.0, "ramp_to": 8.0, "concurrency": 16}, "2 → 8 requests/s, at most 16 at a time"),
        ({"stages": "1:60,4:30"}, "stages 1:60,4:30 (requests/s:s)"),
        ({"trace": "traces/AzureLLMInferenceTrace_conv.csv"}, "trace AzureLLMInferenceTrace_conv.csv"),
    ],
)
def test_heading_says_how_requests_came(load, words):
    assert text.loads([analyze(build_run(load=load))], ["a"]).split(" · ")[1] == words


def test_heading_says_once_what_runs_share():
    runs = [analyze(build_run("single", model="m", gpu=True)), analyze(build_run(model="m", load={"rate": 2.0}))]
    assert text.loads(runs, ["a", "b"]).startswith("model m · a: 1 at a time; b: 2 requests/s · ")
    assert " · a: 1 x Synthetic H200; b: 2 x Synthetic H200 · " in text.machines(runs, ["a", "b"])


def test_warm_up_is_drawn_behind_the_curves():
    run = build_run(trials=1, requests=8)
    run.requests[0].warmup = True
    boxes = [
        series for series in run_charts.device_curves(analyze(run), "a").panels[0].series if series.kind == "boxes"
    ]
    assert [len(series.y) for series in boxes] == [8, 8]


def test_many_requests_are_drawn_as_a_count():
    chart = run_charts.device_curves(analyze(build_run(trials=1, requests=8)), "a", most_boxes=5)
    assert [series.kind for series in chart.panels[0].series if series.behind] == ["area"]


def test_pictures_are_chinese_where_a_font_is(tmp_path):
    """A font made for this test, found in a folder that matplotlib's own list does not know yet."""
    font = TTFont(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            record.string = "WenQuanYi Test"
    (tmp_path / "fonts").mkdir()
    font.save(tmp_path / "fonts/wqy-test.ttf")
    command = [sys.executable, "-c", "from pdbench.report.mpl import chinese_font; print(chinese_font())"]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() not in ("", "None")


def test_pictures_without_a_chinese_font_are_english_and_it_says_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(mpl, "chinese_font", lambda: None)
    console = Console(file=io.StringIO(), width=200)
    with text.language("zh"):
        commands.compare_folders(folders, [], False, tmp_path / "picture.png", console)
        assert console.file.getvalue().count(text.translate(mpl.NO_FONT)) == 1
    assert (tmp_path / "picture.png").exists()


def test_unknown_metric_of_a_condition_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no metric tbt_p98_ms; there are ttft_p50_ms, .*mean_power_w"):
        commands.compare_folders([tmp_path, tmp_path], ["tbt_p98_ms > +5%"], False, None, Console())


def test_folder_without_results_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.compare_folders([], [], False, None, console)
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.report([], tmp_path / "report", None, console)
    with pytest.raises(UserError, match="two results folders"):
        commands.compare_folders([tmp_path], [], False, None, console)


def test_compare_returns_the_exit_code_of_the_conditions(folders):
    console = Console(file=io.StringIO(), width=200)
    assert commands.compare_folders(folders, ["ttft_p50_ms > +5%"], False, None, console) == 1
    assert re.search(r"fails ttft_p50_ms > \+5%: \+\d+\.\d %, 95 % interval \+", console.file.getvalue())
    with text.language("zh"):
        assert commands.compare_folders(folders, ["tbt_p50_ms > +500%"], False, None, console) == 0
    assert "合格 tbt_p50_ms" in console.file.getvalue()


def test_energy_is_given_by_role_or_one_line_says_why_not(analyses):
    html = page_of(analyses)
    assert "no meter splits them" in html and "Prefill, J per prompt token" in html
    (table,) = tables.energy([analyze(build_run("single", gpu=False))], ["single"])
    assert not table.rows and table.note == "not measured: no RAPL on this machine"
    assert tables.markdown(table) == "## Energy\n\nnot measured: no RAPL on this machine"
    console = Console(width=80, file=io.StringIO())
    console.print(tables.terminal(table))
    assert console.file.getvalue() == "Energy: not measured: no RAPL on this machine\n"


def test_parts_of_a_role_add_up_to_its_total():
    roles = analyze(build_run(seed=2)).summary.energy.roles
    assert list(roles) == ["prefill", "decode"]
    for role in roles.values():
        parts = tables.energy_parts(role)
        assert list(parts) == ["active_j", "idle_j", "waiting_j"]
        assert sum(parts.values()) == pytest.approx(role.total_j, rel=1e-6)


@pytest.mark.parametrize(
    ("gpu", "titles"),
    [(True, ["Power", "Clocks", "Temperature", "Utilisation", "Power against"]), (False, ["CPU use", "CPU clock"])],
)
def test_plot_has_a_panel_for_what_was_measured_alone(gpu, titles, tmp_path):
    folder = save_run(build_run(gpu=gpu, trials=2), tmp_path / "results").parent
    chart = run_charts.monitored(load_analysis(folder), commands.read_devices(folder))
    assert len(chart.panels) == len(titles)
    assert all(panel.title.startswith(title) for panel, title in zip(chart.panels, titles, strict=True))
    assert gpu or "Power not measured: no RAPL on this machine" in chart.caption
    assert len(chart.panels[0].pauses) == 1
    for source in (folder, sorted(folder.glob("*_gpu_data.json"))[0]):
        commands.plot(source, tmp_path / "devices.png", Console(file=io.StringIO()))
        with Image.open(tmp_path / "devices.png") as picture:
            assert picture.size == (1500, 1000)
