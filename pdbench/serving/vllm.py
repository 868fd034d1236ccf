"""vLLM's command lines: from options and machine to one `Instance` a server. Pure: nothing is started, nothing is asked.

Try: pdbench serve --show
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdbench.config import Connector, ServeConfig
from pdbench.errors import UserError
from pdbench.serving.machine import Machine

DEFAULT_MODEL = "deepseek-ai/DeepSeek-V2-Lite"
BUILTIN_P2P_VERSIONS = ((0, 10, 2), (0, 24))
"""vLLM's own P2pNcclConnector: from the first version on, before the second (removed by vLLM pull request 44854)."""
OWN_CONNECTOR_SINCE = (0, 26)
REQUEST_METRICS_SINCE = (0, 26)
REQUEST_ID_RANDOMIZED_SINCE = (0, 14)


@dataclass(frozen=True)
class Instance:
    """One process of a deployment: how it is started, where it answers, what it holds."""

    name: str
    role: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    url: str
    gpus: tuple[int, ...] = ()
    kv_address: str | None = None
    secret_environment: tuple[str, ...] = field(default=())


def served_model_name(config: ServeConfig, machine: Machine) -> str:
    """The name under which clients ask for the model: a hub name as it is, a folder by its last part."""
    model = config.model
    if model is None:
        return "deepseek-v2-lite" if machine.on_gpu else "tiny-deepseek-v2"
    return Path(model).name if is_local(model) else model


def is_local(model: str) -> bool:
    """Does this name a folder rather than a model of the hub?"""
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()


def choose_connector(config: ServeConfig, machine: Machine) -> Connector:
    """The connector to use. Raises UserError when the one asked for cannot work with this vLLM or these GPUs."""
    version, text = machine.vllm or (0,), machine.vllm_text
    builtin = BUILTIN_P2P_VERSIONS[0] <= version < BUILTIN_P2P_VERSIONS[1]
    own = version >= OWN_CONNECTOR_SINCE
    asked = config.connector
    if asked == "auto":
        on_gpu: Connector = "builtin-p2p-nccl" if builtin else "p2p-nccl"
        asked = on_gpu if machine.on_gpu else "tcp"
    if asked == "builtin-p2p-nccl" and not builtin:
        raise UserError(
            f"vLLM {text} has no P2pNcclConnector (0.10.2 to 0.23 have): use --connector p2p-nccl, or install vllm==0.23.0"
        )
    if asked in ("p2p-nccl", "tcp") and not own:
        raise UserError(
            f"connector {asked} needs vLLM 0.26 or newer, this is {text}: use --connector auto, or install vllm==0.26.0"
        )
    if asked in ("p2p-nccl", "builtin-p2p-nccl") and not machine.on_gpu:
        raise UserError(f"connector {asked} moves KV between GPUs and this machine serves on CPU: use --connector tcp")
    return asked


def single(config: ServeConfig, machine: Machine, model: str) -> list[Instance]:
    """The traditional deployment: one instance."""
    gpus = _take(config.single_gpus, 1, config.tensor_parallel, 0, machine, "single")
    return [instance(config, machine, model, "single", 0, config.single_port, gpus[0])]


def replicas(config: ServeConfig, machine: Machine, model: str) -> list[Instance]:
    """Equal instances behind the proxy, on as many devices as a disaggregated deployment has."""
    gpus = _take((), config.replica_instances, config.tensor_parallel, 0, machine, "replica")
    return [
        instance(config, machine, model, "replica", i, config.prefill_port + i, gpus[i])
        for i in range(config.replica_instances)
    ]


def tensor_parallel(config: ServeConfig, machine: Machine, model: str) -> list[Instance]:
    """One instance over two GPUs (or over --tensor-parallel of them, when that is more)."""
    gpus = _take((), 1, width_of("tensor-parallel", config), 0, machine, "tensor-parallel")
    return [instance(config, machine, model, "tensor-parallel", 0, config.single_port, gpus[0])]


def width_of(role: str, config: ServeConfig) -> int:
    """GPUs (without any: processes) that an instance of `role` spans."""
    return max(2, config.tensor_parallel) if role == "tensor-parallel" else config.tensor_parallel


def disaggregated(config: ServeConfig, machine: Machine, model: str) -> list[Instance]:
    """Prefill and decode instances, joined by the connector; prefill's come first."""
    connector = choose_connector(config, machine)
    x, y, width = config.prefill_instances, config.decode_instances, config.tensor_parallel
    prefill_gpus = _take(config.prefill_gpus, x, width, 0, machine, "prefill")
    decode_gpus = _take(config.decode_gpus, y, width, x * width, machine, "decode")
    both = {gpu for group in prefill_gpus for gpu in group} & {gpu for group in decode_gpus for gpu in group}
    if both and connector != "tcp":
        raise UserError(
            f"GPU {min(both)} is given to prefill and to decode, and {connector} moves KV between different GPUs: name others"
        )
    instances = []
    for i in range(x + y):
        role, index = ("prefill", i) if i < x else ("decode", i - x)
        port = config.prefill_port + index if role == "prefill" else config.decode_port + index
        gpus = prefill_gpus[index] if role == "prefill" else decode_gpus[index]
        # One KV port an instance, and room for one a rank (vLLM's own connector adds the rank to it).
        kv_port = config.kv_port + i * max(width, 1)
        instances.append(instance(config, machine, model, role, index, port, gpus, connector, kv_port))
    return instances


