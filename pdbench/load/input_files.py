"""Trace and prompt files: their rows of JSON Lines, JSON or CSV, packed or not, and the values in these; errors in words."""

import csv
import gzip
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdbench.errors import NOT_JSON, OptionError, UserError, in_line

_BINARY = {
    b"PAR1": "a Parquet file: write it as JSON Lines, as in `duckdb -c \"copy 'FILE' to 'rows.jsonl'\"`",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"ARROW1": "an Arrow file: write it as JSON Lines",
}
# Keys under which an object holds its rows, as in {"data": [...]} and the answers of the Hugging Face datasets server.
_ROWS = (
    "data", "rows", "requests", "trace", "prompts", "train", "test", "validation", "examples", "items", "instances",
)  # fmt: skip
# Keys whose lists are one row's, not a column of a table.
_LISTS = {
    "conversations", "conversation", "messages", "turns", "texts", "prompt_token_ids", "input_ids",
}  # fmt: skip
_MOST_NUMBER = 1e300
_DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d+)$")
_DURATION = re.compile(r"([0-9.]+)(ms|s|m|h|d|)")
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
_DURATION_S = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class InputFile:
    """The text of a file that `option` names, in UTF-8 or UTF-16, packed or not; line ends as \\n. Raises UserError for what is no text."""

    def __init__(self, option: str, path: Path) -> None:
        self._option, self._path = option, path
        try:
            data = path.read_bytes()
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            elif data.startswith(b"\x28\xb5\x2f\xfd"):
                data = _unpack_zstd(data)
        except EOFError:
            raise UserError(f"{self} is cut short: copy it here once more") from None
        except (OSError, zlib.error, ValueError) as error:
            raise UserError(f"{self}: {getattr(error, 'strerror', None) or error}") from None
        for magic, kind in _BINARY.items():
            if data.startswith(magic):
                raise UserError(f"{self} is {kind}")
        try:
            text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        except UnicodeDecodeError as error:
            row = data.count(b"\n", 0, error.start) + 1
            raise self.error(row, f"no UTF-8 text ({error.reason}): write the file as UTF-8") from None
        if "\0" in text:
            row = text.count("\n", 0, text.index("\0")) + 1
            raise self.error(row, "a NUL byte: the file is damaged or no text")
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.name = re.sub(r"(\.(gz|gzip|zst|zstd))+$", "", path.name.lower())
        """Without the ending of a packed file: a.csv of a.csv.gz."""
        self.is_json = bool(self.text.strip()) and (
            self.name.endswith((".json", ".jsonl", ".ndjson"))
            or (not self.name.endswith((".csv", ".tsv", ".txt", ".md")) and self.text.lstrip()[0] in "[{")
        )

    def __str__(self) -> str:
        return f"{self._option} {self._path}"

    def error(self, row: int, what: str) -> UserError:
        return UserError(f"{self}, row {row}: {what}")

    def json_rows(self) -> tuple[dict[str, Any], list[tuple[int, Any]]]:
        """(what an object around the rows says besides, (number, row) of each row): one JSON value or one per line.

        The number is the line's, or in one JSON value the row's place from 1.
        """
        number, lines = 0, self.text.split("\n")
        rows: list[tuple[int, Any]] = []
        try:
            try:
                whole = json.loads(self.text)
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":  # which follows a whole first line: JSON Lines
                    raise
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        rows.append((number, json.loads(line)))
                return {}, rows
        except NOT_JSON as error:
            row = number or getattr(error, "lineno", 1)
            raise self.error(row, f"no JSON ({error}) in {in_line(lines[row - 1].strip())}") from None
        around: dict[str, Any] = {}
        if isinstance(whole, dict):
            names = [key for key in _ROWS if isinstance(whole.get(key), list)]
            filled = [key for key in names if whole[key]]
            name = next(iter(filled or names), None)
            if name is not None and not {"chat_id", "custom_id", "prompt"} & whole.keys():
                if len(filled) > 1:
                    raise self.error(1, f"rows under {' and under '.join(filled)}: keep those that are meant")
                around = {key: value for key, value in whole.items() if key != name}
                whole = whole[name]
            elif _is_table(whole):
                whole = [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
        if not isinstance(whole, list):
            whole = [whole]
        # The datasets server puts each row into {"row_idx": 0, "row": {...}}.
        whole = [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in whole]
        return around, list(enumerate(whole, 1))

    def csv_rows(self, check: Callable[[list[str]], None] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """(line, fields) of each row that is not blank, after a check of the columns; the header has most of the delimiter."""
        text = self.text.lstrip("\n")
        header = next((line for line in text.split("\n") if line.strip()), "")
        delimiter = max(",;\t|", key=header.count)
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        try:
            columns = [column.strip() for column in next(filter(None, reader), ())]
            names = [column.lower() for column in columns if column]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise self.error(reader.line_num, f"two columns are called {in_line(twice)}: leave one out")
            if check:
                check(columns)
            for values in reader:
                if len(values) > len(columns):
                    raise self.error(reader.line_num, f"more values than the {len(columns)} columns of the header")
                if any(values) and "".join(values).strip():
                    yield reader.line_num, dict(itertools.zip_longest(columns, values))
        except csv.Error as error:
            raise self.error(reader.line_num or 1, str(error)) from None


def _is_table(columns: dict[str, Any]) -> bool:
    """Are these columns of one table ({"prompt": [...], "answer": [...]}), and not one row whose values are lists?"""
    if _LISTS & columns.keys() or not all(isinstance(values, list) for values in columns.values()):
        return False
    numbers = all(isinstance(value, int) for values in columns.values() for value in values)
    return len(set(map(len, columns.values()))) == 1 and not (len(columns) == 1 and numbers)


def _unpack_zstd(data: bytes) -> bytes:
    """Raises ValueError with the remedy."""
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        command = shutil.which("zstd")
        if command is None:
            raise ValueError("packed with zstd: `pip install zstandard`, or unpack it with `zstd -d` first") from None
        done = subprocess.run([command, "-dcq"], input=data, capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"zstd cannot unpack it: {done.stderr.decode(errors='replace').strip()}") from None
        return done.stdout
    try:
        return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(data))
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd cannot unpack it: {error}") from None


def blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def short(value: Any) -> str:
    """A value for an error message."""
    text = "null" if value is None else "empty" if blank(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def number(value: Any) -> int | float | None:
    """A finite number, also one in quotes or with a decimal comma; None for anything else."""
    if isinstance(value, str):
        text = value.strip().strip('"')
        try:
            return int(text)
        except ValueError:
            pass
        try:
            value = float(_DECIMAL_COMMA.sub(r"\1.\2", text) if "," in text else text)
        except ValueError:
            return None
    return value if type(value) in (int, float) and abs(value) < _MOST_NUMBER else None


def date(text: Any) -> float | None:
    """Seconds since 2020 of an ISO date and time, without an offset taken as UTC; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        instant = datetime.fromisoformat(text.strip().strip('"').replace(" UTC", "+00:00"))
    except ValueError:
        return None
    return (instant - (_EPOCH if instant.tzinfo else _EPOCH.replace(tzinfo=None))).total_seconds()


def read_duration(option: str, text: str) -> float:
    """Seconds of 30s, 10m, 1.5h, 2d, 500ms, 1h30m or a number of seconds. Raises OptionError."""
    parts = _DURATION.findall(text.replace(" ", ""))
    try:
        seconds = math.fsum(float(amount) * _DURATION_S[unit] for amount, unit in parts)
    except ValueError:
        seconds = math.nan
    if not parts or "".join(map("".join, parts)) != text.replace(" ", "") or not math.isfinite(seconds):
        raise OptionError(f"{option} {text}: give a time such as 30s, 10m, 1h30m or 12h")
    return seconds
