"""Which instances a deployment has and what each asks of the cluster: bundles of a placement group. Pure.

Try: pytest tests/test_cluster_placement.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.config import DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.serving.vllm import width_of

PIN = 0.001
"""Share of a node's own resource (node:ADDRESS) that pins a bundle to it."""
ROLES = ("single", "tensor-parallel", "replica", "prefill", "decode", "proxy")


@dataclass(frozen=True)
class Seat:
    """One server of a deployment before it has a node: `kv_port` is None without a connector."""

    role: str
    index: int
    gpus: int
    port: int
    kv_port: int | None = None

    @property
    def name(self) -> str:
        """As in decode-0; the proxy is just proxy."""
        return self.role if self.role == "proxy" else f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Node:
    """A living node of the cluster. `name` is its host's name, `address` the one that Ray knows it by."""

    id: str
    address: str
    name: str
    cpus: float
    gpus: int


def seats(name: DeploymentKind, config: ServeConfig) -> list[Seat]:
    """All servers of the deployment, the proxy last when there is one."""
    width = config.tensor_parallel
    if name == "single":
        return [Seat("single", 0, width, config.single_port)]
    if name == "tensor-parallel":
        return [Seat("tensor-parallel", 0, width_of("tensor-parallel", config), config.single_port)]
    proxy = Seat("proxy", 0, 0, config.proxy_port)
    if name == "replicas":
        counted = range(config.replica_instances)
        return [*(Seat("replica", i, width, config.prefill_port + i) for i in counted), proxy]
    made = [Seat("prefill", i, width, config.prefill_port + i) for i in range(config.prefill_instances)]
    made += [Seat("decode", i, width, config.decode_port + i) for i in range(config.decode_instances)]
    if not config.prefill_instances or not config.decode_instances:
        raise UserError("prefill and decode need at least one instance each")
    # One KV port an instance, and room for one a rank.
    ported = [
        Seat(seat.role, seat.index, seat.gpus, seat.port, config.kv_port + i * max(width, 1))
        for i, seat in enumerate(made)
    ]
    return [*ported, proxy]


def find_node(nodes: Sequence[Node], word: str) -> Node:
    """The node of this address or host name. Raises UserError that lists those that are there."""
    found = [node for node in nodes if word in (node.address, node.name)]
    if len(found) != 1:
        there = ", ".join(f"{node.address} ({node.name})" for node in nodes)
        raise UserError(
            f"{'no' if not found else 'more than one'} node {word!r} in the cluster: name one by its address: {there}"
        )
    return found[0]


def pins(place: Sequence[str], nodes: Sequence[Node]) -> dict[str, Node]:
    """Role or instance name -> node, of all `ROLE=NODE` in `place`. Raises UserError for what cannot be read."""
    pinned = {}
    for word in place:
        if word in ("same-node", "spread"):
            continue
        role, equals, node = word.partition("=")
        if not equals or (role.rpartition("-")[0] not in ROLES and role not in ROLES):
            raise UserError(f"--place {word}: write same-node, spread, or ROLE=NODE with a role of {', '.join(ROLES)}")
        pinned[role] = find_node(nodes, node)
    if len({"same-node", "spread"} & set(place)) > 1:
        raise UserError("--place same-node and spread exclude each other")
    return pinned


def group(
    made: Sequence[Seat], place: Sequence[str], pinned: dict[str, Node], on_gpu: bool
) -> tuple[list[dict[str, float]], str]:
    """The placement group's bundles, one a seat (without the proxy), and its strategy; by itself as few nodes as can hold it."""
    bundles = []
    for seat in made:
        if seat.role == "proxy":
            continue
        bundle: dict[str, float] = {"CPU": 1.0}
        if on_gpu:
            bundle["GPU"] = float(seat.gpus)
        if node := pinned.get(seat.name) or pinned.get(seat.role):
            bundle[f"node:{node.address}"] = PIN
        bundles.append(bundle)
    strategy = "STRICT_PACK" if "same-node" in place else "SPREAD" if "spread" in place else "PACK"
    return bundles, strategy
