"""A prediction: many simulations of what may be, their figures with intervals, or the reason why nothing can be said."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import msgspec
import numpy as np

from pdbench.errors import UserError
from pdbench.plan import power, seconds
from pdbench.plan.deployment import deployment_of, role_of, unfit
from pdbench.plan.engine import Demand, Deployment, Layout, Role
from pdbench.plan.records import Calibration, Figure, Prediction
from pdbench.plan.simulate import Simulated, simulate, weighted_quantiles

DRAWS, LEAST_DRAWS, BUDGET_S = 60, 12, 30.0
"""Simulations per prediction; fewer where they would take more seconds of CPU than this."""
OUTSIDE = 0.05
"""Above this share of the busy time in steps larger than any that was measured, a prediction is refused."""
POWER_ERROR = 0.05
"""Standard deviation of what power models of one run say of another (docs/results/plan), boards' gains included."""
GOLDEN = (5**0.5 - 1) / 2
PAUSES_ERROR = 0.2
"""Standard deviation of the logarithm of pauses, as shares of a step, from one run to another: the slowest 0.25 % of steps took 2.3 to 3.3 times a
step on top in 19 of 25 runs, 1.9 to 4.0 times in all (docs/results/plan)."""
TOO_WIDE = 6.0
"""An interval whose ends differ by more than this factor says nothing."""
_NORMAL_95 = 1.645
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_LARGER = {
    "prompt_tokens": ("prompt tokens in one step", "a higher --rate, or longer prompts"),
    "sequences": ("sequences in one step", "a higher --rate, or longer answers"),
    "context_tokens": ("tokens of context in one step", "a higher --rate, or longer prompts and answers"),
}


def predict(
    calibration: Calibration,
    layout: Layout,
    demands: Callable[[int], Sequence[Demand]],
    load: str,
    *,
    slo: tuple[float | None, float | None] = (None, None),
    speeds: Callable[[Deployment, int], Deployment] | None = None,
    draws: int = DRAWS,
    anyway: bool = False,
) -> Prediction:
    """Figures with 90 % intervals of a deployment under a load.

    `demands` gives the trials' requests of draw number n, whose figures are pooled as a run's are. `slo` are the limits of TTFT and
    mean TBT in ms. `speeds` sets the engines of a trial of its own accord (--check knows them). `anyway`: figures although refused.
    """
    begin_s = time.process_time()
    prediction = Prediction(layout=layout, load=load)
    try:
        usual = deployment_of(calibration, layout)
    except UserError as error:
        return msgspec.structs.replace(prediction, refusal=str(error))
    refusal = unfit(calibration, layout, demands(0)) if speeds is None else None
    rows: list[dict[str, float]] = []
    outside: list[dict[str, float]] = []
    preempted = 0
    random = np.random.default_rng(0)
    while len(rows) < draws and (len(rows) < LEAST_DRAWS or time.process_time() - begin_s < BUDGET_S):
        results = []
        # One day for all trials. Days' speeds decide most: multiples of the golden ratio spread them evenly, however many draws there are.
        deployment = deployment_of(calibration, layout, random, (0.5 + GOLDEN * len(rows)) % 1)
        for trial, demand in enumerate(demands(len(rows))):
            of_trial = deployment if speeds is None else speeds(deployment, trial)
            results.append(simulate(of_trial, demand, seed=len(rows)))
        if any(np.isnan(result.e2e_s).any() for result in results):
            words = "a request does not fit into the KV cache: serve with a smaller model length, or more memory"
            return msgspec.structs.replace(prediction, refusal=words)
        rows.append(figures_of(results, calibration, slo, pauses=float(np.exp(random.normal(0, PAUSES_ERROR)))))
        outside.append(outside_of(results))
        preempted += any(use.preemptions for result in results for use in result.instances)
    shares = {name: float(np.median([draw[name] for draw in outside])) for name in _LARGER}
    names = {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(chain.from_iterable(rows))}
    figures = {name: _figure(name, values) for name, values in names.items() if len(values) > 0.9 * len(rows)}
    refusal = refusal or beyond(shares, preempted > len(rows) / 2, figures)
    parts = seconds.of_simulated(
        usual.way_in_s,
        [simulate(speeds(usual, trial) if speeds else usual, demand) for trial, demand in enumerate(demands(0))],
    )
    saturated = bool(np.median([row["growth"] for row in rows]) > 2)
    figures.pop("growth")
    return msgspec.structs.replace(
        prediction,
        figures={} if refusal and not anyway else figures,
        outside=shares,
        refusal=refusal,
        saturated=saturated,
        seconds_ms={} if refusal and not anyway else parts,
        draws=len(rows),
    )


