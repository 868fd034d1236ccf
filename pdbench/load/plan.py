"""The load as planned: an endless or finite row of requests, each with its arrival (None: when a stream is free) and prompt.

Pure in options, tokenizer and trial, so that every process of a split client makes the same plan and takes its share.
"""

import itertools
import json
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdbench.config import LoadConfig, flag_of
from pdbench.errors import UserError, span
from pdbench.load import arrivals, prompts, request_fields
from pdbench.load.input_files import read_duration
from pdbench.load.prompts import FilePrompt, prompt_file_of
from pdbench.load.request_fields import Prompt
from pdbench.load.tokenizer import Tokenizer, load_tokenizer, server_tokenizer, template_tokens
from pdbench.load.traces import read_trace, trace_of
from pdbench.records import Clock, Flag

DEFAULT_REQUESTS = 16
MOST_WARMUP = 64
_ANSWER_S = 2.0
"""How long an answer may take, for the number of requests in flight at a rate that nobody has measured yet."""
_TRACE_WARMUP = 16
_LONG_PAUSE_S = 60.0


@dataclass(frozen=True)
class TrialLoad:
    """What one trial sends, where to and on which clock: all that a client process needs to know."""

    config: LoadConfig
    url: str
    model: str
    clock: Clock
    trial: int = 0
    canaries: tuple[int, ...] = ()  # their places among the measured requests


@dataclass(frozen=True)
class PlannedRequest:
    """`arrival_s` counts from the load's start; `prompt_tokens` is None without a tokenizer.

    The first `shared_tokens` of the prompt are also in other requests' on purpose: a prefix cache may hold these, and no others.
    """

    index: int
    arrival_s: float | None
    prompt: Prompt
    prompt_tokens: int | None
    output_tokens: int
    shared_tokens: int = 0

    @property
    def text(self) -> str:
        """The prompt, or its token ids as they are sent."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


def check(config: LoadConfig) -> None:
    """Raise UserError for options that contradict each other; each one's range is checked where it is declared."""
    arrival_options = [name for name in ("rate", "stages", "trace") if getattr(config, name)]
    if config.trace and config.prompt_file:
        raise UserError("--trace and --prompt-file both set the prompts: give one")
    if len(arrival_options) > 1:
        raise UserError(f"--{arrival_options[0]} and --{arrival_options[1]} both set the arrivals: give one")
    if config.ramp_to is not None and config.rate is None:
        raise UserError("--ramp-to needs --rate, the rate it starts from")
    limit = streams(config)
    if limit is not None and config.client_processes > limit:
        raise UserError(f"--client-processes {config.client_processes} is more than --concurrency {limit}")
    if config.steady_s is not None and config.client_processes > 1:
        raise UserError("--steady-s needs one client process, which sees the whole load: use --duration-s")
    batch = config.requests or DEFAULT_REQUESTS
    if config.phase == "decode" and (config.open_loop or batch > (config.concurrency or 1)):
        raise UserError(
            "--phase decode measures one batch that decodes together: give --requests N --concurrency N alike, no --rate"
        )
    if config.shared_prefix and config.input_tokens is None:
        raise UserError("--shared-prefix needs --input-tokens, the length that it is a share of")
    for side in ("input", "output"):
        spread = getattr(config, f"{side}_spread")
        if getattr(config, f"{side}_distribution") == "uniform" and spread > 1:
            raise UserError(f"--{side}-spread {spread:g}: uniform lengths spread by 1 at most")
    if (config.rate or config.stages) and next(planned_instants(config, 0), None) is None:
        raise UserError("this load sends no request: give a higher --rate, other --stages or a longer --duration-s")
    for name in ("trace_from", "trace_for", "trace_unit", "trace_block_tokens"):
        value, option = getattr(config, name), flag_of(name)
        if value is not None and not config.trace:
            raise UserError(f"{option} needs --trace")
        if name in ("trace_from", "trace_for") and value is not None:
            read_duration(option, value)
    request_fields.extra_body(config)


def check_files(config: LoadConfig) -> None:
    """Raise UserError for a trace, prompt file or tokenizer that cannot be read; on a client's host, before servers start."""
    if config.trace:
        trace_of(config)
    if config.prompt_file:
        prompt_file_of(config)
    if config.tokenizer:
        find_tokenizer(config, config.tokenizer)


def resolved(config: LoadConfig) -> LoadConfig:
    """The same load with what is decided at its start: the nonce is drawn, warm-up and requests are counted."""
    nonce = secrets.token_hex(4) if config.nonce is None else config.nonce
    requests = request_limit(replace(config, duration_s=None, steady_s=None))
    return replace(config, nonce=nonce, warmup=warmup_size(config), requests=requests)


