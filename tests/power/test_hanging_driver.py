"""A driver that answers late or never, and a sampler that is stopped: bounded waits, named reasons, no wrong joules."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from pdbench.analysis.device_flags import device_flags
from pdbench.analysis.meter import Meter
from pdbench.records import DeviceRecord
from tests.support.fake_nvml import child, environment, exact_j, sampled, wave_text
from tests.support.runs import energy_over


@pytest.mark.parametrize("function", ["DeviceGetFieldValues", "DeviceGetTotalEnergyConsumption", "DeviceGetSamples"])
def test_call_that_blocks_for_seconds_gives_no_reading(nvml_library: Path, function: str) -> None:
    """Taken at the middle of its call, the counter's value was of an instant 3 s before."""
    settings = {"hang": f"{function}:20.0:6.0", "power_0": wave_text("ramp")}
    [device] = sampled(nvml_library, 60.0, {"decode": [0]}, **settings)
    assert all(sample.read_s is None or sample.read_s < 0.3 for sample in device.samples)
    for window in ((5.0, 50.0), (30.0, 50.0), (3.0, 18.0)):
        assert energy_over(device, *window).energy_j == pytest.approx(exact_j("ramp", *window), rel=0.005)
    inside = energy_over(device, 5.0, 23.0)
    assert inside.energy_j is None or inside.energy_j == pytest.approx(exact_j("ramp", 5.0, 23.0), rel=0.02)
    assert "power-gaps" in [flag.name for flag in device_flags(Meter(device), [(5.0, 50.0)])]


def test_driver_that_hangs_while_sampling_ends_the_sampling_and_is_named(nvml_library: Path) -> None:
    code = """
import msgspec, time
from pdbench.power import sampler
from pdbench.power.device import open_gpu
sampler._HANGS_S = 1.0
one = sampler.Sampler([open_gpu(0, "decode")], 0.05)
with one:
    time.sleep(2.0)
print(msgspec.json.encode(sampler.merge_records(one.take())).decode())
"""
    began_s = time.monotonic()
    text = child(nvml_library, code, clock="real", hang="DeviceGetFieldValues:1.5:60")
    assert time.monotonic() - began_s < 40
    [device] = msgspec.json.decode(text, type=list[DeviceRecord])
    assert "has not answered for" in device.not_measured["device"] and device.samples
    begin_s, end_s = device.samples[0].t_s, device.samples[-1].t_s
    assert energy_over(device, begin_s, end_s + 1.0).energy_j is None


@pytest.mark.parametrize("function", ["DeviceGetCount", "DeviceGetUUID", "Init"])
def test_driver_that_hangs_before_the_run_is_one_clear_line(nvml_library: Path, function: str) -> None:
    code = """
from pdbench import nvml
from pdbench.errors import UserError
from pdbench.power.device import open_host
from pdbench.serving.machine import host_facts, inspect
nvml.ANSWER_S = 0.5
for begin in (inspect, open_host):
    try:
        begin()
    except UserError as error:
        print(error)
assert host_facts()["gpus"] == [] and nvml.computing() == set()
"""
    lines = child(nvml_library, code, clock="real", hang=f"{function}:-1:30").splitlines()
    assert lines == ["the NVIDIA driver did not answer within 0.5 s: `dmesg` may say why (NVRM, Xid)"] * 2


def test_clocks_of_a_driver_that_hangs_are_named(nvml_library: Path, tmp_path: Path) -> None:
    code = """
from pdbench import nvml
from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.power.clocks import locked_clocks
nvml.ANSWER_S = 0.5
try:
    with locked_clocks(PowerConfig(prefill_clock=1200), {"prefill": [0]}):
        print("ran")
except UserError as error:
    print(error)
"""
    settings = {"clock": "real", "hang": "DeviceSetGpuLockedClocks:-1:30", "state": str(tmp_path / "state")}
    assert "did not answer" in child(nvml_library, code, **settings)


def test_sampler_that_was_stopped_for_a_while_has_a_hole_there(nvml_library: Path) -> None:
    code = """
import msgspec, time
from pdbench.power.device import open_gpu
from pdbench.power.sampler import Sampler, merge_records
one = Sampler([open_gpu(0, "decode")], 0.05)
with one:
    print("ready", flush=True)
    time.sleep(9.0)
print(msgspec.json.encode(merge_records(one.take())).decode())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(nvml_library, clock="real"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(process.pid, signal.SIGCONT)
    text, _ = process.communicate(timeout=60)
    [device] = msgspec.json.decode(text, type=list[DeviceRecord])
    begin_s, end_s = device.samples[0].t_s + 0.5, device.samples[-1].t_s - 0.3
    window = energy_over(device, begin_s, end_s)
    assert window.energy_j == pytest.approx(100 * (end_s - begin_s), rel=0.02)
    assert "power-gaps" in [flag.name for flag in device_flags(Meter(device), [(begin_s, end_s)])]
