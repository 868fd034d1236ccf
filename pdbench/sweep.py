"""Many runs in one command: every combination of the varied options, a folder a point, resumed where it stopped.

Try: pdbench sweep recipes/cpu-1p1d.toml --vary concurrency=1,2,4,8 --against single --out sweep
"""

import dataclasses
import itertools
import json
import shutil
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from pdbench.config import Options
from pdbench.errors import UserError
from pdbench.records import check_writable, write_whole

_DONE = "point.json"
Measure = Callable[[Options, Path], list[Path]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination: the varied options with their values, in the order given, and all options together."""

    varied: dict[str, Any]
    options: Options

    @property
    def name(self) -> str:
        """Its folder's name, as in concurrency=4,output_tokens=128."""
        return ",".join(f"{key}={_in_a_name(value)}" for key, value in self.varied.items())


def points(options: Options, vary: Sequence[str]) -> list[Point]:
    """Every combination of `vary` (KEY=V1,V2,... each, an option of any section); the first key changes slowest.

    A tuple's values are joined by +, as in prefill_gpus=0,0+1. Raises UserError naming the key or value that is wrong.
    """
    if not vary:
        raise UserError("a sweep needs --vary KEY=V1,V2,... as in --vary concurrency=1,2,4,8")
    axes: list[tuple[str, list[Any]]] = []
    for text in vary:
        key, equals, values = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not values or key in (name for name, _ in axes):
            raise UserError(f"--vary {text}: give each KEY=V1,V2,... once")
        axes.append((key, [_converted(options, key, value.strip()) for value in values.split(",")]))
    made = []
    for combination in itertools.product(*(values for _, values in axes)):
        varied = dict(zip((key for key, _ in axes), combination, strict=True))
        made.append(Point(varied, _replaced(options, varied)))
    return made


def with_slo(options: Options, slo: str) -> Options:
    """Options with the limits of "ttft=200,tbt=50" (milliseconds), for the goodput. Raises UserError for anything else."""
    limits = {}
    for part in slo.split(",") if slo else ():
        name, _, number = part.partition("=")
        try:
            limits[{"ttft": "slo_ttft_ms", "tbt": "slo_tbt_ms"}[name.strip()]] = float(number)
        except (KeyError, ValueError):
            raise UserError(f"--slo: {part!r} is not ttft=MS or tbt=MS, as in --slo ttft=200,tbt=50") from None
    return _replaced(options, limits)


def run(
    made: Sequence[Point], out: Path, measure: Measure, console: Console, what: Mapping[str, Any] | None = None
) -> Iterator[tuple[dict[str, Any], list[Path]]]:
    """Measure the points that are not yet in `out`; yields every point's varied options and its results folders.

    `measure(options, folder)` measures one point and returns its results folders; `what` it measures beside the options (the
    deployments, say) must be the same for a point to count as measured. A point that fails is told and left out; the
    others go on. Raises UserError when none succeeded.
    """
    check_writable(out)
    spent_s: list[float] = []
    failed = 0
    beside: dict[str, Any] = json.loads(json.dumps(what or {}))  # as it is read back: tuples are lists
    left = sum(_folders_of(point, beside, out / point.name) is None for point in made)
    for number, point in enumerate(made, 1):
        folder = out / point.name
        folders = _folders_of(point, beside, folder)
        place = f"[bold]point {number} of {len(made)}[/bold] {point.name}"
        if folders is not None:
            console.print(f"{place}: already measured", highlight=False)
            yield point.varied, folders
            continue
        remaining = f", about {_in_words(sum(spent_s) / len(spent_s) * left)} left" if spent_s else ""
        console.print(f"{place}{remaining}", highlight=False)
        left -= 1
        begin_s = time.monotonic()
        try:
            folders = _measured(point, beside, folder, measure)
        except UserError as error:
            failed += 1
            console.print(f"  [red]failed[/red]: {escape(str(error))}", highlight=False)
            continue
        spent_s.append(time.monotonic() - begin_s)
        yield point.varied, folders
    if failed == len(made):
        raise UserError(f"every point of the sweep failed: read the lines above; what was saved lies in {out}")


def _measured(point: Point, what: dict[str, Any], folder: Path, measure: Measure) -> list[Path]:
    if folder.exists():
        # An unfinished or older measurement: its files must not be taken for this one's.
        shutil.rmtree(folder)
    folders = measure(point.options, folder)
    names = [str(one.relative_to(folder)) for one in folders]
    write_whole(
        folder / _DONE, json.dumps({"what": what, "options": _plain(point), "results": names}, indent=1).encode()
    )
    return folders


def _folders_of(point: Point, what: dict[str, Any], folder: Path) -> list[Path] | None:
    """The results of a point that was measured whole, the same with the same options, else None."""
    try:
        done = json.loads((folder / _DONE).read_bytes())
        same = done["what"] == what and done["options"] == _plain(point)
        return [folder / name for name in done["results"]] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(point: Point) -> Any:
    return json.loads(json.dumps(point.options.plain()))


def _section_of(options: Options, key: str) -> str:
    for section in dataclasses.fields(options):
        if key in (option.name for option in dataclasses.fields(getattr(options, section.name))):
            return section.name
    raise UserError(f"--vary {key}: no such option; `pdbench run --help` lists them all")


def _converted(options: Options, key: str, text: str) -> Any:
    """A value as its option's type asks: numbers, words, true/false, none, tuples joined by +."""
    kind = typing.get_type_hints(type(getattr(options, _section_of(options, key))))[key]
    plain: Any = text
    if text.lower() == "none":
        plain = None
    elif typing.get_origin(kind) is tuple:
        plain = text.split("+")
    elif kind is bool or bool in typing.get_args(kind):
        plain = text.lower()
    try:
        return msgspec.convert(plain, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"--vary {key}: {text!r} does not fit: {error}") from None


def _replaced(options: Options, varied: dict[str, Any]) -> Options:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in varied.items():
        sections.setdefault(_section_of(options, key), {})[key] = value
    changed = {name: dataclasses.replace(getattr(options, name), **values) for name, values in sections.items()}
    return dataclasses.replace(options, **changed)


def _in_a_name(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._-+" else "_" for letter in text) or "none"


def _in_words(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