def describe(config: LoadConfig) -> str:
    """A resolved load in one line: arrivals, end, lengths, warm-up and nonce."""
    file_words = describe_files(config)
    if config.trace:
        words = ["; ".join(file_words) or f"trace {Path(config.trace).name}"]
    elif config.open_loop:
        words = arrivals.describe(config)
    else:
        words = [f"{config.concurrency or 1} at a time"]
    if config.open_loop and config.concurrency:
        words.append(f"at most {config.concurrency} at a time")
    limit = request_limit(config)
    if config.steady_s is not None:
        words.append(f"until it holds steady for {config.steady_s:g} s")
    elif config.duration_s is not None:
        words.append(f"for {config.duration_s:g} s")
    else:
        words.append("to its end" if limit is None else f"{limit:,} requests")
    if config.prompt_file and file_words:
        words.append("; ".join(file_words))
    words += prompts.describe_lengths(config)
    return ", ".join([*words, f"after a warm-up of {warmup_size(config)}, nonce {config.nonce}"])


def warmup_size(config: LoadConfig) -> int:
    """How many requests warm up; by default as many as will be in flight, so that no batch size is met first in the load."""
    if config.warmup is not None:
        return config.warmup
    if not config.open_loop:
        return max(2, config.concurrency or 1)
    stages = arrivals.read_stages(config.stages) if config.stages else []
    rates = [config.rate or 0.0, config.ramp_to or 0.0, *(rate for rate, *_ in stages)]
    in_flight = math.ceil(_ANSWER_S * max(rates)) or _TRACE_WARMUP
    return min(config.concurrency or MOST_WARMUP, MOST_WARMUP, max(2, in_flight))


def request_limit(config: LoadConfig) -> int | None:
    """How many requests are measured; None where time or the arrivals end the load."""
    if config.duration_s is not None or config.steady_s is not None:
        return None
    return config.requests or (None if config.trace or config.stages or config.ramp_to else DEFAULT_REQUESTS)


def rows_too_long(config: LoadConfig, max_model_len: int | None) -> str | None:
    """What to say of a trace's rows that the model cannot take; None where it takes all, and where the trace is another node's file.

    Raises UserError where it takes none.
    """
    if not config.trace or not Path(config.trace).exists() or max_model_len is None:
        return None
    totals = [
        min(row.input_tokens, config.max_input_tokens or row.input_tokens)
        + min(row.output_tokens, config.max_output_tokens or row.output_tokens)
        for row in trace_of(config).rows[: request_limit(config)]
    ]
    count = sum(total > max_model_len for total in totals)
    words = (
        f"{count} of {len(totals)} rows of the trace have more than the {max_model_len} tokens that the model takes (up to {max(totals)}): "
        "cap them with --max-input-tokens and --max-output-tokens, or serve with a larger --max-model-len"
    )
    if count == len(totals):
        raise UserError(words)
    return words if count else None


def describe_files(config: LoadConfig) -> list[str]:
    """What is sent of the trace or prompt file: which rows, over what time, at what mean rate; what was left out."""
    limit = request_limit(config)
    try:
        file = prompt_file_of(config) if config.prompt_file else None
        trace = trace_of(config) if config.trace else None
    except UserError:  # `check_files` raised it before, or it is another node's file
        return []
    if file:
        words = f"prompt file {file.name}: {len(file.prompts):,} of {file.total:,} {file.unit} used"
        return [words + (f", for {limit:,} requests" if limit and limit > len(file.prompts) else ""), *file.notes]
    if not config.trace or not trace:
        return []

    def mean_rate(instants: Sequence[float]) -> float | None:
        length_s = instants[-1] - instants[0] if instants else 0.0
        return (len(instants) - 1) / length_s if length_s > 0 else None

    instants = [row.arrival_s * config.time_scale for row in trace.rows[:limit]]
    if config.duration_s is not None:
        instants = [at_s for at_s in instants if at_s < config.duration_s]
    words = f"trace {trace.name} ({trace.format}): {len(instants):,} of {trace.total:,} rows"
    if config.trace_from:
        words += f" from {span(read_duration('--trace-from', config.trace_from))} on"
    rate = mean_rate(instants)
    if rate is not None:
        words += f" over {span(instants[-1] - instants[0])}, mean {rate:.3g} requests/s"
    elif len(instants) > 1:
        words += ", all at once"
    notes = []
    whole = read_trace(config.trace, config.trace_unit, config.trace_block_tokens).rows
    whole_rate = mean_rate([row.arrival_s * config.time_scale for row in whole])
    if whole_rate and len(instants) < len(whole):  # the head of a trace is seldom its load
        notes.append(f"the whole trace has {whole_rate:.3g} requests/s")
    pause_s = max((later - earlier for earlier, later in itertools.pairwise([0.0, *instants])), default=0.0)
    if pause_s > _LONG_PAUSE_S:
        notes.append(f"longest pause {span(pause_s)}")
    return [words, *notes, *trace.notes]


