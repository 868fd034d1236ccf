"""One measurement at a time writes into a folder of results; what is in it afterwards is one whole run."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from pdbench import cli, files
from pdbench.errors import UserError
from pdbench.records import load_run
from tests.support.processes import ROOT, call_pdbench, free_port, run_pdbench, wait_until
from tests.support.servers import Peer, ScriptedServer, stream, tokens

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Slow enough that a bench of it can be met while it measures."""
    answer = stream(tokens(5), pause_s=0.1)

    def respond(peer: Peer) -> bool:
        if not peer.head.startswith(b"GET"):
            return answer(peer)
        peer.respond({"data": [{"id": "their-model"}]})
        return True

    with ScriptedServer(respond) as scripted:
        yield scripted


def bench(server: ScriptedServer, requests: int, out: str = "out") -> list[str]:
    load = ["--url", server.url, "--requests", str(requests), "--warmup", "1", "--no-power"]
    return ["bench", *load, "--out", out]


def start(server: ScriptedServer, folder: Path, requests: int = 60, out: str = "out") -> subprocess.Popen[str]:
    """A bench that measures."""
    command = [sys.executable, "-m", "pdbench", *bench(server, requests, out)]
    running = subprocess.Popen(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert "load:" in next(line for line in running.stdout if "load:" in line)
    return running


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


def test_second_measurement_into_a_folder_is_refused_before_it_starts(server: ScriptedServer, tmp_path: Path) -> None:
    with start(server, tmp_path) as first:
        begun = len(server.requests)
        for command in (
            bench(server, 4),
            bench(server, 4, "out/../out"),
            ["sweep", *bench(server, 4)[1:], "--vary", "concurrency=1"],
        ):
            refused = call_pdbench(*command, cwd=tmp_path)
            assert refused.returncode == 1 and refused.stderr.count("\n") == 1
            assert "another pdbench measures into" in refused.stderr and "give another --out" in refused.stderr
        other = call_pdbench(*bench(server, 4, "other"), cwd=tmp_path)
        assert other.returncode == 0, other.stderr
        first.send_signal(signal.SIGINT)
        first.communicate()
    assert begun <= len(server.requests)
    assert load_run(tmp_path / "out" / "bench_results").requests
    assert hidden(tmp_path) == []


def test_killed_measurement_keeps_the_earlier_run_and_holds_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    assert call_pdbench(*bench(server, 3), cwd=tmp_path).returncode == 0
    run_id = load_run(tmp_path / "out" / "bench_results").run_id
    with start(server, tmp_path) as killed:
        killed.kill()
    assert load_run(tmp_path / "out" / "bench_results").run_id == run_id
    assert call_pdbench(*bench(server, 5), cwd=tmp_path).returncode == 0
    run = load_run(tmp_path / "out" / "bench_results")
    assert run.run_id != run_id and len([request for request in run.requests if not request.warmup]) == 5
    assert hidden(tmp_path) == []


def test_disk_that_is_full_keeps_the_earlier_run(server: ScriptedServer, tmp_path: Path) -> None:
    assert call_pdbench(*bench(server, 3), cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        full = run_pdbench(*bench(server, 9), cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.returncode == 1 and "make room" in full.stderr and "Traceback" not in full.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before
    assert hidden(tmp_path) == []


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk of `out` takes no results; that of temporary files, which is returned, does."""
    elsewhere, write = tmp_path / "elsewhere", files._write
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def write_if_room(file: IO[bytes], data: bytes) -> None:
        path = Path(f"/proc/self/fd/{file.fileno()}").readlink()
        if path.is_relative_to(tmp_path / "out") and "results" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    monkeypatch.setattr(files, "_write", write_if_room)
    return elsewhere


def test_what_a_full_disk_does_not_take_is_saved_elsewhere(server: ScriptedServer, tmp_path: Path, full: Path) -> None:
    ended = call_pdbench(*bench(server, 3), cwd=tmp_path)
    [saved] = full.glob("*/bench_results")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "out/bench_results/bench_results.json" in ended.stderr and "make room" in ended.stderr
    assert f"what was measured is saved in {saved}" in ended.stderr
    assert len([request for request in load_run(saved).requests if not request.warmup]) == 3
    assert load_run(saved).summary and not [*(tmp_path / "out").rglob("*.json")]


def test_no_room_for_temporary_files_either_leaves_the_memory(
    server: ScriptedServer, tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_room)
    ended = call_pdbench(*bench(server, 3), cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    saved = Path(ended.stderr.partition("saved in ")[2].strip())
    try:
        assert saved.is_relative_to("/dev/shm") and load_run(saved).summary
    finally:
        shutil.rmtree(saved.parent)


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_monitor_on_a_disk_that_became_full_keeps_what_it_read(name: str, tmp_path: Path, full: Path) -> None:
    ended = call_pdbench("monitor", "--duration", "0.3", "--out", f"out/{name}", cwd=tmp_path)
    [saved] = full.glob(f"*/{name}")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "make room" in ended.stderr and f"what was measured is saved in {saved}" in ended.stderr
    assert saved.stat().st_size > 100 and not (tmp_path / "out").exists()


def test_sweep_measures_nothing_more_on_a_full_disk(server: ScriptedServer, tmp_path: Path, full: Path) -> None:
    ended = call_pdbench("sweep", *bench(server, 3)[1:], "--vary", "concurrency=1,2,3", cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "make room" in ended.stderr
    [saved] = full.glob("*/bench_results")  # of the first point
    assert load_run(saved).config["load"]["concurrency"] == 1


def test_full_disk_is_noticed_before_the_load(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: IO[bytes], data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    ended = call_pdbench(*bench(server, 3), cwd=tmp_path)
    assert ended.returncode == 1 and "No space left" in ended.stderr and ended.stderr.count("\n") == 1
    assert server.requests == []


def test_results_folder_that_cannot_be_written_is_noticed_before_the_load(
    server: ScriptedServer, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench_results").write_text("a file of somebody else")
    ended = call_pdbench(*bench(server, 3), cwd=tmp_path)
    assert ended.returncode == 1 and "bench_results" in ended.stderr and ended.stderr.count("\n") == 1
    assert not any(peer.method == "POST" for peer in server.requests)


def call_into_full_disk(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`pdbench` in `folder`, its standard output a disk that is full."""
    with Path("/dev/full").open("w") as full:
        return subprocess.run(
            [sys.executable, "-m", "pdbench", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )


def test_output_that_is_not_taken_ends_no_measurement(server: ScriptedServer, tmp_path: Path) -> None:
    ended = call_into_full_disk(bench(server, 3), tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "not all that was said could be written (No space left on device): make room" in ended.stderr
    assert load_run(tmp_path / "out" / "bench_results").summary


@pytest.mark.parametrize("command", ["--help", "--version", "serve --show", "doctor"])
def test_command_whose_output_is_not_taken_says_so(command: str, tmp_path: Path) -> None:
    ended = call_into_full_disk(command.split(), tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "not all that was said could be written (No space left on device)" in ended.stderr


def test_reader_of_the_output_that_goes_ends_no_measurement(server: ScriptedServer, tmp_path: Path) -> None:
    with start(server, tmp_path, requests=10) as measuring:
        assert measuring.stdout is not None
        measuring.stdout.close()
        assert measuring.wait(60) == 0
    assert sum(not request.warmup for request in load_run(tmp_path / "out" / "bench_results").requests) == 10


def test_terminal_without_the_letters_ends_no_measurement(server: ScriptedServer, tmp_path: Path) -> None:
    ended = run_pdbench(*bench(server, 3), cwd=tmp_path, timeout_s=120, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and ended.stderr == "" and "model their-model ? 1 at a time" in ended.stdout


def test_first_failure_is_told_when_saving_fails_too(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.app.command(name="fail-twice")
    def fail_twice() -> None:
        try:
            raise UserError("the server died")
        finally:
            raise UserError("cannot write")

    try:
        with pytest.raises(SystemExit):
            cli.main(["fail-twice"])
    finally:
        del cli.app["fail-twice"]
    assert capsys.readouterr().err == "pdbench: the server died; then cannot write\n"


def test_bench_of_no_server_leaves_no_folder(tmp_path: Path) -> None:
    failed = call_pdbench("bench", "--url", f"http://127.0.0.1:{free_port()}", "--out", "a/b", cwd=tmp_path)
    assert failed.returncode == 1 and "no OpenAI-compatible server" in failed.stderr
    assert [*tmp_path.iterdir()] == []


def test_reading_needs_no_lock(server: ScriptedServer, tmp_path: Path) -> None:
    assert call_pdbench(*bench(server, 3), cwd=tmp_path).returncode == 0
    with start(server, tmp_path) as measuring:
        read = call_pdbench("report", "out/bench_results", "--out", "out/report", cwd=tmp_path)
        assert read.returncode == 0, read.stderr
        wait_until(lambda: measuring.poll() is None)
        measuring.kill()
