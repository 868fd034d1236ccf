"""How often deployments take turns, what is read from devices and set on them, and what is shown meanwhile."""

from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from pdbench.config.groups import LIVE, PAIRS, POWER, Statistics
from pdbench.config.types import Count, Interval, IntervalOrZero, NotNegative, Port


@Parameter(name="*", group=PAIRS)
@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How deployments take turns (A B, B A, ...). One turn of each is a pair: the same arrivals and prompts for all of them."""

    pairs: Annotated[Count[int | None], Parameter(name=("--pairs", "--trials"))] = None
    """Turns of each deployment; default: 3."""
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


@Parameter(name="*", group=POWER)
@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """What is read from devices and servers, and the clocks that are set on devices."""

    power: bool = True
    """Sample the devices of this host that the servers use."""
    sample_interval_s: Interval[float] = 0.1
    """Seconds between samples of every device, 0.01 to 10."""
    metrics_interval_s: IntervalOrZero[float] = 0.5
    """Seconds between readings of every server's /metrics during a load, 0.05 to 60; 0: only before and after it."""
    idle_s: NotNegative[float] = 3.0
    """Seconds for which each kind of idle power is measured (bare, CUDA context, engine ready); 0 leaves it out."""
    cooldown_s: NotNegative[float] = 60.0
    """Seconds to wait at most, before a trial, until the GPUs are as cool as before the first one."""
    prefill_clock: Count[int | None] = None
    """SM clock of prefill's GPUs in MHz, locked for the run and restored after it (needs root)."""
    decode_clock: Count[int | None] = None
    """SM clock of decode's GPUs in MHz, likewise."""
    single_clock: Count[int | None] = None
    """SM clock of the single instance's and replicas' GPUs in MHz, likewise; and of those that prefill and decode share."""
    prefill_power_cap: Count[int | None] = None
    """Power limit of each of prefill's GPUs in watts, restored after the run (needs root)."""
    decode_power_cap: Count[int | None] = None
    """Power limit of each of decode's GPUs in watts, likewise."""
    single_power_cap: Count[int | None] = None
    """Power limit of each of these GPUs in watts, likewise."""
    price_kwh: Statistics[NotNegative[float | None]] = None
    """Price per kWh in your currency: adds the price of a million tokens to the summary."""
    gco2_kwh: Statistics[NotNegative[float | None]] = None
    """Grams of CO2 per kWh of your grid: adds the CO2 of a million tokens to the summary."""


CLOCK_OPTIONS = tuple(field.name for field in fields(PowerConfig) if field.name.endswith(("_clock", "_power_cap")))
"""Those of PowerConfig that set GPUs' clocks and power limits, by role."""


@Parameter(name="*", group=LIVE)
@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """What is shown while the command runs; nothing of it changes what is measured."""

    live: bool = False
    """Follow it in a browser: prints the address of a page, which becomes the report at the end."""
    live_host: str = "127.0.0.1"
    """Address on which the page and the metrics listen."""
    live_port: Port[int] = 0
    """Port of the page; 0: any free one."""
    prometheus_port: Port[int | None] = None
    """Serve what is measured as metrics for Prometheus on this port, without a token."""
    quiet: bool = False
    """Print results, warnings and errors, no progress."""