def _take(
    asked: Sequence[int], instances: int, width: int, first: int, machine: Machine, role: str
) -> list[tuple[int, ...]]:
    """GPU indices, one tuple an instance. Raises UserError when the machine has not so many."""
    if instances < 1 or width < 1:
        raise UserError(f"{role} needs at least one instance of at least one GPU, not {instances} of {width}")
    if not machine.on_gpu:
        return [()] * instances
    count, present = instances * width, [gpu.index for gpu in machine.gpus]
    wanted = list(asked) or present[first : first + count]
    if asked and (len(wanted) != count or len(set(wanted)) != count):
        raise UserError(
            f"{role} runs {instances} instance(s) of {width} GPU(s) and is given GPUs {wanted}: name {count} different ones"
        )
    missing = [gpu for gpu in wanted if gpu not in present]
    if missing or len(wanted) < count:
        which = f"GPU {missing[0]}" if missing else f"{count} GPU(s){f' beside the first {first}' if first else ''}"
        named = f"name others with --{role}-gpus, or " if role in ("prefill", "decode", "single") else ""
        raise UserError(
            f"{role} wants {which} and there {'is' if len(present) == 1 else 'are'} {len(present)} here ({present}): "
            f"{named}run --against single alone"
        )
    return [tuple(wanted[i * width : (i + 1) * width]) for i in range(instances)]


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{option} {text!r}: {str(error).lower()}: write it as in a shell, inside one pair of quotes"
        ) from None


def instance(
    config: ServeConfig,
    machine: Machine,
    model: str,
    role: str,
    index: int,
    port: int,
    gpus: tuple[int, ...],
    connector: Connector | None = None,
    kv_port: int | None = None,
) -> Instance:
    name = f"{role}-{index}"
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    argv += ["--served-model-name", served_model_name(config, machine), "--host", config.host, "--port", str(port)]
    argv += ["--max-model-len", str(config.max_model_len), "--load-format", config.load_format]
    environment = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if config.enforce_eager:
        argv.append("--enforce-eager")
    if (machine.vllm or (0,)) >= REQUEST_METRICS_SINCE:
        argv.append("--enable-per-request-metrics")
    width = width_of(role, config)
    argv += ["--tensor-parallel-size", str(width)]
    if machine.on_gpu:
        argv += ["--dtype", config.dtype or "auto", "--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        # NVML, nvidia-smi and CUDA must mean the same GPU by the same number.
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    else:
        argv += _cpu_arguments(config, width)
        # One thread an instance: two of them share the cores, and OpenMP's waiting threads would starve the other.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    if connector is not None and kv_port is not None:
        transfer, more = _kv_transfer(config, machine, connector, role, name, kv_port, port)
        argv += ["--kv-transfer-config", json.dumps(transfer)]
        environment |= more
        if connector == "builtin-p2p-nccl" and role == "prefill":
            # It dies at the first prompt that chunked prefill splits: room for 32 whole prompts in one batch.
            argv += ["--max-num-batched-tokens", str(max(8192, 32 * config.max_model_len))]
    argv += _words("--vllm-args", config.vllm_args)
    if role in ("prefill", "decode"):
        argv += _words(f"--{role}-args", config.prefill_args if role == "prefill" else config.decode_args)
    return Instance(
        name=name,
        role=role,
        argv=tuple(argv),
        environment=environment,
        url=f"http://{config.host}:{port}",
        gpus=gpus,
        kv_address=None if kv_port is None else f"{config.kv_ip}:{kv_port}",
        secret_environment=("PDBENCH_KV_SECRET",) if connector in ("p2p-nccl", "tcp") else (),
    )


def _cpu_arguments(config: ServeConfig, width: int) -> list[str]:
    """What makes vLLM start fast and compute right on a small machine without GPUs (the rotary kernel there is wrong)."""
    length = config.max_model_len
    arguments = ["--dtype", config.dtype or "float32", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"]
    arguments += ["--max-num-batched-tokens", str(length)]
    arguments += ["--distributed-executor-backend", "uni" if width == 1 else "mp"]
    return [*arguments, "--compilation-config", '{"custom_ops":["all","-rotary_embedding"]}']


def _kv_transfer(
    config: ServeConfig, machine: Machine, connector: Connector, role: str, name: str, kv_port: int, port: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's --kv-transfer-config and the environment that goes with it."""
    side = {"kv_role": "kv_producer" if role == "prefill" else "kv_consumer", "kv_port": kv_port}
    if connector == "nixl":
        environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": config.kv_ip, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port)}
        transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        if not machine.on_gpu:
            transfer["kv_buffer_device"] = "cpu"
        return transfer, environment
    if connector == "builtin-p2p-nccl":
        environment = {"VLLM_HOST_IP": config.kv_ip}
        if (machine.vllm or (0,)) >= REQUEST_ID_RANDOMIZED_SINCE:
            environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"  # else decode waits forever for the other's id
        # The receiver's buffer on GPU, in bytes; the connector asks for it, and it is 1e9 by itself.
        transfer = {"kv_connector": "P2pNcclConnector", "kv_buffer_size": 8e9 if role == "decode" else 1e1}
        return transfer | side | {
            "kv_connector_extra_config": {"http_port": str(port), "send_type": "PUT_ASYNC"}
        }, environment
    extra = {
        "transport": "nccl" if connector == "p2p-nccl" else "tcp",
        "kv_ip": config.kv_ip,  # no field of vLLM's own any more (0.32)
        "event_log": event_log(config, name),
    }
    transfer = {"kv_connector": "PdKvConnector", "kv_connector_module_path": "pdbench.kv.connector"}
    transfer |= {"kv_load_failure_policy": config.kv_load_failure_policy, "kv_connector_extra_config": extra}
    return transfer | side, {}


def event_log(config: ServeConfig, name: str) -> str:
    """Where a part of the deployment writes its instants, as JSON lines."""
    return str(Path(config.log_dir).absolute() / f"{name}.events.jsonl")
