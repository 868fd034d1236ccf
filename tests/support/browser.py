"""A real Chromium, headless, driven through its DevTools protocol: open a page, evaluate, click, screenshot, print, listen.

A picture of a report's first screen (of the whole page with --whole): python tests/support/browser.py report/report.html report.png
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--window-size=1280,1000",
]  # fmt: skip


class Browser:
    """One tab; `problems` are the console errors and uncaught exceptions so far, `requested` the addresses it asked for."""

    def __init__(self, profile: Path) -> None:
        from websockets.sync.client import connect

        assert CHROMIUM
        self.profile, self.problems, self.requested, self._number = profile, [], [], 0
        log = (profile / "log").open("wb")
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=log, stdout=log
        )
        log.close()
        until = time.monotonic() + 60
        port_file = profile / "DevToolsActivePort"
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert self.process.poll() is None and time.monotonic() < until, (profile / "log").read_text()[-2000:]
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        self.open_socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        self.socket = self.open_socket.__enter__()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """One command of the protocol; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def open(self, address: str) -> None:
        """Go there and wait until the page has loaded."""
        self.call("Page.navigate", url=address)
        until = time.monotonic() + 60
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            assert time.monotonic() < until
            time.sleep(0.05)

    def evaluate(self, script: str):
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is visible, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data["data"]))

    def resize(self, width: int) -> None:
        """Change the window's width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)

    def print_to(self, path: Path) -> None:
        """A PDF, as a person prints the page."""
        data = self.call("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(data["data"]))

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        height = self.evaluate("document.documentElement.scrollHeight")
        return {"clip": {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}}

    def mouse(self, kind: str, x: float, y: float) -> None:
        """mouseMoved, mousePressed or mouseReleased at a place of the visible page."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def _note(self, event: dict) -> None:
        method, about = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.problems.append(about["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.problems.append(str(about["args"]))
        elif method == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open_socket.__exit__(kind, error, trace)
        self.process.terminate()
        self.process.wait(60)


def main(page: str, picture: str, *options: str) -> None:
    """Save the page's picture; say when its first content was painted."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        Browser(Path(profile)) as browser,
    ):
        browser.open(Path(page).resolve(strict=True).as_uri())
        paints = browser.evaluate("JSON.stringify(performance.getEntriesByType('paint').map(one => one.startTime))")
        print(f"first paint after {max(json.loads(paints)):.0f} ms")
        if "--whole" in options:
            browser.evaluate("drawAll().then(() => true)")
        browser.screenshot(Path(picture), whole="--whole" in options)


if __name__ == "__main__":
    main(*sys.argv[1:])
