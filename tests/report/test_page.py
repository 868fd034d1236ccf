"""The page by its data, in English and Chinese."""

import io
import json
import re

import plotly.graph_objects
import pytest
from rich.console import Console

from pdbench.analysis.run_analysis import analyze
from pdbench.records import save_run
from pdbench.report import commands, mpl, text
from tests.support.reports import gate, page_of
from tests.support.runs import build_run


def plots_of(html):
    return json.loads(re.search(r'id="plots">(.*?)</script>', html, re.S)[1].replace("\\u003c", "<"))


def test_every_chart_of_the_page_is_valid_plotly(analyses):
    plots = plots_of(page_of(analyses))
    assert {
        "verdicts-0",
        "distributions",
        "ttft",
        "tbt",
        "devices-0",
        "devices-1",
        "servers-1",
        "energy",
        "trade-off",
    } == set(plots)
    for plot in plots.values():
        for layout in ("wide", "narrow"):
            figure = plotly.graph_objects.Figure({"data": plot["data"], "layout": plot[layout]})
            assert figure.data and all(trace.hovertemplate or trace.hoverinfo for trace in figure.data)


def test_panels_are_below_each_other_in_a_narrow_window(analyses):
    plot = plots_of(page_of(analyses))["distributions"]
    assert [plot["wide"][axis]["domain"][0] for axis in ("xaxis", "xaxis2", "xaxis3")] == pytest.approx(
        [0, 0.36333, 0.72667], abs=1e-4
    )
    assert "domain" not in plot["narrow"]["xaxis2"]
    tops = [plot["narrow"][axis]["domain"][1] for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert tops == sorted(tops, reverse=True) and plot["narrow"]["height"] > 2 * plot["wide"]["height"]


def test_page_escapes_names_and_loads_nothing_from_elsewhere(analyses):
    html = page_of(analyses, ["<script>alert(1)</script>", "b"])
    assert "<script>alert" not in html and "a &lt; b &amp; c" in html
    before_plotly = html[: html.index('<script type="application/json"')]
    before_plotly = before_plotly.replace("http://127.0.0.1:8000", "")  # where the server answered
    assert "http://" not in before_plotly and "https://" not in before_plotly


def test_page_separates_not_judged_from_not_significant(analyses):
    whole = page_of(analyses)
    assert "Figures with an interval are geometric means over the trials, others are of all trials together." in whole
    answer = whole[whole.index('class="answer"') : whole.index("<table")]
    assert re.search(r"not judged</b>\s*TTFT p99, E2E p99", answer)


def test_chinese_leaves_no_text_in_english(folders, tmp_path, monkeypatch):
    missing = set()
    translate_saved = text._translate_saved

    def recorded(english):
        chinese = translate_saved(english)
        # Names (of options, devices, GPU models, classes of failures with their counts) stay as they are.
        is_name = english == "Synthetic H200" or re.fullmatch(r"\w+ \d+(, \w+ \d+)*", english)
        if chinese == english and " " in english and not is_name:
            missing.add(english)
        return chinese

    monkeypatch.setattr(text, "_translate_saved", recorded)
    # Described, not rendered.
    monkeypatch.setattr(mpl, "picture", lambda draw, *arguments: bytes(bool(draw(*arguments))))
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
            commands.compare_folders(places, ["ttft_p50_ms > +5%"], True, tmp_path / "picture.png", console)
            commands.plot(places[1], tmp_path / "devices.png", console)
        html = (tmp_path / "out" / "report.html").read_text()
        assert 'lang="zh-Hans"' in html and "更好" in html and "延迟分布" in html
    assert missing == set()


@pytest.mark.parametrize("passed", [True, False, None])
def test_page_opens_with_the_correctness_check(passed):
    html = page_of([analyze(build_run(gate=None if passed is None else gate(passed)))])
    words = {
        True: "Correctness check passed: 4 of 4 &lt; 5",
        False: "CORRECTNESS CHECK FAILED",
        None: "Correctness check not run",
    }
    assert words[passed] in html[html.index("<header") : html.index("</header")]
