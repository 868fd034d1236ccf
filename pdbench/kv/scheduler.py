"""The scheduler's half of the connector: which requests hand their KV over, which fetch it, which blocks vLLM must keep.

It decides nothing about the wire: every engine step it hands the worker's half one StepPlan.
Try: python -m pytest tests/test_kv_scheduler.py
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from pdbench.kv.messages import (
    Drop,
    Fetch,
    Options,
    Prefilled,
    PrefillEnd,
    Prompt,
    StepPlan,
    TransferParameters,
    fingerprint,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

GOOD_ENDS = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass
class _Prefill:
    """A prefill whose KV goes to decode. `scheduled`: it has, or had, blocks that the worker knows."""

    prompt: Prompt
    scheduled: bool = False
    reported_tokens: int = 0


@dataclass
class KvScheduler:
    """Bookkeeping of one scheduler; `block_size` is in tokens."""

    options: Options
    block_size: int
    produces: bool
    consumes: bool
    _prefills: dict[str, _Prefill] = field(default_factory=dict)
    _fetched: set[str] = field(default_factory=set)
    _plan: StepPlan = field(default_factory=StepPlan)

    def new_request(self, request: Request) -> None:
        """A request arrived; the worker learns of prefills at once, so that decode is told to wait for them."""
        try:
            parameters = TransferParameters.of(request)
        except msgspec.ValidationError as error:
            logger.warning("kv_transfer_params of %s are left unused: %s", request.request_id, error)
            return
        if not self.produces or not parameters.do_remote_decode:
            return
        prompt = self._prompt(request)
        if any(prefill.prompt.transfer_id == prompt.transfer_id for prefill in self._prefills.values()):
            logger.warning("transfer id %s is in use: %s hands over nothing", prompt.transfer_id, request.request_id)
            return
        self._prefills[request.request_id] = _Prefill(prompt)
        self._plan.expected.append(prompt)

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """How many prompt tokens beyond `computed_tokens` can be fetched from prefill, and whether that is asynchronous."""
        if not self._wants_fetch(request):
            return 0, False
        missing = _prefilled_tokens(request, _parameters(request)) - computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM reserved `blocks` for the request, `external_tokens` of which are to be fetched."""
        if not self._wants_fetch(request):
            return
        self._fetched.add(request.request_id)
        parameters, prompt = _parameters(request), self._prompt(request)
        if external_tokens == 0:
            self._drop(request, "decode needs none of its blocks")
            return
        start, stop = (prompt.tokens - external_tokens) // self.block_size, prompt.blocks(self.block_size)
        (block_ids,) = blocks.get_block_ids()
        self._plan.fetches.append(
            Fetch(
                prompt=prompt,
                host=parameters.remote_host,
                port=parameters.remote_port,
                start_block=start,
                blocks=list(block_ids[start:stop]),
            )
        )

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """All that the worker must know about the step that vLLM just scheduled; starts the next step's plan."""
        plan, self._plan = self._plan, StepPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        plan.preempted = [name for name in output.preempted_req_ids or () if name in self._prefills]
        for name in plan.preempted:
            self._prefills[name].reported_tokens = 0
        for name, blocks, replace, before in _scheduled(output):
            prefill = self._prefills.get(name)
            if prefill is None or prefill.reported_tokens >= prefill.prompt.tokens:
                continue
            after = min(before + output.num_scheduled_tokens[name], prefill.prompt.tokens)
            prefill.scheduled, prefill.reported_tokens = True, after
            plan.prefilled.append(Prefilled(request_id=name, blocks=blocks, replace=replace, computed_tokens=after))
        return plan

    def finished(self, request: Request) -> bool:
        """The request is over. True when vLLM must keep its blocks until the worker reports them sent."""
        name = request.request_id
        prefill = self._prefills.pop(name, None)
        if prefill is not None:
            status = request.status.name
            error = None if status in GOOD_ENDS else f"prefill ended as {status.removeprefix('FINISHED_').lower()}"
            self._plan.ended.append(PrefillEnd(request_id=name, kept=prefill.scheduled, error=error))
            return prefill.scheduled
        if self._wants_fetch(request):
            self._drop(request, "decode gave the request up before it was scheduled")
        elif name in self._fetched and request.status.name not in GOOD_ENDS:
            self._drop(request, "decode gave the request up")
        self._fetched.discard(name)
        return False

    def has_unsent_plan(self) -> bool:
        """Is there anything that the worker must hear although no request is left to schedule?"""
        plan = self._plan
        return bool(plan.expected or plan.ended or plan.fetches or plan.drops)

    def _wants_fetch(self, request: Request) -> bool:
        wanted = self.consumes and _parameters(request).do_remote_prefill
        return bool(wanted) and request.request_id not in self._fetched

    def _drop(self, request: Request, reason: str) -> None:
        parameters = _parameters(request)
        self._plan.drops.append(
            Drop(
                request_id=request.request_id,
                transfer_id=parameters.transfer_id or request.request_id,
                host=parameters.remote_host,
                port=parameters.remote_port,
                reason=reason,
            )
        )

    def _prompt(self, request: Request) -> Prompt:
        """The prompt's identity; both sides compute it from the same tokens, so a mixed-up transfer id shows."""
        parameters = _parameters(request)
        tokens = _prefilled_tokens(request, parameters)
        digest = "not verified"
        if self.options.verify_prompt and parameters.verify_prompt:
            lora = getattr(request.lora_request, "lora_name", None)
            images = [feature.identifier for feature in getattr(request, "mm_features", None) or ()]
            salt = getattr(request, "cache_salt", None)
            embeddings = getattr(request, "prompt_embeds", None)
            given = None if embeddings is None else _digest(embeddings[:tokens])
            digest = fingerprint((request.prompt_token_ids or ())[:tokens], lora, salt, images, given)
        return Prompt(
            request_id=request.request_id,
            transfer_id=parameters.transfer_id or request.request_id,
            tokens=tokens,
            fingerprint=digest,
        )


def _parameters(request: Request) -> TransferParameters:
    """What a request says of its transfer; nothing where it makes no sense, which `new_request` has told."""
    try:
        return TransferParameters.of(request)
    except msgspec.ValidationError:
        return TransferParameters()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().contiguous().view(torch.uint8).numpy(), digest_size=16).hexdigest()


def _prefilled_tokens(request: Request, parameters: TransferParameters) -> int:
    """How many of the prompt's tokens prefill computes: all, if the request does not say that its end came later."""
    tokens, said = int(request.num_prompt_tokens), parameters.prefilled_tokens
    return min(said, tokens) if said is not None and said > 0 else tokens


def _scheduled(output: SchedulerOutput) -> Iterator[tuple[str, list[int], bool, int]]:
    """(request id, new blocks, whether they replace all earlier ones, tokens computed before this step), of each request."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, list(new.block_ids[0]), True, new.num_computed_tokens
    cached: Any = output.scheduled_cached_reqs
    for index, name in enumerate(cached.req_ids):
        new_blocks = cached.new_block_ids[index]
        blocks = list(new_blocks[0]) if new_blocks else []
        yield name, blocks, name in cached.resumed_req_ids, cached.num_computed_tokens[index]
