"""The worker's half of the connector: one a rank, between vLLM's engine loop and the threads that move KV.

Try: python -m pytest tests/test_kv_exchange.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pdbench.kv.control import Identity
from pdbench.kv.link import transport
from pdbench.kv.messages import Options, StepPlan, shared_secret
from pdbench.kv.metrics import Evidence
from pdbench.kv.pack import make_packer
from pdbench.kv.receiving import Receiver
from pdbench.kv.sending import Sender
from pdbench.kv.threads import Threads

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

# How long a step without a forward pass waits for a transfer to end. It hands the interpreter to the threads that move KV,
# which a busy loop would starve, and it bounds by how much a new request can be delayed.
IDLE_WAIT_S = 0.0005
# How long a thread that moves KV waits at most for the interpreter while the engine's thread computes in Python (5 ms otherwise);
# a handoff has half a dozen such waits.
SWITCH_INTERVAL_S = 0.0001
# How long the end of a worker waits for its threads.
CLOSE_TIMEOUT_S = 3.0


@dataclass
class Reports:
    """What vLLM must be told after a step: request ids, and blocks of failed receives."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class KvWorker:
    """One rank's transfers. `rank` and `ranks` are of tensor parallelism; rank i listens on the instance's kv_port + i."""

    def __init__(self, options: Options, rank: int, ranks: int, block_size: int, model: str) -> None:
        self._options, self._rank, self._ranks = options, rank, ranks
        self._block_size, self._model = block_size, model
        self._secret = shared_secret()
        self._changed = threading.Condition()
        self._threads = Threads()
        self.evidence = Evidence(options.event_log)
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._closed = threading.Event()
        self._on_gpu = False

    def start(self, kv_caches: dict[str, torch.Tensor], blocks: int, produces: bool, consumes: bool) -> None:
        """Take vLLM's KV cache (layer name -> tensor) of `blocks` blocks and open for business. Raises UnsupportedError, OSError."""
        options = self._options
        packer = make_packer(kv_caches, blocks)
        packer.warm_up()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._on_gpu = packer.device.type == "cuda"
        identity = Identity(
            transport=options.transport,
            tensor_parallel=self._ranks,
            rank=self._rank,
            block_size=self._block_size,
            layout=packer.layout,
            model=self._model,
        )
        staging = options.staging_mib << 20
        piece_blocks = max(1, staging // packer.block_bytes)
        open_link = transport(options.transport, packer, staging, self._threads)
        shared: dict[str, Any] = {"timeout_s": options.transfer_timeout_s, "changed": self._changed}
        shared |= {"finish": self._finished, "threads": self._threads}
        if produces:
            address = (options.kv_ip, options.port + self._rank)
            self._sender = Sender(address, self._secret, identity, open_link, piece_blocks, **shared)
            logger.info("prefill rank %d listens for decode on %s:%d (%s)", self._rank, *address, options.transport)
        if consumes:
            block_bytes = packer.block_bytes
            self._receiver = Receiver(self._secret, identity, open_link, piece_blocks, block_bytes, **shared)
        self._threads.start("kv-time", self._keep_time)

    def before_forward(self, plan: StepPlan) -> None:
        """Before the step's forward pass: blocks of preempted requests are about to be overwritten."""
        if self._sender is not None and plan.preempted:
            self._sender.preempted(plan.preempted)

    def load(self, plan: StepPlan) -> None:
        """Start and give up fetches; they go on by themselves."""
        if self._receiver is not None and (plan.fetches or plan.drops):
            self._receiver.step(plan.fetches, plan.drops, self._mark())

    def after_forward(self, plan: StepPlan) -> None:
        """The step's forward pass is launched (on CPU: done): what it computes may travel once it is over."""
        if self._sender is not None:
            event = self._mark() if plan.prefilled else None
            self._sender.step(plan.expected, plan.prefilled, plan.ended, event)

    def poll(self, plan: StepPlan) -> Reports:
        """What ended since the last step; a step without a forward pass waits a moment for something to end."""
        with self._changed:
            reports = self._take()
            if plan.idle and not (reports.sent or reports.received) and self._changed.wait(IDLE_WAIT_S):
                reports = self._take()
        return reports

    def take_received(self) -> set[str]:
        """Requests whose KV came since the last report; what failed waits for `poll`."""
        if self._receiver is None:
            return set()
        with self._changed:
            return set(self._receiver.take_reports(failures=False)[0])

    def close(self) -> None:
        """End all transfers and threads."""
        self._closed.set()
        for half in (self._sender, self._receiver):
            if half is not None:
                half.close()
        self._threads.join(CLOSE_TIMEOUT_S)
        self.evidence.close()

    def _take(self) -> Reports:
        reports = Reports()
        if self._sender is not None:
            reports.sent = self._sender.take_reports()
        if self._receiver is not None:
            received, failed = self._receiver.take_reports()
            reports.received, reports.failed = set(received), set(failed)
            reports.failed_blocks = {block for fetch in failed.values() for block in fetch.blocks}
        return reports

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind all that is launched so far on the engine's stream; None on CPU, where all of it is done."""
        if not self._on_gpu:
            return None
        # One that threads wait for asleep, without the interpreter's lock, for as long as the forward pass takes.
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def _finished(self, record: Any) -> None:
        record.rank = self._rank
        self.evidence.add(record)

    def _keep_time(self) -> None:
        while not self._closed.wait(min(1.0, self._options.transfer_timeout_s / 10)):
            for half in (self._sender, self._receiver):
                try:
                    if half is not None:
                        half.tick()
                except Exception:  # without this thread no timeout would hold any more
                    logger.exception("a look at what is overdue failed")


def model_digest(vllm_config: VllmConfig) -> str:
    """A digest of what a model's KV depends on: its configuration without paths, its weights' and its cache's types."""
    model = vllm_config.model_config
    config = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = json.dumps([config, str(model.dtype), model.quantization, vllm_config.cache_config.cache_dtype], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
