"""Runs made from parameters, for tests of the judging half alone. Nothing here was measured: never use one outside tests."""

import numpy as np

from pdbench.records import Clock, DeviceRecord, DeviceSample, Flag, Gate, RequestError, RequestRecord, Run, Trial

HOST = {"name": "synthetic", "cpu": "none", "gpus": ["Synthetic H200", "Synthetic H200"], "driver": "0.0"}


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
    config: dict | None = None,
    flags: list[Flag] | None = None,
    gate: Gate | None = None,
) -> Run:
    """A synthetic run: lognormal latencies about `ttft_ms` and `tbt_ms`, `concurrency` closed loops, square power curves."""
    random = np.random.default_rng(seed)
    roles = ["prefill", "decode"] if name == "disaggregated" else ["single"]
    run = Run(
        name=name,
        clock=Clock(monotonic_s=1000.0, unix_s=1.8e9),
        config={"model": "synthetic", "load": {"concurrency": concurrency, "requests": requests}, **(config or {})},
        host=dict(HOST) if gpu else {**HOST, "gpus": []},
        versions={"pdbench": "0", "vllm": "synthetic"},
        roles={role: [f"gpu-{i}" if gpu else f"{role}-0"] for i, role in enumerate(roles)},
        gate=gate,
        flags=flags or [],
    )
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
        run.trials.append(Trial(index=trial, start_s=start, end_s=max(free)))
        now = max(free) + pause_s
    run.devices = [_device(random, run, role, index, gpu) for index, role in enumerate(roles)]
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
        id=f"gpu-{index}" if gpu else f"{role}-0",
        kind="gpu" if gpu else "process",
        name="Synthetic H200" if gpu else f"{role}'s processes",
        role=role,
        index=index if gpu else None,
        not_measured={} if gpu else {"power_w": "no RAPL on this machine", "energy_j": "no RAPL on this machine"},
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
