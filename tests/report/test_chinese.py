"""What a run, a plan or a calibration was saved with, in Chinese: no English sentence stays."""

import ast
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

import pdbench
from pdbench.analysis.flags import cpu_steal
from pdbench.analysis.run_analysis import analyze
from pdbench.analysis.slo import Judged, undecided_flag
from pdbench.config import LoadConfig
from pdbench.load import plan
from pdbench.load.request_fields import refusal_flags
from pdbench.load.self_check import NOTES, REMEDY, REMEDY_OF_ONE
from pdbench.plan.calibration import _missing
from pdbench.plan.engine import Layout
from pdbench.plan.predict import _LARGER, PREEMPTED, larger_steps
from pdbench.plan.records import Prediction
from pdbench.report import plan as report
from pdbench.report import text
from tests.analysis.test_flags import a_run, arriving
from tests.analysis.test_windows import open_run
from tests.plan.test_predict import calibration, predicted, role
from tests.plan.test_remedy import overloaded, wide

PACKAGE = Path(pdbench.__file__).parent
ENGLISH = re.compile(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}")


def undecided(few: int) -> Judged:
    rows = np.arange(20)
    return Judged(in_slo=rows >= few, ratios={}, counted=rows >= 0, undecided=rows < few)


def english_in(chinese: str) -> list[str]:
    return ENGLISH.findall(re.sub("`.*?`", "", chinese))


@pytest.mark.parametrize("module", ["canaries.py", "load/request_fields.py", "power/tenants.py"])
def test_every_flag_of_a_module_is_translated(module):
    """Each f-string in a call of Flag, with a number for each of its values."""
    sentences = [
        "".join(part.value if isinstance(part, ast.Constant) else "7" for part in node.args[1].values)
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Flag"
        if isinstance(node.args[1], ast.JoinedStr)
    ]
    assert sentences
    with text.language("zh"):
        for sentence in sentences:
            # A value that is words itself: "x and y answer 7 of 7 prompts", "other processes hold 7".
            sentence = sentence.replace(
                "7 without any", "trial 7: x and y answer 7 of 7 prompts differently without any"
            )
            assert not english_in(text.translate(sentence.replace("gpu7: 7 7 before", "gpu7: others hold 7 before"))), (
                sentence
            )


def test_flags_of_the_client_and_of_streams_are_translated():
    at_once = "40 of 40 answers came at one instant: something before the client holds streams back, their TTFT is the time of the whole "
    stolen = a_run(1)
    stolen.trials[0].cpu_steal_pct = 9.0
    details = [
        *(flag.detail for flag in cpu_steal(stolen)),
        *(f"3 responses: {note}" for note in NOTES.values()),
        *(flag.detail for flag in analyze(open_run(32, 0, 4.0, 1.0)).flags),
        *(flag.detail for few in (1, 9) for flag in undecided_flag(undecided(few))),
        f"the client used 99% of its core (limit 90%): {REMEDY}",
        f"the client used 99% of its core (limit 90%): {REMEDY_OF_ONE}",
        *(flag.detail for tokens in (64, 2) for flag in analyze(arriving(tokens)).flags),
    ]
    assert any(detail.startswith(at_once) for detail in details) and any(
        "came with the one before" in d for d in details
    )
    with text.language("zh"):
        for detail in details:
            assert not english_in(text.translate(detail)), detail


def test_refused_fields_are_translated_however_many_they_are():
    names = ("ignore_eos", "max_tokens", "stream_options", "temperature")
    for fields in (*((name,) for name in names), names, names[:2], names[1:]):
        (flag,) = refusal_flags(fields)
        with text.language("zh"):
            chinese = text.translate(flag.detail)
        assert all(name in chinese for name in fields) and not english_in(chinese) and "be missing" not in chinese


