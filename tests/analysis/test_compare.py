"""Verdicts, refusals and the gate, on runs whose true difference is known."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw

from pdbench.analysis import thresholds, verdicts
from pdbench.analysis.compare import RATES, compare, judge
from pdbench.analysis.statistics import Estimate
from pdbench.errors import UserError
from pdbench.records import Flag, Gate
from tests.support.runs import build_run


@pytest.fixture(scope="module")
def slower_first_token_faster_tokens():
    return compare(build_run("single", ttft_ms=20, tbt_ms=3.3, seed=1), build_run(ttft_ms=35, tbt_ms=1.5, seed=2))


def line_of(comparison, name):
    return next(line for line in comparison.differences if line.metric.name == name)


def test_verdicts_go_the_right_way(slower_first_token_faster_tokens):
    assert line_of(slower_first_token_faster_tokens, "ttft_p50_ms").verdict == "worse"
    tbt = line_of(slower_first_token_faster_tokens, "tbt_p99_ms")
    assert tbt.verdict == "better"
    assert tbt.ratio.low < 1.5 / 3.3 < tbt.ratio.high
    assert tbt.difference.low < 0 and tbt.difference.high < 0
    assert line_of(slower_first_token_faster_tokens, "output_tokens_per_s").verdict == "better"


def test_words_say_how_much_and_how_sure(slower_first_token_faster_tokens):
    tbt = line_of(slower_first_token_faster_tokens, "tbt_p50_ms")
    assert tbt.words.startswith("TBT p50: 2.1") and "x lower, 95 % 2." in tbt.words and tbt.words.endswith("ms)")
    assert "更低" in verdicts.line(tbt, "zh")


def test_a_run_against_itself_shows_no_difference():
    run = build_run(seed=4)
    assert {line.verdict for line in compare(run, run).differences} <= {"same", "unclear", "unjudged"}


def test_no_difference_names_the_trials_that_would_show_one():
    found = compare(build_run(ttft_ms=30, spread=0.4, seed=1), build_run(ttft_ms=30, spread=0.4, seed=2))
    ttft = line_of(found, "ttft_p50_ms")
    assert ttft.verdict == "unclear" and ttft.trials_needed > 3
    assert "no difference that 3 trials can show" in ttft.words and str(ttft.trials_needed) in ttft.words


def shown_bounds(words):
    """The interval as a reader sees it: (low, high, the value that stands for no change)."""
    inside = words[words.index("(") + 1 : words.rindex(")")].replace("−", "-").replace(",", "")
    low, high = map(float, re.findall(r"[+-]?\d[\d.]*(?:e-\d+)?", inside))
    return low, high, 0.0 if "%" in inside else 1.0


variances = draw.floats(1e-7, 0.05)


@settings(deadline=None)
@given(draw.floats(0.2, 5.0), variances, variances, draw.integers(2, 5), draw.sampled_from(["en", "zh"]))
def test_words_and_the_interval_beside_them_agree(change, variance_a, variance_b, trials, language):
    a, b = (Estimate(value, v * value**2, v, trials) for value, v in ((8.8, variance_a), (8.8 * change, variance_b)))
    line = judge(RATES[3], a, b)
    low, high, none = shown_bounds(verdicts.judgement(line, language))
    assert (line.verdict in ("better", "worse")) == (not low <= none <= high)
    assert line.verdict != "same" or (low >= -5 and high <= 5)


def test_energy_of_two_trials_whose_interval_excludes_no_change_is_a_difference():
    """Recorded on two H200s: the ratio's interval excludes 1 while the difference's does not exclude 0; the ratio decides."""
    line = judge(RATES[3], Estimate(8.8174, 6.59e-3, 8.477e-5, 2), Estimate(17.5479, 0.8547, 2.7808e-3, 2))
    assert line.verdict == "worse" and line.difference.low < 0
    assert line.words == "Energy per token: 1.99 x higher, 95 % 1.10–3.61 (8.82 → 17.5 J)"


def test_few_values_and_one_trial_are_not_judged():
    assert (
        line_of(compare(build_run(seed=1), build_run(seed=2)), "ttft_p99_ms").words.count("48 values, 400 needed") == 1
    )
    assert {line.verdict for line in compare(build_run(trials=1), build_run(trials=1)).differences} == {"unjudged"}


def test_nothing_in_common_compares_to_nothing():
    empty = build_run(trials=0)
    assert compare(empty, empty).differences == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: run.host.update(name="elsewhere"), "host"),
        (lambda run: run.host.update(gpus=[{"name": "Other"}]), "GPUs"),
        (lambda run: run.host.update(driver="9.9"), "driver"),
        (lambda run: run.config.update(model="other"), "model"),
        (lambda run: run.config["load"].update(requests=99), "load, requests"),
        (lambda run: setattr(run, "schema", "pdbench/0"), "schema"),
    ],
)
def test_runs_measured_differently_are_refused_unless_anyway(change, named):
    a, b = build_run("single"), build_run()
    change(b)
    with pytest.raises(UserError, match=f"{named}.*--anyway"):
        compare(a, b)
    assert any(one.what == named and one.refused for one in compare(a, b, anyway=True).mismatches)


def test_other_settings_are_noted_but_compared():
    a, b = (
        build_run("single", config={"serve": {"enforce_eager": True}}),
        build_run(config={"serve": {"enforce_eager": False}}),
    )
    assert [str(one) for one in compare(a, b).mismatches] == ["enforce_eager: True against False"]


def test_flags_and_a_failed_gate_travel_with_the_comparison():
    failed = Gate(
        passed=False, prompts=4, equal_outputs=3, prompt_tokens=1, external_kv_tokens=0, detail="3 of 4 equal"
    )
    found = compare(build_run("single", flags=[Flag("throttled", "hot")]), build_run(gate=failed))
    assert [[flag.name for flag in flags] for flags in found.flags] == [["throttled"], ["gate-failed"]]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("ttft_p50_ms > +5%", "fails"),
        ("ttft_p50_ms > +75%", "uncertain"),
        ("ttft_p50_ms > +300%", "passes"),
        ("ttft_p50_ms > +1", "fails"),
        ("output_tokens_per_s < -5%", "passes"),
        ("tbt_p50_ms<-1.0", "fails"),
        ("ttft_p99_ms > +5%", "uncertain"),
    ],
)
def test_the_gate_fails_passes_or_cannot_tell(slower_first_token_faster_tokens, text, outcome):
    assert [one.outcome for one in thresholds.rule(slower_first_token_faster_tokens, [thresholds.parse(text)])] == [
        outcome
    ]


def test_exit_codes_of_the_gate(slower_first_token_faster_tokens):
    def code(*texts):
        return thresholds.exit_code(
            thresholds.rule(slower_first_token_faster_tokens, [thresholds.parse(text) for text in texts])
        )

    assert code("tbt_p99_ms > +5%") == 0
    assert code("ttft_p99_ms > +5%") == 3
    assert code("ttft_p99_ms > +5%", "ttft_p50_ms > +5%") == 1


@pytest.mark.parametrize("text", ["ttft_p50_ms", "ttft_p50_ms > 5%", "ttft_p50_ms >= +5%", "", "> +5%", "a > +x%"])
def test_a_malformed_condition_is_one_line_with_the_shape(text):
    with pytest.raises(UserError, match="write METRIC"):
        thresholds.parse(text)


def test_an_unknown_metric_names_those_that_exist(slower_first_token_faster_tokens):
    with pytest.raises(UserError, match="there are ttft_p50_ms"):
        thresholds.rule(slower_first_token_faster_tokens, [thresholds.parse("latency > +5%")])
