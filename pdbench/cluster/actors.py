"""What runs on the nodes: one actor an instance, one agent a node (samples, events, clock), one actor a client process.

Every actor holds a lease that the head's pulses renew. When they stay away, because the head died or was cut off, the actor ends
itself; its server's supervisor then ends the server. What an actor has to tell waits in its outbox until the head has confirmed it, so
that a short break loses nothing. Try: pytest tests/test_cluster_actors.py
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pdbench.cluster import clocks
from pdbench.config import LoadConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.events import Event, parse
from pdbench.load.clients import LocalClient
from pdbench.power.device import Reader
from pdbench.power.host import open_readers
from pdbench.power.idle import idle_before_start
from pdbench.power.sampler import Sampler
from pdbench.records import Clock, DeviceRecord
from pdbench.serving import machine as machines
from pdbench.serving import vllm
from pdbench.serving.deployment import resolve_model
from pdbench.serving.process import ServerProcess
from pdbench.serving.vllm import Command

NODE_CLOCK = Clock(monotonic_s=0.0, unix_s=0.0)
"""A clock whose instants are the node's own monotonic ones."""
_FROM_RAY = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "VLLM_PORT")
_ALL_ADDRESSES = ("0.0.0.0", "::")
Planner = Callable[[ServeConfig, tuple[int, ...]], Command]


class Secrets:
    """Environment variables that no log and no command line shows."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self.values)})"


class Batch(msgspec.Struct):
    """What a node's agent gathered since its last batch; all instants are the node's monotonic ones."""

    devices: list[DeviceRecord]
    events: list[Event]


class Leased:
    """An actor that ends itself when nobody has asked for `lease_s` seconds."""

    threads = 1
    """Calls that may run at once: more than one where a call takes long, so that pulses are still answered."""

    def __init__(self, lease_s: float) -> None:
        self._heard_s = time.monotonic()
        self._outbox: list[tuple[int, Any]] = []
        self._number = 0
        self._lock = threading.Lock()
        for name in _FROM_RAY:
            os.environ.pop(name, None)  # Ray's word for its own tasks; our servers get theirs from their command lines
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray starts its workers niced, and servers inherit it
        threading.Thread(target=self._watch, args=(lease_s,), daemon=True).start()

    def pulse(self, confirmed: int) -> tuple[Any, list[tuple[int, Any]]]:
        """Renew the lease; returns the state and all messages after number `confirmed`."""
        self._heard_s = time.monotonic()
        self.gather()
        with self._lock:
            self._outbox = [message for message in self._outbox if message[0] > confirmed]
            return self.state(), list(self._outbox)

    def state(self) -> Any:
        """What a pulse tells of now."""
        return None

    def gather(self) -> None:
        """Fill the outbox before a pulse takes it."""

    def tell(self, message: Any) -> None:
        """Put a message into the outbox."""
        with self._lock:
            self._number += 1
            self._outbox.append((self._number, message))

    def clock(self) -> float:
        """The node's monotonic clock."""
        return time.monotonic()

    def close(self) -> None:
        """End everything that was started here."""

    def _watch(self, lease_s: float) -> None:
        while time.monotonic() - self._heard_s < lease_s:
            time.sleep(0.5)
        try:
            self.close()
        finally:
            os._exit(1)


