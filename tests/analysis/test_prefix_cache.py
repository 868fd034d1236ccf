"""What came from prefix caches is a figure; more than the load shares on purpose is a flag; energy leaves it out."""

import pytest

from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import RunAnalysis, analyze
from pdbench.events import PrefixCacheCounts, ServerSeries
from pdbench.records import Run
from pdbench.report import tables, text
from tests.support.runs import build_run


def cached(run: Run, share: float, role: str = "single") -> Run:
    """Every trial's instance of this role counted its prompts, and this share of them as cached."""
    for trial in run.trials:
        prompts = sum(request.prompt_tokens for request in run.requests if request.trial == trial.index)
        trial.prefix_cache[f"{role}-0"] = PrefixCacheCounts(role, prompts, round(share * prompts))
    return run


def flagged(analysis: RunAnalysis) -> list[str]:
    return [flag.detail for flag in analysis.flags if flag.name == "prefix-cache-hit"]


def test_hits_that_the_load_did_not_ask_for_are_flagged_with_their_share() -> None:
    analysis = analyze(cached(build_run("single"), 0.9))
    assert analysis.summary.prefix_cache.cached_pct == pytest.approx(90, abs=0.1)
    assert analysis.summary.prefix_cache.source == "counters"
    (detail,) = flagged(analysis)
    assert detail.startswith("90 % of the prompt tokens came from a prefix cache, the load shares 0 %: measure with")
    assert ("prefix-cache-hit", detail) in text.warnings(analysis)
    first, *_ = tables.run_summary(analysis)
    assert [row[1] for row in first.rows if row[0] == "Prompt tokens from a prefix cache, %"] == [
        pytest.approx(90, abs=0.1)
    ]


def test_few_hits_and_hits_on_purpose_are_no_flag() -> None:
    assert not flagged(analyze(cached(build_run("single"), 0.009)))
    run = cached(build_run("single"), 0.5)
    for request in run.requests:
        request.shared_prompt_tokens = round(0.5 * request.prompt_tokens)
    assert not flagged(analyze(run))
    (detail,) = flagged(analyze(cached(run, 0.8)))
    assert detail.startswith("80 % of the prompt tokens came from a prefix cache, the load shares 50 %")


def test_what_decode_has_from_prefill_is_not_cached() -> None:
    run = cached(cached(build_run("disaggregated"), 1.0, "decode"), 0.0, "prefill")
    for request in run.requests:
        request.cached_prompt_tokens = request.prompt_tokens - 1
    analysis = analyze(run)
    assert analysis.summary.prefix_cache.cached_pct == 0 and not flagged(analysis)
    for trial in run.trials:
        trial.prefix_cache.clear()
    assert analyze(run).summary.prefix_cache is None


def test_usage_tells_where_a_server_has_no_counters() -> None:
    run = build_run("single")
    for request in run.requests:
        request.cached_prompt_tokens = request.prompt_tokens // 2
    cache = analyze(run).summary.prefix_cache
    assert cache.source == "usage" and cache.cached_pct == pytest.approx(50, abs=1)
    assert analyze(build_run("single")).summary.prefix_cache is None


def test_counters_of_some_instances_do_not_stand_for_all() -> None:
    run = cached(build_run("replicas"), 0.0, "replica")
    run.servers = [ServerSeries(server=f"replica-{n}", role="replica", t_s=[0.0]) for n in (0, 1)]
    assert analyze(run).summary.prefix_cache is None
    for request in run.requests:
        request.cached_prompt_tokens = request.prompt_tokens
    analysis = analyze(run)  # the one that did not tell had all its prompts cached
    assert analysis.summary.prefix_cache.source == "usage" and flagged(analysis)
    run.servers[1].role = "decode"
    assert analyze(run).summary.prefix_cache.source == "counters"


def test_template_that_all_chat_prompts_begin_with_is_no_flag() -> None:
    run = build_run("single", load={"endpoint": "chat"})
    for request in run.requests:
        request.cached_prompt_tokens = 16
    assert not flagged(analyze(run))


def test_energy_per_computed_prompt_token_leaves_cached_tokens_out() -> None:
    whole = analyze(build_run("disaggregated")).summary.energy.j_per_computed_prompt_token
    half = analyze(cached(build_run("disaggregated"), 0.5, "prefill")).summary.energy.j_per_computed_prompt_token
    assert half == pytest.approx(2 * whole, rel=0.01)


def test_compare_does_not_take_another_nonce_for_another_load() -> None:
    a, b = (analyze(build_run("single", load={"nonce": nonce})) for nonce in ("a", "b"))
    assert not compare(a, b).mismatches
