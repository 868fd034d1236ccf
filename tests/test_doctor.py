"""What `pdbench doctor` finds on machines and clusters that are given to it."""

import dataclasses
from typing import Any

import pytest

from pdbench import doctor, nvml
from pdbench.cluster.placement import Node
from pdbench.config import Connector, ServeConfig
from pdbench.doctor import NodeFacts
from pdbench.errors import UserError
from pdbench.serving import machine
from pdbench.site import Site
from tests.support.processes import free_port


def test_gpu_without_reported_memory_is_a_gpu() -> None:
    first, second = nvml.Gpu(0, "GB10", "580.95", None, None), nvml.Gpu(1, "H200", "580.95", 143771.0, 4.0)
    here = dataclasses.replace(machine.inspect(), gpus=(first, second), vllm_text="0.32")
    assert any("does not report its memory" in finding.text for finding in doctor.examine(ServeConfig(), here))


def test_gpus_that_a_run_would_take_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    gpus = tuple(nvml.Gpu(index, "H200", "580", 1000.0, 900.0 if index in (1, 2) else 0.0) for index in range(3))
    here = machine.Machine("0.32.0", gpus)
    findings = [finding for finding in doctor.examine(ServeConfig(), here) if finding.section == "Servers start"]
    states = {finding.text[:5]: finding.state for finding in findings}
    assert [states[f"GPU {index}"] for index in range(3)] == [doctor.FINE, doctor.WRONG, doctor.NOTE]


def test_one_gpu_is_enough_for_what_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, doctor):
        monkeypatch.setattr(module, "installed_version", lambda name: None)
    here = machine.Machine("0.33.0", (nvml.Gpu(3, "L4", "580", 1000.0, 0.0),))
    findings = [*doctor.examine(ServeConfig(), here)]
    assert [finding.text for finding in findings if finding.state == doctor.WRONG and "GPU" in finding.text] == []
    assert "`pdbench run --prefill-gpus 3 --decode-gpus 3` compares them" in (findings[0].remedy or "")
    assert any(finding.text.startswith("connector tcp") for finding in findings)


@pytest.mark.parametrize(
    ("connector", "package"),
    [("nixl", "nixl"), ("nixl-push", "nixl"), ("mooncake", "mooncake-transfer-engine-cuda13")],
    ids=str,
)
def test_missing_kv_library_is_found_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, connector: Connector, package: str
) -> None:
    here, config = machine.Machine("0.32.0", (), lacks=frozenset({connector})), ServeConfig(connector=connector)
    monkeypatch.setattr(machine, "installed_version", lambda name: "0.32.0")
    wrong = [finding.text for finding in doctor.examine(config, here) if finding.state == doctor.WRONG]
    assert any(f"pip install {package}, or use --connector auto" in text for text in wrong)
    with pytest.raises(UserError, match=f"connector {connector} needs the package {package}"):
        Site(here).deployment("disaggregated", config)


def test_kv_port_is_looked_for_at_this_hosts_address_in_a_network() -> None:
    port = free_port()
    findings = [*doctor.examine(ServeConfig(kv_ip="127.0.0.0/8", kv_port=port), machine.Machine("0.33.0", ()))]
    assert (doctor.FINE, f"KV port 127.0.0.1:{port}: free") in [(finding.state, finding.text) for finding in findings]


def test_mig_slice_is_wrong_and_no_reason_to_serve_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, doctor):
        monkeypatch.setattr(module, "installed_version", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7d0b1c")
    findings = [*doctor.examine(ServeConfig(), machine.Machine("0.33.0", ()))]
    assert not any("CPU" in finding.text for finding in findings if finding.section == "Servers start")
    (wrong,) = [each.text for each in findings if each.state == doctor.WRONG and each.section == "Servers start"]
    assert "names MIG slices" in wrong and "nvidia-smi -mig 0" in wrong and len(wrong.splitlines()) == 1


def node(address: str, gpus: int = 0, **changes: Any) -> NodeFacts:
    facts = {"gpus": [], "niceness": 0, "versions": {"vllm": "0.32.0", "torch": "2.9"}}
    clock = {"uncertainty_ms": 0.2}
    return dataclasses.replace(
        NodeFacts(Node("id", address, "name", 8, gpus), False, facts, clock, {8000: None}), **changes
    )


def test_cluster_that_is_whole_has_nothing_to_fix() -> None:
    findings = list(doctor.examine_nodes([node("10.0.0.1"), node("10.0.0.2")], {("10.0.0.1", "10.0.0.2"): 2.5e9}))
    assert {finding.state for finding in findings} == {doctor.FINE}
    assert any(finding.text == "10.0.0.1 -> 10.0.0.2: 2,500 MB/s" for finding in findings)


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"gpus": 2}, doctor.WRONG, "10.0.0.2 has 0 GPUs and Ray knows 2"),
        ({"clock": {"uncertainty_ms": 3.0}}, doctor.NOTE, "10.0.0.2 clock against the head's: +-3.00 ms"),
        ({"clock": {"uncertainty_ms": None}}, doctor.NOTE, "10.0.0.2 clock against the head's: unknown"),
        ({"ports": {8000: "nginx"}}, doctor.WRONG, "10.0.0.2:8000 is taken by nginx"),
        (
            {"facts": {"gpus": [], "niceness": 15, "versions": {"vllm": "0.31.0", "torch": "2.9"}}},
            doctor.WRONG,
            "vllm differs: 10.0.0.1 0.32.0, 10.0.0.2 0.31.0",
        ),
        (
            {"facts": {"gpus": [], "niceness": 15, "versions": {"vllm": "0.32.0", "torch": None}}},
            doctor.NOTE,
            "servers on 10.0.0.2 would run at niceness 15",
        ),
    ],
)
def test_fault_of_a_node_is_found(changes: dict[str, Any], state: str, text: str) -> None:
    findings = doctor.examine_nodes([node("10.0.0.1"), node("10.0.0.2", **changes)], {})
    assert (state, text) in [(finding.state, finding.text) for finding in findings]


def test_link_that_nothing_crosses_is_wrong() -> None:
    (finding,) = (
        finding
        for finding in doctor.examine_nodes([node("10.0.0.1")], {("10.0.0.1", "10.0.0.2"): "TimeoutError: timed out"})
        if finding.state == doctor.WRONG
    )
    assert finding.text == "10.0.0.1 -> 10.0.0.2: TimeoutError: timed out"
    assert "firewall" in (finding.remedy or "")
