"""Trials that Ctrl-C or a death cut short, in comparisons."""

import pytest

from pdbench.analysis import thresholds
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from pdbench.records import Clock, Flag
from pdbench.report import answer
from tests.support.runs import CLOCK, build_run


@pytest.mark.parametrize(
    "flag",
    [
        Flag("interrupted", "trial 4: stopped by Ctrl-C"),
        Flag("interrupted", "stopped by Ctrl-C"),  # of an older pdbench
        Flag("server-died", "trial 4: single-0 died"),
        Flag("node-lost", "10.0.0.2 is lost"),
    ],
    ids=lambda flag: flag.detail,
)
def test_trial_that_was_cut_short_is_no_trial_of_a_comparison(flag):
    """One request of it, twice as slow, had counted as a whole trial."""
    cut, whole = (build_run(trials=4, spread=1e-3, trial_spread=1e-3, seed=seed) for seed in (1, 2))
    first, *others = [request for request in cut.requests if request.trial == 3]
    cut.requests = [request for request in cut.requests if request not in others]
    first.token_s = [first.sent_s + 2 * (at_s - first.sent_s) for at_s in first.token_s]
    first.end_s = first.token_s[-1]
    cut.flags = [flag]
    analysis = analyze(cut)
    assert set(analysis.figures["ttft_p50_ms"].trials) == set(analysis.starts) == {0, 1, 2}
    lines = compare(analysis, analyze(whole)).differences
    ttft = next(line for line in lines if line.metric.name == "ttft_p50_ms")
    assert ttft.trials == 3 and ttft.ratio.high / ttft.ratio.low < 1.02


@pytest.mark.parametrize("same_command", [True, False])
def test_change_seen_in_one_whole_trial_is_of_that_trial_alone(same_command):
    """The trial that was stopped is three times as slow, and the other run's second trial has no pair."""
    clock = CLOCK if same_command else Clock(monotonic_s=0.0, unix_s=1.7e9)
    cut, whole = (
        build_run(trials=2, spread=1e-3, trial_spread=1e-3),
        build_run(trials=2, spread=1e-3, clock=clock, seed=1),
    )
    for request in [request for request in cut.requests if request.trial == 1]:
        request.token_s = [request.sent_s + 3 * (at_s - request.sent_s) for at_s in request.token_s]
        request.end_s = request.token_s[-1]
    cut.flags = [Flag("interrupted", "trial 2: stopped early")]
    a, b = analyze(cut), analyze(whole)
    for line in compare(a, b).differences:
        of_a, of_b = (run.figures[line.metric.name] for run in (a, b))
        assert line.unjudged == "one-trial"
        assert (line.a, line.b) == (of_a.trials[0], of_b.trials[0] if same_command else of_b.value)


@pytest.mark.parametrize("trials", [1, 3])
def test_run_whose_trials_were_all_cut_short_is_not_judged(trials):
    """Three stopped trials had been compared as whole ones, with intervals and verdicts."""
    cut, whole = build_run("cut", trials=trials, ttft_ms=10), build_run("whole", trials=trials, seed=1)
    cut.flags = [Flag("interrupted", f"trial {trial + 1}: stopped by Ctrl-C") for trial in range(trials)]
    runs = {run.name: analyze(run) for run in (cut, whole)}
    comparison = compare(*runs.values())
    assert {(line.unjudged, line.leaning) for line in comparison.differences} == {("cut-short", "unjudged")}
    words = answer.headline(comparison, runs)
    assert "not judged: no whole trial of both. (no whole trial of both; flags: interrupted" in words
    assert "cut short" in answer.next_step(comparison)
    condition = thresholds.parse("ttft_p50_ms > +5%")
    assert thresholds.evaluate(comparison, [condition])[0].outcome == "uncertain"


def test_values_of_a_trial_that_was_cut_short_do_not_make_a_quantile_judged() -> None:
    """Its 16 values beside 32 of two whole trials had made the 40 that are needed."""
    cut, whole = (build_run(trials=3, seed=seed) for seed in (1, 2))
    cut.flags = [Flag("interrupted", "trial 3: stopped by Ctrl-C")]
    lines = {line.metric.name: line for line in compare(analyze(cut), analyze(whole)).differences}
    assert (lines["ttft_p90_ms"].unjudged, lines["ttft_p90_ms"].values) == ("few-values", 32)
    assert lines["ttft_p50_ms"].verdict != "unjudged"
