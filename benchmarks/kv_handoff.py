"""How long a handoff takes while both engines' threads compute in Python, by the interpreter's switch interval.

A prefill and a decode worker of the connector, each in a process of its own, over tcp on CPU. In place of vLLM's engine a loop
computes in Python without a break. Python's default interval is 5 ms; the last line is the connector's (SWITCH_INTERVAL_S in
pdbench/kv/worker.py).
    python benchmarks/kv_handoff.py [--transfers 120]        (about 15 s per line; leave both cores to it)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.processes import free_port

TOKENS, STEP_S, WARM_UP = 64, 0.003, 5
INTERVALS_MS = (5.0, 1.0, 0.2)


def busy(seconds: float) -> int:
    """Compute in Python for so long; returns the loops done."""
    until_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < until_s:
        count += 1
    return count


def side(role: str, port: int, interval_ms: float | None, transfers: int, log: str) -> None:
    """One worker with its busy engine thread. Decode prints p10, p50, p90 of ask to end in ms, and loops a busy step."""
    from pdbench.kv import worker
    from pdbench.kv.compat import SECRET_VARIABLE
    from tests.support.kv import BLOCK, SECRET, Instance, fetch, new_transfer, prefill

    os.environ[SECRET_VARIABLE] = SECRET
    if interval_ms is not None:
        worker.SWITCH_INTERVAL_S = interval_ms / 1e3
    instance = Instance(role, port, layout=(64, BLOCK, 4096), timeout_s=600.0, event_log=log)
    planned = [new_transfer(TOKENS, f"r{index}") for index in range(transfers + WARM_UP)]
    blocks = list(range(TOKENS // BLOCK))
    if role == "prefill":
        for transfer in planned:
            prefill(instance, transfer, blocks)
        print("up", flush=True)
        while True:
            busy(STEP_S)
            instance.step(idle=False)
    loops = []
    for transfer in planned:
        fetch(instance, transfer, blocks, port, idle=False)
        while transfer.request_id not in instance.received:
            loops.append(busy(STEP_S))
            instance.step(idle=False)
    assert not instance.failed
    instance.worker.close()
    events = [json.loads(line) for line in Path(log).read_text().splitlines()[WARM_UP:]]
    durations_ms = sorted((event["end_s"] - event["asked_s"]) * 1e3 for event in events)
    print(*(f"{durations_ms[int(q * len(durations_ms))]:.2f}" for q in (0.1, 0.5, 0.9)), statistics.median_low(loops))


def measured(interval_ms: float | None, transfers: int) -> list[str]:
    """What decode printed."""
    command = [sys.executable, __file__, "--transfers", str(transfers), "--port", str(free_port())]
    command += [] if interval_ms is None else ["--interval-ms", str(interval_ms)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*command, "--side", "prefill"], **pipe) as first:  # type: ignore[call-overload]
        try:
            first.stdout.readline()
            return subprocess.run([*command, "--side", "decode"], check=True, **pipe).stdout.split()  # type: ignore
        finally:
            first.kill()


def main() -> None:
    """One line per interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfers", type=int, default=120)
    for internal, kind in (("--side", str), ("--port", int), ("--interval-ms", float)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as log:
            side(options.side, options.port, options.interval_ms, options.transfers, log.name)
        return
    print(
        "| interval, ms | request to end p10 / p50 / p90, ms | of the first line | Python's own work in 3 ms, loops |"
    )
    print("|---|---|---|---|")
    first = None
    for interval_ms in (*INTERVALS_MS, None):
        low, middle, high, loops = measured(interval_ms, options.transfers)
        first = first or float(middle)
        name = f"{interval_ms:g}" if interval_ms is not None else "the connector's"
        print(f"| {name} | {low} / {middle} / {high} | {float(middle) / first:.2f} | {loops} |", flush=True)


if __name__ == "__main__":
    main()