class InstanceHost(Leased):
    """One server of a deployment on its node. When this process is gone, in whatever way, its supervisor ends the server."""

    threads = 2

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self._process: ServerProcess | None = None
        self._instance: Command | None = None
        self._config = ServeConfig()
        self._healthy = False

    def describe(self, config: ServeConfig, connector: bool) -> dict[str, Any]:
        """How this node would serve: connector (None where not asked), model's name and path. Raises UserError."""
        machine = machines.inspect()
        return {
            "connector": vllm.choose_connector(config, machine) if connector else None,
            "model_name": vllm.served_model_name(config, machine),
            "model": resolve_model(config, machine),
        }

    def plan(self, config: ServeConfig, planner: Planner, address: str) -> Command:
        """The server's command line, made here, where it will run. Raises UserError when this node cannot, or a port is taken."""
        self._config, self._instance = config, planner(config, self.own_gpus())
        if config.host in _ALL_ADDRESSES:
            url = self._instance.url.replace(config.host, address)
            self._instance = dataclasses.replace(self._instance, url=url)
        host, _, port = self._instance.url.partition("://")[2].rpartition(":")
        wanted = [(host.strip("[]"), int(port))]
        if self._instance.kv_address:
            kv_host, _, kv_port = self._instance.kv_address.rpartition(":")
            wanted.append((kv_host.strip("[]"), int(kv_port)))
        for address, number in wanted:
            if owner := machines.port_owner(address, number):
                raise UserError(
                    f"{address}:{number} for {self._instance.name} is taken by {owner}: end it, or choose another port"
                )
        return self._instance

    def own_gpus(self) -> tuple[int, ...]:
        """Indices of the GPUs that the placement group gave to this actor."""
        import ray

        return tuple(int(index) for index in ray.get_gpu_ids())

    def start(self, secrets: Secrets) -> int:
        """Start the planned server, or again when it died; returns its process id. Its health is in the next pulses' state."""
        assert self._instance is not None
        instance = self._instance
        log = Path(self._config.log_dir) / f"{instance.name}.log"
        if self._process is None:
            Path(vllm.event_log(self._config, instance.name)).unlink(missing_ok=True)
        else:
            log.replace(log.with_suffix(".died.log"))
        self._healthy = False
        try:
            self._process = ServerProcess(
                instance.name, instance.argv, instance.environment | secrets.values, instance.url, log
            )
        except OSError as error:
            raise UserError(
                f"cannot write {log}: {error.strerror}; give --log-dir a folder that you may write"
            ) from None
        return self._process.pid

    def state(self) -> dict[str, Any]:
        """Exit code (None while it runs), health, process id; of a dead one the likely cause and the log's end."""
        process = self._process
        if process is None:
            return {"exit_code": None, "healthy": False, "pid": None, "age_s": 0.0}
        code = process.exit_code()
        self._healthy = self._healthy or (code is None and process.is_healthy())
        state: dict[str, Any] = {"exit_code": code, "healthy": self._healthy, "pid": process.pid}
        state["age_s"] = time.monotonic() - process.started_s
        if code is not None:
            state |= {"cause": process.likely_cause(), "log_tail": process.log_tail()}
        return state

    def log_tail(self) -> str:
        """The end of the server's log."""
        return self._process.log_tail() if self._process else ""

    def close(self) -> None:
        """End the server; returns when nothing of it lives."""
        if self._process:
            self._process.close()


