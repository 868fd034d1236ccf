"""Costs of a role's engine from a run: decode steps by regression, prefill steps and the way in from how tokens arrived around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import least_squares, minimize, nnls

from pdbench.analysis.arrivals import Array, BoolArray, IntArray
from pdbench.plan.engine import COSTS, SHORT_PROMPT, Costs, Engine, Limits
from pdbench.plan.steps import Steps

ROBUST = 0.15
"""Relative error from which on a step counts less (soft l1): a hiccup of the host is no cost."""
PRIOR_SD = np.array([0.1 if name == "alike_launch" else 2.0 for name in COSTS])
"""Standard deviation of the logarithm of each of `COSTS` before anything was measured: it only keeps the fit from running away. A launch of one
kind of kernels is as long as one of both kinds unless short prompts say otherwise."""
BEFORE_GPU_S = 3e-3
"""`Costs.before_gpu_s` before anything was measured."""
JITTER_SHARES = (np.arange(500) + 0.5) / 500
"""Fine enough for the slowest of a machine's pauses in one step of a hundred: where handoffs take most of the last hundredth, p99 shows them."""
SAMPLES = 40
RATIOS = 12
"""Lengths of prompts that a picture shows beside the fitted line."""
LEAST_STEPS = 5
"""A graph size with fewer steps than this is not calibrated."""


@dataclass(frozen=True)
class Decode:
    """`costs` of decode steps; `jitter` are quantiles of what steps took beyond them, as shares of them, `speeds` the instances' trials'
    medians of what they took over them, `ratios` the same by graph size."""

    costs: Costs
    jitter: list[float]
    speeds: list[float]
    ratios: list[tuple[float, float]]


@dataclass(frozen=True)
class Prefill:
    """`costs` of steps with prompts too; `samples` are rows of `COSTS` that the data leave possible, `speeds` the trials'
    factors on the host's part, where most prompts' steps are as long as the GPU's part on this, too; `ratios` (tokens, what prompts of about so
    many took over the costs)."""

    costs: Costs
    samples: Array
    speeds: list[float]
    ratios: list[tuple[float, float]] = field(default_factory=list)


def decode_costs(steps: Sequence[Steps], sizes: Sequence[int]) -> Decode:
    """Least squares of calm steps' durations on graph size (one of `sizes`; none: a line) and context; no prompt is around a calm step.

    Outliers beyond 3 median deviations of their size are left out. Raises ValueError where nothing was calm.
    """
    calm = [_calm(part, sizes) for part in steps]
    sequences, size, context, took_s = (np.concatenate(parts) for parts in zip(*calm, strict=True))
    place = np.repeat(np.arange(len(calm)), [len(part[0]) for part in calm])
    keep = np.zeros(len(size), dtype=bool)
    for each in np.unique(size):
        here = size == each
        if here.sum() >= LEAST_STEPS:
            distance = np.abs(took_s - np.median(took_s[here]))
            keep |= here & (distance <= 3 * max(1.5 * float(np.median(distance[here])), 1e-5))
    seen = np.unique(size[keep])
    if not len(seen):
        raise ValueError("no decode step without prompts around it")
    if sizes:
        columns = [*((size == each).astype(float) for each in seen), context.astype(float)]
    else:  # no graphs, no padding: a line
        columns = [np.ones(len(size)), size.astype(float), context.astype(float)]
    matrix = np.stack(columns, axis=1)
    scale = np.maximum(matrix.max(axis=0), 1e-12)
    solution = nnls(matrix[keep] / scale, took_s[keep])[0] / scale
    of_seen = np.isin(size, seen)  # outliers too
    usual_s = matrix @ solution
    # Rare pauses are part of the mean step. They are longer where steps are: shares of a step hold at other loads, seconds do not.
    slower = float(took_s[of_seen].sum() / usual_s[of_seen].sum())
    usual_s *= slower
    solution *= slower
    jitter = np.quantile(np.maximum(took_s / usual_s, 1e-3)[of_seen] - 1, JITTER_SHARES).tolist()
    here = [of_seen & (place == each) for each in range(len(calm))]
    speeds = [float(np.median(took_s[each] / usual_s[each])) for each in here if each.sum() >= LEAST_STEPS]
    if sizes:
        table = dict(zip(map(int, seen), solution[:-1].tolist(), strict=True))
        slope = (table[int(seen[-1])] - table[int(seen[0])]) / max(int(seen[-1] - seen[0]), 1)
    else:
        table, slope = {1: float(solution[0] + solution[1])}, float(solution[1])
    costs = Costs(gpu_decode_s=table, gpu_per_sequence_s=slope, gpu_per_context_token_s=float(solution[-1]))
    ratios = [
        (float(np.median(sequences[size == each])), float(np.median((took_s / usual_s)[size == each]))) for each in seen
    ]
    return Decode(costs, jitter, speeds, ratios)


