"""What differs between the vLLM versions that this connector runs in, and what it refuses to run with, all in one place.

Try: python -c "from pdbench.kv import compat; compat.check_version(); print('this vLLM will do')"
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SUPPORTED = ((0, 26), (0, 33))
"""First and last vLLM minor version, both included."""
RANGE_TEXT = "0.26 to 0.33"
_MOVABLE = ("FullAttentionSpec", "MLAAttentionSpec")
"""Kinds of KV cache in which block i holds the prompt's i-th tokens and nothing else; their subclasses (sinks, evicted
windows, hidden states) hold more, or less."""


class UnsupportedError(ValueError):
    """This connector cannot work here: one line with what is wrong and the remedy."""


def check_version(text: str | None = None) -> None:
    """Raise UnsupportedError, with the range in the message, unless vLLM (or the version `text`) is one of those supported."""
    if text is None:
        text = str(import_module("vllm").__version__)
    found = re.match(r"(\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else None
    if version is None or not SUPPORTED[0] <= version <= SUPPORTED[1]:
        raise UnsupportedError(
            f"PdKvConnector works with vLLM {RANGE_TEXT}, this is {text}: install a version of that range"
        )


def check_deployment(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise UnsupportedError for parallelism and cache layouts whose blocks this connector cannot move one to one."""
    parallel = vllm_config.parallel_config
    for option in (
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, option, 1) > 1:
            flag = option.replace("_", "-")
            raise UnsupportedError(f"PdKvConnector does not support --{flag} {getattr(parallel, option)}: set it to 1")
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        raise UnsupportedError("PdKvConnector does not support --enable-sleep-mode: leave it out")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedError(
            f"PdKvConnector moves one group of full-attention blocks and this model's KV cache has {len(groups)} "
            "(a hybrid model): serve it without disaggregation, or with another connector"
        )
    for spec in _layer_specs(groups[0].kv_cache_spec):
        if type(spec).__name__ not in _MOVABLE:
            raise UnsupportedError(
                f"PdKvConnector moves full-attention KV blocks (MLA included) and this model has a {type(spec).__name__}: "
                "serve it without disaggregation, or with another connector"
            )


def _layer_specs(spec: Any) -> list[Any]:
    """The layers' own specs where vLLM wraps several of one kind in UniformTypeKVCacheSpecs."""
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if inner else [spec]


def cache_hit_source() -> Any:
    """By what name vLLM 0.32 and newer count prompt tokens that came from another instance; None before."""
    try:
        return import_module("vllm.v1.metrics.cache_hit_source").CacheHitSource.P2P
    except ImportError:
        return None


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """KVConnectorTransferResults of vLLM 0.30 and newer; before, vLLM asks get_finished and get_block_ids_with_load_errors."""
    base = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
    return base.KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)
