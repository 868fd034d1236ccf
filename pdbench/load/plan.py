"""The load as planned: an endless or finite row of requests, each with its arrival (None: when a stream is free) and prompt.

Pure in options, tokenizer and trial, so that every process of a split client makes the same plan and takes its share.
"""

import itertools
import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import arrivals, prompts
from pdbench.load.prompts import Tokenizer, load_tokenizer
from pdbench.records import Clock

DEFAULT_REQUESTS = 16
MOST_WARMUP = 64
_ANSWER_S = 2.0
"""How long an answer may take, for the number of requests in flight at a rate that nobody has measured yet."""
_TRACE_WARMUP = 16


@dataclass(frozen=True)
class TrialLoad:
    """What one trial sends, where to and on which clock: all that a client process needs to know."""

    config: LoadConfig
    url: str
    model: str
    clock: Clock
    trial: int = 0


@dataclass(frozen=True)
class PlannedRequest:
    """`arrival_s` counts from the load's start; `prompt_tokens` is None without a tokenizer.

    The first `shared_tokens` of the prompt are also in other requests' on purpose: a prefix cache may hold these, and no others.
    """

    index: int
    arrival_s: float | None
    prompt: str
    prompt_tokens: int | None
    output_tokens: int
    shared_tokens: int = 0


def check(config: LoadConfig) -> None:
    """Raise UserError for options that contradict each other; each one's range is checked where it is declared."""
    arrival_options = [name for name in ("rate", "stages", "trace") if getattr(config, name)]
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
    if config.phase == "decode" and (is_open_loop(config) or batch > (config.concurrency or 1)):
        raise UserError(
            "--phase decode measures one batch that decodes together: give --requests N --concurrency N alike, no --rate"
        )
    if config.shared_prefix and config.input_tokens is None:
        raise UserError("--shared-prefix needs --input-tokens, the length that it is a share of")
    for side in ("input", "output"):
        if getattr(config, f"{side}_distribution") == "uniform" and getattr(config, f"{side}_spread") > 1:
            raise UserError(
                f"--{side}-spread {getattr(config, f'{side}_spread'):g}: uniform lengths spread by 1 at most"
            )
    if (config.rate or config.stages) and next(planned_instants(config, None, 0), None) is None:
        raise UserError("this load sends no request: give a higher --rate, other --stages or a longer --duration-s")
    _extra_body(config)


def check_files(config: LoadConfig) -> None:
    """Raise UserError for a trace, prompt file or tokenizer that cannot be read; on a client's host, before servers start."""
    if config.trace:
        arrivals.read_trace(config.trace)
    if config.prompt_file:
        prompts.read_prompt_file(Path(config.prompt_file))
    if config.tokenizer:
        find_tokenizer(config, config.tokenizer)


def resolved(config: LoadConfig) -> LoadConfig:
    """The same load with what is decided at its start: the nonce is drawn, warm-up and requests are counted."""
    nonce = secrets.token_hex(4) if config.nonce is None else config.nonce
    requests = config.requests or (None if _ends_by_arrivals(config) else DEFAULT_REQUESTS)
    return replace(config, nonce=nonce, warmup=warmup_size(config), requests=requests)


def describe(config: LoadConfig) -> str:
    """A resolved load in one line: arrivals, end, warm-up and nonce."""
    if config.trace:
        words = [f"trace {Path(config.trace).name}"]
    elif config.stages:
        words = [f"stages {config.stages} (requests/s:s)"]
    elif config.rate:
        words = [f"{config.rate:g}{f' to {config.ramp_to:g}' if config.ramp_to else ''} requests/s"]
    else:
        words = [f"{config.concurrency or 1} at a time"]
    if is_open_loop(config) and config.concurrency:
        words.append(f"at most {config.concurrency} at a time")
    limit = request_limit(config)
    if config.steady_s is not None:
        words.append(f"until it holds steady for {config.steady_s:g} s")
    elif config.duration_s is not None:
        words.append(f"for {config.duration_s:g} s")
    else:
        words.append("to its end" if limit is None else f"{limit} requests")
    return ", ".join([*words, f"after a warm-up of {warmup_size(config)}, nonce {config.nonce}"])