def request_count(config: LoadConfig, trial: int) -> int:
    """How many requests a trial that is not endless will measure."""
    return sum(1 for _ in itertools.islice(planned_instants(config, trial), request_limit(config)))


def is_endless(config: LoadConfig) -> bool:
    """Does sending go on until a time has passed, whatever the number of requests?"""
    return config.steady_s is not None if config.duration_s is None else not config.open_loop


def streams(config: LoadConfig) -> int | None:
    """Most requests in flight at once; None is no limit."""
    return config.concurrency if config.open_loop else config.concurrency or 1


def planned_requests(
    config: LoadConfig, tokenizer: Tokenizer | None, trial: int, client: int = 0, clients: int = 1
) -> Iterator[PlannedRequest]:
    """The measured requests in order; of several clients in an open loop every `clients`-th, in a closed loop those of a client's streams
    (stream s is client s's, modulo `clients`). Endless only where a closed loop ends by time."""
    instants = enumerate(itertools.islice(planned_instants(config, trial), request_limit(config)))
    count = None if config.open_loop else config.concurrency or 1
    mine = ((index, at_s) for index, at_s in instants if (index % count if count else index) % clients == client)
    return _planned(config, tokenizer, trial, mine)


def requests_at(config: LoadConfig, tokenizer: Tokenizer | None, trial: int, at: Sequence[int]) -> list[PlannedRequest]:
    """The measured requests at these places, without their arrivals."""
    return list(_planned(config, tokenizer, trial, ((index, None) for index in at)))


def warmup_requests(
    config: LoadConfig, tokenizer: Tokenizer | None, trial: int, client: int = 0, clients: int = 1
) -> list[PlannedRequest]:
    """The requests before the measured ones, as `planned_requests`: other numbers and texts, the same lengths.

    They begin one after the other within 0.2 s, so that batches grow to their largest; the rest follow when a stream is free.
    """
    count = warmup_size(config)
    at_once = min(count, streams(config) or count)
    gap_s = min(0.01, 0.2 / at_once) if count else 0.0
    arrivals_s = ((index, min(index, at_once) * gap_s) for index in range(client, count, clients))
    return list(_planned(config, tokenizer, trial, arrivals_s, "warmup-"))


def load_tokenizer_for(load: TrialLoad) -> tuple[Tokenizer | None, list[Flag]]:
    """The tokenizer that measures a load's prompts, on the chat endpoint with its template; a flag where that is not known."""
    config = load.config
    tokenizer = find_tokenizer(config, load.model, load.url)
    if tokenizer is None or config.endpoint != "chat" or not (config.input_tokens or config.trace):
        return tokenizer, []
    added = template_tokens(load.url, load.model, tokenizer, config, request_fields.extra_body(config))
    if added is None:
        detail = (
            "prompts have the tokens that were asked for plus those of the chat template, which neither the server's /tokenize nor "
            "its usage tells"
        )
        return tokenizer.for_chat(0), [Flag("chat-template-unknown", detail)]
    if config.input_tokens is not None and config.input_tokens <= added:
        tokens = config.input_tokens
        raise UserError(f"--input-tokens {tokens}: the chat template alone has {added} tokens, ask for more")
    return tokenizer.for_chat(added), []


def find_tokenizer(config: LoadConfig, model: str, url: str | None = None) -> Tokenizer | None:
    """The tokenizer that measures prompts: tokenizer.json of a folder or the hub, else the one of the server at `url`.

    The hub and the server are asked only where lengths must be exact. Raises UserError where they must and there is none.
    """
    needed = bool(config.input_tokens or config.trace or config.reply_lengths or config.tokenizer)
    name = config.tokenizer or model
    tokenizer = load_tokenizer(name, hub=needed)
    if needed and tokenizer is None and url is not None:
        tokenizer = server_tokenizer(url, model, verify_tls=config.tls_verify)
    if needed and tokenizer is None:
        server = "" if url is None else f", and {url} has no /tokenize"
        raise UserError(
            f"no tokenizer.json for {name} here or on the model hub{server}: give --tokenizer FOLDER, prompt lengths are exact by "
            "the model's tokenizer"
        )
    return tokenizer


