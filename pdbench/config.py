"""Every option, declared once: frozen dataclasses <- TOML recipe <- command-line flags (cyclopts reads the docstrings).

A recipe is a flat TOML file whose keys are the flags' names with underscores. An option that is None is decided at start,
by what the machine has. Try: pdbench run --help
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

Connector = Literal["auto", "p2p-nccl", "builtin-p2p-nccl", "nixl", "tcp"]
Deployment = Literal["single", "replicas", "tensor-parallel", "disaggregated"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What runs: the model, the instances of each role, their devices, ports and vLLM options."""

    model: str | None = None
    """Model folder or hub name; by itself deepseek-ai/DeepSeek-V2-Lite on GPUs, a tiny model made on the spot without."""
    max_model_len: int = 512
    """Longest prompt and output together, in tokens."""
    gpu_memory_utilization: float = 0.8
    """Share of a GPU's memory that one vLLM instance takes, 0 to 1."""
    enforce_eager: bool = True
    """Run vLLM without CUDA graphs (the seed's setting; --no-enforce-eager is far faster, docs/metrics.md says why)."""
    dtype: str | None = None
    """Weights' and activations' type; by itself auto on GPUs, float32 on CPU."""
    load_format: str = "auto"
    """vLLM's --load-format; dummy gives random weights at real speed."""
    prefill_instances: int = 1
    """Prefill instances (x of xPyD)."""
    decode_instances: int = 1
    """Decode instances (y of xPyD)."""
    replica_instances: int = 2
    """Instances of the replicas deployment."""
    tensor_parallel: int = 1
    """GPUs a prefill, decode, single or replica instance spans."""
    prefill_gpus: tuple[int, ...] = ()
    """GPU indices of prefill, instance by instance; by itself the first ones, from 0."""
    decode_gpus: tuple[int, ...] = ()
    """GPU indices of decode; by itself those after prefill's, so 1 for 1P1D."""
    single_gpus: tuple[int, ...] = ()
    """GPU indices of the single instance; by itself from 0."""
    host: str = "127.0.0.1"
    """Address on which servers and proxy listen."""
    single_port: int = 8000
    """Port of the single instance."""
    prefill_port: int = 8100
    """Port of the first prefill instance; further ones count up."""
    decode_port: int = 8200
    """Port of the first decode instance; further ones count up."""
    proxy_port: int = 8000
    """Port of the proxy."""
    kv_ip: str = "127.0.0.1"
    """Address over which prefill and decode exchange the KV cache."""
    kv_port: int = 14579
    """KV port of the first prefill instance; every further instance takes the next one."""
    connector: Connector = "auto"
    """How KV moves: p2p-nccl (ours), tcp (ours), builtin-p2p-nccl (vLLM 0.10.2 - 0.23), nixl; auto chooses by vLLM and GPUs."""
    first_token: Literal["prefill", "decode"] = "prefill"
    """Whose token opens a stream: prefill's own where greedy sampling makes that exact (p2p-nccl and tcp), or always decode's."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    """What decode does when a KV transfer fails: compute the prompt itself, or fail the request."""
    vllm_args: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    """More vLLM arguments for every instance, as one string."""
    prefill_args: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    """More vLLM arguments for prefill alone."""
    decode_args: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    """More vLLM arguments for decode alone."""
    start_timeout_s: float = 600.0
    """How long the servers may take until all are healthy."""
    log_dir: str = "logs"
    """Folder of the servers' logs."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent: prompts, arrivals, limits."""

    concurrency: int | None = None
    """Requests in flight at most; 1 if neither this nor --rate is given. With --rate: a cap on its streams."""
    rate: float | None = None
    """Requests a second that arrive (Poisson)."""
    requests: int = 16
    """Measured requests a trial."""
    input_tokens: int | None = None
    """Exact prompt length in tokens; by itself the built-in mixed texts at their own lengths."""
    output_tokens: int = 64
    """Tokens generated a request at most."""
    warmup: int = 2
    """Requests before the measured ones, left out of every figure."""
    seed: int = 0
    """Seed of prompts and arrivals: same seed, same bytes."""
    request_timeout_s: float = 120.0
    """Seconds after which a request counts as failed."""
    read_timeout_s: float = 60.0
    """Seconds of silence within an answer after which it counts as stalled."""
    endpoint: Literal["completions", "chat"] = "completions"
    """Which of the server's two interfaces is asked."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, so that outputs can be compared."""
    ignore_eos: bool | None = None
    """Generate all --output-tokens even past the model's end; by itself where --input-tokens or --trace sets lengths."""
    token_ids: bool = True
    """Ask for token ids and count tokens by them; --no-token-ids for servers that refuse to."""
    extra_body: str = ""
    """JSON object merged into every request's body."""
    tls_verify: bool = True
    """Check an https server's certificate (SSL_CERT_FILE names an own authority)."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer that measures prompts; by itself the model's."""
    input_distribution: Literal["fixed", "uniform", "lognormal"] = "fixed"
    """How prompt lengths spread around --input-tokens."""
    input_spread: float = 0.5
    """Uniform: half the range, as a share of the mean. Lognormal: sigma."""
    output_distribution: Literal["fixed", "uniform", "lognormal"] = "fixed"
    """How output lengths spread around --output-tokens."""
    output_spread: float = 0.5
    """The same for --output-tokens."""
    shared_prefix: float = 0.0
    """Share of a prompt, 0 to 1, that is the same for all prompts of a group (needs --input-tokens)."""
    prefix_groups: int = 1
    """Number of groups with a prefix of their own."""
    prompt_file: str | None = None
    """Prompts out of a ShareGPT .json, a .jsonl with "prompt", or a text file (a prompt a paragraph or line)."""
    reply_lengths: bool = False
    """Generate as many tokens as the reply in --prompt-file has, in place of --output-tokens."""
    arrival: Literal["poisson", "gamma", "constant"] = "poisson"
    """How arrivals at --rate spread."""
    burstiness: float = 1.0
    """Shape of gamma arrivals: 1 is Poisson, below 1 comes in bursts."""
    ramp_to: float | None = None
    """Rate at which the arrivals end up, from --rate, over --ramp-s (Poisson)."""
    ramp_s: float = 60.0
    """Seconds that the ramp takes."""
    stages: str = ""
    """Stages RATE:SECONDS,... of Poisson arrivals, in place of --rate; ends after the last one."""
    trace: str | None = None
    """Replay arrivals and lengths: Azure LLM inference or BurstGPT .csv, Mooncake or own .jsonl; --requests bounds it."""
    time_scale: float = 1.0
    """Factor on the trace's instants; 2 makes it last twice as long."""
    max_input_tokens: int | None = None
    """Cap on the prompt lengths of a trace, file or distribution."""
    max_output_tokens: int | None = None
    """Cap on their output lengths."""
    duration_s: float | None = None
    """Send new requests for this long, in place of --requests."""
    steady_s: float | None = None
    """End once throughput and requests in flight held steady for this long (10 minutes or --duration-s at most)."""
    slo_ttft_ms: float | None = None
    """A request meets the SLO if its TTFT is at most this; the goodput counts those that do."""
    slo_tbt_ms: float | None = None
    """And if its mean time between tokens is at most this."""
    phase: Literal["both", "prefill", "decode"] = "both"
    """Calibrate one phase of an instance: prefill asks for one token a request; decode sends one batch (--requests at most
    --concurrency) and measures only while all of it decodes."""
    client_processes: int = 1
    """Processes over which the client splits its one schedule; raise it when a run is marked client-limited."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """What is read from the devices."""

    power: bool = True
    """Sample the devices; --no-power for servers of another host."""
    sample_interval_s: float = 0.1
    """Seconds between samples of every device, 0.01 to 10."""
    idle_s: float = 3.0
    """Seconds for which each kind of idle power is measured (bare, CUDA context, engine ready); 0 leaves it out."""
    cooldown_s: float = 60.0
    """Seconds to wait at most, before a trial, until the GPUs are as cool as before the first one."""
    prefill_clock: int | None = None
    """SM clock of prefill's GPUs in MHz, locked for the run and restored after it (needs root)."""
    decode_clock: int | None = None
    """SM clock of decode's GPUs in MHz, likewise."""
    single_clock: int | None = None
    """SM clock of the single instance's and replicas' GPUs in MHz, likewise."""
    prefill_power_cap: int | None = None
    """Power limit of each of prefill's GPUs in watts, restored after the run (needs root)."""
    decode_power_cap: int | None = None
    """Power limit of each of decode's GPUs in watts, likewise."""
    single_power_cap: int | None = None
    """Power limit of each of the single instance's and replicas' GPUs in watts, likewise."""
    price_kwh: float | None = None
    """Price of a kWh in your currency: adds the price of a million tokens to the summary."""
    gco2_kwh: float | None = None
    """Grams of CO2 a kWh of your grid stands for: adds the CO2 of a million tokens to the summary."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """On which hosts it runs; without --cluster all is on this one (docs/cluster.md)."""

    cluster: str | None = None
    """Run on a Ray cluster: auto (the one that this host belongs to) or its head's ADDRESS:PORT."""
    place: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Where instances go: same-node, spread, or ROLE=NODE (several); by itself as few nodes as can hold them."""
    client_nodes: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Nodes over which --client-processes are spread in turn; by itself the one where pdbench runs."""
    node_timeout_s: float = 20.0
    """Silence after which a node counts as lost and the run ends, marked, with what was measured."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """What the proxy forwards to and how it behaves when something fails. URL is http://HOST:PORT[@KV_HOST:KV_PORT]."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the proxy to the network (set PDBENCH_PROXY_API_KEY then)."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, named on the first line of output."""
    prefill: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Prefill instances."""
    decode: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Decode instances; with --connector none: all instances."""
    connector: Literal["p2p-nccl", "tcp", "builtin-p2p-nccl", "nixl", "none"] = "p2p-nccl"
    """Which dialect the instances speak; p2p-nccl and tcp are ours, none balances plainly over --decode."""
    kv_port: int = 14579
    """KV port of the first instance whose URL names none; every further instance takes the next one."""
    prefill_policy: Literal["least-work", "round-robin", "prefix-affinity"] = "least-work"
    """Which prefill instance a request takes; least-work counts prompt tokens in flight."""
    decode_policy: Literal["least-work", "round-robin", "prefix-affinity"] = "least-work"
    """Which decode instance a request takes; least-work counts requests in flight."""
    first_token: Literal["prefill", "decode"] = "prefill"
    """Whose token opens a stream: prefill's own where greedy sampling makes that exact (p2p-nccl and tcp), or always decode's."""
    fallback: Literal["none", "recompute"] = "none"
    """When no prefill instance can serve a request: fail it (none), or let decode compute the prompt (recompute)."""
    retries: int = 2
    """Other instances tried before a request fails, as long as no byte of its answer was passed on."""
    connect_timeout_s: float = 5.0
    """Seconds a connection to an instance may take."""
    prefill_timeout_s: float = 120.0
    """Seconds prefill may take before it counts as stalled."""
    decode_timeout_s: float = 300.0
    """Seconds without a byte from decode before it counts as stalled."""
    health_interval_s: float = 2.0
    """Seconds between health checks of an instance."""
    unhealthy_after: int = 3
    """Failures in a row that take an instance out; one passed health check lets it back in."""
    max_in_flight: int = 4096
    """Requests forwarded at once; more wait in the queue."""
    queue_size: int = 1024
    """Requests that wait at most; more are answered 429 with Retry-After."""
    queue_timeout_s: float = 60.0
    """Seconds a request may wait in the queue before it is answered 429."""
    max_connections: int = 8192
    """Open client connections; more are closed."""
    max_body_mib: float = 32.0
    """Largest request body, in MiB."""
    max_header_kib: float = 32.0
    """Largest request head, in KiB."""
    idle_timeout_s: float = 75.0
    """Seconds a client may stay silent between requests, or unable to take its answer's bytes."""
    request_timeout_s: float = 30.0
    """Seconds a client may pause within a request that it sends."""
    drain_timeout_s: float = 30.0
    """Seconds that requests in flight get to end after SIGTERM."""
    event_log: str | None = None
    """File that gets one JSON line a request: instants, instances, retries, status. Never content."""
    timing_header: bool = False
    """Tell the client the stages' durations in a Server-Timing header."""
    workers: int = 1
    """Processes that share the port, with one view of the instances."""
