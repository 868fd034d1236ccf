"""Is what a results folder holds possible? Files may be damaged, edited, or somebody else's."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from pdbench import files
from pdbench.config import LoadConfig, PowerConfig
from pdbench.errors import NOT_JSON, UserError
from pdbench.events import Flag, ServerSeries

if TYPE_CHECKING:
    from pdbench.records import DeviceRecord, RequestRecord, Run, Trial

EARLIEST_S, LATEST_S, BACKWARDS_S = -0.1, 1e8, 1e-3
"""Instants of a run lie between these (seconds of its clock); two of them are in order but for BACKWARDS_S, which instants of several clocks may be off by."""
EARLIEST_DEVICE_S = -3600.0
"""A driver's buffer of power readings reaches back."""
MOST_TOKENS = 2**24
"""No model has a context this long."""
RunId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{4,64}\Z")]
Revision = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
RunInstant = Annotated[float, msgspec.Meta(ge=EARLIEST_S, le=LATEST_S)]
Power = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Energy = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Reading = Annotated[float, msgspec.Meta(ge=-1e3, le=1e9)]
"""What records hold, in bounds that msgspec checks as it reads them."""
_COUNTS = (
    "prompt_tokens", "cached_prompt_tokens", "output_tokens", "reasoning_tokens", "unsent_tokens", "shared_prompt_tokens",
)  # fmt: skip
"""Of a request, as servers gave them."""


_NAMED = {
    "devices": ("device", "id"),
    "requests": ("request", "id"),
    "trials": ("trial", "index"),
    "servers": ("server", "server"),
}
"""Lists of a file -> what an entry is, and the field that names it."""
_KINDS = {"float": "number", "int": "whole number", "str": "text", "bool": "true or false", "array": "list"}


class _Gpu(msgspec.Struct):
    """Of the facts about a host: what must be known of each of its GPUs."""

    name: str


def unreadable(path: Path, saved: bytes, error: Exception, holds: str, remedy: str) -> UserError:
    """Why a file could not be decoded: the value that cannot be and whose it is; of what is no such file, that it `holds` none."""
    try:
        where, what = problem(msgspec.json.decode(saved), error)
    except NOT_JSON:
        where, what = "", ""
    return _wrong(path, where, what) if where else UserError(f"{path} {holds} ({error}): {remedy}")


def problem(content: Any, error: Exception) -> tuple[str, str]:
    """Where in `content` msgspec found what it refuses (empty: as a whole), and what is wrong there."""
    message, _, at = str(error).partition(" - at `")
    owner, where = "", ""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", at.partition("[...]")[0]):
        content = content[name] if name else content[int(index)]
        if index and where in _NAMED and isinstance(content, dict):
            kind, key = _NAMED[where]
            owner, where = f"{kind} {shown(str(content.get(key, index)))}", ""
        else:
            where += f"[{index}]" if index else f".{name}" if where else name
    value = (
        "a value there"
        if "[...]" in at or isinstance(content, dict | list)
        else shown(msgspec.json.encode(content).decode())
    )
    if match := re.fullmatch(r"Expected `.+?` ([<>])= (\S+)", message):
        message = f"{value} cannot be, it is {'at least' if match[1] == '>' else 'at most'} {float(match[2]):g}"
    elif match := re.fullmatch(r"Expected `(\w+).*`, got `\w+`", message):
        message = f"{value} is no {_KINDS.get(match[1], match[1])}"
    elif match := re.fullmatch(r"Object missing required field `(\w+)`", message):
        message = f"{match[1]} is missing"
    else:
        message = f"{value} cannot be ({message})"
    return ": ".join(filter(None, (owner, where))), message


def check_keys(saved: bytes, run: "Run", path: Path) -> None:
    """Raises UserError for requests without token_s, which decoding takes for requests that got no token."""
    # In a string its quotes would be escaped.
    if saved.count(b'"token_s":') < len(run.requests) > len(re.findall(rb'"token_s"\s*:', saved)):
        lost = next((request.id for request in run.requests if not request.token_s), "")
        raise _wrong(path, f"request {shown(lost)}", "token_s is missing")


def check_run(run: "Run", path: Path) -> None:
    """Raises UserError for what cannot be; what servers may have sent (counts, phases) is dropped, and the run flagged."""
    files.check_name(run.name, f"{path}: name")
    for role in run.roles:
        files.check_name(role, f"{path}: a role")
    for name in run.device_files:
        files.check_name(name, f"{path}: a name in device_files")
    _check_config(run, path)
    _check_trials(run.trials, path)
    _check_requests(run.requests, {trial.index for trial in run.trials}, path)
    _check_servers(run.servers, path)
    counts = Counter(name for request in run.requests for name in _drop_impossible(request))
    if counts:
        detail = ", ".join(f"{name} of {count} requests" for name, count in counts.items())
        run.flags.append(
            Flag("impossible-values", f"{detail} in {path.name} cannot be (negative, huge, reversed): not used")
        )


