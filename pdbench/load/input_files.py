"""Rows of trace and prompt files: JSON Lines, JSON arrays, CSV with any usual delimiter, text; gzip and zstd; errors in words."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdbench.errors import UserError

_DELIMITERS = ",;\t|"
_BINARY = {
    b"PAR1": "a Parquet file: write it as JSON Lines, as in `duckdb -c \"copy 'FILE' to 'rows.jsonl'\"`",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"ARROW1": "an Arrow file: write it as JSON Lines",
}
# Keys under which an object holds its rows, as in {"data": [...]} and the answers of the Hugging Face datasets server.
_ROWS = (
    "data",
    "rows",
    "requests",
    "trace",
    "prompts",
    "train",
    "test",
    "validation",
    "examples",
    "items",
    "instances",
)


def read_text(option: str, path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16, with or without a byte-order mark, packed or not; line ends as \\n.

    Raises UserError, naming `option` and `path`, for what is no text.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(b"\x28\xb5\x2f\xfd"):
            data = _unpack_zstd(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"{option} {path}: {error}") from None
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            raise UserError(f"{option} {path} is {kind}")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{option} {path}, row {row}: no UTF-8 text ({error.reason}): write the file as UTF-8"
        ) from None
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{option} {path}, row {row}: a NUL byte: the file is damaged or no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_rows(option: str, path: Path, text: str) -> tuple[dict[str, Any], list[tuple[int, Any]]]:
    """(what an object around the rows says besides, (number, row) of each row): one JSON value or one per line.

    The number is the line's, or in one JSON value the row's place from 1.
    """
    try:
        whole = json.loads(text)
    except ValueError as error:
        # After a whole first line, what follows is "Extra data": that is JSON Lines.
        if getattr(error, "msg", "") != "Extra data":
            row = getattr(error, "lineno", 1)
            line = text.split("\n")[row - 1].strip()
            raise UserError(f"{option} {path}, row {row}: no JSON ({error}) in {line[:120]}") from None
        return {}, list(_json_lines(option, path, text))
    around: dict[str, Any] = {}
    if isinstance(whole, dict):
        name = next((key for key in _ROWS if isinstance(whole.get(key), list)), None)
        if name is not None and not {"chat_id", "custom_id", "prompt"} & whole.keys():
            around = {key: value for key, value in whole.items() if key != name}
            whole = whole[name]
        elif whole and all(isinstance(value, list) for value in whole.values()) and _is_table(whole):
            whole = [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
        else:
            whole = [whole]
    elif not isinstance(whole, list):
        whole = [whole]
    # The datasets server puts each row into {"row_idx": 0, "row": {...}}.
    rows = [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in whole]
    return around, list(enumerate(rows, 1))


def csv_rows(option: str, path: Path, text: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """(columns, (line, fields) of each row that is not blank); the delimiter is the one that the header has most of."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text.lstrip("\n")), delimiter=delimiter, skipinitialspace=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"{option} {path}, row 1: {error}") from None
    reader.fieldnames = columns

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        try:
            for fields in reader:
                if None in fields:
                    raise UserError(
                        f"{option} {path}, row {reader.line_num}: more values than the {len(columns)} columns of the header"
                    )
                if "".join(filter(None, fields.values())).strip():
                    yield reader.line_num, fields
        except csv.Error as error:
            raise UserError(f"{option} {path}, row {reader.line_num}: {error}") from None

    return columns, rows()


def base_name(path: Path) -> str:
    """The name without the ending of a packed file: a.csv of a.csv.gz."""
    name = path.name.lower()
    for ending in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(ending)
    return name


def looks_like_json(path: Path, text: str) -> bool:
    """By its name, else by how it begins."""
    name = base_name(path)
    if name.endswith((".json", ".jsonl", ".ndjson")):
        return True
    return not name.endswith((".csv", ".tsv", ".txt", ".md")) and text.lstrip()[:1] in ("[", "{")


def _json_lines(option: str, path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{option} {path}, row {number}: no JSON ({error}) in {line.strip()[:120]}") from None


def _is_table(columns: dict[str, list[Any]]) -> bool:
    """Are these columns of one table ({"prompt": [...], "answer": [...]}), and not one row whose values are lists?"""
    if {
        "conversations",
        "conversation",
        "messages",
        "turns",
        "texts",
        "prompt_token_ids",
        "input_ids",
    } & columns.keys():
        return False
    numbers = all(isinstance(value, int) for values in columns.values() for value in values)
    return len({len(values) for values in columns.values()}) == 1 and not (len(columns) == 1 and numbers)


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
