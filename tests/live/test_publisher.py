"""What a measurement tells: a viewer that hangs delays nothing, ports are checked, progress in the terminal."""

import io
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from pdbench.config import LiveConfig
from pdbench.errors import UserError
from pdbench.live import publisher, terminal
from pdbench.load.generator import Progress
from pdbench.records import DeviceRecord, DeviceSample, RequestRecord
from tests.support.processes import wait_until


def test_viewer_that_hangs_delays_nothing_and_loses_the_oldest(monkeypatch):
    hanging: list[subprocess.Popen] = []

    def popen(_command, **options):
        hanging.append(start([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return hanging[0]

    start = subprocess.Popen
    monkeypatch.setattr(publisher.subprocess, "Popen", popen)
    requests = [RequestRecord(id="r", planned_s=0.0, token_s=[0.1] * 1000)]
    try:
        with publisher.opened(LiveConfig(live=True), Console(file=io.StringIO())):
            told = publisher._publisher
            for number in range(30_000):
                publisher.put(Progress(number, None, ended=requests))
            assert len(told._queue) <= 10_000
            begin_s = time.monotonic()
        assert time.monotonic() - begin_s < 20 and hanging[0].poll() is None
    finally:
        hanging[0].kill()
        hanging[0].wait()


def test_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for config in (LiveConfig(live=True, live_port=port), LiveConfig(prometheus_port=port)):
            with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*; give another --"):
                with publisher.opened(config, Console(file=io.StringIO())):
                    pass


def test_without_a_viewer_nothing_is_kept():
    with publisher.opened(LiveConfig(), Console(file=io.StringIO())), publisher.source(list):
        publisher.stage("x")
        assert not publisher.is_open()


def test_terminal_shows_a_table_and_quiet_shows_nothing(monkeypatch):
    monkeypatch.setattr(terminal, "_TABLE_EVERY_S", 0.01)
    request = RequestRecord(
        id="r", planned_s=0.0, sent_s=0.0, token_s=[0.025, 0.03], end_s=0.03, counted_by="token_ids", output_tokens=2
    )
    gpu = DeviceRecord(id="gpu0", kind="gpu", name="H", role="single", samples=[DeviceSample(t_s=0.0, power_w=321.0)])
    for quiet in (False, True):
        printed = io.StringIO()
        console = Console(file=printed, force_terminal=True, width=200, quiet=quiet)
        with terminal.progress("trial 1", console, lambda: [gpu]) as on_progress:
            on_progress(Progress(0, 9, 3, 0))
            time.sleep(0.01)
            on_progress(Progress(1, 9, 3, 200, [request]))
            if not quiet:
                words = ("321", "1 of 9 requests, 3 in flight", "TTFT p50 25 ms", "tokens/s")
                wait_until(lambda words=words, out=printed: all(word in out.getvalue() for word in words), 60)
        assert quiet == (printed.getvalue() == "")
