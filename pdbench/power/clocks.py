"""Lock GPUs at a clock or under a power cap for a run, and give them back however the run ends.

A child process (`python -m pdbench.power.clocks`) does the giving back when this process ends, which SIGKILL cannot prevent.
"""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from pdbench import nvml, supervisor
from pdbench.config import CLOCK_OPTIONS, PowerConfig, flag_of
from pdbench.errors import UserError
from pdbench.records import DeviceRecord, Flag

_READ_BACK_S = 1.0
_CLAMP_MHZ = 15


@dataclass(kw_only=True)
class ClockLock:
    """What was requested of one GPU and what it reported when read back; None where nothing was requested."""

    role: str
    index: int
    requested_clock_mhz: int | None
    clock_mhz: int | None = None
    requested_power_cap_w: int | None
    power_cap_w: float | None = None


def requested_options(config: PowerConfig) -> list[str]:
    return [flag_of(name) for name in CLOCK_OPTIONS if getattr(config, name) is not None]


def check(config: PowerConfig, gpus: Iterable[Mapping[str, Sequence[int]]]) -> None:
    """Raises UserError for a clock or power cap of a role that has no GPU in any deployment of `gpus`."""
    present = {_clock_role(role) for roles in gpus for role, indices in roles.items() if indices}
    for option in requested_options(config):
        role, suffix = option.removeprefix("--").split("-", 1)
        if role not in present:
            value = getattr(config, f"{role}_{suffix.replace('-', '_')}")
            remedy = f"--{min(present)}-{suffix} sets the GPUs of the servers here" if present else "leave it out"
            raise UserError(f"{option} {value}: no {role} server here has a known GPU of this host: {remedy}")


@contextmanager
def locked_clocks(config: PowerConfig, gpus: Mapping[str, Sequence[int]]) -> Iterator[list[ClockLock]]:
    """Lock the GPUs of each role as `config` says; nothing is touched when it says nothing.

    Raises UserError, with everything as it was, when a setting is refused.
    """
    locks = []
    for role, index in ((role, index) for role, indices in gpus.items() for index in indices):
        clock, cap = (getattr(config, f"{_clock_role(role)}_{name}") for name in ("clock", "power_cap"))
        if (clock, cap) != (None, None):
            locks.append(ClockLock(role=role, index=index, requested_clock_mhz=clock, requested_power_cap_w=cap))
    if not locks:
        yield []
        return
    limits_w = []
    for lock in locks:
        if lock.requested_power_cap_w is not None:
            with _user_errors(lock):
                limits_w.append((lock.index, nvml.power_limit_w(lock.index)))
    unlock = [lock.index for lock in locks if lock.requested_clock_mhz is not None]
    settings = json.dumps({"unlock": unlock, "limits_w": limits_w})
    restorer = supervisor.Child([sys.executable, "-m", "pdbench.power.clocks", settings])
    try:
        if (problem := restorer.wait_ready()) is not None:
            raise UserError(f"the process that would restore the clocks did not start: {problem}")
        for lock in locks:
            with _user_errors(lock):
                _set(lock)
        yield locks
    finally:
        # When the child failed or was killed, this process is the last that can restore.
        if restorer.close() != 0 and (problems := restore(unlock, limits_w)):
            raise UserError(
                f"not restored ({'; '.join(problems)}): `sudo nvidia-smi -rgc` frees clocks, `-pl WATTS` sets limits"
            )


@contextmanager
def _user_errors(lock: ClockLock) -> Iterator[None]:
    try:
        yield
    except nvml.GpuError as error:
        text = f"{error}: it cannot be held at a clock or power cap; leave those options out"
        if error.needs_root:
            text = "clocks and power caps need root: use sudo, or leave those options out"
        raise UserError(f"GPU {lock.index}: {text}") from None


def _clock_role(role: str) -> str:
    """The role whose options apply to `role`."""
    return role if role in ("prefill", "decode") else "single"


def _set(lock: ClockLock) -> None:
    if (cap := lock.requested_power_cap_w) is not None:
        low, high = nvml.power_limit_range_w(lock.index)
        if not low <= cap <= high:
            raise UserError(
                f"GPU {lock.index} takes power caps from {low:.0f} to {high:.0f} W, not {cap} W: choose one of those"
            )
        nvml.set_power_limit(lock.index, cap)
        lock.power_cap_w = nvml.power_limit_w(lock.index)
    if lock.requested_clock_mhz is not None:
        nvml.lock_sm_clock(lock.index, lock.requested_clock_mhz)
        end_s = time.monotonic() + _READ_BACK_S
        while (mhz := nvml.sm_clock_mhz(lock.index)) != lock.requested_clock_mhz and time.monotonic() < end_s:
            time.sleep(0.05)
        lock.clock_mhz = mhz


def restore(unlock: Sequence[int], limits_w: Sequence[tuple[int, float]]) -> list[str]:
    """Unlock these GPUs' clocks and set these limits; goes on after a refusal and returns all of them."""
    calls = [partial(nvml.unlock_sm_clock, index) for index in unlock]
    calls += [partial(nvml.set_power_limit, index, limit_w) for index, limit_w in limits_w]
    problems = []
    for call in calls:
        try:
            call()
        except nvml.GpuError as error:
            if not error.needs_root:  # who may not restore could not have changed anything
                problems.append(f"GPU {call.args[0]}: {error}")
    return problems


def clock_flags(locks: Sequence[ClockLock], devices: Sequence[DeviceRecord]) -> list[Flag]:
    """A flag for every GPU that reported another clock than requested, at once or while it was busy in the run."""
    flags = []
    for lock in locks:
        if (requested_mhz := lock.requested_clock_mhz) is None:
            continue
        request = f"GPU {lock.index} ({lock.role}): requested {requested_mhz} MHz"
        if lock.clock_mhz is not None and abs(lock.clock_mhz - requested_mhz) > _CLAMP_MHZ:
            flags.append(Flag("clock-clamped", f"{request}, read back {lock.clock_mhz} MHz"))
        busy_mhz = [
            sample.sm_clock_mhz
            for device in devices
            if (device.kind, device.index, device.role) == ("gpu", lock.index, lock.role)
            for sample in device.samples
            if sample.sm_clock_mhz is not None and (sample.gpu_utilization_pct or 0) >= 50
        ]
        if busy_mhz and abs((median_mhz := statistics.median(busy_mhz)) - requested_mhz) > _CLAMP_MHZ:
            flags.append(Flag("clock-not-held", f"{request}, ran at {median_mhz:.0f} MHz (median while busy)"))
    return flags


def main() -> int:
    """The child: wait until the parent ends, however it ends, and restore; exit code 0 when everything was given back."""
    settings, parent = json.loads(sys.argv[1]), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    while supervisor.held_by_parent(parent):
        pass
    problems = restore(settings["unlock"], settings["limits_w"])
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
