"""Every meter of this host behind one small interface: NVIDIA and AMD GPUs, RAPL, the CPU use of processes.

Try: python -c "from pdbench.power.devices import open_readers
for reader in open_readers({'prefill': [0], 'decode': [1]}, {}): print(reader.id, reader.name, reader.not_measured)"
"""

from collections.abc import Mapping, Sequence

from pdbench import nvml
from pdbench.power import amd
from pdbench.power.processes import HostReader, ProcessReader
from pdbench.power.rapl import open_rapl
from pdbench.power.reader import Reader


def open_readers(gpus: Mapping[str, Sequence[int]], processes: Mapping[str, Sequence[int]]) -> list[Reader]:
    """Readers of each role's GPUs (by driver index) and processes (by pid, their children too), and RAPL where it is there.

    A GPU that cannot be read is still in the list; its `not_measured` says why.
    """
    readers: list[Reader] = []
    for role, indices in gpus.items():
        readers += [open_gpu(index, role) for index in indices]
    readers += [ProcessReader(role, list(pids)) for role, pids in processes.items() if pids]
    return [*readers, *open_rapl()]


def open_gpu(index: int, role: str | None) -> Reader:
    """One GPU of either maker; NVML's word stands when neither finds it."""
    gpu = nvml.open_gpu(index, role)
    if gpu.lost and amd.available():
        gpu.close()
        return amd.AmdReader(index, role)
    return gpu


def gpu_indices() -> range:
    """The GPUs of this host, of either maker."""
    return range(nvml.gpu_count() or amd.count())


def open_host(gpus: Sequence[int] | None = None) -> list[Reader]:
    """What `pdbench monitor` watches: the named GPUs (None: all of them), RAPL, and the host's CPU use."""
    indices = gpu_indices() if gpus is None else gpus
    return [*(open_gpu(index, None) for index in indices), *open_rapl(), HostReader()]
