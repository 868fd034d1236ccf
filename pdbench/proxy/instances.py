"""The instances the proxy forwards to: one table in memory that all worker processes share.

A slot's facts (role, wanted, healthy) are written under a lock; its load has one row a worker, written by that worker
alone and summed by readers, so counting needs no lock.
Try: curl http://127.0.0.1:8000/instances
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from pdbench.errors import UserError

ROLES = ("prefill", "decode")
SERVING, DRAINING, LEAVING = 1, 2, 3
WANTED = {SERVING: "serving", DRAINING: "draining", LEAVING: "leaving"}
MAX_INSTANCES = 128
_TEXT_BYTES = 512
_WIDTH = 8
_GENERATION, _ROLE, _WANTED, _HEALTHY, _FAILURES = range(5)


@dataclass(frozen=True, slots=True)
class Address:
    """Where an instance listens for HTTP and for KV."""

    host: str
    port: int
    kv_host: str
    kv_port: int

    @property
    def netloc(self) -> str:
        """HOST:PORT, with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The instance's base URL."""
        return f"http://{self.netloc}"

    @property
    def kv(self) -> str:
        """The instance's KV address, HOST:PORT."""
        return f"[{self.kv_host}]:{self.kv_port}" if ":" in self.kv_host else f"{self.kv_host}:{self.kv_port}"


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance at one time of the table; a slot that was emptied and filled again has another generation."""

    slot: int
    generation: int
    role: str
    address: Address

    @property
    def id(self) -> str:
        """The name under which /instances knows it."""
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
    plain = parts.path in ("", "/") and not parts.query and not parts.fragment and text.isascii() and text.isprintable()
    if parts.scheme != "http" or not parts.hostname or port is None or " " in text or not plain:
        raise UserError(form)
    if at and (not kv_parts.hostname or kv_port is None or kv_parts.path):
        raise UserError(form)
    if len(text) > _TEXT_BYTES - 16:
        raise UserError(f"an instance's address may have {_TEXT_BYTES - 16} characters, this one has {len(text)}")
    return Address(parts.hostname, port, kv_parts.hostname or parts.hostname, kv_port or default_kv_port)


class InstanceTable:
    """All instances with their state and load. Made before the workers fork; `worker` is this process's row."""

    def __init__(self, workers: int = 1) -> None:
        self.worker = 0
        self.workers = workers
        self._lock_file = os.memfd_create("pdbench-proxy-instances")
        cells = 1 + MAX_INSTANCES * (_WIDTH + 2 * workers)
        self._cells = memoryview(mmap.mmap(-1, cells * 8)).cast("q")
        self._text = mmap.mmap(-1, MAX_INSTANCES * _TEXT_BYTES)
        self._version = -1
        self._known: dict[str, list[Instance]] = {}

    def add(self, role: str, address: Address) -> Instance:
        """Put an instance into a free slot; it takes requests once its first health check has passed."""
        with self._changing():
            known = [instance for some in self._read().values() for instance in some]
            if any(instance.role == role and instance.address.url == address.url for instance in known):
                raise UserError(f"{address.url} is a {role} instance already")
            free = set(range(MAX_INSTANCES)) - {instance.slot for instance in known}
            if not free:
                raise UserError(f"{MAX_INSTANCES} instances are the most this proxy takes: remove one first")
            slot = min(free)
            text = f"{address.host} {address.port} {address.kv_host} {address.kv_port}".encode()
            self._text[slot * _TEXT_BYTES : (slot + 1) * _TEXT_BYTES] = text.ljust(_TEXT_BYTES, b"\0")
            generation = self._get(slot, _GENERATION) + 1
            for worker in range(self.workers):
                row = self._row(slot, worker)
                self._cells[row] = self._cells[row + 1] = 0
            values = (generation, ROLES.index(role), SERVING, 0, 0)
            for field, value in zip((_GENERATION, _ROLE, _WANTED, _HEALTHY, _FAILURES), values, strict=True):
                self._cells[1 + slot * _WIDTH + field] = value
        return Instance(slot, generation, role, address)

    def all(self, role: str | None = None) -> list[Instance]:
        """The instances of a role (or of both) that are in the table."""
        if self._version != self._cells[0]:
            self._version = self._cells[0]
            self._known = self._read()
        if role is not None:
            return self._known[role]
        return [instance for some in self._known.values() for instance in some]

    def find(self, name: str) -> Instance | None:
        """The instance with this id, or None."""
        return next((instance for instance in self.all() if instance.id == name), None)

    def ready(self, role: str) -> list[Instance]:
        """The instances of a role that may take a request now."""
        return [i for i in self.all(role) if self._get(i.slot, _HEALTHY) and self._get(i.slot, _WANTED) == SERVING]

    def want(self, instance: Instance, wanted: int) -> None:
        """Let an instance serve, drain, or leave (drain, then be removed)."""
        with self._changing():
            if self._is_current(instance):
                self._set(instance, _WANTED, wanted)

    def remove(self, instance: Instance) -> None:
        """Empty the slot; requests in flight there run on."""
        with self._changing():
            if self._is_current(instance):
                self._set(instance, _WANTED, 0)

    def passed(self, instance: Instance) -> None:
        """A health check passed: the instance is in."""
        self._set(instance, _FAILURES, 0)
        self._set(instance, _HEALTHY, 1)

    def failed(self, instance: Instance, limit: int) -> None:
        """A health check or a request failed there; `limit` failures in a row take the instance out."""
        failures = self._get(instance.slot, _FAILURES) + 1
        self._set(instance, _FAILURES, failures)
        if failures >= limit:
            self._set(instance, _HEALTHY, 0)

    def served(self, instance: Instance) -> None:
        """A request was answered there, and not with a 5xx: failures are counted from 0 again."""
        if self._get(instance.slot, _FAILURES) and self._get(instance.slot, _HEALTHY):
            self._set(instance, _FAILURES, 0)

    def healthy(self, instance: Instance) -> bool:
        """Whether the instance's last checks passed."""
        return bool(self._get(instance.slot, _HEALTHY))

    def wanted(self, instance: Instance) -> int:
        """SERVING, DRAINING or LEAVING."""
        return self._get(instance.slot, _WANTED)

    def begin(self, instance: Instance, tokens: int) -> None:
        """Count a request of so many prompt tokens in."""
        self._count(instance, 1, tokens)

    def end(self, instance: Instance, tokens: int) -> None:
        """Count it out."""
        self._count(instance, -1, -tokens)

    def load(self, instance: Instance) -> tuple[int, int]:
        """Requests and prompt tokens in flight at an instance, over all workers."""
        rows = [self._row(instance.slot, worker) for worker in range(self.workers)]
        return sum(self._cells[row] for row in rows), sum(self._cells[row + 1] for row in rows)

    def forget_worker(self, worker: int) -> None:
        """Count out everything a worker had in flight when it died."""
        for slot in range(MAX_INSTANCES):
            row = self._row(slot, worker)
            self._cells[row] = self._cells[row + 1] = 0

    def _count(self, instance: Instance, requests: int, tokens: int) -> None:
        if self._is_current(instance):
            row = self._row(instance.slot, self.worker)
            self._cells[row] += requests
            self._cells[row + 1] += tokens

    def _row(self, slot: int, worker: int) -> int:
        return 1 + MAX_INSTANCES * _WIDTH + 2 * (slot * self.workers + worker)

    def _get(self, slot: int, field: int) -> int:
        return self._cells[1 + slot * _WIDTH + field]

    def _set(self, instance: Instance, field: int, value: int) -> None:
        if self._is_current(instance):
            self._cells[1 + instance.slot * _WIDTH + field] = value

    def _is_current(self, instance: Instance) -> bool:
        return self._get(instance.slot, _GENERATION) == instance.generation

    @contextmanager
    def _changing(self) -> Iterator[None]:
        # A lock of the process, not of the open file, and the kernel lets go of it when a worker dies.
        fcntl.lockf(self._lock_file, fcntl.LOCK_EX)
        try:
            yield
            self._cells[0] += 1
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN)

    def _read(self) -> dict[str, list[Instance]]:
        found: dict[str, list[Instance]] = {role: [] for role in ROLES}
        for slot in range(MAX_INSTANCES):
            if self._get(slot, _WANTED):
                text = self._text[slot * _TEXT_BYTES : (slot + 1) * _TEXT_BYTES].rstrip(b"\0").decode()
                host, port, kv_host, kv_port = text.split(" ")
                role = ROLES[self._get(slot, _ROLE)]
                address = Address(host, int(port), kv_host, int(kv_port))
                found[role].append(Instance(slot, self._get(slot, _GENERATION), role, address))
        return found
