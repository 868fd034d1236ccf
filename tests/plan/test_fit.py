"""Steps rebuilt from arrivals, and costs found again that were put in."""

import numpy as np
import pytest

from pdbench.config.serving import last_value
from pdbench.plan import fit, way_in
from pdbench.plan.engine import COSTS, SHORT_PROMPT, Costs, Demand, Deployment, Engine, Layout, Limits
from pdbench.plan.prefill import prefill_alone
from pdbench.plan.simulate import simulate, weighted_quantiles
from pdbench.plan.steps import Steps, Stream, Visits, rebuild

HOST, HOST_TOKEN, GPU, GPU_TOKEN, HOST_DECODE = 0.012, 2e-6, 0.001, 8e-6, 0.002
SIZES = (1, 2, 4, 8, 16)
TABLE = {1: 0.0034, 2: 0.0039, 4: 0.0038, 8: 0.0040, 16: 0.0046}
CONTEXT = 2e-8
LIMITS = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=16)


def engine_run(
    seed: int, requests: int = 150, noise: float = 0.02, before: float = 0.0, alike: float = 1.0
) -> tuple[list[Stream], dict[str, int], list[float]]:
    """Streams of an engine that runs by the module's recursion, a prompt at a time; each request's true first step, and when it could be scheduled."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(0.1, requests))
    prompts = random.integers(200, 3500, requests)
    outputs = random.integers(40, 120, requests)
    now, done, step, waiting = 0.0, 0.0, 0, 0
    running: dict[int, int] = {}
    owed: list[tuple[int, list[int]]] = []
    token_s: dict[int, list[float]] = {index: [] for index in range(requests)}
    first_step: dict[str, int] = {}

    def hand_out(at_s: float) -> None:
        for _, members in owed:
            for member in members:
                token_s[member].append(at_s + random.uniform(0, 1e-4))
        owed.clear()

    while waiting < requests or running:
        if not running and arrivals[waiting] > now:
            hand_out(done)
            now = max(arrivals[waiting], done)
        new = waiting if waiting < requests and arrivals[waiting] <= now else None
        waiting += new is not None
        n, context = len(running), sum(prompts[i] + made for i, made in running.items())
        p = 0 if new is None else int(prompts[new])
        decode = (TABLE[next(size for size in SIZES if size >= n)] + CONTEXT * context) if n else 0.0
        factor = np.exp(random.normal(0, noise))
        launch = HOST * alike if not n or p <= SHORT_PROMPT else HOST
        host = factor * (launch + HOST_TOKEN * p) if p else HOST_DECODE
        finished = max(done, now + (before if p else 0.0)) + decode + (GPU + GPU_TOKEN * p if p else 0.0)
        next_s = max(now + host, done)
        hand_out(next_s)
        done = max(finished, now + host)
        members = [*running, *([new] if new is not None else [])]
        for member in members:
            running[member] = running.get(member, 0) + 1
            first_step.setdefault(str(member), step)
            if running[member] == outputs[member]:
                del running[member]
        owed.append((step, members))
        now, step = next_s, step + 1
    hand_out(done)
    streams = [Stream(str(i), token_s[i], int(prompts[i]), int(prompts[i])) for i in range(requests)]
    return streams, first_step, arrivals.tolist()


@pytest.fixture(scope="module")
def steps() -> list[Steps]:
    return [rebuild(engine_run(seed)[0]) for seed in (1, 2)]


def values_of(prefill: fit.Prefill) -> list[float]:
    return [getattr(prefill.costs, name) for name in COSTS]


def spread_of(prefill: fit.Prefill) -> float:
    return float(np.std(np.log(prefill.samples[:, COSTS.index("gpu_per_prompt_token_s")])))


def test_steps_are_those_of_the_engine() -> None:
    streams, first_step, _ = engine_run(3)
    rebuilt = rebuild(streams)
    order = sorted(first_step, key=first_step.__getitem__)
    assert rebuilt.first_step == {name: first_step[name] for name in order}


def test_decode_costs_are_found_again(steps: list[Steps]) -> None:
    decode = fit.decode_costs(steps, SIZES)
    for size in (2, 4, 8):
        assert decode.costs.gpu_decode_s[size] == pytest.approx(TABLE[size], rel=0.05)
    assert decode.costs.gpu_per_context_token_s == pytest.approx(CONTEXT, rel=0.3)


def test_rare_pauses_count_in_the_mean_step_and_in_the_tail() -> None:
    handed_s = np.cumsum(np.where(np.arange(4000) % 67 == 50, 0.034, 0.004))  # 1.5 % of the steps
    stream = Stream("one", handed_s.tolist(), 1, 1)
    plain, paused = (
        fit.decode_costs([rebuild([each])], SIZES) for each in (Stream("one", np.arange(1, 4001) * 0.004, 1, 1), stream)
    )
    assert paused.costs.gpu_decode_s[1] - plain.costs.gpu_decode_s[1] == pytest.approx(0.03 / 67, rel=0.1)
    step_s, shares = np.array([paused.costs.gpu_decode_s[1]]), (0.5, 0.98, 0.99)
    quantiles_s = weighted_quantiles(step_s, np.array([1000]), shares, paused.jitter)
    assert quantiles_s == pytest.approx([0.004, 0.004, 0.034], rel=0.02)


def test_gaps_are_jittered_by_shares_of_a_decode_step() -> None:
    values, counts, jitter = np.array([0.004, 0.006, 0.08]), np.array([700, 250, 50]), [-0.1, -0.05, 0.0, 0.1, 2.0]
    every = np.array([value + part * min(value, 0.01) for value in np.repeat(values, counts) for part in jitter])
    shares = (0.02, 0.3, 0.5, 0.9, 0.94, 0.97, 1.0)
    expected = [float(np.quantile(every, share, method="inverted_cdf")) for share in shares]
    assert weighted_quantiles(values, counts, shares, jitter, 0.01) == pytest.approx(expected, abs=1e-6)


def test_pauses_are_as_many_times_longer_as_steps_are() -> None:
    paused = []
    for step_s in (0.004, 0.012):
        took_s = np.where(np.arange(4000) % 67 == 50, 4 * step_s, step_s)
        paused.append(fit.decode_costs([rebuild([Stream("one", np.cumsum(took_s).tolist(), 1, 1)])], SIZES))
    assert paused[1].jitter == pytest.approx(paused[0].jitter, abs=1e-3)


def test_noise_of_a_prompt_is_that_of_the_longer_step() -> None:
    """Launched by the host in its own step, or computed by the GPU while the next one waits."""
    decode_s, tokens = np.full((60, 3), 0.005), np.array([[0, 2000, 0]] * 60)
    engine = Engine(
        costs=Costs(gpu_decode_s={1: 0.005}), limits=Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=8192)
    )
    factors = np.exp(np.random.default_rng(0).normal(0, 0.1, 60))
    for host_s, gpu_s in ((0.08, 0.01), (0.006, 0.05), (0.03, 0.05)):
        took_s = np.full((60, 3), 0.005)
        took_s[:, 1] = np.maximum(host_s * (factors if host_s > gpu_s else 1.0), 0.005)
        took_s[:, 2] = np.maximum(0.005, 0.005 + gpu_s * factors - took_s[:, 1] + 0.005)
        found = fit.prefill_costs(
            fit.Chains(took_s, tokens, tokens > 8192, tokens < 0, decode_s, np.zeros(60, dtype=int)), engine
        )
        spread = float(np.std(np.log(found.costs.noise[0])))
        assert len(found.costs.noise[0]) == 60 and 0.06 < spread < 0.14, (host_s, spread)


def test_steps_that_wait_for_the_gpu_tell_its_noise_without_asynchronous_scheduling() -> None:
    """The launch takes longer than the prompt is computed, but not than the prompt and the running streams are."""
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=8192, async_scheduling=False)
    costs = Costs(host_decode_s=0.001, host_prefill_s=0.05, gpu_prefill_s=0.04)
    factors, decode_s, tokens = np.array([0.9, 1.0, 1.1, 1.2]), np.full((4, 2), 0.02), np.array([[0, 1000]] * 4)
    took_s = np.stack([np.full(4, 0.02), 0.02 + 0.04 * factors], axis=1)
    decode_s[3, 1] = 0.005  # hardly anybody runs: the launch of the last one shows
    took_s[3, 1] = 0.05 * factors[3]
    observed = fit.Chains(took_s, tokens, tokens > 8192, tokens < 0, decode_s, np.zeros(4, int))
    found, measured, of_gpu = fit.prompt_factors(observed, costs, limits)
    assert found[measured] == pytest.approx(factors)
    assert of_gpu[:, 1].tolist() == [True, True, True, False]


def test_launch_that_decode_hides_is_no_longer_than_decode_s_on_an_engine_without_graphs() -> None:
    """Beside running streams only the GPU's time shows, and a prompt alone takes that."""
    limits = Limits(max_num_batched_tokens=2048, max_num_seqs=8, async_scheduling=False)
    tokens, decode_s = np.array([[0, 100], [0, 200]] * 40), np.full((80, 2), 0.03)
    took_s = decode_s + 4e-4 * tokens * np.exp(np.random.default_rng(0).normal(0, 0.03, tokens.shape))
    observed = fit.Chains(took_s, tokens, tokens > 0, tokens <= 512, decode_s, np.zeros(80, int))
    found = fit.prefill_costs(observed, Engine(costs=Costs(gpu_decode_s={1: 0.03}), limits=limits)).costs
    assert found.prompt_step_s(np.array([100, 200]), 0) == pytest.approx([0.04, 0.08], rel=0.1)


