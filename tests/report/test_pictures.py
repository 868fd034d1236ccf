"""Pictures by their structure: what is drawn, where texts stand, in which language."""

import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from pdbench.analysis.compare import compare, comparisons
from pdbench.analysis.run_analysis import analyze, load_analysis
from pdbench.plan.engine import Layout
from pdbench.plan.records import Figure, Prediction
from pdbench.records import Clock, DeviceRecord, DeviceSample, Flag, Run, save_devices, save_run
from pdbench.report import charts, commands, mpl, page, tables, text
from pdbench.report.chart_types import BAD, GOOD, ORANGE, Axis, Chart, Panel, Series
from pdbench.report.plan import predictions_chart
from tests.support.reports import gate, page_of
from tests.support.runs import build_run


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
    with Image.open(io.BytesIO(mpl.picture(mpl.comparison, {"a": usual, "b": other}, compared))) as picture:
        assert picture.width == 1600
    assert "<table" in page_of([usual, other], ["a", "b"])


def test_three_deployments_share_a_comparison_with_different_colours():
    runs = {name: analyze(build_run(name)) for name in ("single", "replicas", "disaggregated")}
    figure = drawn(mpl.comparison, runs, comparisons(runs))
    heading = min(label.get_position()[1] for label in figure.texts if label.get_text())
    assert max(axis.get_position().y1 for axis in figure.axes) < heading - 0.03
    bars = next(axis for axis in figure.axes if axis.get_title(loc="left") == "Output tokens/s")
    assert len({patch.get_facecolor() for patch in bars.patches}) == 3


@pytest.mark.parametrize("gpu", [True, False])
def test_no_text_of_the_comparison_is_cut_off(gpu):
    """Long names, reasons and warnings included."""
    flags = [Flag("short-window", ""), Flag("throttled", ""), Flag("interrupted", "")]
    runs = {
        name: analyze(build_run(name, gpu=gpu, spread=0.5, seed=len(name), flags=flags))
        for name in ("single", "disaggregated")
    }
    figure = drawn(mpl.comparison, runs, [compare(*runs.values(), anyway=True)])
    for label in [*figure.texts, *(label for axis in figure.axes for label in axis.texts)]:
        box = label.get_window_extent()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 1600 and box.y1 <= figure.bbox.height, label.get_text()


def test_bars_have_the_figures_of_the_verdicts():
    runs = {name: analyze(build_run(name, trials=3)) for name in ("single", "disaggregated")}
    found = comparisons(runs)
    figures = {text.label(line.metric.name): [line.a, line.b] for line in found[0].differences}
    bars = {panel.title: panel.series[0].y for panel in charts.side_by_side(runs, found)}
    assert len(bars) == 4 and all(figures[title] == heights for title, heights in bars.items())


def test_latencies_of_every_request_start_at_0():
    steady = build_run(trials=1, requests=40, ttft_ms=500.0, spread=0.01)
    for panel in charts.every_request(analyze(steady)):
        assert panel.y.low == 0 and panel.y.high > max(panel.spread)


def test_picture_says_how_phases_and_parts_of_ttft_differ(analyses):
    noted = [
        label.get_text().replace("\n", " ")
        for axis in drawn(mpl.performance_analysis, analyses[1], "disaggregated").axes
        for label in axis.texts
    ]
    words = "Phases: whole, of the requests that have them. Where TTFT goes: before the first token, of all requests."
    assert noted.count(words) == 1


def test_trials_on_one_stretch_of_time_have_a_line_between_them():
    analysis = analyze(build_run(trials=3, pause_s=2.0))
    chart = charts.device_curves(analysis, "a")
    assert all(panel.lines == analysis.curves.axis.joints and len(panel.lines) == 2 for panel in chart.panels)
    dotted = [shape["x0"] for shape in page.plotly_figure(chart)["wide"]["shapes"] if shape["type"] == "line"]
    assert dotted == analysis.curves.axis.joints


def test_pictures_name_the_flags(analyses):
    figure = drawn(mpl.performance_analysis, analyses[1], "disaggregated")
    names = "requests-failed, client-limited, preempted, kv-full, server-error, short-window, energy-coarse"
    assert f"warnings: {names}" in [label.get_text() for label in figure.texts]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_chinese_characters_have_room_in_the_heading_and_below_a_table():
    """They are twice as wide as letters."""
    run = analyze(build_run(model="模" * 60, flags=[Flag("short-window", ""), Flag("throttled", "")]))
    with text.language("zh"):
        figure = drawn(mpl.performance_analysis, run, "disaggregated")
    load, warnings = (next(label for label in figure.texts if word in label.get_text()) for word in ("模模", "警告"))
    assert not load.get_window_extent().overlaps(warnings.get_window_extent())
    notes = [label for axis in figure.axes for label in axis.texts if "各阶段" in label.get_text()]
    assert len(notes) == 1 and "\n" in notes[0].get_text()


