"""Cost and accuracy of measuring power: pdbench's sampler beside Zeus and nvidia-smi polling, same GPUs, same windows.

Default: four scripted GPUs whose energy is known exactly (tests/support/fake_nvml.c, built with gcc). With --real: this host's
first GPU under a 250 ms square wave of matrix products, against the driver's own energy counter. Zeus is installed into a
virtual environment under --peers, and skipped with a message when that fails.
Try: python benchmarks/sampler_cost.py            (about 1 minute)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

HERE = Path(__file__).parent
WAVES = ("constant", "square", "ramp", "spike")
ZEUS = "zeus==0.16.0"
# All tools run before the windows are announced; this is left for a load or a sampler to begin.
START_S = 3.0
LENGTHS_S = (1.03, 3.17, 1.41, 6.29, 2.53, 10.07)


def windows(origin):
    """Six windows, 1 to 10 s long, with edges that keep no step with any tick."""
    found, at = [], origin + START_S
    for length in LENGTHS_S:
        found.append((at, at + length))
        at += length + 0.37
    return found


def sleep_until(unix_s):
    time.sleep(max(0.0, unix_s - time.time()))


def ready():
    """Tell the parent that this tool is up; returns the windows once all of them are."""
    print("ready", flush=True)
    return json.loads(sys.stdin.readline())


def say(found, points=None):
    print(json.dumps({"energies": found, "points_per_s": points}), flush=True)
    time.sleep(30)  # until the parent has read our CPU time


def with_pdbench(gpus):
    """The sampler as `pdbench run` uses it: every field of every GPU each 100 ms."""
    from pdbench.analysis.meter import Meter
    from pdbench.power.device import open_gpu, open_rapl
    from pdbench.power.sampler import Sampler, merge_records
    from pdbench.records import Clock

    clock = Clock.start()
    sampler = Sampler([*(open_gpu(index, "all") for index in gpus), *open_rapl()], 0.1)
    with sampler:
        edges = ready()
        sleep_until(edges[-1][1] + 0.1)
    offset = clock.unix_s
    records = [record for record in merge_records(sampler.take(), clock.of_monotonic) if record.kind == "gpu"]
    say(
        [
            [Meter(record).energy_in([(start - offset, end - offset)]).energy_j for record in records]
            for start, end in edges
        ],
        len(records[0].fine_power) / (records[0].samples[-1].t_s - records[0].samples[0].t_s),
    )


def with_zeus_window(gpus):
    """Zeus' begin_window and end_window, which read the energy counter at the edges."""
    from zeus.monitor import ZeusMonitor

    monitor, found = ZeusMonitor(gpu_indices=gpus, cpu_indices=[]), []
    edges = ready()
    for start, end in edges:
        sleep_until(start)
        monitor.begin_window("w", sync_execution=False)
        sleep_until(end)
        measured = monitor.end_window("w", sync_execution=False).gpu_energy
        found.append([measured[index] for index in gpus])
    say(found)


def with_zeus_power(gpus):
    """Zeus' PowerMonitor, which polls instant power (here every 100 ms, as we do) and integrates."""
    from zeus.monitor.power import PowerMonitor

    monitor = PowerMonitor(gpu_indices=gpus, update_period=0.1, power_domains=["device_instant"])
    edges = ready()
    sleep_until(edges[-1][1] + 0.5)
    found = [monitor.get_energy(start, end) for start, end in edges]
    curve = monitor.get_power_timeline("device_instant", gpu_index=gpus[0])[gpus[0]]
    say([[one[index] if one else None for index in gpus] for one in found], len(curve) / (curve[-1][0] - curve[0][0]))