def test_speeds_of_trials_are_those_of_the_gpu_where_it_takes_longest() -> None:
    """As `at_speed` changes both parts. What is left is noise around 1."""
    random = np.random.default_rng(0)
    trial = np.repeat([0, 1, 2], 80)
    prompt = np.tile(0, (240, 4))
    prompt[:, 1] = random.integers(2500, 6000, 240)
    slower = np.array([0.85, 1.0, 1.18])[trial] * np.exp(random.normal(0, 0.01, 240))
    launch_s, gpu_s = slower * 0.018, slower * (0.002 + 1.1e-5 * prompt[:, 1])
    took_s = np.full((240, 4), 0.004)
    took_s[:, 1] = launch_s
    took_s[:, 2] = np.maximum(0.002, np.maximum(0.006 * slower, 0.004) + 0.004 + gpu_s - launch_s)
    observed = fit.Chains(took_s, prompt, prompt > 8192, prompt < 0, np.full(took_s.shape, 0.004), trial)
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=8192)
    found = fit.prefill_costs(observed, Engine(costs=Costs(gpu_decode_s={1: 0.004}), limits=limits))
    assert found.speeds == pytest.approx([0.85, 1.0, 1.18], rel=0.01)
    for of_trial in (*found.costs.noise, *found.costs.gpu_noise):
        assert np.median(of_trial) == pytest.approx(1.0, abs=0.04)


