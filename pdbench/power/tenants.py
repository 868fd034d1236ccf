"""Who else uses this host: its GPUs before the servers start and while a load runs, and its cores during a load."""

import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from math import inf, isfinite
from typing import NamedTuple

import psutil

from pdbench import nvml
from pdbench.records import Flag

USED_MIB, USED_SHARE = 2048.0, 0.02
"""A driver takes less of a GPU's memory for itself; where NVML does not see processes (containers), more is somebody's."""
EVERY_S = 5.0
"""Who stays for less may not be seen: each look costs some calls of the driver, which samplers of power also ask."""
OTHERS_SHARE, IDLE_SHARE, LEAST_S = 0.1, 0.1, 10.0
"""Others' share of the cores from which on they count, where less than this is idle; shorter loads say too little."""


def tree(processes: Iterable[int]) -> set[int]:
    """These processes that live and all their descendants."""
    trees = set()
    for pid in processes:
        with suppress(psutil.Error):
            trees |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return trees


def gpus_of(processes: Iterable[int]) -> list[int]:
    """The GPUs on which one of these processes, or of their descendants, computes."""
    own = tree(processes)
    return sorted({index for index, pid in nvml.computing() if pid in own})


def in_use(gpus: Sequence[int]) -> Iterator[Flag]:
    """A flag for each of these GPUs on which somebody's processes are before ours start."""
    processes = Counter(index for index, pid in nvml.computing() if not _serves_mps(pid))  # in a container often none
    for gpu in nvml.gpus():
        used_mib, total_mib = gpu.memory_used_mib or 0.0, gpu.memory_total_mib or inf
        if gpu.index in gpus and (processes[gpu.index] or used_mib > max(USED_MIB, USED_SHARE * total_mib)):
            held = f"{used_mib:,.0f} of {total_mib:,.0f} MiB" if isfinite(total_mib) else "its memory"
            whose = f"other processes ({processes[gpu.index]}) hold" if processes[gpu.index] else "others hold"
            yield Flag(
                "gpu-in-use",
                f"gpu{gpu.index}: {whose} {held} before any server starts: their work and power are in these figures; "
                "end them (nvidia-smi names them), or give other GPUs",
            )


class Newcomers:
    """Notes processes on these GPUs that are no descendants of `roots` or of this process: those that compute there now, and those
    that come until `close`. Where NVML knows processes by other ids (a container's), only those that come.

    `found`: (instant on this host's monotonic clock, GPU, process id), the instant at most EVERY_S late.
    """

    def __init__(self, gpus: Collection[int], roots: Sequence[int]) -> None:
        self.found: list[tuple[float, int, int]] = []
        self._gpus, self._roots = gpus, [os.getpid(), *roots]
        self._known = nvml.computing()
        own = tree(self._roots)
        if own & {pid for gpu, pid in self._known if gpu in gpus}:
            self._note(self._known, own)
        self._stop = threading.Event()
        # A thread of its own: the sampler's beat does not wait for it.
        self._thread = threading.Thread(target=self._run, name="pdbench-newcomers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(EVERY_S)  # and one look at the end
            if new := nvml.computing() - self._known:
                self._known |= new
                self._note(new, tree(self._roots))

    def _note(self, seen: Collection[tuple[int, int]], own: Collection[int]) -> None:
        now_s = time.monotonic()
        others = [(gpu, pid) for gpu, pid in sorted(seen) if gpu in self._gpus and pid not in own]
        self.found += [(now_s, gpu, pid) for gpu, pid in others if not _serves_mps(pid)]


def _serves_mps(pid: int) -> bool:
    """CUDA's Multi-Process Service, through which the servers themselves compute."""
    with suppress(psutil.Error):
        return psutil.Process(pid).name().startswith(nvml.MPS)
    return False


class Cores(NamedTuple):
    """Core seconds of this host since its start: all, idle ones, those that its hypervisor took, those of some process trees."""

    total: float
    idle: float
    steal: float
    own: float


def cores_used(roots: Sequence[int]) -> Cores:
    """Until now; `own` are those of this process, of `roots` and of all their descendants, ended ones included."""
    times, own = psutil.cpu_times(), 0.0
    for pid in tree([os.getpid(), *roots]):
        with suppress(psutil.Error):
            own += sum(psutil.Process(pid).cpu_times()[:4])  # with children that were waited for
    # Linux counts a guest's time in user and nice as well.
    total = sum(getattr(times, name) for name in times._fields if not name.startswith("guest"))
    return Cores(total, times.idle + getattr(times, "iowait", 0.0), getattr(times, "steal", 0.0), own)


def cores_contended(before: Cores, after: Cores) -> Iterator[Flag]:
    """A flag where others' processes were at work between these two while hardly a core was idle."""
    count = psutil.cpu_count() or 1
    total, idle, steal, own = (late - early for late, early in zip(after, before, strict=True))
    others = total - idle - steal - own
    if total >= LEAST_S * count and others >= OTHERS_SHARE * total and idle < IDLE_SHARE * total:
        yield Flag(
            "host-busy",
            f"other processes used {count * others / total:.1f} of this host's {count} cores while {100 * idle / total:.0f} % were idle: servers and "
            "client waited for cores; end them (`top` names them), and measure again",
        )
