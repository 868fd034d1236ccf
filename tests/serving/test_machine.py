"""What a machine without usable GPUs says, in one line."""

import pytest

from pdbench.config import ServeConfig
from pdbench.errors import UserError
from pdbench.serving import deployment, machine
from pdbench.serving.machine import Machine


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
    monkeypatch.setattr(deployment, "installed_version", lambda name: None)
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=message):
        deployment.plan("single", ServeConfig(), Machine(vllm=(0, 33, 0), vllm_text="0.33.0", gpus=()))
