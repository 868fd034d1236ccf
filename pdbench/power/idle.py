"""What GPUs draw before anything runs on them, and how warm they are before a trial.

Idle power comes in three kinds: bare, with an empty CUDA context (both here), and with the engine ready and no request
(`Sampler.idle(ENGINE_READY, seconds)`).
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdbench import nvml, supervisor
from pdbench.power.device import Reader, open_gpu
from pdbench.power.sampler import Sampler, merge_records

BARE, CONTEXT, ENGINE_READY = "bare", "context", "engine_ready"
WITHIN_C = 2.0
"""A GPU counts as cool again this close to its first temperature: NVML's readings are whole degrees."""
_SETTLE_S = 1.0


class Idle(NamedTuple):
    """Of each kind the mean watts, and how busy the GPU was meanwhile; None where not measured."""

    power_w: dict[str, float | None]
    utilization_pct: dict[str, float | None]


def idle_before_start(gpus: Sequence[int], seconds: float) -> dict[str, Idle]:
    """Device id -> its idle power over `seconds` each, bare and with a CUDA context. The GPUs must be free."""
    sampler = Sampler([open_gpu(index, None) for index in gpus], 0.1)
    with sampler:
        sampler.idle(BARE, seconds)
        # A context cannot be undone in the process that created it: a child holds one on each GPU.
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        holder = supervisor.Child([sys.executable, "-m", "pdbench.power.idle", str(len(gpus))], visible)
        try:
            if holder.wait_ready() is None:
                time.sleep(_SETTLE_S)
                sampler.idle(CONTEXT, seconds)
        finally:
            holder.close()
    unknown = dict.fromkeys((BARE, CONTEXT))
    return {
        record.id: Idle(unknown | record.idle_power_w, unknown | record.idle_utilization_pct)
        for record in merge_records(sampler.take())
    }


class Cooldown:
    """Remembers each GPU's temperature before its first trial and waits for it before the next ones, at most `limit_s` each, so
    that the order of trials favours no deployment."""

    def __init__(
        self,
        limit_s: float,
        open_reader: Callable[[int, str | None], Reader] = open_gpu,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit_s, self._open, self._sleep = limit_s, open_reader, sleep
        self._first_c: dict[str, float] = {}

    def wait(self, gpus: Sequence[int]) -> dict[str, float]:
        """GPU -> degrees Celsius at the start of the trial that begins next; a GPU without a thermometer is left out."""
        readers = [self._open(index, None) for index in gpus]
        try:
            waited_s = 0.0
            while True:
                readings = {
                    reader.id: nvml.bounded(reader.read, dict)(time.monotonic()).get("temperature_c")
                    for reader in readers
                }
                now_c = {gpu: float(celsius) for gpu, celsius in readings.items() if celsius is not None}
                self._first_c = now_c | self._first_c
                hot = any(celsius > self._first_c[gpu] + WITHIN_C for gpu, celsius in now_c.items())
                if not hot or waited_s >= self._limit_s:
                    return now_c
                self._sleep(1.0)
                waited_s += 1.0
        finally:
            for reader in readers:
                reader.close()


def main() -> None:
    """The child: a primary context on each of the first N visible GPUs, until the parent ends it."""
    count, parent = int(sys.argv[1]), os.getppid()
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    if cuda.cuInit(0) or any(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal) for ordinal in range(count)):
        sys.exit("no CUDA context could be made")
    print("ready", flush=True)
    while supervisor.held_by_parent(parent):
        pass


if __name__ == "__main__":
    main()
