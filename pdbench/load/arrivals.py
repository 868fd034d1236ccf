"""When requests arrive, in seconds from the load's start: pure functions of seed and parameters."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator

from pdbench.config import LoadConfig
from pdbench.errors import OptionError


def constant(rate: float) -> Iterator[float]:
    """Endless arrivals, one every 1/rate seconds, the first after one gap."""
    return (index / rate for index in itertools.count(1))


def gamma(rate: float, burstiness: float, seed: int | str) -> Iterator[float]:
    """Endless arrivals with gamma gaps of mean 1/rate and coefficient of variation 1/sqrt(burstiness), 1 being Poisson.

    As in `vllm bench serve`.
    """
    generator = random.Random(f"arrivals/{seed}")
    unit = 0.0
    while True:
        unit += generator.gammavariate(burstiness, 1.0 / burstiness)
        yield unit / rate


def scaled(instants: Iterator[float], count: int, span_s: float) -> Iterator[float]:
    """The first `count` arrivals, stretched so that the span begins and ends half-way into a gap: their distances are span_s / count in the
    mean, as of even arrivals, and chance in their number is no part of a trial."""
    first = list(itertools.islice(instants, count + 1))
    begin = first[0] / 2
    end = (first[-1] + first[-2]) / 2 if count else first[-1]
    factor = span_s / (end - begin) if end > begin else 0.0  # extremely bursty ones may all come at once
    return ((instant - begin) * factor for instant in first[:-1])


def changing(phases: Iterable[tuple[float, float, float]], seed: int | str) -> Iterator[float]:
    """Poisson arrivals whose rate goes linearly through phases of (first rate, last rate, seconds); ends with the last phase."""
    begin_s, summed = 0.0, 0.0
    units = gamma(1.0, 1.0, seed)
    unit = next(units)
    for first, last, length_s in phases:
        slope, expected = (last - first) / length_s, (first + last) / 2 * length_s
        while unit < summed + expected:
            left = unit - summed
            yield begin_s + 2 * left / (first + math.sqrt(first**2 + 2 * slope * left))
            unit = next(units)
        begin_s, summed = begin_s + length_s, summed + expected


def describe(config: LoadConfig) -> list[str]:
    """The rate or the stages of a load's options, and the distribution of the arrivals."""
    if config.stages:
        rate = f"stages {config.stages} (requests/s:s)"
    elif config.ramp_to:
        rate = f"{config.rate:g} to {config.ramp_to:g} requests/s over {config.ramp_s:g} s"
    else:
        rate = f"{config.rate:g} requests/s"
    kind = "poisson" if config.stages or config.ramp_to else config.arrival
    name = {"gamma": f"gamma arrivals of burstiness {config.burstiness:g}", "constant": "constant arrivals"}
    return [rate, name.get(kind, "Poisson arrivals")]


def read_stages(text: str) -> list[tuple[float, float, float]]:
    """Phases of "RATE:SECONDS,..." as in "2:30,20:5,2:30". Raises UserError naming the part that is wrong."""
    stages = []
    for part in text.split(","):
        try:
            rate, length_s = (float(number) for number in part.split(":"))
        except ValueError:
            raise OptionError(f"--stages: {part!r} is not RATE:SECONDS, as in 2:30,20:5,2:30") from None
        if not (math.isfinite(rate) and math.isfinite(length_s)) or rate < 0 or length_s <= 0:
            raise OptionError(f"--stages: {part!r} needs a rate of 0 or more and a length above 0 seconds")
        stages.append((rate, rate, length_s))
    return stages
