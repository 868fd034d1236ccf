"""Lock GPUs at a clock or under a power cap for a run, and give them back however the run ends.

A child process (`python -m pdbench.power.clocks`) does the giving back when this process ends, which SIGKILL cannot prevent.
"""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from pdbench import nvml, supervisor
from pdbench.config import PowerConfig
from pdbench.errors import UserError
from pdbench.records import DeviceRecord, Flag

READ_BACK_S = 1.0
_RESTORE_S = 20.0
_CLAMP_MHZ = 15


@dataclass(frozen=True, kw_only=True)
class ClockLock:
    """What was requested of one GPU and what it reported when read back; None where nothing was requested."""

    role: str
    index: int
    requested_clock_mhz: int | None
    clock_mhz: int | None
    requested_power_cap_w: int | None
    power_cap_w: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def requested_options(config: PowerConfig) -> list[str]:
    """The options that set a clock or power cap."""
    names = [field.name for field in fields(config) if field.name.endswith(("_clock", "_power_cap"))]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is not None]


def check(config: PowerConfig, gpus: Iterable[Mapping[str, Sequence[int]]]) -> None:
    """Raises UserError for a clock or power cap of a role that has no GPU in any deployment of `gpus`."""
    present = {_clock_role(role) for roles in gpus for role, indices in roles.items() if indices}
    for role in ("prefill", "decode", "single"):
        for name in ("clock", "power_cap"):
            value: int | None = getattr(config, f"{role}_{name}")
            suffix = name.replace("_", "-")
            if value is not None and role not in present:
                remedy = f"--{min(present)}-{suffix} sets the GPUs of the servers here" if present else "leave it out"
                raise UserError(
                    f"--{role}-{suffix} {value}: no {role} server here has a known GPU of this host: {remedy}"
                )


@contextmanager
def locked_clocks(config: PowerConfig, gpus: Mapping[str, Sequence[int]]) -> Iterator[list[ClockLock]]:
    """Lock the GPUs of each role as `config` says; nothing is touched when it says nothing.

    Raises UserError, with everything as it was, when a setting is refused.
    """
    wanted = [
        (role, index, getattr(config, f"{_clock_role(role)}_clock"), getattr(config, f"{_clock_role(role)}_power_cap"))
        for role, indices in gpus.items()
        for index in indices
    ]
    wanted = [setting for setting in wanted if setting[2:] != (None, None)]
    if not wanted:
        yield []
        return
    limits_w = []
    for _, index, _, cap in wanted:
        if cap is not None:
            with _user_errors(index):
                limits_w.append((index, nvml.power_limit_w(index)))
    unlock = [index for _, index, clock, _ in wanted if clock is not None]
    settings = json.dumps({"unlock": unlock, "limits_w": limits_w})
    restorer = supervisor.Child([sys.executable, "-m", "pdbench.power.clocks", settings])
    try:
        if (problem := restorer.wait_ready()) is not None:
            raise UserError(f"the process that would restore the clocks did not start: {problem}")
        locks = []
        for setting in wanted:
            with _user_errors(setting[1]):
                locks.append(_lock(*setting))
        yield locks
    finally:
        # When the child failed or was killed, this process is the last that can restore.
        if restorer.close(_RESTORE_S) != 0 and (problems := restore(unlock, limits_w)):
            raise UserError(
                f"not restored ({'; '.join(problems)}): `sudo nvidia-smi -rgc` frees clocks, `-pl WATTS` sets limits"
            )


@contextmanager
def _user_errors(index: int) -> Iterator[None]:
    try:
        yield
    except nvml.GpuError as error:
        if error.needs_root:
            text = f"GPU {index}: clocks and power caps need root: use sudo, or leave those options out"
        else:
            text = f"GPU {index}: {error}: it cannot be held at a clock or power cap; leave those options out"
        raise UserError(text) from None


def _clock_role(role: str) -> str:
    """The role whose options apply to `role`."""
    return role if role in ("prefill", "decode") else "single"


def _lock(role: str, index: int, clock: int | None, cap: int | None) -> ClockLock:
    if cap is not None:
        low, high = nvml.power_limit_range_w(index)
        if not low <= cap <= high:
            raise UserError(
                f"GPU {index} takes power caps from {low:.0f} to {high:.0f} W, not {cap} W: choose one of those"
            )
        nvml.set_power_limit(index, cap)
    reported_mhz = None
    if clock is not None:
        nvml.lock_sm_clock(index, clock)
        end_s = time.monotonic() + READ_BACK_S
        while (reported_mhz := nvml.sm_clock_mhz(index)) != clock and time.monotonic() < end_s:
            time.sleep(0.05)
    return ClockLock(
        role=role,
        index=index,
        requested_clock_mhz=clock,
        clock_mhz=reported_mhz,
        requested_power_cap_w=cap,
        power_cap_w=None if cap is None else nvml.power_limit_w(index),
    )


def restore(unlock: Sequence[int], limits_w: Sequence[tuple[int, float]]) -> list[str]:
    """Unlock these GPUs' clocks and set these limits; goes on after a refusal and returns all of them."""
    calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(nvml.unlock_sm_clock, (index,)) for index in unlock]
    calls += [(nvml.set_power_limit, (index, limit_w)) for index, limit_w in limits_w]
    problems = []
    for call, arguments in calls:
        try:
            call(*arguments)
        except nvml.GpuError as error:
            if not error.needs_root:  # who may not restore could not have changed anything
                problems.append(f"GPU {arguments[0]}: {error}")
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
