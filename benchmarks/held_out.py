"""Loads to hold a plan's predictions against, as traces of pdbench's own format: other rates, lengths and bursts than a calibration's.

Writes one file for each load into OUT, and prints them as a sweep takes them:
    pdbench sweep recipes/calibrate.toml --vary trace=$(python benchmarks/held_out.py OUT --seconds 24)
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from pdbench.load.arrivals import gamma
from pdbench.load.prompts import length


@dataclass(frozen=True)
class HeldOut:
    """Requests per second; tokens in and out, log-normal with this spread (0: all the same); the burstiness of gamma arrivals, 1 of Poisson's."""

    rate: float
    input_tokens: int = 1536
    output_tokens: int = 128
    spread: float = 0.8
    burstiness: float = 1.0


LOADS = {
    "rate-4": HeldOut(4),
    "rate-12": HeldOut(12),
    "rate-20": HeldOut(20),
    "rate-28": HeldOut(28),
    "bursts-12": HeldOut(12, burstiness=1 / 9),  # gaps whose standard deviation is three times their mean
    "512-256": HeldOut(12, 512, 256, 0),
    "2048-128": HeldOut(8, 2048, 128, 0),
    "6000-64": HeldOut(3, 6000, 64, 0),
}
"""Section 11 of the planner's study, and what other pages measure."""


def write(load: HeldOut, seconds: float, path: Path) -> None:
    """Lengths end where those of recipes/calibrate.toml do."""
    lines = []
    for index, at_s in enumerate(
        itertools.takewhile(lambda t: t < seconds, gamma(load.rate, load.burstiness, path.stem))
    ):
        shape = "lognormal" if load.spread else "fixed"
        tokens = {
            "input_tokens": min(7000, length(load.input_tokens, shape, load.spread, f"{path.stem}/in/{index}")),
            "output_tokens": min(1000, length(load.output_tokens, shape, load.spread, f"{path.stem}/out/{index}")),
        }
        lines.append(json.dumps({"arrival_s": round(at_s, 4), **tokens}))
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=24.0, help="how long each load lasts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {options.out / f"{name}.jsonl": load for name, load in LOADS.items()}
    for path, load in files.items():
        write(load, options.seconds, path)
    print(",".join(map(str, files)))


if __name__ == "__main__":
    main()
