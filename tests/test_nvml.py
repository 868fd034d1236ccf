"""The GPU inventory over the scripted NVML: what machine.py, doctor and the cluster know of a host's GPUs; calls of it that may hang."""

import errno
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pdbench import nvml
from tests.support.fake_nvml import child

INVENTORY = """
import dataclasses, json
from pdbench import nvml
from pdbench.serving import machine
print(json.dumps({"gpus": [dataclasses.asdict(gpu) for gpu in nvml.gpus()], "facts": machine.host_facts()}))
"""


def inventory(library: Path, **settings: str) -> Any:
    return json.loads(child(library, INVENTORY, **settings))


def test_inventory_has_name_driver_memory_and_uuid(nvml_library: Path) -> None:
    found = inventory(nvml_library, gpus="2")
    assert found["gpus"][1] == {
        "index": 1,
        "name": "Scripted GPU",
        "driver": "580.0",
        "memory_total_mib": 141 * 1024.0,
        "memory_used_mib": 64 * 1024.0,
        "uuid": "GPU-1f00",
    }
    assert found["facts"]["driver"] == "580.0"
    assert found["facts"]["gpus"][0] == {
        "index": 0,
        "name": "Scripted GPU",
        "memory_mib": 141 * 1024.0,
        "uuid": found["gpus"][0]["uuid"],
    }


def test_gpu_whose_memory_is_not_reported_is_in_the_inventory(nvml_library: Path) -> None:
    first, second = inventory(nvml_library, gpus="2", fail="0:DeviceGetMemoryInfo:3")["gpus"]
    assert (first["memory_total_mib"], second["memory_total_mib"]) == (None, 141 * 1024.0)


def test_lost_gpu_hides_no_other(nvml_library: Path) -> None:
    found = inventory(nvml_library, gpus="3", fail="0:*:15", links="switch:18")
    assert [gpu["index"] for gpu in found["gpus"]] == [1, 2] and found["facts"]["gpu_links"] == {"1-2": "NV18"}


def test_facts_say_whether_several_processes_compute_at_once(nvml_library: Path, tmp_path: Path) -> None:
    assert inventory(nvml_library)["facts"]["mps"] is False
    daemon = shutil.copy(shutil.which("sleep") or "", tmp_path / "nvidia-cuda-mps-control")
    with subprocess.Popen([daemon, "60"]) as process:
        assert inventory(nvml_library)["facts"]["mps"] is True
        process.kill()


def test_host_without_driver_has_no_gpus(nvml_library: Path) -> None:
    found = inventory(nvml_library, fail="-2:Init:9")
    assert found["gpus"] == found["facts"]["gpus"] == []
    assert found["facts"]["gpu_links"] == {} and found["facts"]["driver"] is None
    assert found["facts"]["mps"] is None


@pytest.mark.parametrize(
    ("settings", "links"),
    [
        ({"links": "switch:18"}, {"0-1": "NV18", "0-2": "NV18", "1-2": "NV18"}),
        ({"links": "0-1:4 1-2:2"}, {"0-1": "NV4", "0-2": "SYS", "1-2": "NV2"}),
        ({"topology": "10"}, {"0-1": "PIX", "0-2": "PIX", "1-2": "PIX"}),
        ({"topology": "30"}, {"0-1": "PHB", "0-2": "PHB", "1-2": "PHB"}),
        ({"links": "switch:18", "fail": "-1:DeviceGetNvLinkState:3"}, {"0-1": "SYS", "0-2": "SYS", "1-2": "SYS"}),
        ({"fail": "-1:DeviceGetTopologyCommonAncestor:3"}, {}),
    ],
    ids=["nvswitch", "direct nvlink", "pcie switch", "host bridge", "no nvlink", "unknown"],
)
def test_links_are_named_as_in_nvidia_smi_topo(
    settings: dict[str, str], links: dict[str, str], nvml_library: Path
) -> None:
    assert inventory(nvml_library, gpus="3", **settings)["facts"]["gpu_links"] == links


def test_call_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(nvml, "ANSWER_S", 0.05)
    with pytest.raises(nvml.GpuError, match=r"did not answer within 0\.05 s"):
        nvml.bounded(held.wait)()
    held.set()


def test_time_out_of_the_library_itself_is_no_hang() -> None:
    """A library's ETIMEDOUT had read as a driver that did not answer within 20 s."""

    def refused() -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        nvml.bounded(refused)()
