"""Deployments up -> gate -> load and device samples -> runs saved -> down; the story on one screen.

Nothing is judged here: summaries, comparisons and pictures are made from the saved runs. Try: pdbench run --help
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pdbench import correctness, nvml
from pdbench import events as event_logs
from pdbench.config import DeploymentKind, LoadConfig, Options, ServeConfig
from pdbench.errors import UserError
from pdbench.http import offered_model, split_url
from pdbench.load import plan
from pdbench.load.clients import LoadResult, run_load
from pdbench.power import clocks
from pdbench.power.device import gpu_indices
from pdbench.power.host import open_readers
from pdbench.power.idle import ENGINE_READY, Cooldown, idle_before_start
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import Clock, DeviceRecord, Flag, Gate, Run, check_writable, save_run
from pdbench.serving import deployment_info
from pdbench.serving import machine as machines
from pdbench.serving.deployment import Deployment
from pdbench.serving.deployment_info import DeploymentInfo

if TYPE_CHECKING:
    from pdbench.cluster.session import Cluster

TELL_AGAIN_S = 10.0


def interleave(names: Sequence[DeploymentKind], trials: int) -> list[tuple[DeploymentKind, list[int]]]:
    """Which deployment measures which trials, in order: A B B A A B, neighbours joined, so that drift cancels."""
    order: list[tuple[DeploymentKind, list[int]]] = []
    for trial in range(trials):
        for name in names if trial % 2 == 0 else tuple(reversed(names)):
            if order and order[-1][0] == name:
                order[-1][1].append(trial)
            else:
                order.append((name, [trial]))
    return order


def run(
    names: Sequence[DeploymentKind],
    trials: int,
    options: Options,
    out: Path,
    console: Console,
    on_saved: Callable[[Path], None],
    cluster: "Cluster | None" = None,
) -> list[Path]:
    """Measure every deployment `trials` times; returns the results folders, `out`/NAME_results each.

    What was measured is saved, and `on_saved` told, also when a server dies or the user interrupts; the exception then
    goes on.
    Raises UserError when something asked for cannot be done here, before anything starts where that can be known.
    """
    _check_options(options, trials, cluster)
    if len(set(names)) < len(names):
        raise UserError(f"--against {','.join(names)} names a deployment twice: each once, --trials repeats them")
    for folder in (out, *(out / f"{name}_results" for name in names)):
        if folder == out or folder.exists():
            check_writable(folder)
    make = maker(options.serve, cluster)
    _check_lengths(options.load, options.serve.max_model_len)
    planned = [make(name) for name in names]
    for deployment in planned:
        deployment.check_ports()
    gpus = [] if cluster else [deployment.gpus() for deployment in planned]
    if cluster is None:
        clocks.check(options.power, gpus)
    idle = _idle_power(gpus, options, console)
    clock = Clock.start()
    nonce = int(clock.unix_s)
    cooldown = _cooldown(options)
    runs: dict[DeploymentKind, Run] = {}
    reference: list[str] | None = None
    saving = ExitStack()
    with saving:
        saving.callback(_save_all, runs, out, on_saved)
        for name, indices in interleave(names, trials):
            with started(make(name), console) as deployment:
                running = deployment.running()
                if name not in runs:
                    runs[name] = _new_run(running, clock, options)
                if name == "disaggregated":  # each start has connections and KV caches of its own
                    _pass_gate(runs[name], correctness.run(running, nonce, reference)[0], console)
                elif name == "single" and reference is None:
                    reference = correctness.run(running, nonce, reference)[1]
                try:
                    _measure_into(runs[name], running, options, indices, console, cooldown, deployment.check, cluster)
                finally:
                    for device in runs[name].devices:
                        device.idle_power_w = idle.get(device.id, {}) | device.idle_power_w
                _save(runs[name], out, lambda folder: None)  # what comes next may be killed
    return [out / f"{name}_results" for name in names]


def maker(config: ServeConfig, cluster: "Cluster | None") -> Callable[[DeploymentKind], Any]:
    """Makes a deployment of a name, on this host or over the cluster. Raises UserError when it cannot be started there."""
    if cluster is not None:
        from pdbench.cluster.deployment import ClusterDeployment

        return lambda name: ClusterDeployment(name, config, cluster)
    machine = machines.inspect()
    return lambda name: Deployment(name, config, machine)


def _idle_power(
    used: Sequence[dict[str, list[int]]], options: Options, console: Console
) -> dict[str, dict[str, float | None]]:
    """Device id -> idle power by kind, of all GPUs that the run will use, before anything runs on them."""
    gpus = sorted({gpu for found in used for indices in found.values() for gpu in indices})
    if not (gpus and options.power.power and options.power.idle_s):
        return {}
    console.print(f"idle power of GPU {', '.join(map(str, gpus))}: {2 * options.power.idle_s:g} s")
    return idle_before_start(gpus, options.power.idle_s)


def bench(
    url: str,
    model: str | None,
    options: Options,
    trials: int,
    out: Path,
    console: Console,
    on_saved: Callable[[Path], None],
    cluster: "Cluster | None" = None,
) -> Path:
    """Measure the server at `url`, ours or anybody's; returns the results folder.

    A deployment started by `pdbench serve` with the same --log-dir is recognised, and its model, devices and events with it.
    """
    _check_options(options, trials, cluster)
    check_writable(out)
    running = deployment_info.find(Path(options.serve.log_dir), url)
    flags: list[Flag] = []
    if running is None:
        model = model or offered_model(url, verify_tls=options.load.tls_verify)
        running = DeploymentInfo(name="bench", url=url, model_name=model)
        if cluster is None and (options.power.power or clocks.requested_options(options.power)):
            flags = _find_devices(running, options.serve.single_gpus)
        if flags:
            options = replace(options, power=replace(options.power, power=False))
    _check_lengths(options.load, running.config.get("max_model_len"))
    for flag in flags:
        console.print(f"  [yellow]{flag.name}[/yellow]: {escape(flag.detail)}", highlight=False)
    if cluster is None:
        clocks.check(options.power, [running.gpus])
    clock = Clock.start()
    one = _new_run(running, clock, options)
    one.flags += flags
    if running.name == "disaggregated":
        _pass_gate(one, correctness.run(running, int(clock.unix_s), None)[0], console)
    try:
        _measure_into(one, running, options, list(range(trials)), console, _cooldown(options), lambda: None, cluster)
    finally:
        with _undisturbed():
            _save(one, out, on_saved)
    return out / f"{one.name}_results"


def _find_devices(foreign: DeploymentInfo, named: Sequence[int]) -> list[Flag]:
    """Enter the GPUs of a server that pdbench did not start: those that are named, else those of its processes. A flag says why
    nothing of it can be measured. Raises UserError when a named GPU is not here."""
    here = list(gpu_indices())
    if named:
        if len(set(named)) < len(named) or not set(named) <= set(here):
            raise UserError(
                f"--single-gpus {' '.join(map(str, named))}: name different ones of this host's GPUs, {here}"
            )
        foreign.gpus = {"server": list(named)}
        return []
    server = split_url(foreign.url)
    remedy = "power is not measured; --single-gpus names its GPUs"
    if not machines.is_this_host(server.host):
        return [
            Flag(
                "power-elsewhere", f"{server.host} is no address of this host: {remedy} where it runs here all the same"
            )
        ]
    listening = [process.pid for process in machines.listeners(server.port)]
    gpus = nvml.gpus_of(listening)
    if here and not gpus:
        return [Flag("devices-unknown", f"which GPUs {foreign.url} uses is not told: {remedy}")]
    foreign.gpus = {"server": gpus} if gpus else {}
    foreign.processes = {"server": listening}
    return []


def _cooldown(options: Options) -> Cooldown:
    return Cooldown(options.power.cooldown_s if options.power.power else 0.0)


def _check_options(options: Options, trials: int, cluster: "Cluster | None") -> None:
    """Raises UserError before servers start, which takes minutes, for what could never be sent or set."""
    if trials < 1:
        raise UserError(f"--trials {trials}: at least 1 is needed")
    if cluster is None:
        plan.check(options.load)
    else:
        from pdbench.cluster import measuring

        measuring.check(cluster, options.load, options.power)


def _check_lengths(load: LoadConfig, max_model_len: int | None) -> None:
    """Raises UserError when prompt and output, as asked for, are longer than the model takes; distributions may still be."""
    longest = (load.input_tokens or 0) + load.output_tokens
    if max_model_len is not None and longest > max_model_len:
        raise UserError(
            f"--input-tokens {load.input_tokens or 0} and --output-tokens {load.output_tokens} are {longest} tokens and the model takes "
            f"{max_model_len}: ask for fewer, or serve with --max-model-len {longest}"
        )


@contextmanager
def started(deployment: Any, console: Console) -> Iterator[Any]:
    """The deployment up and healthy, one line a component; down at the end, with the memory of its GPUs free again."""
    console.print(
        f"[bold]{deployment.name}[/bold]: {', '.join(one.name for one in deployment.instances)} starting; logs in {deployment.config.log_dir}/"
    )
    told: dict[str, str] = {}
    told_s = time.monotonic()
    with console.status("starting") as status:

        def on_state(states: dict[str, str]) -> None:
            nonlocal told_s
            for name, state in states.items():
                if state.startswith("ready") and told.get(name) != state:
                    told[name] = state
                    console.print(f"  {name}: {state}", highlight=False)
                    told_s = time.monotonic()
            starting = " · ".join(f"{name} {state}" for name, state in states.items() if not state.startswith("ready"))
            status.update(starting or "ready")
            if starting and not console.is_terminal and time.monotonic() - told_s >= TELL_AGAIN_S:
                # A file or a pipe shows no status line: without this it would be silent for minutes.
                console.print(f"  {starting}", highlight=False)
                told_s = time.monotonic()

        with closing(deployment):
            deployment.start(on_state)
            status.stop()
            yield deployment


def _new_run(running: DeploymentInfo, clock: Clock, options: Options) -> Run:
    return Run(
        name=running.name,
        clock=clock,
        config=options.plain() | {"serve": running.config or None, "url": running.url, "model": running.model_name},
        host=machines.host_facts(),
        versions=machines.versions(),
    )


def _pass_gate(one: Run, verdict: Gate, console: Console) -> None:
    """Enter a start's verdict into its run, where the first failure stays, and tell it."""
    if one.gate is None or one.gate.passed:
        one.gate = verdict
    if not verdict.passed:
        one.flags.append(Flag("gate-failed", verdict.detail))
    style, word = ("green", "passed") if verdict.passed else ("bold red", "FAILED")
    console.print(f"  correctness gate [{style}]{word}[/{style}]: {verdict.detail}", highlight=False)


