"""How long `pdbench report` takes over many long runs, what memory it needs, and how large the page is.

Try: python benchmarks/report_speed.py --runs 100 --requests 10000
The runs are synthetic (made by this script, labelled so): only time, memory and size are measured here.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pdbench.records import Clock, DeviceRecord, DeviceSample, RequestRecord, Run, Trial, save_run

TRIALS, IN_FLIGHT = 5, 32


def synthetic_run(number: int, requests: int, tokens: int) -> Run:
    """A run of closed loops with lognormal latencies, one GPU's curve at 100 ms beside it."""
    random = np.random.default_rng(number)
    run = Run(
        name="single" if number == 0 else "disaggregated", clock=Clock(0.0, 0.0), config={"model": "synthetic"},
        host={"name": "synthetic"}, versions={"pdbench": "0"}, roles={"single": ["gpu-0"]},
    )  # fmt: skip
    now, each = 1.0, requests // TRIALS
    for trial in range(TRIALS):
        gaps = random.lognormal(np.log(0.004), 0.3, (each, tokens))
        gaps[:, 0] = random.lognormal(np.log(0.05), 0.3, each)
        duration = gaps.sum(axis=1).mean()
        sent = now + np.arange(each) * duration / IN_FLIGHT
        arrivals = np.round(sent[:, None] + np.cumsum(gaps, axis=1), 6)
        for i in range(each):
            row = arrivals[i].tolist()
            run.requests.append(
                RequestRecord(
                    id=f"{trial}-{i}", planned_s=float(sent[i]), sent_s=float(sent[i]), token_s=row, end_s=row[-1],
                    prompt_tokens=512, output_tokens=tokens, trial=trial, phases={"prefill": (float(sent[i]), row[0])},
                )
            )  # fmt: skip
        run.trials.append(Trial(index=trial, start_s=now, end_s=float(arrivals.max())))
        now = float(arrivals.max()) + 30.0
    samples = [
        DeviceSample(
            t_s=t, power_w=float(400 + 50 * np.sin(t)), energy_j=400.0 * t, sm_clock_mhz=1980.0, temperature_c=50.0
        )
        for t in np.arange(0.0, now, 0.1).tolist()
    ]
    run.devices = [DeviceRecord(id="gpu-0", kind="gpu", name="Synthetic", role="single", samples=samples)]
    return run


def main() -> None:
    """Make the runs, report on them once in a process of its own, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="folder for the page, to look at it or at its first paint")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / f"run-{number:03}" for number in range(given.runs)]
        for number, folder in enumerate(folders):
            save_run(synthetic_run(number, given.requests, given.tokens), folder)
        stored = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
        out = given.keep or Path(scratch) / "report"
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "pdbench", "report", *map(str, folders), "--out", str(out)], check=True)
        seconds = time.monotonic() - begin
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime
        largest_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        page_mb = (out / "report.html").stat().st_size / 1e6
    print(
        f"{'runs':>6} {'requests':>9} {'tokens':>7} {'stored GB':>10} {'seconds':>8} {'CPU s':>7} {'largest process GiB':>20} {'page MB':>8}"
    )
    print(
        f"{given.runs:>6} {given.requests:>9} {given.tokens:>7} {stored / 1e9:>10.2f} {seconds:>8.1f} {cpu_s:>7.1f} {largest_gib:>20.2f} {page_mb:>8.2f}"
    )


if __name__ == "__main__":
    main()
