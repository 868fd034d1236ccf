"""A client that is stopped during its load and goes on: its pause is not the server's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pdbench.records import load_run
from tests.support.processes import ROOT, wait_until
from tests.support.servers import ScriptedServer, completions


@pytest.mark.parametrize(("processes", "stopped_s"), [(1, 1.0), (2, 1.0), (1, 0.0)])
def test_client_that_stood_still_is_flagged(processes: int, stopped_s: float, tmp_path: Path) -> None:
    with ScriptedServer(completions(pause_s=0.02)) as server:
        load = ["--url", server.url, "--requests", "80", "--concurrency", "4", "--output-tokens", "8", "--warmup", "1"]
        command = [sys.executable, "-m", "pdbench", "bench", *load, "--client-processes", str(processes), "--no-power"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as bench:
            wait_until(lambda: len(server.requests) > 20)
            clients = [psutil.Process(bench.pid), *psutil.Process(bench.pid).children(recursive=True)]
            for number in (signal.SIGSTOP, signal.SIGCONT) if stopped_s else ():
                for client in clients:
                    client.send_signal(number)
                time.sleep(stopped_s)
            assert bench.wait(60) == 0
    run = load_run(tmp_path / "bench_results")
    assert sum(request.error is None and not request.warmup for request in run.requests) == 80
    stood = [flag.detail for flag in run.flags if flag.name == "client-stalled"]
    assert len(stood) == bool(stopped_s) and all("stood still for" in detail for detail in stood)
    assert run.trials[0].client["stalled_s"] >= 0.9 * stopped_s
