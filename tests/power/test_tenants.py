"""Processes of others on the GPUs while a load runs; NVML is the fake one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdbench.power.tenants import Cores, cores_contended, cores_used
from tests.support.fake_nvml import child

CODE = """
import os

from pdbench.config import PowerConfig
from pdbench.host import LocalHost
from pdbench.records import Clock
from pdbench.serving.deployment import ServerInfo
from pdbench.site import Measurement

server = ServerInfo(name="single", role="single", url="", gpus=[0], pids=[os.getpid()])
if BEFORE:
    os.environ["FAKE_NVML_PROCESSES"] = f"0:4240 0:{os.getpid()} 1:4243"
measurement = Measurement([(LocalHost(), [server])], PowerConfig(), Clock.start())
with measurement:
    os.environ["FAKE_NVML_PROCESSES"] = f"0:4241 0:{os.getpid()} 0:4242 1:4243"
for flag in measurement.flags():
    print(flag.name, flag.detail)
"""


def test_process_that_was_there_before_the_load_is_named(nvml_library: Path) -> None:
    printed = child(nvml_library, "BEFORE = True" + CODE, gpus="2").splitlines()
    assert [line.split(", none of")[0] for line in printed] == [
        "gpu-shared-midway gpu0: process 4240",
        "gpu-shared-midway gpu0: process 4241",
        "gpu-shared-midway gpu0: process 4242",
    ]


def test_process_that_comes_to_a_servers_gpu_is_named_with_its_instant(nvml_library: Path) -> None:
    printed = child(nvml_library, "BEFORE = False" + CODE, gpus="2", processes="0:4241").splitlines()
    assert len(printed) == 1  # not who was there under a foreign id, not the server's own, not who is on another GPU
    assert re.match(
        r"gpu-shared-midway gpu0: process 4242, none of the servers', computed there \d+ s after the run began: ",
        printed[0],
    )


def test_multi_process_service_is_nobody_else(nvml_library: Path, tmp_path: Path) -> None:
    code = "from pdbench.power.tenants import in_use\nfor flag in in_use([0]): print(flag.detail)"
    server = shutil.copy(shutil.which("sleep") or "", tmp_path / "nvidia-cuda-mps-server")
    with subprocess.Popen([server, "60"]) as process:
        printed = child(nvml_library, code, gpus="1", processes=f"0:{process.pid} 0:4242")
        process.kill()
    assert printed.startswith("gpu0: other processes (1) hold")


def test_cores_used_counts_descendants_also_when_they_have_ended() -> None:
    before = cores_used(())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    after = cores_used(())
    assert 0.25 < after.own - before.own < 5 and after.total > before.total


def test_work_of_virtual_machines_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's list has a guest's time in `user` (800) and in `guest` (700); in hundredths of a second."""
    (tmp_path / "stat").write_text("cpu 800 0 100 1000 50 0 0 30 700 0\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    used = cores_used(())
    assert (used.total, used.idle, used.steal) == pytest.approx((19.8, 10.5, 0.3))


@pytest.mark.parametrize(
    ("idle", "own", "flagged"),
    [
        (0.05, 0.6, True),
        (0.05, 0.9, False),  # ours
        (0.3, 0.2, False),  # there was room for all
    ],
)
def test_others_at_work_on_full_cores_are_flagged(idle: float, own: float, flagged: bool) -> None:
    before, seconds = Cores(1000.0, 100.0, 1.0, 50.0), 20.0 * (psutil.cpu_count() or 1)
    after = Cores(1000.0 + seconds, 100.0 + idle * seconds, 1.0, 50.0 + own * seconds)
    assert [flag.name for flag in cores_contended(before, after)] == ["host-busy"] * flagged
    assert not [*cores_contended(before, Cores(1001.0, 100.0, 1.0, 50.0))]  # too short to tell
