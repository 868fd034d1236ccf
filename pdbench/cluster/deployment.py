"""A deployment whose servers are actors of a placement group; the same interface as the one of a single host.

Try: pdbench serve --cluster auto --place prefill=10.0.0.1 decode=10.0.0.2
"""

import dataclasses
import functools
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

import psutil

from pdbench.cluster.actors import InstanceHost, Planner, Secrets
from pdbench.cluster.placement import group, pins
from pdbench.cluster.session import Cluster, LostError, Pulsed
from pdbench.config import Connector, DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.serving import deployment as one_host
from pdbench.serving import deployment_info, plan, vllm
from pdbench.serving import machine as machines
from pdbench.serving.deployment_info import DeploymentInfo
from pdbench.serving.plan import ServerSpec
from pdbench.serving.vllm import Command

ROOM_S = 30.0
"""How long the placement group may wait for resources that an earlier run is about to free."""
PASSED_ON = ("HF_TOKEN", "VLLM_API_KEY", "PDBENCH_PROXY_API_KEY", "PDBENCH_PROXY_ADMIN_KEY", "PDBENCH_UPSTREAM_API_KEY")
"""Secrets of this environment that servers on other nodes get too."""
_LOOPBACK = "127.0.0.1"


def plan_server(
    config: ServeConfig, gpus: tuple[int, ...], *, spec: ServerSpec, connector: Connector | None
) -> Command:
    """A vLLM instance as its own node would start it. Raises UserError when the node has no vLLM that could."""
    machine = machines.inspect()
    if machine.vllm is None:
        raise UserError("vLLM is not installed here: set up the same environment on every node")
    config = dataclasses.replace(config, kv_ip=own_address(config.kv_ip))
    model = one_host.resolve_model(config, machine)
    return vllm.server_command(spec, config, machine, model, gpus, connector)


def plan_proxy(
    config: ServeConfig, gpus: tuple[int, ...], *, servers: list[Command], connector: Connector | None
) -> Command:
    """The proxy in front of `servers`."""
    return vllm.proxy_command(config, servers, connector)


def own_address(word: str) -> str:
    """This node's address: `word` itself, or of a network (10.1.0.0/16) the own address in it. Raises UserError without one."""
    if "/" not in word:
        return word
    network = ipaddress.ip_network(word, strict=False)
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if (
                one.family in (socket.AF_INET, socket.AF_INET6)
                and ipaddress.ip_address(one.address.split("%")[0]) in network
            ):
                return one.address
    raise UserError(f"--kv-ip {word}: this node has no address in that network")


