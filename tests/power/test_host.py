"""RAPL from a sysfs tree of files, amdsmi from a scripted module, CPU use of real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.power.device import ProcessReader, open_rapl
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import DeviceRecord
from tests.support.runs import energy_over


def zone(root: Path, name: str, label: str, energy_uj: int, top_uj: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{top_uj}\n")
    return folder


def test_rapl_reads_packages_and_dram_only(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    found = [(reader.id, reader.kind) for reader in open_rapl(tmp_path)]
    assert found == [("cpu-package-0", "cpu"), ("dram-package-0", "dram")]
    assert open_rapl(tmp_path / "nowhere") == []


def test_rapl_counter_wraps_around(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    [reader] = open_rapl(tmp_path)
    assert reader.read(10.0) == {"energy_j": 0.0}
    (folder / "energy_uj").write_text("995000000")
    assert reader.read(10.5) == {"energy_j": 5.0, "power_w": 10.0}
    (folder / "energy_uj").write_text("15000000")
    assert reader.read(11.5) == {"energy_j": 25.0, "power_w": 20.0}


def test_rapl_that_cannot_be_read_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    [reader] = open_rapl(tmp_path)
    (folder / "energy_uj").unlink()
    assert reader.read(0.0) == {} and "cannot be read" in reader.not_measured["energy_j"]

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    [reader] = open_rapl(zone(tmp_path / "other", "intel-rapl:0", "package-0", 1).parent)
    monkeypatch.setattr(Path, "read_text", refuse)  # the tests may run as root, whom no file refuses
    assert reader.read(0.0) == {} and "root may" in reader.not_measured["device"]


def test_rapl_that_nobody_read_for_longer_than_it_takes_to_wrap_around_starts_again(tmp_path: Path) -> None:
    """A sampler that was stopped for ten minutes: how often 65 kJ went by is not known. It was taken for once, or not at all."""
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, top_uj=65_532_610_987)
    [reader] = open_rapl(tmp_path)
    reader.read(10.0)
    (folder / "energy_uj").write_text("15000000")
    assert reader.read(10.1) == {"energy_j": 10.0, "power_w": pytest.approx(100)}
    (folder / "energy_uj").write_text("20000000000")
    assert reader.read(610.0) == {"energy_j": 0.0}
    (folder / "energy_uj").write_text("20010000000")
    assert reader.read(610.1) == {"energy_j": 10.0, "power_w": pytest.approx(100)}


def test_package_that_cannot_be_read_leaves_no_total_of_the_other_alone(tmp_path: Path) -> None:
    """It was left out in silence: half of the host's energy."""
    for socket in range(2):
        zone(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 5_000_000)
    (tmp_path / "intel-rapl:1" / "max_energy_range_uj").unlink()
    good, bad = open_rapl(tmp_path)
    assert (good.lost, bad.lost) == (False, True) and "cannot be read" in bad.not_measured["energy_j"]


AMDSMI = """
class AmdSmiClkType: GFX, MEM = "gfx", "mem"
class AmdSmiTemperatureType: HOTSPOT = 1
class AmdSmiTemperatureMetric: CURRENT = 0
class AmdSmiMemoryType: VRAM = 0
def amdsmi_init(): pass
def amdsmi_get_processor_handles(): return ["card"]
def amdsmi_get_power_info(card): return {"current_socket_power": 550, "average_socket_power": "N/A"}
def amdsmi_get_energy_count(card): return {"energy_accumulator": 2_000_000, "counter_resolution": 15.3, "timestamp": 1}
def amdsmi_get_clock_info(card, kind): return {"clk": 2100 if kind == "gfx" else 1300, "max_clk": 2100}
def amdsmi_get_gpu_activity(card): return {"gfx_activity": 97, "umc_activity": 40, "mm_activity": "N/A"}
def amdsmi_get_temp_metric(card, kind, metric): raise RuntimeError("AMDSMI_STATUS_NOT_SUPPORTED")
def amdsmi_get_gpu_memory_usage(card, kind): return 2**30
"""


def test_amd_gpu_is_read_through_amdsmi(tmp_path: Path) -> None:
    (tmp_path / "amdsmi.py").write_text(AMDSMI)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from pdbench.power.device import open_gpu
gpu, absent = open_gpu(0, "decode"), open_gpu(1, "decode")
values = gpu.read(0.0)
assert values == {{"power_w": 550.0, "energy_j": 30.6, "sm_clock_mhz": 2100.0, "memory_clock_mhz": 1300.0,
    "gpu_utilization_pct": 97.0, "memory_utilization_pct": 40.0, "memory_used_mib": 1024.0}}, values
assert "NOT_SUPPORTED" in gpu.not_measured["temperature_c"]
assert "does not give" in gpu.not_measured["power_average_w"]
assert absent.lost and "none of index 1" in absent.not_measured["device"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_process_tree_is_measured_without_gpu() -> None:
    spin = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    tree = subprocess.Popen([sys.executable, "-c", spin], start_new_session=True)
    try:
        sampler = Sampler([ProcessReader("decode", [tree.pid]), ProcessReader("gone", [2**22 + 1])], 0.05)
        with sampler:
            while not any(sample.cpu_utilization_pct for device in sampler.latest() for sample in device.samples):
                sampler.idle("bare", 0.2)
        records = {record.role: record for record in merge_records(sampler.take())}
    finally:
        os.killpg(tree.pid, 9)
        tree.wait()
    decode: DeviceRecord = records["decode"]
    # One process spins: late samples must not read as more than its one core (10 % for the clock of the reading).
    assert decode.kind == "process" and 0 < decode.statistics["cpu_utilization_pct"]["avg"] <= 110
    assert decode.statistics["memory_used_mib"]["min"] > 0
    assert "no meter" in decode.not_measured["power_w"]
    assert energy_over(decode, 0, 1).energy_j is None
    assert records["gone"].samples == [] and "no such process" in records["gone"].not_measured["cpu_utilization_pct"]


def test_rapl_zone_that_stands_still_has_no_power_and_says_so(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, top_uj=65_532_610_987)
    [reader] = open_rapl(tmp_path)
    for at_s in (10.0, 10.5, 11.5):
        assert reader.read(at_s) == {"energy_j": 0.0}
    assert "energy_uj stands still" in reader.not_measured["energy_j"]
    (folder / "energy_uj").write_text("25000000")
    assert reader.read(12.0) == {"energy_j": 20.0, "power_w": 10.0}, "all since it last moved"
    assert reader.not_measured == {}


def test_rapl_counter_that_is_set_back_has_not_wrapped_around(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000, top_uj=262_143_328_850)
    [reader] = open_rapl(tmp_path)
    reader.read(10.0)
    (folder / "energy_uj").write_text("905000000")
    assert reader.read(10.1) == {"energy_j": 5.0, "power_w": pytest.approx(50)}
    (folder / "energy_uj").write_text("1000")
    assert reader.read(10.2) == {"energy_j": 0.0}, "else 2.6 MW"
    (folder / "energy_uj").write_text("5001000")
    assert reader.read(10.3) == {"energy_j": 5.0, "power_w": pytest.approx(50)}


def test_energy_over_a_rapl_zone_that_stands_still_is_none(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    sampler = Sampler(open_rapl(tmp_path), 0.02)
    with sampler:
        sampler.idle("bare", 1.5)
    [device] = merge_records(sampler.take())
    window = energy_over(device, device.samples[0].t_s, device.samples[-1].t_s)
    sampled_s = device.samples[-1].t_s - device.samples[0].t_s
    assert window.energy_j is None and window.counter_still_s > 0.9 * sampled_s
