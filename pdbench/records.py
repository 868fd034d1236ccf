"""What is saved: requests, device samples, trials, runs; versioned JSON, written and read as one.

All instants are seconds on the run's one monotonic clock, 0 at its start. Unknown is None, never 0.
"""

import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pdbench import documents, files, validation
from pdbench.errors import NOT_JSON, UserError
from pdbench.events import EngineFacts, Event, PrefixCacheCounts, ServerSeries
from pdbench.events import Flag as Flag
from pdbench.validation import Energy, Power, Reading, Revision, RunId, RunInstant

SCHEMA = "pdbench/2"
READABLE = ("pdbench/1", SCHEMA)
Interval = tuple[float, float]
SAME_BOOT_S = 1.0
"""The wall clock drifts against the monotonic one by less than this while a host is up."""
COARSE_SHARE = 0.05
"""Chunks of an answer are its tokens if there are at most this share more tokens than instants (a marker, an end token)."""


class Clock(msgspec.Struct, frozen=True):
    """A run's clock: `monotonic_s` and `unix_s` are the two system clocks' readings at the run's zero."""

    monotonic_s: Annotated[float, msgspec.Meta(ge=-1e11, le=1e11)]
    unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]

    @classmethod
    def start(cls) -> "Clock":
        return cls(monotonic_s=time.monotonic(), unix_s=time.time())

    def resumed(self) -> "Clock":
        """The same clock; after another boot, or a suspended host, its zero as this monotonic clock reads it."""
        zero_s = time.monotonic() - (time.time() - self.unix_s)
        return self if abs(zero_s - self.monotonic_s) < SAME_BOOT_S else Clock(zero_s, self.unix_s)

    def now(self) -> float:
        return time.monotonic() - self.monotonic_s

    def of_monotonic(self, monotonic_s: float) -> float:
        """A `time.monotonic()` reading of any process of this host, on the run's clock."""
        return monotonic_s - self.monotonic_s


class RequestError(msgspec.Struct, frozen=True):
    """Why a request failed: `kind` is a short class (refused, reset, timeout, http_503, ...), `message` one line."""

    kind: str
    message: str


