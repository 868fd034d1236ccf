"""Costs of an instance that only prefills: prompts that were alone, and a replay of its queue."""

from collections.abc import Sequence

import msgspec
import numpy as np

from pdbench.analysis.arrivals import Array
from pdbench.plan import fit
from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Layout, Limits
from pdbench.plan.simulate import simulate
from pdbench.plan.steps import Visits

REPLAYED = 4
"""Instances' trials whose queue is replayed, at most; speeds and noise are of all."""


def prefill_alone(
    visits: Sequence[Visits], trials: Sequence[int], limits: Limits, way_in: tuple[float, float]
) -> fit.Prefill:
    """Costs of an instance that only prefills: its queue is replayed by the simulator until the answers' times fit.

    `way_in` is the seconds until a prompt may be scheduled, and those for each of its tokens; `trials` names each Visits' trial. Speeds and noise are those of prompts that were alone. Raises ValueError with fewer than
    `LEAST_STEPS` of them.
    """
    names, places = np.unique(trials, return_inverse=True)
    alone = [visit.alone() for visit in visits]
    fixed = Costs(ingress_s=way_in[0], ingress_per_token_s=way_in[1])
    took_s = np.concatenate(
        [(v.done_s - v.sent_s - fixed.way_in_s(v.prompt))[a] for v, a in zip(visits, alone, strict=True)]
    )
    tokens = np.concatenate([visit.prompt[of_visit] for visit, of_visit in zip(visits, alone, strict=True)])
    which = np.repeat(places, [of_visit.sum() for of_visit in alone])
    if len(took_s) < fit.LEAST_STEPS or (took_s <= 0).any():
        raise ValueError("hardly any prompt was alone at its prefill instance")
    line = np.polyfit(tokens, took_s, 1) if np.ptp(tokens) > 0.2 * tokens.mean() else np.array([0.0, np.median(took_s)])
    counts = np.bincount(which, minlength=len(names))
    told = np.flatnonzero(counts >= min(fit.LEAST_STEPS, counts.max()))  # a burst's prompts are hardly ever alone

    def speeds_of(usual_s: Array) -> tuple[Array, Array, float]:
        """(logarithms of what prompts took over the usual, of the trials' medians of that over the mean of these, this mean)"""
        ratio = np.log(took_s / usual_s)
        of_trials = np.zeros(len(names))
        of_trials[told] = [np.median(ratio[which == place]) for place in told]
        mean = float(of_trials[told].mean())
        of_trials[told] -= mean
        return ratio, of_trials, mean

    usual_s = np.maximum(np.polyval(line, tokens), 0.1 * took_s.min())
    _, speed_logs, mean = speeds_of(usual_s)
    typical, middle = float(np.exp(mean) * np.median(usual_s)), float(np.median(tokens))
    prior = np.log([0.9 * typical, 0.02 * typical / middle, 1e-3, 0.5 * typical / middle, fit.BEFORE_GPU_S])
    launches = [zip(*visit.launches(limits.lag), strict=True) for visit in visits]
    most = limits.max_num_batched_tokens  # more tokens that were answered together were of two steps
    beyond_s = [launch_s for row in launches for size, launch_s in row if limits.captured < size <= most]
    within = sum(int((visit.prompt <= limits.captured).sum()) for visit in visits)
    fixed = msgspec.structs.replace(fixed, host_eager_s=fit.eager_s(beyond_s, within))

    def costs_of(logs: Array, host_decode_s: float) -> Costs:
        return fixed.with_values([*np.exp(logs), 1.0, host_decode_s])

    def alone_costs(logs: Array) -> Costs:
        return costs_of(np.append(logs, -np.inf), 0.0)

    def misfit_alone(logs: Array) -> Array:
        """Prompts that were alone tell the longer of the two parts, but not what of the GPU's comes before its work."""
        return np.asarray(
            np.log(took_s) - speed_logs[which] - np.log(alone_costs(logs).prompt_step_s(tokens, limits.captured))
        )

    starts = [prior[:4] + np.log([1, a, 1, b]) for a, b in ((1.0, 0.9), (10.0, 0.4), (1.0, 1.9))]
    first, _ = fit.fit_logs(misfit_alone, starts, prior[:4], count=4)
    ratio, speed_logs, mean = speeds_of(alone_costs(first).prompt_step_s(tokens, limits.captured))
    speeds = np.exp(speed_logs)
    by_gpu = alone_costs(first).by_gpu(tokens, limits.captured)
    known = np.isin(which, told)
    noise = fit.series(np.exp(ratio - speed_logs[which] - mean)[known], by_gpu[known], which[known])

    replayed = list(zip(visits, places, strict=True))[:REPLAYED]
    demands = [
        Demand(
            t_s=visit.sent_s - visit.sent_s[0],
            prompt_tokens=visit.prompt,
            output_tokens=np.ones_like(visit.prompt),
            cached_tokens=np.zeros_like(visit.prompt),
        )
        for visit, _ in replayed
    ]
    measured_s = np.concatenate([visit.done_s - visit.sent_s for visit, _ in replayed])
    layout = Layout("single", {"single": 1})

    def misfit(logs: Array) -> Array:
        answers_s = []
        for (_, place), demand in zip(replayed, demands, strict=True):
            costs = costs_of(logs, 1e-3)
            costs = msgspec.structs.replace(costs, **fit.at_speed(costs, float(speeds[place])))
            engine = Engine(costs=costs, limits=limits)
            answers_s.append(simulate(Deployment(layout=layout, engines={"single": engine}), demand).ttft_s)
        return np.log(measured_s / np.concatenate(answers_s))

    # A prompt that was alone does not tell the host's part from the GPU's, nor what comes before this: the replay begins with what it fits
    # best of several guesses.
    split = [
        np.array([*first[:2], first[2] + np.log(1 - before), first[3], first[2] + np.log(before)])
        for before in (0.05, 0.5, 0.95)
    ]
    guesses = [
        [
            0.98 * host * typical,
            0.02 * host * typical / middle,
            fixed_part * gpu * typical,
            (1 - fixed_part) * gpu * typical / middle,
            1e-3,
        ]
        for host, gpu in ((1.0, 0.6), (1.0, 0.9), (0.8, 1.0), (0.4, 1.0))
        for fixed_part in (0.05, 0.3)
    ]
    best, samples = fit.fit_logs(misfit, [*split, *np.log(guesses)], prior, count=5, rough=True)
    others = np.tile([1.0, 0.0], (fit.SAMPLES, 1))
    costs = msgspec.structs.replace(costs_of(best, 0.0), **noise)
    ratios = fit.by_length(tokens, took_s / speeds[which] / costs.prompt_step_s(tokens, limits.captured))
    return fit.Prefill(costs, np.hstack([np.exp(samples), others]), speeds[told].tolist(), ratios)
