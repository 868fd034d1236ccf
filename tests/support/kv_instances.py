"""Prefill and decode workers of the KV connector without vLLM's engine, driven one step at a time over real sockets."""

import socket
import time
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from pdbench.kv.messages import Drop, Fetch, Options, Prefilled, PrefillEnd, Prompt, StepPlan
from pdbench.kv.worker import KvWorker

BLOCK, BLOCKS, LAYERS = 4, 64, 3
SECRET = "a secret of the tests"
PATIENCE_S = 20.0


def free_port(ports=1):
    """A port whose next ones are free too, as far as one can know."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        try:
            for more in range(1, ports):
                socket.create_server(("127.0.0.1", port + more)).close()
            return port
        except (OSError, OverflowError):
            continue


@dataclass
class Instance:
    """One worker with a small cache, driven like vLLM's engine drives it: one plan a step."""

    role: str
    port: int = 0
    timeout_s: float = 5.0
    rank: int = 0
    ranks: int = 1
    staging_mib: int = 128
    event_log: str | None = None
    layout: tuple = (BLOCKS, BLOCK, 8)
    transport: str = "tcp"
    device: str = "cpu"
    host: str = "127.0.0.1"
    cache: dict = field(init=False)
    sent: list = field(default_factory=list)
    received: list = field(default_factory=list)
    failed: list = field(default_factory=list)

    def __post_init__(self):
        self.cache = {f"layer.{i}": torch.randn(self.layout, device=self.device) for i in range(LAYERS)}
        options = Options(
            kv_ip=self.host,
            port=self.port,
            transport=self.transport,
            transfer_timeout_s=self.timeout_s,
            event_log=self.event_log,
            staging_mib=self.staging_mib,
        )
        self.worker = KvWorker(options, self.rank, self.ranks, BLOCK, "model")
        self.worker.start(self.cache, self.layout[0], self.role == "prefill", self.role == "decode")

    def step(self, **plan):
        """One engine step on the instance's device; keeps what the worker reported."""
        with torch.cuda.device(self.device) if self.device != "cpu" else nullcontext():
            return self._step(StepPlan(**{"idle": not plan.get("prefilled")} | plan))

    def _step(self, step):
        self.worker.before_forward(step)
        self.worker.load(step)
        self.worker.after_forward(step)
        reports = self.worker.poll(step)
        self.sent += reports.sent
        self.received += reports.received
        self.failed += reports.failed
        return reports

    def until(self, done):
        """Step without requests until `done()`."""
        limit = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < limit, f"{self.role}: sent {self.sent} received {self.received}"
            self.step()

    def blocks(self, block_ids):
        return torch.stack([cache[block_ids] for cache in self.cache.values()])


@contextmanager
def instances(*makers):
    made = []
    try:
        for maker in makers:
            made.append(maker())
        yield made if len(made) > 1 else made[0]
    finally:
        for instance in made:
            instance.worker.close()


def prompt(tokens, name=None, transfer_id=None, fingerprint="same"):
    name = name or uuid.uuid4().hex
    return Prompt(request_id=name, transfer_id=transfer_id or f"t-{name}", tokens=tokens, fingerprint=fingerprint)


def prefill(instance, asked, blocks, chunks=None, ended=True, error=None):
    """Expect and compute a prompt in chunks (token counts after each), then end it."""
    instance.step(expected=[asked])
    known = 0
    for computed in chunks or [asked.tokens]:
        upto = -(-computed // BLOCK)
        new, known = blocks[known:upto], max(known, upto)
        done = Prefilled(
            request_id=asked.request_id,
            blocks=new,
            replace=known == upto and not known - len(new),
            computed_tokens=computed,
        )
        instance.step(prefilled=[done])
    if ended:
        instance.step(ended=[PrefillEnd(request_id=asked.request_id, kept=True, error=error)])


def fetch(instance, asked, blocks, port, start=0, host="127.0.0.1"):
    instance.step(fetches=[Fetch(prompt=asked, host=host, port=port, start_block=start, blocks=blocks)])


def drop(instance, asked, port, reason="the client went away"):
    gone = Drop(request_id=asked.request_id, transfer_id=asked.transfer_id, host="127.0.0.1", port=port, reason=reason)
    instance.step(drops=[gone])


def settled(p, d, asked, failed=False):
    """Both sides ended the transfer; decode with the outcome given."""
    name = asked.request_id
    d.until(lambda: name in d.received)
    p.until(lambda: name in p.sent)
    assert (name in d.failed) == failed
    assert d.received.count(name) == 1 and p.sent.count(name) == 1
