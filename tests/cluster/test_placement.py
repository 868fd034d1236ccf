"""What a deployment asks of a cluster, and clocks that are joined: pure functions."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pdbench.cluster.clocks import NodeClock, identity, move_request
from pdbench.cluster.measuring import check
from pdbench.cluster.placement import Node, group, pins
from pdbench.config import ClusterConfig, LoadConfig, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.records import RequestRecord
from pdbench.serving.plan import ServerSpec, servers

NODES = [Node("a" * 8, "10.0.0.1", "one", 8, 8), Node("b" * 8, "10.0.0.2", "two", 8, 8)]


def test_every_server_has_its_own_ports_and_the_proxy_comes_last() -> None:
    made = servers("disaggregated", ServeConfig(prefill_instances=2, decode_instances=3, tensor_parallel=2))
    assert [seat.name for seat in made] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "proxy"]
    assert len({seat.port for seat in made}) == len(made)
    assert [seat.kv_port for seat in made[:5]] == [14579, 14581, 14583, 14585, 14587]
    assert [seat.width for seat in made] == [2] * 5 + [0]
    assert [seat.role for seat in servers("replicas", ServeConfig())] == ["replica", "replica", "proxy"]


def test_a_role_is_pinned_by_address_or_host_name() -> None:
    made = servers("disaggregated", ServeConfig())
    pinned = pins(("prefill=10.0.0.1", "decode-0=two"), NODES)
    bundles, strategy = group(made, (), pinned, on_gpu=True)
    assert bundles == [
        {"CPU": 1.0, "GPU": 1.0, "node:10.0.0.1": 0.001},
        {"CPU": 1.0, "GPU": 1.0, "node:10.0.0.2": 0.001},
    ]
    assert strategy == "PACK"


@pytest.mark.parametrize(("place", "strategy"), [("same-node", "STRICT_PACK"), ("spread", "SPREAD")])
def test_words_for_all_roles_choose_the_strategy(place: str, strategy: str) -> None:
    assert group([ServerSpec("single", 0, 8000, 1)], (place,), {}, on_gpu=False) == ([{"CPU": 1.0}], strategy)


@pytest.mark.parametrize("place", ["nowhere", "prefill=10.9.9.9", "cook=10.0.0.1", "prefill"])
def test_what_cannot_be_read_is_named(place: str) -> None:
    with pytest.raises(UserError, match=r"10\.9\.9\.9|--place"):
        pins((place,), NODES)


def test_two_words_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude"):
        pins(("same-node", "spread"), NODES)


@pytest.mark.parametrize("option", ["prefill_clock", "single_power_cap"])
def test_clocks_and_caps_are_refused_before_anything_starts(option: str) -> None:
    cluster: Any = SimpleNamespace(config=ClusterConfig(cluster="auto"), head=NODES[0])
    check(cluster, LoadConfig(), PowerConfig())
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} .*leave it out with --cluster"):
        check(cluster, LoadConfig(), PowerConfig(**{option: 900}))  # type: ignore[arg-type]


def test_an_offset_is_found_within_its_uncertainty_though_clock_drifts_and_ways_are_uneven() -> None:
    draw = random.Random(3)

    def node_reads(head_s: float) -> float:
        return (head_s - 5000.0) * (1 + 40e-6)

    clock = NodeClock()
    for beat in range(120):
        for _ in range(4):
            there_s, back_s = draw.expovariate(1 / 400e-6), draw.expovariate(1 / 200e-6)
            sent_s = 9000.0 + beat
            clock.add(sent_s, node_reads(sent_s + there_s), sent_s + there_s + back_s)
    uncertainty_s = clock.uncertainty_s
    assert uncertainty_s is not None and 0 < uncertainty_s < 1e-3
    for head_s in (9001.0, 9033.3, 9060.0, 9118.0):
        node_s = node_reads(head_s)
        assert abs(node_s + clock.offset_s(node_s) - head_s) <= uncertainty_s + 4e-6 * 40
    assert clock.facts()["drift_us_per_s"] == pytest.approx(-40, abs=15)


def test_the_same_clock_needs_no_estimate_and_an_unknown_one_has_no_uncertainty() -> None:
    assert identity() == identity() != ""
    same = NodeClock(same=True)
    same.add(0.0, 5.0, 1.0)
    assert same.offset_s(3.0) == 0.0 and same.uncertainty_s == 0.0
    assert NodeClock().uncertainty_s is None


def test_a_moved_request_keeps_its_durations_and_its_unknowns() -> None:
    request = RequestRecord(
        id="r", planned_s=1.0, sent_s=1.5, token_s=[2.0, 2.5], phases={"queue": (1.6, 1.7), "decode": None}
    )
    moved = move_request(request, lambda instant: instant + 10)
    assert (moved.planned_s, moved.sent_s, moved.token_s, moved.end_s) == (11.0, 11.5, [12.0, 12.5], None)
    assert moved.phases == {"queue": (11.6, 11.7), "decode": None}
