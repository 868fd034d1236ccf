"""Durations from instants, summaries from runs: the arithmetic by hand, and what is not measured stays None."""

import numpy as np
import pytest

from pdbench.analysis.metrics import mean_ttft_parts_ms, rising, spread, timings_of
from pdbench.analysis.run_analysis import analyze
from pdbench.events import ProxyEvent
from pdbench.records import Canary, Clock, RequestError, RequestRecord, Run, Trial
from tests.support.runs import build_run


def tiny_run(*requests: RequestRecord, **more) -> Run:
    return Run(name="single", clock=Clock(0.0, 0.0), config={}, host={}, versions={}, requests=list(requests), **more)


def request(number: int = 0, **fields) -> RequestRecord:
    defaults = {"planned_s": 0.9, "sent_s": 1.0, "token_s": [1.2, 1.25, 1.25, 1.4], "end_s": 1.5, "prompt_tokens": 7}
    return RequestRecord(id=f"r{number}", **(defaults | fields))


def summarize(run: Run):
    return analyze(run).summary


def test_durations_of_one_request():
    timings = timings_of(tiny_run(request()))
    assert timings.requests.ttft_ms == pytest.approx([200.0])
    assert timings.requests.e2e_ms == pytest.approx([500.0])
    assert timings.tbt_ms == pytest.approx([50.0, 0.0, 150.0])
    assert timings.requests.mean_tbt_ms == pytest.approx([200 / 3])
    assert timings.requests.send_delay_ms == pytest.approx([100.0])
    assert summarize(tiny_run(request())).tokens.merged_pct == pytest.approx(100 / 3)


def test_tbt_is_every_gap_and_mean_tbt_one_value_per_request():
    summary = summarize(tiny_run(request()))
    assert (summary.tbt_ms.count, summary.tbt_ms.p50, summary.tbt_ms.max) == (3, pytest.approx(50), pytest.approx(150))
    assert (summary.mean_tbt_ms.count, summary.mean_tbt_ms.p50) == (1, pytest.approx(200 / 3))


def test_gaps_never_cross_requests_and_failed_ones_have_none():
    late = request(1, sent_s=2.0, token_s=[2.5, 2.6], end_s=2.7)
    failed = request(2, sent_s=3.0, token_s=[3.1, 3.2], error=RequestError("reset", "gone"))
    timings = timings_of(tiny_run(request(), late, failed))
    assert timings.tbt_ms == pytest.approx([50.0, 0.0, 150.0, 100.0])
    assert list(timings.tbt_request) == [0, 0, 0, 1]
    assert list(timings.requests.ok) == [True, True, False]
    assert np.isnan(timings.requests.ttft_ms[2])


def test_chunks_of_an_answer_that_was_cut_stand_for_as_many_tokens_as_the_others():
    """One token each, tokens/s of a load of which half the answers fail were a third too low."""
    whole = request(0, output_tokens=16, counted_by="chunks")
    cut = request(1, output_tokens=None, counted_by="chunks", error=RequestError("truncated", "cut"))
    run = tiny_run(whole, cut, trials=[Trial(index=0, start_s=1.0, end_s=2.0)])
    assert summarize(run).throughput.output_tokens_per_s == pytest.approx(32)
    unknown = request(0, output_tokens=None, counted_by="chunks")
    run = tiny_run(unknown, cut, trials=run.trials)
    assert summarize(run).throughput.output_tokens_per_s is None
    assert summarize(tiny_run(cut, trials=run.trials)).throughput.output_tokens_per_s == pytest.approx(4)


def test_warm_up_is_left_out_and_order_is_of_sending():
    run = tiny_run(request(1, sent_s=5.0, token_s=[5.1], end_s=5.2), request(0), request(2, warmup=True))
    assert timings_of(run).requests.id == ["r0", "r1"]


def test_throughput_counts_what_arrived_inside_the_window():
    run = tiny_run(request(), trials=[Trial(index=0, start_s=1.0, end_s=1.3)])
    speed = summarize(run).throughput
    assert speed.output_tokens_per_s == pytest.approx(3 / 0.3, rel=1e-3)
    assert speed.requests_per_s == 0.0
    assert speed.output_tokens_per_s_per_device is None


