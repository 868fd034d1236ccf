"""Costs of a role's engine from a run: decode steps by regression, prefill steps and the way in from how tokens arrived around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from pdbench.analysis.arrivals import Array, IntArray
from pdbench.plan.engine import Box, Limits
from pdbench.plan.steps import Steps

ROBUST = 0.15
"""Relative error from which on a step counts less (soft l1): a hiccup of the host is no cost."""
PRIOR_SD = 2.0
"""Standard deviation of a cost's logarithm before anything was measured: it only keeps the fit from running away."""
COSTS = ("host_prefill_s", "host_per_prompt_token_s", "gpu_prefill_s", "gpu_per_prompt_token_s", "host_decode_s")
"""What prompts' steps tell, in the order of `Prefill.values`."""
LEAST_STEPS = 5
"""A graph size with fewer steps than this is not calibrated."""


@dataclass(frozen=True)
class Decode:
    """GPU seconds of decode steps by graph size, per sequence beyond the largest, and per token of context."""

    gpu_s: dict[int, float]
    per_sequence_s: float
    per_context_token_s: float


@dataclass(frozen=True)
class Prefill:
    """`values` are seconds (`COSTS`); `errors` and `covariance` are of their logarithms.

    `speeds` are the trials' factors on the host's part, `noise` each trial's series of factors beyond that.
    """

    values: Array
    errors: Array
    covariance: Array
    speeds: list[float]
    noise: list[tuple[float, ...]]


def decode_costs(steps: Sequence[Steps], sizes: Sequence[int]) -> Decode:
    """Least squares of calm steps' durations on graph size (one of `sizes`; none: a line) and context; no prompt is around a calm step.

    Outliers beyond 3 median deviations of their size are left out. Raises ValueError where nothing was calm.
    """
    size, context, took_s = (
        np.concatenate(parts) for parts in zip(*(_calm(part, sizes) for part in steps), strict=True)
    )
    keep = np.zeros(len(size), dtype=bool)
    for each in np.unique(size):
        here = size == each
        if here.sum() >= LEAST_STEPS:
            distance = np.abs(took_s - np.median(took_s[here]))
            keep |= here & (distance <= 3 * max(1.5 * float(np.median(distance[here])), 1e-5))
    size, context, took_s = size[keep], context[keep], took_s[keep]
    seen = np.unique(size)
    if not len(seen):
        raise ValueError("no decode step without prompts around it")
    if sizes:
        columns = [*((size == each).astype(float) for each in seen), context.astype(float)]
    else:  # no graphs, no padding: a line
        columns = [np.ones(len(size)), size.astype(float), context.astype(float)]
    matrix = np.stack(columns, axis=1)
    scale = matrix.max(axis=0)
    solution = nnls(matrix / np.where(scale > 0, scale, 1), took_s)[0] / np.where(scale > 0, scale, 1)
    if not sizes:
        first = float(solution[0] + solution[1])
        return Decode({1: first}, float(solution[1]), float(solution[2]))
    table = dict(zip(map(int, seen), solution[:-1].tolist(), strict=True))
    slope = (table[int(seen[-1])] - table[int(seen[0])]) / max(int(seen[-1] - seen[0]), 1)
    return Decode(table, float(slope), float(solution[-1]))


def _calm(steps: Steps, sizes: Sequence[int]) -> tuple[IntArray, IntArray, Array]:
    """(graph size, context, seconds) of the steps far from any prompt."""
    began = np.flatnonzero(steps.firsts)
    calm = steps.since_begin() > 3
    for shift in range(-1, 4):  # a prompt's step k changes the hand-outs of k-1 to k+1, and those of a chunk before it
        calm[np.clip(began + shift, 0, len(calm) - 1)] = False
    places = np.flatnonzero(calm)
    took_s = steps.handed_s[places] - steps.handed_s[places - 1]
    n = steps.sequences[places]
    size = n if not sizes else np.asarray(sizes)[np.minimum(np.searchsorted(sizes, n), len(sizes) - 1)]
    size = np.maximum(size, n)  # beyond the largest graph nothing is padded
    return size, steps.context[places], took_s


