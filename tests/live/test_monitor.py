"""`pdbench monitor` and `pdbench plot` as a user runs them, over the scripted NVML and on a host without GPUs."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

from pdbench.analysis.meter import with_mean_power
from pdbench.cli import main
from pdbench.live.monitor import as_csv, summary_table
from pdbench.power.sampler import merge_records
from pdbench.records import DeviceRecord, DeviceSample, load_devices
from pdbench.report.commands import read_devices
from tests.support.fake_nvml import environment, sampled, wave_text
from tests.support.processes import run_pdbench
from tests.support.runs import energy_over


def test_monitor_writes_what_plot_draws(nvml_library: Path, tmp_path: Path) -> None:
    saved = tmp_path / "power.json"
    settings = environment(nvml_library, gpus="2", power_1=wave_text("square"))
    done = run_pdbench("monitor", "--gpus", "0,1", "--duration", "2", "--out", saved, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert "power W" in done.stdout and "gpu1" in done.stdout
    gpu0, gpu1, *_ = load_devices(saved)
    assert energy_over(gpu0, 0.5, 1.5).energy_j == pytest.approx(100, rel=0.25)
    assert gpu1.statistics["power_w"]["max"] is not None and gpu1.fine_power
    drawn = run_pdbench("plot", saved, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    pixels = image.imread(tmp_path / "power.png")
    assert pixels.shape[:2] == (1000, 1500) and pixels[..., :3].std() > 0.05


def test_mean_power_of_the_summary_is_that_of_its_joules() -> None:
    """Where every sample meets the same phase of a load; a superchip's module has no counter."""
    samples = [DeviceSample(t_s=i / 10, power_w=339.0, power_average_w=395.0, module_power_w=500.0) for i in range(101)]
    ticks = [(i / 2, 198.0 * i) for i in range(21)]
    record = DeviceRecord(id="gpu0", kind="gpu", name="G", samples=samples, energy_ticks=ticks)
    table = summary_table([with_mean_power(each) for each in merge_records([record])])
    shown = dict(table.cells)
    assert (shown["power W"], shown["energy J"]) == ("396 (339 - 339)", "3960 in 10.0 s")
    assert (shown["1 s mean W"], shown["module W"]) == ("- (395 - 395)", "500 (500 - 500)")


def test_monitor_without_gpu_ends_on_sigterm_with_its_file(tmp_path: Path) -> None:
    saved = tmp_path / "cpu.csv"
    command = [sys.executable, "-m", "pdbench", "monitor", "--interval", "0.05", "--out", str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stdout.readline() == "watching host; Ctrl-C ends it\n"
        run.send_signal(signal.SIGTERM)
        output = run.stdout.read()
        assert run.wait(timeout=60) == 0, run.stderr.read() if run.stderr else ""
    assert "not measured" in output
    rows = list(csv.DictReader(saved.read_text().splitlines()))
    assert rows and rows[-1]["device"] == "host" and float(rows[-1]["memory_used_mib"]) > 0
    assert rows[-1]["power_w"] == ""
    assert run_pdbench("plot", saved, "--picture", tmp_path / "other.png", cwd=tmp_path).returncode == 0
    assert (tmp_path / "other.png").stat().st_size > 10_000


def test_second_monitor_into_a_file_is_refused_and_another_file_beside_it_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdbench", "monitor", "--out", "a.csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as first:
        assert first.stdout and first.stdout.readline().startswith("watching")
        refused = run_pdbench("monitor", "--duration", "1", "--out", tmp_path / "a.csv", cwd=tmp_path)
        assert (
            refused.returncode == 1 and "another pdbench measures into" in refused.stderr and "a.csv" in refused.stderr
        )
        other = run_pdbench("monitor", "--duration", "0.2", "--out", tmp_path / "b.csv", cwd=tmp_path)
        assert other.returncode == 0, other.stderr
        first.send_signal(signal.SIGINT)
        assert first.stdout.read() and first.wait(60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_csv_comes_back_as_it_went(nvml_library: Path, tmp_path: Path) -> None:
    records: list[DeviceRecord] = sampled(nvml_library, 2.0, {"decode": [0]}, fail="0:DeviceGetTemperature:3")
    path = tmp_path / "power.csv"
    path.write_bytes(b"\xef\xbb\xbf" + as_csv(records))  # as spreadsheets save it
    [back] = read_devices(path)
    assert [sample.power_w for sample in back.samples] == [sample.power_w for sample in records[0].samples]
    assert back.samples[0].temperature_c is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["monitor", "--out", "x.txt"], "must end in .json"),
        (["monitor", "--interval", "0.001"], "0.01 to 10"),
        (["monitor", "--gpus", "one"], "--gpus 0,1"),
        (["monitor", "--gpus", "77"], "no GPU 77 here"),
        (["monitor", "--duration", "-1"], "a number above 0"),
        (["plot", "nowhere.json"], "no file nowhere.json"),
        (["plot", "nowhere.csv"], "no file nowhere.csv"),
        (["plot", "wrong.csv"], "is not monitor's CSV (no column device or kind or name or t_s"),
        (["plot", "semicolons.CSV"], "commas between columns"),
        (["plot", "empty.csv"], "has no samples to draw"),
        (["plot", "wrong.json"], "holds no device samples"),
        (["plot", "."], "no *_gpu_data.json"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "semicolons.CSV").write_text("device;kind;name;t_s\ng;gpu;G;1\n")
    (tmp_path / "empty.csv").write_text("device,kind,name,t_s,power_w\nhost,cpu,X,0,\nhost,cpu,X,1,\n")
    (tmp_path / "wrong.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == (2 if arguments[0] == "monitor" and "77" not in arguments else 1)
    assert message in error and error.count("\n") == 1
