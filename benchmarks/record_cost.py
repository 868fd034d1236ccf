"""What reading the servers' counters and the canaries cost the other requests: with and without, alternating, on one deployment that runs.

Every round measures each variant once with the same arrivals, in an order that turns from round to round. Requests that are canaries
themselves are left out. Printed: the change against "neither" as Student's paired interval on log ratios, 95 %.
Try: pdbench serve; then python benchmarks/record_cost.py --rounds 8 --rate 2 --requests 24
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from scipy import stats

from pdbench.records import load_run

VARIANTS = {
    "neither": ["--metrics-interval-s", "0", "--canaries", "0"],
    "counters": ["--metrics-interval-s", "0.5", "--canaries", "0"],
    "counters + canaries": ["--metrics-interval-s", "0.5", "--canaries", "0.01"],
}
FIGURES = ("TTFT p50, ms", "TBT p50, ms", "TBT p99, ms")


def figures(folder: Path) -> list[float]:
    requests = [r for r in load_run(folder).requests if not (r.warmup or r.error or r.canary)]
    ttft_ms = [1e3 * (r.token_s[0] - r.sent_s) for r in requests]
    gaps_ms = numpy.concatenate([1e3 * numpy.diff(r.token_s) for r in requests])
    return [float(numpy.median(ttft_ms)), float(numpy.median(gaps_ms)), float(numpy.quantile(gaps_ms, 0.99))]


def measure(arguments: argparse.Namespace, variant: str, seed: int) -> list[float]:
    with tempfile.TemporaryDirectory() as out:
        load = ["--rate", str(arguments.rate), "--requests", str(arguments.requests), "--warmup", "2"]
        lengths = ["--input-tokens", str(arguments.input_tokens), "--output-tokens", str(arguments.output_tokens)]
        command = [sys.executable, "-m", "pdbench", "bench", "--url", arguments.url, "--out", out, "--idle-s", "0"]
        done = subprocess.run(
            [*command, *load, *lengths, "--seed", str(seed), *VARIANTS[variant]],
            capture_output=True,
            text=True,
            check=False,
        )
        folders = list(Path(out).glob("*_results"))
        if not folders:
            sys.exit(f"{variant}: {done.stdout[-500:]}{done.stderr[-1500:]}")
        return figures(folders[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    arguments = parser.parse_args()
    measured: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for number in range(arguments.rounds):
        names = list(VARIANTS)[number % 3 :] + list(VARIANTS)[: number % 3]
        for variant in names if number % 2 else names[::-1]:
            measured[variant].append(measure(arguments, variant, number))
            print(
                f"round {number + 1} {variant}: " + ", ".join(f"{value:.2f}" for value in measured[variant][-1]),
                flush=True,
            )
    base = numpy.log(measured["neither"])
    for variant in VARIANTS:
        logs = numpy.log(measured[variant])
        words = [f"{name} {value:.2f}" for name, value in zip(FIGURES, numpy.exp(logs.mean(axis=0)), strict=True)]
        print(f"{variant}: {'; '.join(words)}")
        if variant != "neither":
            change = logs - base
            half = stats.t.ppf(0.975, len(change) - 1) * change.std(axis=0, ddof=1) / len(change) ** 0.5
            for name, middle, width in zip(FIGURES, change.mean(axis=0), half, strict=True):
                low, high = 100 * numpy.expm1([middle - width, middle + width])
                print(f"  {name}: {100 * numpy.expm1(middle):+.1f} % ({low:+.1f} to {high:+.1f} %)")


if __name__ == "__main__":
    main()
