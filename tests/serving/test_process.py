"""Servers end with all they started, however their parent ends."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from pdbench.serving.process import ServerProcess
from pdbench.serving.vllm import Command
from tests.support.processes import wait_until

# Seconds that no other process of this machine sleeps: by them its own are found.
MARKS = [f"{7000 + number}.{os.getpid()}" for number in (1, 2, 3)]
STUBBORN = f"setsid sleep {MARKS[0]} & sleep {MARKS[1]} & trap '' TERM; echo up; while true; do sleep {MARKS[2]}; done"
WAIT_S = 30.0


def start(folder: Path, *argv: str) -> ServerProcess:
    return ServerProcess(Command("server-0", "server", argv, {}, "http://127.0.0.1:9"), folder / "server-0.log")


def marked() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(mark in (process.info["cmdline"] or []) for mark in MARKS)
    ]


def test_close_ends_children_that_changed_their_session_and_ignore_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbench.serving.process.GRACE_S", 2.0)
    process = start(tmp_path, "bash", "-c", STUBBORN)
    wait_until(lambda: len(marked()) >= 3, WAIT_S)
    process.close()
    assert process.state().exit_code is not None
    assert marked() == []


def test_sigkill_of_the_parent_leaves_nothing(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import time
                from pathlib import Path
                from pdbench.serving import process
                from pdbench.serving.vllm import Command
                command = Command("server-0", "server", ("bash", "-c", {STUBBORN!r}), {{}}, "http://127.0.0.1:9")
                process.GRACE_S = 2.0
                process.ServerProcess(command, Path({str(tmp_path / "server-0.log")!r}))
                time.sleep(600)
            """),
        ]
    )
    wait_until(lambda: len(marked()) >= 3, WAIT_S)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: marked() == [], WAIT_S)


def test_sigkill_of_the_supervisor_ends_the_server(tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", MARKS[0])
    wait_until(lambda: len(marked()) >= 2, WAIT_S)  # the supervisor's own command line names it, too
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: marked() == [], WAIT_S)
    process.close()


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_state_of_a_dead_server_has_its_exit_code_and_the_end_of_its_log(
    tmp_path: Path, script: str, code: int
) -> None:
    process = start(tmp_path, "bash", "-c", f"echo last words; {script}")
    wait_until(lambda: process.state().exit_code is not None, WAIT_S)
    state = process.state()
    assert (state.exit_code, state.log_tail, state.healthy) == (code, "last words", False)
    assert "SIGKILL" in state.cause if state.cause else code == 3
    process.close()
