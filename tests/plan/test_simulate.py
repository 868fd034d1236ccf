"""The simulator beside a step-by-step one: the same tokens at the same instants."""

import numpy as np
import pytest

from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Handoff, Layout, Limits
from pdbench.plan.simulate import simulate
from tests.plan.step_by_step import step_by_step

GRAPHS = {1: 0.0034, 2: 0.004, 4: 0.0038, 8: 0.0039, 16: 0.0041, 24: 0.0046, 32: 0.0048}


def engine(*, host_bound: bool = True, eager_s: float | None = None, **limits: object) -> Engine:
    fields: dict[str, object] = {"max_num_batched_tokens": 2048, "max_num_seqs": 64, "captured": 32}
    costs = Costs(
        host_decode_s=0.0036 if host_bound else 0.0005, host_prefill_s=0.05 if host_bound else 0.004, host_per_prompt_token_s=1e-7,
        gpu_decode_s=GRAPHS, gpu_per_sequence_s=0.00005, gpu_per_context_token_s=3e-8, gpu_prefill_s=0.002,
        gpu_per_prompt_token_s=1.1e-5, join_s=0.001, ingress_s=0.007, ingress_per_token_s=2e-6, before_gpu_s=0.003,
        alike_launch=0.7, noise=((1.0, 1.2), (0.9, 1.1)), gpu_noise=((1.1, 0.95, 1.0),), host_eager_s=eager_s,
    )  # fmt: skip
    return Engine(costs=costs, limits=Limits(**(fields | limits)))  # type: ignore[arg-type]


def demand(count: int, rate: float, seed: int = 0, prompt: int = 1000, output: int = 60) -> Demand:
    generator = np.random.default_rng(seed)

    def lengths(mean: float) -> np.ndarray:
        return np.maximum(1, generator.lognormal(np.log(mean), 0.8, count)).astype(np.int64)

    prompts = lengths(prompt)
    return Demand(
        t_s=np.cumsum(generator.exponential(1 / rate, count)), prompt_tokens=prompts, output_tokens=lengths(output),
        cached_tokens=(prompts * generator.choice([0.0, 0.5, 1.0], count)).astype(np.int64),
    )  # fmt: skip


def of_kind(kind: str, own: Engine, **handoff: float) -> Deployment:
    if kind == "3p2d":
        return Deployment(
            layout=Layout("disaggregated", {"prefill": 3, "decode": 2}), engines={"prefill": own, "decode": own},
            handoff=Handoff(per_token_s=2e-5, **handoff), proxy_s=0.001,
        )  # fmt: skip
    if kind == "single":
        return Deployment(layout=Layout("single", {"single": 1}), engines={"single": own})
    return Deployment(layout=Layout("replicas", {"replica": 3}), engines={"replica": own}, proxy_s=0.001)


def assert_equal(deployment: Deployment, load: Demand, monkeypatch: pytest.MonkeyPatch) -> int:
    tokens, engines = step_by_step(deployment, load, 5, monkeypatch)
    simulated = simulate(deployment, load, 5)
    first, last = (np.array([token_s[place] for token_s in tokens]) for place in (0, -1))
    np.testing.assert_allclose(simulated.ttft_s, first - load.t_s, rtol=0, atol=1e-7)
    np.testing.assert_allclose(simulated.e2e_s, last - load.t_s, rtol=0, atol=1e-7)
    assert [len(token_s) for token_s in tokens] == load.output_tokens.tolist()
    gaps = np.sort(np.concatenate([np.diff(token_s) for token_s in tokens]))
    order = np.argsort(simulated.gap_s)
    np.testing.assert_allclose(
        np.repeat(simulated.gap_s[order], simulated.gap_count[order]), gaps, rtol=0.05, atol=2e-4
    )
    preemptions = sum(slow.preemptions for slow in engines)
    assert sum(use.preemptions for use in simulated.instances) == preemptions
    return preemptions


@pytest.mark.parametrize("host_bound", [True, False], ids=["host", "gpu"])
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("kind", ["single", "replicas", "3p2d"])
def test_every_token_is_that_of_every_step(
    kind: str, async_scheduling: bool, host_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine(host_bound=host_bound, async_scheduling=async_scheduling)
    for rate in (3.0, 14.0):
        assert_equal(of_kind(kind, own), demand(120, rate), monkeypatch)


def test_short_prompt_sent_after_a_long_one_is_taken_in_after_it() -> None:
    """The API server tokenizes one after the other: 32 prompts at once, as a closed loop begins, stay in order."""
    costs = Costs(
        ingress_s=0.004,
        ingress_per_token_s=2e-6,
        host_prefill_s=1e-3,
        gpu_per_prompt_token_s=1e-5,
        gpu_decode_s={1: 0.003},
    )
    prompts = np.array([4000, 100] * 16)
    load = Demand(
        t_s=np.zeros(32),
        prompt_tokens=prompts,
        output_tokens=np.full(32, 2),
        cached_tokens=np.zeros(32, int),
        streams=32,
    )
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64)
    of = simulate(
        Deployment(layout=Layout("single", {"single": 1}), engines={"single": Engine(costs=costs, limits=limits)}), load
    )
    assert of.way_in_s == pytest.approx(0.004 + 2e-6 * np.cumsum(prompts))
    assert (np.diff(of.scheduled_s) >= 0).all()


