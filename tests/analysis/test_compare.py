"""Verdicts, refusals and thresholds, on runs whose true difference is known; the t intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from pdbench.analysis import thresholds
from pdbench.analysis.compare import compare, judge
from pdbench.analysis.metrics import METRICS
from pdbench.analysis.run_analysis import Figure, analyze
from pdbench.analysis.significance import effect, holm
from pdbench.errors import UserError
from pdbench.records import Clock
from pdbench.report import answer, text
from tests.support.runs import build_run

ENERGY = METRICS["j_per_output_token"]
ELSEWHERE = Clock(monotonic_s=1.0, unix_s=1.9e9)


@pytest.fixture(scope="module")
def slower_first_token_faster_tokens():
    a, b = build_run("single", ttft_ms=20, tbt_ms=3.3, seed=1), build_run(ttft_ms=35, tbt_ms=1.5, seed=2)
    return compare(analyze(a), analyze(b))


def compare_runs(a, b, anyway=False):
    return compare(analyze(a), analyze(b), anyway)


def line_of(comparison, name):
    return next(line for line in comparison.differences if line.metric.name == name)


def figure(*trials, count=None):
    return Figure(value=float(np.mean(trials)), trials=dict(enumerate(trials)), count=count)


def test_verdicts_go_the_right_way(slower_first_token_faster_tokens):
    assert line_of(slower_first_token_faster_tokens, "ttft_p50_ms").verdict == "worse"
    tbt = line_of(slower_first_token_faster_tokens, "tbt_p99_ms")
    assert tbt.verdict == "better"
    assert tbt.ratio.low < 1.5 / 3.3 < tbt.ratio.high
    assert tbt.difference.low < 0 and tbt.difference.high < 0
    assert line_of(slower_first_token_faster_tokens, "output_tokens_per_s").verdict == "better"


def test_a_primary_metric_that_was_not_measured_is_refused():
    a, b = (analyze(build_run(name, gpu=False)) for name in ("single", "disaggregated"))
    with pytest.raises(UserError, match=r"--primary j_per_output_token: .* do not both have it"):
        compare(a, b, primary="j_per_output_token")


def test_run_against_itself_shows_no_difference():
    run = build_run(seed=4)
    assert {line.verdict for line in compare_runs(run, run).differences} <= {"same", "unclear", "unjudged"}


def test_unclear_difference_names_the_trials_that_would_show_five_percent():
    comparison = compare_runs(build_run(ttft_ms=30, spread=0.4, seed=1), build_run(ttft_ms=30, spread=0.4, seed=2))
    ttft = line_of(comparison, "ttft_p50_ms")
    assert ttft.verdict == "unclear" and ttft.trials == 3 and ttft.trials_needed > 3


@pytest.mark.parametrize(("open_loop", "verdict"), [(True, "same"), (False, "better")])
def test_rates_that_the_arrivals_set_differ_by_more_than_the_windows_ends(open_loop, verdict):
    rate = {"rate": 4.0, "concurrency": None} if open_loop else {"concurrency": 1}
    runs = [
        build_run(name, ttft_ms=ttft_ms, spread=1e-6, trial_spread=1e-6, load=rate)
        for name, ttft_ms in (("a", 40), ("b", 38))
    ]
    comparison = compare_runs(*runs)
    tokens = line_of(comparison, "output_tokens_per_s")
    assert tokens.ratio.low > 1 and tokens.ratio.high < 1.05 and tokens.verdict == verdict
    assert line_of(comparison, "ttft_p50_ms").verdict == "better"


def test_values_shown_are_geometric_means_so_that_their_ratio_is_the_ratio_shown():
    line = judge(ENERGY, figure(1.0, 4.0), figure(2.0, 9.0), "pairs")
    assert (line.a, line.b) == (pytest.approx(2.0), pytest.approx(18**0.5))
    assert line.ratio.value == line.change == pytest.approx(line.b / line.a)


def test_trials_of_one_pdbench_run_pair_by_their_index():
    a, b = figure(100.0, 150.0, 120.0), figure(110.0, 164.0, 131.0)
    b.trials[7] = 1000.0
    paired, unpaired = judge(ENERGY, a, b, "pairs"), judge(ENERGY, a, b, "apart")
    assert (paired.verdict, paired.trials) == ("worse", 3)
    assert unpaired.verdict == "unclear"
    assert compare_runs(build_run("single"), build_run()).paired
    assert not compare_runs(build_run("single"), build_run(clock=ELSEWHERE)).paired


a_and_b = [100.0, 104.0, 98.0, 101.0], [110.0, 109.0, 117.0, 108.0]


def test_interval_of_pairs_is_students():
    ours = effect(*map(np.array, a_and_b), "pairs")
    theirs = stats.ttest_rel(a_and_b[1], a_and_b[0])
    interval, bounds = ours.interval(), theirs.confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((bounds.low, bounds.high))
    assert ours.p == pytest.approx(theirs.pvalue)


def test_interval_of_joined_pairs_counts_what_a_shared_start_brought():
    """Steps of 0.1 and -0.2 between three pairs: variance of the mean (2k - 1) / k^2 x mean squared step (docs/statistics.md)."""
    ours = effect(np.zeros(3), np.array([0.1, 0.2, 0.0]), "joined")
    assert ours.variance == pytest.approx(5 / 9 * (0.01 + 0.04) / 2)
    assert (ours.value, ours.freedom) == (pytest.approx(0.1), 2)


def test_holm_adjusts_each_p_by_how_many_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_metrics_beside_the_primary_are_judged_as_a_family():
    """A change of 6 % in every metric with p of about 0.03: sure for the declared one, for each other one only taken alone."""
    a, b = analyze(build_run("single", seed=1)), analyze(build_run(seed=2))
    for run, trials in ((a, (1.0, 1.0, 1.0)), (b, (1.04, 1.06, 1.08))):
        for name in run.figures:
            run.figures[name] = figure(*trials)
    comparison = compare(a, b, primary="tbt_p50_ms")
    lines = {line.metric.name: (line.verdict, line.alone) for line in comparison.differences}
    assert comparison.primary == "tbt_p50_ms" and lines.pop("tbt_p50_ms") == ("worse", False)
    assert lines.pop("output_tokens_per_s") == ("better", True)
    assert lines["e2e_p50_ms"] == ("worse", True)


def test_primary_metric_is_goodput_with_an_slo_else_e2e_p50_and_stands_first():
    runs = build_run("single"), build_run()
    assert compare_runs(*runs).primary == compare_runs(*runs).differences[0].metric.name == "e2e_p50_ms"
    for run in runs:
        run.config["load"]["slo_ttft_ms"] = 1000.0
    assert compare_runs(*runs).primary == "goodput_requests_per_s"
    for run in runs:
        run.config["load"]["primary"] = "ttft_p50_ms"
    assert compare_runs(*runs).primary == "ttft_p50_ms"


def test_starts_decide_how_pairs_are_judged():
    def design(*starts):
        runs = [build_run("single"), build_run()]
        for run, numbers in zip(runs, starts, strict=True):
            for trial, start in zip(run.trials, numbers, strict=True):
                trial.start = start
        comparison = compare_runs(*runs)
        return comparison.starts, comparison.design

    assert design([0, 3, 4], [1, 2, 5]) == ("each", "pairs")
    assert design([0, 2, 2], [1, 1, 3]) == ("joined", "joined")
    assert design([0, 0, 0], [0, 0, 0]) == ("one", "pairs")
    assert design([None] * 3, [None] * 3) == ("unknown", "joined")


def test_interval_of_runs_measured_apart_is_welchs():
    a, b = np.array(a_and_b[0]), np.array(a_and_b[1][:3])
    ours = effect(a, b, "apart")
    theirs = stats.ttest_ind(b, a, equal_var=False)
    interval, bounds = ours.interval(), theirs.confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((bounds.low, bounds.high))
    assert ours.p == pytest.approx(theirs.pvalue)


def test_equal_trials_give_an_interval_of_no_width():
    for design in ("pairs", "joined", "apart"):
        line = judge(ENERGY, figure(5.0, 5.0, 5.0), figure(5.0, 5.0, 5.0), design)
        assert (line.ratio.low, line.ratio.high, line.verdict, line.trials_needed) == (1.0, 1.0, "same", 2)


def test_one_trial_is_not_judged():
    comparison = compare_runs(build_run(trials=1), build_run(trials=1, ttft_ms=70))
    assert {(line.verdict, line.unjudged) for line in comparison.differences} == {("unjudged", "one-trial")}
    ttft = line_of(comparison, "ttft_p50_ms")
    assert comparison.one_trial and ttft.leaning == "worse" and ttft.change > 1.5


def test_quantile_of_few_values_is_not_judged():
    ttft = line_of(compare_runs(build_run(seed=1), build_run(seed=2)), "ttft_p99_ms")
    assert (ttft.unjudged, ttft.values, ttft.metric.values_needed) == ("few-values", 48, 400)
    assert ttft.ratio is None and ttft.difference is None and ttft.change is not None


def test_figure_that_is_zero_in_a_trial_has_a_difference_but_no_ratio():
    line = judge(METRICS["goodput_requests_per_s"], figure(0.0, 1.0, 0.5), figure(5.0, 6.0, 5.5), "pairs")
    assert (line.verdict, line.unjudged, line.ratio) == ("unjudged", "zero", None)
    assert line.difference.value == pytest.approx(5.0)


@pytest.mark.parametrize("trials", [3, 1])
@pytest.mark.parametrize("undecided_in", [0, 1])
def test_goodput_that_is_a_lower_bound_is_not_judged(undecided_in, trials):
    """Two runs of the same instants; in one the last half of every 20th answer came as one chunk, of which nobody knows the gaps."""
    load = {"concurrency": 1, "requests": 80, "output_tokens": 64, "slo_tbt_p99_ms": 70.0}
    runs = [build_run(name, requests=80, trials=trials, gpu=False, load=load) for name in ("a", "b")]
    for record in runs[undecided_in].requests[::20]:
        record.token_s, record.counted_by = [*record.token_s[:32], record.token_s[-1]], "token_ids"
    compared = compare_runs(*runs)
    line = line_of(compared, compared.primary)
    assert line.metric.name == "goodput_requests_per_s" and abs(line.b / line.a - 1) > 0.04
    assert (line.verdict, line.unjudged, line.change, line.leaning) == ("unjudged", "slo-undecided", None, "unjudged")
    assert answer.verdict(line) == "not judged: a lower bound (slo-undecided)"
    assert "Goodput" in {group: names for group, _, names in answer.groups(compared)}["unjudged"]
    results = thresholds.evaluate(
        compared, [thresholds.parse(f"goodput_requests_per_s < -{limit}%") for limit in (2, 50)]
    )
    assert [result.outcome for result in results] == ["uncertain"] * 2 and thresholds.exit_code(results) == 3
    assert "slo-undecided" in answer.threshold(results[0])
    if trials > 1:
        assert line_of(compared, "output_tokens_per_s").verdict == "same"


def test_runs_with_nothing_in_common_compare_to_nothing():
    empty = build_run(trials=0)
    assert compare_runs(empty, empty).differences == []


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
        compare_runs(a, b)
    assert any(item.what == named and item.refused for item in compare_runs(a, b, anyway=True).mismatches)


def test_hosts_of_one_name_with_other_gpus_are_refused() -> None:
    a, b = build_run("single"), build_run()
    for run, letters in ((a, "ab"), (b, "cd")):
        for gpu, letter in zip(run.host["gpus"], letters, strict=True):
            gpu["uuid"] = f"GPU-{letter}"
    with pytest.raises(UserError, match=r"GPUs of the host: GPU-a, GPU-b against GPU-c, GPU-d.*--anyway"):
        compare_runs(a, b)
    b.host["gpus"][0]["uuid"] = "GPU-b"  # a host that shows a part of its GPUs
    assert compare_runs(a, b).mismatches == []


def test_other_slo_is_noted_and_leaves_out_goodput_alone():
    a, b = build_run("single"), build_run()
    same = {line.metric.name for line in compare_runs(a, b).differences}
    b.config["load"]["slo_ttft_ms"] = 100.0
    compared = compare_runs(a, b)
    assert [(item.what, item.refused) for item in compared.mismatches] == [("load, slo_ttft_ms", False)]
    assert {line.metric.name for line in compared.differences} == same - {"goodput_requests_per_s"}


def test_option_that_a_run_does_not_know_equals_its_default():
    a, b = build_run("single"), build_run()
    b.config["load"] |= {"burstiness": 1.0, "save_prompts": False}
    assert compare_runs(a, b).mismatches == []


def test_other_settings_are_noted_but_compared():
    a, b = build_run("single", serve={"enforce_eager": True}), build_run(serve={"enforce_eager": False})
    assert [str(mismatch) for mismatch in compare_runs(a, b).mismatches] == ["enforce_eager: True against False"]


def test_other_gpus_of_one_host_are_noted_where_neither_ran_on_some_of_the_others():
    a, b = build_run("replicas"), build_run()
    for device in b.devices:
        device.id = device.id.replace("gpu0", "gpu2").replace("gpu1", "gpu3")
    (found,) = compare_runs(a, b).mismatches
    assert str(found) == "ran on: gpu0, gpu1 against gpu2, gpu3" and not found.refused
    assert compare_runs(build_run("single"), build_run()).mismatches == []


def test_other_lengths_caps_and_files_are_noted():
    a, b = build_run("single"), build_run(tokens=32, load={"concurrency": 1, "requests": 16, "output_tokens": 64})
    a.config["inputs"], b.config["inputs"] = ["trace t: 16 of 16 rows"], ["trace t: 16 of 99 rows"]
    b.config["power"]["decode_power_cap"] = 400
    for request in (*a.requests, *b.requests):
        request.prompt_tokens = 100
    assert {str(mismatch) for mismatch in compare_runs(a, b, anyway=True).mismatches if not mismatch.refused} == {
        "output tokens per request: 64 against 32",
        "power, decode_power_cap: none against 400",
        "input files: trace t: 16 of 16 rows against trace t: 16 of 99 rows",
    }


def test_other_contents_of_a_file_of_one_name_are_refused() -> None:
    load = {"concurrency": 1, "requests": 16, "output_tokens": 64, "prompt_file": "loads/chat.jsonl"}
    a, b = build_run("single", load=load), build_run(load=load)
    a.config["contents"] = {"prompt_file": "a1"}
    assert compare_runs(a, b).mismatches == []  # b was saved before contents were
    b.config["contents"] = {"prompt_file": "b2", "tokenizer": "c3"}
    with pytest.raises(UserError, match=r"load, contents of chat.jsonl.*--anyway"):
        compare_runs(a, b)
    (found,) = compare_runs(a, b, anyway=True).mismatches
    assert str(found) == "load, contents of chat.jsonl: a1 against b2" and found.refused
    with text.language("zh"):
        assert text.translate(str(found)) == "负载，chat.jsonl 的内容：a1 与 b2"
    b.config["load"]["prompt_file"] = "loads/other.jsonl"
    assert [each.what for each in compare_runs(a, b, anyway=True).mismatches] == ["load, prompt_file"]


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
def test_threshold_fails_passes_or_is_uncertain(slower_first_token_faster_tokens, text, outcome):
    (result,) = thresholds.evaluate(slower_first_token_faster_tokens, [thresholds.parse(text)])
    assert result.outcome == outcome
    assert (result.change is None) == (text == "ttft_p99_ms > +5%")


def test_exit_code_of_thresholds(slower_first_token_faster_tokens):
    def code(*texts):
        conditions = [thresholds.parse(text) for text in texts]
        return thresholds.exit_code(thresholds.evaluate(slower_first_token_faster_tokens, conditions))

    assert code("tbt_p99_ms > +5%") == 0
    assert code("ttft_p99_ms > +5%") == 3
    assert code("ttft_p99_ms > +5%", "ttft_p50_ms > +5%") == 1


@pytest.mark.parametrize("text", ["ttft_p50_ms", "ttft_p50_ms > 5%", "ttft_p50_ms >= +5%", "", "> +5%", "a > +x%"])
def test_malformed_condition_is_one_line_with_the_shape(text):
    with pytest.raises(UserError, match="write METRIC"):
        thresholds.parse(text)


def test_unknown_metric_names_those_that_exist(slower_first_token_faster_tokens):
    with pytest.raises(UserError, match="there are ttft_p50_ms"):
        thresholds.parse("latency > +5%")
    with pytest.raises(UserError, match=r"not measured in both runs; there are .*ttft_p50_ms"):
        thresholds.evaluate(slower_first_token_faster_tokens, [thresholds.parse("goodput_requests_per_s < -5%")])


def test_recommended_trials_find_five_percent():
    """Plans from pilots of three pairs reach 80 % power on average (docs/statistics.md)."""
    random, detected = np.random.default_rng(13), 0
    for _ in range(400):
        pilot = random.normal(0, 0.03, (2, 3))
        trials = effect(*pilot, "pairs").pairs_to_show(1.05) or 1000
        changes = random.normal(np.log(1.05), 0.03 * 2**0.5, trials)
        detected += effect(np.zeros(trials), changes, "pairs").interval().low > 0
    assert detected >= 320


def test_token_gaps_are_not_compared_between_runs_that_counted_differently():
    a, b = build_run("single", trials=2), build_run("replicas", trials=2)
    for run, way in ((a, "token_ids"), (b, "chunks")):
        for record in run.requests:
            record.counted_by = way
    compared = compare(analyze(a), analyze(b))
    assert not {line.metric.name for line in compared.differences} & {"tbt_p50_ms", "tbt_p90_ms", "tbt_p99_ms"}
    assert "ttft_p50_ms" in {line.metric.name for line in compared.differences}
    assert any(str(mismatch) == "tokens counted by: token_ids against chunks" for mismatch in compared.mismatches)
    with pytest.raises(UserError, match=r"not compared .*chunks"):
        thresholds.evaluate(compared, [thresholds.parse("tbt_p99_ms > +5%")])


def test_versions_of_a_server_given_by_its_url_are_not_compared() -> None:
    a, b = build_run("bench"), build_run("bench")
    a.config["serve"] = b.config["serve"] = None
    b.versions["vllm"] = "0.99.0"
    assert compare_runs(a, b).mismatches == []
    b.versions["pdbench"] = "9.9"
    assert [str(found) for found in compare_runs(a, b).mismatches] == ["pdbench version: 0.1.0 against 9.9"]


def test_version_that_a_run_does_not_hold_is_unknown() -> None:
    a, b = build_run("single"), build_run("single")
    del b.versions["vllm"]  # of an older pdbench
    assert [str(found) for found in compare_runs(a, b).mismatches] == ["vllm version: 0.26.0 against unknown"]
