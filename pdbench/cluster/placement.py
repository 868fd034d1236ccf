"""Where servers go in a cluster: bundles of a placement group, pinned to nodes by --place. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.errors import OptionError, UserError
from pdbench.serving.plan import ServerSpec

_PIN = 0.001
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
    named = [node for node in nodes if word in (node.address, node.name)]
    if len(named) != 1:
        present = ", ".join(f"{node.address} ({node.name})" for node in nodes)
        raise UserError(
            f"{'no' if not named else 'more than one'} node {word!r} in the cluster: name one by its address: {present}"
        )
    return named[0]


def pins(place: Sequence[str], nodes: Sequence[Node]) -> dict[str, Node]:
    """Role or instance name -> node, of all `ROLE=NODE` in `place`. Raises UserError for what cannot be read."""
    pinned = {}
    for word in place:
        if word in ("same-node", "spread"):
            continue
        role, equals, node = word.partition("=")
        if not equals or (role.rpartition("-")[0] not in ROLES and role not in ROLES):
            raise OptionError(
                f"--place {word}: write same-node, spread, or ROLE=NODE with a role of {', '.join(ROLES)}"
            )
        pinned[role] = find_node(nodes, node)
    if len({"same-node", "spread"} & set(place)) > 1:
        raise OptionError("--place same-node and spread exclude each other")
    return pinned


def group(
    specs: Sequence[ServerSpec], place: Sequence[str], pinned: dict[str, Node], on_gpu: bool
) -> tuple[dict[str, dict[str, float]], str]:
    """The placement group's bundles, one per server (without the proxy), and its strategy: as few nodes as can hold it if not
    placed. Raises UserError for a pin of a role that is there by a number that is not."""
    roles, names = {spec.role for spec in specs}, [spec.name for spec in specs]
    for name in pinned:
        if name.rpartition("-")[0] in roles and name not in names:
            raise UserError(f"--place {name}=...: there is no such server, only {', '.join(names)}")
    bundles = {}
    for spec in specs:
        if spec.role == "proxy":
            continue
        bundle: dict[str, float] = {"CPU": 1.0}
        if on_gpu:
            bundle["GPU"] = float(spec.width)
        if node := pinned.get(spec.name) or pinned.get(spec.role):
            bundle[f"node:{node.address}"] = _PIN
        bundles[spec.name] = bundle
    strategy = "STRICT_PACK" if "same-node" in place else "SPREAD" if "spread" in place else "PACK"
    return bundles, strategy
