"""What tests do with processes and ports: wait for a condition, find a free port, run pdbench's command."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "condition") -> None:
    """Raises TimeoutError when `condition` does not become true within `timeout_s`."""
    begin_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begin_s
        if waited_s > timeout_s:
            raise TimeoutError(f"{what} did not become true within {timeout_s:g} s")
        time.sleep(min(0.02 + waited_s / 10, 0.2))  # some conditions cost much to look at


def free_port(host: str = "127.0.0.1", count: int = 1) -> int:
    """A TCP port that nothing listens on now, the first of `count` such ports in a row."""
    while True:
        first = 0
        with contextlib.ExitStack() as probes:
            try:
                for offset in range(count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind((host, first + offset))
                    first = first or int(probe.getsockname()[1])
                return first
            except (OSError, OverflowError):
                if not first:
                    raise


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