def test_every_panel_has_titles_and_labels_that_do_not_collide():
    run = analyze(build_run())
    figure = drawn(mpl.chart, charts.latency_distributions({"a": run}), 15, 10)
    title = figure.texts[0].get_window_extent()
    assert not any(axis.title.get_window_extent().overlaps(title) for axis in figure.axes)


def test_every_gap_of_a_short_run_is_drawn():
    run = build_run(trials=1, requests=3, tokens=20)
    chart = charts.tbt_over_time({"a": analyze(run)})
    assert [len(series.x) for series in chart.panels[0].series] == [3 * 19]
    assert np.isfinite(chart.panels[0].series[0].x).all()


def test_warm_up_is_drawn_behind_the_curves():
    run = build_run(trials=1, requests=8)
    run.requests[0].warmup = True
    boxes = [series for series in charts.device_curves(analyze(run), "a").panels[0].series if series.kind == "boxes"]
    assert [len(series.y) for series in boxes] == [8, 8]


def test_many_requests_are_drawn_as_a_count():
    chart = charts.device_curves(analyze(build_run(trials=1, requests=8)), "a", most_boxes=5)
    assert [series.kind for series in chart.panels[0].series if series.behind] == ["area"]


def test_one_trial_shows_its_change_and_what_to_do():
    runs = [analyze(build_run("single", trials=1, ttft_ms=20)), analyze(build_run(trials=1, ttft_ms=35, seed=2))]
    compared, html = compare(*runs), page_of(runs)
    assert "--pairs 6" in html and "worse so far" in html and "not judged" not in html
    assert html.index("--pairs 6") < html.index("worse so far") < html.index("<table")
    table = tables.comparison(compared)
    assert re.fullmatch(r"\+\d+\.\d %", table.rows[0][-1]) and "--pairs 6" in table.note
    figure = drawn(mpl.comparison, dict(zip(compared.names, runs, strict=True)), [compared])
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(points) == len(compared.differences)


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


@pytest.mark.parametrize("model", ["模型", "a\x1b[31m", "m$\\frac$"])
def test_letters_that_no_font_has_are_no_warning(model, recwarn):
    run = build_run(trials=1, requests=2, tokens=4, model=model)
    assert mpl.picture(mpl.performance_analysis, analyze(run), "single") and not recwarn.list


def test_pictures_without_a_chinese_font_are_english_and_it_says_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(mpl, "chinese_font", lambda: None)
    console = Console(file=io.StringIO(), width=200)
    with text.language("zh"):
        commands.compare_folders(folders, [], False, tmp_path / "picture.png", console)
    assert console.file.getvalue().count("没有找到中文字体") == 1
    assert (tmp_path / "picture.png").exists()
    # Also where a chart is described before it is drawn, as a search's and a plan's are.
    described = lambda: charts.trade_off({"a": load_analysis(folders[0])})  # noqa: E731
    of_language = []
    for language in ("en", "zh"):
        with text.language(language):
            of_language.append(mpl.chart_picture(described, 8, lambda rows: 5))
    assert of_language[0] == of_language[1]


@pytest.mark.parametrize(
    ("gpu", "titles"),
    [(True, ["Power", "Clocks", "Temperature", "Utilisation", "Power against"]), (False, ["CPU use", "CPU clock"])],
)
def test_plot_has_a_panel_for_what_was_measured_alone(gpu, titles, tmp_path):
    folder = save_run(build_run(gpu=gpu, trials=2), tmp_path / "results").parent
    chart = charts.monitored(load_analysis(folder), commands.read_devices(folder))
    assert len(chart.panels) == len(titles)
    assert all(panel.title.startswith(title) for panel, title in zip(chart.panels, titles, strict=True))
    assert gpu or "Power not measured: RAPL zones are devices of their own" in chart.caption
    assert len(chart.panels[0].pauses) == 1
    for source in (folder, sorted(folder.glob("*_gpu_data.json"))[0]):
        commands.plot(source, tmp_path / "devices.png", Console(file=io.StringIO()))
        with Image.open(tmp_path / "devices.png") as picture:
            assert picture.size == (1500, 1000)


def test_plot_of_a_hosts_use_begins_at_0_and_names_no_roles(tmp_path):
    samples = [DeviceSample(t_s=n / 10, read_s=n / 10, cpu_utilization_pct=5.0) for n in range(30)]
    host = DeviceRecord(id="host", kind="process", name="CPU use of the host", role=None, sampling={}, samples=samples)
    run = Run(name="a.csv", clock=Clock(0, 0), config={}, host={}, versions={}, devices=[host])
    (panel,) = charts.monitored(analyze(run), [host]).panels
    assert panel.title == "CPU use" and panel.series[0].x[0] == 0 and np.nanmax(panel.series[0].x) == 2.9


