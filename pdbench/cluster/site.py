"""A Ray cluster as the place of a measurement: servers in placement groups, an agent per node, clients on chosen nodes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pdbench import doctor
from pdbench.cluster import clock_sync, placement
from pdbench.cluster.placement import Node
from pdbench.cluster.ray_host import RayHost
from pdbench.cluster.session import Cluster, RemoteHost
from pdbench.config import ClusterConfig, DeploymentKind, LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.doctor import UNCERTAIN_MS, Finding, NodeFacts
from pdbench.errors import UserError
from pdbench.load import clients
from pdbench.load import plan as load_plan
from pdbench.load.clients import LoadResult, Message, OnBegin, Problem
from pdbench.load.generator import OnProgress
from pdbench.load.plan import TrialLoad
from pdbench.power import clocks
from pdbench.records import Clock, Flag
from pdbench.serving import plan, vllm
from pdbench.serving.deployment import Deployment, DeploymentInfo, ServerHost, ServerInfo, at_once
from pdbench.serving.plan import ServerSpec
from pdbench.site import Measurement, Site

RESERVE_TIMEOUT_S = 30.0
"""How long the placement group may wait for resources that an earlier run is about to free."""
CLIENT_HEARTBEAT_S = 0.1
_START_AFTER_S = 0.3
_PROBE_S = 0.5


class RayMeasurement(Measurement):
    """A measurement on nodes, whose clocks are compared before, during and after it."""

    def __init__(
        self, cluster: Cluster, info: DeploymentInfo, client_nodes: Sequence[Node], power: PowerConfig, clock: Clock
    ) -> None:
        self._cluster, self._client_nodes = cluster, client_nodes
        self._servers: dict[str, list[ServerInfo]] = {}
        for server in info.servers:
            if server.host:
                self._servers.setdefault(server.host, []).append(server)
        nodes = [cluster.node(address) for address in self._servers]
        self._agents = cluster.agents([*nodes, *client_nodes])
        hosts = [(self._agents[address], servers) for address, servers in self._servers.items()]
        super().__init__(hosts, power, clock)

    def __enter__(self) -> Self:
        self._cluster.compare_clocks()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._cluster.compare_clocks()

    def host_facts(self) -> dict[str, Any]:
        """Node address -> what it is, the servers and clients there, its clock's offset and uncertainty."""
        nodes = {
            address: self._cluster.facts[address]
            | {
                "roles": [server.name for server in self._servers.get(address, [])],
                "client": agent.node in self._client_nodes,
                "clock": self._cluster.clocks[address].facts(),
            }
            for address, agent in self._agents.items()
        }
        return {"nodes": nodes}

    def flags(self) -> list[Flag]:
        """Lost nodes, uncertain clocks, niced servers, versions that differ, and those of every host."""
        flags = super().flags()
        if problem := self._cluster.problem():
            flags.append(Flag("node-lost", f"{problem}: the figures are of what was measured until then"))
        nodes = self.host_facts()["nodes"]
        for address, facts in nodes.items():
            uncertainty_ms = facts["clock"]["uncertainty_ms"]
            if uncertainty_ms is None or uncertainty_ms > UNCERTAIN_MS:
                accuracy = "not known" if uncertainty_ms is None else f"known to +-{uncertainty_ms:.1f} ms"
                flags.append(Flag("clock-uncertain", f"instants of node {address} are {accuracy}"))
            if facts["niceness"] > 0:
                detail = (
                    f"servers on {address} run at niceness {facts['niceness']}: start Ray with RAY_worker_niceness=0"
                )
                flags.append(Flag("niced", detail))
        versions = [facts["versions"] for facts in nodes.values()]
        differing = [name for name in versions[0] if len({installed[name] for installed in versions}) > 1]
        if differing:
            flags.append(Flag("versions-differ", f"nodes differ in {', '.join(differing)} (pdbench doctor --cluster)"))
        return flags


