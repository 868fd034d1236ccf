"""Recorded loads: when requests came, how long they were, which blocks their prompts share. Formats are recognised by their keys.

docs/load.md lists the formats with their units. A trace that would replay at a pace which only a wrong unit explains is refused.
"""

import functools
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.errors import UserError
from pdbench.load import input_files
from pdbench.load import trace_fields as keys
from pdbench.load.trace_fields import FORMATS, UNITS, Columns, short, span

_BLOCK_TOKENS = {"Bailian": 16, "Weka": 64}
_MOONCAKE_BLOCK_TOKENS = 512
_BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
_FITTING_SHARE, _LEAST_IDS = 0.95, 8
_MOST_TOKENS = 10**8
# Seconds since 1970 of the years 2001 to 2100: a number in this range is a date, and tells its unit.
_EPOCH_S = (1e9, 4.2e9)
_FAST_PER_S, _FAST_OF_MANY_PER_S, _FAST_WITH_FRACTIONS_PER_S, _MANY = 1000.0, 200.0, 20.0, 20
_SLOW_GAP_S = 300.0


class TraceRow(NamedTuple):
    """One request; `block_ids` name its blocks of `Trace.block_tokens` tokens where the trace tells which are shared."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Trace:
    """The requests in order of arrival, the file's first row at 0. `total` counts those without tokens too, which are left out."""

    name: str
    format: str
    rows: list[TraceRow]
    total: int
    block_tokens: int
    notes: tuple[str, ...] = ()

    def part(self, from_s: float, for_s: float | None) -> "Trace":
        """The rows from an instant on, which becomes 0, and for a time. Raises UserError when there are none."""
        until_s = math.inf if for_s is None else from_s + for_s
        rows = [
            row._replace(arrival_s=row.arrival_s - from_s) for row in self.rows if from_s <= row.arrival_s < until_s
        ]
        if not rows:
            begin, end = span(self.rows[0].arrival_s), span(self.rows[-1].arrival_s)
            wanted = f"--trace-from {span(from_s)}" + ("" if for_s is None else f" --trace-for {span(for_s)}")
            raise UserError(f"{wanted}: {self.name} has no request there; its requests come from {begin} to {end}")
        return replace(self, rows=rows)


class _Record(NamedTuple):
    """A row as read: `at` is in `unit`, or in the trace's unit where that is None."""

    number: int
    at: float
    unit: str | None
    input_tokens: int
    output_tokens: int
    block_ids: tuple[Hashable, ...]


def read_trace(path: Path | str, unit: str | None = None, block_tokens: int | None = None) -> Trace:
    """The requests of a trace file, packed or not; `unit` and `block_tokens` override what its format says.

    Raises UserError that names the file, the row, the key and what would be right.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"--trace {path}: {error.strerror}") from None
    return _read_trace(path, unit, block_tokens, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=2)
def _read_trace(path: Path, unit: str | None, block_tokens: int | None, *_version: int) -> Trace:
    text = input_files.read_text("--trace", path)
    around: dict[str, Any] = {}
    rows: Iterable[tuple[int, Any]]
    if not text.strip():
        rows = ()
    elif input_files.looks_like_json(path, text):
        around, rows = input_files.json_rows("--trace", path, text)
    else:
        columns, rows = input_files.csv_rows("--trace", path, text)
        _check_columns(path, columns)
    reader = _Reader(path, unit, block_tokens, around)
    for number, row in rows:
        reader.take(number, row)
    if not reader.records:
        raise UserError(f"--trace {path} holds no request: {FORMATS}")
    return reader.trace()


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raises UserError, before the first row, when a column that every row needs is not there."""
    present = set(map(keys.plain, columns))
    needed = {
        "arrival time (timestamp, arrival_s)": any(keys.time_unit(key) is not None for key in present),
        "prompt length (input_tokens)": not present.isdisjoint(keys.INPUT),
        "output length (output_tokens)": not present.isdisjoint(keys.OUTPUT),
    }
    if missing := [words for words, is_there in needed.items() if not is_there]:
        names = ", ".join(columns)[:200] or "nothing"
        raise UserError(f"--trace {path}: no column with the {', none with the '.join(missing)} in {names}; {FORMATS}")


