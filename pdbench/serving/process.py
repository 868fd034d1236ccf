"""One server process: started under the supervisor, its log in a file, its health over HTTP, stopped with all it started.

Try: python -m pdbench.serving.process sleep 5
"""

import sys
import time
from pathlib import Path

from pdbench.http import get
from pdbench.supervisor import Child, supervised

GRACE_S = 8.0
"""How long a server may take to end after SIGTERM before it is killed."""

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


class ServerProcess:
    """A running server and all its descendants. `close` ends them; so does the end of this process, however it comes."""

    def __init__(self, name: str, argv: tuple[str, ...], environment: dict[str, str], url: str, log: Path) -> None:
        """Start it. Raises OSError when the log cannot be written."""
        self.name, self.url, self.log = name, url, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started_s = time.monotonic()
        with log.open("wb") as output:
            self._child = Child(supervised(argv, GRACE_S), environment, output.fileno())

    @property
    def pid(self) -> int:
        """The supervisor's process id: the server and its workers are its descendants."""
        return self._child.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.exit_code()

    def is_healthy(self) -> bool:
        """Does GET /health answer 200?"""
        return get(self.url, "/health", timeout_s=2.0) is not None

    def ask_to_stop(self) -> None:
        """Tell it to end and do not wait: several servers can end at the same time."""
        self._child.ask_to_stop()

    def close(self) -> None:
        """Stop it and wait until nothing of it lives."""
        self._child.close(GRACE_S + 5)

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def likely_cause(self) -> str | None:
        """What in its log looks like the reason of its end, with the remedy; None when nothing known is there."""
        text = self.log.read_text(errors="replace").lower() if self.log.exists() else ""
        return next((cause for sign, cause in _CAUSES if sign in text), None)


if __name__ == "__main__":
    demo = ServerProcess("demo", tuple(sys.argv[1:]), {}, "http://127.0.0.1:9", Path("demo.log"))
    time.sleep(1)
    print("exit code", demo.exit_code())
    demo.close()
