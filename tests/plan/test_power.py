"""Power of an instance from its devices: the costs that were put in are found again."""

import numpy as np
import pytest

from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Layout, Limits
from pdbench.plan.power import fit_power, use_of_visits, windows_in
from pdbench.plan.simulate import simulate
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
