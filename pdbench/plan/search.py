"""The cheapest deployment that keeps an SLO at a load: found by single simulations, judged by the intervals of many, as any prediction is."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from operator import itemgetter

import numpy as np

from pdbench.errors import UserError
from pdbench.plan.deployment import sized, unfit
from pdbench.plan.engine import Demand, Kind, Layout
from pdbench.plan.predict import (
    Day,
    Draw,
    NoRoomError,
    Slo,
    days_of,
    draw_of,
    guessed,
    interval_of,
    prediction_of,
    usual_day,
)
from pdbench.plan.records import ATTAIN_PCT, Calibration, Prediction, Search
from pdbench.plan.simulate import simulate

DRAWS = 20
"""Simulations by which a deployment is judged: of other costs, days, arrivals and lengths each."""


class Trials:
    """Simulations of one load, each done once. `demands` gives the load of draw n, `load` says it in words."""

    def __init__(self, calibration: Calibration, demands: Callable[[int], Demand], load: str, slo: Slo) -> None:
        self.calibration, self.demand, self.load, self.slo, self.simulations = calibration, cache(demands), load, slo, 0
        self.usual, self.judged = dict[str, Draw](), dict[str, Prediction]()  # by layouts' names
        self.drawn = defaultdict[str, dict[int, Draw]](dict)

    def draw(self, day: Day) -> Draw:
        self.simulations += 1
        result = simulate(day.deployment, self.demand(day.number), seed=day.number)
        return draw_of([result], self.calibration, self.slo, pauses=day.pauses)

    def once(self, layout: Layout) -> Draw:
        """At the costs' best estimate."""
        if layout.name not in self.usual:
            self.usual[layout.name] = self.draw(usual_day(self.calibration, layout))
        return self.usual[layout.name]

    def may_keep(self, layout: Layout) -> bool:
        """Does it keep the SLO at the costs' best estimate?"""
        draw = self.once(layout)
        return draw.figures["slo_met_pct"] >= ATTAIN_PCT and not guessed(draw)

    def slowest_first(self, layout: Layout) -> Iterator[tuple[int, Draw]]:
        """(number, draw) of each day."""
        drawn = self.drawn[layout.name]
        for day in sorted(islice(days_of(self.calibration, layout), DRAWS), key=lambda day: -day.speed):
            if day.number not in drawn:
                drawn[day.number] = self.draw(day)
            yield day.number, drawn[day.number]

    def keeps(self, layout: Layout) -> bool:
        """Is the interval within the SLO? No further days are simulated once the answer is no."""
        if not self.may_keep(layout):
            return False
        met_pct = np.full(DRAWS, 100.0)
        for number, draw in self.slowest_first(layout):
            met_pct[number] = draw.figures["slo_met_pct"]
            if interval_of(met_pct)[0] < ATTAIN_PCT:
                return False
        return self.judge(layout).verdict == "met"

    def judge(self, layout: Layout) -> Prediction:
        if layout.name not in self.judged:
            layout = sized(self.calibration, layout)
            draws = [draw for _, draw in sorted(self.slowest_first(layout), key=itemgetter(0))]
            self.judged[layout.name] = prediction_of(self.calibration, layout, self.load, draws, self.once(layout))
        return self.judged[layout.name]

    def is_tie(self, one: Layout, other: Layout) -> bool:
        """Do the differences of their joules per token, draw by draw, have both signs?"""
        pairs = [[self.drawn[each.name][number].figures for each in (one, other)] for number in range(DRAWS)]
        differences = [a.get("j_per_output_token", 0.0) - b.get("j_per_output_token", 0.0) for a, b in pairs]
        return min(differences) <= 0 <= max(differences)

    def closest(self, kind: Kind, most: int) -> Layout:
        """Of those with all GPUs the one that keeps the SLO for most requests; of seven splits at most."""
        if kind != "disaggregated":
            return _replicas(most if kind == "replicas" else 1)
        splits = {min(max(1, round(most * eighth / 8)), most - 1) for eighth in range(1, 8)}
        return max(
            (_split(prefill, most - prefill) for prefill in sorted(splits)),
            key=lambda layout: (self.may_keep(layout), self.once(layout).figures["slo_met_pct"]),
        )


def fewest(kind: Kind, most: int, test: Callable[[Layout], bool]) -> list[Layout]:
    """The single instance, or the fewest replicas, that pass a test; of each number of prefill instances, from the fewest on, the fewest
    decode instances, as long as these get fewer."""
    if kind != "disaggregated":
        numbers = (1, 1) if kind == "single" else (2, most)
        count = least_that(lambda n: test(_replicas(n)), *numbers)
        return [] if count is None else [_replicas(count)]

    def fewest_decode(prefill: int, high: int) -> int | None:
        passes = high > 0 and test(_split(prefill, high))
        return least_that(lambda n: test(_split(prefill, n)), 1, high) if passes else None

    # With more decode instances than there may be: what is missing then is prefill.
    least = least_that(lambda n: test(_split(n, most)), 1, most - 1)
    found, high = list[Layout](), most
    for prefill in range(least or most, most):
        decode = fewest_decode(prefill, min(high, most - prefill))
        if decode is not None:
            found.append(_split(prefill, decode))
            high = decode - 1
        elif found:
            break
    return found


