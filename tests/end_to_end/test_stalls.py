"""A client, or a server, that is stopped during a load and goes on: a reader is told whose pause the figures hold."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pdbench.records import load_run
from tests.support.processes import ROOT, ending_with_tests, free_port, wait_until
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


DECODING = """import os, sys
from tests.support.servers import ScriptedServer, completions

complete = completions(0.005)

def answer(peer):
    write, written = peer.write, []
    def counted(*pieces, pause_s=0.0):
        for piece in pieces:
            write(piece, pause_s=pause_s)
            written.append(piece)
            if len(written) == 40:
                os.write(1, b"decoding\\n")  # whole: streams answer in threads of their own
    peer.write = counted
    return complete(peer)

ScriptedServer(answer, port=int(sys.argv[1])).serve_forever()
"""
"""It says so once an answer has some tokens."""


@pytest.mark.parametrize(("streams", "stopped_s"), [(4, 3.0), (1, 3.0), (4, 0.0)])
def test_server_that_stood_still_is_flagged(streams: int, stopped_s: float, tmp_path: Path) -> None:
    """Not with one stream: that stream may simply have been slow."""
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(ROOT)}
    argv = ending_with_tests([sys.executable, "-c", DECODING, str(port)])
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as server:
        load = ["--requests", str(streams), "--concurrency", str(streams), "--output-tokens", "400", "--warmup", "0"]
        command = [sys.executable, "-m", "pdbench", "bench", "--url", f"http://127.0.0.1:{port}", *load, "--no-power"]
        wait_until(lambda: psutil.Process(server.pid).net_connections())
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as bench:
            assert server.stdout is not None
            assert [server.stdout.readline() for _ in range(streams)] == ["decoding\n"] * streams
            for number in (signal.SIGSTOP, signal.SIGCONT) if stopped_s else ():
                server.send_signal(number)
                time.sleep(stopped_s)
            assert bench.wait(60) == 0
        server.kill()
    stood = [flag.detail for flag in load_run(tmp_path / "bench_results").flags if flag.name == "server-stalled"]
    assert len(stood) == (bool(stopped_s) and streams > 1)
    assert all(f"all of its {streams} streams got nothing for " in detail for detail in stood)
