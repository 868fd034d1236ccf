"""Every option, declared once with its range: frozen dataclasses <- TOML recipe <- command-line flags (cyclopts reads the docstrings).

A recipe's keys are the flags' names with underscores, in one section per class ([serve], [load], [power], [cluster], [proxy]) or
without sections. An option that is None is decided at start, by what the machine has.
"""

import shlex
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter

from pdbench.ranges import Count, CountOrZero, Interval, NotNegative, Port, Positive, Seconds, Share, Spread, WarmUp

Connector = Literal["auto", "p2p-nccl", "builtin-p2p-nccl", "nixl", "tcp"]
FirstToken = Literal["prefill", "decode"]
DeploymentKind = Literal["single", "replicas", "tensor-parallel", "disaggregated"]

T = TypeVar("T")
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, show_default=False)]
Indices = Annotated[tuple[int, ...], Parameter(show_default=False)]
VllmWords = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]

# The headings of the help, in its order.
_MODEL = Group.create_ordered("Model and vLLM")
_DEPLOYMENT = Group.create_ordered("Deployment")
_NETWORK = Group.create_ordered("Ports and KV transfer")
_CLUSTER = Group.create_ordered("Cluster")
_LOAD = Group.create_ordered("Load")
_ARRIVALS = Group.create_ordered("Load: arrivals")
_PROMPTS = Group.create_ordered("Load: prompts and lengths")
_REQUESTS = Group.create_ordered("Load: each request, and the client")
_POWER = Group.create_ordered("Power and clocks")
_PAIRS = Group.create_ordered("Pairs")
_STATISTICS = Group.create_ordered("Statistics: limits and prices")
_PROXY = Group.create_ordered("Proxy")
_FAULTS = Group.create_ordered("Proxy: faults")
_LIMITS = Group.create_ordered("Proxy: limits")

Model = Annotated[T, Parameter(group=_MODEL)]
Network = Annotated[T, Parameter(group=_NETWORK)]
Arrivals = Annotated[T, Parameter(group=_ARRIVALS)]
Prompts = Annotated[T, Parameter(group=_PROMPTS)]
Requests = Annotated[T, Parameter(group=_REQUESTS)]
Statistics = Annotated[T, Parameter(group=_STATISTICS)]
Faults = Annotated[T, Parameter(group=_FAULTS)]
Limits = Annotated[T, Parameter(group=_LIMITS)]


@Parameter(name="*", group=_DEPLOYMENT)
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a client must know of servers, whoever started them."""

    model: Model[str | None] = None
    """Model folder or hub name; default: with bench what the server offers, else deepseek-ai/DeepSeek-V2-Lite on GPUs and a tiny
    model made on the spot without."""
    single_gpus: Indices = ()
    """GPU indices of the single instance; default: the first GPUs. With bench: the GPUs of a server that pdbench did not start."""
    log_dir: str = "logs"
    """Folder of the servers' logs."""


@Parameter(name="*", group=_DEPLOYMENT)
@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig):
    """What runs: the model, the instances of each role, their devices, ports and vLLM options."""

    max_model_len: Model[Count[int]] = 512
    """Longest prompt and output together, in tokens."""
    gpu_memory_utilization: Model[Share[float]] = 0.8
    """Share of a GPU's memory that one vLLM instance takes, 0 to 1."""
    enforce_eager: Model[bool] = True
    """Run vLLM without CUDA graphs: it starts sooner and decodes far slower; --no-enforce-eager gives its real speed."""
    dtype: Model[str | None] = None
    """Type of weights and activations; default: auto on GPUs, float32 on CPU."""
    load_format: Model[str] = "auto"
    """vLLM's --load-format; dummy gives random weights at real speed."""
    vllm_args: Model[VllmWords] = ""
    """More vLLM arguments for every instance, as one string."""
    prefill_args: Model[VllmWords] = ""
    """More vLLM arguments for prefill alone."""
    decode_args: Model[VllmWords] = ""
    """More vLLM arguments for decode alone."""
    single_args: Model[VllmWords] = ""
    """More vLLM arguments for the single instance alone."""
    replica_args: Model[VllmWords] = ""
    """More vLLM arguments for replicas alone, as --max-num-batched-tokens 512 for smaller chunks of a prompt."""
    prefill_instances: Count[int] = 1
    """Prefill instances (x of xPyD)."""
    decode_instances: Count[int] = 1
    """Decode instances (y of xPyD)."""
    replica_instances: Count[int | None] = None
    """Instances of the replicas deployment; default: as many as prefill and decode have together."""
    tensor_parallel: Count[int] = 1
    """GPUs per prefill, decode, single or replica instance."""
    prefill_gpus: Indices = ()
    """GPU indices of prefill, instance by instance; default: the first GPUs (of CUDA_VISIBLE_DEVICES where it is set)."""
    decode_gpus: Indices = ()
    """GPU indices of decode; default: the GPUs after prefill's, so 1 for 1P1D."""
    start_timeout_s: Positive[float] = 600.0
    """How long the servers may take until all are healthy."""
    host: Network[str] = "127.0.0.1"
    """Address on which servers and proxy listen."""
    single_port: Network[Port[int]] = 8000
    """Port of the single instance."""
    prefill_port: Network[Port[int]] = 8100
    """Port of the first prefill instance; further ones count up."""
    decode_port: Network[Port[int]] = 8200
    """Port of the first decode instance; further ones count up."""
    proxy_port: Network[Port[int]] = 8000
    """Port of the proxy."""
    kv_ip: Network[str] = "127.0.0.1"
    """Address over which prefill and decode exchange the KV cache."""
    kv_port: Network[Port[int]] = 14579
    """KV port of the first prefill instance; each further instance takes the next one."""
    connector: Network[Connector] = "auto"
    """How KV moves: p2p-nccl (ours), tcp (ours), builtin-p2p-nccl (vLLM 0.10.2 - 0.23), nixl; auto chooses by vLLM version and GPUs."""
    first_token: Network[FirstToken] = "prefill"
    """Whose token opens a stream: prefill's own where greedy sampling makes that exact (p2p-nccl and tcp), or always decode's."""
    kv_load_failure_policy: Network[Literal["recompute", "fail"]] = "recompute"
    """What decode does when a KV transfer fails: compute the prompt itself, or fail the request."""

    def plain(self) -> dict[str, Any]:
        """Option -> value for the saved record. Keys among vLLM's arguments are hidden: results are there to be shown."""
        words = ("vllm_args", "prefill_args", "decode_args", "single_args", "replica_args")
        return asdict(self) | {name: _without_keys(getattr(self, name)) for name in words}


