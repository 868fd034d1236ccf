"""The worker's half of the connector: one per rank, between vLLM's engine loop and the threads that move KV."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pdbench.events import TransferEvent
from pdbench.kv.blocks import make_packer
from pdbench.kv.channel import Identity
from pdbench.kv.compat import Options, shared_secret
from pdbench.kv.metrics import TransferRecorder
from pdbench.kv.receiver import Receiver
from pdbench.kv.scheduler import StepPlan
from pdbench.kv.sender import Sender
from pdbench.kv.transports import WorkerContext, link_opener

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

# How long a step without a forward pass waits for a transfer to end. It hands the interpreter to the threads that move KV,
# which a busy loop would starve, and it bounds by how much a new request can be delayed.
IDLE_WAIT_S = 0.0005
# How long a thread that moves KV waits at most for the interpreter while the engine's thread computes in Python (5 ms by default);
# a handoff has half a dozen such waits.
SWITCH_INTERVAL_S = 0.0001
CLOSE_TIMEOUT_S = 3.0


@dataclass
class Reports:
    """Requests whose transfers ended in a step; `received` includes those that `failed`, which come with their blocks."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: dict[str, list[int]] = field(default_factory=dict)


class Threads:
    """Daemon threads that the worker's end waits for: one that still runs a kernel's C++ code when Python exits aborts the process.

    `start` and `join` may be called from any of them.
    """

    def __init__(self) -> None:
        self._started: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def start(self, name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Start `target` in a thread called `name`. Raises RuntimeError when the machine has no more threads."""
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        with self._lock:
            thread.start()
            self._started = {other for other in self._started if other.is_alive()} | {thread}
        return thread

    def join(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for all others to end; one that hangs in a dead peer's connection is abandoned."""
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            with self._lock:
                others = [t for t in self._started if t.is_alive() and t is not threading.current_thread()]
            if not others:
                return
            others[0].join(left_s)


class KvWorker:
    """One rank's transfers. `rank` and `ranks` are of tensor parallelism; rank i listens on the instance's kv_port + i."""

    def __init__(self, options: Options, rank: int, ranks: int, block_size: int, model: str) -> None:
        self._options, self._rank, self._ranks = options, rank, ranks
        self._block_size, self._model = block_size, model
        self._changed = threading.Condition()
        self._threads = Threads()
        self.recorder = TransferRecorder(options.event_log)
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._closed = threading.Event()
        self._on_gpu = False

    def start(self, kv_caches: dict[str, torch.Tensor], blocks: int, produces: bool, consumes: bool) -> None:
        """Take vLLM's KV cache (layer name -> tensor) of `blocks` blocks and listen or connect. Raises UnsupportedError, OSError."""
        options = self._options
        packer = make_packer(kv_caches, blocks)
        packer.warm_up()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._on_gpu = packer.device.type == "cuda"
        staging_bytes = options.staging_mib << 20
        context = WorkerContext(
            secret=shared_secret(),
            identity=Identity(
                transport=options.transport,
                tensor_parallel=self._ranks,
                rank=self._rank,
                block_size=self._block_size,
                layout=packer.layout,
                model=self._model,
            ),
            open_link=link_opener(options.transport, packer, staging_bytes, self._threads.start),
            block_bytes=packer.block_bytes,
            piece_blocks=max(1, staging_bytes // packer.block_bytes),
            timeout_s=options.transfer_timeout_s,
            changed=self._changed,
            finish=self._finish,
            start_thread=self._threads.start,
        )
        if produces:
            address = (options.kv_ip, options.port + self._rank)
            self._sender = Sender(address, context)
            logger.info("prefill rank %d listens for decode on %s:%d (%s)", self._rank, *address, options.transport)
        if consumes:
            self._receiver = Receiver(context)
        self._threads.start("kv-time", self._keep_time)

    def before_forward(self, plan: StepPlan) -> None:
        """Before the step's forward pass, which may overwrite the blocks of preempted requests."""
        if self._sender is not None and plan.preempted:
            self._sender.preempted(plan.preempted)

    def load(self, plan: StepPlan) -> None:
        """Start and cancel fetches, which threads carry out."""
        if self._receiver is not None and (plan.fetches or plan.cancelled):
            self._receiver.step(plan, self._mark())

    def after_forward(self, plan: StepPlan) -> None:
        """The step's forward pass is launched (on CPU: done): what it computes may travel once it is over."""
        if self._sender is not None:
            self._sender.step(plan, self._mark() if plan.prefilled else None)

    def poll(self, plan: StepPlan) -> Reports:
        """What ended since the last step; a step without a forward pass waits a moment for something to end."""
        with self._changed:
            reports = self._take_reports()
            if plan.idle and not (reports.sent or reports.received) and self._changed.wait(IDLE_WAIT_S):
                reports = self._take_reports()
        return reports

    def take_received(self) -> set[str]:
        """Requests whose KV came since the last report; failures wait for `poll`."""
        if self._receiver is None:
            return set()
        with self._changed:
            return self._receiver.take_reports(failures=False)[0]

    def close(self) -> None:
        """End all transfers and threads."""
        self._closed.set()
        for half in (self._sender, self._receiver):
            if half is not None:
                half.close()
        self._threads.join(CLOSE_TIMEOUT_S)
        self.recorder.close()

    def _take_reports(self) -> Reports:
        reports = Reports()
        if self._sender is not None:
            reports.sent = self._sender.take_reports()
        if self._receiver is not None:
            reports.received, reports.failed = self._receiver.take_reports()
        return reports

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind all that is launched so far on the engine's stream; None on CPU, where all of it is done."""
        if not self._on_gpu:
            return None
        # Blocking: threads wait for it asleep, without the interpreter's lock, for as long as the forward pass takes.
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def _finish(self, record: TransferEvent) -> None:
        record.rank = self._rank
        self.recorder.add(record)

    def _keep_time(self) -> None:
        while not self._closed.wait(min(1.0, self._options.transfer_timeout_s / 10)):
            for half in (self._sender, self._receiver):
                try:
                    if half is not None:
                        half.tick()
                except Exception:  # without this thread no timeout would be kept any more
                    logger.exception("checking for overdue transfers failed")


def model_fingerprint(vllm_config: VllmConfig) -> str:
    """A hash of what a model's KV depends on: its configuration without paths, its weights' and its cache's types."""
    model = vllm_config.model_config
    config = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = json.dumps([config, str(model.dtype), model.quantization, vllm_config.cache_config.cache_dtype], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
