"""The requests of a load's options, as `pdbench bench` would send them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, takewhile

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
    instants = islice(plan.planned_instants(config, trial), plan.request_limit(config))
    rows = [(at_s or 0.0, *lengths) for at_s, lengths in zip(instants, _lengths(config, trial), strict=False)]
    t_s, *lengths = zip(*rows, strict=True)
    tokens, outputs, cached = np.array(lengths, dtype=int)
    streams = plan.streams(config)
    return Demand(t_s=np.array(t_s), prompt_tokens=tokens, output_tokens=outputs, cached_tokens=cached, streams=streams)


def with_requests(config: LoadConfig, *, least_s: float = 0.0) -> LoadConfig:
    """A load without a length gets one that is long enough to predict p99, and `least_s` of its rate (at most ten times as many requests)."""
    if plan.request_limit(config) != plan.DEFAULT_REQUESTS or config.requests is not None:
        return config
    return replace(config, requests=min(max(REQUESTS, round(least_s * (config.rate or 0.0))), 10 * REQUESTS))


def _lengths(config: LoadConfig, trial: int) -> Iterator[tuple[int, int, int]]:
    """Endless (prompt tokens, output tokens, prompt tokens that a prefix cache has), by the seeds of `load.plan`.

    Of a group of prompts that share a prefix all but the first find it cached; blocks of a trace, those that came before.
    """
    trace = trace_of(config) if config.trace else None
    seen: set[object] = set()
    for index in count():
        seed = f"{config.seed}/{trial}/{index}"
        if trace is not None:
            tokens, outputs, blocks = trace.row_within(1, config.max_input_tokens, index)
            cached = min(tokens, trace.block_tokens * sum(1 for _ in takewhile(seen.__contains__, blocks)))
            seen.update(blocks)
        else:
            assert config.input_tokens is not None
            tokens = prompts.length(config.input_tokens, config.input_distribution, config.input_spread, f"in/{seed}")
            tokens = min(tokens, config.max_input_tokens or tokens)
            outputs = prompts.length(
                config.output_tokens, config.output_distribution, config.output_spread, f"out/{seed}"
            )
            cached = round(tokens * config.shared_prefix) if index >= config.prefix_groups else 0
        yield tokens, 1 if config.phase == "prefill" else min(outputs, config.max_output_tokens or outputs), cached