def check_devices(devices: Sequence["DeviceRecord"], path: Path) -> None:
    """Raises UserError for device records without a name, or with readings that do not follow each other in time."""
    for device in devices:
        where = f"device {shown(device.label)}"
        for name in ("id", "kind", "role", "host"):
            if (text := getattr(device, name)) is not None:
                _check_words(path, f"{where}: {name}", text)
        _check_order(path, f"{where}: samples", [sample.t_s for sample in device.samples])
        for name in ("fine_power", "energy_ticks"):
            _check_order(path, f"{where}: {name}", [t_s for t_s, _ in getattr(device, name)])


def check_other_runs(runs: Iterable[tuple[str | None, Path]]) -> None:
    """Raises UserError where two of these folders hold one run, by its id; by its folder where it was saved before runs had ids."""
    places: dict[str | Path, Path] = {}
    for run_id, folder in runs:
        key = run_id or folder.resolve()
        if key in places:
            raise UserError(f"{places[key]} and {folder} hold the same run, which would count twice: name it once")
        places[key] = folder


def flag_edited(run: "Run", edited: Sequence[str]) -> None:
    """Flag a run whose files somebody changed: its figures cannot be told from measured ones."""
    if edited and "edited" not in {flag.name for flag in run.flags}:
        changed = f"{', '.join(edited)} changed after pdbench wrote it: figures are of what it holds now, not of what was measured"
        run.flags.append(Flag("edited", changed))


def drop_impossible_counters(run: "Run") -> None:
    """A counter that was reset begins again; one that falls and leaps back counted nothing: the power curve tells the energy,
    and the run is flagged."""
    for device in run.devices:
        for readings in (
            [energy_j for _, energy_j in device.energy_ticks],
            [sample.energy_j for sample in device.samples if sample.energy_j is not None],
        ):
            steps_j = [after - before for before, after in pairwise(readings)]
            fall_j = -min(steps_j, default=0.0)
            if fall_j > 0 and max(steps_j[steps_j.index(-fall_j) :]) > fall_j / 2:
                device.energy_ticks = []
                for sample in device.samples:
                    sample.energy_j = None
                detail = f"{device.label}: the energy counter falls by {fall_j:g} J and leaps back: not used"
                run.flags.append(Flag("energy-counter-impossible", detail))
                break


def _check_config(run: "Run", path: Path) -> None:
    """The options and facts that figures and pages read have the types that pdbench gives them."""
    kinds: dict[str, Any] = {
        "load": LoadConfig,
        "power": PowerConfig,
        "serve": dict,
        "inputs": list[str],
        "clocks_held": list[dict],
        "contents": dict[str, str],
        "gpus": Annotated[int, msgspec.Meta(ge=1, le=10**6)],
    }
    facts = [(f"config.{name}", run.config.get(name), kind) for name, kind in kinds.items()]
    for name, value, kind in [*facts, ("host.gpus", run.host.get("gpus"), list[_Gpu])]:
        try:
            msgspec.convert(value, kind | None)
        except msgspec.ValidationError as error:
            where, what = problem(value, error)
            raise _wrong(path, f"{name}: {where}" if where else name, what) from None
    for section in ("load", "power", "serve"):
        for key, value in (run.config.get(section) or {}).items():
            if isinstance(value, float) and not abs(value) <= 1e15:
                raise _wrong(path, f"config.{section}.{key}", f"{value:g} is no value of this option")


def _check_trials(trials: Sequence["Trial"], path: Path) -> None:
    for trial in trials:
        if trial.end_s < trial.start_s:
            why = f"its end_s {trial.end_s:g} is before its start_s {trial.start_s:g}"
            raise _wrong(path, f"trial {trial.index}", why)
    check_distinct(path, "trial", [(trial.index,) for trial in trials])
    for before, after in pairwise(sorted(trials, key=lambda trial: (trial.start_s, trial.end_s))):
        if after.start_s < before.end_s - BACKWARDS_S:
            raise _wrong(path, f"trials {before.index} and {after.index}", "they overlap")


