"""What is saved: requests, device samples, trials, runs; versioned JSON, written whole or not at all.

All instants are seconds on the run's one monotonic clock, 0 at its start. Unknown is None, never 0.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from pdbench.errors import UserError
from pdbench.events import Event

SCHEMA = "pdbench/2"
READABLE = ("pdbench/1", SCHEMA)
Interval = tuple[float, float]


class Clock(msgspec.Struct, frozen=True):
    """A run's clock: `monotonic_s` and `unix_s` are the two system clocks' readings at the run's zero."""

    monotonic_s: float
    unix_s: float

    @classmethod
    def start(cls) -> "Clock":
        """A clock whose zero is now."""
        return cls(monotonic_s=time.monotonic(), unix_s=time.time())

    def resumed(self) -> "Clock":
        """The same zero, read by this boot's monotonic clock."""
        return Clock(monotonic_s=time.monotonic() - (time.time() - self.unix_s), unix_s=self.unix_s)

    def now(self) -> float:
        """Seconds since the run's zero."""
        return time.monotonic() - self.monotonic_s

    def of_monotonic(self, monotonic_s: float) -> float:
        """A `time.monotonic()` reading of any process of this host, on the run's clock."""
        return monotonic_s - self.monotonic_s


class RequestError(msgspec.Struct, frozen=True):
    """Why a request failed: `kind` is a short class (refused, reset, timeout, http_503, ...), `message` one line."""

    kind: str
    message: str


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request as the client saw it; durations are derived from these instants in `analysis`.

    `planned_s` is when the schedule wanted it sent, `due_s` when a free stream allowed it, `sent_s` when it was sent.
    `token_s` has one instant per token, those of one chunk share theirs; counted by "chunks", it has one per chunk, and
    `output_tokens` the tokens (None: nobody knows). `phases` maps a phase's name to [start_s, end_s] or None when it was not
    measured. `stamp` says which clock the arrivals carry: "kernel" or "user"; `counted_by` how tokens were counted:
    "token_ids", "logprobs", "usage" (on every chunk), "chunks" (one per chunk with something in it) or "mixed".
    `first_tokens` came with the first chunk. `token_choice` is the choice of every token where there were several. `answer_index` is the place in `token_s` of the
    first token that is no reasoning, None where none came; `unsent_tokens` of `output_tokens` are reasoning that was not sent.
    `cached_prompt_tokens` is how many of `prompt_tokens` the server says that it took from a cache; other
    prompts begin with the same `shared_prompt_tokens` on purpose. `notes` name what was
    odd about the counts or the stream. `prompt` is None where it was too long to be saved; `prompt_sha256` is of its UTF-8
    bytes.
    """

    id: str
    planned_s: float
    due_s: float | None = None
    sent_s: float | None = None
    token_s: list[float] = []
    end_s: float | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    shared_prompt_tokens: int = 0
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    unsent_tokens: int = 0
    prompt: str | None = None
    prompt_sha256: str | None = None
    text: str = ""
    error: RequestError | None = None
    phases: dict[str, Interval | None] = {}
    trial: int = 0
    warmup: bool = False
    stamp: str | None = None
    counted_by: str | None = None
    finish_reason: str | None = None
    answer_index: int | None = 0
    first_tokens: int = 1
    token_choice: list[int] = []
    notes: list[str] = []


class DeviceSample(msgspec.Struct, kw_only=True):
    """One reading of one device; None where it was not measured. `t_s` is the middle of the read, `read_s` its duration.

    `power_w` is instant, `power_average_w` the device's own mean over about 1 s; a superchip's module and memory have powers of
    their own. `power_limit_w` is the limit that is enforced. `cpu_utilization_pct`: 100 is one core busy.
    """

    t_s: float
    read_s: float | None = None
    power_w: float | None = None
    power_average_w: float | None = None
    energy_j: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    gpu_utilization_pct: float | None = None
    memory_utilization_pct: float | None = None
    temperature_c: float | None = None
    memory_used_mib: float | None = None
    throttle: list[str] | None = None
    power_limit_w: float | None = None
    cpu_utilization_pct: float | None = None
    cpu_clock_mhz: float | None = None
    module_power_w: float | None = None
    memory_power_w: float | None = None


class DeviceRecord(msgspec.Struct, kw_only=True):
    """One device over a run. `kind` is gpu, process (CPU use of a role's processes), cpu or dram (RAPL).

    `fine_power` holds the driver's own buffer as (t_s, power_w), finer than the samples; empty where there is none.
    `energy_ticks` holds the energy counter as (t_s, energy_j), each at the instant the counter moved.
    `not_measured` maps a field to the reason; `sampling` reports the achieved interval (p50_ms, p99_ms, largest_gap_ms,
    missed_ticks, stale_repeats); `statistics` maps a field to its avg, min and max over all samples, idle and warm-up
    included (a run's summary has means over the measured windows).
    """

    id: str
    kind: str
    name: str
    role: str | None = None
    host: str | None = None
    index: int | None = None
    samples: list[DeviceSample] = []
    fine_power: list[tuple[float, float]] = []
    energy_ticks: list[tuple[float, float]] = []
    not_measured: dict[str, str] = {}
    sampling: dict[str, float | None] = {}
    statistics: dict[str, dict[str, float | None]] = {}
    idle_power_w: dict[str, float | None] = {}
    default_power_limit_w: float | None = None


class PrefixCacheCounts(msgspec.Struct, frozen=True):
    """What one instance counted during a load, its warm-up left out: prompt tokens, and those that its prefix cache had."""

    role: str
    prompt_tokens: int
    cached_tokens: int


class Trial(msgspec.Struct, kw_only=True):
    """One repetition: its measured window on the run's clock, ramp-up and drain left out, and the client's check of itself.

    `start` counts the server starts of its run: trials with the same number were measured on the same servers; None where it
    was not recorded. `start_temperature_c` maps a GPU to its temperature before the first request, `prefix_cache` an instance to its
    own counts.
    """

    index: int
    start: int | None = None
    start_s: float
    end_s: float
    client: dict[str, Any] = {}
    start_temperature_c: dict[str, float] = {}
    prefix_cache: dict[str, PrefixCacheCounts] = {}


class Flag(msgspec.Struct, frozen=True):
    """Something a reader must know wherever the run's figures appear: `name` (client-limited, gate-failed, ...), `detail`."""

    name: str
    detail: str


class Gate(msgspec.Struct, kw_only=True):
    """The correctness gate: were outputs equal to the reference's, and did decode get all its KV from prefill?"""

    passed: bool
    prompts: int
    equal_outputs: int | None
    prompt_tokens: int | None
    external_kv_tokens: int | None
    detail: str


class Run(msgspec.Struct, kw_only=True):
    """A deployment under one load: all of its trials, requests and devices. `config` is all options as used.

    `name` is the deployment (single, disaggregated, replicas, ...). `roles` maps a role to its device ids.
    `events` are the proxy's and connector's own instants, joined to requests by id.
    """

    schema: str = SCHEMA
    name: str
    clock: Clock
    config: dict[str, Any]
    host: dict[str, Any]
    versions: dict[str, str | None]
    roles: dict[str, list[str]] = {}
    trials: list[Trial] = []
    requests: list[RequestRecord] = []
    summary: dict[str, Any] = {}
    gate: Gate | None = None
    flags: list[Flag] = []
    events: list[Event] = []
    devices: list[DeviceRecord] = []


class _DeviceFile(msgspec.Struct, kw_only=True):
    schema: str = SCHEMA
    role: str
    devices: list[DeviceRecord]


def check_writable(folder: Path) -> None:
    """Raises UserError when no file can be written into `folder`, which is created if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder.absolute()}: {error.strerror}; give --out a folder that you may write"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then move it there, so that no reader sees half a file.

    Raises UserError when the folder cannot be made or written into.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room, or name a folder that you may write"
        ) from None


def save_run(run: Run, folder: Path) -> Path:
    """Write `NAME_results.json` and one `ROLE_gpu_data.json` per role into `folder`; returns the results file's path."""
    roles = sorted({device.role or "host" for device in run.devices})
    for role in roles:
        devices = [device for device in run.devices if (device.role or "host") == role]
        save_devices(folder / f"{role}_gpu_data.json", role, devices)
    path = folder / f"{run.name}_results.json"
    write_whole(path, _encode(run))
    # Device files of an earlier run: `load_run` would take them for this one's.
    for other in set(folder.glob("*_gpu_data.json")) - {folder / f"{role}_gpu_data.json" for role in roles}:
        other.unlink()
    return path


def save_devices(path: Path, role: str, devices: list[DeviceRecord]) -> None:
    """Write the devices of one role, as in a run's folder, so that `load_devices` and `pdbench plot` read them."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(_DeviceFile(role=role, devices=devices)), indent=1))


def load_devices(path: Path) -> list[DeviceRecord]:
    """The devices of one `*_gpu_data.json`. Raises UserError when pdbench did not write it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_DeviceFile).devices
    except FileNotFoundError:
        raise UserError(f"no file {path}: `pdbench monitor --out FILE` and `pdbench run` write such files") from None
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path} holds no device samples ({error}): name a *_gpu_data.json or monitor's own file"
        ) from error