def _without_keys(arguments: str) -> str:
    """vLLM's arguments with HIDDEN in place of every key; those without a key as they are."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # whoever starts vLLM with them says so
        return arguments
    kept, hidden = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") in ("--api-key", "--hf-token"):
            kept += [name, "HIDDEN"]
            hidden = not equals  # as many words as follow
        elif word.startswith("--") or not hidden:
            kept.append(word)
            hidden = False
    return arguments if kept == words else shlex.join(kept)


@Parameter(name="*", group=_LOAD)
@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent: prompts, arrivals, limits."""

    concurrency: Count[int | None] = None
    """Requests in flight at most; 1 if neither this nor --rate is given. With --rate: a cap on its streams."""
    rate: Positive[float | None] = None
    """Requests per second that arrive (Poisson)."""
    requests: Count[int | None] = None
    """Measured requests per trial; default: 16, and all of a --trace, of --stages and of a --ramp-to."""
    input_tokens: Count[int | None] = None
    """Exact prompt length in tokens; default: built-in mixed texts at their own lengths."""
    output_tokens: Count[int] = 64
    """Tokens generated per request at most."""
    warmup: WarmUp[int | None] = None
    """Requests before the measured ones, left out of every figure; default: as many as the load will have in flight."""
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
    primary: Statistics[str | None] = None
    """Metric judged at 5 % alone, the others as a family; default: goodput with an SLO, else E2E p50."""


@Parameter(name="*", group=_PAIRS)
@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How deployments take turns (A B, B A, ...). One turn of each is a pair: the same arrivals and prompts for all of them."""

    pairs: Annotated[Count[int | None], Parameter(name=("--pairs", "--trials"))] = None
    """Turns of each deployment; default: 3, without GPUs 2."""
    resident: bool | None = None
    """Start all deployments once, side by side (GPU memory is split), and alternate; default: on a host without GPUs."""
    join_starts: bool = False
    """Keep servers whose deployment's next turn follows at once: fewer starts, wider intervals."""
    until: str = ""
    """Add pairs until a metric's interval is this narrow, as in "tbt_p99_ms<5%" (at least 5 pairs)."""
    most_pairs: Count[int] = 24
    """Pairs after which --until gives up."""
    resume: bool = False
    """Add to the runs in --out, which the same command measured, up to --pairs or --until."""


@Parameter(name="*", group=_POWER)
@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """What is read from the devices, and the clocks that are set on them."""

    power: bool = True
    """Sample the devices of this host that the servers use."""
    sample_interval_s: Interval[float] = 0.1
    """Seconds between samples of every device, 0.01 to 10."""
    idle_s: NotNegative[float] = 3.0
    """Seconds for which each kind of idle power is measured (bare, CUDA context, engine ready); 0 leaves it out."""
    cooldown_s: NotNegative[float] = 60.0
    """Seconds to wait at most, before a trial, until the GPUs are as cool as before the first one."""
    prefill_clock: Count[int | None] = None
    """SM clock of prefill's GPUs in MHz, locked for the run and restored after it (needs root)."""
    decode_clock: Count[int | None] = None
    """SM clock of decode's GPUs in MHz, likewise."""
    single_clock: Count[int | None] = None
    """SM clock of the single instance's and replicas' GPUs in MHz, likewise."""
    prefill_power_cap: Count[int | None] = None
    """Power limit of each of prefill's GPUs in watts, restored after the run (needs root)."""
    decode_power_cap: Count[int | None] = None
    """Power limit of each of decode's GPUs in watts, likewise."""
    single_power_cap: Count[int | None] = None
    """Power limit of each of the single instance's and replicas' GPUs in watts, likewise."""
    price_kwh: Statistics[NotNegative[float | None]] = None
    """Price per kWh in your currency: adds the price of a million tokens to the summary."""
    gco2_kwh: Statistics[NotNegative[float | None]] = None
    """Grams of CO2 per kWh of your grid: adds the CO2 of a million tokens to the summary."""


