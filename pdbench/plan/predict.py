"""A prediction: many simulations of what may be, their figures with intervals, or the reason why nothing can be said."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice

import numpy as np
from msgspec.structs import replace

from pdbench import failures
from pdbench.analysis.arrivals import Array, BoolArray
from pdbench.analysis.metrics import Totals
from pdbench.errors import UserError
from pdbench.plan import power, seconds
from pdbench.plan.deployment import deployment_of, role_of, sized, unfit
from pdbench.plan.engine import Demand, Deployment, Layout, Role
from pdbench.plan.instance import Instance
from pdbench.plan.records import Calibration, Figure, Prediction
from pdbench.plan.simulate import Simulated, simulate, weighted_quantiles

DRAWS, LEAST_DRAWS, BUDGET_S = 60, 12, 30.0
"""Simulations per prediction; fewer where they would take more seconds of CPU than this."""
OUTSIDE = 0.05
"""Above this share of a role's busy time in steps larger than any that was measured, a prediction is refused."""
POWER_ERROR = 0.05
"""Standard deviation of what power models of one run say of another (docs/results/plan), boards' gains included."""
GROWTH = 2.0
"""Above this ratio a queue grows (`Draw`): the deployment does not carry the load, and the figures are its length's."""
GOLDEN = (5**0.5 - 1) / 2
PAUSES_ERROR = 0.5
"""Standard deviation of the logarithm of pauses, as shares of a step, from one start of a host to another: with CUDA graphs the slowest 1 % of decode's
steps took 0.18 to 0.37 times a step on top on two H100s, 0.46 to 0.78 on four of another start (docs/results/plan)."""
WINDOW_ERROR = 0.03
"""Standard deviation of the logarithm of tokens/s and goodput over what was measured, in 41 runs: where the window begins and ends in the load."""
PREEMPTED = "the KV cache would be full and requests preempted: no run shows what that costs; give more instances, or a lower load"
TOO_WIDE = 6.0
"""An interval whose ends differ by more than this factor says nothing."""
Slo = tuple[float | None, float | None]
"""Limits of TTFT and mean TBT, ms."""
UNCOUNTED_SLO = ("slo_tbt_p90_ms", "slo_tbt_p99_ms", "slo_e2e_ms")
"""Options that limit what predictions do not count by."""
_NORMAL_95 = 1.645
_RATIOS = ("output_tokens_per_s", "goodput_requests_per_s", "j_per_output_token", "mean_power_w", "j_per_good_request")
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_LARGER = {
    "prompt_tokens": ("prompt tokens in one step", "a higher --rate, or longer prompts"),
    "sequences": ("sequences in one step", "a higher --rate, or longer answers"),
    "context_tokens": ("tokens of context in one step", "a higher --rate, or longer prompts and answers"),
}


class NoRoomError(UserError):
    """A request can never run, whatever is measured."""


@dataclass(frozen=True)
class Day:
    """A deployment as it may be: on a day whose speed is the quantile `speed`, with decode's pauses `pauses` times as long as calibrated."""

    number: int
    speed: float
    deployment: Deployment
    pauses: float


@dataclass(frozen=True)
class Draw:
    """One simulation of a load's trials. `figures` are named as a run's; `outside` is the share of a role's busy time in steps beyond the
    calibrated box, by what is beyond (of the role that has the largest), `timed_out_pct` of the requests that the client would have ended; `seconds_ms` the mean request's parts (seconds.py); `growth` the mean TTFT, with the waits for a stream and for decode, of the last third of the requests over the first third's: above
    `GROWTH` the queue grows. `distributions_ms` only where they were asked for."""

    figures: dict[str, float]
    outside: dict[str, float]
    preempted: bool
    seconds_ms: dict[str, float]
    growth: float
    timed_out_pct: float
    distributions_ms: dict[str, list[float]] = field(default_factory=dict)


