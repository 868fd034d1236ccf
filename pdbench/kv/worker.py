"""The worker's half of the connector: one per rank, between vLLM's engine loop and the threads that move KV."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from pdbench.kv.blocks import make_packer
from pdbench.kv.channel import FetchRequest, Identity, WorkerContext
from pdbench.kv.compat import Options, UnsupportedError, shared_secret
from pdbench.kv.metrics import TransferRecorder
from pdbench.kv.receiver import Receiver
from pdbench.kv.scheduler import PrefillProgress, StepPlan
from pdbench.kv.sender import Sender

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

# How long a step without a forward pass waits for a transfer to end. It hands the interpreter to the threads that move KV,
# which a busy loop would starve, and it bounds by how much a new request can be delayed. vLLM itself then sleeps 1 ms, in which the end
# of a transfer is not heard: where nothing can begin before KV has come, a longer wait hears more of them at once.
IDLE_WAIT_S = 0.0005
FETCH_WAIT_S = 0.002
# How long a thread that moves KV waits at most for the interpreter while the engine's thread computes in Python (5 ms by default);
# a handoff has half a dozen such waits.
SWITCH_INTERVAL_S = 0.0001
CLOSE_TIMEOUT_S = 3.0


class Reports(NamedTuple):
    """Requests whose transfers ended in a step; `received` includes those that `failed`, which come with their blocks."""

    sent: set[str]
    received: set[str]
    failed: dict[str, list[int]]


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
    """One rank's transfers from and to vLLM's KV cache (layer name -> tensor) of `blocks` blocks; listens if it `produces` or returns KV.

    `identity` is complete but for the beginning of the cache's layout; rank i listens on the instance's kv_port + i. `new_blocks_idle`:
    no forward pass uses blocks any more that vLLM reserves (compat.new_blocks_are_idle). `drafts`: the layers of a draft model. Raises
    UnsupportedError, OSError.
    """

    def __init__(
        self,
        options: Options,
        identity: Identity,
        kv_caches: dict[str, torch.Tensor],
        blocks: int,
        produces: bool,
        new_blocks_idle: bool = False,
        drafts: Collection[str] = (),
    ) -> None:
        packer = make_packer(kv_caches, blocks, len(identity.heads), drafts)
        packer.warm_up()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._on_gpu = packer.device.type == "cuda"
        self._new_blocks_idle = new_blocks_idle
        self._loaded: StepPlan | None = None
        self._taken = False  # has `take_received` been called since the last step?
        self._drafting: list[PrefillProgress] | None = [] if packer.drafts else None
        if options.transport == "nccl" and not self._on_gpu:
            where = f"this cache is on {packer.device}"
            raise UnsupportedError(f"transport nccl moves KV between GPUs and {where}: use tcp")
        self._threads = Threads()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self.recorder = TransferRecorder(options.event_log, identity.rank)
        address = (options.kv_ip, options.port + identity.rank)
        context = WorkerContext(
            secret=shared_secret(),
            identity=msgspec.structs.replace(identity, layout=packer.layout + identity.layout, drafts=packer.drafts),
            packer=packer,
            staging_bytes=max(options.staging_mib << 20, packer.block_bytes),
            timeout_s=options.transfer_timeout_s,
            changed=self._changed,
            finish=self.recorder.add,
            start_thread=self._threads.start,
            returns_at=address if options.return_kv else None,
        )
        self._sender: Sender | None = None
        if produces or options.return_kv:
            self._sender = Sender(address, context)
            logger.info("rank %d listens for its peers on %s:%d (%s)", identity.rank, *address, options.transport)
        self._receiver = Receiver(context, self._sender.withdraw if self._sender else lambda request_id: True)
        self._threads.start("kv-time", self._keep_time, min(1.0, options.transfer_timeout_s / 10))

    def before_forward(self, plan: StepPlan) -> None:
        """Before the step's forward pass, which may overwrite the blocks of preempted requests."""
        self.after_drafting()
        if self._sender is not None and plan.preempted:
            self._sender.preempted(plan.preempted)
        self.load(plan)

    def load(self, plan: StepPlan) -> None:
        """Ask for what the step fetches, once: before the launch of its forward pass, which takes some milliseconds."""
        if plan is self._loaded:
            return
        self._loaded = plan
        if self._sender is not None and plan.offers:
            # Before the fetches, whose ends withdraw them. Their blocks come in `after_forward`: this step may still write them.
            self._sender.step(StepPlan(expected=plan.offers), None)
        if plan.fetches or plan.cancelled:
            # The step's own forward pass does not use the blocks that are to be filled, those before it may.
            self._receiver.step(plan, self._mark() if plan.fetches and not self._new_blocks_idle else None)

    def after_forward(self, plan: StepPlan) -> Reports:
        """The step's forward pass is launched (on CPU: done): what it computes may travel once it is over.

        Returns what ended since the last step; a step without a forward pass waits a moment for something to end.
        """
        if self._sender is not None:
            if self._drafting is not None:
                # vLLM may call this before it launches the draft model, which has yet to write its layers.
                self._drafting += plan.prefilled
                plan = replace(plan, prefilled=[])
            self._sender.step(plan, self._mark() if plan.prefilled else None)
        with self._changed:
            # What is returned here reaches the scheduler with this step's output, a step later than by `take_received`.
            soon, self._taken = self._taken and not plan.idle, False
            reports = self._take_reports(successes=not soon)
            wait_s = FETCH_WAIT_S if self._receiver.is_waiting else IDLE_WAIT_S
            if plan.idle and not (reports.sent or reports.received) and self._changed.wait(wait_s):
                reports = self._take_reports()
        return reports

    def after_drafting(self) -> None:
        """The draft model's pass of the last step is launched: what that step computed may travel once it is over."""
        if self._sender is not None and self._drafting:
            self._sender.step(StepPlan(prefilled=self._drafting), self._mark())
            self._drafting = []

    def take_received(self) -> set[str]:
        """Requests whose KV came since the last report; failures wait for `after_forward`. Called when a step's output is there."""
        with self._changed:
            self._taken = True
            return self._receiver.take_reports(failures=False)[0]

    def asked(self, transfer_id: str) -> FetchRequest | None:
        """What decode asked of a transfer (no tokens where that is over); None if it has not yet."""
        with self._changed:
            return self._sender.asked(transfer_id) if self._sender is not None else None

    def close(self) -> None:
        self._closed.set()
        if self._sender is not None:
            self._sender.close()
        self._receiver.close()
        self._threads.join(CLOSE_TIMEOUT_S)
        self.recorder.close()

    def _take_reports(self, successes: bool = True) -> Reports:
        sent = self._sender.take_reports() if self._sender is not None else set()
        return Reports(sent, *self._receiver.take_reports(successes=successes))

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind all that is launched so far on the engine's stream; None on CPU, where all of it is done."""
        if not self._on_gpu:
            return None
        # Blocking: threads wait for it asleep, without the interpreter's lock, for as long as the forward pass takes.
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def _keep_time(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
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
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    text = json.dumps([config, str(model.dtype), model.quantization, vllm_config.cache_config.cache_dtype], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
