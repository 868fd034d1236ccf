"""The scheduler's half of the connector: which requests hand over or fetch KV, as one StepPlan per engine step; no I/O."""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from pdbench.kv.compat import Options
from pdbench.kv.groups import Group, Place, transfer_order

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from pdbench.kv.channel import FetchRequest

logger = logging.getLogger(f"vllm.{__name__}")

GOOD_ENDS = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What identifies a transfer: the proxy's id, the prompt's length in tokens and its fingerprint.

    `ends`: how many of its tokens each block reaches, in the order in which blocks travel; in one group of blocks that of the prompt.
    `host` and `port` are the sender's; only the other side has them. `returned`: it goes from decode to prefill, and holds what decode
    has of the prompt's beginning.
    """

    request_id: str
    transfer_id: str
    tokens: int
    fingerprint: str
    ends: Sequence[int]
    host: str = ""
    port: int = 0
    returned: bool = False

    @property
    def direction(self) -> str:
        return "return" if self.returned else "handoff"


@dataclass(frozen=True, kw_only=True)
class PrefillProgress:
    """What one step computes of a prefill: the blocks that it completes, in the order of the transfer (all of them if `replace`)."""

    request_id: str
    blocks: list[int]
    replace: bool


@dataclass(frozen=True, kw_only=True)
class PrefillEnd:
    """A prefill is over. `kept`: vLLM holds its blocks until the worker reports them sent. `error` is None when it is good."""

    request_id: str
    kept: bool
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A transfer's blocks from the `start_block`-th on, which hold `tokens` tokens of the prompt, are wanted in this side's `blocks`."""

    transfer: Transfer
    start_block: int
    blocks: list[int]
    tokens: int


@dataclass
class StepPlan(KVConnectorMetadata):
    """All that the worker must know about one engine step; `idle` when the step runs no forward pass.

    `cancelled`: transfers that decode does not need any more, and why. `offers`: what decode can return, its blocks in `prefilled`.
    """

    idle: bool = True
    expected: list[Transfer] = field(default_factory=list)
    prefilled: list[PrefillProgress] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    ended: list[PrefillEnd] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    offers: list[Transfer] = field(default_factory=list)
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
    return_kv: bool = False


@dataclass
class _RequestState:
    """A request with a transfer of the blocks at `order`. `scheduled`: it has, or had, blocks that the worker knows.

    `takes_back`: it hands over, but may fetch before what decode has of its prompt; `asked` is decode's request, which says how much, and
    `returned` what is fetched.
    `tables` are a prefill's block tables, one per group, `reported` how many of the transfer's blocks the worker knows.
    """

    parameters: TransferParameters
    transfer: Transfer
    order: list[Place]
    sends: bool
    fetch_pending: bool
    takes_back: bool
    first_asked_s: float | None = None
    asked: FetchRequest | None = None
    returned: Transfer | None = None
    scheduled: bool = False
    tables: list[list[int]] = field(default_factory=list)
    reported: int = 0


