"""How much of a run's prompts came from a prefix cache, and how much of that the load did not ask for."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from pdbench.analysis.metrics import per
from pdbench.records import Flag, Run

TOLERANCE_PCT = 1.0
TEMPLATE_TOKENS = {"completions": 8, "chat": 32}
"""Tokens at a prompt's front that all prompts share whatever the load: special tokens, and a chat template's first block."""


class PrefixCache(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens of the loads (warm-ups left out), those that a prefix cache had, and at most how many the load shares on purpose.

    `source`: counters of the instances that compute prompts, or the usage of the answers where a server has no counters. What
    decode has of prefill's KV cache counts as computed.
    """

    prompt_tokens: int
    cached_tokens: int
    cached_pct: float
    shared_tokens: int
    source: Literal["counters", "usage"]


def prefix_cache_of(run: Run) -> PrefixCache | None:
    """None where neither counters nor usage tell."""
    measured = [request for request in run.requests if not request.warmup and request.sent_s is not None]
    shared_tokens = sum(request.shared_prompt_tokens for request in measured)
    prefill = [[each for each in trial.prefix_cache.values() if each.role != "decode"] for trial in run.trials]
    if prefill and all(prefill):
        prompt_tokens = sum(each.prompt_tokens for trial in prefill for each in trial)
        cached_tokens = sum(each.cached_tokens for trial in prefill for each in trial)
        # A server without prefix caching asks its cache nothing.
        cached_pct = per(100.0 * cached_tokens, prompt_tokens) or 0.0
        return PrefixCache(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            cached_pct=cached_pct,
            shared_tokens=shared_tokens,
            source="counters",
        )
    told = [(r.prompt_tokens or 0, cached) for r in measured if (cached := r.cached_prompt_tokens) is not None]
    prompt_tokens = sum(prompt for prompt, _ in told)
    # Of a request that two instances share, decode tells: what it calls cached came from prefill.
    if not prompt_tokens or run.name == "disaggregated":
        return None
    cached_tokens = sum(cached for _, cached in told)
    return PrefixCache(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        cached_pct=100.0 * cached_tokens / prompt_tokens,
        shared_tokens=shared_tokens,
        source="usage",
    )


def computed_share(run: Run) -> float:
    """How much of its prompts a run computed; all of them where nobody tells."""
    cache = prefix_cache_of(run)
    return 1.0 if cache is None else 1 - cache.cached_pct / 100


def prefix_cache_flags(run: Run, cache: PrefixCache | None) -> Iterator[Flag]:
    """More prompt tokens were cached than the load shares: by 1 % of the prompt tokens, a chat template's left out."""
    if cache is None:
        return
    load = run.config.get("load") or {}
    requests = sum(not request.warmup for request in run.requests)
    template_tokens = requests * TEMPLATE_TOKENS.get(load.get("endpoint", "completions"), 0)
    excess = cache.cached_tokens - cache.shared_tokens - template_tokens
    if 100.0 * excess > TOLERANCE_PCT * cache.prompt_tokens:
        shared_pct = 100.0 * cache.shared_tokens / cache.prompt_tokens
        yield Flag(
            "prefix-cache-hit",
            f"{cache.cached_pct:.0f} % of the prompt tokens came from a prefix cache, the load shares {shared_pct:.0f} %: "
            "measure with fresh prompts (no --nonce, no --verbatim-prompts), or start the servers again",
        )
