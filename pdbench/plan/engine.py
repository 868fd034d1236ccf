"""What the simulator takes: a vLLM engine by its costs and limits, a deployment of engines, a load.

An engine runs one step after the other. Step k is scheduled at s_k; then the host launches it and the GPU computes it, side by side:

    host(k)  = host_decode_s                                    no prompt, at most `Limits.captured` tokens: replayed as one CUDA graph;
                                                                       or any such step of an engine without graphs
               host_prefill_s * noise + host_per_prompt_token_s * p   p prompt tokens beside them, within the graphs: these leave attention out,
                                                                      which is launched piece by piece
               host_eager_s * noise + host_per_prompt_token_s * p     beyond the graphs that there are, with a prompt or without: kernel by kernel
               the first part times alike_launch where one kind of attention kernels computes all: no sequence decodes beside the prompts, or
               no prompt has more than `SHORT_PROMPT` tokens in the step
    gpu(k)   = gpu_decode(n) + gpu_per_context_token_s * context       n running sequences that get a token, their context in tokens
               + (gpu_prefill_s + gpu_per_prompt_token_s * p) * gpu_noise  p > 0 prompt tokens in the step
    begin(k) = max(done(k-1), s_k + before_gpu_s)                      before_gpu_s only with a prompt: its inputs are prepared, while the GPU
                                                                       may still compute the step before
    done(k)  = max(begin(k) + gpu(k), s_k + host(k))

With asynchronous scheduling, s_(k+1) = max(s_k + host(k), done(k-1)), where the tokens of step k-1 are handed out: those of step k one
step later (at done(k) when nothing follows). Without it, s_(k+1) = done(k) and the tokens of step k go out there. Either is join_s later for each sequence of step k whose KV cache came from
prefill: the host takes it in while the GPU works on, so that with asynchronous scheduling the next tokens come as much sooner.

A step takes every running sequence (one token each), then waiting prompts first come first served, while `max_num_batched_tokens`
and `max_num_seqs` last; a prompt that does not fit goes on in the next step (chunked prefill). A prompt's last chunk gives its first
token.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import msgspec
import numpy as np

from pdbench.analysis.arrivals import Array, BoolArray, IntArray
from pdbench.config import Policy

Kind = Literal["single", "replicas", "disaggregated"]
Role = Literal["single", "replica", "prefill", "decode"]
Launch = Literal["within", "beyond"]
"""How a step is launched: as a CUDA graph, which leaves attention out where it holds a prompt, or beyond the graphs kernel by kernel."""
COSTS = (
    "host_prefill_s", "host_per_prompt_token_s", "gpu_prefill_s", "gpu_per_prompt_token_s", "before_gpu_s", "alike_launch", "host_decode_s",
)  # fmt: skip
"""Those of `Costs` that steps with prompts tell; the last one is of steps without."""
SHORT_PROMPT = 512
"""Up to so many tokens of a prompt in a step vLLM's FLASH_ATTN_MLA backend computes with decode's kernels (its `reorder_batch_threshold`); longer
ones have kernels of their own, which are launched beside decode's."""
ANY = 10**12
"""Of what `Box` does not bound."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What a step costs, in seconds (see the module); 0 for a phase that the engine does not run. Without `host_eager_s` (no run showed steps
    on either side of the graphs' end) all steps with prompts are launched in `host_prefill_s`.

    `gpu_decode_s` maps a captured graph size to the GPU's time for a decode step of up to so many sequences, rising sizes; beyond the
    largest, each further sequence adds `gpu_per_sequence_s`. `ingress_s` and `ingress_per_token_s` of the prompt are from the client's sending
    until the engine may schedule the request (HTTP, tokenizing). `noise` are factors on the launch of a prompt's step, one per successive prefill step, in the order they were
    measured (they have memory): a series per trial, one after the other; empty: no noise. `gpu_noise` are those on the GPU's part; empty: the same as
    the launch's.
    """

    host_decode_s: float = 0.0
    host_prefill_s: float = 0.0
    host_eager_s: float | None = None
    host_per_prompt_token_s: float = 0.0
    gpu_decode_s: dict[int, float] = msgspec.field(default_factory=lambda: {1: 0.0})
    gpu_per_sequence_s: float = 0.0
    gpu_per_context_token_s: float = 0.0
    gpu_prefill_s: float = 0.0
    gpu_per_prompt_token_s: float = 0.0
    before_gpu_s: float = 0.0
    alike_launch: float = 1.0
    join_s: float = 0.0
    ingress_s: float = 0.0
    ingress_per_token_s: float = 0.0
    noise: tuple[tuple[float, ...], ...] = ()
    gpu_noise: tuple[tuple[float, ...], ...] = ()

    def with_values(self, values: Iterable[float]) -> "Costs":
        """With those that are named in `COSTS`."""
        return msgspec.structs.replace(self, **dict(zip(COSTS, map(float, values), strict=True)))

    @property
    def beyond_graphs_s(self) -> float:
        return self.host_prefill_s if self.host_eager_s is None else self.host_eager_s

    def way_in_s(self, prompt_tokens: IntArray) -> Array:
        """From the client's sending of such prompts until the engine may schedule them."""
        return self.ingress_s + self.ingress_per_token_s * prompt_tokens.astype(np.float64)

    def host_prompt_s(self, tokens: IntArray, beyond: BoolArray, alike: BoolArray | bool) -> Array:
        """The host's time to launch steps of so many prompt tokens, some `beyond` the graphs, some with all sequences computed `alike`, without noise."""
        launch_s = np.where(beyond, self.beyond_graphs_s, self.host_prefill_s)
        launch_s = np.where(alike, self.alike_launch, 1.0) * launch_s
        return np.asarray(launch_s + self.host_per_prompt_token_s * tokens.astype(np.float64))

    def gpu_prompt_s(self, tokens: IntArray) -> Array:
        """The GPU's time for so many prompt tokens, without noise."""
        return self.gpu_prefill_s + self.gpu_per_prompt_token_s * tokens.astype(np.float64)

    def prompt_step_s(self, tokens: IntArray, captured: int, streams: int = 0) -> Array:
        """How long a step of one prompt takes, alone or beside so many running streams (without their context), without noise: as long as its
        launch or its computation, whichever is longer."""
        computed_s = self.before_gpu_s + self.gpu_step_s(np.array(streams)) + self.gpu_prompt_s(tokens)
        alike = (tokens <= SHORT_PROMPT) | (streams == 0)
        return np.maximum(self.host_prompt_s(tokens, tokens + streams > captured, alike), computed_s)

    def by_gpu(self, tokens: IntArray, captured: int) -> BoolArray:
        """Does the GPU take longer for a step of one prompt alone than its launch does?"""
        return self.before_gpu_s + self.gpu_prompt_s(tokens) > self.host_prompt_s(tokens, tokens > captured, alike=True)

    def gpu_step_s(self, sequences: IntArray, context: Array | IntArray | int = 0) -> Array:
        """The GPU's time for decode steps of so many sequences with so much context; none for steps without sequences."""
        sizes, table_s = np.array([*self.gpu_decode_s]), np.array([*self.gpu_decode_s.values()])
        beyond = np.maximum(sequences - sizes[-1], 0) * self.gpu_per_sequence_s
        took_s = table_s[np.minimum(np.searchsorted(sizes, sequences), len(sizes) - 1)] + beyond
        return np.where(sequences > 0, took_s + self.gpu_per_context_token_s * context, 0.0)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine schedules. `captured` is the largest CUDA graph, in tokens; 0: steps are launched eagerly.

    `kv_cache_tokens` is None where it is not known: the simulator then has room for all.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    async_scheduling: bool = True
    captured: int = 0
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    block_size: int = 16

    def launch(self, tokens: int) -> Launch:
        return "within" if tokens <= self.captured else "beyond"

    @property
    def lag(self) -> int:
        """Step k is scheduled as the tokens of step k - lag are handed out."""
        return 2 if self.async_scheduling else 1


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """The largest steps that the calibration saw. A prediction that spends its time in larger ones is a guess.

    `prompt_tokens` and `sequences` are of one step, `context_tokens` the sum over its sequences.
    """

    prompt_tokens: int = ANY
    sequences: int = ANY
    context_tokens: int = ANY


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One vLLM instance of a role."""

    costs: Costs
    limits: Limits
    box: Box = Box()


class Layout(msgspec.Struct, frozen=True):
    """Which instances stand where: of `kind` single or replicas those of the role "single" or "replica", of disaggregated those of
    "prefill" and "decode". `gpus_each` are an instance's GPUs where they are not one."""

    kind: Kind
    instances: dict[Role, int]
    gpus_each: dict[Role, int] = {}

    @property
    def gpus(self) -> int:
        return sum(count * self.gpus_each.get(role, 1) for role, count in self.instances.items())

    @property
    def size(self) -> int:
        """How many instances."""
        return sum(self.instances.values())

    @property
    def front(self) -> Role:
        """Whose instances get a client's requests."""
        return "prefill" if self.kind == "disaggregated" else next(iter(self.instances))

    @property
    def name(self) -> str:
        """As --deployment takes it."""
        if self.kind == "disaggregated":
            return f"{self.instances['prefill']}p{self.instances['decode']}d"
        return self.kind if self.kind == "single" else f"{self.kind}:{self.instances['replica']}"


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """From prefill's token to the instant at which decode may schedule the sequence:
    `steps * step * noise + per_token_s * prompt_tokens`, with the time of decode's step as prefill's token is there.

    `noise` are factors for one handoff after the other, as in `Costs`. Prefill's token is the client's first, and decode's the second, of a
    random share `prefill_opens` of the requests; the others are opened by decode (prefill's token was no whole text, or is not passed on).
    """

    steps: float = 0.0
    noise: tuple[tuple[float, ...], ...] = ()
    per_token_s: float = 0.0
    prefill_opens: float = 1.0


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """Engines as the layout has them.

    One proxy balances (policies.py), replicas by the decode policy. A prefill request is in flight until its answer, a decode request until its end;
    the sequence joins decode without prompt tokens to compute. `proxy_s` is added to a request's way in wherever there is a proxy.
    """

    layout: Layout
    engines: dict[Role, Engine]
    handoff: Handoff = Handoff()
    proxy_s: float = 0.0
    prefill_policy: Policy = "least-work"
    decode_policy: Policy = "least-work"

    def way_in_s(self, prompt_tokens: IntArray) -> Array:
        """From the client's sending of such prompts until the first engine may schedule them."""
        costs = self.engines[self.layout.front].costs
        return costs.way_in_s(prompt_tokens) + (self.proxy_s if self.layout.kind != "single" else 0.0)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The requests, one array entry each, in order of `t_s` (seconds from the load's start). `cached_tokens` of a prompt need no computing.

    `streams`: at most so many in flight at the client (None: no limit); with all `t_s` 0 that is a closed loop. A request is sent at
    max(t_s, a stream is free), and its times count from there. `timeout_s` is the load's --request-timeout-s (inf: no request was ended by it).

    `blocks` are what a request shares with others, in order, `block_tokens` prompt tokens each: those that the instance which computes the prompt
    still has need no computing, up to the first that it has not (prefixes.py). `cached_tokens` then are what one cache of all instances without a limit would
    have: what the instances had is in `Simulated`. `warm_blocks` are those of the warm-up's requests, which go to the instances in turn, with the tokens of each.
    """

    t_s: Array
    prompt_tokens: IntArray
    output_tokens: IntArray
    cached_tokens: IntArray
    streams: int | None = None
    timeout_s: float = inf
    blocks: Sequence[Sequence[Hashable]] | None = None
    block_tokens: IntArray | None = None
    warm_blocks: Sequence[tuple[Sequence[Hashable], int]] = ()

    @property
    def is_closed(self) -> bool:
        return self.streams is not None and not self.t_s.any()

    def __len__(self) -> int:
        return len(self.t_s)
