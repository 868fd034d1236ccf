"""`pdbench search --tune`: the clocks and power caps that keep an SLO at one rate with the least energy."""

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan

from pdbench.analysis.run_analysis import load_analysis
from pdbench.config import LoadConfig
from pdbench.failures import VOID
from pdbench.report import text
from pdbench.search.clocks import Setting, cheapest
from pdbench.search.document import Choice, Held, Point, Tuned, keeps
from pdbench.search.rates import Search
from pdbench.slo_loads import LoadJudge, Loads

MOST_CONFIRMED = 3
"""Settings, from the cheapest on, that a run with other arrivals may refuse."""


def tune(loads: Loads, attain: float, until_s: float, load: LoadConfig, entry: Held, keep: Callable[[], None]) -> None:
    """The clocks and power caps with the least energy per request within the SLO at the load's rate, each with the same arrivals; then
    runs with other arrivals, there and at the usual setting, which say what it saves."""
    assert load.rate and load.requests
    first, load_s = len(loads.points), load.requests / load.rate
    tuned = Tuned(rate_per_s=load.rate, requests=load.requests)
    usual = {key: getattr(loads.deployment.options.power, key) for key in loads.deployment.tune}

    def send(prefix: str, load: LoadConfig, setting: Setting, judge: LoadJudge | None = None) -> Point:
        """The point, with `kept`: was the SLO kept, and the setting that was requested held?"""
        words = ",".join(f"{key}={value or 'none'}" for key, value in setting.items())
        sent = loads.send(f"{prefix}-{words}", load, judge, setting)
        point = sent.point
        refused = {flag.name for flag in sent.run.flags} & {"clock-clamped", "client-limited", "client-stalled", *VOID}
        point.kept = point.held is not False and keeps(point.attained_pct, 100 * attain) and not refused
        point.refused = sorted(refused)
        point.j_per_good_request = load_analysis(loads.out / point.run).summary.goodput.j_per_good_request
        joules = f", {text.number(point.j_per_good_request)} J per request within the SLO" if point.kept else ""
        missed = "".join(f", {name}" for name in sorted(refused)) or ", not kept"
        unknown = f", {point.undecided_pct:.1f} % may be (slo-undecided)" if point.undecided_pct else ""
        share = text.attained(point.attained_pct, 100 * attain)
        loads.console.print(f"  {text.setting(setting)}: {share} % within the SLO{unknown}{joules or missed}")
        return point

    def cost(setting: Setting) -> float | None:
        if time.monotonic() > until_s - 3 * (load_s + loads.beside_s):  # two runs with other arrivals follow
            return None
        judge = LoadJudge(Search(1 - attain, load.rate or 0.0), load, until_s, settle_s=inf)
        point = send("clocks", load, setting, judge)
        if judge.reason and judge.held is None:  # cut off by the time: it had other arrivals than the others
            loads.points.pop()
            return None
        joules = point.j_per_good_request if point.kept else None
        if joules and joules < (tuned.j_per_good_request or inf):
            tuned.take(point)
        entry.tuned = tuned
        keep()
        # Answers that nobody can judge count as missed: where the SLO may have been kept, slower settings may keep it, too.
        may_keep = keeps(point.attained_pct + (point.undecided_pct or 0.0), 100 * attain)
        return joules or (nan if point.kept or point.refused or (point.undecided_pct and may_keep) else inf)

    found = cheapest(loads.deployment.tune, cost)
    if found:
        again = replace(load, seed=load.seed + 1)
        before = send("tuned", again, usual)
        for setting in found[:MOST_CONFIRMED]:
            point = before if setting == usual else send("tuned", again, setting)
            if point.kept:
                break
        tuned.take(point)
        tuned.before = Choice()
        tuned.before.take(before)
    mine = loads.points[first:]
    if not mine:  # the time was up
        return
    tuned.loads, tuned.load_s = len(mine), sum(point.load_s for point in mine)
    if not found:
        tuned.attained_pct, tuned.limited_by = mine[0].attained_pct, mine[0].limited_by
    entry.tuned = tuned
