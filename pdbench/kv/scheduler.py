"""The scheduler's half of the connector: which requests hand over or fetch KV, as one StepPlan per engine step; no I/O."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from pdbench.kv.compat import Options

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

GOOD_ENDS = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What identifies a transfer: the proxy's id, the prompt's length in tokens and its fingerprint.

    `host` and `port` are prefill's; only decode has them.
    """

    request_id: str
    transfer_id: str
    tokens: int
    fingerprint: str
    host: str = ""
    port: int = 0

    def blocks(self, block_size: int) -> int:
        """How many blocks of `block_size` tokens the prompt fills, the last one perhaps in part."""
        return -(-self.tokens // block_size)


@dataclass(frozen=True, kw_only=True)
class PrefillProgress:
    """What one step computes of a prefill: its new blocks (all of them if `replace`) and the prompt's tokens computed after it."""

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
    """Decode wants a prompt's blocks from the prompt's block `start_block` on, into its own `blocks`."""

    transfer: Transfer
    start_block: int
    blocks: list[int]


@dataclass
class StepPlan(KVConnectorMetadata):
    """All that the worker must know about one engine step; `idle` when the step runs no forward pass.

    `cancelled`: transfers that decode does not need any more, and why.
    """

    idle: bool = True
    expected: list[Transfer] = field(default_factory=list)
    prefilled: list[PrefillProgress] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    ended: list[PrefillEnd] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    cancelled: list[tuple[Transfer, str]] = field(default_factory=list)


class TransferParameters(msgspec.Struct, frozen=True):
    """A request's `kv_transfer_params` (docs/kv-connector.md); other fields may stand beside these."""

    transfer_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_host: Annotated[str, msgspec.Meta(max_length=256)] = ""
    remote_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    prefilled_tokens: int | None = None
    verify_prompt: bool = True


@dataclass
class _RequestState:
    """A request with a transfer. `scheduled`: it has, or had, blocks that the worker knows."""

    transfer: Transfer
    sends: bool
    fetch_pending: bool
    scheduled: bool = False
    reported_tokens: int = 0


@dataclass
class KvScheduler:
    """The transfers of one scheduler; `block_size` is in tokens."""

    options: Options
    block_size: int
    produces: bool
    consumes: bool
    _requests: dict[str, _RequestState] = field(default_factory=dict)
    _plan: StepPlan = field(default_factory=StepPlan)

    def new_request(self, request: Request) -> None:
        """A request arrived. The worker learns of prefills at once, so that it can tell decode to wait for them."""
        try:
            parameters = msgspec.convert(request.kv_transfer_params or {}, TransferParameters)
        except msgspec.ValidationError as error:
            logger.warning("kv_transfer_params of %s are ignored: %s", request.request_id, error)
            return
        sends = self.produces and bool(parameters.do_remote_decode)
        fetches = self.consumes and bool(parameters.do_remote_prefill)
        if not sends and not fetches:
            return
        transfer = self._transfer(request, parameters)
        if sends and any(r.sends and r.transfer.transfer_id == transfer.transfer_id for r in self._requests.values()):
            logger.warning("transfer id %s is in use: %s hands over nothing", transfer.transfer_id, request.request_id)
            sends = False
        if sends or fetches:
            self._requests[request.request_id] = _RequestState(transfer, sends, fetches)
        if sends:
            self._plan.expected.append(transfer)

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """How many prompt tokens beyond `computed_tokens` can be fetched from prefill, and whether that is asynchronous."""
        state = self._requests.get(request.request_id)
        missing = state.transfer.tokens - computed_tokens if state is not None and state.fetch_pending else 0
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM reserved `blocks` for the request, `external_tokens` of which are to be fetched."""
        state = self._requests.get(request.request_id)
        if state is None or not state.fetch_pending:
            return
        state.fetch_pending = False
        transfer = state.transfer
        if external_tokens == 0:
            self._plan.cancelled.append((transfer, "decode needs none of its blocks"))
            return
        start, stop = (transfer.tokens - external_tokens) // self.block_size, transfer.blocks(self.block_size)
        (block_ids,) = blocks.get_block_ids()
        self._plan.fetches.append(Fetch(transfer=transfer, start_block=start, blocks=list(block_ids[start:stop])))

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """What the worker must know about the step that vLLM just scheduled; starts the next step's plan."""
        plan, self._plan = self._plan, StepPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        for name in output.preempted_req_ids or ():
            state = self._requests.get(name)
            if state is not None and state.sends:
                state.reported_tokens = 0
                plan.preempted.append(name)
        for name, blocks, replace, before in _scheduled(output):
            state = self._requests.get(name)
            if state is None or not state.sends or state.reported_tokens >= state.transfer.tokens:
                continue
            after = min(before + output.num_scheduled_tokens[name], state.transfer.tokens)
            state.scheduled, state.reported_tokens = True, after
            plan.prefilled.append(
                PrefillProgress(request_id=name, blocks=blocks, replace=replace, computed_tokens=after)
            )
        return plan

    def finished(self, request: Request) -> bool:
        """The request is over. True when vLLM must keep its blocks until the worker reports them sent."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False
        status = request.status.name
        good = status in GOOD_ENDS
        if state.sends:
            error = None if good else f"prefill ended as {status.removeprefix('FINISHED_').lower()}"
            self._plan.ended.append(PrefillEnd(request_id=request.request_id, kept=state.scheduled, error=error))
            return state.scheduled
        if state.fetch_pending:
            self._plan.cancelled.append((state.transfer, "decode gave the request up before it was scheduled"))
        elif not good:
            self._plan.cancelled.append((state.transfer, "decode gave the request up"))
        return False

    def has_unsent_plan(self) -> bool:
        """Is there anything that the worker must learn although no request is left to schedule?"""
        plan = self._plan
        return bool(plan.expected or plan.ended or plan.fetches or plan.cancelled)

    def _transfer(self, request: Request, parameters: TransferParameters) -> Transfer:
        # Prefill computes all of the prompt, or as much as decode's request says (docs/kv-protocol.md, "The first token").
        tokens, prefilled = int(request.num_prompt_tokens), parameters.prefilled_tokens
        if prefilled is not None and prefilled > 0:
            tokens = min(prefilled, tokens)
        digest = "not verified"
        if self.options.verify_prompt and parameters.verify_prompt:
            embeddings = getattr(request, "prompt_embeds", None)
            if embeddings is not None:
                data = embeddings[:tokens].cpu().contiguous().view(torch.uint8).numpy()
                embeddings = hashlib.blake2b(data, digest_size=16).hexdigest()
            digest = fingerprint(
                (request.prompt_token_ids or ())[:tokens],
                getattr(request.lora_request, "lora_name", None),
                getattr(request, "cache_salt", None),
                [feature.identifier for feature in getattr(request, "mm_features", None) or ()],
                embeddings,
            )
        return Transfer(
            request_id=request.request_id,
            transfer_id=parameters.transfer_id or request.request_id,
            tokens=tokens,
            fingerprint=digest,
            host=parameters.remote_host,
            port=parameters.remote_port,
        )


def fingerprint(token_ids: Sequence[int], *more: object) -> str:
    """A hash of a prompt's tokens and of all else that shapes its KV cache (LoRA, cache salt, images, embeddings).

    Both sides compute it from their own request, so that a mixed-up transfer id is noticed.
    """
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16)
    for item in more:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _scheduled(output: SchedulerOutput) -> Iterator[tuple[str, list[int], bool, int]]:
    """Per scheduled request: its id, its new blocks, whether they replace all earlier ones, tokens computed before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, list(new.block_ids[0]), True, new.num_computed_tokens
    cached: Any = output.scheduled_cached_reqs
    for index, name in enumerate(cached.req_ids):
        new_blocks = cached.new_block_ids[index]
        blocks = list(new_blocks[0]) if new_blocks else []
        yield name, blocks, name in cached.resumed_req_ids, cached.num_computed_tokens[index]