def _calm(steps: Steps, sizes: Sequence[int]) -> tuple[IntArray, IntArray, IntArray, Array]:
    """(sequences, graph size, context, seconds) of the steps far from any prompt."""
    began = np.flatnonzero(steps.firsts)
    calm = steps.since > 3
    for shift in range(-1, 4):  # a prompt's step k changes the hand-outs of k-1 to k+1, and those of a chunk before it
        calm[np.clip(began + shift, 0, len(calm) - 1)] = False
    places = np.flatnonzero(calm)
    took_s = steps.handed_s[places] - steps.handed_s[places - 1]
    n = steps.sequences[places]
    size = n if not sizes else np.asarray(sizes)[np.minimum(np.searchsorted(sizes, n), len(sizes) - 1)]
    size = np.maximum(size, n)  # beyond the largest graph nothing is padded
    return n, size, steps.context[places], took_s


@dataclass(frozen=True)
class Chains:
    """Runs of steps around prompts, one row each: from the calm step before the first prompt until prompts are gone.

    `took_s` is from a step's scheduling to the next one's (0 beyond a chain's end), `prompt` its prompt tokens, `decode_s` the GPU's
    time for the running streams' part, `trial` the row's trial; `beyond` the CUDA graphs are steps of more tokens than these hold, `alike` those whose sequences
    one kind of attention kernels computes (`SHORT_PROMPT`).
    """

    took_s: Array
    prompt: IntArray
    beyond: BoolArray
    alike: BoolArray
    decode_s: Array
    trial: IntArray


def chains(steps: Sequence[Steps], trials: Sequence[int], engine: Engine) -> Chains:
    """The chains of instances that compute prompts while streams run; `trials` names each Steps' trial. Of the engine only decode's costs count."""
    rows: list[tuple[Array, IntArray, Array, BoolArray, BoolArray, int]] = []
    limits, lag = engine.limits, engine.limits.lag
    for part, trial in zip(steps, trials, strict=True):
        since = part.since
        running = part.sequences - part.firsts
        prompt, longest = part.prompt.copy(), part.longest.copy()
        room = np.maximum(limits.max_num_batched_tokens - running, 1)
        for k in range(len(prompt) - 1, 0, -1):  # what is over the budget came in chunks, which filled the steps before
            before = k
            while prompt[k] > room[k] and since[before]:
                before -= 1
                chunk = min(int(prompt[k]) - 1, max(0, int(room[before] - prompt[before])))
                prompt[k] -= chunk
                prompt[before] += chunk
                longest[before] = max(longest[before], chunk)
            longest[k] = min(longest[k], prompt[k])
        gpu_s = engine.costs.gpu_step_s(running, part.context)
        k = 0
        for start in np.flatnonzero(prompt > 0):
            if start < k or since[start] < lag + 2 or prompt[start - 1] or running[start] < 1:
                continue
            end = start + 1
            while end < len(prompt) and since[end] and prompt[max(start, end - 3) : end].any():
                end += 1
            k = end
            here = np.arange(start - 1, end)
            took_s = part.handed_s[here - lag + 1] - part.handed_s[here - lag]
            beyond = prompt[here] + running[here] > limits.captured
            alike = (running[here] == 0) | (longest[here] <= SHORT_PROMPT)
            rows.append((took_s, prompt[here], gpu_s[here], beyond, alike, trial))
    shape = len(rows), max((len(row[0]) for row in rows), default=0)
    took_s, decode_s, tokens = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
    beyond, alike = np.zeros(shape, bool), np.zeros(shape, bool)
    for place, (of_row_s, *others, _) in enumerate(rows):
        steps_here = place, slice(len(of_row_s))
        took_s[steps_here] = of_row_s
        for array, values in zip((tokens, decode_s, beyond, alike), others, strict=True):
            array[steps_here] = values
    return Chains(took_s, tokens, beyond, alike, decode_s, np.array([row[-1] for row in rows], dtype=int))