class Canary(msgspec.Struct, kw_only=True):
    """A measured request whose greedy answer was compared with a reference's: "equal", "near-tie" (equal but for choices between tokens
    that nearly tie), "undecided" (nobody says how likely tokens were), "wrong", or None, not judged.

    `number` counts those of its trial. After `equal_tokens` came the first difference that counts; there the reference's token is
    `gap_nats` more probable to it (None: unknown). `repeated`: the server may have had the prompt in a cache.
    """

    number: int
    token_ids: list[int] = []
    verdict: str | None = None
    equal_tokens: int | None = None
    gap_nats: float | None = None
    repeated: bool = False


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request as the client saw it; durations are derived from these instants in `analysis`.

    `planned_s` is when the schedule wanted it sent, `due_s` when a free stream allowed it, `sent_s` when it was sent. `token_s` has one instant per token,
    those of one chunk share theirs; counted by "chunks", it has one per chunk, and `output_tokens` the tokens (None: nobody knows). `phases` maps a
    phase's name to [start_s, end_s] or None when it was not measured. `stamp` says which clock the arrivals carry: "kernel" or "user"; `counted_by` how
    tokens were counted: "token_ids", "logprobs", "usage" (on every chunk), "chunks" (one per chunk with something in it) or "mixed". `first_tokens` came
    with the first chunk; `later_tokens` holds the fewest and the most that came after it where nobody knows (empty: the instants tell all that is known).
    `token_choice` is the choice of every token where there were several. `answer_index` is the place in `token_s` of the first token that is no
    reasoning, None where none came; `unsent_tokens` of `output_tokens` were not sent: reasoning, the end of the text, other choices (None: nobody knows). `cached_prompt_tokens` is how many of `prompt_tokens` the server says that it took from a cache; others begin with the same `shared_prompt_tokens` on purpose.
    `notes` name what was odd about the counts or the stream. `prompt` is None where it was too long to be saved; `prompt_sha256` is of its UTF-8 bytes.
    """

    id: str
    planned_s: RunInstant
    due_s: RunInstant | None = None
    sent_s: RunInstant | None = None
    token_s: list[RunInstant] = []
    end_s: RunInstant | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    shared_prompt_tokens: int = 0
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    unsent_tokens: int | None = 0
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
    later_tokens: list[int] = []
    token_choice: list[int] = []
    notes: list[str] = []
    canary: Canary | None = None

    @property
    def coarse(self) -> bool:
        """Were more tokens sent than there are instants, so that gaps between these are none between tokens?"""
        if self.output_tokens is None:
            return self.counted_by in ("chunks", "mixed")
        sent = self.output_tokens - (self.unsent_tokens or 0)
        return self.counted_by is not None and sent - len(self.token_s) > max(1, COARSE_SHARE * sent)


class DeviceSample(msgspec.Struct, kw_only=True):
    """One reading of one device; None where it was not measured. `t_s` is the middle of the read, `read_s` its duration.

    `power_w` is instant, `power_average_w` the device's own mean over about 1 s; a superchip's module and memory have powers of
    their own. `power_limit_w` is the limit that is enforced. `cpu_utilization_pct`: 100 is one core busy.
    """

    t_s: float
    read_s: Reading | None = None
    power_w: Power | None = None
    power_average_w: Power | None = None
    energy_j: Energy | None = None
    sm_clock_mhz: Reading | None = None
    memory_clock_mhz: Reading | None = None
    gpu_utilization_pct: Reading | None = None
    memory_utilization_pct: Reading | None = None
    temperature_c: Reading | None = None
    memory_used_mib: Reading | None = None
    throttle: list[str] | None = None
    power_limit_w: Power | None = None
    cpu_utilization_pct: Reading | None = None
    cpu_clock_mhz: Reading | None = None
    module_power_w: Power | None = None
    memory_power_w: Power | None = None


class DeviceRecord(msgspec.Struct, kw_only=True):
    """One device over a run. `kind` is gpu, process (CPU use of a role's processes), cpu or dram (RAPL).

    `fine_power` holds the driver's own buffer as (t_s, power_w), finer than the samples; `energy_ticks` the energy counter as (t_s,
    energy_j), each at the instant the counter moved. `not_measured` maps a field to the reason; `sampling` reports the achieved interval
    (docs/power.md); `statistics` maps a field to its avg (of a power: energy over time), min and max over all samples, idle and
    warm-up included; `idle_utilization_pct` a kind of idle power to the GPU's mean utilisation meanwhile. `settings`: of a GPU."""

    id: str
    kind: str
    name: str
    role: str | None = None
    host: str | None = None
    index: int | None = None
    samples: list[DeviceSample] = []
    fine_power: list[tuple[float, Power]] = []
    energy_ticks: list[tuple[float, Energy]] = []
    not_measured: dict[str, str] = {}
    sampling: dict[str, float | None] = {}
    statistics: dict[str, dict[str, float | None]] = {}
    idle_power_w: dict[str, Power | None] = {}
    idle_utilization_pct: dict[str, Reading | None] = {}
    default_power_limit_w: Power | None = None
    settings: dict[str, bool | Reading] = {}

    @property
    def label(self) -> str:
        """Its id, with its host where a run has several: every host counts its GPUs from 0."""
        return self.id if self.host is None else f"{self.host}/{self.id}"


class Trial(msgspec.Struct, kw_only=True):
    """One repetition: its measured window on the run's clock, ramp-up and drain left out, and the client's check of itself. `start` counts the
    server starts of its run: trials with the same number were measured on the same servers; None where it was not recorded.
    `start_temperature_c` maps a GPU to its temperature before the first request, `prefix_cache` an instance to its own counts.
    `cpu_steal_pct` is the share of this host's cores that its hypervisor took during the load."""

    index: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    start: int | None = None
    start_s: RunInstant
    end_s: RunInstant
    client: dict[str, Any] = {}
    start_temperature_c: dict[str, float] = {}
    prefix_cache: dict[str, PrefixCacheCounts] = {}
    cpu_steal_pct: float | None = None


class Gate(msgspec.Struct, kw_only=True):
    """The correctness gate: were outputs equal to the reference's, and did decode get all its KV? `canaries`: verdict -> how many."""

    passed: bool
    prompts: int
    equal_outputs: int | None
    prompt_tokens: int | None
    external_kv_tokens: int | None
    detail: str
    canaries: dict[str, int] = {}