def with_nvidia_smi(gpus):
    """nvidia-smi polling instant power every 100 ms, integrated by trapezoids with the edges interpolated."""
    import numpy as np

    wanted = "--query-gpu=power.draw.instant"
    command = ["nvidia-smi", wanted, "--format=csv,noheader,nounits", "--loop-ms=100", f"--id={gpus[0]}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as smi:
        points = []
        Thread(target=lambda: [points.append((time.time(), float(line))) for line in smi.stdout], daemon=True).start()
        edges = ready()
        sleep_until(edges[-1][1] + 0.5)
        t, power = np.array(points).T
        area = np.concatenate([[0], np.cumsum(np.diff(t) * (power[1:] + power[:-1]) / 2)])
        say([[float(np.diff(np.interp(edge, t, area))[0])] for edge in edges], len(t) / (t[-1] - t[0]))
        smi.terminate()


def square_load(edges):
    """Matrix products for 250 ms, nothing for 250 ms, on the first GPU."""
    import torch

    one = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    while time.time() < edges[-1][1] + 1:
        end = time.time() + 0.25
        while time.time() < end:
            one @ one
            torch.cuda.synchronize()
        time.sleep(0.25)


def start_load(edges):
    """The square load in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sampler_cost; sampler_cost.square_load({edges})"
    return subprocess.Popen([sys.executable, "-c", code])


TOOLS = {
    "pdbench": with_pdbench,
    "zeus window": with_zeus_window,
    "zeus power": with_zeus_power,
    "nvidia-smi": with_nvidia_smi,
}


def zeus_python(folder):
    """A Python that has Zeus, or None."""
    python = folder / "zeus" / "bin" / "python"
    steps = [[sys.executable, "-m", "venv", folder / "zeus"], [python, "-m", "pip", "install", "-q", ZEUS]]
    try:
        for step in [] if python.exists() else steps:
            subprocess.run(step, check=True, capture_output=True, timeout=300)
    except (subprocess.SubprocessError, OSError):
        return None
    return python


def tree_cpu_s(process):
    """CPU seconds of a process and all that it started."""
    import psutil

    top = psutil.Process(process.pid)
    times = [one.cpu_times() for one in [top, *top.children(recursive=True)]]
    return sum(one.user + one.system for one in times)


def start(name, python, gpus, environment):
    """One tool in a process of its own; None, with its last word, when it does not come up."""
    command = [python, __file__, "--child", name, "--gpus", json.dumps(gpus)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, env=environment, text=True, **pipes)
    if child.stdout.readline() == "ready\n":
        return child
    print(f"{name} failed: {(child.stderr.read().strip().splitlines() or ['no word'])[-1]}")
    return None


def measure(pythons, gpus, environment, load):
    """Run all tools at once over the same windows; returns name -> (answer, CPU % of a core while they ran), and windows."""
    started = {name: start(name, python, gpus, environment) for name, python in pythons.items()}
    children = {name: child for name, child in started.items() if child}
    edges = windows(time.time())
    for child in children.values():
        print(json.dumps(edges), file=child.stdin, flush=True)
    loading = load(edges)
    sleep_until(edges[0][0])
    before = {name: tree_cpu_s(child) for name, child in children.items()}
    sleep_until(edges[-1][1])
    after = {name: tree_cpu_s(child) for name, child in children.items()}
    found = {}
    for name, child in children.items():
        line = child.stdout.readline()
        child.kill()
        child.wait()
        if line:
            found[name] = (json.loads(line), 100 * (after[name] - before[name]) / (edges[-1][1] - edges[0][0]))
        else:
            print(f"{name} failed: {(child.stderr.read().strip().splitlines() or ['no word'])[-1]}")
    if loading:
        loading.wait()
    return found, edges


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="this host's GPU 0 instead of scripted ones (needs torch)")
    parser.add_argument("--peers", type=Path, help="folder of Zeus' virtual environment; by itself a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        TOOLS[options.child](json.loads(options.gpus))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(options, Path(temporary))


def compare(options, temporary):
    """The table: each tool's worst error over the windows, its CPU, its curve's points a second."""
    python = zeus_python(options.peers or temporary)
    if python is None:
        print(f"{ZEUS} could not be installed here: skipped")
    tools = [name for name in TOOLS if (python or "zeus" not in name) and (options.real or name != "nvidia-smi")]
    pythons = {name: python if "zeus" in name else sys.executable for name in tools}
    if options.real:
        found, edges = measure(pythons, [0], dict(os.environ), start_load)
        truth, columns = found["pdbench"][0]["energies"], ["GPU 0"]
        print("errors are against the driver's energy counter, read on its tick")
    else:
        sys.path.insert(0, str(HERE.parent))
        from tests.support import fake_nvml

        settings = {f"power_{i}": fake_nvml.wave_text(name) for i, name in enumerate(WAVES)}
        environment = fake_nvml.environment(
            fake_nvml.build(temporary), gpus="4", state=str(temporary / "state"), **settings
        )
        zero = "import ctypes; f = ctypes.CDLL('libnvidia-ml.so.1').fake_zero_us; f.restype = ctypes.c_ulonglong; print(f())"
        asked = subprocess.run(
            [sys.executable, "-c", zero], env=environment, capture_output=True, text=True, check=True
        )
        zero_s, columns = int(asked.stdout) / 1e6, list(WAVES)
        found, edges = measure(pythons, [0, 1, 2, 3], environment, lambda edges: None)
        truth = [[fake_nvml.exact_j(name, start - zero_s, end - zero_s) for name in WAVES] for start, end in edges]
    show(found, truth, columns)


def show(found, truth, columns):
    """One line a tool."""
    print(
        f"\n{len(truth)} windows of {min(LENGTHS_S):.0f} - {max(LENGTHS_S):.0f} s; {len(columns)} GPU(s); CPU in % of one core"
    )
    heads = [f"{name} error %" for name in columns]
    print(
        f"{'tool':12} {'CPU %':>7} {'points/s':>9} " + " ".join(f"{head:>17}" for head in heads) + "   (median / worst)"
    )
    for name, (answer, cpu_pct) in found.items():
        cells = []
        for place in range(len(columns)):
            pairs = [(one[place], exact[place]) for one, exact in zip(answer["energies"], truth, strict=True)]
            errors = sorted(100 * abs(value / exact - 1) for value, exact in pairs if value is not None)
            cells.append(f"{errors[len(errors) // 2]:.2f} / {errors[-1]:.2f}" if errors else "-")
        points = answer["points_per_s"]
        print(
            f"{name:12} {cpu_pct:7.2f} {'-' if points is None else f'{points:.1f}':>9} "
            + " ".join(f"{cell:>17}" for cell in cells)
        )


if __name__ == "__main__":
    main()
