"""The head's side of a Ray cluster: nodes, hosts, and the heartbeat that renews leases, gathers messages and notices losses."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar, TypeVarTuple

import msgspec

from pdbench.cluster import clock_sync
from pdbench.cluster.placement import Node, find_node
from pdbench.cluster.ray_host import THREADS, Outgoing, RayHost
from pdbench.config import ClusterConfig, DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.events import LogLine
from pdbench.host import Batch, HostLostError
from pdbench.records import Clock, DeviceRecord
from pdbench.serving.deployment import ServerInfo, at_once
from pdbench.serving.plan import ServerSpec
from pdbench.serving.process import Secrets, ServerState
from pdbench.serving.vllm import Command, Setup
from pdbench.supervisor import CLOSE_S

HEARTBEAT_S = 1.0
CLOCK_EVERY_S = 1.0
CALL_TIMEOUT_S = 300.0
"""For a living actor's reply, its first one included: a node may start dozens of Ray workers at once."""
_LEASE_BEYOND_S = 10.0
_SECRETS = (
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "VLLM_API_KEY",
    "PDBENCH_PROXY_API_KEY",
    "PDBENCH_PROXY_ADMIN_KEY",
    "PDBENCH_UPSTREAM_API_KEY",
)
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class RemoteHost:
    """A RayHost from the head: pdbench.site.Host by calls to it. `lost` is why it is gone, None while it is not."""

    def __init__(self, cluster: "Cluster", name: str, node: Node, handle: Any, heartbeat_s: float) -> None:
        self.name, self.node, self.handle = name, node, handle
        self.address: str | None = node.address
        self.lost: str | None = None
        self.last_reply_s = time.monotonic()
        self.replied = False
        self.pending: Any = None
        self._cluster, self._heartbeat_s = cluster, heartbeat_s
        self._messages: list[Outgoing] = []
        self._states: dict[str, ServerState] = {}
        self._confirmed = 0
        self._due_s = 0.0

    def send_heartbeat(self, now_s: float) -> None:
        """Send the next heartbeat when it is due, one at a time."""
        if self.pending is None and self.lost is None and now_s >= self._due_s:
            self._due_s = now_s + self._heartbeat_s
            self.pending = self.handle.heartbeat.remote(self._confirmed)

    def take_reply(self) -> None:
        """Of the pending heartbeat, which is answered. A message that came before is not taken twice."""
        from ray.exceptions import ActorUnavailableError, RayActorError, RayError

        reference, self.pending = self.pending, None
        try:
            self._states, messages = self._cluster.ray.get(reference)
        except ActorUnavailableError:
            return  # the connection broke; the next heartbeat asks for the same messages again
        except RayActorError as error:
            self.lost = _why_gone(self, error)
            return
        except RayError as error:
            self.lost = f"{self.name}: {str(error).splitlines()[-1]}"
            return
        for number, message in messages:
            if number > self._confirmed:
                self._confirmed = number
                self._messages.append(message)
        self.last_reply_s, self.replied = time.monotonic(), True

    def take_messages(self) -> list[Outgoing]:
        """The messages since the last call."""
        messages = self._messages[:]
        del self._messages[: len(messages)]  # the heartbeat's thread may have appended more
        return messages

    def call(self, method: Callable[[RayHost, *Ts], R], *arguments: *Ts, timeout_s: float = CALL_TIMEOUT_S) -> R:
        """Raises the actor's UserError with the node's address, HostLostError when it is gone."""
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        reference = getattr(self.handle, method.__name__).remote(*arguments)
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._cluster.ray.get(reference, timeout=0.5)
            except GetTimeoutError:
                if not self.lost and time.monotonic() > deadline_s:
                    self.lost = f"{self.name}: no answer for {timeout_s:g} s"
            except RayActorError as error:
                self.lost = self.lost or _why_gone(self, error)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(f"node {self.address}: {error.cause}") from None
                self.lost = self.lost or f"{self.name}: {type(error.cause).__name__}: {error.cause}"
            if self.lost:
                raise HostLostError(
                    f"{self.lost}: look at that node, `ray status` shows those that are alive"
                ) from None

    def setup(self, kind: DeploymentKind, config: ServeConfig) -> Setup:
        return self.call(RayHost.setup, kind, config, timeout_s=config.start_timeout_s)

    def plan(
        self, specs: Sequence[ServerSpec], config: ServeConfig, setup: Setup, servers: Sequence[Command] = ()
    ) -> list[Command]:
        return self.call(RayHost.plan, specs, config, setup, servers, timeout_s=config.start_timeout_s)

    def port_owner(self, address: str, port: int) -> str | None:
        return self.call(RayHost.port_owner, address, port)

    def start(self, commands: Sequence[Command], log_dir: str, secrets: Secrets) -> dict[str, int]:
        return self.call(RayHost.start, commands, log_dir, secrets)

    def state(self, name: str) -> ServerState:
        """As of the last heartbeat."""
        state = self._states.get(name, ServerState())
        if not state.healthy:
            self._due_s = 0.0
        return state

    def log_lines(self, name: str) -> list[LogLine]:
        try:
            return self.call(RayHost.log_lines, name)
        except HostLostError:
            return []

    def start_measuring(self, servers: Sequence[ServerInfo], interval_s: float | None) -> None:
        self.take_messages()  # of an earlier measurement
        self.call(RayHost.start_measuring, servers, interval_s)

    def latest(self) -> list[DeviceRecord]:
        """As of the last heartbeat that brought some."""
        for message in self._messages[::-1]:
            if isinstance(message, Batch) and message.devices:
                devices = [device for device in message.devices if device.samples]
                return [msgspec.structs.replace(device, samples=device.samples[-1:]) for device in devices]
        return []

    def idle(self, kind: str, seconds: float) -> None:
        self.call(RayHost.idle, kind, seconds)

    def stop_measuring(self) -> None:
        """Returns when the last batch is here."""
        self.call(RayHost.stop_measuring)
        # One heartbeat may have been under way: the reply to the second one began after the end.
        for _ in range(2):
            last_s, self._due_s = self.last_reply_s, 0.0
            while self.lost is None and self.last_reply_s == last_s:
                self._cluster.wait(0.05)

    def take(self) -> list[Batch]:
        return [message for message in self.take_messages() if isinstance(message, Batch)]

    def to_run_clock(self, clock: Clock) -> Callable[[float], float]:
        node_clock = self._cluster.clocks[self.node.address]
        return lambda node_s: clock.of_monotonic(node_s + node_clock.offset_s(node_s))


