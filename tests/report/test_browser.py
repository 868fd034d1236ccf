"""The report in a real Chromium: every figure drawn, no console error, legend and hover work, dark mode, nothing fetched."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from pdbench.records import save_run
from pdbench.report import commands, text
from tests.support.browser import CHROMIUM, Browser
from tests.support.processes import wait_until
from tests.support.runs import build_run

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(find_spec("websockets") is None, reason="no websockets: pip install -r requirements/dev.txt"),
]
ARTIFACTS = Path(__file__).parents[1] / "artifacts"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


# That no English is left in the Chinese page, test_page.py checks.
@pytest.fixture(params=["en", pytest.param("zh", marks=pytest.mark.slow)], scope="module")
def page(request, browser, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    folders = [tmp_path / "single", tmp_path / "disaggregated"]
    save_run(build_run("single", ttft_ms=20, tbt_ms=3.3), folders[0])
    save_run(build_run(tbt_ms=1.5, seed=2), folders[1])
    with text.language(request.param):
        commands.report(folders, tmp_path, None, Console(file=io.StringIO()))
    path = tmp_path / "report.html"
    browser.problems.clear()
    browser.requested.clear()
    browser.open(path.as_uri())
    browser.screenshot(ARTIFACTS / f"report-{request.param}-first-screen.png")
    browser.evaluate("drawAll().then(() => true)")
    yield browser
    browser.screenshot(ARTIFACTS / f"report-{request.param}.png", whole=True)
    assert browser.problems == []
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.requested)


def test_every_figure_is_drawn_and_nothing_is_wider_than_the_page(page):
    count = page.evaluate("document.querySelectorAll('.plot').length")
    assert count == page.evaluate(
        "document.querySelectorAll('.plot .main-svg .plot-container, .plot svg.main-svg:first-child').length"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('.plot')].every(p => p.querySelectorAll('path, rect').length > 5)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_verdicts_are_on_the_first_screen(page):
    assert page.evaluate("document.querySelector('.answer').getBoundingClientRect().bottom") < 500
    assert page.evaluate("document.querySelectorAll('tr.better').length") >= 3


def test_a_click_in_the_legend_hides_and_shows_a_run(page):
    visible = "document.getElementById('distributions').data.filter(t => t.visible === 'legendonly').length"
    page.evaluate("document.getElementById('distributions').scrollIntoView({block: 'center'})")
    box = json.loads(
        page.evaluate("JSON.stringify(document.querySelector('#distributions .legendtoggle').getBoundingClientRect())")
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.mouse(kind, x, y)
    wait_until(lambda: page.evaluate(visible) == 6, 60)
    page.evaluate("Plotly.restyle('distributions', {visible: true}).then(() => true)")
    assert page.evaluate(visible) == 0


def test_panels_are_below_each_other_in_a_narrow_window(page):
    tops = "[...document.querySelectorAll('#distributions .xtitle, #distributions .x2title')].map(t => t.getBoundingClientRect().top)"
    beside = page.evaluate(tops)
    assert beside[0] == beside[1]
    page.resize(500)

    def are_below() -> bool:
        first, second = page.evaluate(tops)
        return first + 100 < second

    wait_until(are_below, 60)
    page.resize(1280)
    wait_until(lambda: page.evaluate(tops) == beside, 60)


def test_hovering_shows_a_value_with_its_unit(page):
    page.evaluate("Plotly.Fx.hover('ttft', [{curveNumber: 0, pointNumber: 1}])")
    assert "ms" in page.evaluate("document.querySelector('#ttft .hoverlayer').textContent")


def test_dark_mode_changes_text_and_figures(page):
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    ink = page.evaluate("document.getElementById('tbt').layout.font.color")
    assert ink == page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")


def test_on_paper_figures_fit_and_nothing_stays_folded(page, tmp_path):
    width = "document.querySelector('#distributions .main-svg').getBoundingClientRect().width"
    before = page.evaluate(width)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(lambda: page.evaluate(width) < 690, 60)
    assert page.evaluate("[...document.querySelectorAll('details')].every(details => details.open)")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    wait_until(lambda: page.evaluate(width) == before, 60)
    page.print_to(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    heights = (
        "[...document.querySelectorAll('.plot')].map(p => [p.offsetHeight, p.querySelector('.main-svg').clientHeight])"
    )
    assert all(box >= drawn > 100 for box, drawn in page.evaluate(heights))
