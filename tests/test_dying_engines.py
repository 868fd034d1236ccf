"""A real vLLM engine that is killed under load: the trial ends at once, although the API server still answers, and says why.

Scripted servers that die are in tests/test_dying_servers.py.
"""

import io
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig
from pdbench.errors import UserError
from pdbench.records import load_run
from tests.conftest import serve_config
from tests.support.dying import SOON_S, Doomed
from tests.support.processes import ROOT, left, marked, wait_until
from tests.support.served import Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]
REASON = "ended from outside"


def kill_engine(supervisor: int) -> None:
    children = psutil.Process(supervisor).children(recursive=True)
    next(each for each in children if "EngineCore" in " ".join([each.name(), *each.cmdline()])).kill()


def test_engine_that_is_killed_ends_bench_and_serve_with_the_reason(served: Served, tmp_path: Path) -> None:
    """The last test of these servers, which it ends; another one would start them again."""
    info = served.info()
    (supervisor,) = next(server.pids for server in info.servers if server.name == "decode-0")
    # The load would take far longer than anybody waits here.
    load = "--concurrency 2 --requests 8000 --input-tokens 32 --output-tokens 16 --warmup 2 --canaries 0 --no-power"
    command = [sys.executable, "-m", "pdbench", "bench", "--url", info.url, "--log-dir", served.config.log_dir]
    bench = subprocess.Popen(
        [*command, *load.split(), "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=marked(tmp_path),
        cwd=ROOT,
    )
    assert bench.stdout is not None and served.process is not None
    assert any("load:" in line for line in bench.stdout)
    events = Path(served.config.log_dir, "proxy.events.jsonl")
    before = len(events.read_text().splitlines())
    wait_until(lambda: len(events.read_text().splitlines()) > before + 8, 120, "requests flow")
    served.process.send_signal(signal.SIGSTOP)  # else it ends all servers at once
    try:
        kill_engine(supervisor)
        _, stderr = bench.communicate(timeout=200)
    finally:
        served.process.send_signal(signal.SIGCONT)
    first = stderr.splitlines()[0].removeprefix("pdbench: ")
    assert bench.returncode == 1
    assert first.startswith("decode-0 died ") and REASON in first and "(line " in first, stderr
    run = load_run(tmp_path / "disaggregated_results")
    assert [flag.name for flag in run.flags].count("server-died") == 1
    assert served.process.wait(60) == 1 and "decode-0 died" in served.errors()
    assert left(served.folder) == left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "server"), [("single", "single-0"), ("disaggregated", "decode-0")])
def test_engine_that_is_killed_ends_a_run_with_the_reason(tmp_path: Path, kind: DeploymentKind, server: str) -> None:
    config = serve_config(tmp_path / "logs")
    load = LoadConfig(rate=4.0, requests=4000, input_tokens=32, output_tokens=16, warmup=2)
    options = Options(serve=config, load=load, power=PowerConfig(power=False))
    doomed = Doomed(tmp_path / "logs", server, lambda log, supervisor: kill_engine(supervisor))
    printed = io.StringIO()
    with pytest.raises(UserError) as raised:
        design = PairConfig(pairs=2, resident=False)
        experiment.run((kind,), design, options, tmp_path, Console(file=printed, width=200), doomed.site(), {})
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"{server} died ") and REASON in first and "(line " in first, raised.value
    assert len(doomed.ended_s) == 1 and doomed.took_s() < SOON_S
    run = load_run(tmp_path / f"{kind}_results")
    assert [flag.name for flag in run.flags].count("server-died") == 1
    assert first in printed.getvalue()
    wait_until(lambda: not any(str(tmp_path) in command for command in command_lines()))


def command_lines() -> list[str]:
    return [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
