"""A bench against a scripted server with a viewer beside it, in a process of its own."""

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.processes import ROOT, wait_until
from tests.support.servers import ScriptedServer, completions


class Measured:
    """A command with --live, running; `page` and `metrics` are the addresses that it printed."""

    def __init__(self, arguments: str, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pdbench", *arguments.split(), "--prometheus-port", "0"],
                cwd=folder,
                env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.process.poll() is not None or b"/metrics" in self.log.read_bytes(), 60)
        text = self.log.read_text()
        self.page, self.metrics = (re.findall(pattern, text)[0] for pattern in (r"live: (\S+)", r"Prometheus: (\S+)"))
        wait_until(
            lambda: self._viewers() or self.process.poll() is not None
        )  # it may start after its addresses are printed
        (self.viewer,) = self._viewers()

    def _viewers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children() if "pdbench.live.viewer" in p.cmdline()]


@pytest.fixture
def measured(tmp_path: Path) -> Iterator:
    """measured(requests): starts it; 20 requests take about 2 s."""
    with ExitStack() as ending:
        server = ending.enter_context(ScriptedServer(completions(0.02)))

        def start(requests: int) -> Measured:
            arguments = f"bench --url {server.url} --model m --concurrency 4 --requests {requests} --output-tokens 20"
            bench = Measured(f"{arguments} --no-power --live", tmp_path)
            ending.callback(end, bench)
            return bench

        yield start


def end(bench: Measured) -> None:
    for process in (bench.process, bench.viewer):
        if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
            process.kill()
    bench.process.wait(60)


def status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def events(address: str) -> Iterator:
    """The stream of a page's events: (name, data) as they come."""
    with urllib.request.urlopen(address.replace("/?", "/events?"), timeout=30) as answer:

        def read() -> Iterator:
            name = b""
            for line in answer:
                if line.startswith(b"event: "):
                    name = line[7:].strip()
                elif line.startswith(b"data: "):
                    yield name.decode(), line[6:]

        yield read()
