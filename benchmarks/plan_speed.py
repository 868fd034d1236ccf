"""How fast `pdbench plan` simulates: CPU seconds of one core for a load on many GPUs, as replicas and as prefill + decode.

The costs are those of DeepSeek-V2-Lite's shape on an H200 (docs/results/plan), 6 requests/s per GPU. The peak memory is the process's:
simulate one kind per process to compare it. The yardstick is the CPU time of 100,000 turns of a loop with one multiplication: about 4 ms
on a core of its own, more where other work shares the core.
Try: python benchmarks/plan_speed.py --requests 1000000 --gpus 1000 --kinds replicas
"""

import argparse
import resource
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from pdbench.plan.engine import Costs, Demand, Deployment, Engine, Handoff, Layout, Limits
from pdbench.plan.simulate import simulate, weighted_quantiles

COSTS = Costs(
    host_decode_s=0.0025,
    host_prefill_s=0.05,
    host_per_prompt_token_s=0.0,
    gpu_decode_s={1: 0.0034, 2: 0.00395, 4: 0.0038, 8: 0.0039, 16: 0.00407, 24: 0.0046, 32: 0.0048},
    gpu_per_sequence_s=2.5e-5,
    gpu_per_context_token_s=1e-9,
    gpu_prefill_s=0.001,
    gpu_per_prompt_token_s=1e-5,
    join_s=0.001,
    ingress_s=0.007,
    noise=((1.0, 1.1, 0.9),),
)
LIMITS = Limits(max_num_batched_tokens=8192, max_num_seqs=256, captured=128, kv_cache_tokens=1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["replicas", "disaggregated"])
    options = parser.parse_args()
    random, count = np.random.default_rng(0), options.requests
    demand = Demand(
        t_s=np.cumsum(random.exponential(1 / (6 * options.gpus), count)),
        prompt_tokens=random.integers(1500, 2500, count),
        output_tokens=random.integers(64, 192, count),
        cached_tokens=np.zeros(count, np.int64),
    )
    engine, half = Engine(costs=COSTS, limits=LIMITS), options.gpus // 2
    deployments = {
        "replicas": Deployment(layout=Layout("replicas", {"replica": options.gpus}), engines={"replica": engine}),
        "disaggregated": Deployment(
            layout=Layout("disaggregated", {"prefill": half, "decode": half}),
            engines={"prefill": engine, "decode": engine},
            handoff=Handoff(steps=4.0),
        ),
    }
    table = Table(
        "", "requests", "tokens", "CPU s", "µs/request", "events", "TTFT p99, ms", "TBT p99, ms", "peak, MiB", "yardstick, ms",
        title="Simulated",
    )  # fmt: skip
    for deployment in (deployments[kind] for kind in options.kinds):
        before_s = yardstick_s()
        begin_s = time.process_time()
        result = simulate(deployment, demand)
        cpu_s = time.process_time() - begin_s
        (tbt_s,) = weighted_quantiles(result.gap_s, result.gap_count, [0.99])
        table.add_row(
            deployment.layout.name,
            f"{count:,}",
            f"{int(demand.output_tokens.sum()):,}",
            f"{cpu_s:.1f}",
            f"{1e6 * cpu_s / count:.1f}",
            f"{result.events:,}",
            f"{1e3 * np.quantile(result.ttft_s, 0.99):.0f}",
            f"{1e3 * tbt_s:.1f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f}",
            f"{1e3 * before_s:.1f}-{1e3 * yardstick_s():.1f}",
        )
    Console(width=150).print(table)


def yardstick_s() -> float:
    begin_s = time.process_time()
    for _ in range(10):
        for number in range(100_000):
            _ = number * 3.0
    return (time.process_time() - begin_s) / 10


if __name__ == "__main__":
    main()
