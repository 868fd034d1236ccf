"""What the connector works with: vLLM's versions, deployments and KV caches, and its own options. Importing it imports no vLLM.

Whatever it does not support is refused when vLLM starts, with UnsupportedError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from pdbench.kv.groups import Group

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SUPPORTED = ((0, 26), (0, 33))
"""First and last minor version of vLLM, both included."""
RANGE_TEXT = "{}.{} to {}.{}".format(*SUPPORTED[0], *SUPPORTED[1])
SECRET_VARIABLE = "PDBENCH_KV_SECRET"
HYBRID = (0, 32)
"""First minor version of vLLM in which groups of blocks are moved; before, vLLM makes one group of full attention and windows."""
# KV caches whose block i holds the prompt's i-th tokens and nothing else. Subclasses of these specs (attention sinks, evicted
# windows, hidden states) hold more, or less. Of a sliding window only the last blocks are kept.
_FULL_SPECS = {"FullAttentionSpec", "MLAAttentionSpec"}
_WINDOW_SPEC = "SlidingWindowSpec"


class UnsupportedError(ValueError):
    """The connector cannot work here: one line with what is wrong and the remedy."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From --kv-transfer-config: `port` is kv_port, the rest kv_connector_extra_config (docs/kv-connector.md)."""

    kv_ip: str = "127.0.0.1"
    port: int = 14579
    transport: Literal["tcp", "nccl"] = "tcp"
    transfer_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    event_log: str | None = None
    staging_mib: Annotated[int, msgspec.Meta(ge=1)] = 128
    verify_prompt: bool = True
    return_kv: bool = False
    return_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 0.2

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """The options of this instance. Raises UnsupportedError for unknown names and impossible values."""
        transfer = vllm_config.kv_transfer_config
        extra = dict(transfer.kv_connector_extra_config)
        if "port" in extra:
            raise UnsupportedError("kv_connector_extra_config has a port: give it beside kv_connector, as kv_port")
        # From vLLM 0.32 on kv_ip is not an option of vLLM itself.
        if "kv_ip" not in extra and getattr(transfer, "kv_ip", None):
            extra["kv_ip"] = str(transfer.kv_ip)
        try:
            return msgspec.convert(extra | {"port": int(transfer.kv_port)}, cls)
        except msgspec.ValidationError as error:
            names = ", ".join(name for name in cls.__struct_fields__ if name != "port")
            raise UnsupportedError(f"kv_connector_extra_config: {error}; the options are {names}") from error


def shared_secret() -> bytes:
    """The secret that prefill and decode prove to each other. Raises UnsupportedError when there is none."""
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < 16:
        raise UnsupportedError(
            f"{SECRET_VARIABLE} is not set, or shorter than 16 characters: give all instances of the deployment the same one, "
            f"for example `export {SECRET_VARIABLE}=$(openssl rand -hex 16)`"
        )
    return secret.encode()


def check_version() -> None:
    """Raise UnsupportedError unless the installed vLLM is in the supported range."""
    text, minor = _vllm_version()
    if not SUPPORTED[0] <= minor <= SUPPORTED[1]:
        raise UnsupportedError(f"PdKvConnector works with vLLM {RANGE_TEXT}, this is {text}: install another version")


def _vllm_version() -> tuple[str, tuple[int, int]]:
    text = str(import_module("vllm").__version__)
    match = re.match(r"(\d+)\.(\d+)", text)
    return text, (int(match[1]), int(match[2])) if match else (0, 0)


def hybrid_base() -> Any:
    """What the connector's class must inherit for vLLM to give it several groups of blocks; of no effect before 0.32."""
    base = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
    return base.SupportsHMA if _vllm_version()[1] >= HYBRID else object


