"""The statistics against scipy's references, and by simulation: false alarms of A/A, power at the recommended count."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from pdbench.analysis.statistics import (
    Estimate,
    Resampling,
    blocks_of,
    difference,
    of_parts,
    of_trials,
    quantiles,
    ratio,
    trials_to_show,
)


def experiment(random, trials=3, requests=16, between=0.02, within=0.15, shift=1.0):
    """Values and trials of one synthetic run."""
    luck = np.exp(random.normal(0, between, trials))
    values = shift * random.lognormal(0, within, (trials, requests)) * luck[:, None]
    return values.ravel(), np.repeat(np.arange(trials), requests)


@cache
def resampling_of(shape: bytes) -> Resampling:
    trial = np.frombuffer(shape, dtype=np.int64)
    return Resampling(trial, blocks_of(trial))


def estimate(values, trial, share=0.5):
    """One quantile; runs of one shape share their resampling, which saves the simulations most of their time."""
    return quantiles(values, np.arange(len(values)), resampling_of(trial.astype(np.int64).tobytes()), (share,))[0]


def test_bootstrap_of_requests_agrees_with_scipy():
    values = np.random.default_rng(3).lognormal(0, 0.3, 90)
    ours = estimate(values, np.zeros(90, dtype=int))
    theirs = stats.bootstrap((values,), np.median, n_resamples=4000, vectorized=True, rng=np.random.default_rng(1))
    assert ours.value == pytest.approx(np.median(values))
    assert np.sqrt(ours.variance) == pytest.approx(theirs.standard_error, rel=0.15)


def test_interval_of_once_a_trial_figures_is_welchs():
    a, b = [100.0, 104.0, 98.0, 101.0], [110.0, 109.0, 117.0]
    ours = difference(of_trials(np.mean(a), a), of_trials(np.mean(b), b))
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_agreeing_trials_promise_no_more_than_their_parts_show():
    random = np.random.default_rng(9)
    top, bottom = random.poisson(100, (400, 3, 5)).astype(float), np.ones((3, 5))
    within = [of_parts(one, bottom) for one in top]
    assert np.mean(within) == pytest.approx(1 / 1500, rel=0.1)
    assert of_trials(500.0, [500.0, 500.0, 500.0], within[0]).log_variance == within[0]
    assert of_trials(500.0, [400.0, 500.0, 600.0], within[0]).log_variance > within[0]
    assert of_parts(np.zeros((3, 5)), bottom) == of_parts(np.full((3, 5), np.nan), bottom) == 0.0


def test_at_most_five_per_cent_false_alarms_of_figures_that_a_trial_has_once():
    """Tokens in five parts of each of 2 to 5 trials; a trial's speed is one of three, as on a machine with moods."""
    random, alarms = np.random.default_rng(23), 0
    for i in range(1000):
        runs, trials = [], 2 + i % 4
        for _ in range(2):
            speed = random.choice([90, 100, 110], (trials, 1))
            top, bottom = random.normal(speed, 0.12 * speed, (trials, 5)), np.ones((trials, 5))
            runs.append(of_trials(top.mean(), top.mean(axis=1), of_parts(top, bottom)))
        drawn = ratio(*runs)
        alarms += not drawn.low <= 1 <= drawn.high
    assert alarms <= 50


def test_variance_between_trials_is_seen_through_few_requests():
    random = np.random.default_rng(5)
    found = [estimate(*experiment(random, trials=4, between=0.1, within=0.1)) for _ in range(300)]
    true = np.var([np.log(one.value) for one in found])
    assert 0.9 * true <= np.mean([one.log_variance for one in found]) <= 2 * true


def test_gaps_of_one_request_count_as_one_unit():
    """Thirty requests of 50 equal gaps know no more than thirty values."""
    random = np.random.default_rng(7)
    values, trial = random.lognormal(0, 0.3, 30), np.zeros(30, dtype=int)
    alone = estimate(values, trial)
    owner = np.repeat(np.arange(30), 50)
    together = quantiles(values[owner], owner, Resampling(trial, blocks_of(trial)), (0.5,))[0]
    assert together.variance == pytest.approx(alone.variance, rel=0.1)


def test_at_most_five_per_cent_false_alarms_in_a_thousand_comparisons():
    random = np.random.default_rng(11)
    runs = [estimate(*experiment(random, trials=2 + i // 2 % 4)) for i in range(2000)]
    drawn = [ratio(a, b) for a, b in zip(runs[::2], runs[1::2], strict=True)]
    assert sum(not one.low <= 1 <= one.high for one in drawn) <= 50


def test_a_change_of_five_per_cent_is_found_at_the_recommended_count():
    random = np.random.default_rng(13)
    found = 0
    for _ in range(100):
        count = trials_to_show(*(estimate(*experiment(random, between=0.03, within=0.1)) for _ in range(2)))
        a = estimate(*experiment(random, count, between=0.03, within=0.1))
        b = estimate(*experiment(random, count, between=0.03, within=0.1, shift=1.05))
        found += ratio(a, b).low > 1
    assert found >= 80


def test_nothing_is_judged_from_one_trial():
    one = estimate(*experiment(np.random.default_rng(0), trials=1))
    assert ratio(one, one) is None and difference(one, one) is None and trials_to_show(one, one) is None


@given(some.lists(some.floats(1e-3, 1e6), min_size=1, max_size=60), some.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_any_positive_values_give_a_variance(values, trials):
    values = np.array(values)
    made = estimate(values, np.sort(np.arange(len(values)) % trials))
    assert made.variance >= 0 and made.log_variance >= 0
    assert values.min() <= made.value <= values.max()


def test_equal_values_give_an_interval_of_no_width():
    same = Estimate(5.0, 0.0, 0.0, 3)
    assert (ratio(same, same).low, ratio(same, same).high) == (1.0, 1.0)


def test_blocks_keep_neighbours_together_and_stay_few():
    block = blocks_of(np.repeat([0, 1], [5000, 30]))
    assert len(np.unique(block[:5000])) == 100 and (np.diff(block[:5000]) >= 0).all()
    assert len(np.unique(block[5000:])) == 30