def test_goodput_counts_a_failed_request_as_missing_the_slo():
    failed = request(1, error=RequestError("timeout", "late"))
    slow = request(2, sent_s=1.0, token_s=[1.9, 2.0], end_s=2.0)
    run = tiny_run(request(), failed, slow, trials=[Trial(index=0, start_s=1.0, end_s=3.0)])
    assert summarize(run).goodput.requests_per_s is None
    run.config = {"load": {"slo_ttft_ms": 300.0, "slo_tbt_ms": 100.0}}
    good = summarize(run).goodput
    assert (good.slo_ttft_ms, good.slo_tbt_ms) == (300.0, 100.0)
    assert good.requests_per_s == pytest.approx(0.5)
    assert good.met_pct == pytest.approx(100 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        ({}, 2),
        ({"output_tokens": 64, "max_output_tokens": 11}, 2),
        ({"output_distribution": "lognormal"}, 1),
        ({"trace": "azure.csv"}, 1),
        ({"max_tokens_field": "max_tokens", "drop_fields": ["max_tokens"]}, 1),
        ({"max_tokens_field": "max_tokens", "drop_fields": ["seed,max_tokens"]}, 1),
        ({"extra_body": '{"max_tokens": 500}'}, 1),
    ],
    ids=[
        "as many tokens as asked for",
        "as many as the cap leaves of them",
        "of many lengths",
        "of a trace",
        "without a limit",
        "without, in one word",
        "with a limit of its own",
    ],
)
def test_stream_that_was_cut_off_has_missed_its_mean_tbt_once_no_further_token_can_help(more, counted):
    stopped = RequestError("interrupted", "the load was stopped")
    slow = request(1, token_s=[1.2, 2.0], end_s=2.3, error=stopped)  # 1.1 s so far, for at most 10 gaps of 100 ms
    young = request(2, token_s=[1.2, 1.6], end_s=2.0, error=stopped)
    run = tiny_run(request(), slow, young, trials=[Trial(index=0, start_s=1.0, end_s=3.0)])
    run.config = {"load": {"slo_ttft_ms": 300.0, "slo_tbt_ms": 100.0, "output_tokens": 11} | more}
    timings = timings_of(run)
    assert timings.slo.counted.sum() == counted and timings.slo.in_slo.tolist() == [True, False, False]
    assert summarize(run).goodput.met_pct == pytest.approx(100 / counted)


