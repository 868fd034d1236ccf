"""The statistics on a recorded run: one vLLM instance on a busy 2-core machine, 12 trials of 12 requests, tiny model.

`pdbench run --against single --trials 12 --requests 12 --output-tokens 24` made it; texts and devices were taken out.
"""

from copy import copy
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pdbench.analysis.compare import estimates
from pdbench.analysis.statistics import Estimate, ratio, trials_to_show
from pdbench.records import Run

RECORDED = Path(__file__).parent / "data" / "recorded_single_cpu_results.json"
JUDGED = ("ttft_p50_ms", "tbt_p50_ms", "tbt_p90_ms", "e2e_p50_ms", "output_tokens_per_s")


@pytest.fixture(scope="module")
def run():
    return msgspec.json.decode(RECORDED.read_bytes(), type=Run)


def resampled(run: Run, trials: "np.ndarray", factor: float = 1.0) -> dict[str, Estimate]:
    """The figures of a run made of these recorded trials (a trial may occur twice), all times multiplied by `factor`."""
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
    return {metric.name: estimate for metric, estimate in estimates(made).items()}


def test_a_recorded_run_against_itself_gives_few_false_alarms(run):
    """200 splits of the 12 trials into 3 against 3, five metrics each: at most 5 % of all find what is not there."""
    random = np.random.default_rng(17)
    halves = []
    for _ in range(200):
        order = random.permutation(len(run.trials))
        halves.append((resampled(run, order[:3]), resampled(run, order[3:6])))
    drawn = [ratio(a[name], b[name]) for a, b in halves for name in JUDGED]
    assert len(drawn) == 1000
    assert sum(not one.low <= 1 <= one.high for one in drawn) <= 50


def test_a_change_of_five_per_cent_is_found_in_recorded_trials_at_the_recommended_count(run):
    random = np.random.default_rng(19)
    counts, found = [], 0
    for _ in range(10):
        order = random.permutation(len(run.trials))
        a, b = resampled(run, order[:3])["tbt_p50_ms"], resampled(run, order[3:6])["tbt_p50_ms"]
        count = min(trials_to_show(a, b) or 400, 400)
        counts.append(count)
        many = [random.integers(0, len(run.trials), count) for _ in range(2)]
        drawn = ratio(resampled(run, many[0])["tbt_p50_ms"], resampled(run, many[1], factor=1.05)["tbt_p50_ms"])
        found += drawn.low > 1
    assert found >= 8, counts