def test_host_launches_no_decode_step_slower_than_the_fastest_one_took() -> None:
    took = np.tile([0.004, 0.05, 0.0035, 0.004], (40, 1))
    prompt = np.tile([0, 2048, 0, 0], (40, 1))
    observed = fit.Chains(took, prompt, prompt > 0, prompt < 0, np.full(took.shape, 0.004), np.zeros(40, int))
    prefill = fit.prefill_costs(observed, Engine(costs=Costs(gpu_decode_s={1: 0.003}), limits=LIMITS))
    assert prefill.costs.host_decode_s <= 0.003 and prefill.samples[:, -1].max() <= 0.003


def test_prefill_costs_are_found_again(steps: list[Steps]) -> None:
    engine = Engine(costs=fit.decode_costs(steps, SIZES).costs, limits=LIMITS)
    prefill = fit.prefill_costs(fit.chains(steps, [0, 1], engine), engine)
    for tokens in (500, 2000, 3000):
        host, host_token, gpu, gpu_token, *_ = values_of(prefill)
        assert host + host_token * tokens == pytest.approx(HOST + HOST_TOKEN * tokens, rel=0.06)
        assert gpu + gpu_token * tokens == pytest.approx(GPU + GPU_TOKEN * tokens, rel=0.10)
    assert spread_of(prefill) < 0.1
    assert prefill.speeds == pytest.approx([1, 1], abs=0.03)
    lengths, ratios = zip(*prefill.ratios, strict=True)
    assert lengths == tuple(sorted(lengths)) and len(lengths) == 12 and ratios == pytest.approx([1] * 12, abs=0.06)


def test_what_comes_before_the_gpu_and_a_launch_of_one_kind_are_found_again() -> None:
    steps = [rebuild(engine_run(seed, before=0.009, alike=0.6)[0]) for seed in (1, 2)]
    engine = Engine(costs=fit.decode_costs(steps, SIZES).costs, limits=LIMITS)
    costs = fit.prefill_costs(fit.chains(steps, [0, 1], engine), engine).costs
    assert costs.before_gpu_s + costs.gpu_prefill_s == pytest.approx(0.009 + GPU, rel=0.1)
    assert costs.gpu_per_prompt_token_s == pytest.approx(GPU_TOKEN, rel=0.05)
    assert costs.alike_launch == pytest.approx(0.6, abs=0.05)


