"""What GPUs draw before anything runs on them: bare, and with an empty CUDA context. The third way, with the engine ready
and no request, is `Sampler.idle("engine_ready", seconds)`.

Try: python -m pdbench.power.idle 0
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pdbench.power.devices import open_gpu
from pdbench.power.sampler import Sampler
from pdbench.records import Clock

BARE, CONTEXT, ENGINE_READY = "bare", "context", "engine_ready"
_SETTLE_S = 1.0


def idle_before_start(gpus: Sequence[int], seconds: float) -> dict[str, dict[str, float | None]]:
    """Device id -> mean watts over `seconds` each, bare and with a CUDA context; None where not measured.

    The GPUs must be free. Merge it into the run's devices with `device.idle_power_w = found[device.id] | device.idle_power_w`.
    """
    sampler = Sampler([open_gpu(index, None) for index in gpus], 0.1, Clock.start())
    with sampler:
        sampler.idle(BARE, seconds)
        with _contexts(gpus) as held:
            if held:
                sampler.pause(_SETTLE_S)
                sampler.idle(CONTEXT, seconds)
    found = {record.id: record.idle_power_w for record in sampler.records()}
    return {device: {kind: powers.get(kind) for kind in (BARE, CONTEXT)} for device, powers in found.items()}


@contextmanager
def _contexts(gpus: Sequence[int]) -> Iterator[bool]:
    """A process of its own holds a CUDA context on each GPU: a context cannot be undone in the process that made it."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with subprocess.Popen(
        [sys.executable, "-m", "pdbench.power.idle", "--hold", str(len(gpus))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | visible,
    ) as child:
        assert child.stdin and child.stdout
        try:
            yield child.stdout.readline() == b"ready\n"
        finally:
            child.stdin.close()


def hold_contexts(count: int) -> None:
    """Make a primary context on each of the first `count` visible GPUs and keep it until standard input ends."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    if cuda.cuInit(0) or any(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal) for ordinal in range(count)):
        sys.exit("no CUDA context could be made")
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "--hold":
        hold_contexts(int(sys.argv[2]))
    else:
        print(idle_before_start([int(index) for index in sys.argv[1:]], 3.0))
