"""Children end with the process that holds them, however it ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdbench.supervisor import Child
from tests.support.processes import ROOT, wait_until

# Starts a supervised `sleep`, forks a process that keeps the pipe open, and prints the supervisor's process id.
PARENT = """
import os, time
from pdbench.supervisor import Child, supervised
child = Child(supervised(["sleep", "7100"], 5.0))
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_child_ends_although_a_forked_process_holds_its_pipe() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True) as parent:
        try:
            assert parent.stdout
            supervisor = psutil.Process(int(parent.stdout.readline()))
            wait_until(lambda: supervisor.children(), what="sleep started")
            family = [supervisor, *supervisor.children()]
            parent.kill()
            wait_until(lambda: not any(process.is_running() for process in family), 30, "supervisor and sleep ended")
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_child_that_ends_unready_says_what_it_printed() -> None:
    child = Child([sys.executable, "-c", "import sys; print('no device'); sys.exit('really none')"])
    assert set((child.wait_ready() or "").split()) == {"no", "device", "really", "none"}
    assert child.close(10) == 1


def test_child_is_ready_when_it_says_so() -> None:
    child = Child([sys.executable, "-c", "print('warning', 'ready', sep='\\n', flush=True); input()"])
    assert child.wait_ready() is None
    assert child.exit_code() is None
    assert child.close(10) == 1  # its standard input ended


def test_child_that_does_not_stop_is_killed() -> None:
    child = Child([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"])
    child.wait_ready()
    assert child.close(0.2) == -signal.SIGKILL


def test_child_can_import_the_package_wherever_it_starts(tmp_path: Path) -> None:
    code = "import os; os.chdir('/'); import pdbench; print('ready', flush=True)"
    child = Child([sys.executable, "-c", code], {"PYTHONPATH": str(tmp_path)})
    assert child.wait_ready() is None
    assert child.close(10) == 0


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv on this machine: apt-get install util-linux")
def test_servers_of_tests_that_are_killed_end_with_them() -> None:
    code = (
        "import subprocess, time; from tests.support.processes import ending_with_tests\n"
        "print(subprocess.Popen(ending_with_tests(['sleep', '7200'])).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout
        server = psutil.Process(int(parent.stdout.readline()))
        # Until then it is setpriv, which may not have asked the kernel yet.
        wait_until(lambda: server.name() == "sleep")
        parent.kill()

        def has_ended() -> bool:
            try:
                return server.status() == psutil.STATUS_ZOMBIE  # of a container whose first process collects nothing
            except psutil.NoSuchProcess:
                return True

        wait_until(has_ended)
