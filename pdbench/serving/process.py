"""One server process under the supervisor: its log in a file, its state, its end with all it started."""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from pdbench.events import LogLine
from pdbench.files import new_lines
from pdbench.http import get
from pdbench.serving.causes import engine_died, likely_cause, lines_of_load
from pdbench.serving.vllm import Command
from pdbench.supervisor import GRACE_S, Child, supervised

_TAIL_LINES = 15
_KILLED = 128 + 9
_MOST_LINES = 1000


class Secrets(dict[str, str]):
    """Environment variables that no log shows."""

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self)})"


ENGINE_DIED = "(its engine; the API server still answers)"


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """A started server now. `log_tail` is that of one that is not healthy, `cause` (the likely one) that of a dead one, which has
    an exit code, or whose log says that its engine is dead (its API server may answer for a while)."""

    pid: int | None = None
    age_s: float = 0.0
    healthy: bool = False
    exit_code: int | None = None
    engine_died: bool = False
    cause: str | None = None
    log_tail: str = ""

    @property
    def end(self) -> str | None:
        """How it died, in words; None of one that lives."""
        if self.exit_code is None:
            return ENGINE_DIED if self.engine_died else None
        return f"with exit code {self.exit_code}"


class LogWatch:
    """Reads what is new in a server's log, and remembers whether it said that the engine is dead, and its lines for `lines_of_load`
    with the monotonic instants at which they were read."""

    def __init__(self, log: Path, *, from_now: bool = False) -> None:
        self._log, self.engine_died = log, False
        self._seen = log.stat().st_size if from_now and log.exists() else 0
        self._lines: list[LogLine] = []
        self._looking = threading.Lock()

    def look(self) -> bool:
        """Is the engine dead, by the log?"""
        with self._looking:
            with suppress(FileNotFoundError):
                if not self.engine_died:
                    new, self._seen = new_lines(self._log, self._seen)
                    text = new.decode(errors="replace")
                    self.engine_died = engine_died(text)
                    self._lines += lines_of_load(text, time.monotonic())[: _MOST_LINES - len(self._lines)]
            return self.engine_died

    def lines(self) -> list[LogLine]:
        """Until this moment."""
        self.look()
        return self._lines[:]


def cause_of_death(log: Path, exit_code: int | None = None) -> str | None:
    """What a dead server's log gives as the cause; without one, what its exit code does."""
    # Bytes, because a progress bar's carriage returns are no lines.
    cause = likely_cause(log.read_bytes().decode(errors="replace")) if log.exists() else None
    if cause is None and exit_code == _KILLED:
        return "it was killed (SIGKILL): by somebody, or by the system for want of memory (`dmesg` says so)"
    return cause


class ServerProcess(Child):
    """A running server and all its descendants, of which its supervisor (`pid`) is the root. `close` ends them; so does the
    end of this process, however it comes."""

    def __init__(self, command: Command, log: Path, secrets: Mapping[str, str] | None = None) -> None:
        """Start it. Raises OSError when the log cannot be written."""
        self._url, self._log = command.url, log
        self._healthy = False
        self._started_s = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            environment = command.environment | dict(secrets or {})
            self.watch = LogWatch(log)
            super().__init__(supervised(command.argv, GRACE_S), environment, output.fileno())

    def state(self) -> ServerState:
        code = self.exit_code()
        if code is None and not self._healthy:
            self._healthy = get(self._url, "/health", timeout_s=2.0) is not None
        dead = self.watch.look() or code is not None
        healthy = self._healthy and not dead
        log = "" if healthy or not self._log.exists() else self._log.read_text(errors="replace")
        return ServerState(
            pid=self.pid,
            age_s=time.monotonic() - self._started_s,
            healthy=healthy,
            exit_code=code,
            engine_died=self.watch.engine_died,
            cause=cause_of_death(self._log, code) if dead else None,
            log_tail="" if healthy else "\n".join(log.splitlines()[-_TAIL_LINES:]) or "(its log is empty)",
        )