@Parameter(name="*", group=_CLUSTER)
@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which hosts it runs on; without --cluster everything is on this host (docs/cluster.md)."""

    cluster: str | None = None
    """Run on a Ray cluster: auto (the one this host belongs to) or its head's ADDRESS:PORT."""
    place: Words = ()
    """Where instances go: same-node, spread, or ROLE=NODE (several); default: as few nodes as can hold them."""
    client_nodes: Words = ()
    """Nodes over which --client-processes are spread in turn; default: the node where pdbench runs."""
    node_timeout_s: Positive[float] = 20.0
    """Silence after which a node counts as lost and the run ends, marked, with what was measured."""
    restarts: CountOrZero[int] = 0
    """How many times servers that died are restarted; default: a dead server ends the run."""


@Parameter(name="*", group=_PROXY)
@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """What the proxy forwards to and how it behaves when something fails. URL is http://HOST:PORT[@KV_HOST:KV_PORT]."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the proxy to the network (set PDBENCH_PROXY_API_KEY then)."""
    port: Port[int] = 8000
    """Port to listen on; 0 takes a free one, named on the first line of output."""
    prefill: Words = ()
    """Prefill instances."""
    decode: Words = ()
    """Decode instances; with --connector none: all instances."""
    connector: Literal["p2p-nccl", "tcp", "builtin-p2p-nccl", "nixl", "none"] = "p2p-nccl"
    """KV connector of the instances; p2p-nccl and tcp are ours, none only balances over --decode."""
    kv_port: Port[int] = 14579
    """KV port of the first instance whose URL names none; each further instance takes the next one."""
    prefill_policy: Literal["least-work", "round-robin", "prefix-affinity"] = "least-work"
    """Which prefill instance a request takes; least-work counts prompt tokens in flight."""
    decode_policy: Literal["least-work", "round-robin", "prefix-affinity"] = "least-work"
    """Which decode instance a request takes; least-work counts requests in flight."""
    first_token: FirstToken = "prefill"
    """Whose token opens a stream: prefill's own where greedy sampling makes that exact (p2p-nccl and tcp), or always decode's."""
    event_log: str | None = None
    """File that gets one JSON line per request: instants, instances, retries, status. Never content."""
    timing_header: bool = False
    """Send the stages' durations to the client in a Server-Timing header."""
    workers: Count[int] = 1
    """Processes that share the port, with one view of the instances."""
    fallback: Faults[Literal["none", "recompute"]] = "none"
    """When no prefill instance can serve a request: fail it (none), or let decode compute the prompt (recompute)."""
    retries: Faults[CountOrZero[int]] = 2
    """Other instances tried before a request fails, as long as no byte of its answer was passed on."""
    connect_timeout_s: Faults[Positive[float]] = 5.0
    """Seconds that connecting to an instance may take."""
    prefill_timeout_s: Faults[Positive[float]] = 120.0
    """Seconds prefill may take before it counts as stalled."""
    decode_timeout_s: Faults[Positive[float]] = 300.0
    """Seconds without a byte from decode before it counts as stalled."""
    health_interval_s: Faults[Positive[float]] = 2.0
    """Seconds between health checks of an instance."""
    unhealthy_after: Faults[Count[int]] = 3
    """Failures in a row that take an instance out; one passed health check lets it back in."""
    max_in_flight: Limits[Count[int]] = 4096
    """Requests forwarded at once; more wait in the queue."""
    queue_size: Limits[CountOrZero[int]] = 1024
    """Requests that wait at most; more are answered 429 with Retry-After."""
    queue_timeout_s: Limits[NotNegative[float]] = 60.0
    """Seconds a request may wait in the queue before it is answered 429."""
    max_connections: Limits[Count[int]] = 8192
    """Open client connections; more are closed."""
    max_body_mib: Limits[Positive[float]] = 32.0
    """Largest request body, in MiB."""
    max_header_kib: Limits[Positive[float]] = 32.0
    """Largest request head, in KiB."""
    idle_timeout_s: Limits[Positive[float]] = 75.0
    """Seconds a client may stay silent between requests, or unable to take its answer's bytes."""
    request_timeout_s: Limits[Positive[float]] = 30.0
    """Seconds in which a whole request, head and body, must arrive."""
    drain_timeout_s: Limits[NotNegative[float]] = 30.0
    """Seconds that requests in flight get to end after SIGTERM."""


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """All options of a measurement together."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    power: PowerConfig = field(default_factory=PowerConfig)

    def plain(self) -> dict[str, Any]:
        """Section -> option -> value for the saved record."""
        return asdict(self) | {"serve": self.serve.plain()}
