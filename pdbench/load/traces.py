"""Recorded loads: Azure LLM inference 2023/2024 (CSV), BurstGPT (CSV), Mooncake (JSONL), and our own JSONL.

Ours has one line a request: {"arrival_s": 0.5, "input_tokens": 200, "output_tokens": 50}. The first arrival becomes 0.
Formats: github.com/Azure/AzurePublicDataset, github.com/HPMLL/BurstGPT, github.com/kvcache-ai/Mooncake.
Try: python -c "from pdbench.load.traces import read_trace; print(read_trace('trace.csv')[0])"
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pdbench.errors import UserError

MOONCAKE_BLOCK_TOKENS = 512
_Row = dict[str, Any]


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace; `block_ids` name its 512-token blocks where the trace tells which prefixes are shared."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: list[int] = field(default_factory=list)


def read_trace(path: Path | str) -> list[TraceRow]:
    """The requests of a trace in order of arrival, the format seen by its columns or keys.

    Requests without an output (BurstGPT's failures) are left out. Raises UserError with the row that is wrong.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_jsonl_rows(file, path) if path.suffix == ".jsonl" else _csv_rows(file, path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--trace {path}: {error}") from None
    if not rows:
        raise UserError(f"--trace {path} holds no request")
    rows.sort(key=lambda row: row.arrival_s)
    first_s = rows[0].arrival_s
    return [TraceRow(row.arrival_s - first_s, row.input_tokens, row.output_tokens, row.block_ids) for row in rows]


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[TraceRow]:
    reader = csv.DictReader(lines)
    columns = set(reader.fieldnames or ())
    for needed, read in _CSV_FORMATS:
        if needed <= columns:
            return _checked(((reader.line_num, row) for row in reader), read, path)
    raise UserError(f"--trace {path}: columns {sorted(columns)} are neither Azure's nor BurstGPT's")


def _jsonl_rows(lines: Iterable[str], path: Path) -> Iterator[TraceRow]:
    def parsed() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line

    return _checked(parsed(), _read_jsonl, path)


def _checked(rows: Iterator[tuple[int, Any]], read: Callable[[Any], TraceRow], path: Path) -> Iterator[TraceRow]:
    for number, row in rows:
        try:
            made = read(row)
            if not math.isfinite(made.arrival_s) or made.input_tokens < 0 or made.output_tokens < 0:
                raise ValueError("an instant that is not finite, or a negative length")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--trace {path}, row {number}: {error or error!r} in {str(row)[:120]}") from None
        if made.input_tokens and made.output_tokens:
            yield made


def _read_azure(row: _Row) -> TraceRow:
    instant = datetime.fromisoformat(_until_microseconds(row["TIMESTAMP"]))
    seconds = (instant.replace(tzinfo=None) - datetime(2020, 1, 1)).total_seconds()
    return TraceRow(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _until_microseconds(text: str) -> str:
    """Azure writes seven decimals of a second and sometimes an offset; datetime takes six."""
    head, dot, tail = text.strip().partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    return f"{head}{dot}{tail[: min(digits, 6)]}{tail[digits:]}"


def _read_burstgpt(row: _Row) -> TraceRow:
    return TraceRow(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))


def _read_jsonl(line: str) -> TraceRow:
    row = json.loads(line)
    if "timestamp" in row:
        blocks = [int(block) for block in row.get("hash_ids", [])]
        return TraceRow(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), blocks)
    return TraceRow(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]))


_CSV_FORMATS: tuple[tuple[set[str], Callable[[_Row], TraceRow]], ...] = (
    ({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _read_azure),
    ({"Timestamp", "Request tokens", "Response tokens"}, _read_burstgpt),
)