def _measure_into(
    one: Run,
    running: DeploymentInfo,
    options: Options,
    trials: list[int],
    console: Console,
    cooldown: Cooldown,
    check: Callable[[], None],
    cluster: "Cluster | None",
) -> None:
    """Run `trials` against `running` and add requests, devices, events and flags to `one`."""
    sampler: Any = nullcontext()
    load: Callable[..., LoadResult] = run_load
    if cluster is not None:
        from pdbench.cluster import measuring

        sampler = measuring.ClusterSampler(cluster, running, options.power, one.clock)
        load = partial(measuring.run_load, cluster)
    elif running.hosts:
        raise UserError(f"{running.url} is served by several nodes: measure it with --cluster auto")
    elif options.power.power:
        readers = open_readers(running.gpus, {} if running.gpus else running.processes)
        sampler = Sampler(readers, options.power.sample_interval_s, one.clock)
    locks: list[clocks.ClockLock] = []
    try:
        with clocks.locked_clocks(options.power, running.gpus) as locks, sampler:
            on_gpus = running.gpus or any(host["gpus"] for host in running.hosts.values())
            if options.power.power and on_gpus and options.power.idle_s:
                sampler.idle(ENGINE_READY, options.power.idle_s)
            for trial in trials:
                start_c = cooldown.wait(sorted({gpu for gpus in running.gpus.values() for gpu in gpus}))
                _one_trial(one, running, options, trial, console, load)
                one.trials[-1].start_temperature_c = start_c
                check()
    finally:
        devices: list[DeviceRecord] = [] if isinstance(sampler, nullcontext) else sampler.records()
        one.devices = merge_records(one.devices + devices)
        one.config["clocks_held"] = [lock.to_dict() for lock in locks]
        one.flags += [flag for flag in clocks.clock_flags(locks, devices) if flag not in one.flags]
        one.roles = {}
        for device in one.devices:
            one.roles.setdefault(device.role or "host", []).append(device.id)
        if cluster is None:
            events = event_logs.read(running.event_logs, one.clock)
        else:
            events = sampler.events()
            one.host["nodes"] = sampler.facts()
            one.flags += [flag for flag in sampler.flags() if flag.name not in {known.name for known in one.flags}]
        event_logs.join([request for request in one.requests if request.trial in trials], events)
        one.events += events
    if cluster is not None:
        cluster.check()