def test_way_in_grows_with_the_prompt_where_prompts_differ() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(100, 7000, 300)
    took_s = 0.004 + 1.8e-6 * tokens + np.abs(random.normal(0, 1e-4, 300))
    took_s[::20] += 0.05  # the machine stood still
    assert way_in.of_idle(tokens, took_s) == (pytest.approx(0.0041, abs=1e-4), pytest.approx(1.8e-6, rel=0.03))
    alike = np.full(300, 2048)
    assert way_in.of_idle(alike, took_s) == (float(np.median(took_s)), 0.0)
    since_s = random.uniform(0, 0.005, 300)  # the scheduling before is so long ago
    between = np.stack([0.004 + 1.8e-6 * tokens - since_s, 0.004 + 1.8e-6 * tokens - since_s + 0.005], axis=1)
    found_s, slope_s = way_in.of_busy(tokens, between)
    assert found_s + 3500 * slope_s == pytest.approx(0.004 + 3500 * 1.8e-6, abs=3e-4)
    assert slope_s == pytest.approx(1.8e-6, abs=0.3e-6)
    assert way_in.of_busy(alike, between - 1.8e-6 * tokens[:, None]) == (pytest.approx(0.004, abs=3e-4), 0.0)


def test_running_streams_take_their_time_on_an_engine_without_graphs() -> None:
    """Its decode steps are a line, which goes on beyond the one size of its table."""
    costs = Costs(gpu_decode_s={1: 0.004}, gpu_per_sequence_s=0.001)
    tokens_s = np.arange(1, 60) * 0.02
    streams = [Stream(str(n), (tokens_s if n < 9 else tokens_s[20:]).tolist(), 100, 100) for n in range(10)]
    found = fit.chains([rebuild(streams)], [0], Engine(costs=costs, limits=LIMITS))
    assert found.decode_s[0, 0] == pytest.approx(0.004 + 8 * 0.001)


def test_chunks_of_a_prompt_fill_the_steps_before_its_first_token() -> None:
    """A prompt over the token budget ends in the smallest chunk. At an idle instance its first chunks are no steps of those who ran before."""
    limits = Limits(max_num_batched_tokens=2048, max_num_seqs=64, captured=16)
    engine = Engine(costs=Costs(gpu_decode_s={1: 0.004}), limits=limits)
    tokens_s = np.arange(1, 60) * 0.02
    beside, after = (Stream("long", times_s.tolist(), 4400, 4400) for times_s in (tokens_s[20:], tokens_s + 2.0))
    found = fit.chains([rebuild([Stream("one", tokens_s.tolist(), 100, 100), beside])], [0], engine)
    assert found.prompt[0].tolist()[:6] == [0, 2047, 2047, 306, 0, 0]
    assert found.alike[0, 1:4].tolist() == [False, False, True]
    assert not len(fit.chains([rebuild([Stream("one", tokens_s.tolist(), 100, 100), after])], [0], engine).took_s)


def test_a_prompt_of_several_chunks_came_before_the_first_of_them() -> None:
    """Else the way in of long prompts has their steps in it."""
    limits = Limits(max_num_batched_tokens=2048, max_num_seqs=64, captured=16)
    tokens_s = np.arange(1, 60) * 0.02
    streams = [Stream("one", tokens_s.tolist(), 100, 100), Stream("long", tokens_s[20:].tolist(), 4400, 4400)]
    found = way_in.schedulable(rebuild(streams), {"long": 0.325}, limits, {"one": 100, "long": 4400})
    assert found == {"long": (pytest.approx(-0.005), pytest.approx(0.015))}  # of step 18, scheduled at 0.34


def test_fixed_lengths_leave_the_price_of_a_token_unknown() -> None:
    took = np.tile([0.0, 0.004, 0.05, 0.0025, 0.004], (40, 1))[:, 1:]
    prompt = np.tile([0, 2048, 0, 0], (40, 1))
    observed = fit.Chains(took, prompt, prompt > 0, prompt < 0, np.full(took.shape, 0.004), np.zeros(40, int))
    assert spread_of(fit.prefill_costs(observed, Engine(costs=Costs(gpu_decode_s={1: 0.004}), limits=LIMITS))) > 0.3


