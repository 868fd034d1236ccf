"""Recorded loads: Azure LLM inference 2023/2024 (CSV), BurstGPT (CSV), Mooncake (JSONL), and pdbench's own JSONL.

Its own has one line per request: {"arrival_s": 0.5, "input_tokens": 200, "output_tokens": 50}.
Formats: github.com/Azure/AzurePublicDataset, github.com/HPMLL/BurstGPT, github.com/kvcache-ai/Mooncake.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.errors import UserError

MOONCAKE_BLOCK_TOKENS = 512


class TraceRow(NamedTuple):
    """One request of a trace; `block_ids` name its 512-token blocks where the trace tells which prefixes are shared."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def read_trace(path: Path | str) -> list[TraceRow]:
    """The requests of a trace in order of arrival, the first at 0; the format is recognised by its columns or keys.

    Requests without an output (BurstGPT's failures) are left out. Raises UserError with the row that is wrong.
    """
    path = Path(path)
    rows = []
    read: Callable[[Any], TraceRow]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records: Iterator[tuple[int, Any]]
            if path.suffix == ".jsonl":
                read = _read_jsonl
                records = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            else:
                reader = csv.DictReader(file)
                columns = set(reader.fieldnames or ())
                records = ((reader.line_num, fields) for fields in reader)
                if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
                    read = _read_azure
                elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
                    read = _read_burstgpt
                else:
                    raise UserError(f"--trace {path}: columns {sorted(columns)} are neither Azure's nor BurstGPT's")
            for number, record in records:
                try:
                    row = read(record)
                    if not math.isfinite(row.arrival_s) or row.input_tokens < 0 or row.output_tokens < 0:
                        raise ValueError("an instant that is not finite, or a negative length")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"--trace {path}, row {number}: {error or error!r} in {str(record)[:120]}"
                    ) from None
                if row.input_tokens and row.output_tokens:
                    rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--trace {path}: {error}") from None
    if not rows:
        raise UserError(f"--trace {path} holds no request")
    rows.sort(key=lambda row: row.arrival_s)
    return [row._replace(arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def _read_azure(fields: dict[str, Any]) -> TraceRow:
    # Azure writes seven decimals of a second and sometimes an offset; datetime takes six.
    head, dot, tail = fields["TIMESTAMP"].strip().partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    instant = datetime.fromisoformat(f"{head}{dot}{tail[: min(digits, 6)]}{tail[digits:]}")
    seconds = (instant.replace(tzinfo=None) - datetime(2020, 1, 1)).total_seconds()
    return TraceRow(seconds, int(fields["ContextTokens"]), int(fields["GeneratedTokens"]))


def _read_burstgpt(fields: dict[str, Any]) -> TraceRow:
    return TraceRow(float(fields["Timestamp"]), int(fields["Request tokens"]), int(fields["Response tokens"]))


def _read_jsonl(line: str) -> TraceRow:
    fields = json.loads(line)
    if "timestamp" in fields:
        blocks = tuple(int(block) for block in fields.get("hash_ids", []))
        return TraceRow(
            float(fields["timestamp"]) / 1e3, int(fields["input_length"]), int(fields["output_length"]), blocks
        )
    return TraceRow(float(fields["arrival_s"]), int(fields["input_tokens"]), int(fields["output_tokens"]))
