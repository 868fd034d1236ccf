"""Loads to hold a plan's predictions against, as traces of pdbench's own format: other rates, lengths and bursts than a calibration's.

Writes one file for each load into OUT, and prints them as a sweep takes them:
    pdbench sweep recipes/calibrate.toml --vary trace=$(python benchmarks/held_out.py OUT --seconds 24)
"""

import argparse
import itertools
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pdbench.load.arrivals import gamma
from pdbench.load.prompts import length

CALIBRATED = tomllib.loads((Path(__file__).parents[1] / "recipes" / "calibrate.toml").read_text())["load"]
"""The lengths of a calibration, from which those of the loads here are taken where they name none of their own."""


@dataclass(frozen=True)
class HeldOut:
    """Requests per second; `fixed` tokens in and out, None: as the calibration draws them; the burstiness of gamma arrivals, 1 of Poisson's."""

    rate: float
    fixed: tuple[int, int] | None = None
    burstiness: float = 1.0


LOADS = {
    "rate-4": HeldOut(4),
    "rate-12": HeldOut(12),
    "rate-20": HeldOut(20),
    "rate-28": HeldOut(28),
    "bursts-12": HeldOut(12, burstiness=1 / 9),  # gaps whose standard deviation is three times their mean
    "512-256": HeldOut(12, (512, 256)),
    "2048-128": HeldOut(8, (2048, 128)),
    "6000-64": HeldOut(3, (6000, 64)),
}
"""Section 11 of the planner's study, and what other pages measure."""


def tokens_of(load: HeldOut, name: str, index: int) -> dict[str, int]:
    """The lengths of the n-th request of this load."""
    if load.fixed:
        return dict(zip(("input_tokens", "output_tokens"), load.fixed, strict=True))
    return {
        f"{side}_tokens": min(
            CALIBRATED[f"max_{side}_tokens"],
            length(
                CALIBRATED[f"{side}_tokens"],
                CALIBRATED[f"{side}_distribution"],
                CALIBRATED[f"{side}_spread"],
                f"{name}/{side.removesuffix('put')}/{index}",
            ),
        )
        for side in ("input", "output")
    }


def write(load: HeldOut, seconds: float, path: Path) -> None:
    instants = itertools.takewhile(lambda t: t < seconds, gamma(load.rate, load.burstiness, path.stem))
    rows = [{"arrival_s": round(at_s, 4)} | tokens_of(load, path.stem, index) for index, at_s in enumerate(instants)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