@dataclass(frozen=True)
class Chains:
    """Runs of steps around prompts, one row each: from the calm step before the first prompt until prompts are gone.

    `took_s` is from a step's scheduling to the next one's (0 beyond a chain's end), `prompt` its prompt tokens, `decode_s` the GPU's
    time for the running streams' part, `trial` the row's trial.
    """

    took_s: Array
    prompt: IntArray
    decode_s: Array
    trial: IntArray


def chains(steps: Sequence[Steps], trials: Sequence[int], limits: Limits, decode: Decode) -> Chains:
    """The chains of instances that compute prompts while streams run; `trials` names each Steps' trial."""
    rows: list[tuple[Array, IntArray, Array, int]] = []
    sizes = np.array(sorted(decode.gpu_s))
    lag = 2 if limits.async_scheduling else 1  # step k is scheduled as step k - lag is handed out
    for part, trial in zip(steps, trials, strict=True):
        since = part.since_begin()
        running = part.sequences - part.firsts
        prompt = part.prompt.copy()
        for k in range(len(prompt) - 1, 0, -1):  # what is over the budget was a chunk in the step before
            over = max(0, int(prompt[k] - max(0, limits.max_num_batched_tokens - running[k])))
            prompt[k] -= over
            prompt[k - 1] += over
        near = np.minimum(np.searchsorted(sizes, running), len(sizes) - 1)
        gpu_s = np.array([decode.gpu_s[int(size)] for size in sizes])[near] + decode.per_context_token_s * part.context
        gpu_s = np.where(running > 0, gpu_s, 0.0)
        k = 0
        starts = np.flatnonzero(prompt > 0)
        for start in starts:
            if start < k or since[start] < lag + 2 or prompt[start - 1] or running[start] < 1:
                continue
            end = start + 1
            while end < len(prompt) and since[end] and prompt[max(start, end - 3) : end].any():
                end += 1
            k = end
            here = np.arange(start - 1, end)
            took_s = part.handed_s[here - lag + 1] - part.handed_s[here - lag]
            rows.append((took_s, prompt[here], gpu_s[here], trial))
    shape = len(rows), max((len(row[0]) for row in rows), default=0)
    took_s, decode_s, tokens = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
    for place, row in enumerate(rows):
        took_s[place, : len(row[0])], tokens[place, : len(row[1])], decode_s[place, : len(row[2])] = row[:3]
    return Chains(took_s, tokens, decode_s, np.array([row[3] for row in rows], dtype=int))


