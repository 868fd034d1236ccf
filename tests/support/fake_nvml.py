"""Builds tests/support/fake_nvml.c and runs Python children that load it as NVML; the clock of such a child may be scripted.

A child imports `scripted_sampling` from here: the sampler's real loop, on the fake library's own clock, with no waiting.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from pdbench.power.device import open_gpu
from pdbench.power.sampler import Sampler, SystemTime, merge_records
from pdbench.records import Clock, DeviceRecord

HERE = Path(__file__).parent
MONOTONIC_ZERO_S = 1000.0

# name -> (period_s, points (t_s, watts) with straight lines between)
WAVES: dict[str, tuple[float, list[tuple[float, float]]]] = {
    "constant": (1.0, [(0, 400), (1, 400)]),
    "square": (0.5, [(0, 120), (0.25, 120), (0.25, 650), (0.5, 650)]),
    "ramp": (7.0, [(0, 100), (7, 700)]),
    "spike": (1.3, [(0, 130), (0.6, 130), (0.6, 700), (0.63, 700), (0.63, 130), (1.3, 130)]),
}


def build(folder: Path) -> Path:
    """Compile the library into `folder` and return the folder, for LD_LIBRARY_PATH. Tests use the fixture `nvml_library`."""
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-o", library, HERE / "fake_nvml.c"], check=True
    )
    return folder


def wave_text(name: str) -> str:
    """A wave as the library's environment variable wants it."""
    period, points = WAVES[name]
    return f"{period} " + " ".join(f"{t}:{watts}" for t, watts in points)


def exact_j(name: str, start_s: float, end_s: float) -> float:
    """The wave's integral, computed here and not in the library."""
    period, points = WAVES[name]

    def until(t: float) -> float:
        rounds, rest = divmod(t, period)
        return rounds * part(period) + part(rest)

    def part(t: float) -> float:
        total = 0.0
        for (t0, w0), (t1, w1) in itertools.pairwise(points):
            if t1 > t0 and t > t0:
                end = min(t, t1)
                total += (end - t0) * (w0 + w0 + (w1 - w0) * (end - t0) / (t1 - t0)) / 2
        return total

    return until(end_s) - until(start_s)


def environment(library: Path, **settings: str) -> dict[str, str]:
    """This process's environment with the fake library first and `settings` as FAKE_NVML_*."""
    names = {f"FAKE_NVML_{key.upper()}": value for key, value in settings.items()}
    return os.environ | names | {"LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(HERE.parents[1])}


def child(library: Path, code: str, **settings: str) -> str:
    """Run `code` in a Python child that sees the fake library; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(library, **settings),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class ScriptedTime(SystemTime):
    """The fake library's clock: waiting moves it on, and so does every call into the library. Its zero is `clock`'s zero."""

    def __init__(self, end_s: float) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        for name in ("fake_unix_us", "fake_steady_us", "fake_zero_us"):
            getattr(self._library, name).restype = ctypes.c_ulonglong
        self._library.fake_advance_us.argtypes = [ctypes.c_ulonglong]
        self._end_s = end_s

    @property
    def clock(self) -> Clock:
        return Clock(monotonic_s=MONOTONIC_ZERO_S, unix_s=self._library.fake_zero_us() / 1e6)

    def monotonic(self) -> float:
        return MONOTONIC_ZERO_S + (self._library.fake_steady_us() - self._library.fake_zero_us()) / 1e6

    def unix(self) -> float:
        return self._library.fake_unix_us() / 1e6

    def cpu(self) -> float:
        return 0.0

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self._library.fake_advance_us(max(1, round(seconds * 1e6)))
        if self.monotonic() >= MONOTONIC_ZERO_S + self._end_s:
            stop.set()


def scripted_sampling(seconds: float, gpus: dict[str, list[int]], interval_s: float = 0.1) -> list[DeviceRecord]:
    """What the sampler records of the fake GPUs in `seconds` of the library's clock."""
    scripted = ScriptedTime(seconds)
    readers = [open_gpu(index, role) for role, indices in gpus.items() for index in indices]
    sampler = Sampler(readers, interval_s, scripted)
    sampler.run()
    return merge_records(sampler.take(), scripted.clock.of_monotonic)


def sampled(
    library: Path, seconds: float, roles: dict[str, list[int]], interval_s: float = 0.1, **settings: str
) -> list[DeviceRecord]:
    """`scripted_sampling` in a child of its own, under the library's `settings`."""
    code = f"import msgspec; from tests.support import fake_nvml; print(msgspec.json.encode(fake_nvml.scripted_sampling({seconds}, {roles}, {interval_s})).decode())"
    return msgspec.json.decode(child(library, code, clock="scripted", **settings), type=list[DeviceRecord])
