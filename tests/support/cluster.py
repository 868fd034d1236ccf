"""Hosts as network namespaces on one machine, with their own addresses and clocks, a switch between them, a real Ray node in each."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.support.processes import ROOT, wait_until

NETWORK = "10.213.77"
PORT = 6379
PATIENCE_S = 120.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class NotPermittedError(Exception):
    """This machine lets us make no network namespaces; the message says why."""


class Host:
    """One namespace: `run` and `popen` start programs in it, with a monotonic clock that is `ahead_s` ahead of this machine's."""

    def __init__(self, hosts: "Hosts", number: int, ahead_s: int) -> None:
        self.hosts, self.ahead_s = hosts, ahead_s
        self.name, self.address = f"{hosts.name}-{number}", f"{NETWORK}.{number}"
        self.link, self.port = f"{hosts.name}v{number}", f"{hosts.name}p{number}"
        self.own = hosts.folder / f"host-{number}"
        self.own.mkdir()
        self.ray_node: subprocess.Popen[str] | None = None
        self.starts = 0
        self.harmed = False
        ip("netns", "add", self.name)
        ip(
            "link",
            "add",
            self.link,
            "netns",
            self.name,
            "type",
            "veth",
            "peer",
            "name",
            self.port,
            "netns",
            hosts.switch,
        )
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", self.link)
        ip("-n", self.name, "link", "set", self.link, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "route", "add", "default", "dev", self.link)
        ip("-n", hosts.switch, "link", "set", self.port, "master", "bridge", "up")

    def command(self, arguments: Sequence[str]) -> list[str]:
        clock = (
            ["unshare", "-T", "--monotonic", str(self.ahead_s), "--fork", "--kill-child", "--"] if self.ahead_s else []
        )
        # Ray's sockets have names in a folder that all nodes call alike: each host sees its own one there.
        mounted = ["sh", "-c", f'mount --bind {self.own} {self.hosts.ray} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *mounted, *clock, *arguments]

    def popen(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(arguments), env=self.hosts.environment, text=True, **options)  # type: ignore[call-overload]

    def run(self, *arguments: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(arguments),
            env=self.hosts.environment,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def start_ray(self, head: "Host | None" = None, cpus: int = 2) -> subprocess.Popen[str]:
        """The Ray node of this host, joined to `head`'s cluster or the head itself; it stays in the foreground."""
        arguments = ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir", str(self.hosts.ray)]
        if head:
            arguments = ["--address", f"{head.address}:{PORT}"]
        self.starts += 1
        arguments += [
            "--node-name",
            self.node_name(),
            "--num-cpus",
            str(cpus),
            "--object-store-memory",
            "100000000",
            "--disable-usage-stats",
            "--block",
        ]
        log = (self.hosts.folder / f"{self.name}.ray.log").open("w")
        self.ray_node = self.popen(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--node-ip-address",
            self.address,
            *arguments,
            stdout=log,
            stderr=log,
        )
        return self.ray_node

    def node_name(self) -> str:
        """The last Ray node's here: one that was killed has another name, and counts as alive until its head misses it."""
        return f"{self.address}-{self.starts}"

    def processes(self) -> list[psutil.Process]:
        """Everything that lives in this namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        alive = []
        for pid in map(int, done.stdout.split()):
            with contextlib.suppress(psutil.Error):
                if (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def servers(self) -> list[str]:
        """Command lines of our servers, supervisors, proxies and actors here: what must not be left after a run."""
        lines = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                ours = (
                    "supervisor.py",
                    "api_server",
                    "pdbench proxy",
                    "EngineCore",
                    "multiprocessing.spawn",
                    "ScriptedServer(",
                )
                if any(word in line for word in ours) or line.startswith(("ray::RayHost", "ray::ScriptedRayHost")):
                    lines.append(line)
        return lines

    def kill(self) -> None:
        """The power fails: every process here gets SIGKILL."""
        self.harmed = True
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)

    def give_up(self) -> None:
        """The Ray node ends with a failure, as one does that has missed its head for a minute."""
        assert self.ray_node is not None
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    process.kill()
        self.ray_node.wait(PATIENCE_S)

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.hosts.switch, "link", "set", self.port, "down")

    def reconnect(self) -> None:
        """Plug it in again; Ray gives a node up that was away for long (`harmed`)."""
        ip("-n", self.hosts.switch, "link", "set", self.port, "up")

    def sent_bytes(self) -> int:
        """What left this host through its cable so far."""
        path = f"/sys/class/net/{self.link}/statistics/tx_bytes"
        return int(self.run("cat", path).stdout)


class Hosts:
    """`number` hosts and their switch. Raises NotPermittedError. A context manager that leaves nothing."""

    def __init__(self, folder: Path, number: int = 3, ahead_s: Sequence[int] = (1000, 2000, 0)) -> None:
        self.folder = folder
        self.name = f"pd{uuid.uuid4().hex[:5]}"
        self.switch = f"{self.name}-s"
        self.all: list[Host] = []
        self.ray = Path(tempfile.mkdtemp(prefix="pdr"))  # short: sockets' paths end at 107 characters

        self.environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",  # whatever token this user's home has
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_agent_register_timeout_ms": "120000",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_prestart_worker_first_driver": "0",  # one worker a CPU of every node, all on this machine's few cores
            "COLUMNS": "180",
        }
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for index in range(number):
                self.all.append(Host(self, index + 1, ahead_s[index]))
            subprocess.run(self.all[0].command(["true"]), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            why = getattr(error, "stderr", b"") or str(error).encode()
            raise NotPermittedError(
                f"this machine lets us make no network namespaces: {why.decode(errors='replace').strip()}"
            ) from None

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for host in self.all:
            host.kill()
        for name in [self.switch, *(host.name for host in self.all)]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self.ray.rmdir()

    def join(self) -> None:
        """A Ray node on every host; the last one is the head."""
        *others, head = self.all
        head.start_ray()
        probe = f"import socket; socket.create_connection(('{head.address}', {PORT}), 1)"
        wait_until(lambda: head.run(sys.executable, "-c", probe).returncode == 0, PATIENCE_S, "Ray's head listens")
        for number, host in enumerate(others, 2):
            host.start_ray(head)
            self.wait_for_nodes([head, *others[: number - 1]])

    def repair(self) -> None:
        """After a fault: every host is on its cable, and in the cluster as on the first day."""
        harmed = [host for host in self.all if host.harmed or (host.ray_node and host.ray_node.poll() is not None)]
        for host in harmed:
            host.reconnect()
            host.kill()
        if self.all[-1] in harmed:
            for host in self.all:
                host.kill()
            self.join()
        elif harmed:
            for host in harmed:
                host.start_ray(self.all[-1])
            self.wait_for_nodes(self.all)
        for host in self.all:
            host.harmed = False

    def wait_for_nodes(self, hosts: Sequence[Host]) -> None:
        """Until the living nodes of the last host's cluster are the last ones started on these hosts, and no earlier one."""
        head, waiting = self.all[-1], None
        deadline = time.monotonic() + PATIENCE_S
        while waiting is None or waiting.poll() is None:
            assert time.monotonic() < deadline, (
                f"the living nodes are not those last started on {[host.name for host in hosts]}"
            )
            for host in hosts:
                # On a busy machine a node gives up when its agents are not there within 15 s: once more.
                if host is not head and host.ray_node is not None and host.ray_node.poll() == 1:
                    host.start_ray(head)
                    if waiting is not None:
                        waiting.kill()
                        waiting.wait()
                    waiting = None
            if waiting is None:
                wait = (
                    "import ray, time\n"
                    f"ray.init('{head.address}:{PORT}', log_to_driver=False, logging_level='ERROR')\n"
                    "def living(): return sorted(node['NodeName'] for node in ray.nodes() if node['Alive'])\n"
                    f"while living() != {sorted(host.node_name() for host in hosts)}: time.sleep(0.2)\n"
                )
                waiting = head.popen(sys.executable, "-c", wait, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(0.2)
        assert waiting.returncode == 0


@contextlib.contextmanager
def joined_hosts(folder: Path) -> Iterator[Hosts]:
    """Three hosts in one Ray cluster. Raises NotPermittedError."""
    with Hosts(folder) as hosts:
        hosts.join()
        yield hosts