def search(
    calibration: Calibration,
    demands: Callable[[int], Demand],
    load: str,
    *,
    slo: Slo,
    most_gpus: int,
    by_joules: bool = False,
) -> Search:
    """The cheapest deployment that keeps the SLO, and others near it.

    Of each kind the cheapest at the costs' best estimate is judged, and the cheapest of which the interval is within the SLO with its
    neighbours. A tie: as many GPUs (by joules: any number), and joules per token that are lower in one draw and higher in another.
    """
    trials = Trials(calibration, demands, load, slo)
    each = {gpus for layout in (_replicas(1), _split(1, 1)) for gpus in sized(calibration, layout).gpus_each.values()}
    if len(each) > 1:
        raise UserError("the runs' instances have unequal numbers of GPUs: name deployments with --deployment, as 2p1d")
    most = most_gpus // max(each, default=1)
    if not most:
        raise UserError(f"--max-gpus {most_gpus}: an instance of these runs has {max(each)} GPUs: give as many or more")

    def cost_of(layout: Layout, joules: float) -> tuple[float, ...]:
        return (joules, layout.gpus) if by_joules else (layout.gpus, joules)

    def usual_cost(layout: Layout) -> tuple[float, ...]:
        return cost_of(layout, trials.once(layout).figures.get("j_per_output_token", 0.0))

    def cost(judged: Prediction) -> tuple[float, ...]:
        joules = judged.figures.get("j_per_output_token")
        return cost_of(judged.layout, joules.value if joules else 0.0)

    judged, refused = dict[str, Prediction](), list[Prediction]()
    for smallest in (_replicas(1), _replicas(2), _split(1, 1)):
        smallest = sized(calibration, smallest)
        if smallest.size > most:
            continue
        measurable = True
        try:
            refusal = unfit(calibration, smallest, [trials.demand(0)])
            trials.once(smallest)
        except UserError as error:
            refusal, measurable = str(error), not isinstance(error, NoRoomError)
        if refusal is not None:
            refused.append(Prediction(layout=smallest, load=load, refusal=refusal, measurable=measurable))
            continue
        usual = fewest(smallest.kind, most, trials.may_keep) or [trials.closest(smallest.kind, most)]
        cheapest = min(usual, key=usual_cost)
        kept = fewest(smallest.kind, most, trials.keeps)
        best = min((trials.judge(layout) for layout in kept), key=cost, default=None)
        around = _around(best.layout if best else cheapest, most)
        judged |= {layout.name: trials.judge(layout) for layout in [cheapest, *kept, *around]}
    order = ("met", "not decided", "not met", "refused")

    def rank(each: Prediction) -> tuple[float, ...]:
        """Of those that do not keep the SLO the closest comes first, else the cheapest."""
        share = -each.figures["slo_met_pct"].value if each.verdict == "not met" else 0.0
        return (order.index(each.verdict or ""), share, *cost(each))

    candidates = sorted(judged.values(), key=rank)
    first = candidates[0].layout if candidates else None
    ties = [
        other.layout.name
        for other in candidates[1:]
        if first and candidates[0].verdict == other.verdict == "met"
        if (by_joules or other.layout.gpus == first.gpus) and trials.is_tie(first, other.layout)
    ]
    return Search(
        slo_ttft_ms=slo[0],
        slo_tbt_ms=slo[1],
        most_gpus=most_gpus,
        by_joules=by_joules,
        requests=len(trials.demand(0)),
        simulations=trials.simulations,
        candidates=[*candidates, *refused],
        ties=ties,
    )


def least_that(test: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from `low` to `high` of which `test` is true, if it stays true from there on."""
    number = low + bisect_left(range(low, high + 1), True, key=test)
    return number if number <= high else None


def _replicas(count: int) -> Layout:
    return Layout("single", {"single": 1}) if count == 1 else Layout("replicas", {"replica": count})


def _split(prefill: int, decode: int) -> Layout:
    return Layout("disaggregated", {"prefill": prefill, "decode": decode})


def _around(best: Layout, most: int) -> Iterable[Layout]:
    """The deployment and its neighbours."""
    if best.kind != "disaggregated":
        for number in (best.size, best.size - 1, best.size + 1):
            if 1 <= number <= most and (best.kind == "single") == (number == 1):
                yield _replicas(number)
        return
    x, y = best.instances["prefill"], best.instances["decode"]
    for dx, dy in ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1), (1, -1), (-1, 1)):
        if x + dx > 0 and y + dy > 0 and x + dx + y + dy <= most:
            yield _split(x + dx, y + dy)
