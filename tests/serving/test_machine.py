"""What this machine has for servers, and one line when it lacks it."""

import pytest

from pdbench import nvml
from pdbench.config import ServeConfig
from pdbench.errors import UserError
from pdbench.serving import machine
from pdbench.serving.machine import Machine
from pdbench.site import Site


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("MIG-7d0b1c", "names MIG slices, and pdbench serves on whole GPUs"),
        ("7", "CUDA_VISIBLE_DEVICES=7 leaves this vLLM no GPU"),
        (None, "NVML finds none: install requirements/cpu.txt"),
    ],
    ids=["mig", "no such gpu", "no gpu"],
)
def test_cuda_build_without_gpu_is_refused_with_the_reason(
    visible: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=message):
        Site(Machine("0.33.0", ())).deployment("single", ServeConfig())


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        (None, [0, 1, 2, 3]),
        ("3,1", [3, 1]),
        ("GPU-2f,0", [2, 0]),
        ("", []),
        ("1,-1,0", [1]),
        ("0,0", [0]),
        ("GPU-", []),
        ("7", []),
    ],
)
def test_gpus_outside_cuda_visible_devices_are_left_alone(
    visible: str | None, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tuple(nvml.Gpu(index, "H200", "580", 143771.0, 4.0, f"GPU-{index}f00") for index in range(4))
    monkeypatch.setattr(nvml, "gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.inspect().gpus] == left
