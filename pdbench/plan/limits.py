"""How a run's engines schedule: as they logged it, else as their flags and vLLM's defaults have it."""

import re
import shlex

from pdbench.analysis.run_analysis import is_foreign
from pdbench.config.serving import last_value
from pdbench.events import EngineFacts
from pdbench.plan.engine import Limits, Role
from pdbench.records import Run

ASYNC_SINCE = (0, 14)
"""vLLM from which asynchronous scheduling is the default."""


def limits_of(run: Run, role: Role) -> tuple[Limits, tuple[int, ...], list[str]]:
    """The limits of a run's engines of this role, their CUDA graph sizes, and what of it is assumed because it was not recorded."""
    logged = next((engine for engine in run.engines.values() if engine.role == role), EngineFacts(role=role))
    serve = run.config.get("serve") or {}
    words = shlex.split(" ".join(str(serve.get(name) or "") for name in ("vllm_args", f"{role}_args")))
    foreign = is_foreign(run)  # then host and versions are the client's
    on_gpu = foreign or bool(run.host.get("gpus"))
    assumed = []
    if foreign and not logged.graph_sizes and not any(device.kind == "gpu" for device in run.devices):
        assumed.append("a server with a GPU")

    def known(name: str, recorded: int | None, default: int) -> int:
        value = recorded or last_value(words, f"--{name}") or serve.get(name.replace("-", "_"))
        if value is None:
            assumed.append(f"--{name} {default} (vLLM's default)")
        return int(value or default)

    max_num_seqs = known("max-num-seqs", logged.max_num_seqs, 1024 if on_gpu else 8)
    whole = 8192 if on_gpu else serve.get("max_model_len") or 2048
    budget = known("max-num-batched-tokens", logged.max_num_batched_tokens, whole)
    version = tuple(int(part) for part in re.findall(r"\d+", run.versions.get("vllm") or "0")[:2])
    is_async = on_gpu and (foreign or version >= ASYNC_SINCE) and "--no-async-scheduling" not in words
    if logged.async_scheduling is not None:
        is_async = logged.async_scheduling
    elif foreign:
        assumed.append("asynchronous scheduling (vLLM's default)")
    if serve.get("enforce_eager") or not on_gpu:
        sizes: tuple[int, ...] = ()
    elif logged.graph_sizes:
        sizes = tuple(logged.graph_sizes)
    else:
        largest = known("max-cudagraph-capture-size", None, min(512, 2 * max_num_seqs))
        steps = (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16))
        sizes = tuple(size for size in steps if size <= largest)
    if logged.chunked_prefill is False:
        assumed.append("prompts are split at the token budget, although chunked prefill is off")
    limits = Limits(
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        async_scheduling=is_async,
        captured=max(sizes, default=0),
        max_model_len=serve.get("max_model_len"),
        kv_cache_tokens=logged.kv_cache_tokens,
        block_size=logged.block_size or 16,
    )
    return limits, sizes, assumed


def gpus_each(run: Run, role: Role) -> int:
    """How many GPUs an instance of this role had; 1 on a host without."""
    serve = run.config.get("serve") or {}
    width = serve.get(f"{role}_tensor_parallel") or serve.get("tensor_parallel") or 1
    return int(width) if run.host.get("gpus") else 1
