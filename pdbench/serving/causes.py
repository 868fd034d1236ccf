"""What servers' logs say: why one died (a known sign with its remedy, or else the error at the root of all others), and what happened
during a load."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.errors import in_line
from pdbench.events import LogLine

_KNOWN: dict[str, Any] = tomllib.loads(Path(__file__).with_name("causes.toml").read_text("utf-8"))
_IN_LOADS = [(sign, flag, meaning) for flag, signs in _KNOWN.pop("load").items() for sign, meaning in signs.items()]
_COLOUR = re.compile(r"\x1b?\[[0-9;]*m")
_PROCESS = re.compile(r"\((?P<process>[A-Za-z]\w*)(?: pid=\d+)?\) ?")
_LOGGED = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] ?)?")
_ERROR = re.compile(
    r"(?:\w+\.)*(?P<name>[A-Z]\w*(?:Error|Exception|Timeout|Exit|Killed|Failure|Failed))(?:: (?P<message>.*))?"
)
_CONSEQUENCES = re.compile(
    r"see (root cause|stack trace).* above|(^|\.)(EngineDeadError|CancelledError|BrokenPipeError|EngineGenerateError)\b|"
    r"(died|exited) unexpectedly|is already dead|cancelled",
    re.IGNORECASE,
)
"""Errors that say no more than that another process or an earlier line failed."""
_DEAD = re.compile(
    r"(\S+\.)?EngineDeadError\b|EngineCore encountered a fatal error|(\[shutdown\] )?.{0,20}(engine core|worker) .{0,40}(exited|died) unexpectedly",
    re.IGNORECASE,
)
_SERVED = re.compile(r'"POST \S+ HTTP/[\d.]+" 200\b')
_LONGEST = 300


class Line(NamedTuple):
    """A line of a log, 1 the first: its `level` is None where no logger wrote it; `engine`: an engine or its worker did."""

    number: int
    level: str | None
    engine: bool
    text: str


def engine_died(log: str) -> bool:
    """Does this log, or a part of it, say that vLLM's engine is dead? Its API server may still answer."""
    suspicious = "EngineDead" in log or " unexpectedly" in log or "fatal error" in log
    return suspicious and any(line.level not in ("DEBUG", "INFO") and _DEAD.match(line.text) for line in _lines(log))


def lines_of_load(log: str, t_s: float) -> list[LogLine]:
    """The lines in a new part of a living server's log, read at `t_s`, that a reader of its figures must know: the signs of
    causes.toml, and errors of any kind without their tracebacks."""
    lowered = log.lower()
    if not ("error" in lowered or "critical" in lowered or any(sign in lowered for sign, _, _ in _IN_LOADS)):
        return []
    found = []
    for line in _lines(log):
        text = line.text.lower()
        known = next(((flag, meaning) for sign, flag, meaning in _IN_LOADS if sign in text), None)
        if known is None and line.level in ("ERROR", "CRITICAL") and not text.startswith((" ", "traceback")):
            known = ("server-error", "its log says more around this line")
        if known and text and line.level != "DEBUG":
            shown = in_line(_short(line.text), most=None)
            found.append(LogLine(t_s=t_s, flag=known[0], text=shown, meaning=known[1]))
    return found


def likely_cause(log: str) -> str | None:
    """The cause and, where it is known, the remedy, with the line of the log that says so; None when none does."""
    lines = [*_lines(log)]
    last = lines[_survived(lines) :]
    if root := _root_error(last):
        root = root._replace(text=_said(root, lines))
    if found := _known(root, last, lines):
        cause, line = found
        return f"{cause} (line {line.number} of its log: {_short(line.text)})"
    return f"{_short(root.text)} (line {root.number} of its log)" if root else None


def _lines(log: str) -> Iterator[Line]:
    for number, raw in enumerate(log.split("\n"), 1):
        text, process = _COLOUR.sub("", raw), ""
        if match := _PROCESS.match(text):
            text, process = text[match.end() :], match["process"]
        level = None
        if match := _LOGGED.match(text):
            text, level = text[match.end() :], match["level"]
        yield Line(number, level, process.startswith(("EngineCore", "Worker", "VllmWorker")), text.rstrip())


def _survived(lines: list[Line]) -> int:
    """How many of the first lines a server survived: up to the last request that it answered well before it, or its engine, died."""
    end = next(
        (number for number, line in enumerate(lines) if line.level != "INFO" and _DEAD.match(line.text)), len(lines)
    )
    return next((number for number in range(end, 0, -1) if _SERVED.search(lines[number - 1].text)), 0)


def _known(root: Line | None, last: list[Line], lines: list[Line]) -> tuple[str, Line] | None:
    """A known sign in the root error itself; else anywhere but in what a logger calls harmless; else in any warning, of `lines` too, which
    the server survived at first."""
    serious = [line for line in last if line.level in (None, "ERROR", "CRITICAL")]
    for tables, among in (
        (("root", "any", "even_warnings"), [root] if root else []),
        (("any", "even_warnings"), serious),
        (("even_warnings",), lines),
        (("otherwise",), [] if root else last),
    ):
        for sign, cause in ((sign, cause) for table in tables for sign, cause in _KNOWN[table].items()):
            for line in among:
                if sign in line.text.lower():
                    return cause, line
    return None


def _root_error(lines: list[Line]) -> Line | None:
    """The last error of an engine that its logger reports, else the last of any process; consequences do not count."""
    errors = []
    ignored = False
    for line in lines:
        if line.text.startswith("Exception ignored in"):
            ignored = True  # the traceback that follows is that of a destructor
        elif line.level in (None, "ERROR", "CRITICAL") and _ERROR.fullmatch(line.text):
            if not ignored and not _CONSEQUENCES.search(line.text):
                errors.append(line)
            ignored = False
    reported = [line for line in errors if line.engine and line.level]
    return next(reversed(reported or errors), None)


def _said(root: Line, lines: list[Line]) -> str:
    """The error, with what stands beside it where it alone says nothing."""
    text = root.text
    if text.endswith((":", "validation error", "validation errors")) or "validation error for" in text:
        following = (line.text.strip() for line in lines[root.number : root.number + 3])
        text = " ".join([text, *(words for words in following if words and not words.startswith("For further"))])
    elif ":" not in text:
        before = (line.text.strip() for line in reversed(lines[max(0, root.number - 4) : root.number - 1]))
        text += f" at `{next((source for source in before if source.strip('^~ ')), '?')}`"
    return text


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
