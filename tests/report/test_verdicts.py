"""Verdicts in words."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw

from pdbench.analysis import verdicts
from pdbench.analysis.compare import compare, judge
from pdbench.analysis.metrics import METRICS
from pdbench.analysis.run_analysis import Figure, analyze
from tests.support.runs import build_run

ENERGY = METRICS["j_per_output_token"]


def line_of(a, b, name):
    return next(line for line in compare(analyze(a), analyze(b)).differences if line.metric.name == name)


def test_words_say_how_much_and_how_sure():
    a, b = build_run("single", ttft_ms=20, tbt_ms=3.3, seed=1), build_run(ttft_ms=35, tbt_ms=1.5, seed=2)
    tbt = line_of(a, b, "tbt_p50_ms")
    words = verdicts.line(tbt)
    assert words.startswith("TBT p50: 2.") and "x lower, 95 % 2." in words and words.endswith("ms)")
    assert "更低" in verdicts.line(tbt, "zh")


def test_unclear_names_the_trials_that_would_show_one():
    ttft = line_of(build_run(ttft_ms=30, spread=0.4, seed=1), build_run(ttft_ms=30, spread=0.4, seed=2), "ttft_p50_ms")
    words = verdicts.line(ttft)
    assert "no difference that 3 trials can show" in words and str(ttft.trials_needed) in words


def test_few_values_are_named():
    assert verdicts.line(line_of(build_run(seed=1), build_run(seed=2), "ttft_p99_ms")).count("48 values, 400 needed")


def shown_bounds(words):
    """The interval as a reader sees it: (low, high, the value that stands for no change)."""
    inside = words[words.index("(") + 1 : words.rindex(")")].replace("−", "-").replace(",", "")
    low, high = map(float, re.findall(r"[+-]?\d[\d.]*(?:e-\d+)?", inside))
    return low, high, 0.0 if "%" in inside else 1.0


@settings(deadline=None)
@given(
    draw.floats(0.2, 5.0),
    draw.floats(3e-4, 0.2),
    draw.integers(0, 99),
    draw.booleans(),
    draw.sampled_from(["en", "zh"]),
)
def test_words_and_the_interval_beside_them_agree(change, sd, seed, paired, language):
    logs = np.random.default_rng(seed).normal(0, sd, (2, 3))
    a, b = (
        Figure(value=factor, trials=dict(enumerate((factor * np.exp(side)).tolist())))
        for factor, side in ((8.8, logs[0]), (8.8 * change, logs[1]))
    )
    line = judge(ENERGY, a, b, paired)
    low, high, none = shown_bounds(verdicts.judgement(line, language))
    assert (line.verdict in ("better", "worse")) == (not low <= none <= high)
    assert line.verdict != "same" or (low >= -5 and high <= 5)


@pytest.mark.parametrize("paired", [True, False])
def test_ratio_decides_where_ratio_and_difference_disagree(paired):
    a = Figure(value=8.82, trials={0: 8.8, 1: 8.84})
    b = Figure(value=17.5, trials={0: 16.9, 1: 18.2})
    line = judge(ENERGY, a, b, paired)
    assert line.verdict == "worse"
    assert verdicts.line(line).startswith("Energy per token: 1.99 x higher, 95 % 1.")
    assert verdicts.line(line).endswith("(8.82 → 17.5 J)")