@pytest.mark.parametrize("kind", ["replicas", "3p2d"])
def test_answers_of_a_queue_of_prompts_come_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is several steps behind the host, so a step's tokens are handed out when the next one is launched."""
    assert_equal(of_kind(kind, engine(host_bound=False)), demand(150, 100.0, output=3), monkeypatch)


@pytest.mark.parametrize("kind", ["single", "3p2d"])
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_full_kv_cache_preempts_the_same_sequences(
    kind: str, async_scheduling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 4):  # 4: one that only waits for its last token loses its blocks
        load = demand(150, 12.0, seed, prompt=300, output=120)
        most = int((load.prompt_tokens + load.output_tokens).max())
        own = engine(async_scheduling=async_scheduling, kv_cache_tokens=(most // 16 + 2) * 16)
        assert assert_equal(of_kind(kind, own), load, monkeypatch) > 10


@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 3}, {"max_num_batched_tokens": 64}, {"captured": 0}, {"captured": 4096}], ids=str
)
def test_limits_of_a_step_hold(limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(of_kind("single", engine(**limits)), demand(100, 6.0, prompt=300), monkeypatch)


@pytest.mark.parametrize("captured", [24, 1024], ids=["decode beyond graphs", "prompts beyond graphs"])
def test_steps_beyond_the_graphs_are_launched_kernel_by_kernel(captured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine(host_bound=False, eager_s=0.08, captured=captured)
    load = demand(100, 8.0)
    assert_equal(of_kind("single", own), load, monkeypatch)
    fast, slow = (simulate(of_kind("single", each), load, 5).ttft_s for each in (engine(host_bound=False), own))
    assert np.quantile(slow, 0.9) > np.quantile(fast, 0.9) + 0.05


def test_decode_steps_of_an_engine_without_graphs_take_what_they_took() -> None:
    """Its runs showed no others: a launch with a prompt, which is longer or hidden, is not theirs."""
    one, zero = np.ones(1, int), np.zeros(1)
    load = Demand(t_s=zero, prompt_tokens=100 * one, output_tokens=50 * one, cached_tokens=0 * one)
    tbt_s = simulate(of_kind("single", engine(host_bound=True, captured=0)), load).mean_tbt_s
    assert tbt_s == pytest.approx(0.0036, rel=0.3)


def test_a_long_series_of_the_gpu_s_noise_begins_anywhere() -> None:
    """Also beside a launch's short one: hardly any launch shows where prompts are long."""
    costs = Costs(gpu_prefill_s=0.1, noise=((1.0,) * 5,), gpu_noise=((2.0,) * 20 + (1.0,) * 380,))
    own = Engine(costs=costs, limits=Limits(max_num_batched_tokens=2048, max_num_seqs=64))
    load = Demand(
        t_s=np.zeros(1), prompt_tokens=np.full(1, 100), output_tokens=np.ones(1, int), cached_tokens=np.zeros(1, int)
    )
    ttft_s = np.concatenate([simulate(of_kind("single", own), load, seed).ttft_s for seed in range(20)])
    assert np.median(ttft_s) == pytest.approx(0.1)


@pytest.mark.parametrize("prefill_opens", [1.0, 0.5, 0.0])
def test_proxy_chooses_as_the_proxy_does(prefill_opens: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(of_kind("3p2d", engine(), prefill_opens=prefill_opens), demand(150, 20.0), monkeypatch)


def test_request_that_no_cache_can_hold_has_no_times() -> None:
    load = demand(20, 5.0, prompt=300)
    own = engine(kv_cache_tokens=480)
    simulated = simulate(of_kind("single", own), load)
    never = load.prompt_tokens + load.output_tokens - 1 > 480
    assert 0 < never.sum() < 20
    assert (np.isnan(simulated.e2e_s) == never).all()


def test_closed_loop_sends_when_a_stream_is_free() -> None:
    load = demand(40, 5.0, prompt=300)
    closed = Demand(
        t_s=np.zeros(40),
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        cached_tokens=load.cached_tokens,
        streams=4,
    )
    simulated = simulate(of_kind("3p2d", engine()), closed)
    ends_s = np.sort(simulated.sent_s + simulated.e2e_s)
    np.testing.assert_allclose(np.sort(simulated.sent_s)[4:], ends_s[:-4], atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "replicas", "3p2d"])
def test_tokens_and_time_add_up(kind: str) -> None:
    load = demand(200, 10.0)
    simulated = simulate(of_kind(kind, engine()), load)
    uses = simulated.instances
    assert int(simulated.gap_count.sum()) == load.output_tokens.sum() - len(load)
    assert (
        sum(use.prompt_tokens for use in uses)
        == (load.prompt_tokens - np.minimum(load.cached_tokens, load.prompt_tokens - 1)).sum()
    )
    span_s = (simulated.sent_s + simulated.e2e_s).max()
    for use in uses:
        assert 0 < use.prefill_s + use.decode_s < span_s
