"""Many runs in one command: every combination of the varied options, one folder per point, resumed where it stopped."""

import dataclasses
import functools
import hashlib
import itertools
import json
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cyclopts
from rich.console import Console
from rich.markup import escape

from pdbench import documents, identity
from pdbench.config import Options, ServerConfig, flag_of, slo_limits
from pdbench.errors import NOT_JSON, OptionError, StartError, UserError, WriteError, span
from pdbench.files import begin_again, check_name, check_writable, holds, results_files, run_ids, write_whole
from pdbench.live import publisher
from pdbench.load.contents import contents_of
from pdbench.serving import machine

_SWEEP = "sweep.json"
_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination: the varied options with their values, in the order given, and all options together."""

    varied: Mapping[str, Any]
    options: Options

    @property
    def name(self) -> str:
        """Its folder's name, as in concurrency=4,output_tokens=128; the end of a long one is its hash."""
        name = ",".join(f"{key}={_folder_word(value)}" for key, value in self.varied.items())
        if len(name) <= _LONGEST_NAME:
            return name
        return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(repr(self.varied).encode()).hexdigest()[:8]}"


def points(options: Options, vary: Sequence[str], option: str = "--vary") -> list[Point]:
    """Every combination of `vary` (KEY=V1,V2,... each, an option of any section); the first key changes slowest.

    A tuple's values are joined by +, as in prefill_gpus=0,0+1. Raises UserError naming the key or value that is wrong.
    """
    if not vary:
        raise OptionError("a sweep needs --vary KEY=V1,V2,... as in --vary concurrency=1,2,4,8")
    axes: dict[str, list[str]] = {}
    for text in vary:
        key, equals, values = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not values or key in axes:
            raise OptionError(f"{option} {text}: give each KEY=V1,V2,... once")
        axes[key] = [value.strip() for value in values.split(",")]
    combinations = itertools.product(*axes.values())
    made = [_point(options, dict(zip(axes, combination, strict=True)), option) for combination in combinations]
    names = [point.name for point in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(
            f"{option}: two points are {twice}: give each value once, values whose folders have different names"
        )
    return made


def with_slo(options: Options, slo: str) -> Options:
    """Options with the limits of `slo_limits`, for the goodput. Raises UserError as it does, and where an option has another limit already."""
    limits = {name: part.partition("=")[2].strip() for name, part in slo_limits(slo).items()}
    limited = _point(options, limits, "--slo").options
    for name in limits:
        before, now = getattr(options.load, name), getattr(limited.load, name)
        if before not in (None, now):
            raise UserError(f"--slo {slo}: {flag_of(name)} {before:g} says otherwise: give one of them")
    return limited


def check_running(points: Sequence[Point], against: str | None) -> None:
    """Raises UserError where deployments are named, or points differ in how servers are started: neither changes one that runs already."""
    if against:
        raise UserError(
            f"--against {against}: these would be started, and --url names a server that runs: give one of the two"
        )
    ours = {field.name for field in dataclasses.fields(ServerConfig)}
    fixed = [name for name in points[0].varied if name not in ours and hasattr(points[0].options.serve, name)]
    if fixed:
        raise UserError(
            f"--vary {fixed[0]}: it changes nothing of the server that runs at --url: leave one of the two out"
        )


def _point(options: Options, texts: Mapping[str, str], option: str = "--vary") -> Point:
    """`options` with some of them replaced."""
    varied: dict[str, Any] = {}
    for key, text in texts.items():
        section, varied[key] = _parsed(key, text, option)
        changed = dataclasses.replace(getattr(options, section), **{key: varied[key]})
        options = dataclasses.replace(options, **{section: changed})
    return Point(varied, options)


@functools.cache
def _parsed(key: str, text: str, option: str) -> tuple[str, Any]:
    """(section, value) of an option; the command line's own parser reads the text and checks its range, which takes a tenth of a second."""
    sections = [field.name for field in dataclasses.fields(Options) if hasattr(getattr(_DEFAULTS, field.name), key)]
    if not sections:
        raise OptionError(f"{option} {key}: no such option; `pdbench run --help` lists them all")
    section = sections[0]
    default = getattr(getattr(_DEFAULTS, section), key)
    if text.lower() == "none" and default is None:
        return section, None
    parts = text.split("+") if isinstance(default, tuple) else [text]
    arguments = [f"{flag_of(key)}={part}" for part in parts]
    try:
        parsed = _parser(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        raise OptionError(f"{option} {key}: {text!r} does not fit: {str(error).strip()}") from None
    return section, getattr(getattr(parsed, section), key)


_DEFAULTS = Options()
_parser = cyclopts.App()


@_parser.default
def _options(*, options: Options = _DEFAULTS) -> Options:
    return options


def run(
    points: Sequence[Point],
    out: Path,
    measure: Callable[[Options, Path, str], list[Path]],
    console: Console,
    context: Mapping[str, Any] | None = None,
    parts: Sequence[str] = ("",),
    models: Mapping[str | None, str] | None = None,
) -> Iterator[tuple[Mapping[str, Any], list[Path]]]:
    """Measure the points that are not yet in `out`; yields every point's varied options and results folders, as they are measured.

    `measure(options, folder, part)` measures one of `parts` of a point (a deployment, or "" for the point as a whole) and returns its
    results folders. Each part goes through all points with the same options of serving before the next does, so that servers need few
    starts; servers that did not start for one point are not started for its others. `context` is what is measured beside the options, as
    the deployments; `models` what a server that runs offers, by the option --model. What fails is reported and left out; the others go on.
    Raises UserError at the end when something failed, and before anything is measured when `out` has a point of another context, of
    other options, of another model or input file, or of another host, other GPUs or other versions.

    All points have one nonce, also when the sweep is resumed. Where points share a server, whose cache knows what was sent ("url" in
    `context`, or parts), a point's nonce is this one with the point's name, and another draw for a point of a "url" that is
    measured again.
    """
    check_writable(out)
    nonce, context = _nonce(points, out), context or {}
    points = [Point(point.varied, _set_nonce(point.options, point.options.load.nonce or nonce)) for point in points]
    groups: dict[Any, list[Point]] = {}
    for point in points:
        groups.setdefault(point.options.serve, []).append(point)
    steps = [(point, part) for group in groups.values() for part in parts for point in group]
    # What a point.json must say for its point to count.
    fixed = {"context": context, "machine": machine.own_identity()}
    wanted = [
        documents.as_read_back(
            fixed | {"options": point.options.plain(), "measured": measured_of(point.options, models)}
        )
        for point, _ in steps
    ]
    results = [_results(out / point.name, keys, part) for (point, part), keys in zip(steps, wanted, strict=True)]
    write_whole(out / _SWEEP, json.dumps({"nonce": nonce}).encode())
    spent_s: list[float] = []
    never_started: list[Any] = []
    failed, left = 0, results.count(None)
    for number, ((point, part), keys, folders) in enumerate(zip(steps, wanted, results, strict=True), 1):
        folder = out / point.name
        place = f"[bold]point {number} of {len(steps)}[/bold] {f'{part}, ' if part else ''}{point.name}"
        if folders is not None:
            console.print(f"{place}: already measured")
            yield point.varied, folders
            continue
        remaining = f", about {span(round(statistics.mean(spent_s) * left))} left" if spent_s else ""
        console.print(f"{place}{remaining}")
        publisher.stage("point {0} of {1}: {2}", number, len(steps), ", ".join(filter(None, (part, point.name))))
        if spent_s:
            publisher.put(publisher.TimeLeft(statistics.mean(spent_s) * left))
        left -= 1
        if (point.options.serve, part) in never_started:
            failed += 1
            console.print("  [red]left out[/red]: its servers did not start for an earlier point")
            continue
        begin_s = time.monotonic()
        options = point.options
        if part or context.get("url"):
            again = f"/{secrets.token_hex(4)}" if folder.exists() and not part else ""
            options = _set_nonce(options, f"{options.load.nonce}/{point.name}{again}")
        try:
            # An unfinished measurement's files must not be taken for this one's; the folder says that the point's prompts may have been sent.
            begin_again(folder, folder / f"{part}_results" if part else folder)
            folders = measure(options, folder, part)
            done = keys | {"varied": point.varied, "results": [str(path.relative_to(folder)) for path in folders]}
            done["runs"] = [run_ids(path) for path in folders]
            write_whole(folder / _done(part), json.dumps(done, indent=1).encode())
        except WriteError:  # the next point's would be lost, too
            raise
        except UserError as error:
            failed += 1
            if not context.get("url"):  # nothing was sent to a server that stays
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, StartError):
                never_started.append((point.options.serve, part))
            console.print(f"  [red]failed[/red]: {escape(str(error))}")
            publisher.stage(str(error), is_problem=True)
            continue
        spent_s.append(time.monotonic() - begin_s)
        yield point.varied, folders
    if failed:
        count = "every point" if failed == len(steps) else f"{failed} of {len(steps)} points"
        raise UserError(
            f"{count} of the sweep failed: read the lines above; what was saved lies in {out}, the same command tries again"
        )


def measured_of(options: Options, models: Mapping[str | None, str] | None) -> dict[str, Any]:
    """What a point's options do not say of what it measures; compared by `identity.changed`."""
    return {"model": (models or {}).get(options.serve.model), "contents": contents_of(options.load)}


def _done(part: str) -> str:
    return f"point-{part}.json" if part else "point.json"


def saved(out: Path) -> str:
    """What a sweep that was interrupted leaves in `out`, for its last line; empty when that is nothing."""
    done = len([*out.glob("*/point*.json")])
    words = "point is" if done == 1 else "points are"
    whole = f"{done} {words} saved in {out}, the same command resumes the sweep" if done else ""
    return "; ".join(filter(None, (whole, cut_short(out))))


def cut_short(out: Path, pattern: str = "*/*_results") -> str:
    """Which results in `out` belong to no point that was measured whole, in words; empty when there are none."""
    folders = []
    for folder in sorted(out.glob(pattern)):
        parts = "", folder.name.removesuffix("_results")
        if results_files(folder) and not any((folder.parent / _done(part)).exists() for part in parts):
            folders.append(str(folder))
    words = (
        f"{', '.join(folders)} {'has' if len(folders) == 1 else 'have'} what was measured of a point that was cut short"
    )
    return f"{words}: `pdbench report` reads it, the same command measures it again" if folders else ""


def is_sweep(folder: Path) -> bool:
    return holds(folder, _SWEEP)


def load(folder: Path) -> list[tuple[Mapping[str, Any], list[Path]]]:
    """The varied options and results folders of a saved sweep's points.

    Raises UserError where there is none, one cannot be read, or its results are another run's.
    """
    found: list[tuple[Mapping[str, Any], list[Path]]] = []
    for path in sorted(folder.glob("*/point*.json")):
        saved = _saved_point(path)
        if saved is None:
            raise UserError(
                f"{path.parent} lacks results of {path.name}, or they cannot be read: restore them, or delete {path}"
            )
        done, results = saved
        found.append((done.get("varied") or _varied(path.parent), results))
    if not found:
        words = f"{folder} is a sweep of which no point was measured whole: repeat its command"
        raise UserError("; ".join(filter(None, (words, cut_short(folder)))))
    return found


def _varied(folder: Path) -> dict[str, Any]:
    """From the name of a point's folder, for points saved before they said it."""
    if len(folder.name) > _LONGEST_NAME:
        raise UserError(f"{folder}: this point was saved before points named their options: report its results folders")
    texts = (pair.partition("=") for pair in folder.name.split(","))
    return {key: _parsed(key, value, "--vary")[1] for key, _equals, value in texts}


def _nonce(points: Sequence[Point], out: Path) -> str:
    """The nonce of the sweep in `out`: the given one, else that with which it began."""
    given = [point.options.load.nonce for point in points if point.options.load.nonce]
    with suppress(OSError, *NOT_JSON, KeyError, TypeError):
        given.append(str(json.loads((out / _SWEEP).read_bytes())["nonce"]))
    return str(next(filter(None, given), secrets.token_hex(4)))


def _set_nonce(options: Options, nonce: str) -> Options:
    return dataclasses.replace(options, load=dataclasses.replace(options.load, nonce=nonce))


def _results(folder: Path, keys: dict[str, Any], part: str) -> list[Path] | None:
    """The results of a point that was measured whole, None where it was not. Raises UserError for one that was measured otherwise."""
    found = _saved_point(folder / _done(part))
    if found is None:
        return None
    done, folders = found
    done.setdefault("machine", keys["machine"])  # before it was recorded
    before, now = done.get("measured") or {}, keys["measured"]
    done["measured"] = now  # it is compared below
    if differs := differences({key: done.get(key) for key in keys}, keys):
        raise UserError(
            f"{folder} was measured with other options or on another machine ({differs}): repeat its command there, give another --out, or delete {folder}"
        )
    if other := identity.changed(before, now):
        raise UserError(f"{folder} {other}, give another --out, or delete {folder}")
    return folders


def _saved_point(path: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """What a point's file says and its results folders; None where either cannot be read. Raises UserError where they hold other runs."""
    try:
        done = json.loads(path.read_bytes())
        folders = [path.parent / check_name(name, "a results folder") for name in done["results"]]
        if not all(map(results_files, folders)):
            return None
        runs = [run_ids(folder) for folder in folders]
        is_other = done.get("runs", runs) != runs
    except (OSError, *NOT_JSON, KeyError, TypeError, UserError):
        return None
    if is_other:
        raise UserError(
            f"{path.parent} holds another run than was measured there: put its own back, or delete {path.parent}"
        )
    return done, folders


def differences(before: Any, now: Any) -> str:
    """The options that are not the same, each with both values, of two nested documents as JSON has them; empty where all are."""
    before, now = _flat(before), _flat(now)
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    before, now = ({key: "none" if side.get(key) is None else side[key] for key in keys} for side in (before, now))
    # Once where it stands in several places, as an SLO in the load and in the answer.
    named = [*dict.fromkeys(f"{key.rpartition('.')[2]} {before[key]} instead of {now[key]}" for key in keys)]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if named[3:] else "")


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Every value by its path, as in .options.load.rate."""
    if not isinstance(values, (dict, list)):
        return {path: values}
    members = values.items() if isinstance(values, dict) else enumerate(values)
    return {key: value for name, member in members for key, value in _flat(member, f"{path}.{name}").items()}


def _folder_word(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._-+" else "_" for letter in text) or "none"