class ClusterDeployment:
    """Running servers on the nodes of a cluster, with the interface of serving.deployment.Deployment."""

    def __init__(
        self,
        name: DeploymentKind,
        config: ServeConfig,
        cluster: Cluster,
        planner: Callable[[ServerSpec, Any], Planner] | None = None,
    ) -> None:
        """Look where it goes. Raises UserError when --place cannot be read; starts nothing yet."""
        self.name, self.cluster = name, cluster
        model = (
            str(Path(config.model).expanduser().absolute())
            if config.model and vllm.is_local(config.model)
            else config.model
        )
        self.config = dataclasses.replace(config, model=model, log_dir=str(Path(config.log_dir).absolute()))
        self.instances = plan.servers(name, config)
        self.connector: Connector | None = None
        self.model_name, self.model_path, self.url = "", "", ""
        self._pins = pins(cluster.config.place, cluster.nodes)
        self._planner = planner or _planner
        self._group: Any = None
        self._hosts: dict[str, Pulsed] = {}
        self._planned: dict[str, Command] = {}
        self._pids: dict[str, int] = {}
        self._secret = secrets.token_hex(16)
        self._claim: IO[bytes] | None = None
        self._restarts_left = cluster.config.restarts
        self._on_state: Callable[[dict[str, str]], None] = lambda states: None

    def start(self, on_state: Callable[[dict[str, str]], None] = lambda states: None) -> Self:
        """Reserve, plan on the nodes, start all at once, wait until all are healthy; `on_state` hears every change.

        Raises UserError with node, log's end and likely cause when one dies, or there is no room, or --start-timeout-s passes.
        """
        self._on_state = on_state
        self._claim = deployment_info.claim(Path(self.config.log_dir))
        try:
            self._reserve()
            self._plan()
            self._start_servers(list(self._hosts))
            self._wait_healthy(list(self._hosts), "ready")
            deployment_info.save(self.running(), Path(self.config.log_dir))
        except LostError as error:
            self.close()
            raise UserError(f"{error}: look at that node, `ray status` shows those that are alive") from None
        except BaseException:
            self.close()
            raise
        return self

    def check_ports(self) -> None:
        """Nothing yet: which nodes it will be is not known, and each looks at its own ports when its server is planned."""

    def check(self) -> None:
        """Raises UserError when a node is lost or a server has died; starts dead servers again first, as far as --restarts allows."""
        self.cluster.check()
        dead = [name for name in self._hosts if self._state(name).get("exit_code") is not None]
        for name in dead[self._restarts_left :]:
            state = self._state(name)
            cause = state.get("cause") or "its log does not say why"
            raise UserError(
                f"{name} died on node {self._hosts[name].node.address} with exit code {state['exit_code']}: {cause}\n{state['log_tail']}\n"
                f"whole log there: {self.config.log_dir}/{name}.log"
            )
        if dead:
            self._restarts_left -= len(dead)
            try:
                self._start_servers(dead)
            except LostError as error:
                raise UserError(f"{error}; what was measured until then is kept") from None
            self._wait_healthy(dead, "ready again")
            deployment_info.save(self.running(), Path(self.config.log_dir))

    def running(self) -> DeploymentInfo:
        """What measuring needs to know of it: `hosts` has each node's part."""
        hosts: dict[str, dict[str, Any]] = {}
        for name, instance in self._planned.items():
            host = self._hosts[name]
            part = hosts.setdefault(host.node.address, {"roles": [], "processes": {}, "gpus": {}, "event_logs": []})
            part["roles"].append(name)
            part["processes"].setdefault(instance.role, []).append(self._pids[name])
            part["event_logs"].append(vllm.event_log(self.config, name))
            if instance.gpus:
                part["gpus"].setdefault(instance.role, []).extend(instance.gpus)
        return DeploymentInfo(
            name=self.name,
            url=self.url,
            model_name=self.model_name,
            model_path=self.model_path if vllm.is_local(self.model_path) else None,
            owner_pid=os.getpid(),
            urls={name: instance.url for name, instance in self._planned.items()},
            hosts=hosts,
            config=self.config.plain() | {"connector_used": self.connector},
        )

    def close(self) -> None:
        """End all servers and give the resources back; returns within a bounded time."""
        deployment_info.forget(Path(self.config.log_dir))
        self.cluster.end(list(self._hosts.values()))
        self._hosts.clear()
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None
        if self._claim:
            self._claim.close()

    def _reserve(self) -> None:
        """A placement group with a bundle a server, and an actor in each; the proxy where pdbench runs, if not placed."""
        from ray.util.placement_group import placement_group, placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cluster = self.cluster
        bundles, strategy = group(self.instances, cluster.config.place, self._pins, cluster.on_gpu)
        self._group = placement_group(bundles, strategy=strategy)
        if not self._group.wait(ROOM_S):
            free = {key: value for key, value in cluster.ray.available_resources().items() if key in ("CPU", "GPU")}
            raise UserError(
                f"the cluster has no room for {len(bundles)} bundles {bundles} ({strategy}); free are {free}: "
                "end other jobs (`ray status`), or change --place or the instances"
            )
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        by_id = {node.id: node for node in cluster.nodes}
        for index, seat in enumerate(self.instances):
            if seat.role == "proxy":
                self._hosts[seat.name] = cluster.actor(InstanceHost, seat.name, self._pins.get("proxy", cluster.head))
                continue
            bundle = dict(bundles[index])
            options = {
                "num_cpus": bundle.pop("CPU"),
                "num_gpus": bundle.pop("GPU", 0),
                "resources": bundle,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index),
            }
            self._hosts[seat.name] = cluster.actor(InstanceHost, seat.name, by_id[nodes[index]], **options)

    def _plan(self) -> None:
        """Every command line is made on the node where it will run, the proxy's last, since it names all others."""
        first = self._hosts[self.instances[0].name]
        asked_first = first.handle.describe.remote(self.config, self.name == "disaggregated")
        told = self.cluster.ask(asked_first, first, self.config.start_timeout_s)
        self.connector, self.model_name, self.model_path = told["connector"], told["model_name"], told["model"]
        servers = [seat for seat in self.instances if seat.role != "proxy"]
        asked = {seat.name: self._ask_plan(seat, self._planner(seat, self.connector)) for seat in servers}
        for name, reference in asked.items():
            self._planned[name] = self.cluster.ask(reference, self._hosts[name], self.config.start_timeout_s)
        if len(servers) < len(self.instances):
            proxy = self.instances[-1]
            planner = functools.partial(plan_proxy, servers=list(self._planned.values()), connector=self.connector)
            self._planned[proxy.name] = self.cluster.ask(self._ask_plan(proxy, planner), self._hosts[proxy.name])
        self.url = list(self._planned.values())[-1].url

    def _ask_plan(self, seat: ServerSpec, planner: Planner) -> Any:
        host = self._hosts[seat.name]
        own = host.node.address
        config = dataclasses.replace(
            self.config,
            host=own if self.config.host == _LOOPBACK else self.config.host,
            kv_ip=own if self.config.kv_ip == _LOOPBACK else self.config.kv_ip,
        )
        return host.handle.plan.remote(config, planner, own)

    def _start_servers(self, names: list[str]) -> None:
        """Start the planned servers of these names, or again; their pulses tell of them from now on."""
        inherited = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        asked = {}
        for name in names:
            own = dict.fromkeys(self._planned[name].secret_names, self._secret)
            asked[name] = self._hosts[name].handle.start.remote(Secrets(inherited | own))
        for name, reference in asked.items():
            self._pids[name] = self.cluster.ask(reference, self._hosts[name])

    def _state(self, name: str) -> dict[str, Any]:
        """What the last pulse told of the server that runs now; nothing of one before it."""
        state: dict[str, Any] = self._hosts[name].state or {}
        return state if state.get("pid") == self._pids.get(name) else {}

    def _wait_healthy(self, names: list[str], word: str) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        ready: dict[str, str] = {}
        while len(ready) < len(names):
            self.check()
            states = {}
            for name in names:
                state = self._state(name)
                age_s = state.get("age_s", 0.0)
                if name not in ready and state.get("healthy"):
                    ready[name] = f"{word} after {age_s:.0f} s at {self._planned[name].url}"
                if name not in ready:
                    self._hosts[name].hurry()
                states[name] = ready.get(name, f"starting on {self._hosts[name].node.address}, {age_s:.0f} s")
            self._on_state(states)
            if time.monotonic() > deadline:
                late = next(self._hosts[name] for name in names if name not in ready)
                tail = self.cluster.ask(late.handle.log_tail.remote(), late)
                raise UserError(
                    f"{late.name} on node {late.node.address} is not healthy after {self.config.start_timeout_s:g} s: raise --start-timeout-s\n{tail}"
                )
            self.cluster.wait(0.25)


def _planner(spec: ServerSpec, connector: Connector | None) -> Planner:
    return functools.partial(plan_server, spec=spec, connector=connector)
