"""What tests do with processes and ports: wait for a condition, find a free port, run pdbench's command."""

import contextlib
import errno
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import psutil

ROOT = Path(__file__).parents[2]
_random = random.SystemRandom()  # hypothesis seeds the other one


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "condition") -> None:
    """Raises TimeoutError when `condition` does not become true within `timeout_s`."""
    begin_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begin_s
        if waited_s > timeout_s:
            raise TimeoutError(f"{what} did not become true within {timeout_s:g} s")
        time.sleep(min(0.02 + waited_s / 10, 0.2))  # some conditions cost much to look at


def lines_of(log: str | Path) -> list[str]:
    """The lines of a file to which another process may be writing: its last one counts once it is whole."""
    return Path(log).read_text().rpartition("\n")[0].splitlines()


def free_port(host: str = "127.0.0.1", count: int = 1) -> int:
    """A TCP port that nothing listens on now, the first of `count` such ports in a row.

    Beside the ranges from which Ray takes ports of workers (10002 to 19999) and the kernel those of clients (from 32768), which
    would take one before its server listens. Each of the three processes of ./run_tests.sh has its own third.
    """
    third = 4000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 3)
    while True:
        first = 20000 + third + _random.randrange(4000 - count)
        with contextlib.ExitStack() as probes:
            try:
                for offset in range(count):
                    probes.enter_context(socket.socket()).bind((host, first + offset))
                return first
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise


def ending_with_tests(argv: Sequence[str]) -> list[str]:
    """The command line of a process that the kernel kills when the process of the tests ends, however it does; same process id."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv] if shutil.which("setpriv") else list(argv)


def run_pdbench(
    *arguments: str | Path, cwd: Path, timeout_s: float = 60.0, columns: int = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m pdbench ARGUMENTS` in `cwd`, its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "pdbench", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def call_pdbench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process: a new one spends a second or two on imports."""
    from pdbench import cli

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    columns = mock.patch.dict(os.environ, COLUMNS="200")
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), columns:
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code or 0
    if isinstance(code, str):
        err.write(f"{code}\n")
    returned = code if isinstance(code, int) else 1
    return subprocess.CompletedProcess(arguments, returned, out.getvalue(), err.getvalue())


def marked(folder: Path) -> dict[str, str]:
    """What every process of one test inherits: this Python, and a mark by which `left` finds them."""
    return os.environ | {"PDBENCH_PYTHON": sys.executable, "COLUMNS": "160", "PDBENCH_TEST_MARK": str(folder)}


def left(folder: Path) -> list[str]:
    """Living processes that started as `marked`, whatever they call themselves and wherever they moved."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PDBENCH_TEST_MARK") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                lines.append(" ".join(process.cmdline()))
    return lines
