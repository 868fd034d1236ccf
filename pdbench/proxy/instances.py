"""The instances that the proxy forwards to: one table in memory that all workers share, and the choice among them."""

import ctypes
import fcntl
import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pdbench.errors import UserError
from pdbench.http import netloc

ROLES = ("prefill", "decode")
MAX_INSTANCES = 128
_ADDRESS_BYTES = 512
_turns = {role: itertools.count() for role in ROLES}


class State(IntEnum):
    """REMOVED: the slot is free. DRAINING: no new requests. LEAVING: removed when its requests have ended."""

    REMOVED = 0
    SERVING = 1
    DRAINING = 2
    LEAVING = 3


class Address(NamedTuple):
    host: str
    port: int
    kv_host: str
    kv_port: int

    @property
    def netloc(self) -> str:
        return netloc(self.host, self.port)

    @property
    def url(self) -> str:
        return f"http://{self.netloc}"

    @property
    def kv(self) -> str:
        return netloc(self.kv_host, self.kv_port)


class Instance(NamedTuple):
    """An instance in a slot of the table; a slot that is emptied and filled again has another generation."""

    slot: int
    generation: int
    role: str
    address: Address

    @property
    def id(self) -> str:
        return f"{self.role}-{self.slot}"


def parse_address(text: str, default_kv_port: int) -> Address:
    """`http://HOST:PORT[@KV_HOST:KV_PORT]`; raises UserError for anything else."""
    form = f"{text[:200]!r} is not an instance: write http://HOST:PORT or http://HOST:PORT@KV_HOST:KV_PORT"
    url, at, kv = text.partition("@")
    try:
        parts, kv_parts = urlsplit(url), urlsplit(f"//{kv}")
        port, kv_port = parts.port, kv_parts.port
    except ValueError as error:
        raise UserError(f"{form} ({error})") from None
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment and text.isascii() and text.isprintable()
    valid_kv = not at or (kv_parts.hostname and kv_port is not None and not kv_parts.path)
    if parts.scheme != "http" or not parts.hostname or port is None or " " in text or not bare or not valid_kv:
        raise UserError(form)
    if len(text) > _ADDRESS_BYTES - 16:
        raise UserError(f"an instance's address may have {_ADDRESS_BYTES - 16} characters, this one has {len(text)}")
    return Address(parts.hostname, port, kv_parts.hostname or parts.hostname, kv_port or default_kv_port)


class _Slot(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("generation", "role", "state", "healthy", "failures", "max_model_len")),
        ("address", ctypes.c_char * _ADDRESS_BYTES),
    )


class _Load(ctypes.Structure):
    _fields_ = (("requests", ctypes.c_int64), ("tokens", ctypes.c_int64))


