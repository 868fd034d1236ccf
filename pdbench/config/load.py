"""What is sent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from cyclopts import Parameter

from pdbench.config.groups import LOAD, Arrivals, Prompts, Requests, Statistics, Words
from pdbench.config.types import Count, CountOrZero, NotNegative, Positive, Seconds, Share, Spread, WarmUp
from pdbench.errors import OptionError

_TIMEOUT_TOKENS = 256
TEMPLATE_TOKENS = {"completions": 8, "chat": 32}
"""By endpoint, tokens at a prompt's front that all prompts share whatever the load: special tokens, and a chat template's first block."""


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent: prompts, arrivals, limits."""

    concurrency: Count[int | None] = None
    """Requests in flight at most; 1 if neither this nor --rate is given. With --rate: a cap on its streams."""
    rate: Positive[float | None] = None
    """Requests per second that arrive (Poisson)."""
    requests: Count[int | None] = None
    """Measured requests per trial; default: 16 (`run` without GPUs: 8, one at a time), and all of a --trace, of --stages and of a --ramp-to."""
    input_tokens: Count[int | None] = None
    """Exact prompt length in tokens; default: built-in mixed texts at their own lengths."""
    output_tokens: Count[int] = 64
    """Tokens generated per request at most."""
    warmup: WarmUp[int | None] = None
    """Requests before the measured ones, left out of every figure; default: as many as the load will have in flight."""
    canaries: Requests[Share[float]] = 0.01
    """Share of the measured requests, 0 to 1, whose answers are compared with a reference's; 4 and one per (prefill, decode) pair at
    least, 0 for none (docs/correctness.md)."""
    seed: CountOrZero[int] = 0
    """Seed of arrivals, lengths and prompts."""
    nonce: Prompts[str | None] = None
    """Text that makes the prompts new to every cache; default: drawn and saved. The saved one repeats a run's prompts byte for byte."""
    duration_s: Seconds[float | None] = None
    """Send new requests for this long, in place of --requests."""
    steady_s: Seconds[float | None] = None
    """End once throughput and requests in flight held steady for this long (10 minutes or --duration-s at most)."""
    phase: Literal["both", "prefill", "decode"] = "both"
    """Calibrate one phase of an instance: prefill asks for one token per request; decode sends one batch (--requests at most
    --concurrency) and measures only while all of it decodes."""
    arrival: Arrivals[Literal["poisson", "gamma", "constant"]] = "poisson"
    """Distribution of the arrivals at --rate."""
    burstiness: Arrivals[Positive[float]] = 1.0
    """Shape of gamma arrivals: 1 is Poisson, below 1 comes in bursts."""
    ramp_to: Arrivals[Positive[float | None]] = None
    """Ramp the rate from --rate to this over --ramp-s (Poisson)."""
    ramp_s: Arrivals[Positive[float]] = 60.0
    """Seconds that the ramp takes."""
    stages: Arrivals[str] = ""
    """Stages RATE:SECONDS,... of Poisson arrivals, in place of --rate."""
    trace: Arrivals[str | None] = None
    """Replay a file's arrivals and lengths: Azure LLM inference, BurstGPT, Mooncake, Bailian, Weka or own format (docs/load.md)."""
    trace_from: Arrivals[str | None] = None
    """Begin at this time of the trace, as in 12h or 90s."""
    trace_for: Arrivals[str | None] = None
    """End after this much of the trace, as in 10m."""
    trace_unit: Arrivals[Literal["s", "ms", "us", "ns"] | None] = None
    """Unit of the trace's times; default: by its format, key or date."""
    trace_block_tokens: Arrivals[Count[int | None]] = None
    """Tokens of a block of the trace's hash_ids; default: by its format and lengths."""
    time_scale: Arrivals[Positive[float]] = 1.0
    """Factor on the trace's instants; 2 makes it last twice as long."""
    tokenizer: Prompts[str | None] = None
    """Folder or hub name of the tokenizer that measures prompts; default: the model's."""
    input_distribution: Prompts[Literal["fixed", "uniform", "lognormal"]] = "fixed"
    """Distribution of prompt lengths around --input-tokens."""
    input_spread: Prompts[Spread[float]] = 0.5
    """Uniform: half the range, as a share of the mean. Lognormal: sigma."""
    output_distribution: Prompts[Literal["fixed", "uniform", "lognormal"]] = "fixed"
    """Distribution of output lengths around --output-tokens."""
    output_spread: Prompts[Spread[float]] = 0.5
    """The same for --output-tokens."""
    max_input_tokens: Prompts[Count[int | None]] = None
    """Cap on the prompt lengths of a trace, file or distribution."""
    max_output_tokens: Prompts[Count[int | None]] = None
    """Cap on the output lengths of a trace, file or distribution."""
    shared_prefix: Prompts[Share[float]] = 0.0
    """Share of a prompt, 0 to 1, that is the same for all prompts of a group (needs --input-tokens)."""
    prefix_groups: Prompts[Count[int]] = 1
    """Number of groups, each with its own prefix."""
    prompt_file: Prompts[str | None] = None
    """Prompts from ShareGPT or chat conversations, JSON rows with "prompt" (text or token ids) and the like, or a text file."""
    verbatim_prompts: Prompts[bool] = False
    """Send the prompts of --prompt-file as they are, without the numbered line that makes each new to a cache."""
    reply_lengths: Prompts[bool] = False
    """Generate as many tokens as the reply in --prompt-file has, in place of --output-tokens."""
    endpoint: Requests[Literal["completions", "chat"]] = "completions"
    """Which of the server's two interfaces to use."""
    temperature: Requests[NotNegative[float]] = 0.0
    """Sampling temperature; 0 is greedy, so that outputs can be compared."""
    ignore_eos: Requests[bool | None] = None
    """Generate all --output-tokens even past the model's end; default: where --input-tokens or --trace sets lengths."""
    token_ids: Requests[bool] = True
    """Ask for token ids and count tokens by them; --no-token-ids for servers that refuse the field."""
    extra_body: Requests[str] = ""
    """JSON object merged into every request's body."""
    drop_fields: Requests[Words] = ()
    """Fields to leave out of every request's body, as in ignore_eos stream_options, for servers that refuse them."""
    max_tokens_field: Requests[Literal["max_tokens", "max_completion_tokens"]] = "max_tokens"
    """Name of the field that limits a request's output."""
    tls_verify: Requests[bool] = True
    """Check an https server's certificate (SSL_CERT_FILE names another authority)."""
    request_timeout_s: Requests[Positive[float]] = 120.0
    """Seconds after which a request counts as failed: to its first token, and as a whole for each 256 tokens asked for."""
    read_timeout_s: Requests[Positive[float]] = 60.0
    """Seconds of silence within an answer after which it counts as stalled."""
    save_prompts: Requests[bool] = False
    """Save every prompt's whole text; by default only prompts of at most 200 characters, and the SHA-256 of each."""
    client_processes: Requests[Count[int]] = 1
    """Processes over which the client splits its one schedule; raise it when a run is marked client-limited."""
    slo_ttft_ms: Statistics[Positive[float | None]] = None
    """A request meets the SLO if its TTFT is at most this; the goodput counts those that do."""
    slo_tbt_ms: Statistics[Positive[float | None]] = None
    """And if its mean time between tokens (mean TBT, also called TPOT) is at most this."""
    slo_tbt_p90_ms: Statistics[Positive[float | None]] = None
    """And if 90 % of its own gaps between tokens are at most this."""
    slo_tbt_p99_ms: Statistics[Positive[float | None]] = None
    """And if 99 % of them are at most this."""
    slo_e2e_ms: Statistics[Positive[float | None]] = None
    """And if it took at most this from sending to its end."""
    primary: Statistics[str | None] = None
    """Metric judged at 5 % alone, the others as a family; default: goodput with an SLO, else E2E p50."""

    @property
    def open_loop(self) -> bool:
        return is_open_loop(vars(self))

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of these options that are not as they are by default."""
        return [name for name in names if getattr(self, name) != getattr(LoadConfig(), name)]


def slo_limits(slo: str) -> dict[str, str]:
    """Option -> its part of "ttft=200,tbt=50" (milliseconds); tpot is another word for tbt. Raises UserError for anything else."""
    options = [field.name for field in fields(LoadConfig) if field.name.startswith("slo_")]
    names = {option.removeprefix("slo_").removesuffix("_ms"): option for option in options}
    limits: dict[str, str] = {}
    for part in map(str.strip, slo.split(",") if slo else ()):
        name = part.partition("=")[0].strip().replace("tpot", "tbt")
        if name not in names:
            raise OptionError(f"--slo: {part!r} is no limit ({', '.join(names)}) in ms, as in --slo ttft=200,tbt=50")
        if names[name] in limits:
            raise OptionError(f"--slo {slo}: it limits {name} twice")
        limits[names[name]] = part
    return limits


def is_open_loop(load: Mapping[str, Any]) -> bool:
    """Do the requests of a load, given as saved, arrive by a clock (rate, stages, trace), or each when an earlier one has ended?"""
    return any(load.get(name) for name in ("rate", "stages", "trace"))


def dropped_fields(load: Mapping[str, Any]) -> set[str]:
    """--drop-fields of a load, given as saved: with commas or blanks between the names."""
    return {name for word in load.get("drop_fields") or () for name in word.split(",") if name}


def answer_timeout_s(request_timeout_s: float, asked_tokens: int) -> float:
    """How long an answer may take until it is whole, by --request-timeout-s."""
    return request_timeout_s * max(1.0, asked_tokens / _TIMEOUT_TOKENS)


def most_output_tokens(load: Mapping[str, Any]) -> int | None:
    """What each request of a load, given as saved, generates at most; None where requests differ, or its fields may say otherwise."""
    varies = load.get("output_distribution", "fixed") != "fixed" or load.get("trace") or load.get("reply_lengths")
    limit, extra = load.get("max_tokens_field", "max_tokens"), load.get("extra_body") or ""
    if varies or limit in dropped_fields(load) or "max_tokens" in extra or "max_completion_tokens" in extra:
        return None
    bounds = [most for name in ("output_tokens", "max_output_tokens") if (most := load.get(name))]
    return 1 if load.get("phase") == "prefill" else min(bounds, default=None)