def _encode(run: Run) -> bytes:
    """The run without its devices: one line per top-level key and per request, so that a person can read and diff it."""
    lines = []
    for key in (name for name in run.__struct_fields__ if name != "devices"):
        value = getattr(run, key)
        if isinstance(value, list) and value:
            encoded = b"[\n  " + b",\n  ".join(msgspec.json.encode(item) for item in value) + b"\n ]"
        else:
            encoded = msgspec.json.encode(value)
        lines.append(b' "%s": %s' % (key.encode(), encoded))
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


class _Head(msgspec.Struct):
    schema: Any = None


def load_run(folder: Path | str) -> Run:
    """The run saved in `folder`, its devices included. Raises UserError with the remedy when pdbench did not write it."""
    folder = Path(folder)
    path = next(iter(sorted(folder.glob("*_results.json"))), None)
    if path is None:
        raise UserError(f"no *_results.json in {folder}: run `pdbench run` or `pdbench bench --out {folder}` first")
    saved = path.read_bytes()
    try:
        run = msgspec.json.decode(saved, type=Run)
        schema: Any = run.schema
    except msgspec.MsgspecError as error:
        try:
            schema = msgspec.json.decode(saved, type=_Head).schema
        except msgspec.ValidationError:
            schema = None  # whole JSON, but no object
        except msgspec.DecodeError:
            schema = SCHEMA  # half a file
        if schema in READABLE:
            raise UserError(
                f"{folder} does not hold a whole run ({error}): measure again, or restore the file"
            ) from error
    if schema not in READABLE:
        raise UserError(f"{path} has schema {schema!r}, this pdbench reads {SCHEMA!r}: measure again with this version")
    if schema != SCHEMA:
        run.summary, run.schema = (
            {},
            SCHEMA,
        )  # its keys meant other things; the figures are derived again from the requests
    for path in sorted(folder.glob("*_gpu_data.json")):
        run.devices.extend(load_devices(path))
    return run
