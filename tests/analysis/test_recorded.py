"""The statistics on a recorded run: one vLLM instance on a busy 2-core machine, 12 trials of 12 requests, tiny model.

`pdbench run --against single --trials 12 --requests 12 --output-tokens 24` made it; texts and devices were taken out.
"""

from copy import copy
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pdbench.analysis.compare import estimates
from pdbench.analysis.metrics import measure
from pdbench.analysis.rates import PARTS, rates
from pdbench.analysis.statistics import (
    Estimate,
    Resampling,
    blocks_of,
    of_parts,
    of_trials,
    quantiles,
    ratio,
    trials_to_show,
)
from pdbench.records import Run

RECORDED = Path(__file__).parents[1] / "data" / "recorded_single_cpu_results.json"
JUDGED = ("ttft_p50_ms", "tbt_p50_ms", "tbt_p90_ms", "e2e_p50_ms", "output_tokens_per_s")


@pytest.fixture(scope="module")
def run():
    return msgspec.json.decode(RECORDED.read_bytes(), type=Run)


def resampled(run: Run, trials: "np.ndarray", factor: float = 1.0) -> Run:
    """A run made of these recorded trials (a trial may occur twice), all times multiplied by `factor`."""
    made = copy(run)
    made.trials, made.requests = [], []
    shift = 0.0
    for index, number in enumerate(trials):
        trial = run.trials[number]
        made.trials.append(
            msgspec.structs.replace(
                trial, index=index, start_s=shift, end_s=shift + factor * (trial.end_s - trial.start_s)
            )
        )
        for request in (one for one in run.requests if one.trial == trial.index):
            move = lambda t, trial=trial, shift=shift: shift + factor * (t - trial.start_s)  # noqa: E731
            made.requests.append(
                msgspec.structs.replace(
                    request, trial=index, planned_s=move(request.planned_s), sent_s=move(request.sent_s),
                    token_s=[move(t) for t in request.token_s], end_s=move(request.end_s), phases={},
                )
            )  # fmt: skip
        shift += factor * (trial.end_s - trial.start_s) + 10.0
    return made


def every(run: Run) -> dict[str, Estimate]:
    return {metric.name: estimate for metric, estimate in estimates(run).items()}


def tbt_p50(run: Run) -> Estimate:
    """It alone, in a third of the time of all figures."""
    measured = measure(run)
    resampling = Resampling(measured.trial, blocks_of(measured.trial))
    return quantiles(measured.tbt_ms, measured.tbt_owner, resampling, (0.5,))[0]


def test_a_recorded_run_against_itself_gives_few_false_alarms(run):
    """Every split of the 12 trials into 3 against 3: for each metric at most 5 % of them find what is not there."""
    chosen = list(combinations(range(len(run.trials)), 3))
    made = {one: every(resampled(run, np.array(one))) for one in chosen}
    pairs = [(made[a], made[b]) for a, b in combinations(chosen, 2) if not {*a} & {*b}]
    assert len(pairs) == 9240
    for name in JUDGED:
        drawn = [ratio(a[name], b[name]) for a, b in pairs]
        assert sum(not one.low <= 1 <= one.high for one in drawn) <= 0.05 * len(pairs), name


def test_a_change_of_five_per_cent_is_found_in_recorded_trials_at_the_recommended_count(run):
    random = np.random.default_rng(19)
    counts, found = [], 0
    assert tbt_p50(run).log_variance == every(run)["tbt_p50_ms"].log_variance
    for _ in range(40):
        order = random.permutation(len(run.trials))
        counts.append(
            min(trials_to_show(*(tbt_p50(resampled(run, part)) for part in (order[:3], order[3:6]))) or 400, 400)
        )
        a, b = (resampled(run, random.integers(0, 12, counts[-1]), factor) for factor in (1.0, 1.05))
        found += ratio(tbt_p50(a), tbt_p50(b)).low > 1
    assert found >= 32, (found, counts)


def test_the_same_for_throughput(run):
    random, measured, found = np.random.default_rng(23), measure(run), 0
    edges = [np.linspace(trial.start_s, trial.end_s, PARTS + 1) for trial in run.trials]
    tokens = np.array([np.histogram(measured.token_s, one)[0] for one in edges], dtype=float)
    length_s = np.diff(edges)

    def speed(trials, factor=1.0):
        top, bottom = tokens[trials], length_s[trials] * factor
        value = top.sum() / bottom.sum()
        return of_trials(value, top.sum(axis=1) / bottom.sum(axis=1), of_parts(top, bottom))

    assert speed(np.arange(12)).log_variance == pytest.approx(rates(run, measured)["output_tokens_per_s"].log_variance)
    for _ in range(500):
        order = random.permutation(12)
        count = trials_to_show(speed(order[:3]), speed(order[3:6]))
        found += ratio(speed(random.integers(0, 12, count)), speed(random.integers(0, 12, count), 1.05)).high < 1
    assert found >= 400
