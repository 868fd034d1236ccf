"""Which instances a deployment has and what each asks of the cluster: bundles of a placement group. Pure.

Try: pytest tests/test_cluster_placement.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.errors import UserError
from pdbench.serving.plan import ServerSpec

PIN = 0.001
"""Share of a node's own resource (node:ADDRESS) that pins a bundle to it."""
ROLES = ("single", "tensor-parallel", "replica", "prefill", "decode", "proxy")


@dataclass(frozen=True)
class Node:
    """A living node of the cluster. `name` is its host's name, `address` the one that Ray knows it by."""

    id: str
    address: str
    name: str
    cpus: float
    gpus: int


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
    specs: Sequence[ServerSpec], place: Sequence[str], pinned: dict[str, Node], on_gpu: bool
) -> tuple[list[dict[str, float]], str]:
    """The placement group's bundles, one per server (without the proxy), and its strategy; by itself as few nodes as can hold it."""
    bundles = []
    for spec in specs:
        if spec.role == "proxy":
            continue
        bundle: dict[str, float] = {"CPU": 1.0}
        if on_gpu:
            bundle["GPU"] = float(spec.width)
        if node := pinned.get(spec.name) or pinned.get(spec.role):
            bundle[f"node:{node.address}"] = PIN
        bundles.append(bundle)
    strategy = "STRICT_PACK" if "same-node" in place else "SPREAD" if "spread" in place else "PACK"
    return bundles, strategy
