"""The proxy's choices in simulated time, for each of its policies."""

import random
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from pdbench.config import LoadConfig, Policy
from pdbench.plan.demand import demand_of_load
from pdbench.plan.policies import Affinity, InTurn, LeastWork, beginnings
from pdbench.plan.simulate import simulate
from pdbench.planning import CALIBRATION, plan
from tests.plan.test_predict import calibration
from tests.plan.test_prefixes import contexts
from tests.plan.test_simulate import engine, of_kind


@pytest.mark.parametrize("by_tokens", [True, False], ids=["tokens", "requests"])
def test_least_loaded_of_many_is_the_next_in_turn(by_tokens: bool) -> None:
    generator = random.Random(1)
    chooser = LeastWork(100, generator, by_tokens=by_tokens)
    loads, turn = [(0, 0)] * 100, chooser.turn
    for _ in range(2000):
        least = min(range(100), key=lambda index: (loads[index], (index - turn) % 100))
        assert chooser.choose(None) == least
        turn = (turn + 1) % 100
        index, sign = (least, 1) if generator.random() < 0.8 else (generator.randrange(100), -1)
        if sign < 0 and not loads[index][1]:
            continue
        tokens = 100
        chooser.count(index, sign, sign * tokens)
        change = (tokens, 1) if by_tokens else (1, tokens)
        loads[index] = loads[index][0] + sign * change[0], loads[index][1] + sign * change[1]


def test_in_turn_every_instance_gets_as_many() -> None:
    chooser = InTurn(3, random.Random(1))
    assert set(Counter(chooser.choose(None) for _ in range(30)).values()) == {10}


def test_prompts_that_begin_alike_stay_together_until_their_instance_has_twice_the_mean() -> None:
    chooser = Affinity(4, random.Random(1))
    homes = [chooser.choose(begin) for begin in range(400)]
    assert homes == [chooser.choose(begin) for begin in range(400)] and min(Counter(homes).values()) > 60
    placed = []
    for _ in range(12):
        placed.append(chooser.choose("one"))
        chooser.count(placed[-1], 1, 100)
    # With n of n requests there, the next is sent elsewhere as soon as n > 2 n / 4 + 1.
    assert placed[:3] == [placed[0]] * 3 and placed[3] != placed[0]
    assert max(Counter(placed).values()) <= 2 * 12 / 4 + 2


@pytest.mark.parametrize(("tokens", "alike"), [(640, True), (64, False)])
def test_prompts_begin_alike_that_share_what_the_proxy_looks_at(tokens: int, alike: bool) -> None:
    begins = beginnings(contexts(5, 2, tokens))
    assert (begins[:5] == begins[5:]) == alike and len({*begins[:5]}) == 5
    assert [*beginnings(demand_of_load(LoadConfig(rate=1.0, requests=3, input_tokens=90), 0))] == [0, 1, 2]


def test_affinity_finds_prefixes_that_least_work_spreads() -> None:
    """40 contexts that a cache has room for a third of, five times each, on four replicas."""
    own = engine(max_num_batched_tokens=8192, kv_cache_tokens=110_000)
    load = contexts(40, 5, 6912)
    cached = {}
    for policy in ("least-work", "round-robin", "prefix-affinity"):
        deployment = msgspec.structs.replace(of_kind("replicas", own), decode_policy=policy)
        cached[policy] = int(simulate(deployment, load).cached_tokens.sum())
    assert cached["prefix-affinity"] > 2 * max(cached["least-work"], cached["round-robin"])


@pytest.mark.parametrize("policy", ["round-robin", "prefix-affinity"])
def test_a_policy_that_was_asked_for_stands_beside_the_load(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration()))
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500)
    plan([tmp_path], (), ["2p1d"], load, tmp_path, Console(quiet=True), prefill_policy=policy)
    assert f", --prefill-policy {policy}\n" in (tmp_path / "plan.md").read_text()
    saved = msgspec.json.decode((tmp_path / CALIBRATION).read_bytes())
    assert saved["prefill_policy"] == "least-work", "it says what was measured"
    assert np.isfinite(
        msgspec.json.decode((tmp_path / "predictions.json").read_bytes())[0]["figures"]["e2e_p50_ms"]["value"]
    )
