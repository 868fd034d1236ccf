"""The deployment that a calibration says: its engines as calibrated or put together, or as they may be on another day; or why there is none."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from scipy import special

from pdbench.analysis.arrivals import IntArray
from pdbench.errors import OptionError, UserError
from pdbench.plan import fit
from pdbench.plan.engine import COSTS, Demand, Deployment, Engine, Handoff, Layout, Role
from pdbench.plan.records import Calibration, RoleCalibration
from pdbench.plan.simulate import simulate

MOST_INSTANCES = 10_000
"""Of a role. The choice among so many is a number of as many bits (simulate.py)."""
DECODE_ERROR = 0.02
"""Standard deviation of decode steps' logarithms from one deployment or day to the next (docs/results/plan)."""
DAYS, DAYS_WEIGH = 0.15, 2
"""Least standard deviation of another day's speed (logarithm), however alike a run's trials are: the same prompt's step took 45, 57 and 62 ms
in three runs recorded on two H200 (docs/results/plan)."""
DRIFT = 1.5
"""Above this ratio of two trials' speeds a machine is too restless to predict."""
HANDOFF_ERROR = 0.1
"""Standard deviation of the logarithm of a handoff's steps from one run to another (docs/results/plan)."""


def parse_layout(text: str) -> Layout:
    """single, replicas:N, or NpMd. Raises UserError for anything else."""
    if match := re.fullmatch(r"([0-9]{1,9})p([0-9]{1,9})d", text.lower()):
        layout = Layout("disaggregated", {"prefill": int(match[1]), "decode": int(match[2])})
    elif match := re.fullmatch(r"replicas:([0-9]{1,9})", text):
        layout = Layout("replicas", {"replica": int(match[1])})
    else:
        layout = Layout("single", {"single": int(text == "single")})
    if max(layout.instances.values()) > MOST_INSTANCES:
        raise OptionError(
            f"--deployment {text}: plan simulates at most {MOST_INSTANCES:,} instances of a role: give fewer"
        )
    if all(layout.instances.values()):
        return layout
    raise OptionError(f"--deployment {text}: write single, replicas:N, or NpMd, as in 3p5d")


def sized(calibration: Calibration, layout: Layout) -> Layout:
    """With its instances' GPUs, as far as these were calibrated."""
    each: dict[Role, int] = {}
    for role in layout.instances:
        with suppress(UserError):  # deployment_of says what is missing
            each[role] = role_of(calibration, role).gpus
    return msgspec.structs.replace(layout, gpus_each=each)


def deployment_of(
    calibration: Calibration, layout: Layout, random: np.random.Generator | None = None, share: float = 0.5
) -> Deployment:
    """At the costs' best estimate, with the noise of all trials; or with `random` as it may be on a day whose speed is the quantile `share`. Raises
    UserError with what was not measured."""
    handoff = calibration.handoff or Handoff()
    if layout.kind == "disaggregated" and calibration.handoff is None:
        raise UserError(
            "no run shows the handoff of KV caches: measure one with `pdbench run --against disaggregated --rate R`"
        )
    roles = {role: role_of(calibration, role) for role in layout.instances}
    engines = {role: drawn(each, random, share) if random else each.engine for role, each in roles.items()}
    if random and layout.kind == "disaggregated":
        series = handoff.noise and (handoff.noise[int(random.integers(len(handoff.noise)))],)
        steps = handoff.steps * float(np.exp(random.normal(0, HANDOFF_ERROR)))
        handoff = msgspec.structs.replace(handoff, steps=steps, noise=series)
    return Deployment(
        layout=layout,
        engines=engines,
        handoff=handoff,
        proxy_s=calibration.proxy_s,
        prefill_policy=calibration.prefill_policy,
        decode_policy=calibration.decode_policy,
    )


def role_of(calibration: Calibration, role: Role) -> RoleCalibration:
    """A role's engine: measured, or put together from roles that were. Raises UserError with what must be measured."""
    roles = calibration.roles
    if role in roles:
        return roles[role]
    both = roles.get("single") or roles.get("replica")
    if both is not None:
        return both  # one engine does prefill and decode alike
    prefill, decode = roles.get("prefill"), roles.get("decode")
    if role in ("single", "replica") and prefill and decode and prefill.gpus == decode.gpus:
        costs = msgspec.structs.replace(
            decode.engine.costs,
            **{
                name: getattr(prefill.engine.costs, name)
                for name in (*COSTS[:-1], "host_eager_s", "ingress_s", "ingress_per_token_s", "noise", "gpu_noise")
            },
            join_s=0.0,
        )
        box = msgspec.structs.replace(decode.engine.box, prompt_tokens=prefill.engine.box.prompt_tokens)
        engine = Engine(costs=costs, limits=prefill.engine.limits, box=box)
        watts = prefill.power and decode.power
        if watts and prefill.power:
            prompts = prefill.power.prefill_w, prefill.power.prompt_token_j
            watts = msgspec.structs.replace(watts, prefill_w=prompts[0], prompt_token_j=prompts[1])
        assumed = [*prefill.assumed, "put together from prefill and decode"]
        samples = [[*row[:-1], costs.host_decode_s] for row in prefill.samples]  # prefill launches no decode steps
        return msgspec.structs.replace(
            prefill,
            engine=engine,
            samples=samples,
            power=watts,
            jitter=decode.jitter,
            decode_speeds=decode.decode_speeds,
            assumed=assumed,
        )
    raise UserError(
        f"no run shows a {role} engine: measure one with `pdbench run --against "
        f"{'disaggregated' if role in ('prefill', 'decode') else 'single'} --rate R`"
    )


