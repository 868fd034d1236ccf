"""The keys of the trace formats, and the numbers, dates and times that stand in them."""

import functools
import math
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pdbench.errors import UserError

FORMATS = (
    "known are Azure LLM inference, BurstGPT, Mooncake (also of AIPerf, Dynamo, LiteLLM), Qwen Bailian and Weka traces, and lines of "
    '{"arrival_s": 0.5, "input_tokens": 200, "output_tokens": 50}'
)
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
INPUT = (
    "input_length", "input_tokens", "context_tokens", "contexttokens", "request_tokens", "prompt_tokens", "prompt_length",
    "prompt_len", "input_len", "num_prefill_tokens", "num_prompt_tokens", "num_input_tokens", "prompt_size", "isl", "in",
)  # fmt: skip
OUTPUT = (
    "output_length", "output_tokens", "generated_tokens", "generatedtokens", "response_tokens", "completion_tokens",
    "output_len", "num_decode_tokens", "num_output_tokens", "num_completion_tokens", "token_size", "completion_length", "osl", "out",
)  # fmt: skip
TIME = (
    "timestamp", "arrival", "arrival_time", "arrived_at", "arrival_timestamp", "request_time", "start_time", "starttime", "created",
    "created_at", "time", "ts", "t",
)  # fmt: skip
BLOCKS = ("hash_ids", "block_ids", "block_hashes", "prefix_block_hashes", "prefix_hashes")
TEXTS = {"text", "texts", "prompt", "messages", "text_input", "conversations"}
SESSION = ("session_id", "conversation_id", "chat_id")
_SUFFIXES = {"s": "s", "sec": "s", "seconds": "s", "ms": "ms", "us": "us", "ns": "ns"}
_DURATION = re.compile(r"([0-9.]+)(ms|s|m|h|d|)")
_DURATION_S = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Columns(NamedTuple):
    """What the keys of a row are, by their plain names; looked up once for all rows that have the same."""

    names: tuple[str, ...]
    form: str
    input: str | None
    output: str | None
    times: tuple[tuple[str, str], ...]
    blocks: tuple[str, ...]
    sessions: tuple[str, ...]
    is_header: bool


@functools.lru_cache(maxsize=1024)
def columns_of(row: tuple[Any, ...]) -> Columns:
    """`times` are (key, unit) of arrival times, the one to prefer first: one that names its unit."""
    names = tuple(map(plain, row))
    present = set(names)
    times = [(name, unit) for name in names if (unit := time_unit(name)) is not None]
    prompt, output = (next((key for key in known if key in present), None) for known in (INPUT, OUTPUT))
    return Columns(
        names,
        format_of(present),
        prompt,
        output,
        tuple(sorted(times, key=lambda time: TIME.index(time[0]) if time[0] in TIME else -1)),
        tuple(key for key in BLOCKS if key in present),
        tuple(key for key in SESSION if key in present),
        prompt is None and output is None and bool(present & {"schema", "block_size"}),
    )


@functools.cache
def plain(key: Any) -> str:
    """A column's name in one spelling: "Request tokens" is request_tokens."""
    return re.sub(r"[^0-9a-z]+", "_", str(key).strip().lower()).strip("_")


def format_of(keys: set[str]) -> str:
    """The format that a row with these (plain) keys is of; "own" is pdbench's own and whatever has the same keys."""
    if {"contexttokens", "generatedtokens"} <= keys:
        return "Azure"
    if {"request_tokens", "response_tokens"} <= keys:
        return "BurstGPT"
    if {"in", "out", "t"} <= keys:
        return "Weka"
    if "input_length" in keys and keys & {"chat_id", "parent_chat_id"}:
        return "Bailian"
    if "input_length" in keys and not any(time_unit(key) for key in keys):
        return "Mooncake"
    return "own"


def unit_of(form: str) -> str:
    """The unit of a format's times, where neither key nor value says it."""
    return "ms" if form == "Mooncake" else "s"


@functools.cache
def time_unit(key: str) -> str | None:
    """The unit that the key of an arrival time names (arrival_ms); "" where it names none, None where it is no time."""
    if key in TIME:
        return ""
    name, _, suffix = key.rpartition("_")
    return _SUFFIXES[suffix] if name in TIME and suffix in _SUFFIXES else None


def blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def number(value: Any) -> int | float | None:
    """A finite number, also one in quotes or with a decimal comma; None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        text = value.strip().strip('"')
        try:
            return int(text)
        except ValueError:
            pass
        try:
            value = float(re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def date(text: Any) -> float | None:
    """Seconds since 2020 of an ISO date and time, without an offset taken as UTC; None for anything else."""
    if not isinstance(text, str):
        return None
    # Azure writes seven decimals of a second; datetime takes six.
    head, _, tail = text.strip().strip('"').replace(" UTC", "+00:00").partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    try:
        instant = datetime.fromisoformat(head + tail[digits:])
    except ValueError:
        return None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    whole_s = (instant - datetime(2020, 1, 1, tzinfo=UTC)).total_seconds()
    return whole_s + float(f"0.{tail[:digits] or 0}")


def short(value: Any) -> str:
    """A value for an error message."""
    text = "null" if value is None else "empty" if blank(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_duration(option: str, text: str) -> float:
    """Seconds of 30s, 10m, 1.5h, 2d, 500ms, 1h30m or a number of seconds. Raises UserError."""
    parts = _DURATION.findall(text.replace(" ", ""))
    try:
        seconds = math.fsum(float(amount) * _DURATION_S[unit] for amount, unit in parts)
    except ValueError:
        seconds = math.nan
    if not parts or "".join(map("".join, parts)) != text.replace(" ", "") or not math.isfinite(seconds):
        raise UserError(f"{option} {text}: give a time such as 30s, 10m, 1h30m or 12h")
    return seconds


def span(seconds: float) -> str:
    """A time for people: 0.5 s, 90 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