def check_deployment(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise UnsupportedError for parallelism and cache layouts whose blocks this connector cannot move one to one."""
    for kind in ("pipeline", "data", "decode-context", "prefill-context"):
        size = getattr(vllm_config.parallel_config, f"{kind.replace('-', '_')}_parallel_size", 1)
        if size > 1:
            raise UnsupportedError(f"PdKvConnector does not support --{kind}-parallel-size {size}: set it to 1")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        raise UnsupportedError("PdKvConnector does not support --enable-sleep-mode: leave it out")
    caches = kv_cache_config.kv_cache_groups
    if not caches:
        raise UnsupportedError("this model has no KV cache to move: serve it without disaggregation")
    movable = _FULL_SPECS | {_WINDOW_SPEC} if _vllm_version()[1] >= HYBRID else _FULL_SPECS
    for kind in (type(spec).__name__ for spec in _layer_specs(kv_cache_config)):
        if kind not in movable:
            raise UnsupportedError(
                "PdKvConnector moves the KV blocks of full attention (MLA included) and, with vLLM "
                f"{'.'.join(map(str, HYBRID))} and newer, of sliding windows, and this model has a {kind}: "
                "serve it without disaggregation, or with another connector"
            )
    if len(caches) > 1 and draft_layers(vllm_config, [name for group in caches for name in group.layer_names]):
        raise UnsupportedError(
            f"PdKvConnector moves a draft model's KV only where there is one group of blocks, and there are {len(caches)}: "
            "add --disable-hybrid-kv-cache-manager to all instances"
        )


def check_return_kv(vllm_config: VllmConfig, groups: Sequence[Group]) -> None:
    """Raise UnsupportedError where an instance's KV cannot go back from decode to prefill."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    executor = parallel.distributed_executor_backend
    for there, what in (
        (parallel.tensor_parallel_size > 1, f"--tensor-parallel-size {parallel.tensor_parallel_size}"),
        (executor not in (None, "uni"), f"--distributed-executor-backend {executor}"),
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (len(groups) > 1 or groups[0].window > 0, "a model with sliding windows"),
        (
            transfer.is_kv_producer and transfer.kv_load_failure_policy != "recompute",
            f'kv_load_failure_policy "{transfer.kv_load_failure_policy}" on prefill',
        ),
    ):
        if there:
            raise UnsupportedError(f"PdKvConnector's return_kv does not work with {what}: leave return_kv out")


def groups(kv_cache_config: KVCacheConfig) -> list[Group]:
    """The groups of blocks of a supported model, as much of them as must travel."""
    result = []
    for group in kv_cache_config.kv_cache_groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        spec, window = next(iter(specs.values()), group.kv_cache_spec), 0
        if type(spec).__name__ == _WINDOW_SPEC:
            # Decode computes the prompt's last token again, whose window reaches one token further back than the next one's.
            window = spec.sliding_window - 1 + max(1, spec.extra_retained_tokens)
        result.append(Group(int(spec.block_size), window))
    return result


def keep_whole_windows(kv_cache_config: KVCacheConfig) -> None:
    """Let vLLM's scheduler keep the block with the token before a sliding window, which `groups` counts in.

    With the prompt computed, vLLM has the next token's window in mind: prefill would free that block, decode would reserve none.
    """
    for group in kv_cache_config.kv_cache_groups:
        spec: Any = group.kv_cache_spec
        if type(spec).__name__ == _WINDOW_SPEC and not spec.extra_retained_tokens:
            group.kv_cache_spec = replace(spec, extra_retained_tokens=1)


def new_blocks_are_idle(vllm_config: VllmConfig) -> bool:
    """Does vLLM reserve blocks only once no forward pass that was launched before uses them?

    Where several steps are under way, vLLM 0.32 and newer free a request's blocks when its last step's output has been read, on consumers.
    With speculative decoding the draft model may still run then.
    """
    scheduler = import_module("vllm.v1.core.sched.scheduler").Scheduler
    waits = hasattr(scheduler, "_request_blocks_can_be_freed") and vllm_config.speculative_config is None
    return waits and bool(vllm_config.kv_transfer_config.is_kv_consumer)


def draft_layers(vllm_config: VllmConfig, names: Iterable[str]) -> set[str]:
    """Which attention layers are a draft model's (speculative decoding): vLLM numbers those of MTP modules and EAGLE heads on behind the
    model's own, and has the others under `mtp` and `draft_model`."""
    if vllm_config.speculative_config is None:
        return set()
    own = int(vllm_config.model_config.get_total_num_hidden_layers())
    return {
        name
        for name in names
        if not {"draft_model", "mtp"}.isdisjoint(name.split("."))
        or any(int(number) >= own for number in re.findall(r"layers\.(\d+)", name))
    }


def kv_heads(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """How many KV heads the whole model has in each layer: 1 for MLA, 0 unless all layers have as many as vLLM says of the model."""
    specs = _layer_specs(kv_cache_config, vllm_config)
    if all(type(spec).__name__ == "MLAAttentionSpec" for spec in specs):
        return 1
    heads = int(vllm_config.model_config.get_total_num_kv_heads())
    ranks = vllm_config.parallel_config.tensor_parallel_size
    evenly = heads % ranks == 0 or ranks % heads == 0
    return heads if evenly and all(spec.num_kv_heads == max(1, heads // ranks) for spec in specs) else 0


def _layer_specs(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig | None = None) -> list[Any]:
    """What each layer keeps, those of a draft model left out if `vllm_config` is given; or once what all of a group do."""
    result = []
    for group in kv_cache_config.kv_cache_groups:
        # vLLM wraps several specs of one kind in UniformTypeKVCacheSpecs.
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        drafts = draft_layers(vllm_config, specs) if vllm_config is not None else set()
        result += [spec for name, spec in specs.items() if name not in drafts] or [group.kv_cache_spec]
    return result


def cache_hit_source() -> Any:
    """How vLLM 0.32 and newer label prompt tokens that came from another instance; None before."""
    try:
        return import_module("vllm.v1.metrics.cache_hit_source").CacheHitSource.P2P
    except ImportError:
        return None
