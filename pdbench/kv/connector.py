"""The class that vLLM loads: `PdKvConnector`, which passes every call to the scheduler's or the worker's half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from pdbench.kv import compat
from pdbench.kv.channel import FetchRequest, Identity
from pdbench.kv.groups import describe
from pdbench.kv.metrics import PdKvPromMetrics, PdKvStats
from pdbench.kv.scheduler import KvScheduler
from pdbench.kv.worker import KvWorker, model_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class PdKvConnector(KVConnectorBase_V1, compat.hybrid_base()):  # type: ignore[misc]
    """Prefill pushes the KV cache to decode over NCCL or TCP (docs/kv-connector.md). Raises UnsupportedError at start-up."""

    _cache_hit_source = compat.cache_hit_source()

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        compat.check_version()
        compat.check_deployment(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        compat.shared_secret()  # without one, fail now and not in the worker
        self._options = compat.Options.of(vllm_config)
        self._ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        self._groups = compat.groups(kv_cache_config)
        if self._options.return_kv:
            compat.check_return_kv(vllm_config, self._groups)
        self._worker: KvWorker | None = None
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            transfer = vllm_config.kv_transfer_config
            produces, consumes = bool(transfer.is_kv_producer), bool(transfer.is_kv_consumer)
            self._scheduler = KvScheduler(self._options, self._groups, produces, consumes, self._asked)
            compat.keep_whole_windows(kv_cache_config)

    # The scheduler's half

    def on_new_request(self, request: Request) -> None:
        self._scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """A step's output came back: what was received since that step was launched is added, to be scheduled next.

        vLLM runs a step ahead: by get_finished alone the scheduler would learn of it two steps later.
        """
        worker = self._local_worker()
        if worker is not None and (received := worker.take_received()):
            connector_output.finished_recving = received.union(connector_output.finished_recving or ())

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; True keeps its blocks until get_finished reports it as sent."""
        return self._scheduler.finished(request), None

    request_finished_all_groups = request_finished
    """What vLLM calls in its place for connectors that take several groups of blocks."""

    def has_pending_push_work(self) -> bool:
        """Must the engine take a step only for the connector?"""
        return self._scheduler.has_unsent_plan()

    def _asked(self, transfer_id: str) -> FetchRequest | None:
        worker = self._local_worker()
        return worker.asked(transfer_id) if worker is not None else None

    def _local_worker(self) -> KvWorker | None:
        """The worker's half if it is in this process and has no other ranks."""
        half = get_kv_transfer_group() if self._ranks == 1 and has_kv_transfer_group() else None
        return half._working if isinstance(half, PdKvConnector) else None

    # The worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        rank, model = get_tensor_model_parallel_rank(), model_fingerprint(self._vllm_config)
        heads = compat.kv_heads(self._vllm_config, self._kv_cache_config)
        size, layout = self._groups[0].block_size, describe(self._groups)
        identity = Identity(self._options.transport, self._ranks, rank, size, layout, model, heads)
        blocks, produces = int(self._kv_cache_config.num_blocks), bool(self._kv_transfer_config.is_kv_producer)
        idle, drafts = compat.new_blocks_are_idle(self._vllm_config), compat.draft_layers(self._vllm_config, kv_caches)
        self._worker = KvWorker(self._options, identity, kv_caches, blocks, produces, idle, drafts)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward pass, in every step."""
        self._working.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward pass, or (from vLLM 0.29 on) right after its launch: there `handle_preemptions` has done it already."""
        self._working.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no forward pass runs on blocks that are still to come."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: all layers travel together after the forward pass."""

    def wait_for_save(self) -> None:
        """Blocks are kept until they are sent. vLLM calls it after get_transfer_results only where a draft model has run in between."""
        self._working.after_drafting()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose transfers ended; after the forward pass of every step, and in steps without one.

        Not so wait_for_save: vLLM calls that only in steps with a forward pass, some versions before speculative drafting.
        """
        reports = self._working.after_forward(self._get_connector_metadata())
        self._failed_blocks.update(*reports.failed.values())
        return reports.sent or None, reports.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """What vLLM 0.30 and newer call in place of get_finished."""
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        reports = self._working.after_forward(self._get_connector_metadata())
        return KVConnectorTransferResults(
            finished_sending=reports.sent, finished_recving=reports.received, failed_recving=set(reports.failed)
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed receives, for vLLM before 0.30, which does not take the failed requests."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def get_kv_connector_stats(self) -> PdKvStats | None:
        """Transfers since the last call (the worker's half only)."""
        return self._worker.recorder.take_stats() if self._worker is not None else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    build_kv_connector_stats = PdKvStats
    build_prom_metrics = PdKvPromMetrics

    @property
    def _working(self) -> KvWorker:
        assert self._worker is not None, "this is the scheduler's half"
        return self._worker
