"""`pdbench bench` of a server that pdbench did not start: its model, where it runs, and which GPUs are its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_nvml import build, environment
from rich.console import Console
from scripted_server import Peer, ScriptedServer, refusal, stream, tokens

from pdbench import experiment
from pdbench.config import LoadConfig, Options, PowerConfig
from pdbench.errors import UserError
from pdbench.load.target import offered_model
from pdbench.records import Run, load_run
from pdbench.serving import machine

ROOT = Path(__file__).parents[1]
NVIDIA_SMI = """#!/bin/sh
case "$1" in --query-gpu=*) for i in 0 1; do echo "$i, Scripted GPU, 580, 1000, 0, GPU-$i"; done;; esac
"""


def models(peer: Peer) -> bool:
    """What a server with one model answers to everything but a load."""
    body = b'{"data": [{"id": "their-model"}]}'
    peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return True


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    answer = stream(tokens(5))
    with ScriptedServer(lambda peer: models(peer) if peer.head.startswith(b"GET") else answer(peer)) as made:
        yield made


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("nvml"))
    (folder / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def bench(library: Path, server: ScriptedServer, out: Path, *arguments: str, **settings: str) -> Run:
    """A saved run of `pdbench bench` where NVML and nvidia-smi know two scripted GPUs."""
    found = environment(library, gpus="2", **settings)
    found |= {"PATH": f"{library}:{found['PATH']}", "PYTHONPATH": f"{ROOT}:{found['PYTHONPATH']}"}
    command = [sys.executable, "-m", "pdbench", "bench", "--url", server.url, "--requests", "4", "--idle-s", "0"]
    done = subprocess.run([*command, *arguments], env=found, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_run(out / "bench_results")


def test_the_gpus_of_its_processes_are_its_own(library: Path, server: ScriptedServer, tmp_path: Path) -> None:
    run = bench(library, server, tmp_path, processes=f"0:1 1:{os.getpid()}")
    assert run.roles["server"] == ["gpu1"]
    assert run.config["model"] == "their-model"
    assert "devices-unknown" not in {flag.name for flag in run.flags}


def test_where_nothing_tells_all_gpus_count_and_the_run_says_so(
    library: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    run = bench(library, server, tmp_path)
    assert run.roles["server"] == ["gpu0", "gpu1"]
    assert "devices-unknown" in {flag.name for flag in run.flags}


def test_gpus_that_are_named_stand(library: Path, server: ScriptedServer, tmp_path: Path) -> None:
    run = bench(library, server, tmp_path, "--single-gpus", "0", processes=f"1:{os.getpid()}")
    assert run.roles["server"] == ["gpu0"]


def test_a_server_of_another_host_has_no_power_here(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_this_host", lambda host: False)
    console = Console(quiet=True)

    def measure(power: PowerConfig) -> Run:
        options = Options(load=LoadConfig(requests=2, warmup=0), power=power)
        return load_run(experiment.bench(server.url, None, options, 1, tmp_path, console, lambda folder: None))

    run = measure(PowerConfig())
    assert run.devices == []
    assert "power-elsewhere" in {flag.name for flag in run.flags}
    with pytest.raises(UserError, match="--single-clock 900"):
        measure(PowerConfig(single_clock=900))


def test_this_host_is_known_by_its_addresses() -> None:
    assert all(machine.is_this_host(host) for host in ("127.0.0.1", "localhost", "127.8.9.10"))
    assert not machine.is_this_host("192.0.2.1")


def test_a_server_is_all_that_its_program_started() -> None:
    code = "import socket, subprocess, sys; s = socket.create_server(('127.0.0.1', 0))\n"
    code += "with subprocess.Popen(['sleep', '60']) as child: print(s.getsockname()[1], child.pid, flush=True); sys.stdin.read(); child.kill()"
    # A shell stands between this test's program and the server's, as it does for a user's.
    command = ["bash", "-c", '"$@"; exit $?', "-", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdin and shell.stdout
        port, child = map(int, shell.stdout.readline().split())
        found = machine.server_processes(port)
        assert child in found and len(found) == 2
        assert shell.pid not in found and os.getpid() not in found
        shell.stdin.close()


def test_the_model_is_asked_as_the_load_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ScriptedServer(models) as server:
        assert offered_model(f"{server.url}/base/v1/") == "their-model"
        assert server.requests[0].head.startswith(b"GET /base/v1/models HTTP/1.1\r\n")
        assert server.requests[0].fields["authorization"] == "Bearer secret-key"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (refusal(b"401 Unauthorized", "no key"), "set OPENAI_API_KEY"),
        (refusal(b"404 Not Found", "no such path"), "give --model NAME"),
        (lambda peer: False, "no OpenAI-compatible server answers"),
    ],
    ids=["key", "path", "nobody"],
)
def test_a_model_that_is_not_told_is_one_line_with_the_remedy(answer, told) -> None:
    with ScriptedServer(answer) as server, pytest.raises(UserError, match=told) as raised:
        offered_model(server.url)
    assert len(str(raised.value).splitlines()) == 1


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        offered_model("http://me:pass-word@127.0.0.1:9")
    assert "pass-word" not in str(raised.value)
