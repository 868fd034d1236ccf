"""One server process under the supervisor: its log in a file, its state, its end with all it started."""

import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pdbench.http import get
from pdbench.serving.vllm import Command
from pdbench.supervisor import GRACE_S, Child, supervised

_TAIL_LINES = 15

_CAUSES: dict[str, str] = tomllib.loads(Path(__file__).with_name("causes.toml").read_text("utf-8"))


class Secrets(dict[str, str]):
    """Environment variables that no log shows."""

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self)})"


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """A started server now. `log_tail` is that of one that is not healthy, `cause` (the likely one) that of a dead one."""

    pid: int | None = None
    age_s: float = 0.0
    healthy: bool = False
    exit_code: int | None = None
    cause: str | None = None
    log_tail: str = ""


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
            super().__init__(supervised(command.argv, GRACE_S), environment, output.fileno())

    def state(self) -> ServerState:
        code = self.exit_code()
        if code is None and not self._healthy:
            self._healthy = get(self._url, "/health", timeout_s=2.0) is not None
        healthy = self._healthy and code is None
        log = "" if healthy or not self._log.exists() else self._log.read_text(errors="replace")
        causes = (cause for sign, cause in _CAUSES.items() if code is not None and sign in log.lower())
        return ServerState(
            pid=self.pid,
            age_s=time.monotonic() - self._started_s,
            healthy=healthy,
            exit_code=code,
            cause=next(causes, None),
            log_tail="\n".join(log.splitlines()[-_TAIL_LINES:]),
        )