def prefill_costs(observed: Chains, limits: Limits) -> Prefill:
    """Costs of steps with prompts by least squares of the logarithms of all steps' durations in chains, the trials' speeds apart.

    Which prompts were in which step is known from the tokens; the durations follow from the recursion of `plan.engine`, each step
    from the instant at which it was really scheduled. Raises ValueError without a chain.
    """
    if not len(observed.took_s):
        raise ValueError("no prompt was computed while streams ran")
    trials = np.unique(observed.trial)
    which = np.searchsorted(trials, observed.trial)
    valid = observed.took_s > 0
    is_prefill = observed.prompt > 0
    tokens = observed.prompt.astype(float)

    def predicted(logs: Array) -> tuple[Array, Array]:
        """Every step's duration, and the host's part of it."""
        host, host_token, gpu, gpu_token, host_decode = np.exp(logs[:5])
        factor = np.exp(np.append(logs[5:], -logs[5:].sum()))[which][:, None]
        launch = np.where(is_prefill, factor * (host + host_token * tokens), host_decode)
        work = observed.decode_s + np.where(is_prefill, gpu + gpu_token * tokens, 0.0)
        if not limits.async_scheduling:
            return np.maximum(launch, work), launch
        took = np.empty_like(work)
        behind = work[:, 0]  # how far the GPU is behind the scheduling
        for step in range(work.shape[1]):
            took[:, step] = np.maximum(launch[:, step], behind)
            behind = np.maximum(behind + work[:, step] - observed.took_s[:, step], 0.0)
        return took, launch

    def misfit(logs: Array) -> Array:
        return np.log(observed.took_s[valid] / predicted(logs)[0][valid])

    typical, short = (
        float(np.median(observed.took_s[is_prefill & valid])),
        float(np.median(observed.took_s[valid & ~is_prefill])),
    )
    per_token = typical / float(np.median(tokens[is_prefill & valid]))
    prior = np.log([0.8 * typical, 0.02 * per_token, 1e-3, 0.5 * per_token, 0.7 * short])
    starts = [prior + np.log([1, a, 1, b, 1]) for a, b in ((1.0, 1.0), (10.0, 0.6), (1.0, 1.9))]
    logs, covariance = fit_logs(misfit, [np.append(start, np.zeros(len(trials) - 1)) for start in starts], prior)
    speeds = np.exp(np.append(logs[5:], -logs[5:].sum()))
    took, launch = predicted(logs)
    of_host = is_prefill & valid & (launch >= took)
    ratio = observed.took_s / np.where(took > 0, took, 1)
    noise = [tuple(ratio[of_host & (which == place)[:, None]].tolist()) for place in range(len(trials))]
    kept = covariance[:5, :5]
    return Prefill(np.exp(logs[:5]), np.sqrt(np.diag(kept)), kept, speeds.tolist(), noise)


def fit_logs(misfit: Callable[[Array], Array], starts: Sequence[Array], prior: Array) -> tuple[Array, Array]:
    """The parameters of the best of several fits, and their covariance; `prior` is where the first ones are without data.

    The covariance is (J'J)^-1 times the squared error of a residual, the prior's part of J included: a parameter that the data say nothing of has the prior's.
    """

    def both(logs: Array) -> Array:
        known = misfit(logs) / ROBUST
        weak = (logs[: len(prior)] - prior) / PRIOR_SD
        return np.concatenate([known, weak])

    fits = [least_squares(both, start, loss="soft_l1", x_scale="jac", max_nfev=200) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    residuals = misfit(best.x) / ROBUST
    spread = max(1.0, float(np.median(np.abs(residuals)) * 1.4826) ** 2)
    information = best.jac.T @ best.jac
    return best.x, np.linalg.pinv(information) * spread


def ingress_s(steps: Steps, sent_s: dict[str, float]) -> Array:
    """(earliest, latest) seconds from sending to scheduling of each request that met running streams, one row each.

    A request of step k was scheduled when step k-2 was handed out (asynchronously; else k-1), and came after the scheduling before.
    """
    rows = []
    since = steps.since_begin()
    for name, k in steps.first_step.items():
        if since[k] >= 4 and name in sent_s:
            rows.append((steps.handed_s[k - 3] - sent_s[name], steps.handed_s[k - 2] - sent_s[name]))
    return np.array(rows).reshape(-1, 2)


def most_common(intervals: Array) -> float:
    """The value that lies in most of the intervals (the middle of where that holds)."""
    edges = np.sort(intervals.ravel())
    middles = (edges[1:] + edges[:-1]) / 2
    counts = ((intervals[:, :1] <= middles) & (middles <= intervals[:, 1:])).sum(axis=0)
    best = np.flatnonzero(counts == counts.max())
    return float(middles[best].mean())


def box_of(steps: Sequence[Steps], prompt_tokens: int) -> Box:
    """What these steps reached."""
    return Box(
        prompt_tokens=prompt_tokens,
        sequences=max(int(part.sequences.max()) for part in steps),
        context_tokens=max(int(part.context.max()) for part in steps),
    )
