"""Measuring on a cluster: devices of all nodes under one sampler's interface, the load from chosen nodes, merged exactly.

Try: pdbench run recipes/cpu-1p1d.toml --cluster auto --against single,disaggregated
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import msgspec

from pdbench.cluster import clocks
from pdbench.cluster.actors import Batch, ClientHost, Secrets
from pdbench.cluster.placement import Node
from pdbench.cluster.session import Cluster, LostError, Pulsed
from pdbench.config import LoadConfig, PowerConfig
from pdbench.errors import UserError
from pdbench.events import Event, move
from pdbench.load import clients, plan
from pdbench.load.clients import ClientResult, LoadResult, Message
from pdbench.load.generator import OnProgress
from pdbench.power.clocks import requested_options
from pdbench.power.sampler import merge_records
from pdbench.records import Clock, DeviceRecord, Flag
from pdbench.serving.deployment_info import DeploymentInfo

UNCERTAIN_MS = 1.0
"""Beyond this uncertainty of a node's clock a run is marked."""
CLIENT_EVERY_S = 0.1
_START_AFTER_S = 0.3
_CLIENT_SECRETS = ("OPENAI_API_KEY", "HF_TOKEN")
_decode_batch = msgspec.msgpack.Decoder(Batch).decode


class ClusterSampler:
    """The devices and event logs of `running` on every node, while the `with` block runs; what came is kept when a node is lost."""

    def __init__(self, cluster: Cluster, running: DeploymentInfo, power: PowerConfig, clock: Clock) -> None:
        self._cluster, self._running, self._power, self._clock = cluster, running, power, clock
        hosts = running.hosts
        wanted = {address: cluster.node(address) for address in hosts}
        self._clients = client_nodes(cluster)
        self._agents = cluster.agents([*wanted.values(), *self._clients])
        self._batches: dict[str, list[Batch]] = {}
        self._began: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._cluster.compare_clocks()
        self._began = {address: len(agent.messages) for address, agent in self._agents.items()}
        self._on_all(lambda agent, host: agent.follow.remote(host["event_logs"]))
        if self._power.power:
            interval_s = self._power.sample_interval_s
            self._on_all(lambda agent, host: agent.start_sampler.remote(host["gpus"], host["processes"], interval_s))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._on_all(lambda agent, host: agent.stop_sampler.remote())
            self._cluster.compare_clocks()
            self._last_pulse()
        finally:
            for address, agent in self._agents.items():
                self._batches[address] = [_decode_batch(message) for message in agent.messages[self._began[address] :]]
                del agent.messages[:]

    def idle(self, kind: str, seconds: float) -> None:
        """Idle power of all nodes' devices, measured at the same time."""
        self._on_all(lambda agent, host: agent.idle.remote(kind, seconds))

    def records(self) -> list[DeviceRecord]:
        """Every node's devices on the run's clock; call it after the `with` block."""
        records = []
        for address, batches in self._batches.items():
            host = self._cluster.node(address).address
            pieces = [msgspec.structs.replace(piece, host=host) for batch in batches for piece in batch.devices]
            records += merge_records(pieces, self._mover(address))
        return records

    def events(self) -> list[Event]:
        """The event logs' news, on the run's clock; call it after the `with` block."""
        return [
            move(event, self._mover(address))
            for address, batches in self._batches.items()
            for batch in batches
            for event in batch.events
        ]

    def facts(self) -> dict[str, Any]:
        """Node address -> what it is, the roles and clients there, its clock's offset and uncertainty."""
        cluster = self._cluster
        found = {}
        for address, agent in self._agents.items():
            roles = self._running.hosts.get(address, {}).get("roles", [])
            found[address] = cluster.facts[address] | {
                "roles": roles,
                "client": agent.node in self._clients,
                "clock": cluster.clocks[address].facts(),
            }
        return found

    def flags(self) -> list[Flag]:
        """What a reader must know: uncertain clocks, lost nodes, niced servers, versions that differ."""
        found = []
        if problem := self._cluster.problem():
            found.append(Flag("node-lost", f"{problem}: the figures are of what was measured until then"))
        for address, facts in self.facts().items():
            uncertainty = facts["clock"]["uncertainty_ms"]
            if uncertainty is None or uncertainty > UNCERTAIN_MS:
                known = "not known" if uncertainty is None else f"known to +-{uncertainty:.1f} ms"
                found.append(Flag("clock-uncertain", f"instants of node {address} are {known}"))
            if facts["niceness"] > 0:
                found.append(
                    Flag(
                        "niced",
                        f"servers on {address} run at niceness {facts['niceness']}: start Ray with RAY_worker_niceness=0",
                    )
                )
        versions = {address: facts["versions"] for address, facts in self.facts().items()}
        differing = [
            name for name in next(iter(versions.values())) if len({one[name] for one in versions.values()}) > 1
        ]
        if differing:
            found.append(Flag("versions-differ", f"nodes differ in {', '.join(differing)} (pdbench doctor --cluster)"))
        return found

    def _mover(self, address: str) -> Callable[[float], float]:
        clock = self._cluster.clocks[address]
        return lambda node_s: self._clock.of_monotonic(node_s + clock.offset_s(node_s))

    def _on_all(self, call: Callable[[Any, dict[str, Any]], Any]) -> None:
        """One call on the agent of every node with servers, all at once; a lost node is left to the flags."""
        hosts = self._running.hosts
        asked = {address: call(self._agents[address].handle, host) for address, host in hosts.items()}
        for address, reference in asked.items():
            try:
                self._cluster.ask(reference, self._agents[address])
            except LostError as error:
                self._agents[address].lost = self._agents[address].lost or str(error)

    def _last_pulse(self) -> None:
        """Wait until every agent has been heard after the end, so that its last batch is here, or counts as lost."""
        for agent in self._agents.values():
            # One whole pulse may already have been under way; the second one began after the end.
            heard, last_s = 0, agent.heard_s
            agent.hurry()
            while agent.lost is None and heard < 2:
                self._cluster.wait(0.05)
                if agent.heard_s != last_s:
                    last_s, heard = agent.heard_s, heard + 1
                    agent.hurry()


