"""When requests arrive, in seconds from the load's start: pure functions of seed and parameters, and recorded traces."""

import csv
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.errors import UserError

MOONCAKE_BLOCK_TOKENS = 512
_AZURE_COLUMNS = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
_BURSTGPT_COLUMNS = {"Timestamp", "Request tokens", "Response tokens"}


def poisson(rate: float, seed: int | str) -> Iterator[float]:
    """Endless arrivals of a Poisson process, `rate` per second."""
    generator = random.Random(f"arrivals/{seed}")
    unit = 0.0
    while True:
        unit -= math.log(1.0 - generator.random())
        yield unit / rate


def constant(rate: float) -> Iterator[float]:
    """Endless arrivals, one every 1/rate seconds, the first after one gap."""
    return (index / rate for index in itertools.count(1))


def gamma(rate: float, burstiness: float, seed: int | str) -> Iterator[float]:
    """Endless arrivals with gamma gaps of mean 1/rate and coefficient of variation 1/sqrt(burstiness), 1 being Poisson.

    As in `vllm bench serve`.
    """
    generator = random.Random(f"arrivals/{seed}")
    scale = 1.0 / (rate * burstiness)
    now_s = 0.0
    while True:
        now_s += generator.gammavariate(burstiness, scale)
        yield now_s


def ramp(start_rate: float, end_rate: float, over_s: float, seed: int | str) -> Iterator[float]:
    """Endless Poisson arrivals whose rate goes linearly from `start_rate` to `end_rate` over `over_s`, then stays."""
    slope = (end_rate - start_rate) / over_s
    at_end = (start_rate + end_rate) / 2 * over_s
    for unit in poisson(1.0, seed):
        if unit >= at_end:
            yield over_s + (unit - at_end) / end_rate
        elif slope == 0:
            yield unit / start_rate
        else:
            yield (math.sqrt(start_rate**2 + 2 * slope * unit) - start_rate) / slope


def staged(stages: Sequence[tuple[float, float]], seed: int | str) -> Iterator[float]:
    """Poisson arrivals through stages of (requests per second, seconds); ends with the last stage."""
    begin_s, summed = 0.0, 0.0
    units = poisson(1.0, seed)
    unit = next(units)
    for rate, length_s in stages:
        while unit < summed + rate * length_s:
            yield begin_s + (unit - summed) / rate
            unit = next(units)
        begin_s, summed = begin_s + length_s, summed + rate * length_s


def read_stages(text: str) -> list[tuple[float, float]]:
    """Stages out of "RATE:SECONDS,..." as in "2:30,20:5,2:30". Raises UserError naming the part that is wrong."""
    stages = []
    for part in text.split(","):
        try:
            rate, length_s = (float(number) for number in part.split(":"))
        except ValueError:
            raise UserError(f"--stages: {part!r} is not RATE:SECONDS, as in 2:30,20:5,2:30") from None
        if not (math.isfinite(rate) and math.isfinite(length_s)) or rate < 0 or length_s <= 0:
            raise UserError(f"--stages: {part!r} needs a rate of 0 or more and a length above 0 seconds")
        stages.append((rate, length_s))
    return stages


class TraceRow(NamedTuple):
    """One request of a trace; `block_ids` name its 512-token blocks where the trace tells which prefixes are shared."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def read_trace(path: Path | str) -> list[TraceRow]:
    """The requests of a trace in order of arrival, the first at 0; the format is recognised by its columns or keys.

    Azure LLM inference 2023/2024 (CSV; github.com/Azure/AzurePublicDataset), BurstGPT (CSV; github.com/HPMLL/BurstGPT),
    Mooncake (JSONL; github.com/kvcache-ai/Mooncake), and pdbench's own JSONL with lines
    {"arrival_s": 0.5, "input_tokens": 200, "output_tokens": 50}. Requests without an output (BurstGPT's failures) are left
    out. Raises UserError with the row that is wrong.
    """
    path = Path(path)
    rows = []
    records: Iterable[tuple[int, Any]]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                records = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            else:
                reader = csv.DictReader(file)
                columns = set(reader.fieldnames or ())
                if not (columns >= _AZURE_COLUMNS or columns >= _BURSTGPT_COLUMNS):
                    raise UserError(f"--trace {path}: columns {sorted(columns)} are neither Azure's nor BurstGPT's")
                records = ((reader.line_num, fields) for fields in reader)
            for number, record in records:
                try:
                    row = _trace_row(json.loads(record) if isinstance(record, str) else record)
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


def _trace_row(fields: dict[str, Any]) -> TraceRow:
    if "ContextTokens" in fields:
        # Azure writes seven decimals of a second and sometimes an offset; datetime takes six.
        head, dot, tail = fields["TIMESTAMP"].strip().partition(".")
        digits = len(tail) - len(tail.lstrip("0123456789"))
        instant = datetime.fromisoformat(f"{head}{dot}{tail[: min(digits, 6)]}{tail[digits:]}")
        seconds = (instant.replace(tzinfo=None) - datetime(2020, 1, 1)).total_seconds()
        return TraceRow(seconds, int(fields["ContextTokens"]), int(fields["GeneratedTokens"]))
    if "Request tokens" in fields:
        return TraceRow(float(fields["Timestamp"]), int(fields["Request tokens"]), int(fields["Response tokens"]))
    if "timestamp" in fields:  # Mooncake, in milliseconds
        blocks = tuple(int(block) for block in fields.get("hash_ids", []))
        seconds = float(fields["timestamp"]) / 1e3
        return TraceRow(seconds, int(fields["input_length"]), int(fields["output_length"]), blocks)
    return TraceRow(float(fields["arrival_s"]), int(fields["input_tokens"]), int(fields["output_tokens"]))