class NodeAgent(Leased):
    """One a node: reads its devices, follows its event logs, answers for its clock."""

    threads = 3

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self._sampler: Sampler | None = None
        self._taking = threading.RLock()
        self._logs: dict[Path, int] = {}

    def facts(self) -> dict[str, Any]:
        """What a reader needs to know of this node."""
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        versions = machines.versions() | {"ray": machines.installed_version("ray")}
        return machines.host_facts() | {"versions": versions, "clock": clocks.identity(), "niceness": niceness}

    def follow(self, logs: list[str]) -> None:
        """From now on, lines that are appended to these event logs are told."""
        self._logs = {path: path.stat().st_size if path.exists() else 0 for path in map(Path, logs)}

    def open_readers(self, gpus: dict[str, list[int]], pids: dict[str, list[int]]) -> list[Reader]:
        """The meters of this node."""
        return open_readers(gpus, {} if gpus else pids)

    def start_sampler(self, gpus: dict[str, list[int]], pids: dict[str, list[int]], interval_s: float) -> None:
        """Sample these devices of each role until `stop_sampler`."""
        if self._sampler:
            self.stop_sampler()
        self._sampler = Sampler(self.open_readers(gpus, pids), interval_s, NODE_CLOCK)
        self._sampler.__enter__()

    def idle(self, kind: str, seconds: float) -> None:
        """Keep the mean power of the next `seconds` as idle power of this kind."""
        if self._sampler:
            self._sampler.idle(kind, seconds)

    def idle_before_start(self, gpus: list[int], seconds: float) -> dict[str, dict[str, float | None]]:
        """Idle power of GPUs on which nothing runs yet."""
        return idle_before_start(gpus, seconds)

    def stop_sampler(self) -> None:
        """Stop sampling and tell what is left."""
        with self._taking:
            sampler, self._sampler = self._sampler, None
        if sampler is None:
            return
        sampler.__exit__()
        self._tell_batch(sampler.take())

    def gather(self) -> None:
        """One batch a pulse, if there is anything new."""
        with self._taking:
            self._tell_batch(self._sampler.take() if self._sampler else [])

    def _tell_batch(self, devices: list[DeviceRecord]) -> None:
        with self._taking:
            events = parse(self._new_lines(), NODE_CLOCK)
        if devices or events:
            self.tell(msgspec.msgpack.encode(Batch(devices, events)))

    def _new_lines(self) -> list[str]:
        """Whole lines that the event logs got since the last look."""
        lines: list[str] = []
        for path, seen in self._logs.items():
            if path.exists():
                with path.open("rb") as file:
                    file.seek(seen)
                    whole, newline, _ = file.read().rpartition(b"\n")
                self._logs[path] = seen + len(whole) + len(newline)
                lines += whole.decode(errors="replace").splitlines()
        return lines

    def probe_listen(self, address: str) -> int:
        """Take what comes on a free port of `address` from one peer and throw it away; returns the port."""
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.settimeout(20.0)

        def take() -> None:
            with contextlib.suppress(OSError), listener, listener.accept()[0] as peer:
                while peer.recv(1 << 20):
                    pass
                peer.sendall(b".")

        threading.Thread(target=take, daemon=True).start()
        return int(listener.getsockname()[1])

    def probe_send(self, address: str, port: int, seconds: float) -> float:
        """Send for `seconds` to a peer's `probe_listen`; returns bytes a second. Raises OSError when it cannot be reached."""
        block = bytes(1 << 20)
        with socket.create_connection((address, port), timeout=5.0) as peer:
            peer.settimeout(10.0)
            begin_s, sent = time.monotonic(), 0
            while time.monotonic() - begin_s < seconds:
                peer.sendall(block)
                sent += len(block)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
            return sent / (time.monotonic() - begin_s)

    def port_owners(self, host: str, ports: list[int]) -> dict[int, str | None]:
        """Port -> who has it, None when it is free."""
        return {port: machines.port_owner(host, port) for port in ports}

    def close(self) -> None:
        """Let the devices go."""
        if self._sampler:
            self._sampler.__exit__()
            self._sampler = None


class ClientHost(Leased):
    """One client process of the load; its messages go through the outbox with the trial they belong to."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self._client: LocalClient | None = None
        self._trial = 0

    def start(
        self, config: LoadConfig, url: str, model: str, clock: Clock, trial: int, index: int, secrets: Secrets
    ) -> None:
        """Start the process; it warms up, reports that it is ready and waits for `begin`."""
        self.close()
        os.environ.update(secrets.values)
        # Not Ray's own program, which a spawned process would import again.
        main = sys.modules["__main__"]
        if getattr(main, "__file__", None):
            main.__file__ = None
        self._trial = trial
        self._client = LocalClient(index, config, url=url, model=model, clock=clock, trial=trial)

    def begin(self, begin_s: float) -> None:
        """The common start, on the run's clock."""
        assert self._client is not None
        self._client.begin(begin_s)

    def stop(self) -> None:
        """End the trial with what was measured."""
        if self._client is not None:
            self._client.stop()

    def gather(self) -> None:
        for message in self._client.take_messages() if self._client else []:
            self.tell((self._trial, message))

    def close(self) -> None:
        """End the process."""
        if self._client is not None:
            self._client.close()
            self._client = None
