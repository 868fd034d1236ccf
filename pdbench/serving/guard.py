"""Runs one command and outlives nobody: when its parent is gone, or asks, everything that the command started ends.

The parent holds the other end of our standard input. Its end, for whatever reason (SIGKILL included), is the order to
stop. The guard is a session of its own and the subreaper of all descendants, so that none escapes by changing its group.
Only the standard library: this is in memory once a server. Try: python -m pdbench.serving.guard 5 sleep 60 < /dev/null
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """`guard GRACE_S COMMAND...`: returns the command's exit code, 128 + N when signal N ended it."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, _note)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    )
    while child.poll() is None and not _asked:
        ready, _, _ = select.select([sys.stdin.fileno(), wake_read], [], [])
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
            break
        if wake_read in ready:
            os.read(wake_read, 4096)
    _end_descendants(child, grace_s)
    code = child.wait()
    return code if code >= 0 else 128 - code


_asked: list[int] = []


def _note(number: int, frame: object) -> None:
    if number != signal.SIGCHLD:
        _asked.append(number)


def _end_descendants(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to all, SIGKILL to who is left after `grace_s`; returns when no descendant lives."""
    deadline = time.monotonic() + grace_s
    number = signal.SIGTERM
    signalled: set[int] = set()
    while True:
        child.poll()
        _reap(child)
        alive = _descendants(os.getpid())
        if not alive:
            return
        if number == signal.SIGTERM and time.monotonic() > deadline:
            number, signalled = signal.SIGKILL, set()
        for pid in set(alive) - signalled:
            signalled.add(pid)
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect adopted descendants that have ended (never the command itself: its exit code is wanted)."""
    for pid in _children(os.getpid()):
        if pid != child.pid:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def _descendants(pid: int) -> list[int]:
    """All living descendants of `pid`, zombies left out."""
    found = []
    for one in _children(pid):
        if not _is_zombie(one):
            found.append(one)
        found += _descendants(one)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        pass  # ended meanwhile
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


if __name__ == "__main__":
    sys.exit(main())
