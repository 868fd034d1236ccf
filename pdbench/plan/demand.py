"""The requests of a load's options, as `pdbench bench` would send them."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np

from pdbench.config import LoadConfig, dropped_fields
from pdbench.errors import UserError
from pdbench.load import plan, prompts
from pdbench.load.traces import trace_of
from pdbench.plan.engine import Demand, known_first

REQUESTS = 1000
"""Requests of a prediction where the options do not say how many."""


def demand_of_load(config: LoadConfig, trial: int) -> Demand:
    """One trial's requests: the arrivals and lengths of `load.plan`, no texts. Raises UserError for options that contradict each other, or
    where lengths depend on texts."""
    if config.prompt_file or (config.input_tokens is None and not config.trace):
        raise UserError("prompt lengths must be known: give --input-tokens, or a --trace")
    plan.check(config)
    if option := next((option for option, is_given in _unknown(config).items() if is_given), None):
        raise UserError(f"{option}: what plan predicts are whole answers of --output-tokens each: leave it out")
    if plan.is_endless(config) or config.steady_s is not None:
        what = "--steady-s" if config.steady_s is not None else "a closed loop's --duration-s"
        raise UserError(f"{what} ends a load by time, after an unknown number of requests: give --requests instead")
    instants = islice(plan.planned_instants(config, trial), plan.request_limit(config))
    rows = [(at_s or 0.0, *lengths) for at_s, lengths in zip(instants, _lengths(config, trial), strict=False)]
    t_s, *lengths, blocks = zip(*rows, strict=True)
    tokens, outputs, cached, block_tokens = np.array(lengths, dtype=int)
    return Demand(
        t_s=np.array(t_s),
        prompt_tokens=tokens,
        output_tokens=outputs,
        cached_tokens=cached,
        streams=plan.streams(config),
        timeout_s=config.request_timeout_s,
        blocks=blocks if any(blocks) else None,
        block_tokens=block_tokens,
        warm_blocks=_warm_blocks(config),
    )


def _unknown(config: LoadConfig) -> dict[str, bool]:
    """Option -> does it make answers others than their lengths say, or measure a part of them?"""
    stops = '"max_tokens"', '"max_completion_tokens"', '"n"', '"best_of"', '"stop"', '"stop_token_ids"', '"ignore_eos"'
    return {
        "--phase decode": config.phase == "decode",
        "--no-ignore-eos": config.ignore_eos is False,
        "--extra-body": any(name in config.extra_body for name in stops),
        "--drop-fields": not {config.max_tokens_field, "ignore_eos"}.isdisjoint(dropped_fields(vars(config))),
    }


def with_requests(config: LoadConfig, *, least_s: float = 0.0) -> LoadConfig:
    """A load without a length gets one that is long enough to predict p99, and `least_s` of its rate (at most ten times as many requests)."""
    if plan.request_limit(config) != plan.DEFAULT_REQUESTS or config.requests is not None:
        return config
    return replace(config, requests=min(max(REQUESTS, round(least_s * (config.rate or 0.0))), 10 * REQUESTS))


def _warm_blocks(config: LoadConfig) -> list[tuple[int]]:
    """The groups of the warm-up's prompts that share a prefix; a trace's blocks are new to the load."""
    count = plan.warmup_size(config) if config.shared_prefix and not config.trace else 0
    return [(index % config.prefix_groups,) for index in range(count)]


def _lengths(config: LoadConfig, trial: int) -> Iterator[tuple[int, int, int, int, Sequence[Hashable]]]:
    """Endless (prompt tokens, output tokens, prompt tokens that one prefix cache of all has, prompt tokens of a block, blocks that are shared), by
    the seeds of `load.plan`.

    Of a group of prompts that share a prefix all but the first, warm-up included, find it cached; blocks of a trace, those that came before.
    """
    trace = trace_of(config) if config.trace else None
    seen: set[object] = {group for groups in _warm_blocks(config) for group in groups}
    for index in count():
        seed = f"{config.seed}/{trial}/{index}"
        if trace is not None:
            tokens, outputs, blocks = trace.row_within(1, config.max_input_tokens, index)
            blocks, block_tokens = tuple(blocks), trace.block_tokens
        else:
            assert config.input_tokens is not None
            tokens = prompts.length(config.input_tokens, config.input_distribution, config.input_spread, f"in/{seed}")
            tokens = min(tokens, config.max_input_tokens or tokens)
            outputs = prompts.length(
                config.output_tokens, config.output_distribution, config.output_spread, f"out/{seed}"
            )
            block_tokens = round(tokens * config.shared_prefix)
            blocks = (index % config.prefix_groups,) if block_tokens else ()
        cached = min(tokens, block_tokens * known_first(blocks, seen))
        outputs = 1 if config.phase == "prefill" else min(outputs, config.max_output_tokens or outputs)
        yield tokens, outputs, cached, block_tokens, blocks