class _Reader:
    """Takes the rows of one file and makes them a trace."""

    def __init__(self, path: Path, unit: str | None, block_tokens: int | None, around: dict[str, Any]) -> None:
        self.path, self.unit, self.block_tokens = path, unit, block_tokens
        self.records: list[_Record] = []
        self._formats: Counter[str] = Counter()
        self._sessions = 0
        self._scope: int | None = None
        self._last_of_session: dict[Any, tuple[float, str | None]] = {}
        self._time_kind: str | None = None
        self._take_header(around)

    def take(self, number: int, row: Any) -> None:
        """One row, a header between rows ({"block_size": 64}), or a session with its requests inside (Weka)."""
        if not isinstance(row, dict):
            raise self._error(number, f"not an object with keys, but {short(row)}")
        columns = keys.columns_of(tuple(row))
        fields = dict(zip(columns.names, row.values(), strict=True))
        requests = fields.get("requests")
        if isinstance(requests, list):
            outer = self._scope
            # Weka's ids are of one session unless it says otherwise; a sub-agent's are its session's.
            if outer is None:
                self._sessions += 1
                self._scope = self._sessions if fields.get("hash_id_scope", "local") == "local" else 0
            self._take_header(fields)
            for request in requests:
                self.take(number, request)
            self._scope = outer
        elif columns.is_header:
            self._take_header(fields)
        else:
            self._take_request(number, fields, columns)

    def trace(self) -> Trace:
        form = self._formats.most_common(1)[0][0]
        unit, notes = self._trace_unit(form)
        scaled = [record.at * UNITS[record.unit or unit] for record in self.records]
        zero, exact = min(self.records, key=lambda record: record.at).at, len({r.unit for r in self.records}) == 1
        if exact:  # nanoseconds since 1970 have more digits than a float
            scaled = [(record.at - zero) * UNITS[record.unit or unit] for record in self.records]
        first_s = min(scaled)
        timed = [(at_s - first_s, record) for at_s, record in zip(scaled, self.records, strict=True)]
        if any(earlier[0] > later[0] for earlier, later in itertools.pairwise(timed)):
            timed.sort(key=lambda each: each[0])
            notes.append("rows put in order of time")
        size, block_notes = self._blocks(form)
        rows = [
            TraceRow(
                at_s, record.input_tokens, record.output_tokens, record.block_ids[: -(-record.input_tokens // size)]
            )
            for at_s, record in timed
            if record.input_tokens and record.output_tokens
        ]
        if not rows:
            raise UserError(f"--trace {self.path}: none of its {len(timed)} rows has input and output tokens")
        if self.unit is None:
            self._check_pace(form, [at_s for at_s, _ in timed])
        if self._sessions > 1:
            notes.append(f"{self._sessions} sessions, each from its own time 0")
        if left_out := len(timed) - len(rows):
            notes.append(f"{left_out} rows without tokens left out")
        if copies := len(rows) - len(set(rows)):
            notes.append(f"{copies} rows equal another")
        return Trace(self.path.name, form, rows, len(timed), size, tuple(notes + block_notes))

    def _take_header(self, fields: dict[str, Any]) -> None:
        size = fields.get("block_size", fields.get("trace_block_size"))
        if self.block_tokens is None and type(size) is int and size > 0:
            self.block_tokens = size

    def _take_request(self, number: int, fields: dict[str, Any], columns: Columns) -> None:
        if self.block_tokens is None:
            self._take_header(fields)
        input_tokens = self._length(number, fields, columns.input, keys.INPUT)
        output_tokens = self._length(number, fields, columns.output, keys.OUTPUT)
        self._formats[columns.form] += 1
        at, unit = self._instant(number, fields, columns)
        blocks = next((fields[key] for key in columns.blocks if not keys.blank(fields[key])), ())
        if isinstance(blocks, str):  # in a CSV
            blocks = [word for word in re.split(r"[\s,;\[\]\"']+", blocks) if word]
        if not isinstance(blocks, list | tuple):
            raise self._error(number, f"hash_ids is {short(blocks)}: give a list of block ids")
        if any(isinstance(block, list | dict) or block is None for block in blocks):
            raise self._error(number, f"hash_ids is {short(blocks)}: give numbers or texts as ids")
        ids = tuple((self._scope, block) for block in blocks) if self._scope else tuple(blocks)
        self.records.append(_Record(number, at, unit, input_tokens, output_tokens, ids))

    def _length(self, number: int, fields: dict[str, Any], key: str | None, known: Sequence[str]) -> int:
        if key is None:
            names = ", ".join(fields)[:200]
            texts = "; texts go to --prompt-file" if fields.keys() & keys.TEXTS else ""
            raise self._error(number, f"no {known[1]} ({', '.join(known[:3])}, ...) among {names}{texts}; {FORMATS}")
        value = keys.number(fields[key])
        if value is None or value != int(value) or not 0 <= value <= _MOST_TOKENS:
            raise self._error(number, f"{key} is {short(fields[key])}: give a whole number of tokens, 0 or more")
        return int(value)

    def _instant(self, number: int, fields: dict[str, Any], columns: Columns) -> tuple[float, str | None]:
        """(time, its unit, None for the trace's) of a row; one without a time comes `delay` ms after the session's last one."""
        session = next((repr(fields[key]) for key in columns.sessions if not keys.blank(fields[key])), None)
        at: float
        unit: str | None
        for key, named_unit in columns.times:
            if not keys.blank(fields[key]):
                at, unit = self._time(number, key, fields[key], named_unit)
                break
        else:
            delay = keys.number(fields.get("delay", fields.get("delay_ms")))
            if session is None or session not in self._last_of_session or delay is None or delay < 0:
                names = ", ".join(fields)[:200]
                turns = "" if session is None else ", nor a `delay` (ms) after an earlier turn of its session"
                raise self._error(
                    number, f"no arrival time (timestamp, arrival_s, ...) among {names}{turns}; {FORMATS}"
                )
            before, unit = self._last_of_session[session]
            at = before + delay * UNITS["ms"] / UNITS[unit or self.unit or keys.unit_of(columns.form)]
        if session is not None:
            self._last_of_session[session] = at, unit
        return at, unit

    def _time(self, number: int, key: str, value: Any, unit: str) -> tuple[float, str | None]:
        at, kind = keys.number(value), "number"
        if at is None:
            at, kind = keys.date(value), "date"
        if at is None:
            raise self._error(number, f"{key} is {short(value)}: give a number, or a date as in 2024-05-10 00:00:04.5")
        if self._time_kind not in (None, kind):
            raise self._error(number, f"{key} is {short(value)}: a {kind} where earlier rows have a {self._time_kind}")
        self._time_kind = kind
        return at, "s" if kind == "date" else self.unit or unit or None

    def _trace_unit(self, form: str) -> tuple[str, list[str]]:
        """The unit of times whose key does not name one, and what to say of it."""
        usual = self.unit or keys.unit_of(form)
        unclear = [record.at for record in self.records if record.unit is None]
        for unit, factor in UNITS.items():
            if unclear and all(_EPOCH_S[0] <= at * factor < _EPOCH_S[1] for at in unclear):
                return unit, [f"its times are dates in {unit}"] if unit != usual else []
        return usual, []

    def _check_pace(self, form: str, instants: Sequence[float]) -> None:
        """Raises UserError when the trace would replay at a pace that only a wrong unit explains."""
        gaps = [later - earlier for earlier, later in itertools.pairwise(instants) if later > earlier]
        if not gaps:
            return
        length_s = instants[-1] - instants[0]
        rate, gap_s = (len(instants) - 1) / length_s, statistics.median(gaps)
        unclear = [record.at for record in self.records if record.unit is None]
        fractions = sum(at != int(at) for at in unclear) > len(unclear) / 2
        is_fast = (
            rate >= _FAST_PER_S
            or (rate > _FAST_OF_MANY_PER_S and len(instants) >= _MANY)
            or (rate > _FAST_WITH_FRACTIONS_PER_S and fractions)
        )
        if is_fast and unclear and keys.unit_of(form) == "ms" and min(unclear) < _EPOCH_S[0]:
            raise UserError(
                f"--trace {self.path}: its {len(instants)} rows would come within {span(length_s)}, {rate:.0f} per second, as {form} has "
                "times in milliseconds: give --trace-unit s if these are seconds, --trace-unit ms if they are not"
            )
        if gap_s > _SLOW_GAP_S:
            raise UserError(
                f"--trace {self.path}: a row would typically come {span(gap_s)} after the one before, {span(length_s)} in all: "
                "give --trace-unit s, ms, us or ns, the unit of its times"
            )

    def _blocks(self, form: str) -> tuple[int, list[str]]:
        """Tokens per block and what to say of them. Raises UserError where ids and lengths fit no block size."""
        usual = size = self.block_tokens or _BLOCK_TOKENS.get(form, _MOONCAKE_BLOCK_TOKENS)
        shared = [record for record in self.records if record.block_ids and record.input_tokens]
        needed = _FITTING_SHARE * len(shared)

        def fitting(tokens: int) -> int:
            """Rows that have an id per block, the last begun one with or without."""
            lengths = ((len(record.block_ids), record.input_tokens) for record in shared)
            return sum(ids in (length // tokens, -(-length // tokens)) for ids, length in lengths)

        enough = sum(len(record.block_ids) for record in shared) >= _LEAST_IDS
        if fitting(usual) < needed and self.block_tokens is None and enough:
            likely = max(_BLOCK_SIZES, key=lambda each: (fitting(each), each))
            size = likely if fitting(likely) >= needed else usual
        # One more than there are blocks is what a length without the template's tokens gives.
        too_many = [record for record in shared if len(record.block_ids) > -(-record.input_tokens // size) + 1]
        if too_many and len(shared) - len(too_many) < needed:
            number, ids, length = too_many[0].number, len(too_many[0].block_ids), too_many[0].input_tokens
            more = f", nor do those of {len(too_many) - 1} other rows" if len(too_many) > 1 else ""
            raise self._error(
                number,
                f"{ids} hash_ids do not fit input_length {length} in blocks of {size} tokens{more}: "
                "correct it, or give --trace-block-tokens, the tokens of one block",
            )
        notes = [f"blocks of {size} tokens, by ids and lengths"] if size != usual else []
        if shared and (others := len(shared) - fitting(size)):
            notes.append(f"{others} rows have more or fewer hash_ids than blocks: what has no id is unshared")
        return size, notes

    def _error(self, number: int, what: str) -> UserError:
        return UserError(f"--trace {self.path}, row {number}: {what}")
