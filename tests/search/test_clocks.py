"""The search for the cheapest clocks, on laws whose optimum every combination tells."""

import itertools
from math import inf, nan

import numpy as np
import pytest

from pdbench.search.clocks import Setting, axes, cheapest

CLOCKS = [600, 780, 990, 1200, 1410, 1605, 1800, None]
AXES = {"prefill_clock": CLOCKS, "decode_clock": CLOCKS}


class Law:
    """Two roles whose time goes with 1 / clock and whose energy is work at the voltage plus idling; limits on times."""

    def __init__(self, seed: int, coupled: bool) -> None:
        random = np.random.default_rng(seed)
        self.work, self.idle = random.uniform(0.5, 3.0, 2), random.uniform(0.05, 1.5, 2)
        self.limits, self.total = random.uniform(1.0, 3.5, 2), random.uniform(2.0, 6.0) if coupled else inf
        self.measured: list[Setting] = []

    def __call__(self, setting: Setting) -> float:
        self.measured.append(setting)
        clocks = np.array([(value or 1980) / 1980 for value in setting.values()])
        if (1 / clocks > self.limits).any() or (1 / clocks).sum() > self.total:
            return inf
        return float((self.work * clocks**2 + self.idle / clocks).sum())


@pytest.mark.parametrize("coupled", [False, True])
def test_cheapest_clocks_are_those_of_all_combinations_within_a_step(coupled: bool) -> None:
    loads = []
    for seed in range(40):
        law, every = Law(seed, coupled), Law(seed, coupled)
        found = cheapest(AXES, law)
        costs = {pair: every(dict(zip(AXES, pair, strict=True))) for pair in itertools.product(CLOCKS, CLOCKS)}
        best = min(costs, key=lambda pair: costs[pair])
        if not found:
            assert costs[best] == inf or costs[None, None] == inf
            continue
        steps = [abs(CLOCKS.index(a) - CLOCKS.index(b)) for a, b in zip(found[0].values(), best, strict=True)]
        assert max(steps) <= 1, (seed, found[0], best)
        loads.append(len(law.measured))
        assert len(law.measured) == len({*map(str, law.measured)})
    assert np.median(loads) < 20 < len(CLOCKS) ** 2  # of 64


def test_noise_between_neighbours_does_not_end_the_search() -> None:
    random = np.random.default_rng(4)
    far = 0
    for seed in range(30):
        law = Law(seed, coupled=False)
        law.limits = np.array([9.0, 9.0])
        found = cheapest(AXES, lambda setting, law=law: law(setting) * random.normal(1, 0.005))[0]
        costs = {pair: law(dict(zip(AXES, pair, strict=True))) for pair in itertools.product(CLOCKS, CLOCKS)}
        far += law(found) > 1.03 * min(costs.values())
    assert far <= 3


def test_setting_slower_everywhere_than_one_that_missed_is_not_measured() -> None:
    seen: list[Setting] = []

    def cost(setting: Setting) -> float:
        seen.append(setting)
        clock, cap = setting["single_clock"] or 1980, setting["single_power_cap"] or 700
        return clock * cap if clock >= 1400 and cap >= 400 else inf

    values = axes(
        {"single_clock": [900, 1400, 1980], "single_power_cap": [300, 400, 500]},
        dict.fromkeys(("single_clock", "single_power_cap")),
    )
    assert values == {"single_clock": [900, 1400, 1980, None], "single_power_cap": [300, 400, 500, None]}
    assert cheapest(values, cost)[0] == {"single_clock": 1400, "single_power_cap": 400}
    assert len(seen) <= 10  # of 16


def test_fastest_setting_that_misses_ends_it_and_time_that_is_up_leaves_what_is_known() -> None:
    assert cheapest(AXES, lambda setting: inf) == []
    assert cheapest(AXES, lambda setting: None) == []
    law = Law(1, coupled=False)
    law.limits = np.array([9.0, 9.0])
    found = cheapest(AXES, lambda setting: law(setting) if len(law.measured) < 3 else None)
    assert len(found) == 3 and law(found[0]) == min(map(law, found))


def test_setting_whose_clock_did_not_hold_says_nothing_of_slower_ones() -> None:
    def cost(setting: Setting) -> float:
        clock = setting["single_clock"] or 1980
        return nan if clock == 1800 else float(clock)

    assert cheapest({"single_clock": [900, 1800, None]}, lambda setting: nan) == []
    values = {"single_clock": [900, 1200, 1500, 1800, None]}
    found = cheapest(values, cost)
    assert found[0] == {"single_clock": 900} and {"single_clock": 1800} not in found
