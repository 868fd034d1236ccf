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
from tests.support.fake_nvml import build, child, environment

READ = "from pdbench import nvml; print(nvml.sm_clock_mhz(0), nvml.power_limit_w(0), nvml.sm_clock_mhz(1))"
FREE = "1980 700.0 1980"
HOLD = """
import sys, time
from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.power.clocks import locked_clocks
config = PowerConfig(prefill_clock=1200, prefill_power_cap=400, decode_clock=1950)
try:
    with locked_clocks(config, {"prefill": [0], "decode": [1]}) as holds:
        print(*[(hold.clock_mhz, hold.power_cap_w) for hold in holds], flush=True)
        {inside}
except (UserError, ValueError) as error:
    print(error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    return {"gpus": "2", "state": str(tmp_path / "state"), "clamp_mhz": "1830"}


def hold(inside: str) -> str:
    return HOLD.replace("{inside}", inside)


def test_clocks_are_set_read_back_and_given_back(library: Path, settings: dict[str, str]) -> None:
    lines = child(library, hold(READ), **settings).splitlines()
    assert lines == ["(1200, 400.0) (1830, None)", "1200 400.0 1830"]
    assert child(library, READ, **settings).strip() == FREE


def test_an_exception_gives_the_clocks_back(library: Path, settings: dict[str, str]) -> None:
    assert "load broke" in child(library, hold("raise ValueError('load broke')"), **settings)
    assert child(library, READ, **settings).strip() == FREE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_gives_the_clocks_back(library: Path, settings: dict[str, str], number: signal.Signals) -> None:
    command = [sys.executable, "-c", hold("time.sleep(120)")]
    with subprocess.Popen(
        command,
        env=environment(library, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores SIGINT, and hands that down to these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stdout and run.stdout.readline()
        assert child(library, READ, **settings).strip() == "1200 400.0 1830"
        run.send_signal(number)
        run.wait(30)
    end = time.monotonic() + 60
    while child(library, READ, **settings).strip() != FREE:
        assert time.monotonic() < end, "the guard did not restore"


def test_a_killed_guard_does_not_keep_the_clocks(library: Path, settings: dict[str, str]) -> None:
    kill = "import psutil; [one.kill() for one in psutil.Process().children()]"
    assert "1200" in child(library, hold(kill), **settings)
    assert child(library, READ, **settings).strip() == FREE


def test_without_permission_one_line_and_no_run(library: Path, settings: dict[str, str]) -> None:
    refused = "-1:DeviceSetGpuLockedClocks:4 -1:DeviceSetPowerManagementLimit:4 -1:DeviceResetGpuLockedClocks:4"
    told = child(library, hold("print('ran')"), fail=refused, **settings)
    assert told == "GPU 0: clocks and power caps need root: use sudo, or leave those options out\n"


def test_a_power_cap_out_of_range_names_the_range(library: Path, settings: dict[str, str]) -> None:
    code = hold("print('ran')").replace("prefill_power_cap=400", "prefill_power_cap=9000")
    assert "from 200 to 700 W" in child(library, code, **settings)
    assert child(library, READ, **settings).strip() == FREE


def test_without_options_nothing_is_touched() -> None:
    code = "from pdbench.config import PowerConfig; from pdbench.power.clocks import locked_clocks\n"
    code += "with locked_clocks(PowerConfig(), {'prefill': [0]}) as holds: print(holds)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_could_never_be_set_is_refused_beforehand() -> None:
    used = [{"prefill": [0], "decode": [1]}, {"single": []}]
    check(PowerConfig(decode_clock=900), used)
    check(PowerConfig(single_clock=900), [*used, {"replica": [0, 1]}])
    with pytest.raises(UserError, match="--prefill-clock 0 is no clock"):
        check(PowerConfig(prefill_clock=0), used)
    with pytest.raises(
        UserError, match=r"--single-power-cap 300: no single server .* --decode-power-cap sets the GPUs"
    ):
        check(PowerConfig(single_power_cap=300), used)


def test_a_clamp_is_flagged_at_once_and_when_it_shows_only_under_load() -> None:
    one = ClockLock(
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
    assert [flag.name for flag in clock_flags([one], [device])] == ["clock-clamped", "clock-not-held"]
