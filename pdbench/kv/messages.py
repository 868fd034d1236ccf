"""What the scheduler's half of the connector tells the worker's half at every engine step, and the connector's options.

Try: python -c "from pdbench.kv.messages import Options; print(Options())"
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from pdbench.kv.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

SECRET_VARIABLE = "PDBENCH_KV_SECRET"


@dataclass(frozen=True, kw_only=True)
class Options:
    """From --kv-transfer-config: `port` is kv_port, the rest kv_connector_extra_config.

    `kv_ip` stands there too, because vLLM 0.32 has no such option of its own any more; where vLLM has, both places will do.
    """

    kv_ip: str = "127.0.0.1"
    port: int = 14579
    transport: Literal["tcp", "nccl"] = "tcp"
    transfer_timeout_s: float = 30.0
    event_log: str | None = None
    staging_mib: int = 128
    verify_prompt: bool = True

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """The options of this instance. Raises UnsupportedError for unknown names and impossible values."""
        transfer = vllm_config.kv_transfer_config
        extra = dict(transfer.kv_connector_extra_config)
        known = set(cls.__dataclass_fields__) - {"port"}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise UnsupportedError(
                f"kv_connector_extra_config has {unknown[0]!r}, which PdKvConnector does not know: {sorted(known)}"
            )
        if "kv_ip" not in extra and getattr(transfer, "kv_ip", None):
            extra["kv_ip"] = str(transfer.kv_ip)
        options = cls(port=int(transfer.kv_port), **extra)
        if options.transport not in ("tcp", "nccl"):
            raise UnsupportedError(
                f"transport {options.transport!r} is neither tcp nor nccl (kv_connector_extra_config)"
            )
        if not options.transfer_timeout_s > 0 or not options.staging_mib >= 1:
            raise UnsupportedError("transfer_timeout_s and staging_mib (kv_connector_extra_config) must be above 0")
        return options


def shared_secret() -> bytes:
    """The secret that prefill and decode prove to each other. Raises UnsupportedError when there is none."""
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < 16:
        raise UnsupportedError(
            f"{SECRET_VARIABLE} is not set, or shorter than 16 characters: give all instances of the deployment the same one, "
            f"for example `export {SECRET_VARIABLE}=$(openssl rand -hex 16)`"
        )
    return secret.encode()


def fingerprint(token_ids: Sequence[int], *more: object) -> str:
    """A digest of a prompt's tokens and of all else that shapes its KV cache (embeddings, LoRA, cache salt, images)."""
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16)
    for item in more:
        digest.update(repr(item).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A transfer's identity: the proxy's transfer id, the prompt's length in tokens and its fingerprint."""

    request_id: str
    transfer_id: str
    tokens: int
    fingerprint: str

    def blocks(self, block_size: int) -> int:
        """How many blocks of `block_size` tokens it fills, the last one perhaps in part."""
        return -(-self.tokens // block_size)


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Progress of a prefill in this step: its blocks (all of them if `replace`) and how many tokens will be computed."""

    request_id: str
    blocks: list[int]
    replace: bool
    computed_tokens: int


@dataclass(frozen=True, kw_only=True)
class PrefillEnd:
    """A prefill is over. `kept`: vLLM holds its blocks until the worker reports them sent. `error` is None when it is good."""

    request_id: str
    kept: bool
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Decode wants the blocks of a prompt from the prompt's block `start_block` on, into its own `blocks`."""

    prompt: Prompt
    host: str
    port: int
    start_block: int
    blocks: list[int]


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Decode no longer wants a transfer: prefill may free its blocks."""

    request_id: str
    transfer_id: str
    host: str
    port: int
    reason: str


@dataclass
class StepPlan(KVConnectorMetadata):
    """All that the worker must know about one engine step; `idle` when the step runs no forward pass."""

    idle: bool = True
    expected: list[Prompt] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    ended: list[PrefillEnd] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)


class TransferParameters(msgspec.Struct, frozen=True):
    """A request's `kv_transfer_params`; others' fields may stand beside these. `prefilled_tokens`: docs/kv-connector.md."""

    transfer_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_host: Annotated[str, msgspec.Meta(max_length=256)] = ""
    remote_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    prefilled_tokens: int | None = None
    verify_prompt: bool = True

    @classmethod
    def of(cls, request: Request) -> TransferParameters:
        """Those of a request. Raises msgspec.ValidationError for what no transfer can be made of."""
        return msgspec.convert(request.kv_transfer_params or {}, cls)