def prefill_costs(observed: Chains, engine: Engine) -> Prefill:
    """Costs of steps with prompts by least squares of the logarithms of all steps' durations in chains, the trials' speeds apart.

    The host launches a decode step in the time of the engine's fastest at most. Which prompts were in which step is known from the tokens; the durations
    follow from the recursion of `plan.engine`, each step from the instant at which it was really scheduled. Raises ValueError without a chain.
    """
    if not len(observed.took_s):
        raise ValueError("no prompt was computed while streams ran")
    trials, which = np.unique(observed.trial, return_inverse=True)
    valid = observed.took_s > 0
    is_prefill = observed.prompt > 0
    tokens = observed.prompt.astype(float)
    fastest_s = min(engine.costs.gpu_decode_s.values())
    within, beyond = (observed.took_s[is_prefill & valid & where] for where in (~observed.beyond, observed.beyond))
    fixed = msgspec.structs.replace(engine.costs, host_eager_s=eager_s(beyond, len(within)))

    def values_of(logs: Array) -> Array:
        values = np.exp(logs[..., : len(COSTS)])
        values[..., -1] = np.minimum(values[..., -1], fastest_s)
        return values

    def speeds_of(logs: Array) -> Array:
        of_trials = logs[len(COSTS) :]
        return np.exp(np.append(of_trials, -of_trials.sum()))

    def costs_of(logs: Array) -> Costs:
        return fixed.with_values(values_of(logs))

    def misfit(logs: Array, gpu_too: bool) -> Array:
        usual_s = durations(observed, costs_of(logs), engine.limits, speeds_of(logs)[which], gpu_too)
        return np.log(observed.took_s[valid] / usual_s[valid])

    typical = float(np.median(observed.took_s[is_prefill & valid]))
    short = float(np.median(observed.took_s[valid & ~is_prefill]))
    per_token = typical / float(np.median(tokens[is_prefill & valid]))
    launch = 0.8 * typical if engine.limits.captured else 0.7 * short  # without graphs, launches are alike
    prior = np.log([launch, 0.02 * per_token, 1e-3, 0.5 * per_token, BEFORE_GPU_S, 1.0, 0.7 * short])
    starts = [prior + np.log([1, a, 1, b, 1, 1, 1]) for a, b in ((1.0, 1.0), (10.0, 0.6), (1.0, 1.9))]
    starts = [np.append(start, np.zeros(len(trials) - 1)) for start in starts]
    for gpu_too in (False, True):
        logs, samples = fit_logs(partial(misfit, gpu_too=gpu_too), starts, prior, count=len(COSTS))
        costs, speeds = costs_of(logs), speeds_of(logs)
        factors, measured, of_gpu = prompt_factors(observed, costs, engine.limits, speeds[which], gpu_too)
        if np.median(of_gpu[is_prefill & valid]) <= 0.5:
            break  # else trials differ by the GPU's speed, not by that of its host alone
    of_trial = np.broadcast_to(which[:, None], measured.shape)
    noise = series(factors[measured], of_gpu[measured], of_trial[measured])
    ratios = by_length(observed.prompt[measured], factors[measured])
    return Prefill(msgspec.structs.replace(costs, **noise), values_of(samples), speeds.tolist(), ratios)


