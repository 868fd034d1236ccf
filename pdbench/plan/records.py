"""What calibration and prediction are saved as: versioned JSON. Unknown is None. Seconds, watts and joules as named."""

from typing import Literal

import msgspec
import numpy as np

from pdbench.config import Policy
from pdbench.plan.engine import COSTS, Engine, Handoff, Launch, Layout, Role

SCHEMA = "pdbench-plan/8"
ATTAIN_PCT = 99.0
"""Share of the requests that must be within the SLO."""
UNSURE = 0.3
"""A cost whose logarithm has a larger standard deviation is not known."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a calibration was made from. `gpu` is the model name, `vllm` the version, `precision` its dtype and what is narrower, `clocks` those that were held; `trials` those that were used."""

    run_id: str | None
    path: str
    kind: str
    model: str
    gpu: str | None
    vllm: str | None
    tensor_parallel: int
    precision: str
    clocks: str
    trials: int
    requests: int


class PowerCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Watts of one instance, fitted over windows of 1 s (`windows` of them, `residual_w` their root mean square error):

    P = idle_w + (decode_w - idle_w) * decode share + sequence_w * sequences + prefill_w * prefill share + prompt_token_j * tokens/s
    """

    idle_w: float
    decode_w: float
    sequence_w: float
    prefill_w: float
    prompt_token_j: float
    windows: int
    residual_w: float


class RoleCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """One role's engine as fitted. `samples` are rows of `COSTS` that the data leave possible. `speeds` are the trials' factors on
    the time of steps with prompts. `gpus` are an instance's, and `power` is of all of them. `assumed` says what was not recorded and what was taken for it,
    `prompt_lengths` are the shortest and the longest prompt, `chunks` what of them a step computed, `launches` how such steps were launched. `jitter` are quantiles of what calm steps took beyond their cost, as the
    client saw them and as shares of it: a gap between tokens has it on top. `decode_speeds` are the instances' trials' factors on decode steps.
    `decode_ratios` and `prompt_ratios` are (sequences or prompt tokens, median of what such steps took over the fitted costs).
    """

    engine: Engine
    samples: list[list[float]]
    speeds: list[float]
    assumed: list[str] = []
    prompt_lengths: tuple[int, int] = (0, 0)
    chunks: tuple[int, int] = (0, 0)
    launches: tuple[Launch, ...] = ("within", "beyond")
    power: PowerCosts | None = None
    gpus: int = 1
    jitter: list[float] = []
    decode_speeds: list[float] = []
    decode_ratios: list[tuple[float, float]] = []
    prompt_ratios: list[tuple[float, float]] = []

    @property
    def computes(self) -> bool:
        """Does it show what prompts cost? Decode's engine does not."""
        return bool(self.engine.costs.noise)

    @property
    def knows_lengths(self) -> bool:
        """Do the runs tell what a prompt's tokens cost from what a prompt costs?"""
        shortest, longest = self.prompt_lengths
        if longest < 1.5 * shortest:
            return False
        lengths, captured = np.array(self.prompt_lengths), self.engine.limits.captured
        steps_s = [self.engine.costs.with_values(row).prompt_step_s(lengths, captured) for row in self.samples]
        prices_s = np.diff(steps_s)
        return bool((prices_s > 0).all() and np.std(np.log(prices_s)) <= UNSURE)

    def error_of(self, cost: str) -> float:
        """Standard deviation of a cost's logarithm."""
        values = np.array([row[COSTS.index(cost)] for row in self.samples])
        return float(np.std(np.log(values))) if (values > 0).all() else 0.0


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a prediction needs, from one or several runs; `handoff` is None where no run shows it. The policies are the proxy's, for what is predicted. `drift` is the largest ratio of
    two trials' speeds; `missing` says what was not measured and the command that measures it, `command` is
    `pdbench calibrate` with the model, options and lengths of the runs."""

    schema: str = SCHEMA
    sources: list[Source]
    roles: dict[Role, RoleCalibration]
    handoff: Handoff | None = None
    proxy_s: float = 0.0
    prefill_policy: Policy = "least-work"
    decode_policy: Policy = "least-work"
    drift: float = 1.0
    missing: list[str] = []
    command: str = ""

    @property
    def on_gpus(self) -> bool:
        """Does an instance stand on a GPU of its own? On a CPU host instances are counted."""
        return all(source.gpu for source in self.sources)


class Figure(msgspec.Struct, frozen=True):
    """A predicted figure with the bounds of its 90 % interval."""

    value: float
    low: float
    high: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment does under a load. `figures` are named as metrics of a run (ttft_p50_ms, j_per_output_token, ...).

    `outside` is the share of a role's busy time in steps beyond the calibrated box, by what was beyond. `refusal`: why no figure is
    given, and the remedy, which is a measurement if `measurable`. `saturated`: the queue grows, and the figures with the load's length.
    `seconds_ms`: the mean request's parts, at the costs' best estimate, as are `distributions_ms`, which checks have (plan/seconds.py).
    """

    schema: str = SCHEMA
    layout: Layout
    load: str
    figures: dict[str, Figure] = {}
    outside: dict[str, float] = {}
    refusal: str | None = None
    measurable: bool = True
    saturated: bool = False
    seconds_ms: dict[str, float] = {}
    distributions_ms: dict[str, list[float]] = {}
    draws: int = 0

    @property
    def verdict(self) -> Literal["met", "not decided", "not met", "refused"] | None:
        """Does the deployment keep the SLO (None: there was none)? Only where the whole interval says so."""
        if self.refusal:
            return "refused"
        met = self.figures.get("slo_met_pct")
        if met is None:
            return None
        return "met" if met.low >= ATTAIN_PCT else "not met" if met.high < ATTAIN_PCT else "not decided"


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What was judged to find the cheapest deployment: that one first if it is met, then others that keep the SLO, then those of which the interval
    does not decide, those that do not, refused ones. `ties` names those that are no dearer than the first, as far as the draws tell. `simulations` of `requests` each."""

    schema: str = SCHEMA
    slo_ttft_ms: float | None
    slo_tbt_ms: float | None
    most_gpus: int
    by_joules: bool
    requests: int
    simulations: int
    candidates: list[Prediction]
    ties: list[str]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A run beside its predictions: from its arrivals alone, and with its own prefill speed (None after a refusal). `trials` are the
    least and largest value of its trials. `held_out`: it did not calibrate. `seconds_ms` and `distributions_ms`: the mean request's parts, and how long all took, as
    measured; empty where the run does not tell. `differs`: in what it is not like the runs that did."""

    path: str
    held_out: bool
    differs: list[str]
    measured: dict[str, float]
    trials: dict[str, list[float]]
    seconds_ms: dict[str, float]
    distributions_ms: dict[str, list[float]] = {}
    predicted: Prediction
    at_own_speed: Prediction | None