def _one_trial(
    one: Run, running: DeploymentInfo, options: Options, trial: int, console: Console, load: Callable[..., LoadResult]
) -> None:
    begin = time.monotonic()
    with console.status(f"trial {trial + 1}") as status:

        def on_progress(done: int, total: int | None) -> None:
            status.update(f"trial {trial + 1}: {done} of {total or '?'} requests")

        result = load(
            options.load,
            url=running.url,
            model=running.model_name,
            clock=one.clock,
            trial=trial,
            tokenizer_path=running.model_path,
            on_progress=on_progress,
        )
    measured = [request for request in result.requests if not request.warmup]
    interrupted = any(flag.name == "interrupted" for flag in result.flags)
    if measured or not interrupted:  # a trial that was interrupted amid its warm-up is none
        one.requests += result.requests
        one.trials.append(result.trial)
    one.flags += [flag for flag in result.flags if flag not in one.flags]
    if interrupted:
        raise KeyboardInterrupt
    for flag in result.flags:
        if flag.name == "client-lost":
            raise UserError(flag.detail)
    failed = sum(request.error is not None for request in measured)
    word = f"[red]{failed} failed[/red]" if failed else "none failed"
    console.print(
        f"  trial {trial + 1}: {len(measured)} requests, {word}, {time.monotonic() - begin:.1f} s", highlight=False
    )
    if measured and failed == len(measured):
        error = measured[0].error
        assert error is not None
        raise UserError(
            f"every request to {running.url} failed, the first with {error.kind}: {error.message}; read the servers' logs"
        )


def _save_all(runs: dict[DeploymentKind, Run], out: Path, on_saved: Callable[[Path], None]) -> None:
    """One after the other, whatever goes wrong with the others; an exception goes on at the end."""
    with _undisturbed(), ExitStack() as each:
        for one in reversed(runs.values()):
            each.callback(_save, one, out, on_saved)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not cost what the first one let us keep."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _save(one: Run, out: Path, on_saved: Callable[[Path], None]) -> None:
    """Nothing measured: nothing written, so that the results of an earlier run stay."""
    if one.requests:
        on_saved(save_run(one, out / f"{one.name}_results").parent)


if __name__ == "__main__":
    print(interleave(("single", "disaggregated"), 3))
