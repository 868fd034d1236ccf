"""Where servers go in a cluster: pure functions."""

import pytest

from pdbench.cluster.placement import Node, group, pins
from pdbench.cluster.site import RaySite, refuse_locked_clocks
from pdbench.config import LoadConfig, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.serving.plan import ServerSpec, servers

NODES = [Node("a" * 8, "10.0.0.1", "one", 8, 8), Node("b" * 8, "10.0.0.2", "two", 8, 8)]


def test_role_is_pinned_by_address_or_host_name() -> None:
    specs = servers("disaggregated", ServeConfig())
    pinned = pins(("prefill=10.0.0.1", "decode-0=two"), NODES)
    bundles, strategy = group(specs, (), pinned, on_gpu=True)
    assert bundles == {
        "prefill-0": {"CPU": 1.0, "GPU": 1.0, "node:10.0.0.1": 0.001},
        "decode-0": {"CPU": 1.0, "GPU": 1.0, "node:10.0.0.2": 0.001},
    }
    assert strategy == "PACK"


def test_pin_of_a_server_that_is_not_there_is_refused_unless_its_role_is_another_deployments() -> None:
    pinned = pins(("prefill-7=one",), NODES)
    with pytest.raises(UserError, match=r"--place prefill-7=\.\.\.: there is no such server, only prefill-0, decode-0"):
        group(servers("disaggregated", ServeConfig()), (), pinned, on_gpu=True)
    assert group([ServerSpec("single", 0, 8000, 1)], (), pinned, on_gpu=False)[0] == {"single-0": {"CPU": 1.0}}


def test_one_request_at_a_time_comes_from_one_of_several_client_nodes() -> None:
    site = RaySite.__new__(RaySite)
    site._client_nodes = NODES
    site.check_load(LoadConfig(concurrency=1))
    site.check_load(LoadConfig(rate=1.0))
    processes = [site._on_client_nodes(load).client_processes for load in (LoadConfig(), LoadConfig(rate=1.0))]
    assert processes == [1, 2]


@pytest.mark.parametrize(("place", "strategy"), [("same-node", "STRICT_PACK"), ("spread", "SPREAD")])
def test_place_of_all_roles_chooses_the_strategy(place: str, strategy: str) -> None:
    specs = [ServerSpec("single", 0, 8000, 1)]
    assert group(specs, (place,), {}, on_gpu=False) == ({"single-0": {"CPU": 1.0}}, strategy)


@pytest.mark.parametrize("place", ["nowhere", "prefill=10.9.9.9", "cook=10.0.0.1", "prefill"])
def test_place_that_cannot_be_read_is_named(place: str) -> None:
    with pytest.raises(UserError, match=r"10\.9\.9\.9|--place"):
        pins((place,), NODES)


def test_places_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="exclude"):
        pins(("same-node", "spread"), NODES)


@pytest.mark.parametrize("option", ["prefill_clock", "single_power_cap"])
def test_clocks_and_caps_are_refused_before_anything_starts(option: str) -> None:
    refuse_locked_clocks(PowerConfig())
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} .*leave it out with --cluster"):
        refuse_locked_clocks(PowerConfig(**{option: 900}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "kinds"), [(0, ["single", "disaggregated"]), (2, ["single", "replicas", "disaggregated"])]
)
def test_default_deployments_are_by_the_clusters_gpus(gpus: int, kinds: list[str]) -> None:
    """Those of its nodes: the host on which pdbench runs may have none."""
    cluster = object.__new__(RaySite)  # its constructor wants a cluster
    cluster.nodes = [Node("a" * 8, "10.0.0.1", "one", 8, 0), Node("b" * 8, "10.0.0.2", "two", 8, gpus)]
    assert cluster.kinds() == kinds


@pytest.mark.parametrize("role", ["prefill", "decode", "single"])
def test_gpus_that_an_option_names_are_refused_with_a_cluster(role: str) -> None:
    """Ray gives every instance its GPUs, and the option had been ignored."""
    cluster = object.__new__(RaySite)
    with pytest.raises(UserError, match=rf"--{role}-gpus names GPUs of one host, .*leave it out"):
        cluster.deployment("single", ServeConfig(**{f"{role}_gpus": (0,)}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"--{role}-gpus"):
        cluster.check_gpus(ServeConfig(**{f"{role}_gpus": (0,)}), running=True)  # type: ignore[arg-type]
