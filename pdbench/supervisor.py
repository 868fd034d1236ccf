"""Child processes that never outlive this one: each ends when its standard input does, a pipe that this process holds.

The kernel closes a process's pipes however it ends, SIGKILL included. As a script, `python -I -S supervisor.py GRACE_S
COMMAND...` runs one command with that guarantee. Only the standard library: it is in memory once per server.
"""

import contextlib
import ctypes
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_S = 8.0
"""How long a server may take to end after SIGTERM before its supervisor kills it."""
CLOSE_S = GRACE_S + 5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """A running child process that ends when it is closed or this process ends. `output` is a file descriptor."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, output: int = subprocess.PIPE
    ) -> None:
        environment = os.environ | dict(environment or {})
        # It can import this package wherever it starts.
        paths = [environment.get("PYTHONPATH"), str(Path(__file__).parents[1])]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process, which then closes its children
        )
        self.pid = self._process.pid

    def wait_ready(self) -> str | None:
        """None once it prints "ready" into its pipe; all that it printed if it ends without."""
        assert self._process.stdout
        printed = []
        for line in self._process.stdout:
            if line == b"ready\n":
                return None
            printed.append(line.decode(errors="replace").strip())
        return " ".join(printed)

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Close its standard input and do not wait: several children can end at the same time."""
        assert self._process.stdin
        self._process.stdin.close()

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Stop it, or kill it after `timeout_s`; returns its exit code."""
        self.ask_to_stop()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
        if self._process.stdout:
            self._process.stdout.close()
        return self._process.wait()


def supervised(command: Sequence[str], grace_s: float) -> list[str]:
    """The command line of a Child that runs `command`; at its end, all its descendants get SIGTERM, after `grace_s` SIGKILL."""
    return [sys.executable, "-I", "-S", __file__, str(grace_s), *command]


def held_by_parent(parent: int, *wake: int) -> bool:
    """For a child: waits half a second, or until a `wake` descriptor can be read; False once the parent ended or closed us."""
    readable, _, _ = select.select([0, *wake], [], [], 0.5)
    # A process that the parent forked may hold the pipe open after it: watch the parent's own life as well.
    return os.getppid() == parent and not (0 in readable and not os.read(0, 4096))


def end_with(parent: int, number: int) -> None:
    """Have the kernel send this process the signal `number` when its parent ends, or at once where it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def main() -> int:
    """Run the command; returns its exit code, 128 + N when signal N ended it."""
    grace_s, command, parent = float(sys.argv[1]), sys.argv[2:], os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    # Descendants that lose their parent become children of this process, so that none escapes by changing its session.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stops.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    end = functools.partial(end_with, os.getpid(), signal.SIGKILL)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end)
    while process.returncode is None and not stops and held_by_parent(parent, wake_read):
        with contextlib.suppress(BlockingIOError):
            os.read(wake_read, 4096)
        _reap(process)
    _end_descendants(process, grace_s)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end_descendants(process: subprocess.Popen[bytes], grace_s: float) -> None:
    deadline_s = time.monotonic() + grace_s
    number, signalled = signal.SIGTERM, set[int]()
    while True:
        _reap(process)
        if not (alive := _descendants(os.getpid())):
            return
        if number == signal.SIGTERM and time.monotonic() > deadline_s:
            number, signalled = signal.SIGKILL, set()
        for pid in alive - signalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        signalled |= alive
        time.sleep(0.02)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Collect all children that have ended, adopted ones included."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == process.pid:
                process.returncode = os.waitstatus_to_exitcode(ended[1])


def _descendants(pid: int) -> set[int]:
    descendants = set[int]()
    with contextlib.suppress(OSError):  # it ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                descendants |= {child} | _descendants(child)
    return descendants


if __name__ == "__main__":
    sys.exit(main())
