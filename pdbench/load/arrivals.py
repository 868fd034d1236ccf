"""When requests arrive, in seconds from the load's start: pure functions of seed and parameters."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from pdbench.errors import UserError


def poisson(rate: float, seed: int | str) -> Iterator[float]:
    """Endless arrivals of a Poisson process, `rate` per second."""
    generator = random.Random(f"arrivals/{seed}")
    unit = 0.0
    while True:
        unit -= math.log(1.0 - generator.random())
        yield unit / rate


def constant(rate: float) -> Iterator[float]:
    """Endless arrivals, one every 1/rate seconds, the first after one gap."""
    return (index / rate for index in itertools.count(1))


def gamma(rate: float, burstiness: float, seed: int | str) -> Iterator[float]:
    """Endless arrivals with gamma gaps of mean 1/rate and coefficient of variation 1/sqrt(burstiness), 1 being Poisson.

    As in `vllm bench serve`.
    """
    generator = random.Random(f"arrivals/{seed}")
    scale = 1.0 / (rate * burstiness)
    now_s = 0.0
    while True:
        now_s += generator.gammavariate(burstiness, scale)
        yield now_s


def scaled(instants: Iterator[float], count: int, span_s: float) -> Iterator[float]:
    """The first `count` arrivals, stretched so that the one after them comes at `span_s`: luck in their number is no part of a
    trial. Of Poisson arrivals, what is left is as random as before: uniform instants in order."""
    first = list(itertools.islice(instants, count + 1))
    factor = span_s / first[-1]
    return (instant * factor for instant in first[:-1])


def ramp(start_rate: float, end_rate: float, over_s: float, seed: int | str) -> Iterator[float]:
    """Endless Poisson arrivals whose rate goes linearly from `start_rate` to `end_rate` over `over_s`, then stays."""
    slope = (end_rate - start_rate) / over_s
    at_end = (start_rate + end_rate) / 2 * over_s
    for unit in poisson(1.0, seed):
        if unit >= at_end:
            yield over_s + (unit - at_end) / end_rate
        elif slope == 0:
            yield unit / start_rate
        else:
            yield (math.sqrt(start_rate**2 + 2 * slope * unit) - start_rate) / slope


def staged(stages: Sequence[tuple[float, float]], seed: int | str) -> Iterator[float]:
    """Poisson arrivals through stages of (requests per second, seconds); ends with the last stage."""
    begin_s, summed = 0.0, 0.0
    units = poisson(1.0, seed)
    unit = next(units)
    for rate, length_s in stages:
        while unit < summed + rate * length_s:
            yield begin_s + (unit - summed) / rate
            unit = next(units)
        begin_s, summed = begin_s + length_s, summed + rate * length_s


def read_stages(text: str) -> list[tuple[float, float]]:
    """Stages out of "RATE:SECONDS,..." as in "2:30,20:5,2:30". Raises UserError naming the part that is wrong."""
    stages = []
    for part in text.split(","):
        try:
            rate, length_s = (float(number) for number in part.split(":"))
        except ValueError:
            raise UserError(f"--stages: {part!r} is not RATE:SECONDS, as in 2:30,20:5,2:30") from None
        if not (math.isfinite(rate) and math.isfinite(length_s)) or rate < 0 or length_s <= 0:
            raise UserError(f"--stages: {part!r} needs a rate of 0 or more and a length above 0 seconds")
        stages.append((rate, length_s))
    return stages
