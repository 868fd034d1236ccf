"""One server process under the supervisor: its log in a file, its state, its end with all it started."""

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pdbench.http import get
from pdbench.serving.vllm import Command
from pdbench.supervisor import Child, supervised

GRACE_S = 8.0
"""How long a server may take to end after SIGTERM before it is killed."""
_TAIL_LINES = 15

_CAUSES = (
    ("address already in use", "its port is taken: `pdbench doctor` says by whom"),
    (
        "is less than desired gpu memory utilization",
        "not enough free GPU memory: end what holds it (nvidia-smi), or lower --gpu-memory-utilization",
    ),
    (
        "no available memory for the cache blocks",
        "not enough GPU memory for the KV cache: raise --gpu-memory-utilization or lower --max-model-len",
    ),
    (
        "out of memory",
        "not enough GPU memory: end what holds it (nvidia-smi), lower --gpu-memory-utilization, or use more GPUs",
    ),
    ("no cuda gpus are available", "no GPU is visible to it: check nvidia-smi and --prefill-gpus / --decode-gpus"),
    ("invalid device ordinal", "it was given a GPU that this machine has not: check --prefill-gpus / --decode-gpus"),
    (
        "unrecognized arguments",
        "this vLLM does not know one of its arguments: check --vllm-args, or the vLLM version with `pdbench doctor`",
    ),
    ("greater than the derived max_model_len", "the model does not allow this length: lower --max-model-len"),
    (
        "error: argument",
        "this vLLM refuses one of its arguments (below): check --vllm-args, or its version with `pdbench doctor`",
    ),
    ("peer access", "no P2P between these GPUs: `nvidia-smi topo -m` shows the links; use --connector tcp"),
    (
        "unhandled system error",
        "NCCL could not connect the GPUs: `pdbench doctor` shows the links; use --connector tcp",
    ),
    ("repository not found", "the hub has no such model, or it needs a token: check --model"),
    ("couldn't connect to", "the model is not on this machine and the hub cannot be reached: give --model a folder"),
    ("localentrynotfound", "the model is not on this machine and the hub cannot be reached: give --model a folder"),
    ("does not appear to have a file named config.json", "the model's folder has no config.json: check --model"),
    ("no module named", "a package is missing in this environment: install requirements/, or set PDBENCH_PYTHON"),
    ("out of memory: killed", "the system ended it, most likely for want of memory"),
)


class Secrets(dict[str, str]):
    """Environment variables that no log shows."""

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self)})"


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """A started server now. `cause` (the likely one) and `log_tail` are those of a dead one."""

    pid: int | None = None
    age_s: float = 0.0
    healthy: bool = False
    exit_code: int | None = None
    cause: str | None = None
    log_tail: str = ""


class ServerProcess:
    """A running server and all its descendants. `close` ends them; so does the end of this process, however it comes."""

    def __init__(self, command: Command, log: Path, secrets: Mapping[str, str] | None = None) -> None:
        """Start it. Raises OSError when the log cannot be written."""
        self._url, self._log = command.url, log
        self._healthy = False
        self._started_s = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = command.environment | dict(secrets or {})
        with log.open("wb") as output:
            self._child = Child(supervised(command.argv, GRACE_S), environment, output.fileno())

    @property
    def pid(self) -> int:
        """The supervisor's process id: the server and its workers are its descendants."""
        return self._child.pid

    def state(self) -> ServerState:
        code = self._child.exit_code()
        if code is None and not self._healthy:
            self._healthy = get(self._url, "/health", timeout_s=2.0) is not None
        return ServerState(
            pid=self.pid,
            age_s=time.monotonic() - self._started_s,
            healthy=self._healthy and code is None,
            exit_code=code,
            cause=None if code is None else self._likely_cause(),
            log_tail="" if code is None else self.log_tail(),
        )

    def ask_to_stop(self) -> None:
        """Tell it to end and do not wait: several servers can end at the same time."""
        self._child.ask_to_stop()

    def close(self) -> None:
        """Stop it and wait until nothing of it lives."""
        self._child.close(GRACE_S + 5)

    def log_tail(self) -> str:
        """The end of its log."""
        return "\n".join(self._read_log().splitlines()[-_TAIL_LINES:])

    def _likely_cause(self) -> str | None:
        """What in its log looks like the reason of its end, with the remedy; None when nothing known is there."""
        text = self._read_log().lower()
        return next((cause for sign, cause in _CAUSES if sign in text), None)

    def _read_log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""
