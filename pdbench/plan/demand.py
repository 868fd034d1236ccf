"""The requests of a load's options, as `pdbench bench` would send them."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np

from pdbench.analysis.arrivals import IntArray
from pdbench.config import LoadConfig, dropped_fields
from pdbench.errors import UserError
from pdbench.load import plan, prompts
from pdbench.load.traces import trace_of
from pdbench.plan.engine import Demand
from pdbench.plan.prefixes import PrefixCache

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
    tokens, outputs, block_tokens = np.array(lengths, dtype=int)
    warm = _warm_blocks(config, trial)
    return Demand(
        t_s=np.array(t_s),
        prompt_tokens=tokens,
        output_tokens=outputs,
        cached_tokens=_cached_tokens(blocks, block_tokens.tolist(), tokens.tolist(), warm),
        streams=plan.streams(config),
        timeout_s=config.request_timeout_s,
        blocks=blocks if any(blocks) else None,
        block_tokens=block_tokens,
        warm_blocks=warm,
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


def _warm_blocks(config: LoadConfig, trial: int) -> list[tuple[tuple[int], int]]:
    """The groups of the warm-up's prompts that share a prefix, and how long it is; a trace's blocks are new to the load."""
    count = plan.warmup_size(config) if config.shared_prefix and not config.trace else 0
    return [
        (
            (index % config.prefix_groups,),
            round(plan.prompt_length(config, f"{config.seed}/warmup-{trial}/{index}") * config.shared_prefix),
        )
        for index in range(count)
    ]


def _cached_tokens(
    blocks: Sequence[Sequence[Hashable]],
    block_tokens: Sequence[int],
    tokens: Sequence[int],
    warm: Sequence[tuple[Sequence[Hashable], int]],
) -> IntArray:
    """Of each prompt what came before in the load or its warm-up."""
    if not any(blocks):
        return np.zeros(len(tokens), np.int64)
    one = PrefixCache(blocks, block_tokens, tokens, block=1)
    for shared, shared_tokens in warm:
        one.warm(shared, shared_tokens)
    return np.array([one.take(request) for request in range(len(tokens))], np.int64)


def _lengths(config: LoadConfig, trial: int) -> Iterator[tuple[int, int, int, Sequence[Hashable]]]:
    """Endless (prompt tokens, output tokens, prompt tokens of a block, blocks that are shared), by the seeds of `load.plan`."""
    trace = trace_of(config) if config.trace else None
    for index in count():
        seed = f"{config.seed}/{trial}/{index}"
        if trace is not None:
            tokens, outputs, blocks = trace.row_within(1, config.max_input_tokens, index)
            blocks, block_tokens = tuple(blocks), trace.block_tokens
        else:
            tokens = plan.prompt_length(config, seed)
            outputs = prompts.length(
                config.output_tokens, config.output_distribution, config.output_spread, f"out/{seed}"
            )
            block_tokens = round(tokens * config.shared_prefix)
            blocks = (index % config.prefix_groups,) if block_tokens else ()
        outputs = 1 if config.phase == "prefill" else min(outputs, config.max_output_tokens or outputs)
        yield tokens, outputs, block_tokens, blocks