def test_refused_predictions_say_why_in_chinese():
    draws = predicted(calibration())
    refusals = [
        predicted(calibration(drift=1.7)).refusal,
        predicted(calibration(handoff=None), "1p1d").refusal,
        predicted(calibration(roles={"decode": role()})).refusal,
        predicted(calibration(roles={"single": role(sure=1.0)}), input_tokens=4000).refusal,
        *(larger_steps({name: 0.5}) for name in _LARGER),
        PREEMPTED,
        *(
            overloaded(wide(sure=sure), "1p4d", rate=62, requests=600, output_tokens=32)[0].refusal
            for sure in (0.05, 1.0)
        ),
        *(
            overloaded(wide(sequences=16), layout, rate=60, requests=300, output_tokens=400)[0].refusal
            for layout in ("single", "4p1d")
        ),
    ]
    assert draws.refusal is None and all(refusals)
    with text.language("zh"):
        for refusal in refusals:
            of = Prediction(
                layout=Layout("single", {"single": 1}), load="12 requests/s, 1,000 requests", refusal=refusal
            )
            table = report.predictions([of], on_gpus=True, remedy="--rate 3")
            assert not english_in(table.note) and not english_in(table.title), table.note
            assert ", or " not in table.note


def test_calibration_says_in_chinese_what_is_assumed_and_what_is_missing():
    bare = msgspec.structs.replace(
        role(sure=9.0), speeds=[1.0], power=None, assumed=["--max-num-seqs 1024 (vLLM's default)", "asynchronous scheduling (vLLM's default)", "a server with a GPU", "5 ms from sending to scheduling (a single instance's run would show it)"]
    )  # fmt: skip
    found = calibration(
        roles={"single": bare, "decode": bare}, missing=_missing({"single": bare}, None, "pdbench calibrate")
    )
    with text.language("zh"):
        note = report.calibration(found).note
    assert not english_in(note) and note.count("缺少") == len(found.missing) >= 5


@pytest.mark.parametrize(
    ("load", "english", "chinese"),
    [
        (
            {"rate": 12.0, "requests": 1000, "input_tokens": 2048},
            "12 requests/s, Poisson arrivals, 1,000 requests, 2,048 tokens in, 64 tokens out",
            "每秒 12 个请求，泊松到达，1,000 个请求，输入 2,048 token，输出 64 token",
        ),
        (
            {"concurrency": 4, "requests": 20, "phase": "prefill", "input_tokens": 500, "shared_prefix": 0.5},
            "4 at a time, 20 requests, 500 tokens in, 1 token out, 50 % of each prompt shared",
            "同时 4 个，20 个请求，输入 500 token，输出 1 token，每个提示词的 50 % 共享",
        ),
        (
            {
                "rate": 2.0,
                "ramp_to": 4.0,
                "duration_s": 30.0,
                "input_tokens": 300,
                "input_distribution": "lognormal",
                "max_input_tokens": 2000,
            },
            "2 to 4 requests/s over 60 s, Poisson arrivals, for 30 s, 300 tokens in (lognormal with spread 0.5), at most 2,000 tokens in, 64 tokens out",
            "在 60 秒内由每秒 2 增至 4 个请求，泊松到达，持续 30 秒，输入 300 token（对数正态，离散度 0.5），输入至多 2,000 token，输出 64 token",
        ),
        (
            {
                "rate": 3.0,
                "arrival": "gamma",
                "burstiness": 0.2,
                "requests": 9,
                "input_tokens": 300,
                "output_distribution": "uniform",
                "shared_prefix": 0.25,
                "prefix_groups": 4,
            },
            "3 requests/s, gamma arrivals of burstiness 0.2, 9 requests, 300 tokens in, 64 tokens out (uniform with spread 0.5), 25 % of each prompt shared in 4 groups",
            "每秒 3 个请求，突发度为 0.2 的 gamma 到达，9 个请求，输入 300 token，输出 64 token（均匀，离散度 0.5），每个提示词的 25 % 在 4 组内各自共享",
        ),
    ],
)
def test_predicted_load_is_said_in_both_languages(load, english, chinese):
    words = plan.describe(LoadConfig(**load, nonce="n")).partition(", after a warm-up")[0]
    assert words == english
    of = Prediction(
        layout=Layout("single", {"single": 1}),
        load=f"{words}, SLO TTFT 200 ms, SLO mean TBT 8 ms",
        refusal="no run shows a x engine",
    )
    with text.language("zh"):
        assert (
            report.predictions([of], on_gpus=True).title == f"预测：{chinese}，SLO：TTFT 200 毫秒，SLO：平均 TBT 8 毫秒"
        )
