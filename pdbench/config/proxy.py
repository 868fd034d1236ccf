"""The proxy."""

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from pdbench.config.groups import PROXY, Faults, FirstToken, Limits, Policy, Words
from pdbench.config.types import Count, CountOrZero, NotNegative, Port, Positive


@Parameter(name="*", group=PROXY)
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
    connector: Literal["p2p-nccl", "tcp", "builtin-p2p-nccl", "nixl", "nixl-push", "mooncake", "none"] = "p2p-nccl"
    """KV connector of the instances; p2p-nccl and tcp are ours, none only balances over --decode."""
    kv_port: Port[int] = 14579
    """KV port of the first instance whose URL names none; each further instance takes the next one."""
    prefill_policy: Policy = "least-work"
    """Which prefill instance a request takes; least-work counts prompt tokens in flight."""
    decode_policy: Policy = "least-work"
    """Which decode instance a request takes; least-work counts requests in flight."""
    first_token: FirstToken = "prefill"
    """Whose token opens a stream where greedy sampling makes that exact (p2p-nccl and tcp): prefill's, decode's, or either's, with both asked at once."""
    disaggregate_above: CountOrZero[int] = 0
    """Prompts of at most so many tokens (text: four bytes per token) are computed by decode alone; 0: none are."""
    return_kv: bool = False
    """Ask prefill and decode at once, so that prefill can fetch what decode has of the prompt (instances with return_kv: docs/kv-connector.md)."""
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