def predict(
    calibration: Calibration,
    layout: Layout,
    demands: Callable[[int], Sequence[Demand]],
    load: str,
    *,
    slo: Slo = (None, None),
    speeds: Callable[[Deployment, int], Deployment] | None = None,
    draws: int = DRAWS,
    anyway: bool = False,
) -> Prediction:
    """Figures with 90 % intervals of a deployment under a load.

    `demands` gives the trials' requests of draw number n, whose figures are pooled as a run's are. `slo` are the limits of TTFT and
    mean TBT in ms. `speeds` sets the engines of a trial of its own accord (--check knows them). `anyway`: figures although refused, and distributions.
    """
    begin_s = time.process_time()
    layout = sized(calibration, layout)
    drawn: list[Draw] = []

    def draw(day: Day, *, distributed: bool = False) -> Draw:
        results = [
            simulate(speeds(day.deployment, trial) if speeds else day.deployment, demand, seed=day.number)
            for trial, demand in enumerate(demands(day.number))
        ]
        return draw_of(results, calibration, slo, pauses=day.pauses, distributed=distributed)

    try:
        usual = draw(usual_day(calibration, layout), distributed=anyway)
        for day in islice(days_of(calibration, layout), draws):
            if len(drawn) >= LEAST_DRAWS and time.process_time() - begin_s > BUDGET_S:
                break
            drawn.append(draw(day))
    except UserError as error:
        return Prediction(layout=layout, load=load, refusal=str(error), measurable=not isinstance(error, NoRoomError))
    refusal = unfit(calibration, layout, demands(0)) if speeds is None else None
    prediction = prediction_of(calibration, layout, load, drawn, usual, refusal)
    if prediction.refusal and not anyway:
        return replace(prediction, figures={}, seconds_ms={})
    return prediction


def usual_day(calibration: Calibration, layout: Layout) -> Day:
    """At the costs' best estimate. Raises UserError for a deployment of which nothing was measured."""
    return Day(0, 0.5, deployment_of(calibration, layout), pauses=1.0)


def days_of(calibration: Calibration, layout: Layout) -> Iterator[Day]:
    """Endless. Raises UserError for a deployment of which nothing was measured."""
    random = np.random.default_rng(0)
    for number in count():
        # Days' speeds decide most: multiples of the golden ratio spread them evenly, however many draws there are.
        speed = (0.5 + GOLDEN * number) % 1
        deployment = deployment_of(calibration, layout, random, speed)
        yield Day(number, speed, deployment, pauses=float(np.exp(random.normal(0, PAUSES_ERROR))))