@pytest.mark.parametrize("before_s", [0.0, 0.008])
def test_costs_of_an_instance_that_only_prefills_are_found_again(before_s: float) -> None:
    random = np.random.default_rng(5)
    prompt = np.clip(random.lognormal(7.3, 0.6, 150).astype(int), 100, 6000)
    one = np.ones_like(prompt)
    demand = Demand(
        t_s=np.cumsum(random.exponential(0.03, 150)), prompt_tokens=prompt, output_tokens=one, cached_tokens=0 * one
    )
    costs = Costs(ingress_s=0.005).with_values([HOST, HOST_TOKEN, GPU, GPU_TOKEN, before_s, 1.0, 1e-3])
    engine = Engine(costs=costs, limits=LIMITS)
    answered = simulate(Deployment(layout=Layout("single", {"single": 1}), engines={"single": engine}), demand)
    done_s = answered.sent_s + answered.ttft_s + random.normal(0, 2e-4, 150)
    visits = Visits(answered.sent_s, np.full(150, np.nan), done_s, prompt)
    found = prefill_alone([visits], [0], LIMITS, (0.005, 0.0)).costs
    lengths = np.array([300, 1500, 6000])
    assert found.prompt_step_s(lengths, 0) == pytest.approx(costs.prompt_step_s(lengths, 0), rel=0.06)
    assert found.gpu_prompt_s(lengths[2:]) == pytest.approx(costs.gpu_prompt_s(lengths[2:]), rel=0.05), "in a queue"


@pytest.mark.parametrize("gpu_s", [0.012, 0.024])
def test_launch_beyond_the_graphs_is_found_in_the_queue_of_prefill(gpu_s: float) -> None:
    """Prompts of 2,048 tokens, graphs of two: three or four in a step take the host 80 ms."""
    random = np.random.default_rng(7)
    one = np.ones(400, dtype=int)
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=4224)
    demand = Demand(
        t_s=np.cumsum(random.exponential(0.035, 400)),
        prompt_tokens=2048 * one,
        output_tokens=one,
        cached_tokens=0 * one,
    )
    usual = Costs(ingress_s=0.005, host_eager_s=0.08)
    costs = usual.with_values([0.025, 1e-7, 0.005, gpu_s / 2048, 0.0, 1.0, 1e-3])
    engine = Engine(costs=costs, limits=limits)
    answered = simulate(Deployment(layout=Layout("single", {"single": 1}), engines={"single": engine}), demand)
    done_s = answered.sent_s + answered.ttft_s + random.normal(0, 1e-4, 400)
    visits = Visits(answered.sent_s, np.full(400, np.nan), done_s, demand.prompt_tokens)
    found = prefill_alone([visits], [0], limits, (0.005, 0.0)).costs
    assert found.host_eager_s == pytest.approx(0.08, rel=0.1)
    again = simulate(
        Deployment(layout=Layout("single", {"single": 1}), engines={"single": Engine(costs=found, limits=limits)}),
        demand,
    )
    for share in (0.5, 0.9, 0.99):
        assert np.quantile(again.ttft_s, share) == pytest.approx(np.quantile(answered.ttft_s, share), rel=0.1)


def test_launch_beyond_the_graphs_is_found_beside_running_streams() -> None:
    took_s, prompt = np.tile([0.004, 0.03, 0.004], (80, 1)), np.tile([0, 2048, 0], (80, 1))
    took_s[::4, 1], prompt[::4, 1] = 0.085, 6144
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=4224)
    observed = fit.Chains(took_s, prompt, prompt > 4224, prompt < 0, np.full(took_s.shape, 0.004), np.zeros(80, int))
    found = fit.prefill_costs(observed, Engine(costs=Costs(gpu_decode_s={1: 0.004}), limits=limits)).costs
    assert found.host_eager_s == pytest.approx(0.085)
    assert found.host_prefill_s + 2048 * found.host_per_prompt_token_s < 0.035


def test_last_value_of_a_flag_counts() -> None:
    assert last_value(["--max-num-seqs", "4", "--max-num-seqs=8"], "--max-num-seqs") == "8"
    assert last_value(["--max-num-seqs", "4"], "--max-model-len") is None
