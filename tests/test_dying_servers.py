"""Servers that die while they are measured: the trial ends within seconds, what was measured is kept and marked, and the cause is
the first line that is shown. Scripted servers in vLLM's place."""

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.records import Run, load_run
from pdbench.serving import deployment as deployments
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from pdbench.serving.process import ServerProcess
from pdbench.serving.vllm import Command
from pdbench.serving.watch import RunningServers, Watch
from tests.conftest import serve_config
from tests.support.dying import SOON_S, Doomed
from tests.support.processes import wait_until
from tests.support.scripted_vllm import SERVER, Scripted
from tests.support.servers import Peer, ScriptedServer, completions

ROOT = Path(__file__).parents[1]
KILLED = "(APIServer pid=3) WARNING 11-25 23:38:31 [c.py:3] [shutdown] MPClient: engine core exited unexpectedly; starting cleanup"
CAUSE = "(EngineCore pid=9) ERROR 11-25 23:38:31 [core.py:1510] ValueError: blocks run out"


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs is killed soon."""
    monkeypatch.setattr("pdbench.serving.process.GRACE_S", 2.0)


def kill(log: Path, supervisor: int) -> None:
    with log.open("a") as file:
        file.write(f"{CAUSE}\n" + 300 * "  a long traceback of what follows\n")
    server_of(supervisor).send_signal(signal.SIGKILL)


def server_of(supervisor: int) -> psutil.Process:
    wait_until(psutil.Process(supervisor).children, what="the server's process")
    (server,) = psutil.Process(supervisor).children()
    return server


def engine_dies(log: Path, supervisor: int) -> None:
    with log.open("a") as file:
        file.write(f"{KILLED}\n")


def hang(log: Path, supervisor: int) -> None:
    """It answers nobody any more, and then says why."""
    server_of(supervisor).send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    engine_dies(log, supervisor)


def options(**load: object) -> Options:
    settings = {"requests": 4000, "concurrency": 4, "output_tokens": 8, "warmup": 2, "canaries": 0.0} | load
    return Options(load=LoadConfig(**settings), power=PowerConfig(power=False))  # type: ignore[arg-type]


def measure(
    kind: DeploymentKind, doomed: Doomed, config: ServeConfig, out: Path, *, in_warmup: bool = False, **load: object
) -> tuple[str, str, Run | None]:
    """(printed, the error's text, the saved run)."""
    printed = io.StringIO()
    site = doomed.site(warmup=in_warmup, host_class=type("Host", (Scripted,), {"scripts": {}}))
    measuring = Options(serve=config, load=options(**load).load, power=PowerConfig(power=False))
    with pytest.raises(UserError) as raised:
        design = PairConfig(pairs=3, resident=False)
        experiment.run((kind,), design, measuring, out, Console(file=printed, width=200), site, {})
    assert doomed.took_s() < SOON_S, printed.getvalue()
    assert len(doomed.ended_s) <= 1, "a second trial was sent to a dead server"
    folder = out / f"{kind}_results"
    return printed.getvalue(), str(raised.value), load_run(folder) if folder.exists() else None


@pytest.mark.parametrize(
    ("kind", "server", "how", "words", "load"),
    [
        ("single", "single-0", kill, "with exit code 137: ValueError: blocks run out (line ", {}),
        ("single", "single-0", engine_dies, "(its engine; the API server still answers): its engine's process was", {}),
        (
            "single",
            "single-0",
            hang,
            "its engine's process was ended from outside",
            {"rate": 20.0, "concurrency": None},
        ),
        ("single", "single-0", kill, "with exit code 137: ValueError", {"client_processes": 2}),
        ("replicas", "replica-1", kill, "with exit code 137: ValueError", {}),
        ("replicas", "proxy", kill, "with exit code 137: ValueError", {"rate": 20.0, "concurrency": None}),
    ],
    ids=["killed", "engine", "hangs", "two clients", "replica", "proxy"],
)
def test_death_ends_the_trial_and_its_cause_is_shown_first(
    tmp_path: Path,
    kind: DeploymentKind,
    server: str,
    how: Callable[[Path, int], None],
    words: str,
    load: dict[str, object],
) -> None:
    config = serve_config(tmp_path / "logs")
    printed, error, run = measure(kind, Doomed(tmp_path / "logs", server, how), config, tmp_path, **load)
    first = error.splitlines()[0]
    assert first.startswith(f"{server} died ") and words in first
    assert f"whole log: {config.log_dir}/{server}.log" in error
    assert printed.splitlines()[-2] == first and ", trial 1: " in printed.splitlines()[-1], printed
    assert run is not None
    (flag,) = [flag for flag in run.flags if flag.name == "server-died"]
    assert flag.detail == f"trial 1: {first}; the figures are of what was measured until then"
    assert any(request.error is None and not request.warmup for request in run.requests), printed


@pytest.mark.parametrize("warmup", [False, True], ids=["correctness check", "warm-up"])
def test_death_before_the_load_leaves_no_trial(tmp_path: Path, warmup: bool) -> None:
    config, doomed = serve_config(tmp_path / "logs"), Doomed(tmp_path / "logs", "single-0", kill)
    if not warmup:
        doomed.strike(0.3)
    printed, error, run = measure("single", doomed, config, tmp_path, in_warmup=warmup, warmup=2000)
    assert run is None
    assert error.startswith("single-0 died with exit code 137: ValueError: blocks run out")
    assert "sent no request" not in printed + error


def test_bench_notices_the_death_of_served_servers(tmp_path: Path) -> None:
    logs, port = tmp_path / "logs", serve_config(tmp_path).single_port
    url = f"http://127.0.0.1:{port}"
    command = Command(
        "single-0", "single", ("python", "-c", SERVER, "127.0.0.1", str(port)), {"PYTHONPATH": str(ROOT)}, url
    )
    process = ServerProcess(command, logs / "single-0.log")
    try:
        wait_until(lambda: process.state().healthy)
        server = ServerInfo(name="single-0", role="single", url=url, pids=[process.pid])
        deployments.save(
            DeploymentInfo(name="single", url=url, model_name="m", owner_pid=os.getpid(), servers=[server]), logs
        )
        doomed = Doomed(logs, "single-0", engine_dies)
        with pytest.raises(UserError) as raised:
            served = Options(serve=ServeConfig(log_dir=str(logs)), load=options().load, power=PowerConfig(power=False))
            experiment.bench(url, 3, served, tmp_path, Console(quiet=True), doomed.site(), {})
        assert doomed.took_s() < SOON_S
    finally:
        process.close()
    assert str(raised.value).startswith(
        "single-0 died (its engine; the API server still answers): its engine's process"
    )
    run = load_run(tmp_path / "single_results")
    assert [flag.name for flag in run.flags if flag.name == "server-died"] and len(run.trials) == 1


def test_foreign_server_is_dead_when_its_health_check_fails_twice() -> None:
    healthy, answered = [True], completions()

    def answer(peer: Peer) -> bool:
        if healthy[0] or peer.path != "/health":
            return answered(peer)
        peer.respond({}, b"503 Service Unavailable")
        return True

    with ScriptedServer(answer) as server:
        info = DeploymentInfo(name="bench", url=server.url, model_name="m")
        running = RunningServers(info, Path("none"))
        assert running.death() is None
        healthy[0] = False
        died = Watch(running.death).problem_within(30.0) or ""
        assert died.startswith(f"the server at {server.url} died: its health check answers 503")
        assert RunningServers(info, Path("none")).death() is None, "a server that never was healthy has no health check"


def test_process_of_a_foreign_server_that_ends_is_its_death() -> None:
    process = psutil.Popen(["sleep", "60"])
    server = ServerInfo(name="server", role="server", url="http://127.0.0.1:9", pids=[process.pid])
    running = RunningServers(
        DeploymentInfo(name="bench", url=server.url, model_name="m", servers=[server]), Path("none")
    )
    assert running.death() is None
    process.kill()
    wait_until(lambda: running.death() == f"server died (process {process.pid} is gone): read its log")
    process.wait()