def test_plot_of_utilisation_alone_has_one_panel(tmp_path):
    device = DeviceRecord(id="gpu0", kind="gpu", name="H")
    device.samples = [DeviceSample(t_s=float(t), gpu_utilization_pct=50.0) for t in range(9)]
    save_devices(tmp_path / "watched.json", "host", [device])
    commands.plot(tmp_path / "watched.json", None, Console(file=io.StringIO()))
    with Image.open(tmp_path / "watched.png") as picture:
        assert picture.size == (1500, 1000)


def test_labels_of_points_that_nearly_coincide_do_not_overlap():
    near = [[500, 1000, 2000, 3000], [510, 1030, 2050, 3150], [505, 1010, 2010, 3010]]
    series = [
        Series(name=f"{n}", x=x, y=[30 + n, 31 + n, 35 + 2 * n, 40], labels=["4", "8", "16", "24"], marker="o")
        for n, x in enumerate(near)
    ]
    panel = Panel(title="", series=series, y=Axis(low=0, high=60))
    figure = drawn(mpl.chart, Chart(key="", title="t", panels=[panel, panel]), 16, 5)
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.texts]
        assert len(boxes) == 12 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(box.x1 <= axis.get_window_extent().x1 for box in boxes)


def test_name_of_the_higher_of_two_points_is_the_higher_one():
    points = [Series(name=name, x=[8], y=[y], labels=[name], marker="o") for name, y in (("low", 108), ("high", 111))]
    panel = Panel(title="", series=points, y=Axis(low=0, high=170))
    (axis,) = drawn(mpl.chart, Chart(key="", title="t", panels=[panel]), 14, 7).axes
    low, high = (label.get_window_extent() for label in sorted(axis.texts, key=lambda label: label.xy[1]))
    assert low.y1 <= high.y0


@pytest.mark.parametrize(
    ("met", "shade"),
    [((99.5, 83.0, 100.0), ORANGE), ((99.6, 99.2, 100.0), GOOD), ((90.0, 83.0, 98.0), BAD)],
)
def test_predicted_deployment_is_undecided_where_the_interval_crosses_the_limit(met, shade):
    figures = {"tbt_p99_ms": Figure(9.0, 8.0, 10.0), "slo_met_pct": Figure(*met)}
    of = [Prediction(layout=Layout("single", {"single": 1}), load="", figures=figures)]
    chart = predictions_chart(of, on_gpus=True)
    assert {series.shade for panel in chart.panels for series in panel.series} == {shade}
    assert "orange: the interval does not decide" in chart.caption


def test_names_of_predicted_deployments_are_not_cut_off():
    figures = {name: Figure(250.0, 200.0, 300.0) for name in ("ttft_p99_ms", "tbt_p99_ms")}
    layouts = Layout("disaggregated", {"prefill": 1, "decode": 1}), Layout("replicas", {"replica": 6})
    predictions = [Prediction(layout=layout, load="", figures=figures) for layout in layouts]
    figure = drawn(mpl.chart, predictions_chart(predictions, on_gpus=True), 14, 7.4)
    for axes in figure.axes:
        assert [label.get_text() for label in axes.texts] == ["1p1d", "replicas:6"]
        assert all(label.get_window_extent().x1 < axes.get_window_extent().x1 for label in axes.texts)


def test_intervals_of_predictions_with_as_many_gpus_stand_beside_each_other():
    layouts = Layout("disaggregated", {"prefill": 4, "decode": 4}), Layout("replicas", {"replica": 8})
    figures = [{"ttft_p99_ms": Figure(109.0, 85.1, 162.0)}, {"ttft_p99_ms": Figure(114.0, 87.5, 144.0)}]
    predictions = [Prediction(layout=layout, load="", figures=of) for layout, of in zip(layouts, figures, strict=True)]
    (panel,) = predictions_chart(predictions, on_gpus=True).panels
    bars, points, _names = panel.series
    assert len(set(points.x)) == 2 and np.allclose(points.x, 8, atol=0.3)
    assert list(bars.x[:5:3]) == list(points.x)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_long_caption_stands_above_the_panels_and_wide_names_have_room():
    bars = [Series(kind="hbar", x=[1.0], y=["自身速度自身"])]
    panel = Panel(title="a panel", series=bars, y=Axis(names=["自身速度自身"]))
    described = Chart(key="", title="t", panels=[panel], caption="some words of a caption that is long " * 9)
    figure = drawn(mpl.chart, described, 14, 7.4)
    [axis], [_title, caption] = figure.axes, figure.texts
    assert caption.get_window_extent().y0 > axis.title.get_window_extent().y1
    assert axis.get_position().x0 * 14 > 2 * 0.075 * len(panel.y.names[0])