class Run(msgspec.Struct, kw_only=True):
    """A deployment under one load: all of its trials, requests and devices. `config` is all options as used.

    `name` is the deployment (single, disaggregated, replicas, ...). `roles` maps a role to its devices' labels, `engines` a server to its limits.
    `events` are the proxy's and connector's own instants, joined to requests by id, `servers` what each counted. `run_id`, `revision` (which saving of the
    run it is) and `device_files` say what belongs together in a folder; runs saved before they existed have no id.
    """

    schema: str = SCHEMA
    run_id: RunId | None = None
    revision: Revision = 0
    device_files: list[str] = []
    name: str
    clock: Clock
    config: dict[str, Any]
    host: dict[str, Any]
    versions: dict[str, str | None]
    roles: dict[str, list[str]] = {}
    engines: dict[str, EngineFacts] = {}
    trials: list[Trial] = []
    requests: list[RequestRecord] = []
    summary: dict[str, Any] = {}
    gate: Gate | None = None
    flags: list[Flag] = []
    events: list[Event] = []
    servers: list[ServerSeries] = []
    devices: list[DeviceRecord] = []


class _DeviceFile(msgspec.Struct, kw_only=True):
    schema: str = SCHEMA
    run_id: RunId | None = None
    revision: Revision = 0
    role: str
    devices: list[DeviceRecord]


def save_run(run: Run, folder: Path) -> Path:
    """Write `NAME_results.json` and one `ROLE_gpu_data.json` per role into `folder`, all or nothing; returns the results file. Raises UserError
    when it cannot be written, or when a name is none for a file."""
    run.run_id = run.run_id or secrets.token_hex(4)
    run.revision += 1
    by_role: dict[str, list[DeviceRecord]] = {}
    for device in sorted(run.devices, key=lambda device: device.role or "host"):
        by_role.setdefault(files.check_name(device.role or "host", "the role of a device"), []).append(device)
    contents = {f"{role}_gpu_data.json": _encode_devices(role, of_role, run) for role, of_role in by_role.items()}
    run.device_files = list(contents)
    name = f"{files.check_name(run.name, 'the name of the run')}_results.json"
    files.swap_in(folder, f"{run.run_id}-{run.revision}", (name, _encode(run)), contents)
    return folder / name


def save_devices(path: Path, role: str, devices: list[DeviceRecord]) -> None:
    """Write devices into one file of no run, so that `load_devices` and `pdbench plot` read them."""
    files.write_whole(path, _encode_devices(role, devices))


def load_devices(path: Path) -> list[DeviceRecord]:
    """The devices of one `*_gpu_data.json`. Raises UserError when pdbench did not write it."""
    return _read_devices(path)[0].devices


def load_run(folder: Path | str) -> Run:
    """The run saved in `folder`, its devices included. Raises UserError with the remedy when pdbench did not write it, or when
    its files are of different runs."""
    folder = Path(folder)
    for attempt in range(5):
        path = _results_file(folder)
        before = files.identity(path)
        try:
            return _load(folder, path)
        except UserError as error:
            # Another process may have swapped in a run between our reading of two files.
            if attempt == 4 or (files.identity(path) == before and not isinstance(error.__cause__, FileNotFoundError)):
                raise
    raise AssertionError


def _load(folder: Path, path: Path) -> Run:
    run, is_edited = _read_run(path)
    edited = [path.name] * is_edited
    validation.check_run(run, path)
    in_place = {file.name: file for file in files.device_files(folder)}
    moving, unfinished = files.swapped_in(folder, f"{run.run_id}-{run.revision}")
    for name, file in sorted((in_place | moving).items()):
        part, is_edited = _read_devices(file)
        if (part.run_id, part.revision) == (run.run_id, run.revision if run.run_id else part.revision):
            run.devices += part.devices
            edited += [name] * is_edited
        elif not (unfinished and name not in run.device_files):  # else it is the earlier run's, not removed yet
            raise UserError(
                f"{file} is of {_title(part)} and {path.name} of {_title(run)}: restore the file that belongs to it, or "
                "give each run a folder of its own"
            )
    missing = sorted(set(run.device_files) - in_place.keys() - moving.keys())
    if missing and len(missing) == len(run.device_files):
        detail = f"{', '.join(missing)} of this run are not in its folder: power and energy are not known"
        run.flags.append(Flag("device-files-missing", detail))
    elif missing:
        lacks = f"{', '.join(missing)} of {_title(run)}"
        raise UserError(f"{folder} lacks {lacks}: restore what is missing, or measure again")
    validation.flag_edited(run, edited)
    validation.check_distinct(folder, "device", [(device.id, device.host) for device in run.devices])
    validation.drop_impossible_counters(run)
    return run


