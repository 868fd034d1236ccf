"""Clocks and power limits over a scripted NVML whose locks are shared by processes: set, read back, always given back."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.power.clocks import ClockLock, check, clock_flags
from pdbench.records import DeviceRecord, DeviceSample
from tests.support.fake_nvml import child, environment

READ = "from pdbench import nvml; print(nvml.sm_clock_mhz(0), nvml.power_limit_w(0), nvml.sm_clock_mhz(1))"
FREE = "1980 700.0 1980"
HOLD = """
import sys, time
from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.power.clocks import locked_clocks
config = PowerConfig(prefill_clock=1200, prefill_power_cap=400, decode_clock=1950)
try:
    with locked_clocks(config, {"prefill": [0], "decode": [1]}) as locks:
        print(*[(lock.clock_mhz, lock.power_cap_w) for lock in locks], flush=True)
        {inside}
except (UserError, ValueError) as error:
    print(error)
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    return {"gpus": "2", "state": str(tmp_path / "state"), "clamp_mhz": "1830"}


def hold(inside: str) -> str:
    return HOLD.replace("{inside}", inside)


def test_clocks_are_set_read_back_and_restored(nvml_library: Path, settings: dict[str, str]) -> None:
    lines = child(nvml_library, hold(READ), **settings).splitlines()
    assert lines == ["(1200, 400.0) (1830, None)", "1200 400.0 1830"]
    assert child(nvml_library, READ, **settings).strip() == FREE


def test_clocks_are_restored_after_an_exception(nvml_library: Path, settings: dict[str, str]) -> None:
    assert "load broke" in child(nvml_library, hold("raise ValueError('load broke')"), **settings)
    assert child(nvml_library, READ, **settings).strip() == FREE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_clocks_are_restored_after_a_signal(
    nvml_library: Path, settings: dict[str, str], number: signal.Signals
) -> None:
    command = [sys.executable, "-c", hold("time.sleep(120)")]
    with subprocess.Popen(
        command,
        env=environment(nvml_library, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores SIGINT, and hands that down to these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stdout and run.stdout.readline()
        assert child(nvml_library, READ, **settings).strip() == "1200 400.0 1830"
        run.send_signal(number)
        run.wait(30)
    end = time.monotonic() + 60
    while child(nvml_library, READ, **settings).strip() != FREE:
        assert time.monotonic() < end, "nothing restored them"


def test_clocks_are_restored_when_their_child_was_killed(nvml_library: Path, settings: dict[str, str]) -> None:
    kill = "import psutil; [child.kill() for child in psutil.Process().children()]"
    assert "1200" in child(nvml_library, hold(kill), **settings)
    assert child(nvml_library, READ, **settings).strip() == FREE


def test_clocks_without_permission_are_refused_before_the_run(nvml_library: Path, settings: dict[str, str]) -> None:
    refused = "-1:DeviceSetGpuLockedClocks:4 -1:DeviceSetPowerManagementLimit:4 -1:DeviceResetGpuLockedClocks:4"
    output = child(nvml_library, hold("print('ran')"), fail=refused, **settings)
    assert output == "GPU 0: clocks and power caps need root: use sudo, or leave those options out\n"


def test_power_cap_out_of_range_names_the_range(nvml_library: Path, settings: dict[str, str]) -> None:
    code = hold("print('ran')").replace("prefill_power_cap=400", "prefill_power_cap=9000")
    assert "from 200 to 700 W" in child(nvml_library, code, **settings)
    assert child(nvml_library, READ, **settings).strip() == FREE


def test_clocks_without_options_are_not_touched() -> None:
    code = "from pdbench.config import PowerConfig; from pdbench.power.clocks import locked_clocks\n"
    code += "with locked_clocks(PowerConfig(), {'prefill': [0]}) as locks: print(locks)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_clock_options_of_missing_roles_are_refused() -> None:
    used = [{"prefill": [0], "decode": [1]}, {"single": []}]
    check(PowerConfig(decode_clock=900), used)
    check(PowerConfig(single_clock=900), [*used, {"replica": [0, 1]}])
    with pytest.raises(
        UserError, match=r"--single-power-cap 300: no single server .* --decode-power-cap sets the GPUs"
    ):
        check(PowerConfig(single_power_cap=300), used)


def test_clamped_clock_is_flagged_when_set_and_under_load() -> None:
    lock = ClockLock(
        role="decode", index=1, requested_clock_mhz=1950, clock_mhz=1830, requested_power_cap_w=None, power_cap_w=None
    )
    device = DeviceRecord(
        id="gpu1",
        kind="gpu",
        name="G",
        role="decode",
        index=1,
        samples=[DeviceSample(t_s=float(i), sm_clock_mhz=1700.0, gpu_utilization_pct=90.0) for i in range(5)],
    )
    assert [flag.name for flag in clock_flags([lock], [device])] == ["clock-clamped", "clock-not-held"]