@pytest.mark.parametrize("apart_s", [0.0, 50e-6], ids=["one piece", "one piece after the other"])
@pytest.mark.parametrize("choices", [1, 2])
def test_mean_tbt_leaves_out_what_came_together_with_the_first_token(apart_s, choices):
    """A gateway sends four events at a time: 16 of 20 tokens come after the first arrival, in 0.16 s."""
    token_s = [1.1 + 0.04 * (i // 4) + apart_s * (i % 4) for i in range(20)]
    record = request(
        token_s=sorted(token_s * choices),
        token_choice=[*range(choices)] * 20 if choices > 1 else [],
        output_tokens=20 * choices,
        counted_by="chunks",
    )
    assert timings_of(tiny_run(record)).requests.mean_tbt_ms == pytest.approx([10], rel=2e-3)


def test_mean_tbt_of_tokens_that_came_one_by_one_is_from_the_first_to_the_last():
    uneven = request(token_s=[1.1, 1.102, 1.13, 1.14], output_tokens=4, counted_by="token_ids")
    assert timings_of(tiny_run(uneven)).requests.mean_tbt_ms == pytest.approx([40 / 3])


@pytest.mark.parametrize(
    ("limit_ms", "good"),
    [(45.0, 20), (39.0, 19), (5.0, 0)],
    ids=["the gaps between chunks meet it", "missed", "missed by all"],
)
def test_one_answer_in_chunks_is_judged_by_its_gaps_between_chunks(limit_ms, good):
    """Four tokens per chunk, 40 ms apart, no ids: at most 3 of 4 gaps are 0, so that p90 and p99 are 40 ms."""
    coarse = request(99, token_s=[1.1 + 0.04 * i for i in range(10)], output_tokens=40, counted_by="chunks")
    plain = [request(i, token_s=[1.1 + 0.01 * j for j in range(10)], output_tokens=10) for i in range(19)]
    run = tiny_run(*plain, coarse, trials=[Trial(index=0, start_s=0.0, end_s=10.0)])
    for name in ("slo_tbt_p90_ms", "slo_tbt_p99_ms"):
        run.config = {"load": {name: limit_ms}}
        goodput = summarize(run).goodput
        assert goodput.requests_per_s == pytest.approx(good / 10) and goodput.met_pct == pytest.approx(5 * good)


def held_back(number: int) -> RequestRecord:
    """50 tokens 10 ms apart, then 200 in one chunk after 600 ms: p90 is 0 if they came at once, 11 ms or more of the gaps between arrivals."""
    token_s = [1.1 + 0.01 * i for i in range(50)]
    return request(number, token_s=[*token_s, token_s[-1] + 0.6], output_tokens=250, counted_by="token_ids")


@pytest.mark.parametrize(("few", "given"), [(1, True), (4, False)])
def test_answers_that_nobody_can_judge_leave_goodput_a_lower_bound_or_none(few, given):
    plain = [request(i, token_s=[1.1 + 0.01 * j for j in range(10)], output_tokens=10) for i in range(20)]
    run = tiny_run(*plain, *(held_back(20 + i) for i in range(few)), trials=[Trial(index=0, start_s=0.0, end_s=10.0)])
    run.config = {"load": {"slo_tbt_p99_ms": 20.0}}
    analysis = analyze(run)
    goodput = analysis.summary.goodput
    assert (goodput.requests_per_s, goodput.met_pct) == ((2.0, pytest.approx(100 * 20 / 21)) if given else (None, None))
    (flag,) = [flag for flag in analysis.flags if flag.name == "slo-undecided"]
    assert f"{few} of {20 + few} requests" in flag.detail
    run.config = {"load": {"slo_tbt_p90_ms": 20.0, "slo_ttft_ms": 1000.0}}
    assert summarize(run).goodput.met_pct == 100.0, "even its gaps between chunks meet it"


@pytest.mark.parametrize("requests", [0, 1])
def test_empty_and_one_request_runs_have_a_summary(requests):
    summary = summarize(tiny_run(*([request()] * requests)))
    assert summary.requests.sent == requests
    assert (summary.ttft_ms is None) == (requests == 0)
    assert (summary.energy.total_j, summary.energy.not_measured) == (None, "no device was sampled")


def test_a_run_where_everything_failed_names_the_kinds():
    failed = [
        request(i, token_s=[], end_s=1.1, error=RequestError(kind, ""))
        for i, kind in enumerate(("refused", "reset", "reset"))
    ]
    summary = summarize(tiny_run(*failed))
    assert summary.errors == {"reset": 2, "refused": 1}
    assert summary.ttft_ms is None


def test_a_stream_that_ends_without_a_token_is_no_success():
    assert summarize(tiny_run(request(token_s=[]))).errors == {"no_tokens": 1}


def test_spread_agrees_with_numpy():
    values = np.random.default_rng(0).lognormal(size=1001)
    values_spread = spread(rising(np.append(values, np.nan)))
    assert values_spread.count == 1001
    assert (values_spread.p50, values_spread.p90, values_spread.p99) == pytest.approx(
        np.percentile(values, (50, 90, 99))
    )
    assert (values_spread.mean, values_spread.min, values_spread.max) == pytest.approx(
        (values.mean(), values.min(), values.max())
    )
    assert spread(rising(np.array([np.nan]))) is None


def test_figures_have_the_pooled_value_and_that_of_each_trial():
    analysis = analyze(build_run(trials=3))
    figure, requests = analysis.figures["ttft_p90_ms"], analysis.requests
    assert figure.value == analysis.summary.ttft_ms.p90 and figure.count == 48
    for trial in range(3):
        values = requests.ttft_ms[requests.trial == trial]
        assert figure.trials[trial] == pytest.approx(np.percentile(values, 90))
    per_token = analysis.figures["j_per_output_token"]
    assert per_token.value == analysis.summary.energy.j_per_output_token
    assert min(per_token.trials.values()) <= per_token.value <= max(per_token.trials.values())


def test_ttft_parts_neither_overlap_nor_leave_a_rest_unnamed():
    phases = {
        "client": (1.0, 1.02),
        "prefill": (1.02, 1.16),
        "kv_transfer": (1.10, 1.15),
        "decode": (1.15, 1.4),
        "queue": None,
    }
    parts = mean_ttft_parts_ms(timings_of(tiny_run(request(phases=phases))))
    assert parts == pytest.approx({"prefill": 80, "kv_transfer": 50, "decode": 50, "other": 20}, abs=1e-6)
    several = tiny_run(request(phases=phases), request(1), request(2, phases={"decode": (1.1, 1.4)}))
    parts = mean_ttft_parts_ms(timings_of(several))
    assert parts == pytest.approx({"prefill": 40, "kv_transfer": 25, "decode": 75, "other": 60}, abs=1e-6)
    assert mean_ttft_parts_ms(timings_of(tiny_run(request()))) is None
    early = {"prefill": (1.02, 1.19), "kv_transfer": (1.21, 1.22), "decode": (1.22, 1.4)}
    parts = mean_ttft_parts_ms(timings_of(tiny_run(request(phases=early))))
    assert parts == pytest.approx({"prefill": 170, "other": 30}, abs=1e-6), "prefill's token was the first"


def test_ttft_parts_are_as_fine_as_each_requests_phases():
    coarse = {
        "send": (1.0, 1.01),
        "proxy": (1.01, 1.02),
        "prefill": (1.02, 1.16),
        "kv_transfer": (1.15, 1.16),
        "decode": (1.16, 1.4),
    }
    fine = coarse | {"api_server": (1.02, 1.04), "queue": (1.04, 1.1), "compute": (1.1, 1.15), "handoff": (1.15, 1.17)}
    fine |= {"decode_wait": (1.17, 1.175), "decode_step": (1.175, 1.19), "reply": (1.19, 1.2)}
    parts = mean_ttft_parts_ms(timings_of(tiny_run(request(phases=fine))))
    assert parts == pytest.approx(
        {"send": 10, "proxy": 10, "api_server": 20, "queue": 60, "compute": 50, "handoff": 20, "decode_wait": 5,
         "decode_step": 15, "reply": 10, "other": 0}, abs=1e-6
    )  # fmt: skip
    parts = mean_ttft_parts_ms(timings_of(tiny_run(request(phases=fine), request(1, phases=coarse))))
    halves = {"prefill": 65, "kv_transfer": 5, "decode": 20, "queue": 30, "compute": 25, "send": 10}
    assert {name: parts[name] for name in halves} == pytest.approx(halves, abs=1e-6)
    assert sum(parts.values()) == pytest.approx(200)


def test_nothing_after_prefill_is_part_of_ttft_where_prefills_token_was_the_first():
    phases = {"compute": (1.0, 1.15), "handoff": (1.15, 1.16), "decode_wait": (1.16, 1.17), "decode_step": (1.17, 1.3)}
    run = tiny_run(request(phases=phases | {"reply": (1.15, 1.2)}))
    run.events = [ProxyEvent(request_id=run.requests[0].id, prefill_sent_s=1.0, first_token_s=1.18)]
    assert mean_ttft_parts_ms(timings_of(run)) == pytest.approx({"compute": 150, "reply": 50, "other": 0}, abs=1e-6)


def test_energy_of_a_run_is_that_of_its_roles():
    summary = summarize(build_run(trials=2))
    assert summary.energy.total_j == pytest.approx(sum(role.total_j for role in summary.energy.roles.values()))
    assert summary.energy.mean_power_w == pytest.approx(summary.energy.total_j / summary.window_s)
    assert summary.energy.output_tokens_per_j * summary.energy.j_per_output_token == pytest.approx(1)


def test_ttft_and_first_gap_are_split_by_who_sent_the_first_token():
    run = tiny_run(request(0), request(1, token_s=[1.1, 1.11, 1.2]), request(2, token_s=[1.3]), request(3))
    ways = [("r0", None), ("r1", 1.1), ("r2", None)]
    run.events = [ProxyEvent(request_id=name, prefill_sent_s=1.0, first_token_s=first_s) for name, first_s in ways]
    analysis = analyze(run)
    assert analysis.requests.first_token == ["decode", "prefill", "decode", None]
    prefill, decode = (analysis.summary.first_token[name] for name in ("prefill", "decode"))
    assert (prefill.requests, prefill.ttft_ms.p50, prefill.first_gap_ms.p50) == (1, *map(pytest.approx, (100, 10)))
    assert (decode.requests, decode.ttft_ms.p50) == (2, pytest.approx(250))
    assert (decode.first_gap_ms.count, decode.first_gap_ms.p50) == (1, pytest.approx(50)), "one token has no gap"


def test_prefills_first_token_stays_its_own_where_decode_went_on_alone():
    """Decode and prefill failed after it: the proxy's event then says why another decode instance computed the prompt again."""
    run = tiny_run(request(0))
    run.events = [ProxyEvent(request_id="r0", first_token_s=1.1, decode_sent_s=1.2, decode_alone="prefill-failed")]
    assert analyze(run).requests.first_token == ["prefill"]


def test_run_without_prefill_does_not_split_its_first_tokens():
    run = tiny_run(request(0))
    run.events = [ProxyEvent(request_id="r0", decode_sent_s=1.0)]
    assert summarize(run).first_token == {}


def chunked(number: int = 0, tokens: int | None = 40, **fields) -> RequestRecord:
    """Ten chunks 40 ms apart of an answer that has `tokens` by the server's usage."""
    arrivals = [2.0 + 0.04 * index for index in range(10)]
    defaults = {"token_s": arrivals, "end_s": 2.4, "output_tokens": tokens, "counted_by": "chunks"}
    return request(number, **(defaults | fields))


def test_chunks_of_several_tokens_follow_usage_and_have_no_token_gaps():
    window = [Trial(index=0, start_s=1.0, end_s=2.5)]
    summary = summarize(tiny_run(chunked(), trials=window))
    assert summary.mean_tbt_ms.p50 == pytest.approx(360 / 39)
    assert summary.throughput.output_tokens_per_s == pytest.approx(40 / 1.5)
    assert summary.tbt_ms is None and summary.inter_chunk_ms.p50 == pytest.approx(40)
    assert summary.tokens.counted_by == ["chunks"]
    assert "tbt_p50_ms" not in analyze(tiny_run(chunked(), trials=window)).figures


def test_chunks_that_usage_confirms_have_token_gaps():
    summary = summarize(tiny_run(chunked(tokens=11)))
    assert summary.tbt_ms.p50 == pytest.approx(40) and summary.inter_chunk_ms is None
    few = [chunked(number, tokens=10) for number in range(200)]
    summary = summarize(tiny_run(*few, chunked(200)))
    assert summary.tbt_ms.count == 200 * 9 and summary.inter_chunk_ms.count == 9


def test_unknown_token_counts_leave_what_depends_on_them_unknown():
    window = [Trial(index=0, start_s=1.0, end_s=2.5)]
    run = tiny_run(chunked(tokens=None), chunked(1), trials=window)
    run.config = {"load": {"slo_tbt_ms": 30.0}}
    summary = summarize(run)
    assert summary.throughput.output_tokens_per_s is None and summary.tokens.output is None
    assert summary.throughput.requests_per_s is not None and summary.mean_tbt_ms.count == 1
    assert summary.goodput.requests_per_s is None
    run.config = {"load": {"slo_tbt_ms": 50.0}}
    assert summarize(run).goodput.met_pct == 100.0, "chunks are 40 ms apart, and a token at least"


def test_first_answer_token_and_choices_are_counted_apart():
    reasoning = request(token_s=[1.1, 1.2, 1.3], answer_index=2, counted_by="token_ids", output_tokens=3)
    silent = request(1, token_s=[1.1, 1.2], answer_index=None, counted_by="token_ids", output_tokens=2)
    two = request(2, token_s=[1.1, 1.1, 1.2, 1.2], token_choice=[0, 1, 0, 1], counted_by="token_ids", output_tokens=4)
    requests = timings_of(tiny_run(reasoning, silent, two)).requests
    assert requests.ttft_ms == pytest.approx([100, 100, 100])
    assert requests.ttfo_ms == pytest.approx([300, np.nan, 100], nan_ok=True)
    assert requests.mean_tbt_ms == pytest.approx([100, 100, 100])
    assert timings_of(tiny_run(two)).tbt_ms == pytest.approx([100, 100])
    late = request(token_s=[1.1, 1.15, 1.2, 1.3, 1.4], token_choice=[1, 1, 0, 0, 2], counted_by="token_ids")
    assert timings_of(tiny_run(late)).requests.first_gap_ms == pytest.approx([50]), "of the choice that came first"
    speculative = request(token_s=[1.1, 1.1, 1.1, 1.4], first_tokens=3, counted_by="token_ids", output_tokens=4)
    unsent = request(1, token_s=[1.1, 1.2], unsent_tokens=98, counted_by="chunks", output_tokens=100)
    assert timings_of(tiny_run(speculative, unsent)).requests.mean_tbt_ms == pytest.approx([300, 100])


def test_repeated_canary_that_missed_the_slo_has_missed_it() -> None:
    canary = Canary(number=0, repeated=True)
    late = [request(number, token_s=[1.5, 1.6], end_s=1.7, canary=canary) for number in range(4)]
    for limit in ({"slo_ttft_ms": 400.0}, {"slo_e2e_ms": 600.0}):
        run = tiny_run(*late, request(9))
        run.config["load"], run.trials = limit, [Trial(index=0, start_s=0.0, end_s=2.0)]
        summary = summarize(run)
        assert summary.goodput.met_pct == 20 and summary.goodput.requests_per_s == 0.5
        assert summary.ttft_ms.count == 1  # of others it says nothing: a cache may know its prompt


def test_batch_that_decodes_together_ends_after_its_window() -> None:
    run = tiny_run(request(), request(1))
    run.config["load"] = {"phase": "decode", "slo_ttft_ms": 1000.0}
    run.trials = [Trial(index=0, start_s=1.2, end_s=1.4)]
    summary = summarize(run)
    assert summary.throughput.requests_per_s is None and summary.goodput.requests_per_s is None
    assert summary.throughput.output_tokens_per_s == pytest.approx(8 / 0.2)
