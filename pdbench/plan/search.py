"""The cheapest deployment that keeps an SLO at a load: floors by arithmetic, then few simulations, then the best ones with other seeds."""

from collections.abc import Callable, Iterable

import numpy as np

from pdbench.errors import UserError
from pdbench.plan.deployment import deployment_of, role_of, unfit
from pdbench.plan.engine import Demand, Layout, Role
from pdbench.plan.predict import beyond, figures_of, outside_of
from pdbench.plan.records import Calibration, Candidate, Search
from pdbench.plan.simulate import simulate

SEEDS = 5
"""Loads (arrivals and lengths) by which the best deployments are compared."""


class Trials:
    """Simulations of one load and SLO (limits of TTFT and mean TBT in ms), each done once. `demands` gives the load of seed n."""

    def __init__(
        self,
        calibration: Calibration,
        demands: Callable[[int], Demand],
        slo: tuple[float | None, float | None],
        most: int,
    ) -> None:
        self.calibration, self.slo, self.most = calibration, slo, most
        self.make_demand, self.demands = demands, dict[int, Demand]()
        self.tried: dict[tuple[int, ...], Candidate] = {}
        self.refused: list[Candidate] = []
        self.outside: dict[tuple[int, ...], list[dict[str, float]]] = {}
        self.preempted: dict[tuple[int, ...], int] = {}
        self.simulations = 0

    def demand(self, seed: int) -> Demand:
        if seed not in self.demands:
            self.demands[seed] = self.make_demand(seed)
        return self.demands[seed]

    def candidate(self, wanted: Layout, seeds: int = 1) -> Candidate:
        key = (len(wanted.kind), *wanted.instances.values())
        found = self.tried.setdefault(key, Candidate(layout=wanted))
        while len(found.met_pct) < seeds:
            seed = len(found.met_pct)
            self.simulations += 1
            result = simulate(deployment_of(self.calibration, wanted), self.demand(seed), seed)
            figures = figures_of([result], self.calibration, self.slo)
            found.met_pct.append(figures["slo_met_pct"])
            found.ttft_p99_ms.append(figures["ttft_p99_ms"])
            found.tbt_p99_ms.append(figures["tbt_p99_ms"])
            if "j_per_output_token" in figures:
                found.j_per_output_token.append(figures["j_per_output_token"])
            shares = self.outside.setdefault(key, [])
            shares.append(outside_of([result]))
            self.preempted[key] = self.preempted.get(key, 0) + any(use.preemptions for use in result.instances)
            mean = {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}
            found.refusal = beyond(mean, self.preempted[key] > len(shares) / 2, {})
        return found

    def may(self, wanted: Layout) -> bool:
        """Does the calibration carry this kind of deployment under this load?"""
        try:
            deployment_of(self.calibration, wanted)
            refusal = unfit(self.calibration, wanted, [self.demand(0)])
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            self.refused.append(Candidate(layout=wanted, refusal=refusal))
        return refusal is None

    def work_s(self, role: Role, *, prompts: bool, tokens: bool) -> float:
        """The least time of an engine per request, with batches as large as its limits and the SLO of TBT let them be."""
        engine, demand = role_of(self.calibration, role).engine, self.demand(0)
        costs, limits = engine.costs, engine.limits
        work_s = 0.0
        if prompts:
            per_token = max(
                costs.gpu_per_prompt_token_s,
                costs.host_per_prompt_token_s + costs.host_prefill_s / limits.max_num_batched_tokens,
            )
            work_s += per_token * float(
                (demand.prompt_tokens - np.minimum(demand.cached_tokens, demand.prompt_tokens)).mean()
            )
        if tokens:
            slo_s = np.inf if self.slo[1] is None else self.slo[1] / 1e3
            largest = min(limits.max_num_seqs, engine.box.sequences)
            n = np.arange(1, largest + 1)
            steps = list(zip(np.maximum(costs.gpu_step_s(n), costs.host_decode_s).tolist(), n.tolist(), strict=True))
            work_s += float(demand.output_tokens.mean()) * min(
                (took / n for took, n in steps if took <= slo_s), default=steps[0][0]
            )
        return work_s

    def replicas(self) -> Candidate | None:
        """The fewest."""
        floor = self.floor(self.work_s("replica", prompts=True, tokens=True))
        least = least_that(lambda n: self.met(_replicas(n)), floor, self.most)
        return None if least is None else self.candidate(_replicas(least))

    def disaggregated(self) -> list[Candidate]:
        """Of each number of prefill instances, from the fewest on, the fewest decode instances, as long as these get fewer."""
        x_floor = self.floor(self.work_s("prefill", prompts=True, tokens=False))
        y_floor = self.floor(self.work_s("decode", prompts=False, tokens=True))
        # With more decode instances than there may be: what is missing then is prefill.
        x = least_that(lambda n: self.met(_split(n, self.most)), x_floor, self.most - 1)
        found: list[Candidate] = []
        if x is None:
            return found
        highest = self.most
        for prefill in range(x, self.most):
            y = self.least_decode(prefill, y_floor, min(highest, self.most - prefill))
            if y is None:
                break
            found.append(self.candidate(_split(prefill, y)))
            highest = y - 1
        return found

    def closest_split(self) -> Candidate:
        """With as many GPUs as may be, the one that keeps the SLO for most requests, of seven splits at most."""
        splits = {min(max(1, round(self.most * eighth / 8)), self.most - 1) for eighth in range(1, 8)}
        tried = [self.candidate(_split(prefill, self.most - prefill)) for prefill in sorted(splits)]
        return max(tried, key=lambda each: (each.refusal is None, each.met_pct[0]))

    def least_decode(self, prefill: int, low: int, high: int) -> int | None:
        return least_that(lambda n: self.met(_split(prefill, n)), low, high)

    def floor(self, work_s: float) -> int:
        demand = self.demand(0)
        rate = len(demand) / float(demand.t_s[-1]) if demand.t_s[-1] > 0 else 0.0
        # Arrivals of a finite load may be slower than their rate, and queues may outlast it: a floor that is surely too low costs little.
        return min(max(1, int(0.8 * rate * work_s)), self.most)

    def met(self, wanted: Layout) -> bool:
        return self.candidate(wanted).met