def by_length(tokens: IntArray, ratios: Array) -> list[tuple[float, float]]:
    """Medians of (tokens, ratio) of prompts about as long, of as many prompts each."""
    parts = np.array_split(np.argsort(tokens, kind="stable"), min(RATIOS, len(tokens) // LEAST_STEPS) or 1)
    return [(float(np.median(tokens[part])), float(np.median(ratios[part]))) for part in parts if len(part)]


def series(factors: Array, of_gpu: BoolArray, trials: IntArray) -> dict[str, Any]:
    """The noise of `Costs` from factors on steps with prompts in the order of time, those on the GPU's part apart from those on the launch;
    a trial with hardly any has no series of its own."""

    def apart(of: BoolArray) -> tuple[tuple[float, ...], ...]:
        own = [factors[of & (trials == trial)] for trial in np.unique(trials)]
        long = [each for each in own if len(each) >= LEAST_STEPS] or [factors[of]]
        return tuple(tuple(each.tolist()) for each in long if len(each))

    launch, computing = apart(~of_gpu), apart(of_gpu)
    return {"noise": launch or computing, "gpu_noise": computing if launch and of_gpu.sum() >= LEAST_STEPS else ()}


def durations(
    observed: Chains, costs: Costs, limits: Limits, speeds: Array | float = 1.0, gpu_too: bool = False
) -> Array:
    """How long each step of chains takes by the recursion of `plan.engine`, from the instant at which it was really scheduled; the host launches
    a row's prompts in `speeds` times as long, and the GPU computes them so if `gpu_too`."""
    speed, is_prefill = np.broadcast_to(speeds, len(observed.trial))[:, None], observed.prompt > 0
    host_s = costs.host_prompt_s(observed.prompt, observed.beyond, observed.alike)
    launch = np.where(is_prefill, speed * host_s, costs.host_decode_s)
    before = np.where(is_prefill, speed * costs.before_gpu_s, 0.0)
    gpu_s = (speed if gpu_too else 1.0) * costs.gpu_prompt_s(observed.prompt)
    work = observed.decode_s + np.where(is_prefill, gpu_s, 0.0)
    if not limits.async_scheduling:
        return np.asarray(np.maximum(launch, before + work))
    took = np.empty_like(work)
    behind = work[:, 0]  # how far the GPU is behind the scheduling
    for step in range(work.shape[1]):
        took[:, step] = np.maximum(launch[:, step], behind)
        behind = np.maximum(np.maximum(behind, before[:, step]) + work[:, step] - observed.took_s[:, step], 0.0)
    return took


def prompt_factors(
    observed: Chains, costs: Costs, limits: Limits, speeds: Array | float = 1.0, gpu_too: bool = False
) -> tuple[Array, BoolArray, BoolArray]:
    """How many times as long as `costs` and `speeds` say the prompt of each step took, of which steps that is seen, and which were as long as the
    GPU's part.

    Where the host launches a prompt for longer than the GPU computes it, its own step shows that; else what is over in it and, with asynchronous
    scheduling, in the next one, which waits for the GPU.
    """
    usual_s, valid = durations(observed, costs, limits, speeds, gpu_too), observed.took_s > 0
    speed = np.broadcast_to(speeds, len(observed.trial))[:, None]
    host_s = speed * costs.host_prompt_s(observed.prompt, observed.beyond, observed.alike)
    gpu_s = (speed if gpu_too else 1.0) * costs.gpu_prompt_s(observed.prompt)
    over_s, shown = np.where(valid, observed.took_s - usual_s, 0.0), valid.copy()
    if limits.async_scheduling:
        over_s[:, :-1] += over_s[:, 1:].copy()
        shown[:, :-1] &= valid[:, 1:] & (usual_s[:, 1:] > observed.decode_s[:, 1:])
        shown[:, -1] = False
    by_gpu = gpu_s > host_s if limits.async_scheduling else usual_s > host_s + 1e-9
    factors = np.where(by_gpu, 1 + over_s / gpu_s, observed.took_s / np.maximum(usual_s, 1e-9))
    by_host = valid & (usual_s <= host_s + 1e-9)
    return np.maximum(factors, 0.1), (observed.prompt > 0) & np.where(by_gpu, shown, by_host), by_gpu


def fit_logs(
    misfit: Callable[[Array], Array], starts: Sequence[Array], prior: Array, *, count: int, rough: bool = False
) -> tuple[Array, Array]:
    """The parameters of the best of several fits (`rough`: of one, from the best of `starts`), and `SAMPLES` draws (rows) of the first `count` from what the data leave possible.

    `prior` is where the first parameters are without data. Draws come from the curvature at the best and are drawn again by their
    likelihood: where the data only bound a cost from above, as the host's launch hides the GPU's work, the curvature alone misleads.
    """

    def both(logs: Array) -> Array:
        weak = (logs[: len(prior)] - prior) / PRIOR_SD[: len(prior)]
        return np.concatenate([misfit(logs) / ROBUST, weak])

    def cost(logs: Array) -> float:
        return float(np.sum(np.sqrt(1 + both(logs) ** 2) - 1))

    if rough:  # slopes mislead where a small change of a cost moves a prompt into another step
        best = min(starts, key=cost)
        for width in (0.2, -0.4, 0.2):  # a simplex that shrank too early goes on as a new one
            simplex = best + np.vstack([np.zeros(len(prior)), width * np.eye(len(prior))])
            options = {"initial_simplex": simplex, "maxfev": 200, "xatol": 0.005, "fatol": 0.01}
            best = minimize(cost, best, method="Nelder-Mead", options=options).x
        slopes = np.stack(
            [(both(best + shift) - both(best - shift)) / 0.1 for shift in 0.05 * np.eye(len(best))], axis=1
        )
        slopes /= np.sqrt(1 + both(best)[:, None] ** 2)
    else:
        fits = [
            least_squares(both, start, loss="soft_l1", x_scale="jac", max_nfev=40, ftol=1e-4, xtol=1e-4)
            for start in starts
        ]
        solution = min(fits, key=lambda fit: fit.cost)
        best, slopes = solution.x, solution.jac
    spread = max(1.0, float(np.median(np.abs(misfit(best)))) * 1.4826 / ROBUST) ** 2
    values, axes = np.linalg.eigh(slopes.T @ slopes)
    deviations = np.minimum(np.sqrt(spread / np.maximum(values, 1e-9)), max(PRIOR_SD))
    random = np.random.default_rng(0)
    normal = random.normal(size=(2 * SAMPLES, len(best)))
    drawn = best + (normal * deviations) @ axes.T
    logs_of_weight = np.array([-cost(row) / spread for row in drawn]) + (normal**2).sum(axis=1) / 2
    weight = np.exp(logs_of_weight - logs_of_weight.max())
    picked = random.choice(len(drawn), SAMPLES, p=weight / weight.sum())
    return best, drawn[picked, :count]


def eager_s(beyond_s: Sequence[float] | Array, within: int) -> float | None:
    """What steps beyond the CUDA graphs took: the host launches every kernel. None where too few were beyond, or as few (`within`) were not."""
    return float(np.median(beyond_s)) if min(len(beyond_s), within) >= LEAST_STEPS else None


def at_speed(costs: Costs, factor: float) -> dict[str, Any]:
    """Fields of `Costs` of the same engine where steps with prompts take so many times as long, launched by the host or computed by the GPU."""
    names = (
        "host_prefill_s", "host_eager_s", "host_per_prompt_token_s", "gpu_prefill_s", "gpu_per_prompt_token_s", "before_gpu_s",
    )  # fmt: skip
    return {name: factor * value for name in names if (value := getattr(costs, name)) is not None}


def join_cost(steps: Sequence[Steps], costs: Costs) -> float:
    """How much later a step's tokens come for each sequence that joins from prefill; 0 without enough such steps."""
    extra: list[float] = []
    for part in steps:
        since, handed, firsts = part.since, part.handed_s, part.firsts
        usual_s = costs.gpu_step_s(part.sequences, part.context)
        for k in np.flatnonzero((firsts[:-2] > 0) & (since[:-2] > 3) & (since[1:-1] > 0) & (since[2:] > 0)):
            if not firsts[[k - 2, k - 1, k + 1]].any():
                extra.append((handed[k] - handed[k - 1] - usual_s[k]) / firsts[k])
    return max(0.0, float(np.median(extra))) if len(extra) >= LEAST_STEPS else 0.0