class RemoteClient:
    """A client process on a node: the handle that `load.clients.collect` takes."""

    def __init__(self, host: RemoteHost, trial: int) -> None:
        self.host, self.name, self._trial = host, host.name, trial

    @property
    def lost(self) -> str | None:
        return self.host.lost

    def take_messages(self) -> list[Message]:
        messages = [message for message in self.host.take_messages() if isinstance(message, tuple)]
        return [message for trial, message in messages if trial == self._trial]

    def begin(self, begin_s: float) -> None:
        self.host.handle.begin_load.remote(begin_s)

    def stop(self) -> None:
        self.host.handle.stop_load.remote()


def refuse_locked_clocks(power: PowerConfig) -> None:
    """Raises UserError: clocks and power caps are set by the process that restores them, on its own host."""
    for option in clocks.requested_options(power):
        raise UserError(f"{option} sets GPUs of this host alone: leave it out with --cluster")


class RaySite(Cluster, Site):
    """A context manager. `host_class` is for tests and benchmarks."""

    def __init__(self, config: ClusterConfig, host_class: type[RayHost] = RayHost) -> None:
        """Raises UserError when there is no such cluster, or --place or --client-nodes names a node that it lacks."""
        super().__init__(config, host_class)
        self._clients: list[RemoteHost] = []
        try:
            self._pins = placement.pins(config.place, self.nodes)
            self._client_nodes = [self.node(word) for word in config.client_nodes] or [self.head]
        except UserError:
            self.__exit__()
            raise

    def check_options(self, load: LoadConfig, power: PowerConfig) -> None:
        self.check_load(load)
        if not self.config.client_nodes:  # else the files are those of other nodes
            load_plan.check_files(load)
        refuse_locked_clocks(power)

    def check_load(self, load: LoadConfig) -> None:
        load_plan.check(self._on_client_nodes(load))

    @property
    def on_gpu(self) -> bool:
        return any(node.gpus for node in self.nodes)

    @contextmanager
    def reserve(self, specs: Sequence[ServerSpec]) -> Iterator[dict[str, ServerHost]]:
        """A placement group with a bundle per server and an actor in each; the proxy where pdbench runs, if not placed."""
        from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles, strategy = placement.group(specs, self.config.place, self._pins, self.on_gpu)
        group = placement_group(list(bundles.values()), strategy=strategy)
        hosts: dict[str, RemoteHost] = {}
        try:
            if not group.wait(RESERVE_TIMEOUT_S):
                free = {key: value for key, value in self.ray.available_resources().items() if key in ("CPU", "GPU")}
                raise UserError(
                    f"the cluster has no room for {len(bundles)} bundles {list(bundles.values())} ({strategy}); free are {free}: "
                    "end other jobs (`ray status`), or change --place or the instances"
                )
            node_ids = placement_group_table(group)["bundles_to_node_id"]
            # Not self.nodes: Ray may choose one that has joined since.
            nodes = {node.id: node for node in self.living_nodes()}
            for index, (name, bundle) in enumerate(bundles.items()):
                if node_ids[index] not in nodes:
                    raise UserError(
                        f"the node that Ray chose for {name} has left the cluster (`ray status`): run this again"
                    )
                resources = dict(bundle)
                hosts[name] = self.host(
                    name,
                    nodes[node_ids[index]],
                    num_cpus=resources.pop("CPU"),
                    num_gpus=resources.pop("GPU", 0),
                    resources=resources,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
                )
            for spec in specs:
                if spec.role == "proxy":
                    hosts[spec.name] = self.host(spec.name, self._pins.get("proxy", self.head))
            yield dict(hosts)
        finally:
            self.end(list(hosts.values()))
            remove_placement_group(group)

    def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
        """Planned when it starts: until then its nodes are not known."""
        self.check_gpus(config)
        model = config.model
        if model and vllm.is_local(model):
            model = str(Path(model).expanduser().absolute())
        config = dataclasses.replace(config, model=model, log_dir=str(Path(config.log_dir).absolute()))
        return Deployment(kind, config, self, self.config.restarts)

    def check_gpus(self, config: ServeConfig, *, running: bool = False) -> None:
        for role in ("prefill", "decode", "single"):
            if getattr(config, f"{role}_gpus"):
                raise UserError(
                    f"--{role}-gpus names GPUs of one host, and with --cluster Ray gives every instance its own: leave it out (--place names nodes)"
                )

    def assign_devices(self, info: DeploymentInfo, options: Options) -> list[Flag]:
        """None: nothing says on which node a server runs that pdbench did not start."""
        return []

    def measurement(self, info: DeploymentInfo, power: PowerConfig, clock: Clock) -> Measurement:
        return RayMeasurement(self, info, self._client_nodes, power, clock)

    def run_load(self, load: TrialLoad, on_progress: OnProgress, on_begin: OnBegin, problem: Problem) -> LoadResult:
        """From client processes on --client-nodes, in turn. A lost node ends it with what the others measured."""
        config = self._on_client_nodes(load.config)
        nodes = [self._client_nodes[index % len(self._client_nodes)] for index in range(config.client_processes)]
        load, clock = dataclasses.replace(load, config=config), load.clock
        self.agents(nodes)
        for index, node in enumerate(nodes[len(self._clients) :], len(self._clients)):  # they are kept over the trials
            self._clients.append(self.host(f"client {index} on {node.address}", node, CLIENT_HEARTBEAT_S))
        hosts = self._clients[: len(nodes)]
        offsets = [self.clocks[node.address].latest_offset_s() for node in nodes]
        calls = []
        for index, (host, offset_s) in enumerate(zip(hosts, offsets, strict=True)):
            node_clock = Clock(monotonic_s=clock.monotonic_s - offset_s, unix_s=clock.unix_s)
            on_node = dataclasses.replace(load, clock=node_clock)
            calls.append(functools.partial(host.call, RayHost.start_client, on_node, index))
        at_once(calls)
        results = clients.collect(
            [RemoteClient(host, load.trial) for host in hosts],
            clock=clock,
            wait=self.wait,
            on_progress=on_progress,
            on_begin=on_begin,
            problem=lambda: self.problem() or problem(),
            start_after_s=_START_AFTER_S,
        )
        self.compare_clocks()

        def mover(host: RemoteHost, offset_s: float) -> Callable[[float], float]:
            """From the run's clock as the client knew it at its start to what all round trips say."""
            to_run_clock = host.to_run_clock(clock)
            return lambda t_s: to_run_clock(t_s + clock.monotonic_s - offset_s)

        moved = [
            clock_sync.move_result(result, mover(host, offset_s))
            for result, host, offset_s in zip(results, hosts, offsets, strict=True)
        ]
        result = clients.merge(load, moved)
        result.trial.client["nodes"] = [node.address for node in nodes]
        return result

    def findings(self, config: ServeConfig) -> list[Finding]:
        agents = self.agents(self.nodes)
        specs = plan.servers("disaggregated", config)
        ports = sorted({port for spec in specs for port in (spec.port, spec.kv_port) if port is not None})
        nodes, links = [], dict[tuple[str, str], float | str]()
        for node in self.nodes:
            host = agents[node.address]
            owners = at_once([functools.partial(host.port_owner, node.address, port) for port in ports])
            facts, clock = self.facts[node.address], self.clocks[node.address].facts()
            nodes.append(NodeFacts(node, node == self.head, facts, clock, dict(zip(ports, owners, strict=True))))
            for receiver in self.nodes:
                if receiver != node:
                    port = agents[receiver.address].call(RayHost.listen)
                    rate = host.call(RayHost.send_rate, receiver.address, port, _PROBE_S)
                    links[node.address, receiver.address] = rate
        return list(doctor.examine_nodes(nodes, links))

    def _on_client_nodes(self, config: LoadConfig) -> LoadConfig:
        """At least one client process per node, as far as there are requests at once for them."""
        nodes = len(self._client_nodes)
        least = min(nodes, load_plan.streams(config) or nodes)
        return dataclasses.replace(config, client_processes=max(config.client_processes, least))
