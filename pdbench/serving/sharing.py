"""Several servers on one GPU: how its memory is divided, in which order they start, what is said of it. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from pdbench.config import Connector
from pdbench.config.serving import last_value
from pdbench.errors import UserError
from pdbench.serving.vllm import Command


def starts(commands: Iterable[Command]) -> list[list[str]]:
    """Servers by their start: those of a GPU one after the other, each once the one before it is healthy.

    While vLLM starts it measures how much of its share is left for the KV cache; a neighbour that starts meanwhile is measured, too.
    """
    free: dict[int, int] = {}  # from which start on each GPU has nobody else who starts
    waves: dict[int, list[str]] = {}
    for command in commands:
        wave = max([0, *waves] if command.role == "proxy" else [0, *(free.get(gpu, 0) for gpu in command.gpus)])
        free |= dict.fromkeys(command.gpus, wave + 1)
        waves.setdefault(wave, []).append(command.name)
    return list(waves.values())


def check_memory(commands: Sequence[Command], total_mib: Mapping[int, float | None], weights_mib: float | None) -> None:
    """Raises UserError where vLLM would find out after a minute or more that a server's share of its GPU does not hold its part of
    the weights, or that a GPU is given away more than once. `total_mib`: each GPU's memory."""
    shares = Counter[int]()
    for command in commands:
        try:
            share = float(last_value(command.argv, "--gpu-memory-utilization") or "")
        except ValueError:
            continue  # vLLM says what is wrong with it
        if last_value(command.argv, "--kv-cache-memory-bytes") is not None:
            continue  # then vLLM divides nothing
        shares.update(dict.fromkeys(command.gpus, share))
        room_mib = share * min((total_mib.get(gpu) or inf for gpu in command.gpus), default=inf)
        needed_mib = (weights_mib or 0.0) / max(1, len(command.gpus))
        if needed_mib >= room_mib:
            of = "the model's weights" if len(command.gpus) == 1 else "its part of the model's weights"
            raise UserError(
                f"{command.name} gets {share:.2g} of the memory of GPU {', '.join(map(str, command.gpus))}, {room_mib:,.0f} MiB, and {of} take "
                f"{needed_mib:,.0f} MiB: let fewer servers share it (no --resident, other GPUs for each role), raise "
                "--gpu-memory-utilization or --tensor-parallel, or take a smaller model"
            )
    for gpu, share in shares.items():
        if share > 1.001:
            raise UserError(
                f"the servers on GPU {gpu} are given {share:.2g} of its memory together: lower --gpu-memory-utilization in their arguments"
            )


def words(commands: Iterable[Command], connector: Connector | None) -> str | None:
    """What a user must know where servers share a GPU, in one line; None where none do."""
    on_gpu: dict[int, list[Command]] = {}
    for command in commands:
        for gpu in command.gpus:
            on_gpu.setdefault(gpu, []).append(command)
    parts = []
    for gpu, servers in sorted(on_gpu.items()):
        if len(servers) > 1:
            shares = (f"{last_value(each.argv, '--gpu-memory-utilization')} ({each.name})" for each in servers)
            parts.append(f"GPU {gpu} is shared, its memory as {' and '.join(shares)}")
    if not parts:
        return None
    parts.append("they start one after the other")
    if connector == "tcp":
        parts.append("KV goes through host memory (tcp), since NCCL joins no two ranks on one GPU")
    return "; ".join([*parts, "power is the GPU's: no meter separates its servers"])