@dataclass
class KvScheduler:
    """The transfers of one scheduler, whose model has these groups of KV cache blocks.

    `asked`: what decode has asked of a transfer that this instance is to send, None if nothing yet.
    """

    options: Options
    groups: Sequence[Group]
    produces: bool
    consumes: bool
    asked: Callable[[str], FetchRequest | None] = lambda transfer_id: None
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
        transfer, order = self._transfer(request, parameters)
        if sends and any(group.window for group in self.groups) and request.max_tokens > 1:
            # Past its prompt it would free blocks of the prompt's window before they are sent.
            logger.warning("%s hands over nothing: for this model prefill needs max_tokens 1", request.request_id)
            sends = False
        if sends and any(r.sends and r.transfer.transfer_id == transfer.transfer_id for r in self._requests.values()):
            logger.warning("transfer id %s is in use: %s hands over nothing", transfer.transfer_id, request.request_id)
            sends = False
        if sends or fetches:
            takes_back = self.options.return_kv and parameters.return_kv and sends and not fetches
            state = _RequestState(parameters, transfer, order, sends, fetches or takes_back, takes_back)
            self._requests[request.request_id] = state
        if sends:
            self._plan.expected.append(transfer)

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """How many prompt tokens beyond `computed_tokens` can be fetched, and whether that is asynchronous; None: not known yet.

        Decode fetches all, from prefill. Prefill fetches what decode has; it waits for decode's word only where its own prefix cache has
        the prompt's beginning: else there was hardly a turn before.
        """
        state = self._requests.get(request.request_id)
        if state is None or not state.fetch_pending:
            return 0, False
        end = state.transfer.tokens
        if state.takes_back:
            state.asked = self.asked(state.transfer.transfer_id)
            if state.asked is None and computed_tokens:
                now_s = time.monotonic()
                state.first_asked_s = state.first_asked_s or now_s
                if now_s - state.first_asked_s < self.options.return_wait_s:
                    return None, False
            end = self._returned_tokens(state)
        missing = end - computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM reserved `blocks` for the request, `external_tokens` of which are to be fetched."""
        state = self._requests.get(request.request_id)
        if state is None or not state.fetch_pending:
            return
        state.fetch_pending = False
        transfer, tables = state.transfer, blocks.get_block_ids()
        if external_tokens == 0:
            if not state.takes_back:
                self._plan.cancelled.append((transfer, "decode needs none of its blocks"))
            return
        if state.takes_back:
            transfer = state.returned = self._returned(request, state, self._returned_tokens(state))
        start = bisect_right(transfer.ends, transfer.tokens - external_tokens)
        ids = _blocks_at(tables, state.order[start : len(transfer.ends)])
        self._plan.fetches.append(Fetch(transfer=transfer, start_block=start, blocks=ids, tokens=external_tokens))
        if self.options.return_kv and start and not state.takes_back:
            self._plan.offers.append(self._returned(request, state, transfer.ends[start - 1]))
            ids = _blocks_at(tables, state.order[:start])
            self._plan.prefilled.append(PrefillProgress(request_id=request.request_id, blocks=ids, replace=True))

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """What the worker must know about the step that vLLM just scheduled; starts the next step's plan."""
        plan, self._plan = self._plan, StepPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        for name in output.preempted_req_ids or ():
            state = self._requests.get(name)
            if state is not None and state.sends:
                state.reported = 0
                plan.preempted.append(name)
        for name, tables, replace, before in _scheduled(output):
            state = self._requests.get(name)
            if state is None or not state.sends or state.reported == len(state.order):
                continue
            if replace:
                state.tables, state.reported = tables, 0
            else:
                for table, new in zip(state.tables, tables, strict=False):
                    table += new
            start, stop = state.reported, bisect_right(state.transfer.ends, before + output.num_scheduled_tokens[name])
            state.scheduled, state.reported = True, stop
            blocks = _blocks_at(state.tables, state.order[start:stop])
            plan.prefilled.append(PrefillProgress(request_id=name, blocks=blocks, replace=replace))
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
            if state.returned is not None and not good:
                self._plan.cancelled.append((state.returned, "prefill gave the request up"))
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

    def _returned_tokens(self, state: _RequestState) -> int:
        """How much of a prompt decode has and offers: whole blocks, and never all of the prompt."""
        transfer, asked = state.transfer, state.asked
        if asked is None or asked.returns_at is None or not 0 < asked.start_block < len(transfer.ends):
            return 0
        same = (asked.tokens, asked.fingerprint) == (transfer.tokens, transfer.fingerprint)
        return transfer.ends[asked.start_block - 1] if same else 0

    def _returned(self, request: Request, state: _RequestState, tokens: int) -> Transfer:
        """The transfer that brings prefill the prompt's first `tokens` tokens."""
        host, port = (state.asked and state.asked.returns_at) or ("", 0)
        more = {"prefilled_tokens": tokens, "remote_host": host, "remote_port": port}
        return self._transfer(request, msgspec.structs.replace(state.parameters, **more), returned=True)[0]

    def _transfer(
        self, request: Request, parameters: TransferParameters, returned: bool = False
    ) -> tuple[Transfer, list[Place]]:
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
        order = transfer_order(self.groups, tokens)
        transfer = Transfer(
            request_id=request.request_id,
            transfer_id=parameters.transfer_id or request.request_id,
            tokens=tokens,
            fingerprint=digest,
            ends=[place.end for place in order],
            host=parameters.remote_host,
            port=parameters.remote_port,
            returned=returned,
        )
        return transfer, order


def fingerprint(token_ids: Sequence[int], *more: object) -> str:
    """A hash of a prompt's tokens and of all else that shapes its KV cache (LoRA, cache salt, images, embeddings).

    Both sides compute it from their own request, so that a mixed-up transfer id is noticed.
    """
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16)
    for item in more:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _blocks_at(tables: Sequence[Sequence[int]], places: Sequence[Place]) -> list[int]:
    blocks = [tables[place.group][place.entry] for place in places]
    # Block 0 stands where a request has none (any more): wrong tokens would be the alternative.
    assert 0 not in blocks, f"vLLM keeps other blocks of a prompt than this connector expects: {places}, {blocks}"
    return blocks


def _scheduled(output: SchedulerOutput) -> Iterator[tuple[str, list[list[int]], bool, int]]:
    """Per scheduled request: its id, each group's new blocks, whether they replace all earlier ones, tokens computed before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, [list(blocks) for blocks in new.block_ids], True, new.num_computed_tokens
    cached: Any = output.scheduled_cached_reqs
    for index, name in enumerate(cached.req_ids):
        tables = [list(blocks) for blocks in cached.new_block_ids[index] or ()]
        yield name, tables, name in cached.resumed_req_ids, cached.num_computed_tokens[index]
