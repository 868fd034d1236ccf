"""The live page in a real Chromium: it moves, comes back after a lost connection, becomes the report, and asks nobody else."""

import json
import socket
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.processes import wait_until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(find_spec("websockets") is None, reason="no websockets: pip install -r requirements/dev.txt"),
]
ARTIFACTS = Path(__file__).parents[1] / "artifacts"
POINTS = "(document.getElementById('speed')?.data ?? [{x: []}])[0].x.length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Cable:
    """A TCP forwarder that can be pulled out: open connections end, new ones are closed at once."""

    def __init__(self, port: int) -> None:
        self.port, self.is_in = port, True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.near_port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def pull(self) -> None:
        self.is_in = False
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                assert self.is_in
                far = socket.create_connection(("127.0.0.1", self.port))
            except (AssertionError, OSError):
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


def test_page_moves_returns_after_a_lost_connection_and_says_that_the_measurement_was_killed(measured, browser):
    bench = measured(3000)
    port = int(bench.page.partition("/?")[0].rpartition(":")[2])
    cable = Cable(port)
    browser.problems.clear()
    browser.open(bench.page.replace(str(port), str(cable.near_port)))
    wait_until(lambda: browser.evaluate(POINTS) >= 3, 60)
    browser.screenshot(ARTIFACTS / "live.png", whole=True)
    notice = "document.getElementById('connection').textContent"
    assert browser.evaluate(notice) == "" and browser.problems == []
    cable.pull()
    wait_until(lambda: browser.evaluate(notice) != "", 60)
    before = browser.evaluate(POINTS)
    cable.is_in = True
    wait_until(lambda: browser.evaluate(notice) == "" and browser.evaluate(POINTS) > before, 60)
    x = browser.evaluate("document.getElementById('speed').data[0].x")
    assert x == sorted(x)
    for theme, width in (("dark", 1280), ("dark", 480), ("light", 480)):
        browser.resize(width)
        browser.evaluate(
            f"document.documentElement.dataset.theme === '{theme}' || document.getElementById('theme').click()"
        )
        fits = f"document.documentElement.scrollWidth <= {width}"
        wait_until(lambda fits=fits: browser.evaluate(fits), 60)
    browser.resize(1280)
    bench.process.kill()
    wait_until(lambda: "killed" in browser.evaluate("document.getElementById('ending').textContent"), 60)
    assert browser.evaluate(POINTS) >= len(x)
    assert all(address.startswith(f"http://127.0.0.1:{cable.near_port}/") for address in browser.requested)


def test_page_becomes_the_report(measured, browser):
    bench = measured(40)
    browser.open(bench.page)
    wait_until(lambda: browser.evaluate("document.title") == "pdbench: bench", 90)
    assert bench.process.wait(60) == 0
    plots = "[...document.querySelectorAll('.plot')].map(node => node.id)"
    assert {"distributions", "tbt"} <= set(browser.evaluate(plots))
    browser.evaluate("drawAll().then(() => true)")
    assert json.loads(browser.evaluate("JSON.stringify(Object.keys(document.getElementById('tbt').layout))"))
    wait_until(lambda: not bench.viewer.is_running(), 60)
