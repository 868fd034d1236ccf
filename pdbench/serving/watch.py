"""Do the servers of a measurement live? Asked a few times a second while a load runs, beside it; nothing is sent to our own."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from pdbench.errors import UserError
from pdbench.events import LogLine
from pdbench.http import request
from pdbench.records import Clock
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from pdbench.serving.process import ENGINE_DIED, LogWatch, cause_of_death

EVERY_S = 0.25
HEALTH_EVERY_S = 1.0
FAILED_CHECKS = 2
"""So many health checks in a row must fail, each with an answer of 500 or more or none at all, before a foreign server is dead."""


class Servers(Protocol):
    """Servers that can die: a Deployment of ours, or RunningServers."""

    def death(self) -> str | None:
        """Which server is dead and what killed it, in one line; None while all live."""

    def check(self) -> None:
        """Raises UserError, the end of the log with it, when a server is dead and is not started again."""

    def log_lines(self, clock: Clock) -> dict[str, list[LogLine]]:
        """Server -> what its log has said until now that is worth a flag, on the run's clock; of servers whose logs are ours."""


class Watch:
    """Asks `death` at most every quarter of a second; what it once said stays."""

    def __init__(self, death: Callable[[], str | None]) -> None:
        self._death, self._due_s = death, 0.0
        self.died: str | None = None

    def problem(self) -> str | None:
        """Which server is dead and what killed it; None while all live."""
        if self.died is None and time.monotonic() >= self._due_s:
            self.died = self._death()
            self._due_s = time.monotonic() + EVERY_S
        return self.died

    def problem_within(self, seconds: float) -> str | None:
        """The same, of a server that may be about to end."""
        until_s = time.monotonic() + seconds
        while self.problem() is None and time.monotonic() < until_s:
            time.sleep(EVERY_S)
        return self.died


class RunningServers:
    """Servers that another process started: their processes; the logs of `pdbench serve`, else the health check of the address."""

    def __init__(self, info: DeploymentInfo, log_dir: Path, *, verify_tls: bool = True) -> None:
        """`log_dir` is that of the `pdbench serve` that owns them; of a foreign server nothing is there."""
        self._url, self._log_dir, self._verify_tls = info.url, log_dir, verify_tls
        self._processes: list[tuple[ServerInfo, psutil.Process]] = []
        self._logs: list[tuple[ServerInfo, LogWatch]] = []
        for server in info.servers if info.owner_pid else ():
            self._logs.append((server, LogWatch(log_dir / f"{server.name}.log", from_now=True)))
        for server in info.servers:
            for pid in server.pids if server.host is None else ():
                with suppress(psutil.Error):
                    self._processes.append((server, psutil.Process(pid)))
        self._failed_checks, self._check_due_s = 0, 0.0
        self._has_health = not self._logs and self._health() == 200

    def death(self) -> str | None:
        dead = {server.name: ENGINE_DIED for server, log in self._logs if log.look()}
        for server, process in self._processes:
            lives = False
            with suppress(psutil.Error):
                lives = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            if not lives:
                dead[server.name] = f"(process {process.pid} is gone)"
        causes = {name: cause_of_death(self._log_dir / f"{name}.log") for name in dead if self._logs}
        # Its `pdbench serve` ends the others at once: of these, no log gives a cause.
        for name in sorted(dead, key=lambda name: causes.get(name) is None):
            why = causes.get(name) or ("its log does not say why" if self._logs else "read its log")
            return f"{name} died {dead[name]}: {why}"
        if self._has_health and time.monotonic() >= self._check_due_s:
            status = self._health()
            bad = status is None or status >= 500
            self._failed_checks = self._failed_checks + 1 if bad else 0
            self._check_due_s = time.monotonic() + HEALTH_EVERY_S
            if self._failed_checks >= FAILED_CHECKS:
                answer = f"answers {status}" if status else "is not answered"
                return f"the server at {self._url} died: its health check {answer}; read its log"
        return None

    def check(self) -> None:
        if died := self.death():
            raise UserError(died)

    def log_lines(self, clock: Clock) -> dict[str, list[LogLine]]:
        return {
            server.name: [msgspec.structs.replace(line, t_s=clock.of_monotonic(line.t_s)) for line in log.lines()]
            for server, log in self._logs
        }

    def _health(self) -> int | None:
        """The status of its health check; None where nothing listens, 0 where it takes its time, as a busy server may."""
        try:
            return request(self._url, "/health", timeout_s=2.0, verify_tls=self._verify_tls)[0]
        except TimeoutError:
            return 0
        except OSError:
            return None