def another_speed(speeds: Sequence[float], share: float) -> float:
    """The quantile `share` of another day's speed over the mean of these trials, a t distribution.

    What the trials say of its spread is pooled with `DAYS`, which weighs as much as `DAYS_WEIGH` more trials: two that are alike say little,
    and one says nothing.
    """
    count = len(speeds)
    of_trials = (count - 1) * float(np.var(np.log(speeds), ddof=1)) if count > 1 else 0.0
    degrees = count - 1 + DAYS_WEIGH
    deviation = max(DAYS, float(np.sqrt((of_trials + DAYS_WEIGH * DAYS**2) / degrees)))
    reach = float(special.stdtrit(degrees, share)) * deviation * np.sqrt(1 + 1 / count)
    return float(np.exp(np.clip(reach, -2, 2)))


def drawn(role: RoleCalibration, random: np.random.Generator, share: float) -> Engine:
    """An engine as it may be another time: costs as the data leave them possible, a trial's noise, the quantile `share` of another day's speed."""
    costs = role.engine.costs.with_values(role.samples[int(random.integers(len(role.samples)))])
    spread = float(np.std(np.log(role.decode_speeds))) if role.decode_speeds else 0.0
    factor = float(np.exp(random.normal(0, max(DECODE_ERROR, spread))))
    changed: dict[str, Any] = {"gpu_decode_s": {size: factor * cost for size, cost in costs.gpu_decode_s.items()}}
    if role.computes:
        for name in ("noise", "gpu_noise"):
            if of_trials := getattr(costs, name):
                changed[name] = (of_trials[int(random.integers(len(of_trials)))],)
        changed |= fit.at_speed(costs, another_speed(role.speeds, share))
    return msgspec.structs.replace(role.engine, costs=msgspec.structs.replace(costs, **changed))


def _cached_tokens(calibration: Calibration, layout: Layout, demand: Demand) -> IntArray:
    """Of each prompt; what requests share is cached as long as each instance has room for it."""
    if demand.blocks is None:
        return demand.cached_tokens
    return simulate(deployment_of(calibration, layout), demand).cached_tokens


def unfit(calibration: Calibration, layout: Layout, demands: Sequence[Demand]) -> str | None:
    """Why the calibration itself does not carry this load."""
    if calibration.drift > DRIFT:
        return (
            f"this machine drifts: the same step was {calibration.drift:.2f} times slower in one trial than in another; "
            "measure again on a quiet machine, at least five trials (`pdbench run --pairs 5`)"
        )
    whole = np.concatenate([demand.prompt_tokens + demand.output_tokens for demand in demands])
    for role in layout.instances:
        longest = role_of(calibration, role).engine.limits.max_model_len
        if longest and (beyond := int(np.sum(whole > longest))):
            return (
                f"{beyond:,} of {len(whole):,} requests are longer than the {longest:,} tokens of --max-model-len, and would be refused: "
                "calibrate with a larger one, or give --max-input-tokens and --max-output-tokens"
            )
    computed = [demand.prompt_tokens - _cached_tokens(calibration, layout, demand) for demand in demands]
    for role in layout.instances:
        if role == "decode":
            continue
        calibrated = role_of(calibration, role)
        shortest, longest = calibrated.prompt_lengths
        low, high = np.quantile(np.concatenate(computed), (0.05, 0.95))
        if (low < 0.8 * shortest or high > 1.25 * longest) and not calibrated.knows_lengths:
            length = f"{low:,.0f} to {high:,.0f}" if high > low else f"{low:,.0f}"
            of_those = " to compute" if any(demand.cached_tokens.any() for demand in demands) else ""
            return (
                f"prompts of {length} tokens{of_those}, and {role} was calibrated with {shortest:,} to {longest:,}: what a token costs is not known; "
                "measure spread lengths (`pdbench calibrate`, or --input-distribution lognormal --output-distribution lognormal)"
            )
        limits, least = calibrated.engine.limits, calibrated.chunks[0]
        chunks = [min(round(tokens), limits.max_num_batched_tokens) for tokens in (low, high)]
        if chunks[1] < 0.8 * least and not calibrated.knows_lengths:
            return (
                f"prompts are computed {chunks[1]:,} tokens at a time, and {role} was calibrated with {least:,} and more: what a token costs is not known; "
                "measure spread lengths (`pdbench calibrate`), or calibrate with the same --max-num-batched-tokens"
            )
        for launch in sorted({limits.launch(tokens) for tokens in chunks} - {*calibrated.launches}):
            return (
                f"prompts are {launch} the CUDA graphs, and those that calibrated {role} were not: how long such a launch takes is not known; "
                "calibrate with the same graph sizes, and prompts of that length"
            )
    return None
