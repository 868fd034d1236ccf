"""Every option, declared once: frozen dataclasses <- TOML recipe <- command-line flags (cyclopts reads the docstrings).

A recipe is a flat TOML file whose keys are the flags' names with underscores. An option that is None is decided at start,
by what the machine has. Try: pdbench run --help
"""

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

Connector = Literal["auto", "p2p-nccl", "builtin-p2p-nccl", "nixl", "tcp"]
Deployment = Literal["single", "replicas", "tensor-parallel", "disaggregated"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What runs: the model, the instances of each role, their devices, ports and vLLM options."""

    model: str | None = None
    """Model folder or hub name; by itself deepseek-ai/DeepSeek-V2-Lite on GPUs, a tiny model made on the spot without."""
    max_model_len: int = 512
    """Longest prompt and output together, in tokens."""
    gpu_memory_utilization: float = 0.8
    """Share of a GPU's memory that one vLLM instance takes, 0 to 1."""
    enforce_eager: bool = True
    """Run vLLM without CUDA graphs (the seed's setting; --no-enforce-eager is far faster, docs/metrics.md says why)."""
    dtype: str | None = None
    """Weights' and activations' type; by itself auto on GPUs, float32 on CPU."""
    load_format: str = "auto"
    """vLLM's --load-format; dummy gives random weights at real speed."""
    prefill_instances: int = 1
    """Prefill instances (x of xPyD)."""
    decode_instances: int = 1
    """Decode instances (y of xPyD)."""
    replica_instances: int = 2
    """Instances of the replicas deployment."""
    tensor_parallel: int = 1
    """GPUs a prefill, decode, single or replica instance spans."""
    prefill_gpus: tuple[int, ...] = ()
    """GPU indices of prefill, instance by instance; by itself the first ones, from 0."""
    decode_gpus: tuple[int, ...] = ()
    """GPU indices of decode; by itself those after prefill's, so 1 for 1P1D."""
    single_gpus: tuple[int, ...] = ()
    """GPU indices of the single instance; by itself from 0."""
    host: str = "127.0.0.1"
    """Address on which servers and proxy listen."""
    single_port: int = 8000
    """Port of the single instance."""
    prefill_port: int = 8100
    """Port of the first prefill instance; further ones count up."""
    decode_port: int = 8200
    """Port of the first decode instance; further ones count up."""
    proxy_port: int = 8000
    """Port of the proxy."""
    kv_ip: str = "127.0.0.1"
    """Address over which prefill and decode exchange the KV cache."""
    kv_port: int = 14579
    """KV port of the first prefill instance; every further instance takes the next one."""
    connector: Connector = "auto"
    """How KV moves: p2p-nccl (ours), tcp (ours), builtin-p2p-nccl (vLLM 0.10.2 - 0.23), nixl; auto chooses by vLLM and GPUs."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    """What decode does when a KV transfer fails: compute the prompt itself, or fail the request."""
    vllm_args: str = ""
    """More vLLM arguments for every instance, as one string."""
    prefill_args: str = ""
    """More vLLM arguments for prefill alone."""
    decode_args: str = ""
    """More vLLM arguments for decode alone."""
    start_timeout_s: float = 600.0
    """How long the servers may take until all are healthy."""
    log_dir: str = "logs"
    """Folder of the servers' logs."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent: prompts, arrivals, limits."""

    concurrency: int | None = None
    """Requests in flight at most; 1 if neither this nor --rate is given. With --rate: a cap on its streams."""
    rate: float | None = None
    """Requests a second that arrive (Poisson)."""
    requests: int = 16
    """Measured requests a trial."""
    input_tokens: int | None = None
    """Exact prompt length in tokens; by itself the built-in mixed texts at their own lengths."""
    output_tokens: int = 64
    """Tokens generated a request at most."""
    warmup: int = 2
    """Requests before the measured ones, left out of every figure."""
    seed: int = 0
    """Seed of prompts and arrivals: same seed, same bytes."""
    request_timeout_s: float = 120.0
    """Seconds after which a request counts as failed."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """What is read from the devices."""

    power: bool = True
    """Sample the devices; --no-power for servers of another host."""
    sample_interval_s: float = 0.1
    """Seconds between samples of every device, 0.01 to 10."""