class Cluster:
    """A connection to a running Ray cluster; a context manager that ends every actor it started, and waits for that."""

    def __init__(self, config: ClusterConfig, host_class: type[RayHost] = RayHost) -> None:
        """Connect. Raises UserError when there is no cluster, or Ray is not installed."""
        try:
            import ray
        except ImportError:
            raise UserError("--cluster needs Ray: pip install 'pdbench[ray]' on every node") from None
        self.config, self.ray = config, ray
        if (config.cluster or "").startswith("ray://"):
            raise UserError(
                "--cluster ray://... is Ray's client: run pdbench on a node of the cluster, with --cluster auto"
            )
        # Ray ends a process that has lost the head for a minute; what was measured must be saved before that.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "180")
        try:
            ray.init(address=config.cluster, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"no Ray cluster at {config.cluster} ({first}): `ray start --head` on one node, "
                "`ray start --address HEAD:6379` on the others, then --cluster auto on any of them"
            ) from None
        self.nodes = self.living_nodes()
        own_id = ray.get_runtime_context().get_node_id()
        self.head = next(node for node in self.nodes if node.id == own_id)
        self.clocks: dict[str, clock_sync.NodeClock] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._actor_class = host_class
        self._hosts: list[RemoteHost] = []
        self._agents: dict[str, RemoteHost] = {}
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._heartbeat_loop, name="pdbench-heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(list(self._hosts))
        self._stop.set()
        self._thread.join(5.0)
        # Leaving takes long when the head cannot be reached any more; the process's end does the same.
        leaving = threading.Thread(target=self.ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(10.0)

    def living_nodes(self) -> list[Node]:
        """Those of the cluster at this moment."""
        return [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                name=node["NodeManagerHostname"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def node(self, word: str) -> Node:
        return find_node(self.nodes, word)

    def host(self, name: str, node: Node, heartbeat_s: float = HEARTBEAT_S, **options: Any) -> RemoteHost:
        """A new actor on `node`, with heartbeats; `options` are Ray's (default: it takes no resources)."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options.setdefault("num_cpus", 0)
        options.setdefault("scheduling_strategy", NodeAffinitySchedulingStrategy(node.id, soft=False))
        actor_class = self.ray.remote(self._actor_class).options(max_concurrency=THREADS, **options)
        environment = Secrets({name: os.environ[name] for name in _SECRETS if name in os.environ})
        handle = actor_class.remote(self.config.node_timeout_s + _LEASE_BEYOND_S, node.address, environment)
        host = RemoteHost(self, name, node, handle, heartbeat_s)
        self._hosts.append(host)
        return host

    def agents(self, nodes: Sequence[Node]) -> dict[str, RemoteHost]:
        """Node address -> the one host there that measures; missing ones are started at once, their clocks compared."""
        missing = [node for node in dict.fromkeys(nodes) if node.address not in self._agents]
        agents = [self.host(f"agent on {node.address}", node) for node in missing]
        for agent, facts in zip(agents, at_once([partial(agent.call, RayHost.facts) for agent in agents]), strict=True):
            address = agent.node.address
            self.clocks[address] = clock_sync.NodeClock(same=facts.pop("clock") == clock_sync.identity())
            self._agents[address], self.facts[address] = agent, facts
            self._compare_clock(agent, 20)
        return {node.address: self._agents[node.address] for node in nodes}

    def problem(self) -> str | None:
        """What was lost first, in one line."""
        return next((host.lost for host in self._hosts if host.lost), None)

    def check(self) -> None:
        """Raises UserError when a node or an actor is lost."""
        if problem := self.problem():
            raise UserError(f"{problem}; what was measured until then is kept")

    def wait(self, seconds: float) -> None:
        """Until a message may have come, but `seconds` at most."""
        with self._changed:
            self._changed.wait(seconds)

    def end(self, hosts: Sequence[RemoteHost]) -> None:
        """End these actors with all that they started; returns within a bounded time."""
        alive = [host for host in hosts if host.lost is None]
        pending = [host.handle.close.remote() for host in alive]
        begin_s = time.monotonic()
        while pending and time.monotonic() - begin_s < CLOSE_S + 1 and any(host.lost is None for host in alive):
            _, pending = self.ray.wait(pending, num_returns=len(pending), timeout=0.5)
        self._hosts = [host for host in self._hosts if host not in hosts]
        self._agents = {address: agent for address, agent in self._agents.items() if agent not in hosts}
        for host in hosts:
            self.ray.kill(host.handle)

    def compare_clocks(self) -> None:
        """A dozen round trips to every agent's node, best taken."""
        for agent in self._agents.values():
            if agent.lost is None:
                self._compare_clock(agent, 12)

    def _compare_clock(self, agent: RemoteHost, times: int) -> None:
        from ray.exceptions import RayError

        clock = self.clocks[agent.node.address]
        if clock.same:
            return
        clock.compared_s = time.monotonic()
        for _ in range(times):
            sent_s = time.monotonic()
            try:
                node_s = self.ray.get(agent.handle.clock.remote(), timeout=1.0)
            except RayError:
                return
            clock.add(sent_s, node_s, time.monotonic())

    def _heartbeat_loop(self) -> None:
        while not self._stop.is_set():
            now_s = time.monotonic()
            for host in list(self._hosts):
                host.send_heartbeat(now_s)
            pending = {host.pending: host for host in list(self._hosts) if host.pending is not None}
            ready, _ = self.ray.wait(list(pending), num_returns=len(pending), timeout=0.1) if pending else ([], [])
            for reference in ready:
                pending[reference].take_reply()
            for host in list(self._hosts):
                silent_s = time.monotonic() - host.last_reply_s
                limit_s = self.config.node_timeout_s if host.replied else CALL_TIMEOUT_S
                if host.lost is None and silent_s > limit_s:
                    host.lost = f"node {host.address} has not replied for {silent_s:.0f} s ({host.name})"
            for agent in list(self._agents.values()):
                due = now_s - self.clocks[agent.node.address].compared_s > CLOCK_EVERY_S
                if due and agent.replied and agent.lost is None and agent.pending is None:
                    self._compare_clock(agent, 4)
            if ready:
                with self._changed:
                    self._changed.notify_all()
            self._stop.wait(0.05)


def _why_gone(host: RemoteHost, error: Exception) -> str:
    text = " ".join(str(error).split()).lower()
    cause = "its node died" if "node" in text and "died" in text else "its process died"
    return f"{host.name} on node {host.address} is gone: {cause}"
