"""The files that a load names, read as its options say, and what is sent of them in words."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load.prompt_files import PromptFile, read_prompt_file
from pdbench.load.trace_fields import read_duration, span
from pdbench.load.traces import Trace, read_trace

_LONG_PAUSE_S = 60.0


def trace_of(config: LoadConfig) -> Trace:
    """The part of --trace that is replayed. Raises UserError."""
    assert config.trace is not None
    trace = read_trace(config.trace, config.trace_unit, config.trace_block_tokens)
    if config.trace_from is None and config.trace_for is None:
        return trace
    from_s = read_duration("--trace-from", config.trace_from or "0")
    return trace.part(from_s, None if config.trace_for is None else read_duration("--trace-for", config.trace_for))


def prompt_file_of(config: LoadConfig) -> PromptFile:
    """The prompts of --prompt-file. Raises UserError."""
    assert config.prompt_file is not None
    file = read_prompt_file(Path(config.prompt_file))
    if config.endpoint == "chat" and any(not isinstance(each.prompt, str) for each in file.prompts):
        raise UserError(f"--prompt-file {file.name} holds token ids, which a chat cannot take: --endpoint completions")
    return file


def rows_too_long(config: LoadConfig, limit: int | None, max_model_len: int) -> tuple[int, int, int]:
    """(rows of the trace that a model of this length cannot take, all rows that are sent, tokens of the longest)."""
    totals = [
        min(row.input_tokens, config.max_input_tokens or row.input_tokens)
        + min(row.output_tokens, config.max_output_tokens or row.output_tokens)
        for row in trace_of(config).rows[:limit]
    ]
    return sum(total > max_model_len for total in totals), len(totals), max(totals)


def _mean_rate(instants: Sequence[float]) -> float | None:
    """Requests per second; None for fewer than two instants."""
    length_s = instants[-1] - instants[0] if instants else 0.0
    return (len(instants) - 1) / length_s if length_s > 0 else None


def describe(config: LoadConfig, limit: int | None) -> list[str]:
    """What `limit` requests (None: all) send of the file: which rows, over what time, at what mean rate; what was left out."""
    if config.trace:
        trace = trace_of(config)
        instants = [row.arrival_s * config.time_scale for row in trace.rows[:limit]]
        if config.duration_s is not None:
            instants = [at_s for at_s in instants if at_s < config.duration_s]
        words = f"trace {trace.name} ({trace.format}): {len(instants):,} of {trace.total:,} rows"
        if config.trace_from:
            words += f" from {span(read_duration('--trace-from', config.trace_from))} on"
        rate = _mean_rate(instants)
        if rate is not None:
            words += f" over {span(instants[-1] - instants[0])}, mean {rate:.3g} requests/s"
        elif len(instants) > 1:
            words += ", all at once"
        whole = read_trace(config.trace, config.trace_unit, config.trace_block_tokens).rows
        whole_rate = _mean_rate([row.arrival_s * config.time_scale for row in whole])
        # The head of a trace is seldom its load.
        notes = (
            [f"the whole trace has {whole_rate:.3g} requests/s"] if whole_rate and len(instants) < len(whole) else []
        )
        pause_s = max((later - earlier for earlier, later in itertools.pairwise([0.0, *instants])), default=0.0)
        if pause_s > _LONG_PAUSE_S:
            notes.append(f"longest pause {span(pause_s)}")
        return [words, *notes, *trace.notes]
    if config.prompt_file:
        file = prompt_file_of(config)
        words = f"prompt file {file.name}: {len(file.prompts):,} of {file.total:,} {file.unit} used"
        if limit and limit > len(file.prompts):
            words += f", for {limit:,} requests"
        return [words, *file.notes]
    return []