def _title(part: "Run | _DeviceFile") -> str:
    return f"run {validation.shown(part.run_id)} (saving {part.revision})" if part.run_id else "a run without an id"


def _results_file(folder: Path) -> Path:
    if folder.is_file():
        raise UserError(f"{folder} is a file: name the results folder that it lies in")
    paths = files.results_files(folder)
    if not paths:
        packed = next(iter(sorted(folder.glob("*_results.json.*"))), None)
        remedy = f"unpack {packed.name}" if packed else f"run `pdbench run` or `pdbench bench --out {folder}` first"
        raise UserError(f"no *_results.json in {folder}: {remedy}")
    if len(paths) > 1 and len(set(map(files.read_whole, paths))) > 1:
        both = " and ".join(f"{path.name} of {_title(_read_run(path)[0])}" for path in paths[:2])
        raise UserError(f"{folder} holds {both}: give each run a folder of its own, with its device files")
    return paths[0]


def _encode_devices(role: str, devices: list[DeviceRecord], run: Run | None = None) -> bytes:
    run_id, revision = (run.run_id, run.revision) if run else (None, 0)
    content = _DeviceFile(run_id=run_id, revision=revision, role=role, devices=devices)
    return documents.encode(content, seal=True)


def _encode(run: Run) -> bytes:
    """The run without its devices: one line per top-level key and per request, so that a person can read and diff it."""
    lines = []
    for key in (name for name in run.__struct_fields__ if name != "devices"):
        value = getattr(run, key)
        if isinstance(value, list) and value and key != "device_files":
            encoded = b"[\n  " + b",\n  ".join(msgspec.json.encode(item) for item in value) + b"\n ]"
        else:
            encoded = msgspec.json.encode(value)
        lines.append(b' "%s": %s' % (key.encode(), encoded))
    return documents.sealed(b"{\n" + b",\n".join(lines) + b"\n}\n")


def _read_run(path: Path) -> tuple[Run, bool]:
    """The run of a results file, unchecked, and whether the file was edited. Raises UserError when pdbench did not write it."""
    saved = files.read_whole(path)
    try:
        run = msgspec.json.decode(saved, type=Run)
        schema: Any = run.schema
    except NOT_JSON as error:
        try:
            schema = msgspec.json.decode(saved, type=dict[str, Any]).get("schema")
        except msgspec.ValidationError:
            schema = None  # whole JSON, but no object
        except NOT_JSON:
            schema = SCHEMA  # half a file
        if schema in READABLE:
            remedy = "measure again, or restore the file"
            raise validation.unreadable(path, saved, error, "does not hold a whole run", remedy) from error
    _check_schema(schema, path)
    validation.check_keys(saved, run, path)
    if schema != SCHEMA:
        # Its keys meant other things; the figures are derived again from the requests.
        run.summary, run.schema = {}, SCHEMA
    return run, documents.is_edited(saved)


def _read_devices(path: Path) -> tuple[_DeviceFile, bool]:
    saved = files.read_whole(path)
    try:
        content = msgspec.json.decode(saved, type=_DeviceFile)
    except NOT_JSON as error:
        remedy = "restore the file, or name a *_gpu_data.json or monitor's own file"
        raise validation.unreadable(path, saved, error, "holds no device samples", remedy) from error
    _check_schema(content.schema, path)
    validation.check_devices(content.devices, path)
    return content, documents.is_edited(saved)


def _check_schema(schema: Any, path: Path) -> None:
    if schema not in READABLE:
        found = validation.shown(str(schema))
        raise UserError(f"{path} has schema {found}, this pdbench reads {SCHEMA}: measure again with this version")