def _check_servers(servers: Sequence[ServerSeries], path: Path) -> None:
    check_distinct(path, "server", [(series.server,) for series in servers])
    for series in servers:
        where = f"server {shown(series.server)}"
        for name in (series.server, series.role):
            _check_words(path, where, name)
        _check_order(path, f"{where}: t_s", series.t_s)
        _check_order(path, f"{where}: lines", [line.t_s for line in series.lines])
        for key, values in series.values.items():
            if len(values) != len(series.t_s):
                raise _wrong(path, f"{where}: {shown(key)}", "it is not as long as t_s")
        for line in series.lines:
            if not all(text.isprintable() and len(text) <= 1000 for text in (line.flag, line.text, line.meaning)):
                raise _wrong(path, f"{where}: lines", f"{shown(line.text)} is no line of a log")


def _check_requests(requests: Sequence["RequestRecord"], trials: set[int], path: Path) -> None:
    if trials and not requests:
        raise _wrong(path, "requests", f"there are none, and {len(trials)} trials")
    check_distinct(path, "request", [(request.id,) for request in requests])
    foreign = {request.trial for request in requests} - trials
    if foreign:
        request = next(request for request in requests if request.trial in foreign)
        raise _wrong(path, f"request {shown(request.id)}", f"trials has no trial {request.trial}")
    for request in requests:
        if wrong := _what_is_wrong(request):
            raise _wrong(path, f"request {shown(request.id)}", wrong)


def _what_is_wrong(request: "RequestRecord") -> str | None:
    tokens, choices = request.token_s, request.token_choice
    # Sorting what is sorted is much faster than looking at each pair.
    if sorted(tokens) != tokens and any(after < before - BACKWARDS_S for before, after in pairwise(tokens)):
        return "token_s runs backwards"
    if tokens and request.sent_s is None:
        return "it has token_s and no sent_s"
    if not tokens and request.error is None and (request.output_tokens or 0) > 0:
        return f"token_s is empty and output_tokens {request.output_tokens}"
    if request.answer_index is not None and not 0 <= request.answer_index <= len(tokens):
        return f"answer_index {request.answer_index} is no place in token_s"
    if not 0 <= request.first_tokens <= MOST_TOKENS:
        return f"first_tokens {shown(str(request.first_tokens))} is no count of tokens"
    later = request.later_tokens
    if later and not (len(later) == 2 and 0 <= later[0] <= later[1] <= MOST_TOKENS):
        return "later_tokens is no pair of the fewest and the most"
    if choices and len(choices) != len(tokens):
        return "token_choice is not as long as token_s"
    if choices and not 0 <= min(choices) <= max(choices) <= 10**6:
        return "token_choice holds no numbers of choices"
    first_s, last_s = (tokens[0], tokens[-1]) if tokens else (None, None)
    steps = [("sent_s", request.sent_s), ("token_s", first_s), ("token_s", last_s), ("end_s", request.end_s)]
    known = [(name, at_s) for name, at_s in steps if at_s is not None]
    for (earlier, before_s), (name, at_s) in pairwise(known):
        if at_s < before_s - BACKWARDS_S:
            return f"{name} {at_s:g} is before {earlier} {before_s:g}"
    return None


def _drop_impossible(request: "RequestRecord") -> list[str]:
    """Counts and phases come from servers: what cannot be is as if it had not been sent. Returns the fields' names."""
    dropped = []
    for name in _COUNTS:
        count = getattr(request, name)
        if count is not None and not 0 <= count <= MOST_TOKENS:
            setattr(request, name, 0 if name == "shared_prompt_tokens" else None)
            dropped.append(name)
    for name, span in request.phases.items():
        if span is not None and not EARLIEST_DEVICE_S <= span[0] <= span[1] <= LATEST_S:
            request.phases[name] = None
            dropped.append(f"phase {name}")
    return dropped


def _check_order(path: Path, where: str, instants: list[float]) -> None:
    for at_s in instants:
        if not EARLIEST_DEVICE_S <= at_s <= LATEST_S:
            raise _wrong(path, where, f"{at_s:g} s is no time of a run")
    if sorted(instants) != instants:
        raise _wrong(path, where, "they are not in the order of time")


def _check_words(path: Path, where: str, name: str) -> None:
    if not (name.isprintable() and 0 < len(name) <= 200):
        raise _wrong(path, where, f"{shown(name)} is no name")


def check_distinct(path: Path, kind: str, keys: Sequence[tuple[object, ...]]) -> None:
    """Raises UserError when two are the same, whose figures would count twice."""
    if len(set(keys)) < len(keys):
        (twice, *_), _count = Counter(keys).most_common(1)[0]
        raise _wrong(path, f"{kind} {shown(str(twice))}", "it is there twice")


def shown(text: str) -> str:
    """Text from a file in a line of ours: no control characters, not endless."""
    return text if text.isprintable() and 0 < len(text) <= 60 else ascii(text[:60])


def _wrong(path: Path, where: str, what: str) -> UserError:
    return UserError(f"{path}: {where}: {what}: restore the file as pdbench wrote it, or measure again")
