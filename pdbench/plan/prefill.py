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


def prefill_alone(visits: Sequence[Visits], trials: Sequence[int], limits: Limits, ingress_s: float) -> fit.Prefill:
    """Costs of an instance that only prefills: its queue is replayed by the simulator until the answers' times fit.

    `trials` names each Visits' trial. Speeds and noise are those of prompts that were alone. Raises ValueError with fewer than
    `LEAST_STEPS` of them.
    """
    names, places = np.unique(trials, return_inverse=True)
    alone = [visit.alone() for visit in visits]
    took_s = np.concatenate([(v.done_s - v.sent_s - ingress_s)[a] for v, a in zip(visits, alone, strict=True)])
    tokens = np.concatenate([visit.prompt[of_visit] for visit, of_visit in zip(visits, alone, strict=True)])
    which = np.repeat(places, [of_visit.sum() for of_visit in alone])
    if len(took_s) < fit.LEAST_STEPS or (took_s <= 0).any():
        raise ValueError("hardly any prompt was alone at its prefill instance")
    line = np.polyfit(tokens, took_s, 1) if np.ptp(tokens) > 0.2 * tokens.mean() else np.array([0.0, np.median(took_s)])
    ratio = np.log(took_s / np.maximum(np.polyval(line, tokens), 0.1 * took_s.min()))
    counts = np.bincount(which, minlength=len(names))
    told = np.flatnonzero(counts >= min(fit.LEAST_STEPS, counts.max()))  # a burst's prompts are hardly ever alone
    logs = np.array([np.median(ratio[which == place]) for place in told])
    speed_logs = np.zeros(len(names))
    speed_logs[told] = logs - logs.mean()
    speeds = np.exp(speed_logs)
    noise = tuple(tuple(np.exp(ratio[which == place] - log).tolist()) for place, log in zip(told, logs, strict=True))
    typical, middle = float(np.exp(logs.mean()) * np.median(np.polyval(line, tokens))), float(np.median(tokens))
    prior = np.log([0.9 * typical, 0.02 * typical / middle, 1e-3, 0.5 * typical / middle])
    launches = [zip(*visit.launches(limits.lag), strict=True) for visit in visits]
    beyond_s = [launch_s for row in launches for size, launch_s in row if size > limits.captured]
    within = sum(int((visit.prompt <= limits.captured).sum()) for visit in visits)
    fixed = Costs(ingress_s=ingress_s, host_eager_s=fit.eager_s(beyond_s, within))

    def costs_of(logs: Array, host_decode_s: float) -> Costs:
        return fit.with_values(fixed, [*np.exp(logs), host_decode_s])

    def misfit_alone(logs: Array) -> Array:
        """Prompts that were alone tell the longer of the two parts."""
        usual_s = costs_of(logs, 0.0).prompt_step_s(tokens, limits.captured)
        return np.asarray(np.log(took_s) - speed_logs[which] - np.log(usual_s))

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

    starts = [prior + np.log([1, a, 1, b]) for a, b in ((1.0, 0.9), (10.0, 0.4), (1.0, 1.9))]
    first, _ = fit.fit_logs(misfit_alone, starts, prior, count=4)
    # A prompt that was alone does not tell the host's part from the GPU's: the replay begins with what it fits best of several guesses.
    took = float(np.exp(prior[0])) / 0.9
    guesses = [
        [
            0.98 * host * took,
            0.02 * host * took / middle,
            fixed_part * gpu * took,
            (1 - fixed_part) * gpu * took / middle,
        ]
        for host, gpu in ((1.0, 0.6), (1.0, 0.9), (0.8, 1.0), (0.4, 1.0))
        for fixed_part in (0.05, 0.3)
    ]
    best, samples = fit.fit_logs(misfit, [first, *np.log(guesses)], prior, count=4, rough=True)
    no_host_decode = np.zeros((fit.SAMPLES, 1))
    costs = msgspec.structs.replace(costs_of(best, 0.0), noise=noise)
    return fit.Prefill(costs, np.hstack([np.exp(samples), no_host_decode]), speeds[told].tolist())