def warmup_size(config: LoadConfig) -> int:
    """How many requests warm up; by default as many as will be in flight, so that no batch size is met first in the load."""
    if config.warmup is not None:
        return config.warmup
    if not is_open_loop(config):
        return max(2, config.concurrency or 1)
    stages = arrivals.read_stages(config.stages) if config.stages else []
    rates = [config.rate or 0.0, config.ramp_to or 0.0, *(rate for rate, _ in stages)]
    in_flight = math.ceil(_ANSWER_S * max(rates)) or _TRACE_WARMUP
    return min(config.concurrency or MOST_WARMUP, MOST_WARMUP, max(2, in_flight))


def request_limit(config: LoadConfig) -> int | None:
    """How many requests are measured; None where time or the arrivals end the load."""
    if config.duration_s is not None or config.steady_s is not None:
        return None
    return config.requests or (None if _ends_by_arrivals(config) else DEFAULT_REQUESTS)


def _ends_by_arrivals(config: LoadConfig) -> bool:
    return bool(config.trace or config.stages or config.ramp_to)


def is_open_loop(config: LoadConfig) -> bool:
    """Do requests arrive by a clock (rate, stages, trace), or each when an earlier one has ended?"""
    return bool(config.rate or config.stages or config.trace)


def is_endless(config: LoadConfig) -> bool:
    """Does sending go on until a time has passed, whatever the number of requests?"""
    if is_open_loop(config) and config.duration_s is not None:
        return False
    return config.duration_s is not None or config.steady_s is not None


def streams(config: LoadConfig) -> int | None:
    """Most requests in flight at once; None is no limit."""
    return config.concurrency if is_open_loop(config) else config.concurrency or 1


def planned_requests(config: LoadConfig, tokenizer: Tokenizer | None, trial: int) -> Iterator[PlannedRequest]:
    """The measured requests in order. Endless only where a closed loop ends by time."""
    rows = arrivals.read_trace(config.trace) if config.trace else None
    contents = _contents(config, tokenizer, trial, rows=rows)
    planned = zip(planned_instants(config, rows, trial), contents, strict=False)
    for index, (arrival_s, content) in enumerate(itertools.islice(planned, request_limit(config))):
        yield PlannedRequest(index, arrival_s, *content)


def warmup_requests(config: LoadConfig, tokenizer: Tokenizer | None, trial: int) -> list[PlannedRequest]:
    """The requests before the measured ones: other numbers and texts, the same lengths.

    They begin one after the other within 0.2 s, so that batches grow to their largest; the rest follow when a stream is free.
    """
    contents, count = _contents(config, tokenizer, trial, "warmup-"), warmup_size(config)
    at_once = min(count, streams(config) or count)
    gap_s = min(0.01, 0.2 / at_once) if count else 0.0
    return [PlannedRequest(index, min(index, at_once) * gap_s, *next(contents)) for index in range(count)]