def outside_of(results: Sequence[Simulated]) -> dict[str, float]:
    """The share of the busy time in steps beyond the calibrated box, by what is beyond."""
    uses = [use for result in results for use in result.instances]
    busy_s = sum(use.prefill_s + use.decode_s for use in uses)
    return {name: sum(use.outside_s.get(name, 0.0) for use in uses) / busy_s for name in _LARGER}


def figures_of(
    results: Sequence[Simulated],
    calibration: Calibration,
    slo: tuple[float | None, float | None] = (None, None),
    *,
    pauses: float = 1.0,
) -> dict[str, float]:
    """Several trials' figures together, named as a run's; power and energy where they were calibrated. Decode's pauses are `pauses` times
    as long as calibrated.

    `growth` is the mean TTFT of the last third of the requests over the first third's: above 2 the queue grows.
    """
    ttft_s, e2e_s, tbt_s = (
        np.concatenate([getattr(result, name) for result in results]) for name in ("ttft_s", "e2e_s", "mean_tbt_s")
    )
    figures = {f"ttft_{name}_ms": 1e3 * float(np.quantile(ttft_s, share)) for name, share in _SHARES.items()}
    streaming = role_of(calibration, results[0].instances[-1].role)
    gap_s, counts = (np.concatenate([getattr(result, name) for result in results]) for name in ("gap_s", "gap_count"))
    box = streaming.engine.box
    slowest_s = float(streaming.engine.costs.gpu_step_s(np.array(box.sequences), box.context_tokens))
    jitter = [share * pauses if share > 0 else share for share in streaming.jitter]
    quantiles_s = weighted_quantiles(gap_s, counts, _SHARES, jitter or (0.0,), slowest_s)
    figures |= {f"tbt_{name}_ms": 1e3 * value for name, value in quantiles_s.items()}
    if np.isfinite(tbt_s).any():
        figures["mean_tbt_p50_ms"] = 1e3 * float(np.nanmedian(tbt_s))
    figures |= {f"e2e_{name}_ms": 1e3 * float(np.quantile(e2e_s, share)) for name, share in _SHARES.items()}
    span_s = sum(result.span_s for result in results)
    tokens = sum(int(result.gap_count.sum()) + len(result.ttft_s) for result in results)
    figures["output_tokens_per_s"] = tokens / span_s
    if any(limit is not None for limit in slo):
        good = (1e3 * ttft_s <= (slo[0] or np.inf)) & ~(1e3 * tbt_s > (slo[1] or np.inf))
        figures["goodput_requests_per_s"] = float(good.sum()) / span_s
        figures["slo_met_pct"] = 100 * float(good.mean())
    by_role: dict[Role, float | None] = {}
    for result in results:
        for use in result.instances:
            costs = role_of(calibration, use.role).power
            total = by_role.get(use.role, 0.0)
            by_role[use.role] = (
                None if costs is None or total is None else total + power.joules(use, costs, result.span_s)
            )
    known = {role: joules for role, joules in by_role.items() if joules is not None}
    if len(known) == len(by_role):
        energy_j = sum(known.values())
        figures |= {"j_per_output_token": energy_j / tokens, "mean_power_w": energy_j / span_s}
        if len(known) > 1:
            figures |= {f"{role}_power_w": joules / span_s for role, joules in known.items()}
        if "slo_met_pct" in figures and good.any():
            figures["j_per_good_request"] = energy_j / float(good.sum())
    third = max(1, len(results[0].ttft_s) // 3)
    figures["growth"] = float(
        np.mean([result.ttft_s[-third:].mean() / result.ttft_s[:third].mean() for result in results])
    )
    return figures


def _figure(name: str, values: Sequence[float]) -> Figure:
    """Median and 5 and 95 % of the draws; of power and energy, with the power model's own error."""
    low, value, high = np.quantile(values, (0.05, 0.5, 0.95))
    if name.startswith("j_") or name.endswith("_w"):
        reach = [float(np.hypot(np.log(end / value), _NORMAL_95 * POWER_ERROR)) for end in (low, high)]
        low, high = value * np.exp(-reach[0]), value * np.exp(reach[1])
    return Figure(float(value), float(low), float(high))


def beyond(shares: Mapping[str, float], preempted: bool, figures: Mapping[str, Figure]) -> str | None:
    """Why the simulated steps are a guess."""
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > OUTSIDE:
        what, how = _LARGER[worst]
        return (
            f"{100 * shares[worst]:.0f} % of the busy time has more {what} than any run: measure {how}, "
            "for example `--rate R --ramp-to 2R`"
        )
    if preempted:
        return "the KV cache would be full and requests preempted: no run shows what that costs"
    ttft = figures.get("ttft_p50_ms")
    if ttft and ttft.high > TOO_WIDE * ttft.low:
        return (
            f"TTFT p50 anywhere from {ttft.low:.0f} to {ttft.high:.0f} ms: the runs do not show what decides it; measure spread "
            "lengths and more trials"
        )
    return None