def planned_instants(config: LoadConfig, trial: int) -> Iterator[float | None]:
    """When each request is due, in seconds of the load; None is when a stream is free. A rate's end at --duration-s, a ramp's at its top."""
    seed, end_s = f"{config.seed}/{trial}", config.duration_s
    instants: Iterator[float]
    if config.trace:
        instants = (row.arrival_s * config.time_scale for row in trace_of(config).rows)
    elif config.stages:
        instants = arrivals.changing(arrivals.read_stages(config.stages), seed)
    elif config.rate is None:
        return itertools.repeat(None)
    elif config.ramp_to is not None:
        top = config.ramp_to
        instants = arrivals.changing([(config.rate, top, config.ramp_s), (top, top, math.inf)], seed)
        if end_s is None and config.requests is None and config.steady_s is None:
            end_s = config.ramp_s
    elif config.arrival == "constant":
        instants = arrivals.constant(config.rate)
    else:
        rate, burstiness = config.rate, config.burstiness if config.arrival == "gamma" else 1.0
        instants = arrivals.gamma(rate, burstiness, seed)
        if config.steady_s is None:
            span_s = config.duration_s or (config.requests or DEFAULT_REQUESTS) / rate
            instants = arrivals.scaled(instants, round(span_s * rate), span_s)
    return itertools.takewhile(lambda at_s: end_s is None or at_s < end_s, instants)


def _planned(
    config: LoadConfig,
    tokenizer: Tokenizer | None,
    trial: int,
    arrivals_s: Iterable[tuple[int, float | None]],
    part: str = "",
) -> Iterator[PlannedRequest]:
    """The requests at these (place, arrival), in ascending order, of a trial or its warm-up.

    Lengths depend on the seed alone, texts on the nonce too. What prompts share, they share within their trial and its warm-up.
    """
    group = f"{config.seed}/{config.nonce}/{trial}"
    trace = trace_of(config) if config.trace and not part else None
    seen, seen_rows = set[Any](), 0
    texts: list[FilePrompt] = prompt_file_of(config).prompts if config.prompt_file else []
    output = config.output_tokens, config.output_distribution, config.output_spread
    text: Prompt
    for index, arrival_s in arrivals_s:
        seed, text_seed = f"{config.seed}/{part}{trial}/{index}", f"{config.seed}/{config.nonce}/{part}{trial}/{index}"
        tokens: int | None = None
        shared, most = 0, config.max_input_tokens
        output_tokens = prompts.length(*output, f"out/{seed}")
        if trace:
            assert tokenizer is not None, "find_tokenizer gives one whenever lengths must be exact"
            # A row may be shorter than what the server adds to every prompt.
            tokens, output_tokens, blocks = trace.row_within(tokenizer.added + 1, most, index)
            if blocks:
                size = trace.block_tokens
                for earlier in range(seen_rows, index):
                    seen.update(trace.row_within(tokenizer.added + 1, most, earlier)[2])
                seen_rows = index
                ids = config.endpoint == "completions"
                text = prompts.of_blocks(tokens, blocks, size, group, text_seed, tokenizer, may_be_ids=ids)
                shared = min(tokens, size * sum(1 for _ in itertools.takewhile(seen.__contains__, blocks)))
            else:
                text = prompts.of_length(tokens, text_seed, tokenizer)
        elif texts:
            text, reply = texts[index % len(texts)]
            if config.reply_lengths and reply and tokenizer:
                output_tokens = max(1, tokenizer.count(reply))
            if not isinstance(text, str):  # token ids go as they are
                text = text[:most]
                tokens = len(text)
            elif not config.verbatim_prompts:
                text = f"{prompts.number(text_seed)}\n{text}"
            if isinstance(text, str) and most and tokenizer and tokenizer.count(text) > most:
                text = tokenizer.cut(text, most)
        elif config.input_tokens is not None:
            assert tokenizer is not None, "find_tokenizer gives one whenever lengths must be exact"
            tokens = prompt_length(config, seed)
            if config.input_distribution != "fixed":
                tokens = max(tokens, tokenizer.added + 1)
            prefix = f"{group}/{index % config.prefix_groups}"
            text = prompts.of_length(tokens, text_seed, tokenizer, shared=config.shared_prefix, group=prefix)
            shared = round(tokens * config.shared_prefix)
        else:
            text = prompts.built_in(index, text_seed)
        if tokens is None and tokenizer and isinstance(text, str):
            tokens = tokenizer.count(text)
        most_output = 1 if config.phase == "prefill" else config.max_output_tokens
        output_tokens = min(output_tokens, most_output or output_tokens)
        yield PlannedRequest(index, arrival_s, text, tokens, output_tokens, shared)


def prompt_length(config: LoadConfig, seed: str) -> int:
    """Tokens of a prompt by the load's distribution, cut as --max-input-tokens says."""
    assert config.input_tokens is not None
    tokens = prompts.length(config.input_tokens, config.input_distribution, config.input_spread, f"in/{seed}")
    return min(tokens, config.max_input_tokens or tokens)