def request_body(config: LoadConfig, model: str, request: PlannedRequest, *, token_ids: bool) -> bytes:
    """The JSON body of one request."""
    chat = config.endpoint == "chat"
    body: dict[str, Any] = {
        "model": model,
        "messages" if chat else "prompt": [{"role": "user", "content": request.prompt}] if chat else request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if token_ids:
        body["return_token_ids"] = True
    ignore_eos = config.ignore_eos
    if ignore_eos or (ignore_eos is None and (config.input_tokens or config.trace or config.phase != "both")):
        body["ignore_eos"] = True
    return msgspec.json.encode(body | _extra_body(config))


def find_tokenizer(config: LoadConfig, model: str) -> Tokenizer | None:
    """The tokenizer that measures prompts; the hub is asked only where lengths must be exact.

    Raises UserError where lengths must be exact and there is none.
    """
    needed = bool(config.input_tokens or config.trace or config.reply_lengths or config.tokenizer)
    name = config.tokenizer or model
    tokenizer = load_tokenizer(name, hub=needed)
    if needed and tokenizer is None:
        raise UserError(
            f"no tokenizer.json for {name} here or on the model hub: give --tokenizer FOLDER, prompt lengths are exact by the "
            "model's tokenizer"
        )
    return tokenizer


def planned_instants(config: LoadConfig, rows: list[arrivals.TraceRow] | None, trial: int) -> Iterator[float | None]:
    """When each request is due, in seconds of the load; None is when a stream is free. A rate's end at --duration-s, a ramp's at its top."""
    end_s = config.duration_s
    if end_s is None and config.requests is None and config.steady_s is None and config.ramp_to:
        end_s = config.ramp_s
    for arrival_s in _instants(config, rows, trial):
        if arrival_s is not None and end_s is not None and arrival_s >= end_s:
            return
        yield arrival_s


def _instants(config: LoadConfig, rows: list[arrivals.TraceRow] | None, trial: int) -> Iterator[float | None]:
    seed = f"{config.seed}/{trial}"
    if rows:
        return (row.arrival_s * config.time_scale for row in rows)
    if config.stages:
        return arrivals.staged(arrivals.read_stages(config.stages), seed)
    if config.rate is None:
        return itertools.repeat(None)
    if config.ramp_to is not None:
        return arrivals.ramp(config.rate, config.ramp_to, config.ramp_s, seed)
    if config.arrival == "constant":
        return arrivals.constant(config.rate)
    if config.arrival == "gamma":
        return arrivals.gamma(config.rate, config.burstiness, seed)
    return arrivals.poisson(config.rate, seed)


def _contents(
    config: LoadConfig,
    tokenizer: Tokenizer | None,
    trial: int,
    part: str = "",
    rows: list[arrivals.TraceRow] | None = None,
) -> Iterator[tuple[str, int | None, int, int]]:
    """(prompt, its tokens, tokens to generate, tokens shared on purpose) of a trial or its warm-up; endless without a trace.

    Lengths depend on the seed alone, texts on the nonce too. What prompts share, they share within their trial and its warm-up.
    """
    group = f"{config.seed}/{config.nonce}/{trial}"
    seen: set[Any] = set()
    texts = prompts.read_prompt_file(Path(config.prompt_file)) if config.prompt_file and not rows else None
    for index in range(len(rows)) if rows else itertools.count():
        seed, text_seed = f"{config.seed}/{part}{trial}/{index}", f"{config.seed}/{config.nonce}/{part}{trial}/{index}"
        tokens: int | None = None
        shared = 0
        output_tokens = prompts.length(
            config.output_tokens, config.output_distribution, config.output_spread, f"out/{seed}"
        )
        if rows:
            assert tokenizer is not None, "find_tokenizer gives one whenever lengths must be exact"
            _, tokens, output_tokens, blocks = rows[index]
            tokens = min(tokens, config.max_input_tokens or tokens)
            if blocks:
                blocks = blocks[: max(1, math.ceil(tokens / arrivals.MOONCAKE_BLOCK_TOKENS))]
                text = prompts.of_blocks(tokens, blocks, arrivals.MOONCAKE_BLOCK_TOKENS, group, tokenizer)
                known = len(list(itertools.takewhile(seen.__contains__, blocks)))
                shared = min(tokens, known * arrivals.MOONCAKE_BLOCK_TOKENS)
                seen.update(blocks)
            else:
                text = prompts.of_length(tokens, text_seed, tokenizer)
        elif texts:
            text, reply = texts[index % len(texts)]
            if not config.verbatim_prompts:
                text = f"{prompts.number(text_seed)}\n{text}"
            if config.reply_lengths and reply and tokenizer:
                output_tokens = max(1, tokenizer.count(reply))
            if config.max_input_tokens and tokenizer and tokenizer.count(text) > config.max_input_tokens:
                text = tokenizer.cut(text, config.max_input_tokens)
        elif config.input_tokens is not None:
            assert tokenizer is not None, "find_tokenizer gives one whenever lengths must be exact"
            tokens = prompts.length(config.input_tokens, config.input_distribution, config.input_spread, f"in/{seed}")
            tokens = min(tokens, config.max_input_tokens or tokens)
            prefix = f"{group}/{index % config.prefix_groups}"
            text = prompts.of_length(tokens, text_seed, tokenizer, shared=config.shared_prefix, group=prefix)
            shared = round(tokens * config.shared_prefix)
        else:
            text = prompts.built_in(index, text_seed)
        if tokens is None and tokenizer:
            tokens = tokenizer.count(text)
        output_tokens = min(output_tokens, config.max_output_tokens or output_tokens)
        yield text, tokens, 1 if config.phase == "prefill" else output_tokens, shared


def _extra_body(config: LoadConfig) -> dict[str, Any]:
    if not config.extra_body:
        return {}
    try:
        extra = json.loads(config.extra_body)
    except ValueError as error:
        raise UserError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise UserError("--extra-body must be a JSON object, as in '{\"top_k\": 1}'")
    return extra