def check(cluster: Cluster, load: LoadConfig, power: PowerConfig) -> None:
    """Raises UserError for what cannot be done there: clocks and power caps, which are set on this host alone, unknown nodes."""
    plan.check(_on_nodes(cluster, load))
    for option in requested_options(power):
        raise UserError(f"{option} sets GPUs of this host alone: leave it out with --cluster")


def client_nodes(cluster: Cluster) -> list[Node]:
    """Where the load comes from. Raises UserError when --client-nodes names a node that is not there."""
    return [cluster.node(word) for word in cluster.config.client_nodes] or [cluster.head]


def _on_nodes(cluster: Cluster, config: LoadConfig) -> LoadConfig:
    """One client process per client node at least."""
    return replace(config, client_processes=max(config.client_processes, len(client_nodes(cluster))))


def run_load(cluster: Cluster, config: LoadConfig, **arguments: Any) -> LoadResult:
    """load.clients.run_load from client processes on --client-nodes. A lost node ends it with what the others measured."""
    nodes = client_nodes(cluster)
    config = _on_nodes(cluster, config)
    seats = [nodes[index % len(nodes)] for index in range(config.client_processes)]
    result = clients.run_load(config, **arguments, run_clients=partial(_run_clients, cluster, seats))
    result.trial.client["nodes"] = [node.address for node in seats]
    return result


def _run_clients(
    cluster: Cluster,
    seats: Sequence[Node],
    config: LoadConfig,
    *,
    url: str,
    model: str,
    clock: Clock,
    trial: int,
    on_progress: OnProgress | None,
) -> list[ClientResult]:
    """The results of one client process per seat, started at one instant, on the run's clock. Raises UserError without any."""
    cluster.agents(seats)
    offsets = [cluster.clocks[node.address].latest_offset_s() for node in seats]
    handles = [RayClient(actor, trial) for actor in _actors(cluster, seats)]
    secrets = Secrets({name: os.environ[name] for name in _CLIENT_SECRETS if name in os.environ})
    started = []
    for index, (handle, offset_s) in enumerate(zip(handles, offsets, strict=True)):
        shifted = Clock(monotonic_s=clock.monotonic_s - offset_s, unix_s=clock.unix_s)
        started.append(handle.actor.handle.start.remote(config, url, model, shifted, trial, index, secrets))
    try:
        for reference, handle in zip(started, handles, strict=True):
            cluster.ask(reference, handle.actor)
    except LostError as error:
        raise UserError(f"{error}: no request was measured") from None
    results = clients.collect(
        handles,
        clock=clock,
        wait=cluster.wait,
        on_progress=on_progress,
        problem=cluster.problem,
        start_after_s=_START_AFTER_S,
    )
    cluster.compare_clocks()
    return [
        clocks.move_result(result, _mover(cluster, node, clock, offset_s))
        for result, node, offset_s in zip(results, seats, offsets, strict=True)
    ]


def _mover(cluster: Cluster, node: Node, clock: Clock, offset_s: float) -> Callable[[float], float]:
    """From the run's clock as the client knew it at its start to what all round trips say."""
    known = cluster.clocks[node.address]

    def move(t_s: float) -> float:
        node_s = t_s + clock.monotonic_s - offset_s
        return clock.of_monotonic(node_s + known.offset_s(node_s))

    return (lambda t_s: t_s) if known.same else move


def _actors(cluster: Cluster, seats: Sequence[Node]) -> list[Pulsed]:
    """A client actor per seat, kept over the trials."""
    for index in range(len(cluster.clients), len(seats)):
        node = seats[index]
        cluster.clients.append(cluster.actor(ClientHost, f"client {index} on {node.address}", node, CLIENT_EVERY_S))
    return cluster.clients[: len(seats)]


class RayClient:
    """A client process on a node, the handle that `collect` takes."""

    def __init__(self, actor: Pulsed, trial: int) -> None:
        self.actor, self.name, self._trial = actor, actor.name, trial

    @property
    def lost(self) -> str | None:
        return self.actor.lost

    def take_messages(self) -> list[Message]:
        messages = []
        while self.actor.messages:
            trial, message = self.actor.messages.pop(0)
            if trial == self._trial:
                messages.append(message)
        return messages

    def begin(self, begin_s: float) -> None:
        self.actor.handle.begin.remote(begin_s)

    def stop(self) -> None:
        self.actor.handle.stop.remote()
