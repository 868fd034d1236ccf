"""A host of a Ray cluster as an actor: one per server, one per node that is measured, one per client process.

It holds a lease that the head's heartbeats renew. When they stay away, because the head died or was cut off, the actor ends
itself with all it started. What it has for the head waits in its outbox until the head has confirmed it, so that a short
break loses nothing.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pdbench.cluster import clock_sync
from pdbench.config import ServeConfig
from pdbench.host import Batch, LocalHost
from pdbench.load.clients import LocalClient, Message
from pdbench.load.plan import TrialLoad
from pdbench.serving import machine as machines
from pdbench.serving.plan import ServerSpec
from pdbench.serving.process import ServerState

THREADS = 4
"""Calls that may run at once: some take long, and heartbeats are still answered."""
_FROM_RAY = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "VLLM_PORT")
Outgoing = Batch | tuple[int, Message]
"""What a host read, or a client's message with its trial."""


class RayHost(LocalHost):
    def __init__(self, lease_s: float, address: str, environment: Mapping[str, str] = {}) -> None:
        """`environment`: variables of the head's that servers and clients on other nodes would lack."""
        super().__init__(address=address)
        self._renewed_s = time.monotonic()
        self._outbox: list[tuple[int, Outgoing]] = []
        self._number = 0
        self._lock = threading.Lock()
        self._client: LocalClient | None = None
        self._trial = 0
        os.environ.update(environment)
        for name in _FROM_RAY:  # Ray sets them for its own tasks; our servers get theirs from their command lines
            os.environ.pop(name, None)
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray starts its workers niced, and servers inherit it
        threading.Thread(target=self._watch_lease, args=(lease_s,), daemon=True).start()

    def heartbeat(self, confirmed: int) -> tuple[dict[str, ServerState], list[tuple[int, Outgoing]]]:
        """Renew the lease; returns the servers' states and all messages after number `confirmed`."""
        self._renewed_s = time.monotonic()
        for batch in self.take():
            self.send(batch)
        for message in self._client.take_messages() if self._client else []:
            self.send((self._trial, message))
        with self._lock:
            self._outbox = [message for message in self._outbox if message[0] > confirmed]
            return {name: self.state(name) for name in list(self._servers)}, list(self._outbox)

    def send(self, message: Outgoing) -> None:
        with self._lock:
            self._number += 1
            self._outbox.append((self._number, message))

    def clock(self) -> float:
        return time.monotonic()

    def assign_gpus(self, specs: Sequence[ServerSpec], config: ServeConfig) -> dict[str, tuple[int, ...]]:
        """The GPUs that the placement group gave to this actor."""
        import ray

        return {spec.name: tuple(int(index) for index in ray.get_gpu_ids()) for spec in specs}

    def start_client(self, load: TrialLoad, index: int) -> None:
        """Start a client process; it warms up, reports that it is ready and waits for `begin_load`."""
        self._end_client()
        # Not Ray's own program, which a spawned process would import again.
        main = sys.modules["__main__"]
        if getattr(main, "__file__", None):
            main.__file__ = None
        self._trial = load.trial
        self._client = LocalClient(index, load)

    def begin_load(self, begin_s: float) -> None:
        assert self._client is not None
        self._client.begin(begin_s)

    def stop_load(self) -> None:
        """End the trial with what was measured."""
        if self._client is not None:
            self._client.stop()

    def facts(self) -> dict[str, Any]:
        """What a reader of the results needs to know of this node."""
        return machines.host_facts() | {
            "versions": machines.versions() | {"ray": machines.installed_version("ray")},
            "clock": clock_sync.identity(),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def listen(self) -> int:
        """Read and discard what one peer sends to a free port of this node; returns the port."""
        assert self.address is not None
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.create_server((self.address, 0), family=family)
        listener.settimeout(20.0)

        def discard() -> None:
            with contextlib.suppress(OSError), listener, listener.accept()[0] as peer:
                while peer.recv(1 << 20):
                    pass
                peer.sendall(b".")

        threading.Thread(target=discard, daemon=True).start()
        return int(listener.getsockname()[1])

    def send_rate(self, address: str, port: int, seconds: float) -> float | str:
        """Send for `seconds` to a peer that listens; returns bytes per second, or why it cannot be reached."""
        block = bytes(1 << 20)
        try:
            with socket.create_connection((address, port), timeout=5.0) as peer:
                peer.settimeout(10.0)
                begin_s, sent = time.monotonic(), 0
                while time.monotonic() - begin_s < seconds:
                    peer.sendall(block)
                    sent += len(block)
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1)  # all has arrived
                return sent / (time.monotonic() - begin_s)
        except OSError as error:
            return f"{type(error).__name__}: {error}"

    def close(self) -> None:
        self._end_client()
        super().close()

    def _end_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _watch_lease(self, lease_s: float) -> None:
        while time.monotonic() - self._renewed_s < lease_s:
            time.sleep(0.5)
        try:
            self.close()
        finally:
            os._exit(1)
