"""Verdicts as sentences, numbers, translation."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as draw

from pdbench.analysis.compare import compare, comparisons, judge
from pdbench.analysis.metrics import METRICS
from pdbench.analysis.run_analysis import Figure, analyze
from pdbench.analysis.thresholds import evaluate, parse
from pdbench.records import Flag
from pdbench.report import answer, text
from tests.support.runs import build_run

ENERGY = METRICS["j_per_output_token"]


def line_of(a, b, name):
    return next(line for line in compare(analyze(a), analyze(b)).differences if line.metric.name == name)


def figure(*trials):
    return Figure(value=float(np.mean(trials)), trials=dict(enumerate(trials)))


def test_numbers_have_three_significant_digits_also_below_one():
    values = (0.0134, 0.0999999, 0.999999, 1.0, 12.345, 123.4, 12345.6, 0.0005, 4.56e-5, 0, 0.0, None, np.nan)
    written = ["0.0134", "0.100", "1.00", "1.00", "12.3", "123", "12,346", "0.000500", "4.56e-05", "0", "0", "–", "–"]
    assert [text.number(value) for value in values] == written


def test_warning_that_devices_share_is_said_once_in_both_languages():
    run = build_run("single")
    short = "a window of 28.9 s is short for energy, needs at least 30 s: raise --requests or --duration-s, or send a longer trace"
    log = '"Triton kernel JIT compilation during inference: fused_moe_kernel" in its log, first seen 2.5 s into trial 1'
    compiled = f"{log}: a kernel was compiled while requests waited: raise --warmup, so that it meets these shapes"
    details = {"short-window": [f"gpu{gpu}: {short}" for gpu in (0, 1)], "clock": ["a", "gpu0: b", "gpu1: b"]}
    details["throttled"] = ["gpu0: sw_power_cap in 12 %", "gpu1: sw_power_cap in 12 %", "gpu2: sw_power_cap in 9 %"]
    details["server-compiled"] = [f"replica-{number}: {compiled}" for number in (0, 1)]
    run.flags = [Flag(name, detail) for name, of in details.items() for detail in of]
    analysis = analyze(run)
    warnings = dict(text.warnings(analysis))
    assert warnings["short-window"] == f"gpu0, gpu1: {short}"
    assert warnings["throttled"] == "gpu0, gpu1: sw_power_cap in 12 %; gpu2: sw_power_cap in 9 %"
    assert warnings["clock"] == "a; gpu0, gpu1: b"
    assert warnings["server-compiled"] == f"replica-0, replica-1: {compiled}"
    with text.language("zh"):
        warnings = dict(text.warnings(analysis))
    assert warnings["short-window"].startswith("gpu0, gpu1：28.9 秒")
    assert warnings["server-compiled"].startswith("replica-0, replica-1：")


def test_verdict_says_how_much_and_how_sure():
    a, b = build_run("single", ttft_ms=20, tbt_ms=3.3, seed=1), build_run(ttft_ms=35, tbt_ms=1.5, seed=2)
    tbt = line_of(a, b, "tbt_p50_ms")
    assert re.fullmatch(r"better: 2\.\d\d x lower \(2\.\d\d–2\.\d\d\)", answer.verdict(tbt))
    assert answer.values(tbt).endswith(" ms")
    with text.language("zh"):
        assert re.fullmatch(r"更好: 降至 1/2\.\d\d \(1/2\.\d\d–1/2\.\d\d\)", answer.verdict(tbt))


def test_unclear_verdict_names_the_trials_that_would_show_a_difference():
    ttft = line_of(build_run(ttft_ms=30, spread=0.4, seed=1), build_run(ttft_ms=30, spread=0.4, seed=2), "ttft_p50_ms")
    words = answer.judgement(ttft)
    assert words.startswith("not decided (")
    assert words.endswith(f": {ttft.trials_for_change} trials would decide it, {ttft.trials_needed} one of 5 %")


def test_interval_that_says_nothing_is_not_printed():
    line = judge(ENERGY, figure(1.0, 30.0), figure(1.5, 1.0), True)
    assert answer.judgement(line) == "2 trials cannot show a difference"


def test_few_values_are_named():
    assert "not judged: 48 values, needs 400" in answer.judgement(
        line_of(build_run(seed=1), build_run(seed=2), "ttft_p99_ms")
    )


def test_condition_without_interval_says_why():
    compared = compare(*(analyze(build_run(name, trials=1, seed=len(name))) for name in ("single", "disaggregated")))
    (result,) = evaluate(compared, [parse("ttft_p50_ms > +5%")])
    assert re.fullmatch(
        r"ttft_p50_ms > \+5%: TTFT p50: [+−][\d.]+ %, one trial: no interval \(.* ms\)", answer.threshold(result)
    )


def shown_bounds(words):
    """The interval as a reader sees it: (low, high, the value that stands for no change)."""
    inside = words[words.index("(") + 1 : words.rindex(")")].replace("−", "-").replace(",", "").replace("1/", "")
    low, high = map(float, re.findall(r"[+-]?\d[\d.]*(?:e-\d+)?", inside))
    return low, high, 0.0 if "%" in inside else 1.0


@given(
    draw.floats(0.2, 5.0),
    draw.floats(3e-4, 0.2),
    draw.integers(0, 99),
    draw.booleans(),
    draw.sampled_from(["en", "zh"]),
)
def test_words_and_the_interval_beside_them_agree(change, sd, seed, paired, language):
    logs = np.random.default_rng(seed).normal(0, sd, (2, 3))
    a, b = (figure(*(factor * np.exp(side))) for factor, side in ((8.8, logs[0]), (8.8 * change, logs[1])))
    line = judge(ENERGY, a, b, paired)
    with text.language(language):
        words = answer.judgement(line)
    low, high, none = shown_bounds(words)
    assert (line.verdict in ("better", "worse")) == (not min(low, high) <= none <= max(low, high))
    assert line.verdict != "same" or (low >= -5 and high <= 5)


@pytest.mark.parametrize("paired", [True, False])
def test_ratio_decides_where_ratio_and_difference_disagree(paired):
    line = judge(ENERGY, figure(8.8, 8.84), figure(16.9, 18.2), paired)
    assert answer.verdict(line).startswith("worse: 1.99 x higher (1.")
    assert answer.values(line) == "8.82 → 17.5 J"


def test_texts_that_a_run_was_saved_with_are_translated():
    with text.language("zh"):
        assert text.translate("gpu0: sw_power_cap in 12 % of the samples") == "gpu0：12 % 的采样为 sw_power_cap"
        assert text.translate("4 of 4 greedy outputs equal; 3 of 3 prompt tokens came to decode as external KV") == (
            "4 个贪心输出中 4 个相同；3 个提示 token 中 3 个作为外部 KV 到达解码"
        )
        assert text.translate("load, concurrency: 1 against 4") == "负载，concurrency：1 与 4"
        assert text.translate("no meter on this machine; something new") == "本机没有功率计；something new"
    assert text.translate("no meter on this machine") == "no meter on this machine"


def test_every_text_of_the_package_has_a_translation():
    texts = json.loads(Path(text.__file__).with_name("zh.json").read_text(encoding="utf-8"))["texts"]
    for path in Path(text.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts_of_code = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        docstrings = {
            node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        templates = {each for each in texts_of_code - docstrings if re.search(r"{\d}", each) and each != "{0}"}
        assert templates <= texts.keys(), path


def test_every_translation_takes_the_same_values():
    entries = json.loads(Path(text.__file__).with_name("zh.json").read_text(encoding="utf-8"))
    for english, chinese in [*entries["texts"].items(), *entries["saved"].items()]:
        assert chinese and set(re.findall(r"{\d}", english)) >= set(re.findall(r"{\d}", chinese)), english


@pytest.mark.parametrize("flag", ["gate-failed", "server-died", "requests-failed"])
def test_answer_begins_with_whose_figures_do_not_count(flag):
    """It began with what was better, by how much."""
    run = build_run("b", ttft_ms=10, failed=3 * (flag == "requests-failed"))
    run.flags += [Flag(flag, "x")] * (flag != "requests-failed")
    runs = {"a": analyze(build_run("a")), "b": analyze(run)}
    comparison = compare(*runs.values())
    for words in (answer.headline(comparison, runs), answer.confidence(comparison)):
        assert "THE FIGURES OF b DO NOT COUNT" in words.split(": ")[0]
    assert not compare(runs["a"], analyze(build_run("c", flags=[Flag("throttled", "x")]))).void


def test_answer_says_that_the_declared_metric_was_not_measured():
    """E2E p50 had stood in its place without a word."""
    runs = {name: build_run(name, gpu=False, load={"primary": "j_per_output_token"}) for name in ("a", "b")}
    runs = {name: analyze(run) for name, run in runs.items()}
    comparison = compare(*runs.values())
    assert comparison.primary == "e2e_p50_ms"
    assert "j_per_output_token, the --primary of the runs, is not measured in both" in answer.headline(comparison, runs)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_headline_of_runs_on_one_gpu_each_says_so(lang):
    runs = {name: analyze(build_run("single", seed=seed)) for seed, name in enumerate(("a", "b"))}
    with text.language(lang):
        line = answer.headline(compare(*runs.values(), names=("a", "b")), runs)
    assert ("b against a, 1 GPU each" if lang == "en" else "各用 1 个 GPU") in line


def test_headline_of_runs_without_power_counts_their_gpus() -> None:
    runs = {name: build_run(name) for name in ("single", "disaggregated")}
    for (name, run), gpus in zip(runs.items(), (1, 2), strict=True):
        run.config["gpus"], run.devices = gpus, []
        assert text.machines({name: analyze(run)}).startswith(f"synthetic · {gpus} x Synthetic H200 · ")
    analyses = {name: analyze(run) for name, run in runs.items()}
    (compared,) = comparisons(analyses)
    assert "Scaling, not a verdict: disaggregated against single (2 GPUs against 1): " in answer.headline(
        compared, analyses
    )
    assert "output_tokens_per_s_per_device" in analyses["single"].figures


def test_headline_does_not_count_gpus_that_are_not_known() -> None:
    server = build_run("bench")
    server.config["serve"], server.devices = None, []
    analyses = {"single": analyze(build_run("single")), "bench": analyze(server)}
    assert "(? GPUs against 1)" in answer.headline(*comparisons(analyses), analyses)
    both = {"a": analyses["bench"], "b": analyses["bench"]}
    assert "b against a, on hardware that is not known" in answer.headline(*comparisons(both), both)


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("load.rate", "rate, requests/s"),
        ("load.concurrency", "concurrency, requests"),
        ("power.prefill_clock", "prefill clock, MHz"),
        ("load.input_tokens", "input tokens"),
        ("load.drain_rate_of", "drain rate of"),
    ],
)
def test_axis_of_an_option_has_its_unit(key: str, label: str) -> None:
    assert text.option_label(key) == label


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/loads/rate-4.jsonl", "b/rate-12.csv.gz"], ["rate-4", "rate-12"]),
        (["a/rate-0.5.jsonl", "a/rate-1.5.jsonl"], ["rate-0.5", "rate-1.5"]),
        (["a/rate-0.5", "a/rate-1.5"], ["rate-0.5", "rate-1.5"]),
        (["a/x.csv", "a/x.jsonl"], ["x.csv", "x.jsonl"]),
        (["/r/a/x.csv", "/r/b/x.csv"], ["a/x", "b/x"]),
        (["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"], ["Qwen2.5-0.5B", "Qwen2.5-1.5B"]),
        (["a/x", "./a/x"], ["a/x", "./a/x"]),
        (["/.jsonl"], [".jsonl"]),
        ([], []),
    ],
)
def test_files_are_called_by_the_shortest_names_that_tell_them_apart(paths: list[str], names: list[str]) -> None:
    assert text.file_names(paths) == dict(zip(paths, names, strict=True))
