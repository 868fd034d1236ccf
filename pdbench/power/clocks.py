"""Hold GPUs at a clock or under a power cap for a run, and give them back however the run ends.

A guard process (clock_guard.py) does the giving back: it waits for our end of a pipe to close, which SIGKILL does too.
Try: sudo pdbench run recipes/gpu-1p1d.toml --prefill-clock 1200 --decode-clock 900
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from pdbench import nvml
from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.records import DeviceRecord, Flag

READ_BACK_S = 1.0
_RESTORE_S = 20.0
_CLAMP_MHZ = 15


@dataclass(frozen=True, kw_only=True)
class ClockHold:
    """What was asked of one GPU and what it answered when read back; None where nothing was asked."""

    role: str
    index: int
    asked_clock_mhz: int | None
    clock_mhz: int | None
    asked_power_cap_w: int | None
    power_cap_w: float | None

    def plain(self) -> dict[str, Any]:
        """For a saved run's config."""
        return asdict(self)


def asked(config: PowerConfig) -> list[str]:
    """The options that ask for a clock or power cap."""
    names = [field.name for field in fields(config) if field.name.endswith(("_clock", "_power_cap"))]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is not None]


def check(config: PowerConfig, gpus: Iterable[Mapping[str, Sequence[int]]]) -> None:
    """Raises UserError for a clock or power cap that is none, or of a role that holds no GPU in any deployment of `gpus`."""
    kinds = {_kind(role) for found in gpus for role, indices in found.items() if indices}
    for kind in ("prefill", "decode", "single"):
        for name in ("clock", "power_cap"):
            value: int | None = getattr(config, f"{kind}_{name}")
            option = f"--{kind}-{name.replace('_', '-')} {value}"
            if value is not None and value <= 0:
                raise UserError(f"{option} is no clock or power: give a number above 0")
            if value is not None and kind not in kinds:
                remedy = (
                    f"what is here is held by --{sorted(kinds)[0]}-{name.replace('_', '-')}"
                    if kinds
                    else "leave it out"
                )
                raise UserError(f"{option}: no {kind} server here has a GPU of this host that we know: {remedy}")


@contextmanager
def held(config: PowerConfig, gpus: Mapping[str, Sequence[int]]) -> Iterator[list[ClockHold]]:
    """Hold the GPUs of each role as `config` says; nothing is touched when it says nothing.

    Raises UserError, with everything as it was, when a setting is refused.
    """
    wanted = list(_wanted(config, gpus))
    if not wanted:
        yield []
        return
    try:
        before = [(index, nvml.power_limit_w(index)) for _, index, _, cap in wanted if cap is not None]
    except nvml.GpuRefusedError as refusal:
        raise _refused(refusal) from None
    locked = [index for _, index, clock, _ in wanted if clock is not None]
    with _guard(locked, before):
        try:
            holds = [_hold(role, index, clock, cap) for role, index, clock, cap in wanted]
        except nvml.GpuRefusedError as refusal:
            raise _refused(refusal) from None
        yield holds


def clock_flags(holds: Sequence[ClockHold], devices: Sequence[DeviceRecord]) -> list[Flag]:
    """A flag for every GPU that answered another clock than asked, at once or while it was busy in the run."""
    flags = []
    for hold in holds:
        if hold.asked_clock_mhz is None:
            continue
        if hold.clock_mhz is not None and abs(hold.clock_mhz - hold.asked_clock_mhz) > _CLAMP_MHZ:
            detail = (
                f"GPU {hold.index} ({hold.role}): asked for {hold.asked_clock_mhz} MHz, read back {hold.clock_mhz} MHz"
            )
            flags.append(Flag("clock-clamped", detail))
        busy = [
            sample.sm_clock_mhz
            for device in devices
            if device.kind == "gpu" and device.index == hold.index and device.role == hold.role
            for sample in device.samples
            if sample.sm_clock_mhz is not None and (sample.gpu_utilization_pct or 0) >= 50
        ]
        if busy and abs(statistics.median(busy) - hold.asked_clock_mhz) > _CLAMP_MHZ:
            detail = f"GPU {hold.index} ({hold.role}): asked for {hold.asked_clock_mhz} MHz, ran at {statistics.median(busy):.0f}"
            flags.append(Flag("clock-not-held", detail + " MHz (median while busy)"))
    return flags


