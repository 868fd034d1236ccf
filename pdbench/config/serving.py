"""What runs and where: models, instances, devices, ports, nodes."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal

from cyclopts import Parameter

from pdbench.config.groups import CLUSTER, DEPLOYMENT, Connector, FirstToken, Indices, Model, Network, VllmWords, Words
from pdbench.config.types import Count, CountOrZero, Port, Positive, Share


@Parameter(name="*", group=DEPLOYMENT)
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a client must know of servers, whoever started them."""

    model: Model[str | None] = None
    """Model folder or hub name; default: with bench what the server offers, else deepseek-ai/DeepSeek-V2-Lite on GPUs and a tiny
    model made on the spot without."""
    single_gpus: Indices = ()
    """GPU indices (0,1) of the single instance; default: the first ones of prefill and decode. With bench: the GPUs of a server that pdbench did not start."""
    log_dir: str = "logs"
    """Folder of the servers' logs."""


@Parameter(name="*", group=DEPLOYMENT)
@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig):
    """What runs: the model, the instances of each role, their devices, ports and vLLM options."""

    max_model_len: Model[Count[int]] = 512
    """Longest prompt and output together, in tokens."""
    gpu_memory_utilization: Model[Share[float]] = 0.8
    """Share of a GPU's memory that vLLM takes, 0 to 1; instances on the same GPU divide it."""
    enforce_eager: Model[bool] = True
    """Run vLLM without CUDA graphs: it starts sooner and decodes far slower; --no-enforce-eager gives its real speed."""
    dtype: Model[str | None] = None
    """Type of weights and activations; default: auto on GPUs, float32 on CPU."""
    load_format: Model[str] = "auto"
    """vLLM's --load-format; dummy gives random weights at real speed."""
    vllm_args: Model[VllmWords] = ""
    """More vLLM arguments for every instance, as one string."""
    prefill_args: Model[VllmWords] = ""
    """More vLLM arguments for prefill alone."""
    decode_args: Model[VllmWords] = ""
    """More vLLM arguments for decode alone."""
    single_args: Model[VllmWords] = ""
    """More vLLM arguments for the single instance alone."""
    replica_args: Model[VllmWords] = ""
    """More vLLM arguments for replicas alone, as --max-num-batched-tokens 512 for smaller chunks of a prompt."""
    prefill_instances: Count[int] = 1
    """Prefill instances (x of xPyD)."""
    decode_instances: Count[int] = 1
    """Decode instances (y of xPyD)."""
    replica_instances: Count[int | None] = None
    """Instances of the replicas deployment, on the GPUs of prefill and decode; default: as many as these can hold."""
    tensor_parallel: Count[int] = 1
    """GPUs per prefill, decode, single or replica instance."""
    prefill_tensor_parallel: Count[int | None] = None
    """GPUs per prefill instance; default: --tensor-parallel."""
    decode_tensor_parallel: Count[int | None] = None
    """GPUs per decode instance; default: --tensor-parallel."""
    prefill_gpus: Indices = ()
    """GPU indices (0,1) of prefill, instance by instance; default: the first GPUs (of CUDA_VISIBLE_DEVICES where it is set)."""
    decode_gpus: Indices = ()
    """GPU indices (0,1) of decode; default: the first that prefill does not use. Prefill's own: both roles share them (docs/one-gpu.md)."""
    prompt_log: bool = True
    """Log when each prompt waited and was computed, through a vLLM scheduler class that only records; without it TTFT is in fewer parts."""
    start_timeout_s: Positive[float] = 600.0
    """How long servers that start together may take until all are healthy."""
    host: Network[str] = "127.0.0.1"
    """Address on which servers and proxy listen."""
    single_port: Network[Port[int]] = 8000
    """Port of the single instance."""
    prefill_port: Network[Port[int]] = 8100
    """Port of the first prefill instance; further ones count up."""
    decode_port: Network[Port[int]] = 8200
    """Port of the first decode instance; further ones count up."""
    proxy_port: Network[Port[int]] = 8000
    """Port of the proxy."""
    kv_ip: Network[str] = "127.0.0.1"
    """Address over which prefill and decode exchange the KV cache."""
    kv_port: Network[Port[int]] = 21001
    """KV port of the first prefill instance; each further instance takes the next one. Ray gives its workers 10002 to 19999."""
    connector: Network[Connector] = "auto"
    """How KV moves: p2p-nccl (ours), tcp (ours), builtin-p2p-nccl (vLLM 0.10.2 - 0.23), nixl (decode reads), nixl-push (prefill writes), mooncake; auto chooses by vLLM version and GPUs."""
    first_token: Network[FirstToken] = "prefill"
    """Whose token opens a stream where greedy sampling makes that exact (p2p-nccl and tcp): prefill's, decode's, or either's, with both asked at once."""
    disaggregate_above: Network[CountOrZero[int]] = 0
    """Prompts of at most so many tokens (text: four bytes per token) are computed by decode alone; 0: none are."""
    return_kv: Network[bool] = False
    """Let prefill fetch what decode has of a prompt, as the answers of earlier turns, instead of computing it again (docs/kv-connector.md)."""
    kv_load_failure_policy: Network[Literal["recompute", "fail"]] = "recompute"
    """What decode does when a KV transfer fails: compute the prompt itself, or fail the request."""

    def width(self, role: str) -> int:
        """GPUs (without any: processes) per instance of a role."""
        return getattr(self, f"{role}_tensor_parallel", None) or self.tensor_parallel

    def plain(self) -> dict[str, Any]:
        """Option -> value for the saved record. Keys among vLLM's arguments are hidden: results are there to be shown."""
        words = ("vllm_args", "prefill_args", "decode_args", "single_args", "replica_args")
        return asdict(self) | {name: _without_keys(getattr(self, name)) for name in words}


def option_of(word: str) -> str:
    """The option that a word of vLLM's command line gives, which takes underscores for dashes."""
    return word.partition("=")[0].replace("_", "-")


def last_value(words: Sequence[str], option: str) -> str | None:
    """What vLLM takes of an option that may be there several times; None where it is not."""
    pairs = zip_longest(words, words[1:], fillvalue="")
    given = [word.partition("=")[2] or following for word, following in pairs if option_of(word) == option]
    return given[-1] if given else None


def _without_keys(arguments: str) -> str:
    """vLLM's arguments with HIDDEN in place of every key; those without a key as they are."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # whoever starts vLLM with them says so
        return arguments
    kept, hidden = [], False
    for word in words:
        if option_of(word) in ("--api-key", "--hf-token"):
            kept += [word.partition("=")[0], "HIDDEN"]
            hidden = "=" not in word  # as many words as follow
        elif word.startswith("--") or not hidden:
            kept.append(word)
            hidden = False
    return arguments if kept == words else shlex.join(kept)


@Parameter(name="*", group=CLUSTER)
@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which hosts it runs on; without --cluster everything is on this host (docs/cluster.md)."""

    cluster: str | None = None
    """Run on a Ray cluster: auto (the one this host belongs to) or its head's ADDRESS:PORT."""
    place: Words = ()
    """Where instances go: same-node, spread, or ROLE=NODE (several); default: as few nodes as can hold them."""
    client_nodes: Words = ()
    """Nodes over which --client-processes are spread in turn; default: the node where pdbench runs."""
    node_timeout_s: Positive[float] = 20.0
    """Silence after which a node counts as lost and the run ends, marked, with what was measured."""
    restarts: CountOrZero[int] = 0
    """How many times servers that died are restarted; default: a dead server ends the run."""
