"""The requests of a load's options, as `pdbench bench` would send them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import plan, prompts
from pdbench.load.traces import trace_of
from pdbench.plan.engine import Demand

REQUESTS = 1000
"""Requests of a prediction where the options do not say how many."""


def demand_of_load(config: LoadConfig, trial: int) -> Demand:
    """One trial's requests: the arrivals and lengths of `load.plan`, no texts. Raises UserError for options that contradict each other, or
    where lengths depend on texts."""
    if config.prompt_file or (config.input_tokens is None and not config.trace):
        raise UserError("prompt lengths must be known: give --input-tokens, or a --trace")
    plan.check(config)
    if plan.is_endless(config):
        raise UserError("a closed loop that ends by time has no known number of requests: give --requests")
    trace = trace_of(config) if config.trace else None
    instants = islice(plan.planned_instants(config, trace, trial), plan.request_limit(config))
    rows = [(at_s or 0.0, *lengths) for at_s, lengths in zip(instants, _lengths(config, trial), strict=False)]
    t_s, tokens, outputs, cached = zip(*rows, strict=True)
    return Demand(
        t_s=np.array(t_s),
        prompt_tokens=np.array(tokens, dtype=int),
        output_tokens=np.array(outputs, dtype=int),
        cached_tokens=np.array(cached, dtype=int),
        streams=plan.streams(config),
    )


def with_requests(config: LoadConfig) -> LoadConfig:
    """A load without a length gets one that is long enough to predict p99."""
    is_default = plan.request_limit(config) == plan.DEFAULT_REQUESTS and config.requests is None
    return replace(config, requests=REQUESTS) if is_default else config


def for_search(config: LoadConfig) -> LoadConfig:
    """A load without a length gets 10 s of its rate, so that queues can grow."""
    longer = with_requests(config)
    if longer is config or config.rate is None:
        return longer
    return replace(config, requests=min(max(REQUESTS, round(10 * config.rate)), 10 * REQUESTS))


def _lengths(config: LoadConfig, trial: int) -> Iterator[tuple[int, int, int]]:
    """(prompt tokens, output tokens, prompt tokens that a prefix cache has), by the seeds of `load.plan`.

    Of a group of prompts that share a prefix all but the first find it cached; blocks of a trace, those that came before.
    """
    trace = trace_of(config) if config.trace else None
    most_input, most_output = config.max_input_tokens, config.max_output_tokens
    seen: set[object] = set()
    index = 0
    while trace is None or index < len(trace.rows):
        seed = f"{config.seed}/{trial}/{index}"
        cached = 0
        if trace is not None:
            _, tokens, outputs, blocks = trace.rows[index]
            tokens = min(tokens, most_input or tokens)
            while blocks and cached < len(blocks) and blocks[cached] in seen:
                cached += 1
            seen.update(blocks or ())
            cached = min(tokens, cached * trace.block_tokens)
        else:
            assert config.input_tokens is not None
            tokens = prompts.length(config.input_tokens, config.input_distribution, config.input_spread, f"in/{seed}")
            tokens = min(tokens, most_input or tokens)
            outputs = prompts.length(
                config.output_tokens, config.output_distribution, config.output_spread, f"out/{seed}"
            )
            cached = round(tokens * config.shared_prefix) if index >= config.prefix_groups else 0
        outputs = 1 if config.phase == "prefill" else min(outputs, most_output or outputs)
        yield tokens, outputs, cached
        index += 1