def _wanted(
    config: PowerConfig, gpus: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, int, int | None, int | None]]:
    """(role, GPU, clock, cap) of every GPU of which something is asked."""
    for role, indices in gpus.items():
        clock: int | None = getattr(config, f"{_kind(role)}_clock")
        cap: int | None = getattr(config, f"{_kind(role)}_power_cap")
        if clock is not None or cap is not None:
            yield from ((role, index, clock, cap) for index in indices)


def _kind(role: str) -> str:
    """Whose options a role takes."""
    return role if role in ("prefill", "decode") else "single"


def _hold(role: str, index: int, clock: int | None, cap: int | None) -> ClockHold:
    if cap is not None:
        low, high = nvml.power_limit_range_w(index)
        if not low <= cap <= high:
            raise UserError(
                f"GPU {index} takes power caps from {low:.0f} to {high:.0f} W, not {cap} W: choose one of those"
            )
        nvml.set_power_limit(index, cap)
    if clock is not None:
        nvml.lock_sm_clock(index, clock)
    return ClockHold(
        role=role,
        index=index,
        asked_clock_mhz=clock,
        clock_mhz=None if clock is None else _read_back(index, clock),
        asked_power_cap_w=cap,
        power_cap_w=None if cap is None else nvml.power_limit_w(index),
    )


def _read_back(index: int, asked_mhz: int) -> int:
    """The clock once it has come to what was asked, or what it is when it does not come."""
    end = time.monotonic() + READ_BACK_S
    while (found := nvml.sm_clock_mhz(index)) != asked_mhz and time.monotonic() < end:
        time.sleep(0.05)
    return found


@contextmanager
def _guard(locked: list[int], limits_w: list[tuple[int, float]]) -> Iterator[None]:
    """A process that gives clocks and limits back when this block, or this process, ends in any way."""
    orders = json.dumps({"unlock": locked, "limits_w": limits_w})
    command = [sys.executable, "-m", "pdbench.power.clock_guard", orders]
    guard = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert guard.stdin and guard.stdout and guard.stderr
    try:
        if guard.stdout.readline().strip() != "ready":
            raise UserError(f"the process that would restore the clocks did not start: {guard.stderr.read().strip()}")
        yield
    finally:
        guard.stdin.close()
        try:
            failed = guard.wait(timeout=_RESTORE_S) != 0
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
            failed = True
        guard.stdout.close()
        guard.stderr.close()
        if failed:
            _restore_here(locked, limits_w)


def _restore_here(locked: list[int], limits_w: list[tuple[int, float]]) -> None:
    """The guard is gone or failed: the last chance, and a word to the user when that fails as well."""
    if problems := restore(locked, limits_w):
        raise UserError(
            f"not restored ({'; '.join(problems)}): `sudo nvidia-smi -rgc` frees clocks, `-pl WATTS` sets limits"
        )


def restore(locked: Sequence[int], limits_w: Sequence[tuple[int, float]]) -> list[str]:
    """Unlock these GPUs' clocks and set these limits; goes on after a refusal and returns all of them.

    Want of permission is no problem here: whoever may not restore could not have changed anything.
    """
    orders: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(nvml.unlock_sm_clock, (index,)) for index in locked]
    orders += [(nvml.set_power_limit, tuple(limit)) for limit in limits_w]
    problems = []
    for order, arguments in orders:
        try:
            order(*arguments)
        except nvml.GpuRefusedError as refusal:
            if not refusal.needs_root:
                problems.append(str(refusal))
    return problems


def _refused(refusal: nvml.GpuRefusedError) -> UserError:
    if refusal.needs_root:
        return UserError(
            f"{str(refusal).partition(':')[0]}: clocks and power caps need root: use sudo, or leave those options out"
        )
    return UserError(f"{refusal}: it cannot be held at a clock or power cap; leave those options out")
