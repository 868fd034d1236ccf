"""What measuring needs to know of servers that run: saved beside their logs, so that `pdbench bench` finds it again.

Try: python -m pdbench.serving.deployment_info logs
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec
import psutil

from pdbench.errors import UserError
from pdbench.records import write_whole

FILE = "running.json"
_LOCK = ".lock"


class DeploymentInfo(msgspec.Struct, kw_only=True):
    """Servers that run. `processes` and `gpus` are by role; `urls` by instance name; `event_logs` may not exist yet.

    `hosts` is for a cluster: node -> its own `processes`, `gpus` and `event_logs`, and the `roles` there.
    """

    name: str
    url: str
    model_name: str
    model_path: str | None = None
    owner_pid: int | None = None
    urls: dict[str, str] = {}
    processes: dict[str, list[int]] = {}
    gpus: dict[str, list[int]] = {}
    event_logs: list[str] = []
    hosts: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] = {}

    def prefill_url(self) -> str | None:
        """The first prefill instance."""
        return self.urls.get("prefill-0")

    def decode_urls(self) -> list[str]:
        """Every decode instance of a disaggregated deployment."""
        return [url for name, url in self.urls.items() if name.startswith("decode-")]

    def instance(self, name: str) -> "DeploymentInfo":
        """One instance by itself, as anybody's server that is asked directly."""
        role, _, number = name.rpartition("-")
        alike = [one for one in self.urls if one.rpartition("-")[0] == role]
        gpus = self.gpus.get(role, [])
        width, index = len(gpus) // len(alike), int(number)
        return DeploymentInfo(
            name="bench",
            url=self.urls[name],
            model_name=self.model_name,
            model_path=self.model_path,
            owner_pid=self.owner_pid,
            processes={role: self.processes.get(role, [])[index : index + 1]},
            gpus={role: gpus[index * width : (index + 1) * width]} if width else {},
            config=self.config,
        )


def save(running: DeploymentInfo, folder: Path) -> None:
    """Write it into `folder`."""
    write_whole(folder / FILE, msgspec.json.format(msgspec.json.encode(running), indent=1))


def forget(folder: Path) -> None:
    """This process's servers are down; another's, which may run on, stay known."""
    known = _read(folder)
    if known is not None and known.owner_pid == os.getpid():
        (folder / FILE).unlink(missing_ok=True)


def claim(folder: Path) -> IO[bytes]:
    """The folder for one deployment's logs, until the file is closed or this process ends, in whatever way.

    Raises UserError while another has it (the logs and events of one would be the other's), or when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("ab")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; give --log-dir a folder that you may write"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"servers that run log into {folder}: end them, or give another --log-dir") from None
    except OSError:
        pass  # a file system without locks
    return lock


def find(folder: Path, url: str) -> DeploymentInfo | None:
    """The deployment of `folder` when it still runs and answers at `url`, or the one of its instances that does; else None."""
    running = _read(folder)
    if running is None or running.owner_pid is None or not psutil.pid_exists(running.owner_pid):
        return None
    if _place(running.url) == _place(url):
        return running
    if running.hosts:
        return None
    return next((running.instance(name) for name, one in running.urls.items() if _place(one) == _place(url)), None)


def _place(url: str) -> str:
    return urlsplit(url).netloc.replace("localhost", "127.0.0.1")


def _read(folder: Path) -> DeploymentInfo | None:
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=DeploymentInfo)
    except (OSError, msgspec.MsgspecError):
        return None


if __name__ == "__main__":
    print((Path(sys.argv[1] if len(sys.argv) > 1 else "logs") / FILE).read_text())