class InstanceTable:
    """All instances with their state and load. Create it before the workers fork; `worker` is this process's index."""

    def __init__(self, workers: int = 1) -> None:
        def shared(kind: Any) -> Any:
            return kind.from_buffer(mmap.mmap(-1, ctypes.sizeof(kind)))

        self.worker = 0
        self._lock_file = os.memfd_create("pdbench-proxy-instances")
        self._version = shared(ctypes.c_int64)
        self._slots = shared(_Slot * MAX_INSTANCES)
        # Of each slot one load per worker, which that worker alone writes and readers sum up: counting needs no lock.
        self._loads = shared(_Load * workers * MAX_INSTANCES)
        self._read_version = -1
        self._instances: list[Instance] = []

    def add(self, role: str, address: Address) -> Instance:
        """Add an instance, ready after its first health check; raises UserError if known or if all slots are full."""
        with self._changing():
            present = self._read()
            if any(instance.role == role and instance.address.url == address.url for instance in present):
                raise UserError(f"{address.url} is a {role} instance already")
            free = set(range(MAX_INSTANCES)) - {instance.slot for instance in present}
            if not free:
                raise UserError(f"this proxy takes at most {MAX_INSTANCES} instances: remove one first")
            index = min(free)
            slot = self._slots[index]
            slot.generation += 1
            slot.role = ROLES.index(role)
            slot.healthy = slot.failures = slot.max_model_len = 0
            slot.address = f"{address.host} {address.port} {address.kv_host} {address.kv_port}".encode()
            for load in self._loads[index]:
                load.requests = load.tokens = 0
            slot.state = State.SERVING
        return Instance(index, slot.generation, role, address)

    def all(self) -> list[Instance]:
        if self._read_version != self._version.value:
            self._read_version = self._version.value
            self._instances = self._read()
        return self._instances

    def ready(self, role: str) -> list[Instance]:
        return [i for i in self.all() if i.role == role and self.is_ready(i)]

    def is_ready(self, instance: Instance) -> bool:
        slot = self._slots[instance.slot]
        return bool(slot.healthy) and slot.state == State.SERVING

    def set_state(self, instance: Instance, state: State) -> None:
        with self._changing():
            if slot := self._slot(instance):
                slot.state = state

    def passed(self, instance: Instance, max_model_len: int | None = None) -> None:
        """A health check passed: the instance is in, and takes requests of up to this many tokens (None: as before)."""
        if slot := self._slot(instance):
            slot.failures, slot.healthy = 0, 1
            if max_model_len is not None:
                slot.max_model_len = max_model_len

    def failed(self, instance: Instance, limit: int) -> None:
        """A health check or a request failed there; `limit` failures in a row take the instance out."""
        if slot := self._slot(instance):
            slot.failures += 1
            if slot.failures >= limit:
                slot.healthy = 0

    def served(self, instance: Instance) -> None:
        """A request was answered there without a 5xx: failures start from 0 again."""
        slot = self._slot(instance)
        if slot and slot.failures and slot.healthy:
            slot.failures = 0

    def healthy(self, instance: Instance) -> bool:
        return bool(self._slots[instance.slot].healthy)

    def max_model_len(self, instance: Instance) -> int | None:
        """The most tokens of prompt and output together that the instance takes, None where it does not say."""
        return self._slots[instance.slot].max_model_len or None

    def state(self, instance: Instance) -> State:
        return State(self._slots[instance.slot].state)

    def count(self, instance: Instance, requests: int, tokens: int) -> None:
        """Add to the requests and prompt tokens in flight at an instance."""
        if self._slot(instance):
            load = self._loads[instance.slot][self.worker]
            load.requests += requests
            load.tokens += tokens

    def load(self, instance: Instance) -> tuple[int, int]:
        """Requests and prompt tokens in flight at an instance, over all workers."""
        loads = self._loads[instance.slot]
        return sum(load.requests for load in loads), sum(load.tokens for load in loads)

    def forget_worker(self, worker: int) -> None:
        """Uncount everything a worker had in flight when it died."""
        for loads in self._loads:
            loads[worker].requests = loads[worker].tokens = 0

    def _slot(self, instance: Instance) -> Any:
        """The instance's slot, None if another instance is there."""
        slot = self._slots[instance.slot]
        return slot if slot.generation == instance.generation else None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        # This lock belongs to the process, not to the open file, and the kernel releases it when a worker dies.
        fcntl.lockf(self._lock_file, fcntl.LOCK_EX)
        try:
            yield
            self._version.value += 1
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN)

    def _read(self) -> list[Instance]:
        instances = []
        for index, slot in enumerate(self._slots):
            if slot.state != State.REMOVED:
                host, port, kv_host, kv_port = slot.address.decode().split(" ")
                address = Address(host, int(port), kv_host, int(kv_port))
                instances.append(Instance(index, slot.generation, ROLES[slot.role], address))
        return instances


def choose(
    policy: str, role: str, table: InstanceTable, prefix: bytes, tried: set[int], pair: int | None = None
) -> Instance | None:
    """A ready instance of `role` outside the slots `tried`, or None. `prefix` is the prompt's beginning.

    `pair` numbers the pairs of prefill and decode instances: whoever counts up visits all of them, whatever the policy.
    """
    ready = [instance for instance in table.ready(role) if instance.slot not in tried]
    if len(ready) < 2:
        return ready[0] if ready else None
    if pair is not None:
        return ready[(pair if role == "prefill" else pair // max(1, len(table.ready("prefill")))) % len(ready)]

    def work(instance: Instance) -> tuple[int, int]:
        requests, tokens = table.load(instance)
        return (tokens, requests) if role == "prefill" else (requests, tokens)

    def affinity(instance: Instance) -> bytes:
        return blake2b(b"%b %b" % (instance.address.url.encode(), prefix), digest_size=8).digest()

    turn = next(_turns[role])
    if policy == "round-robin":
        return ready[turn % len(ready)]
    if policy == "prefix-affinity":
        # Rendezvous hashing (Thaler and Ravishankar, 1998): few prefixes move when an instance comes or goes. One
        # with more than twice the mean of requests (and one over) is skipped for the next in the prefix's order.
        loads = {instance.slot: table.load(instance)[0] for instance in ready}
        limit = 2 * sum(loads.values()) / len(loads) + 1
        for instance in sorted(ready, key=affinity, reverse=True):
            if loads[instance.slot] <= limit:
                return instance
    first = turn % len(ready)
    return min(ready[first:] + ready[:first], key=work)
