"""What the servers' counters, the canaries and a watched page cost the other requests: with and without, in turns, on one deployment that runs.

Every round measures each variant once with the same arrivals, in an order that turns from round to round. Requests that are canaries
themselves are left out. Printed: the change against "neither" as Student's paired interval on log ratios, 95 %, and how late the client
itself was.
Try: pdbench serve; then python benchmarks/record_cost.py --rounds 8 --rate 2 --requests 24
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy
from scipy import stats

from pdbench.records import load_run

VARIANTS = {
    "neither": ["--metrics-interval-s", "0", "--canaries", "0"],
    "counters": ["--metrics-interval-s", "0.5", "--canaries", "0"],
    "counters + canaries": ["--metrics-interval-s", "0.5", "--canaries", "0.01"],
    "all, and a page that is watched": ["--metrics-interval-s", "0.5", "--canaries", "0.01", "--live"],
}
FIGURES = ("TTFT p50, ms", "TBT p50, ms", "TBT p99, ms", "client's send delay p99, ms")


def watch(output: Path, ended: threading.Event, seen: list[int]) -> None:
    """Open the page whose address the command prints, as a browser does, and count the bytes of its events."""
    while not ended.wait(0.05):
        lines = [line for line in output.read_text().splitlines() if line.startswith("live: ")]
        if lines:
            page, token = lines[0].removeprefix("live: ").split("?")
            with suppress(OSError):
                urllib.request.urlopen(f"{page}?{token}").read()
                with urllib.request.urlopen(f"{page}events?{token}") as events:
                    seen.extend(len(line) for line in events)
            return


def figures(folder: Path) -> list[float]:
    run = load_run(folder)
    requests = [r for r in run.requests if not (r.warmup or r.error or r.canary)]
    ttft_ms = [1e3 * (r.token_s[0] - r.sent_s) for r in requests]
    gaps_ms = numpy.concatenate([1e3 * numpy.diff(r.token_s) for r in requests])
    late_ms = run.trials[0].client["send_delay_after_start_ms"]["p99"]
    return [float(numpy.median(ttft_ms)), float(numpy.median(gaps_ms)), float(numpy.quantile(gaps_ms, 0.99)), late_ms]


def measure(arguments: argparse.Namespace, variant: str, seed: int) -> list[float]:
    with tempfile.TemporaryDirectory() as out:
        load = ["--rate", str(arguments.rate), "--requests", str(arguments.requests), "--warmup", "2"]
        lengths = ["--input-tokens", str(arguments.input_tokens), "--output-tokens", str(arguments.output_tokens)]
        command = [sys.executable, "-m", "pdbench", "bench", "--url", arguments.url, "--out", out, "--idle-s", "0"]
        command += [*load, *lengths, "--seed", str(seed), *VARIANTS[variant]]
        output, ended, seen = Path(out) / "output", threading.Event(), list[int]()
        output.touch()
        viewer = threading.Thread(target=watch, args=(output, ended, seen), daemon=True)
        if "--live" in command:
            viewer.start()
        with output.open("w") as stream:
            subprocess.run(command, stdout=stream, stderr=stream, check=False)
        ended.set()
        folders = list(Path(out).glob("*_results"))
        if not folders:
            sys.exit(f"{variant}: {output.read_text()[-2000:]}")
        if "--live" in command and not seen:
            sys.exit(f"{variant}: no event of the page arrived: {output.read_text()[-2000:]}")
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
        first = number % len(VARIANTS)
        names = [*VARIANTS][first:] + [*VARIANTS][:first]
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
