"""Can this machine do it? One line a question: fine, worth knowing, or wrong, each with the remedy.

Try: pdbench doctor
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape

from pdbench import nvml
from pdbench.config import ServeConfig
from pdbench.errors import UserError
from pdbench.serving import vllm
from pdbench.serving.deployment import plan, resolve_model
from pdbench.serving.machine import Machine, inspect, port_owner
from pdbench.serving.vllm import Command

FINE, NOTE, WRONG = "fine", "note", "wrong"
_STYLES = {FINE: "green", NOTE: "yellow", WRONG: "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One answer: `state` is fine, note or wrong; `remedy` says what to do about the latter two."""

    section: str
    state: str
    text: str
    remedy: str | None = None


def examine(config: ServeConfig) -> list[Finding]:
    """All findings, in the order in which a run would meet them."""
    machine = inspect()
    return [*_start(config, machine), *_transfer(config, machine), *_test(config, machine)]


def report(findings: list[Finding], console: Console) -> int:
    """Print them; returns the exit code, 1 when something is wrong."""
    section = None
    for one in findings:
        if one.section != section:
            section = one.section
            console.print(f"\n[bold]{section}[/bold]")
        remedy = f"\n        -> {escape(one.remedy)}" if one.remedy else ""
        console.print(
            f"  [{_STYLES[one.state]}]{one.state:5}[/] {escape(one.text)}{remedy}", highlight=False, soft_wrap=True
        )
    wrong = sum(one.state == WRONG for one in findings)
    console.print(f"\n{wrong} thing(s) to mend before a run." if wrong else "\nThis machine can run pdbench.")
    return 1 if wrong else 0


def _start(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    section = "Servers start"
    if machine.vllm is None:
        yield Finding(
            section, WRONG, "vLLM is not installed here", "run ./run_disaggregated_test.sh, or set PDBENCH_PYTHON"
        )
        return
    yield Finding(section, FINE, f"vLLM {machine.vllm_text}, serving on {'GPUs' if machine.on_gpu else 'the CPU'}")
    instances: list[Command] = []
    problem = None
    try:
        instances = plan("disaggregated", config, machine)
    except UserError as error:
        problem = str(error)
    needed = {gpu for instance in instances for gpu in instance.gpus}
    for gpu in machine.gpus:
        if gpu.memory_total_mib is None or gpu.memory_used_mib is None:
            yield Finding(section, NOTE, f"GPU {gpu.index}: {gpu.name}, driver {gpu.driver}, its memory is not told")
            continue
        free = gpu.memory_total_mib - gpu.memory_used_mib
        text = f"GPU {gpu.index}: {gpu.name}, driver {gpu.driver}, {free:,.0f} of {gpu.memory_total_mib:,.0f} MiB free"
        if free >= config.gpu_memory_utilization * gpu.memory_total_mib:
            yield Finding(section, FINE, text)
        elif needed and gpu.index not in needed:
            yield Finding(section, NOTE, f"{text}; prefill and decode use others")
        else:
            share = free / gpu.memory_total_mib * 0.95
            yield Finding(section, WRONG, text, f"end what holds it, or --gpu-memory-utilization {share:.2f}")
    if not machine.gpus:
        yield Finding(
            section,
            NOTE,
            "no NVIDIA GPU: the tiny model on the CPU stands in; power is not measured",
            "a host with two GPUs measures real models",
        )
        available = psutil.virtual_memory().available / 2**30
        state = FINE if available >= 5 else WRONG
        yield Finding(
            section,
            state,
            f"{available:.1f} GiB of memory available; two servers take 4.5",
            None if state == FINE else "end other programs",
        )
    if problem:
        yield Finding(section, WRONG, problem)
        return
    yield Finding(section, FINE, f"model {instances[0].argv[instances[0].argv.index('--model') + 1]}")
    for instance in instances:
        port = int(instance.url.rpartition(":")[2])
        owner = port_owner(config.host, port)
        remedy = f"end it, or choose another port for {instance.name}" if owner else None
        yield Finding(section, WRONG if owner else FINE, f"port {port} for {instance.name}: {owner or 'free'}", remedy)
    model = resolve_model(config, machine)
    if not vllm.is_local(model) and not _in_hub_cache(model):
        yield Finding(
            section,
            NOTE,
            f"{model} is not in the hub's cache here",
            "it is downloaded at start; without a network give --model a folder",
        )


def _in_hub_cache(model: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return (home / "hub" / f"models--{model.replace('/', '--')}").is_dir()


def _transfer(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    section = "KV transfer"
    try:
        yield Finding(
            section, FINE, f"connector {vllm.choose_connector(config, machine)} with vLLM {machine.vllm_text}"
        )
    except UserError as error:
        yield Finding(section, WRONG, str(error))
    owner = port_owner(config.kv_ip, config.kv_port)
    yield Finding(
        section,
        WRONG if owner else FINE,
        f"KV port {config.kv_ip}:{config.kv_port}: {owner or 'free'}",
        "choose another --kv-port" if owner else None,
    )
    if len(machine.gpus) == 1:
        yield Finding(
            section,
            WRONG,
            "one GPU: prefill and decode need one each",
            "run --against single here, or take a host with two GPUs",
        )
    for (first, second), link in sorted(nvml.links().items()):
        if first < second:
            fast = link.startswith("NV")
            remedy = (
                None if fast else "KV goes over PCIe: expect a slower handoff; --connector tcp if NCCL reports no P2P"
            )
            yield Finding(
                section,
                FINE if fast else NOTE,
                f"GPU {first} - GPU {second}: {link}{' (NVLink)' if fast else ''}",
                remedy,
            )


def _test(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    section = "Test and measurement"
    if machine.gpus:
        root = os.geteuid() == 0
        yield Finding(
            section,
            FINE if root else NOTE,
            f"clock control: {'permitted' if root else 'needs root; reading needs none'}",
        )
    else:
        rapl = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
        state = os.access(rapl, os.R_OK)
        remedy = (
            None if state else "a readable /sys/class/powercap/intel-rapl:0/energy_uj (root, or chmod) gives CPU power"
        )
        yield Finding(
            section,
            FINE if state else NOTE,
            "CPU power by RAPL" if state else "no RAPL here: power is not measured",
            remedy,
        )
    for folder in (Path(config.log_dir), Path()):
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        writable = os.access(parent, os.W_OK)
        yield Finding(
            section,
            FINE if writable else WRONG,
            f"{folder.absolute()} can be written",
            None if writable else "choose --out and --log-dir elsewhere",
        )
