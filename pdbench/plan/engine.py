"""What the simulator takes and gives: a vLLM engine by its costs and limits, a deployment of engines, a load, and what came of it.

An engine runs one step after the other. Step k is scheduled at s_k; then the host launches it and the GPU computes it, side by side:

    host(k) = host_decode_s                                    at most `Limits.captured` tokens: replayed as a CUDA graph
              host_prefill_s * noise + host_per_prompt_token_s * p   more tokens: a prefill step, launched piece by piece
    gpu(k)  = gpu_decode(n) + gpu_per_context_token_s * context       n running sequences that get a token, their context in tokens
              + gpu_prefill_s + gpu_per_prompt_token_s * p            p > 0 prompt tokens in the step
    done(k) = max(max(done(k-1), s_k) + gpu(k), s_k + host(k))

With asynchronous scheduling, s_(k+1) = max(s_k + host(k), done(k-1)), where the tokens of step k-1 are handed out: those of step k one
step later (at done(k) when nothing follows). Without it, s_(k+1) = done(k) and the tokens of step k go out there. Either is join_s later for each sequence of step k whose KV cache came from
prefill: the host takes it in while the GPU works on, so that with asynchronous scheduling the next tokens come as much sooner.

A step takes every running sequence (one token each), then waiting prompts first come first served, while `max_num_batched_tokens`
and `max_num_seqs` last; a prompt that does not fit goes on in the next step (chunked prefill). A prompt's last chunk gives its first
token.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np

from pdbench.analysis.arrivals import Array, IntArray

Policy = Literal["least-work", "round-robin", "prefix-affinity"]
Kind = Literal["single", "replicas", "disaggregated"]
Role = Literal["single", "replica", "prefill", "decode"]


COSTS = ("host_prefill_s", "host_per_prompt_token_s", "gpu_prefill_s", "gpu_per_prompt_token_s", "host_decode_s")
"""Those of `Costs` that steps with prompts tell."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What a step costs, in seconds (see the module). Costs of a phase that an engine does not run may be 0.

    `gpu_decode_s` maps a captured graph size to the GPU's time for a decode step of up to so many sequences, rising sizes; beyond the
    largest, each further sequence adds `gpu_per_sequence_s`. `ingress_s` is from the client's sending until the engine may schedule the
    request (HTTP, tokenizing), `egress_s` from a token's handing out to its arrival at the client. `noise` are factors on
    `host_prefill_s`, one per successive prefill step, in the order they were measured (they have memory); empty: no noise.
    """

    host_decode_s: float
    host_prefill_s: float
    host_per_prompt_token_s: float
    gpu_decode_s: dict[int, float]
    gpu_per_sequence_s: float
    gpu_per_context_token_s: float
    gpu_prefill_s: float
    gpu_per_prompt_token_s: float
    join_s: float = 0.0
    ingress_s: float = 0.0
    egress_s: float = 0.0
    noise: tuple[float, ...] = ()


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine schedules. `captured` is the largest CUDA graph, in tokens; 0: steps are launched eagerly.

    `kv_cache_tokens` is None where it is not known: the simulator then has room for all.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    async_scheduling: bool = True
    captured: int = 0
    kv_cache_tokens: int | None = None
    block_size: int = 16


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """The largest steps that the calibration saw. A prediction that spends its time in larger ones is a guess.

    `prompt_tokens` and `sequences` are of one step, `context_tokens` the sum over its sequences.
    """

    prompt_tokens: int
    sequences: int
    context_tokens: int


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One vLLM instance of a role. `box` None: calibrated everywhere (tests)."""

    costs: Costs
    limits: Limits
    box: Box | None = None

    def gpu_decode_s(self, sequences: int) -> float:
        """GPU time of a decode step of `sequences`, context left out: that of the next captured size."""
        if not sequences:
            return 0.0
        sizes = list(self.costs.gpu_decode_s)
        place = bisect_left(sizes, sequences)
        if place < len(sizes):
            return self.costs.gpu_decode_s[sizes[place]]
        beyond = sequences - sizes[-1]
        return self.costs.gpu_decode_s[sizes[-1]] + beyond * self.costs.gpu_per_sequence_s

    def step_s(self, sequences: int, context: int) -> float:
        """A decode step's time, where one follows the other; an engine without sequences has that of one."""
        gpu_s = self.gpu_decode_s(max(1, sequences)) + self.costs.gpu_per_context_token_s * context
        return max(gpu_s, self.costs.host_decode_s)


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """Which engines stand where. `kind` single or replicas: `engines` and `instances` have the role "single" or "replica";
    disaggregated: "prefill" and "decode".

    One proxy balances: least-work counts prompt tokens in flight for prefill, requests in flight for everything else, as
    `proxy.instances.choose` (equal ones in turn). A prefill request is in flight until its answer, a decode request until its end.
    `first_token` "prefill": the client gets prefill's token, and the request goes to decode as that token passes the proxy; its second
    token is decode's first. A random share of `1 - prefill_opens` of the requests is opened by decode all the same (prefill's token
    was no whole text). "decode": both are asked at once and every token is decode's.
    The handoff, from prefill's token to the instant at which decode may schedule the sequence, takes
    `(handoff_s + handoff_steps * step) * noise + handoff_per_token_s * prompt_tokens` with the time of decode's step as prefill's token is there;
    `handoff_noise` are factors for one handoff after the other, as in `Costs`. The sequence joins without prompt tokens to compute.
    `proxy_s` is added to a request's way in wherever there is a proxy.
    """

    kind: Kind
    engines: dict[Role, Engine]
    instances: dict[Role, int]
    prefill_policy: Policy = "least-work"
    decode_policy: Policy = "least-work"
    first_token: Literal["prefill", "decode"] = "prefill"
    prefill_opens: float = 1.0
    handoff_s: float = 0.0
    handoff_steps: float = 0.0
    handoff_noise: tuple[float, ...] = ()
    handoff_per_token_s: float = 0.0
    proxy_s: float = 0.0

    @property
    def gpus(self) -> int:
        """Instances are of one GPU each."""
        return sum(self.instances.values())


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The requests, one array entry each, in order of `t_s` (seconds from the load's start). `cached_tokens` of a prompt need no computing.

    `streams`: at most so many in flight at the client (None: no limit); with all `t_s` 0 that is a closed loop. A request is sent at
    max(t_s, a stream is free), and its times count from there.
    """

    t_s: Array
    prompt_tokens: IntArray
    output_tokens: IntArray
    cached_tokens: IntArray
    streams: int | None = None

    def __len__(self) -> int:
        return len(self.t_s)


@dataclass(kw_only=True)
class InstanceUse:
    """What one instance did, for its power and for trust. Seconds of the simulated time from 0 to `Simulated.span_s`.

    `prefill_s` is the time in steps with prompt tokens, `decode_s` in steps without; the rest it was idle. `sequence_s` is the
    integral of its running sequences over time (mean sequences = sequence_s / span_s). `outside_s` maps a field of `Box` to the time
    in steps beyond it (a step beyond two counts for both), for an engine with a box.
    """

    role: Role
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sequence_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    outside_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What `simulate(deployment, demand, seed) -> Simulated` gives: one entry per request in the order of `Demand`, seconds.

    `sent_s` is when it was sent; `ttft_s` and `e2e_s` count from there, as the client sees them; `mean_tbt_s` is NaN with one token.
    `scheduled_s` is when its first step was scheduled; disaggregated, `computed_s` when prefill's answer was there, `ready_s` when its KV cache
    was at decode and `joined_s` when decode's first step was scheduled (else NaN). `gap_s` and `gap_count` are all gaps between tokens as a weighted histogram (values in any order, equal ones may repeat).
    `span_s` ends with the last token. NaN: a request that can never run (its prompt and output exceed the KV cache).
    `seed` decides where in `Costs.noise` each instance begins, and the first turn of equal choices.
    """

    sent_s: Array
    ttft_s: Array
    e2e_s: Array
    mean_tbt_s: Array
    scheduled_s: Array
    computed_s: Array
    ready_s: Array
    joined_s: Array
    gap_s: Array
    gap_count: IntArray
    instances: list[InstanceUse]
    span_s: float
    events: int = 0


def weighted_quantiles(
    values: Array,
    counts: IntArray,
    shares: Mapping[str, float],
    jitter: Sequence[float] = (0.0,),
    most: float = 1e9,
) -> dict[str, float]:
    """Quantiles of values that stand for `counts` equal ones each, to any of which any of `jitter` is added, as a share (over -1) of the
    value, or of `most` where that is less; NaN without any."""
    order = np.argsort(values)
    values, below = values[order], np.append(0, np.cumsum(counts[order]))
    if not len(values):
        return dict.fromkeys(shares, float("nan"))
    parts, found = np.sort(jitter), {}
    for name, share in shares.items():
        low, high = 0.0, float(values[-1] * (1 + max(parts[-1], 0.0)))
        while high - low > 1e-9:
            middle = (low + high) / 2
            largest = np.where(middle <= most * (1 + parts), middle / (1 + parts), middle - most * parts)
            reached = below[np.searchsorted(values, largest, side="right")].mean() >= share * below[-1]
            low, high = (low, middle) if reached else (middle, high)
        found[name] = high
    return found
