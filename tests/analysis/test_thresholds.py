"""Conditions of `compare --fail-if` at their limits."""

import pytest

from pdbench.analysis import thresholds
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from tests.support.runs import build_run


@pytest.mark.parametrize("text", ["goodput_requests_per_s < -0", "goodput_requests_per_s > +0"])
def test_no_change_at_all_is_neither_below_nor_above_none(text):
    load = {"concurrency": 1, "requests": 16, "output_tokens": 64, "slo_ttft_ms": 0.001}
    compared = compare(*(analyze(build_run(name, gpu=False, load=load)) for name in ("a", "b")))
    (result,) = thresholds.evaluate(compared, [thresholds.parse(text)])
    assert (result.change.low, result.change.high, result.outcome) == (0.0, 0.0, "passes")
