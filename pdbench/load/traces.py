"""Recorded loads: when requests came, how long they were, which blocks their prompts share. Formats are recognised by their keys.

docs/load.md lists the formats with their units. A trace that would replay at a pace which only a wrong unit explains is refused.
"""

import functools
import itertools
import math
import operator
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.config import LoadConfig
from pdbench.errors import UserError, in_line, span
from pdbench.load import input_files
from pdbench.load.input_files import InputFile, blank, read_duration, short

_FORMATS = (
    "known are Azure LLM inference, BurstGPT, Mooncake (also of AIPerf, Dynamo, LiteLLM), Qwen Bailian and Weka traces, and lines of "
    '{"arrival_s": 0.5, "input_tokens": 200, "output_tokens": 50}'
)
# A format and keys of its rows; "own" is pdbench's own and whatever has the same keys, also Mooncake with a unit in its time's key.
_KEYS_OF_FORMAT = (
    ("Azure", {"contexttokens", "generatedtokens"}),
    ("BurstGPT", {"request_tokens", "response_tokens"}),
    ("Weka", {"in", "out", "t"}),
    ("Bailian", {"input_length", "chat_id"}),
    ("Bailian", {"input_length", "parent_chat_id"}),
    ("Mooncake", {"input_length"}),
)
_BLOCK_TOKENS = {"Bailian": 16, "Weka": 64}
_UNIT = {"Mooncake": "ms"}
"""The unit of a format's times, where neither key nor value says it; seconds for the others."""
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_INPUT = (
    "input_length", "input_tokens", "context_tokens", "contexttokens", "request_tokens", "prompt_tokens", "prompt_length",
    "prompt_len", "input_len", "num_prefill_tokens", "num_prompt_tokens", "num_input_tokens", "prompt_size", "isl", "in",
)  # fmt: skip
_OUTPUT = (
    "output_length", "output_tokens", "generated_tokens", "generatedtokens", "response_tokens", "completion_tokens",
    "output_len", "num_decode_tokens", "num_output_tokens", "num_completion_tokens", "token_size", "completion_length", "osl", "out",
)  # fmt: skip
_TIME = (
    "timestamp", "arrival", "arrival_time", "arrived_at", "arrival_timestamp", "request_time", "start_time", "starttime", "created",
    "created_at", "time", "ts", "t",
)  # fmt: skip
_BLOCKS = ("hash_ids", "block_ids", "block_hashes", "prefix_block_hashes", "prefix_hashes")
_TEXTS = {"text", "texts", "prompt", "messages", "text_input", "conversations"}
_SESSION = ("session_id", "conversation_id", "chat_id")
_SUFFIXES = {"": "", "_s": "s", "_sec": "s", "_seconds": "s", "_ms": "ms", "_us": "us", "_ns": "ns"}
_TIME_UNITS = {f"{name}{suffix}": unit for name in _TIME for suffix, unit in _SUFFIXES.items()}
"""The unit that the key of an arrival time names, "" where it names none."""
_TIME_RANK = {f"{name}{suffix}": rank for rank, name in enumerate(_TIME) for suffix in _SUFFIXES}
_IDS = {int, str, float, bool}
_FITTING_SHARE, _LEAST_IDS = 0.95, 8
_BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
_MOST_TOKENS = 10**8
_THOUSANDS = re.compile(r"\s*\d+(,\d\d\d)+\s*")
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

    def row_within(self, least: int, most: int | None, index: int) -> tuple[int, int, tuple[Hashable, ...]]:
        """A row's tokens, at least and at most so many; its tokens to generate; the blocks of these tokens."""
        _, tokens, output_tokens, blocks = self.rows[index]
        tokens = max(min(tokens, most or tokens), least)
        return tokens, output_tokens, tuple(blocks[: -(-tokens // self.block_tokens)]) if blocks else ()


class _Record(NamedTuple):
    """A row as read: `at` is in `unit`, or in the trace's unit where that is None; it comes `later_s` after that."""

    number: int
    at: float
    unit: str | None
    later_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[Hashable, ...]


def trace_of(config: LoadConfig) -> Trace:
    """The part of --trace that is replayed, the instant of --trace-from being 0. Raises UserError, also where it has no rows."""
    assert config.trace is not None
    trace = read_trace(config.trace, config.trace_unit, config.trace_block_tokens)
    if config.trace_from is None and config.trace_for is None:
        return trace
    from_s = read_duration("--trace-from", config.trace_from or "0")
    for_s = math.inf if config.trace_for is None else read_duration("--trace-for", config.trace_for)
    rows = [
        row._replace(arrival_s=row.arrival_s - from_s) for row in trace.rows if from_s <= row.arrival_s < from_s + for_s
    ]
    if not rows:
        begin, end = span(trace.rows[0].arrival_s), span(trace.rows[-1].arrival_s)
        wanted = f"--trace-from {span(from_s)}" + ("" if config.trace_for is None else f" --trace-for {span(for_s)}")
        raise UserError(f"{wanted}: {trace.name} has no request there; its requests come from {begin} to {end}")
    return replace(trace, rows=rows)


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
    file = InputFile("--trace", path)

    def check_columns(columns: list[str]) -> None:
        known = _columns_of(tuple(columns))
        needed = {
            "arrival time (timestamp, arrival_s)": known.times,
            "prompt length (input_tokens)": known.input,
            "output length (output_tokens)": known.output,
        }
        if missing := [words for words, keys in needed.items() if not keys]:
            names = in_line(*columns) or "nothing"
            raise UserError(f"{file}: no column with the {', none with the '.join(missing)} in {names}; {_FORMATS}")

    around: dict[str, Any] = {}
    rows: Iterable[tuple[int, Any]] = ()
    if file.is_json:
        around, rows = file.json_rows()
    elif file.text.strip():
        rows = file.csv_rows(check_columns)
    reader = _Reader(file, unit, block_tokens)
    reader.take_header(around)
    for number, row in rows:
        reader.take(number, row)
    if not reader.records:
        raise UserError(f"{file} holds no request: {_FORMATS}")
    return reader.trace(path.name)


class _Columns(NamedTuple):
    """What the keys of a row are, by their plain names; `times` are (key, unit) of arrival times, the one to prefer first."""

    names: tuple[str, ...]
    form: str
    input: str | None
    output: str | None
    times: tuple[tuple[str, str], ...]
    blocks: tuple[str, ...]
    sessions: tuple[str, ...]
    is_header: bool


@functools.lru_cache(maxsize=1024)
def _columns_of(row: tuple[Any, ...]) -> _Columns:
    """Looked up once for all rows that have the same keys; in a plain name, "Request tokens" is request_tokens."""
    names = tuple(re.sub(r"[^0-9a-z]+", "_", str(key).strip().lower()).strip("_") for key in row)
    present = set(names)
    form = next((form for form, keys in _KEYS_OF_FORMAT if keys <= present), "own")
    times = [(name, _TIME_UNITS[name]) for name in names if name in _TIME_UNITS]
    prompt, output = (next((key for key in known if key in present), None) for known in (_INPUT, _OUTPUT))
    return _Columns(
        names,
        "own" if form == "Mooncake" and any(unit for _, unit in times) else form,
        prompt,
        output,
        tuple(sorted(times, key=lambda time: (_TIME_RANK[time[0]], not time[1]))),
        tuple(key for key in _BLOCKS if key in present),
        tuple(key for key in _SESSION if key in present),
        prompt is None and output is None and bool(present & {"schema", "block_size"}),
    )


class _Reader:
    """Takes the rows of one file and makes them a trace."""

    def __init__(self, file: InputFile, unit: str | None, block_tokens: int | None) -> None:
        self.file, self.unit, self.block_tokens = file, unit, block_tokens
        self.records: list[_Record] = []
        self._formats: Counter[str] = Counter()
        self._sessions = 0
        self._scope: int | None = None
        self._last_of_session: dict[Any, tuple[float, str | None, float]] = {}
        self._time_kind: str | None = None

    def take(self, number: int, row: Any) -> None:
        """One row, a header between rows ({"block_size": 64}), or a session with its requests inside (Weka)."""
        if not isinstance(row, dict):
            raise self.file.error(number, f"not an object with keys, but {short(row)}")
        keys = tuple(row)
        columns = _columns_of(keys)
        fields = row if columns.names == keys else dict(zip(columns.names, row.values(), strict=True))
        requests = fields.get("requests")
        if isinstance(requests, list):
            outer = self._scope
            # Weka's ids are of one session unless it says otherwise; a sub-agent's are its session's.
            if outer is None:
                self._sessions += 1
                self._scope = self._sessions if fields.get("hash_id_scope", "local") == "local" else 0
            self.take_header(fields)
            for request in requests:
                self.take(number, request)
            self._scope = outer
        elif columns.is_header:
            self.take_header(fields)
        else:
            self._take_request(number, fields, columns)

    def take_header(self, fields: dict[str, Any]) -> None:
        size = fields.get("block_size", fields.get("trace_block_size"))
        if self.block_tokens is None and type(size) is int and size > 0:
            self.block_tokens = size

    def _take_request(self, number: int, fields: dict[str, Any], columns: _Columns) -> None:
        if self.block_tokens is None:
            self.take_header(fields)
        input_tokens = self._length(number, fields, columns.input, _INPUT)
        output_tokens = self._length(number, fields, columns.output, _OUTPUT)
        self._formats[columns.form] += 1
        instant = self._instant(number, fields, columns)
        blocks: Any = ()
        if columns.blocks:
            blocks = next((fields[key] for key in columns.blocks if not blank(fields[key])), ())
        if isinstance(blocks, str):  # in a CSV
            blocks = [word for word in re.split(r"[\s,;\[\]\"']+", blocks) if word]
        if not isinstance(blocks, list | tuple):
            raise self.file.error(number, f"hash_ids is {short(blocks)}: give a list of block ids")
        if not _IDS.issuperset(map(type, blocks)):
            raise self.file.error(number, f"hash_ids is {short(blocks)}: give numbers or texts as ids")
        ids = tuple((self._scope, block) for block in blocks) if self._scope else tuple(blocks)
        self.records.append(_Record(number, *instant, input_tokens, output_tokens, ids))

    def _length(self, number: int, fields: dict[str, Any], key: str | None, known: Sequence[str]) -> int:
        if key is None:
            names, texts = in_line(*fields), "; texts go to --prompt-file" if fields.keys() & _TEXTS else ""
            what = f"no {known[1]} ({', '.join(known[:3])}, ...) among {names}{texts}; {_FORMATS}"
            raise self.file.error(number, what)
        # "1,000" would be a token with a decimal comma.
        value = None if _THOUSANDS.fullmatch(str(fields[key])) else input_files.number(fields[key])
        if value is None or not 0 <= value <= _MOST_TOKENS or value != int(value):
            raise self.file.error(number, f"{key} is {short(fields[key])}: give a whole number of tokens, 0 or more")
        return int(value)

    def _instant(self, number: int, fields: dict[str, Any], columns: _Columns) -> tuple[float, str | None, float]:
        """(time, its unit, None for the trace's, seconds after it) of a row; one without a time comes `delay` ms after the session's last one."""
        session = None
        if columns.sessions:
            session = next((repr(fields[key]) for key in columns.sessions if not blank(fields[key])), None)
        at: float | None
        unit: str | None
        later_s = 0.0
        key, unit = next(((key, unit) for key, unit in columns.times if not blank(fields[key])), (None, None))
        if key is None:
            delay = input_files.number(fields.get("delay", fields.get("delay_ms")))
            if session is None or session not in self._last_of_session or delay is None or delay < 0:
                turns = "" if session is None else ", nor a `delay` (ms) after an earlier turn of its session"
                names = f"{', '.join(fields)[:200]}{turns}"
                raise self.file.error(number, f"no arrival time (timestamp, arrival_s, ...) among {names}; {_FORMATS}")
            at, unit, later_s = self._last_of_session[session]
            later_s += delay * _UNITS["ms"]
        else:
            value = fields[key]
            # A date with a dash is no number: rows of dates are not tried as numbers first.
            at = input_files.date(value) if self._time_kind == "date" and "-" in str(value) else None
            kind = "date"
            if at is None:
                at, kind = input_files.number(value), "number"
            if at is None:
                at, kind = input_files.date(value), "date"
            if at is None or self._time_kind not in (None, kind):
                wrong = "give a number, or a date as in 2024-05-10 00:00:04.5"
                if at is not None:
                    wrong = f"a {kind} where earlier rows have a {self._time_kind}"
                raise self.file.error(number, f"{key} is {short(value)}: {wrong}")
            self._time_kind = kind
            unit = "s" if kind == "date" else self.unit or unit or None
        if session is not None:
            self._last_of_session[session] = at, unit, later_s
        return at, unit, later_s

    def trace(self, name: str) -> Trace:
        form = self._formats.most_common(1)[0][0]
        unit, notes = self.unit or _UNIT.get(form, "s"), []
        unclear = [record.at for record in self.records if record.unit is None]
        for other, factor in _UNITS.items():
            if unclear and all(_EPOCH_S[0] <= at * factor < _EPOCH_S[1] for at in unclear):
                notes = [f"its times are dates in {other}"] if other != unit else []
                unit = other
                break
        # Nanoseconds since 1970 have more digits than a float.
        zero = min(record.at for record in self.records) if len({record.unit for record in self.records}) == 1 else 0
        scaled = [(record.at - zero) * _UNITS[record.unit or unit] + record.later_s for record in self.records]
        first_s = min(scaled)
        timed = [(at_s - first_s, record) for at_s, record in zip(scaled, self.records, strict=True)]
        if any(earlier[0] > later[0] for earlier, later in itertools.pairwise(timed)):
            timed.sort(key=operator.itemgetter(0))
            notes.append("rows put in order of time")
        size, block_notes = self._blocks(form)
        rows = [
            TraceRow(at_s, tokens, output_tokens, block_ids[: -(-tokens // size)])
            for at_s, (*_, tokens, output_tokens, block_ids) in timed
            if tokens and output_tokens
        ]
        if not rows:
            raise UserError(f"{self.file}: none of its {len(timed)} rows has input and output tokens")
        if self.unit is None:
            self._check_pace(form, [at_s for at_s, _ in timed], unclear)
        if self._sessions > 1:
            notes.append(f"{self._sessions} sessions, each from its own time 0")
        if left_out := len(timed) - len(rows):
            notes.append(f"{left_out} rows without tokens left out")
        if copies := len(rows) - len(set(rows)):
            notes.append(f"{copies} rows equal another")
        return Trace(name, form, rows, len(timed), size, tuple(notes + block_notes))

    def _check_pace(self, form: str, instants: Sequence[float], unclear: Sequence[float]) -> None:
        """Raises UserError when the trace would replay at a pace that only a wrong unit explains."""
        gaps = [later - earlier for earlier, later in itertools.pairwise(instants) if later > earlier]
        if not gaps:
            return
        length_s = instants[-1] - instants[0]
        rate, gap_s = (len(instants) - 1) / length_s, statistics.median(gaps)
        fractions = sum(at != int(at) for at in unclear) > len(unclear) / 2
        is_fast = (
            rate >= _FAST_PER_S
            or (rate > _FAST_OF_MANY_PER_S and len(instants) >= _MANY)
            or (rate > _FAST_WITH_FRACTIONS_PER_S and fractions)
        )
        if is_fast and unclear and _UNIT.get(form) == "ms" and min(unclear) < _EPOCH_S[0]:
            raise UserError(
                f"{self.file}: its {len(instants)} rows would come within {span(length_s)}, {rate:.0f} per second, as {form} has "
                "times in milliseconds: give --trace-unit s if these are seconds, --trace-unit ms if they are not"
            )
        if gap_s > _SLOW_GAP_S:
            raise UserError(
                f"{self.file}: a row would typically come {span(gap_s)} after the one before, {span(length_s)} in all: "
                "give --trace-unit s, ms, us or ns, the unit of its times"
            )

    def _blocks(self, form: str) -> tuple[int, list[str]]:
        """Tokens per block and what to say of them. Raises UserError where ids and lengths fit no block size."""
        usual = size = self.block_tokens or _BLOCK_TOKENS.get(form, 512)
        # (row, its ids, its tokens)
        shared = [(each.number, len(each.block_ids), each.input_tokens) for each in self.records]
        shared = [(number, ids, length) for number, ids, length in shared if ids and length]
        needed = _FITTING_SHARE * len(shared)

        def fitting(tokens: int) -> int:
            """Rows that have an id per block, the last begun one with or without."""
            return sum(ids in (length // tokens, -(-length // tokens)) for _, ids, length in shared)

        if fitting(usual) < needed and self.block_tokens is None and sum(ids for _, ids, _ in shared) >= _LEAST_IDS:
            likely = max(_BLOCK_SIZES, key=lambda each: (fitting(each), each))
            size = likely if fitting(likely) >= needed else usual
        # One more than there are blocks is what a length without the template's tokens gives.
        too_many = [row for row in shared if row[1] > -(-row[2] // size) + 1]
        if too_many and len(shared) - len(too_many) < needed:
            number, ids, length = too_many[0]
            more = f", nor do those of {len(too_many) - 1} other rows" if len(too_many) > 1 else ""
            raise self.file.error(
                number,
                f"{ids} hash_ids do not fit input_length {length} in blocks of {size} tokens{more}: "
                "correct it, or give --trace-block-tokens, the tokens of one block",
            )
        notes = [f"blocks of {size} tokens, by ids and lengths"] if size != usual else []
        if shared and (others := len(shared) - fitting(size)):
            notes.append(f"{others} rows have more or fewer hash_ids than blocks: what has no id is unshared")
        return size, notes