def search(
    calibration: Calibration,
    demands: Callable[[int], Demand],
    *,
    slo: tuple[float | None, float | None],
    most_gpus: int,
    by_joules: bool = False,
) -> Search:
    """The cheapest deployment that keeps the SLO. Each kind's best and its neighbours are compared over `SEEDS` loads.

    A tie: as many GPUs (by joules: any number), and joules per token that are lower in one load and higher in another.
    """
    trial = Trials(calibration, demands, slo, most_gpus)
    starts: list[Candidate] = []
    if trial.may(_wanted("single", single=1)):
        starts.append(trial.candidate(_wanted("single", single=1)))
    # Where none of a kind keeps the SLO, the closest of those with all GPUs is shown.
    if most_gpus > 1 and trial.may(_replicas(2)):
        starts.append(trial.replicas() or trial.candidate(_replicas(most_gpus)))
    if most_gpus > 1 and trial.may(_split(1, 1)):
        starts += trial.disaggregated() or [trial.closest_split()]

    def cost(candidate: Candidate) -> tuple[float, ...]:
        joules = float(np.mean(candidate.j_per_output_token)) if candidate.j_per_output_token else 0.0
        return (joules, candidate.layout.gpus) if by_joules else (candidate.layout.gpus, joules)

    near: list[Candidate] = []
    for kind in ("single", "replicas", "disaggregated"):
        best = min((each for each in starts if each.layout.kind == kind and each.met), key=cost, default=None)
        while best is not None:
            tried = [trial.candidate(wanted, SEEDS) for wanted in _around(best.layout, most_gpus)]
            near += [each for each in tried if each not in near]
            if any(each.met for each in tried) or best.layout.gpus >= most_gpus:
                break
            # One load was luck: with one GPU more the others may agree.
            more = (
                _split(best.layout.instances["prefill"], best.layout.instances["decode"] + 1)
                if kind == "disaggregated"
                else _replicas(best.layout.gpus + 1)
            )
            best = trial.candidate(more) if more.kind == kind else None
    # What one load finds cheaper must show it in the others too.
    limit = min((cost(each) for each in near if each.met), default=(np.inf,))
    for each in [each for each in starts if each not in near and each.met and cost(each) < limit]:
        near.append(trial.candidate(each.layout, SEEDS))
    ranked = sorted((each for each in near if each.met), key=cost)
    if ranked:
        for other in ranked[1:]:
            other.tie = (by_joules or other.layout.gpus == ranked[0].layout.gpus) and _overlap(other, ranked[0])
    shown = {id(each): each for each in [*ranked, *near, *starts]}
    rest = sorted(
        (each for each in shown.values() if not each.met), key=lambda each: (each.refusal is not None, *cost(each))
    )
    # Of one load only, and dearer or less sure than what was compared.
    others = [each for each in shown.values() if each.met and each not in ranked]
    return Search(
        slo_ttft_ms=slo[0],
        slo_tbt_ms=slo[1],
        most_gpus=most_gpus,
        by_joules=by_joules,
        requests=len(trial.demand(0)),
        simulations=trial.simulations,
        candidates=[*ranked, *others, *rest, *trial.refused],
    )


def least_that(test: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from `low` to `high` of which `test` is true, if it stays true from there on."""
    under, number, step = low - 1, low, 1
    if low > high:
        return None
    while not test(number):
        if number == high:
            return None
        under, number, step = number, min(high, number + step), 2 * step
    while number - under > 1:
        middle = (under + number) // 2
        under, number = (under, middle) if test(middle) else (middle, number)
    return number


def _overlap(one: Candidate, other: Candidate) -> bool:
    """Do the differences of their joules per token, load by load, have both signs?"""
    differences = np.subtract(one.j_per_output_token, other.j_per_output_token)
    return not len(differences) or bool(differences.min() <= 0 <= differences.max())


def _wanted(kind: str, **instances: int) -> Layout:
    return Layout(kind, instances)  # type: ignore[arg-type]


def _replicas(count: int) -> Layout:
    return _wanted("single", single=1) if count == 1 else _wanted("replicas", replica=count)


def _split(prefill: int, decode: int) -> Layout:
    return _wanted("disaggregated", prefill=prefill, decode=decode)


def _around(best: Layout, most_gpus: int) -> Iterable[Layout]:
    """The deployment and its neighbours."""
    if best.kind != "disaggregated":
        for count in (best.gpus, best.gpus - 1, best.gpus + 1):
            if 1 <= count <= most_gpus and (best.kind == "single") == (count == 1):
                yield _replicas(count)
        return
    x, y = best.instances["prefill"], best.instances["decode"]
    for dx, dy in ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1), (1, -1), (-1, 1)):
        if x + dx > 0 and y + dy > 0 and x + dx + y + dy <= most_gpus:
            yield _split(x + dx, y + dy)