def draw_of(
    results: Sequence[Simulated],
    calibration: Calibration,
    slo: Slo = (None, None),
    *,
    pauses: float = 1.0,
    distributed: bool = False,
) -> Draw:
    """Several trials' figures together; power and energy where they were calibrated. Decode's pauses are `pauses` times as long as calibrated.

    Raises NoRoomError where a request can never run.
    """
    ttft_s, e2e_s, tbt_s, gap_s, gap_count, timed_out = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("ttft_s", "e2e_s", "mean_tbt_s", "gap_s", "gap_count", "timed_out")
    )
    if np.isnan(e2e_s).any():
        raise NoRoomError("a request does not fit into the KV cache: serve with a smaller model length, or more memory")
    figures = {f"ttft_{name}_ms": 1e3 * float(np.quantile(ttft_s, share)) for name, share in _SHARES.items()}
    instances = [instance for result in results for instance in result.instances]
    streaming = role_of(calibration, instances[-1].role)
    box = streaming.engine.box
    slowest_s = float(streaming.engine.costs.gpu_step_s(np.array(box.sequences), box.context_tokens))
    jitter = [share * pauses if share > 0 else share for share in streaming.jitter]
    if quantiles_s := weighted_quantiles(gap_s, gap_count, _SHARES.values(), jitter, slowest_s):
        figures |= {f"tbt_{name}_ms": 1e3 * value_s for name, value_s in zip(_SHARES, quantiles_s, strict=True)}
    if np.isfinite(tbt_s).any():
        figures["mean_tbt_p50_ms"] = 1e3 * float(np.nanmedian(tbt_s))
    figures |= {f"e2e_{name}_ms": 1e3 * float(np.quantile(e2e_s, share)) for name, share in _SHARES.items()}
    # As a run is measured: in the window at full load, an answer's tokens spread evenly between its first and last.
    window_s = sum(result.window[1] - result.window[0] for result in results)
    tokens = int(gap_count.sum()) + len(ttft_s)
    share = np.concatenate([_share_within(result) for result in results])
    tokens_here = tokens * float(
        np.average(share, weights=np.concatenate([result.output_tokens for result in results]))
    )
    good_here = None
    if any(limit is not None for limit in slo):
        good = (1e3 * ttft_s <= (slo[0] or np.inf)) & ~(1e3 * tbt_s > (slo[1] or np.inf)) & ~timed_out
        ended_here = np.concatenate([_ended_within(result) for result in results])
        good_here = int(np.sum(good & ended_here))
        figures["slo_met_pct"] = 100 * float(np.mean(good))
    energy_j = _energy_j(results, calibration, window_s)
    if len(energy_j) > 1:
        figures |= {f"{role}_power_w": of_role_j / window_s for role, of_role_j in energy_j.items()}
    totals = Totals(
        window_s=window_s,
        device_s=None,
        output_tokens=tokens_here,
        requests=None,
        good_requests=good_here,
        energy_j=sum(energy_j.values()) if energy_j else None,
    )
    figures |= {name: value for name in _RATIOS if (value := totals.ratio(name)) is not None}
    outside = _outside(instances)
    third = max(1, len(results[0].ttft_s) // 3)
    taken = [each.ttft_s + each.waited_s + np.nan_to_num(each.joined_s - each.ready_s) for each in results]
    growth = np.mean([took_s[-third:].mean() / took_s[:third].mean() for took_s in taken])
    due_s = results[0].sent_s - results[0].waited_s
    if results[0].is_closed or due_s[-1] - due_s[0] < ttft_s.min():
        growth = 0.0  # a burst's requests come at once, and a closed loop's first ones, which no others follow until one ends
    is_preempted = any(instance.preemptions for instance in instances)
    timed_out_pct = 100 * float(np.mean(timed_out))
    parts_ms = seconds.parts_of_simulated(results)
    whole = seconds.distributions_of_simulated(results, jitter, slowest_s) if distributed else {}
    return Draw(figures, outside, is_preempted, parts_ms, float(growth), timed_out_pct, whole)


def _outside(instances: Sequence[Instance]) -> dict[str, float]:
    """What is beyond the calibrated box -> the share of the busy time in such steps, of the role that has the largest."""
    shares = dict.fromkeys(_LARGER, 0.0)
    for role in dict.fromkeys(instance.role for instance in instances):
        of_role = [instance for instance in instances if instance.role == role]
        busy_s = sum(instance.prefill_s + instance.decode_s for instance in of_role)
        for name in shares:
            beyond_s = sum(instance.outside_s.get(name, 0.0) for instance in of_role)
            shares[name] = max(shares[name], beyond_s / busy_s if busy_s else 0.0)
    return shares


def _energy_j(results: Sequence[Simulated], calibration: Calibration, window_s: float) -> dict[Role, float]:
    """Each role's energy in the trials' windows, which take `window_s` together; empty unless every role's power was calibrated."""
    counts = Counter(instance.role for instance in results[0].instances)
    watts = {role: costs for role in counts if (costs := role_of(calibration, role).power)}
    if len(watts) < len(counts):
        return {}
    energy_j = {role: counts[role] * costs.idle_w * window_s for role, costs in watts.items()}
    for result in results:
        for instance in result.instances:
            energy_j[instance.role] += power.work_joules(instance, watts[instance.role], result.window)
    return energy_j


def _share_within(result: Simulated) -> Array:
    """Of each request the share of its answer's time that lies in the window; of an answer of one token whether it does."""
    first_s, last_s = result.sent_s + result.ttft_s, result.sent_s + result.e2e_s
    begin_s, end_s = result.window
    overlap_s = np.minimum(last_s, end_s) - np.maximum(first_s, begin_s)
    lasted_s = np.maximum(last_s - first_s, 1e-9)
    return np.asarray(np.clip(np.where(last_s > first_s, overlap_s / lasted_s, _ended_within(result)), 0.0, 1.0))


def _ended_within(result: Simulated) -> BoolArray:
    ended_s = result.sent_s + result.e2e_s
    begin_s, end_s = result.window
    return np.asarray((begin_s <= ended_s) & (ended_s <= end_s))


def prediction_of(
    calibration: Calibration,
    layout: Layout,
    load: str,
    drawn: Sequence[Draw],
    usual: Draw,
    refusal: str | None = None,
) -> Prediction:
    """The draws' medians and intervals, the seconds of `usual`; refused for `refusal`, or where their steps are a guess."""
    rows = [draw.figures for draw in drawn]
    names = {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(chain.from_iterable(rows))}
    figures = {name: _figure(name, values) for name, values in names.items() if len(values) > 0.9 * len(rows)}
    outside = {name: float(np.median([draw.outside[name] for draw in drawn])) for name in _LARGER}
    saturated, measurable = False, True
    if refusal is None:
        saturated = bool(np.median([draw.growth for draw in drawn]) > GROWTH)
        refusal, measurable = _reason(calibration, layout, drawn, outside, figures, saturated=saturated)
    return Prediction(
        layout=layout,
        load=load,
        figures=figures,
        outside=outside,
        refusal=refusal,
        measurable=measurable,
        saturated=saturated,
        seconds_ms=usual.seconds_ms,
        distributions_ms=usual.distributions_ms,
        draws=len(drawn),
    )


def _reason(
    calibration: Calibration,
    layout: Layout,
    drawn: Sequence[Draw],
    outside: Mapping[str, float],
    figures: Mapping[str, Figure],
    *,
    saturated: bool,
) -> tuple[str | None, bool]:
    """Why no figure is given (None: they are), and whether a measurement would help."""
    where = of_ttft = "the instances"  # that requests wait for
    if layout.kind == "disaggregated" and calibration.handoff:
        waits_ms = [sum(draw.seconds_ms.get(part, 0.0) for draw in drawn) for part in ("queue", "decode_wait")]
        where = "the prefill instances" if waits_ms[0] > waits_ms[1] else "the decode instances"
        of_ttft = "the prefill instances" if calibration.handoff.prefill_opens > 0.5 else where
    ttft, span = figures.get("ttft_p50_ms"), ""
    if ttft and ttft.high > TOO_WIDE * ttft.low:
        span = f"TTFT p50 anywhere from {ttft.low:,.0f} to {ttft.high:,.0f} ms"
    larger = larger_steps(outside)
    ended_pct = float(np.median([draw.timed_out_pct for draw in drawn]))
    if sum(draw.preempted for draw in drawn) > len(drawn) / 2:
        return PREEMPTED, False
    if larger and saturated:
        return (
            f"the load is beyond what {where} serve, and their queue grows: give more of them, or a lower load",
            False,
        )
    if span and all(role_of(calibration, role).knows_lengths for role in layout.instances if role != "decode"):
        # No cost is so uncertain: it is how long a queue gets.
        return (
            f"{span}: the load is near the limit of {of_ttft}, or beyond it: give more of them, or a lower load",
            False,
        )
    if larger or span:
        return larger or f"{span}: the runs do not show what decides it; measure spread lengths and more trials", True
    if ended_pct > failures.LIMIT_PCT:  # clients give up, and servers drop what the simulation goes on with
        ended = f"{ended_pct:.0f} % of the requests would be ended by --request-timeout-s"
        return f"{ended}: give a lower load, or a longer limit", False
    return None, True


def interval_of(values: Array | Sequence[float]) -> tuple[float, float]:
    """Which 90 % of the draws are in."""
    low, high = np.quantile(values, (0.05, 0.95))
    return float(low), float(high)


def _figure(name: str, values: Sequence[float]) -> Figure:
    """Median and 5 and 95 % of the draws; of power and energy, with the power model's own error, of rates with the window's."""
    value, (low, high) = float(np.quantile(values, 0.5)), interval_of(values)
    is_rate = name in ("output_tokens_per_s", "goodput_requests_per_s")
    if value > 0 and low > 0 and (is_rate or name.startswith("j_") or name.endswith("_w")):
        error = WINDOW_ERROR if is_rate else POWER_ERROR
        reach = [float(np.hypot(np.log(end / value), _NORMAL_95 * error)) for end in (low, high)]
        low, high = float(value * np.exp(-reach[0])), float(value * np.exp(reach[1]))
    return Figure(value, low, high)


def guessed(draw: Draw) -> str | None:
    """Why this simulation is a guess, whatever the others say."""
    return PREEMPTED if draw.preempted else larger_steps(draw.outside)


def larger_steps(shares: Mapping[str, float]) -> str | None:
    """Why the simulated steps are a guess."""
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or shares[worst] <= OUTSIDE:
        return None
    what, how = _LARGER[worst]
    return (
        f"{100 * shares[worst]:.0f} % of the busy time has more {what} than any run: measure {how}, "
        "for example `--rate R --ramp-to 2R`"
    )
