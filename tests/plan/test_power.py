"""Power of an instance from its devices: the costs that were put in are found again."""

import numpy as np
import pytest

from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Layout, Limits
from pdbench.plan.instance import MOST_NOTES
from pdbench.plan.power import fit_power, use_of_visits, windows_in, work_joules
from pdbench.plan.records import PowerCosts
from pdbench.plan.simulate import Simulated, simulate
from pdbench.plan.steps import Visits
from pdbench.records import DeviceRecord, DeviceSample


def device(index: int, watts: list[float], idle_w: float | None) -> DeviceRecord:
    """One second of each of these powers, sampled ten times a second."""
    samples = [
        DeviceSample(t_s=0.1 * tenth, power_w=watts[min(tenth // 10, len(watts) - 1)])
        for tenth in range(10 * len(watts) + 1)
    ]
    idle = {} if idle_w is None else {"engine_ready": idle_w}
    return DeviceRecord(id=f"gpu{index}", kind="gpu", name="G", index=index, samples=samples, idle_power_w=idle)


def test_an_instance_draws_what_all_of_its_devices_do() -> None:
    use = np.zeros((40, 4))
    use[::2, 0] = 1.0  # it decodes in every other second
    edges = windows_in((0.0, 40.0))
    first, second = (
        [idle + more * (step % 2 == 0) for step in range(40)] for idle, more in ((100.0, 200.0), (120.0, 240.0))
    )
    pair = [device(0, first, 100.0), device(1, second, 120.0)]
    both = fit_power([(pair, edges, use)])
    assert both is not None and both.idle_w == 220.0 and both.decode_w == pytest.approx(660.0, rel=0.05)
    one = fit_power([(pair[:1], edges, use)])
    assert one is not None and one.decode_w == pytest.approx(300.0, rel=0.05)
    assert fit_power([([pair[0], device(1, second, None)], edges, use)]) is None
    pair[1].idle_utilization_pct = {"engine_ready": 40.0}  # somebody else computed there meanwhile
    assert fit_power([(pair, edges, use)]) is None
    again = [device(0, first, 100.0), device(1, second, 120.0)]
    fitted = fit_power([(pair, edges, use), (again, edges, use)])
    assert fitted is not None and fitted.idle_w == 220.0


def test_simulated_prefill_works_as_long_as_a_measured_one_is_counted() -> None:
    """From its scheduling, not only from the GPU's first kernel."""
    costs = Costs(host_prefill_s=0.01, gpu_per_prompt_token_s=1e-5, before_gpu_s=0.01, ingress_s=0.005)
    engine = Engine(costs=costs, limits=Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=8192))
    one = np.ones(100, int)
    load = Demand(t_s=np.arange(100) * 0.05, prompt_tokens=2000 * one, output_tokens=one, cached_tokens=0 * one)
    found = simulate(Deployment(layout=Layout("single", {"single": 1}), engines={"single": engine}), load)
    visits = Visits(found.sent_s, np.full(100, np.nan), found.sent_s + found.ttft_s, load.prompt_tokens)
    counted_s = use_of_visits(visits, costs, windows_in((0.0, 6.0)))[:, 2].sum()
    assert counted_s == pytest.approx(3.0) and found.instances[0].prefill_s == pytest.approx(counted_s)


WATTS = PowerCosts(
    idle_w=100.0, decode_w=400.0, sequence_w=5.0, prefill_w=200.0, prompt_token_j=0.004, windows=99, residual_w=1.0
)


def simulated(load: Demand) -> Simulated:
    costs = Costs(gpu_decode_s={1: 0.005}, host_prefill_s=0.01, gpu_per_prompt_token_s=1e-5)
    engine = Engine(costs=costs, limits=Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=8192))
    return simulate(Deployment(layout=Layout("single", {"single": 1}), engines={"single": engine}), load)


def test_work_is_counted_where_it_is_done() -> None:
    one = np.ones(4000, int)
    load = Demand(
        t_s=np.repeat([0.0, 100.0], 2000) + np.tile(np.arange(2000) * 0.04, 2),
        prompt_tokens=1000 * one,
        output_tokens=20 * one,
        cached_tokens=0 * one,
    )
    found = simulated(load)
    (use,) = found.instances
    assert len(use.done) <= MOST_NOTES + 1  # of 8,000 prompts and ends
    first_j, pause_j, second_j = (work_joules(use, WATTS, window) for window in ((0, 85), (85, 99), (99, 999)))
    assert pause_j < 0.005 * first_j and first_j == pytest.approx(second_j, rel=0.01)
    whole_j = 300.0 * use.decode_s + 5.0 * use.sequence_s + 200.0 * use.prefill_s + 0.004 * use.prompt_tokens
    assert first_j + pause_j + second_j == pytest.approx(whole_j)
    assert work_joules(use, WATTS, (10.0, 30.0)) == pytest.approx(whole_j / 8, rel=0.01)


def test_prompts_before_the_window_draw_nothing_in_it() -> None:
    """A closed loop begins with a prompt per stream, all before it is measured."""
    one = np.ones(64, int)
    load = Demand(
        t_s=0.0 * one,
        prompt_tokens=4000 * one,
        output_tokens=500 * one,
        cached_tokens=0 * one,
        streams=32,
    )
    found = simulated(load)
    (use,) = found.instances
    begin_s, end_s = found.window
    before_j, within_j = (work_joules(use, WATTS, window) for window in ((0.0, begin_s), (begin_s, end_s)))
    assert begin_s > 1.0 and before_j > 0.0
    most_w = 300.0 + 32 * 5.0 + 0.004 * 1e5  # every token's price at the speed of prefill
    assert within_j <= most_w * (end_s - begin_s)
