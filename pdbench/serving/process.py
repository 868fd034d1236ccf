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
        causes = (cause for sign, cause in _CAUSES if code is not None and sign in log.lower())
        return ServerState(
            pid=self.pid,
            age_s=time.monotonic() - self._started_s,
            healthy=healthy,
            exit_code=code,
            cause=next(causes, None),
            log_tail="\n".join(log.splitlines()[-_TAIL_LINES:]),
        )

    def close(self, timeout_s: float = GRACE_S + 5) -> int:
        return super().close(timeout_s)
