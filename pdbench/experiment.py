"""Servers up -> correctness check -> load and device samples -> saved -> down. Figures are derived afterwards, in analysis."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pdbench import correctness, documents, turns
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig
from pdbench.errors import OptionError, UserError, span
from pdbench.files import check_writable, results_files, save_somewhere
from pdbench.http import get, offered_model
from pdbench.live import publisher
from pdbench.load import plan
from pdbench.load.contents import contents_of
from pdbench.power import clocks
from pdbench.power.idle import Idle, idle_before_start
from pdbench.power.tenants import in_use
from pdbench.records import Clock, Flag, Run, save_run
from pdbench.serving import deployment as deployments
from pdbench.serving import machine as machines
from pdbench.serving.deployment import DeploymentInfo
from pdbench.serving.watch import RunningServers
from pdbench.site import Site
from pdbench.trial import Judge, Shared, check_again, check_outputs, measure, record_gate

SILENCE_S = 2.0
"""How long nothing is said while files are read."""


def run(
    kinds: Sequence[DeploymentKind],
    design: PairConfig,
    options: Options,
    out: Path,
    console: Console,
    site: Site,
    runs: dict[Path, Run],
    enough: Callable[[], bool] | None = None,
    servers: turns.Servers | None = None,
    judge: Judge | None = None,
) -> None:
    """Measure the deployments in pairs; `runs` gets each run by its folder, `out`/KIND_results, when it is saved.

    `enough`, called before every pair but the first, ends a run with --until. `servers` may be up already, and those that stay are left up; `judge` may
    end a load early. What was measured is saved after every turn, and when a server dies or the user interrupts; the error then propagates. Raises
    UserError for what cannot be done here, before anything starts where that can be known.
    """
    if servers is None:
        with closing(turns.Servers(site, console)) as servers:
            run(kinds, design, options, out, console, site, runs, enough, servers, judge)
        return
    _check_options(site, options, console)
    if len(set(kinds)) < len(kinds):
        raise OptionError(f"--against {','.join(kinds)} names a deployment twice: each once, --pairs repeats them")
    folders = {kind: out / f"{kind}_results" for kind in kinds}
    for folder in (out, *(folder for folder in folders.values() if folder.exists())):
        check_writable(folder)
    _check_lengths(options.load, options.serve.max_model_len)
    planned = [site.deployment(kind, options.serve) for kind in kinds]
    gpus = [deployment.info().local_gpus() for deployment in planned if deployment.commands]
    on_gpu = any(gpus) or not gpus
    design = turns.resolve(design, on_gpu=on_gpu)
    options = replace(options, load=turns.shortened(options.load, on_gpu=on_gpu))
    serve = turns.side_by_side(kinds, options.serve) if design.resident else dict.fromkeys(kinds, options.serve)
    if design.resident:
        planned = [site.deployment(kind, serve[kind]) for kind in kinds]
    servers.serve(options.serve)
    if not servers.are_up(serve if design.resident else {kinds[0]: serve[kinds[0]]}):
        servers.close()
        for deployment in planned:
            deployment.check_ports()
    if any(spec.role == "proxy" for deployment in planned for spec in deployment.specs):
        correctness.check_key()
    clocks.check(options.power, gpus)
    measured = turns.saved_runs(folders, serve, design, options) if design.resume else {}
    runs |= {folders[kind]: run for kind, run in measured.items()}
    clock = next((run.clock.resumed() for run in measured.values()), None) or servers.clock
    for saved in measured.values():
        saved.clock = clock  # all runs of a command have one
    done = {(kind, trial.index) for kind, run in measured.items() for trial in run.trials}
    options = next((replace(options, load=turns.saved_load(run)) for run in measured.values()), options)
    options = replace(options, load=plan.resolved(options.load))
    assert design.pairs
    left = max(0, design.pairs * len(kinds) - len(done))
    if not servers.stay:
        waves = {deployment.kind: len(deployment.waves()) for deployment in planned if deployment.commands}
        console.print(turns.announce(kinds, design, options, left, waves, on_gpu=on_gpu))
        if not design.resume:
            _say_replaced(console, folders.values(), "--resume adds to them, another --out keeps them")
        if not on_gpu:
            console.print("no GPU here: this shows that everything works, not whether disaggregation pays")
    used = sorted({gpu for by_role in gpus for indices in by_role.values() for gpu in indices})
    if used and servers.starts < 0:
        servers.flags = list(in_use(used))
        for flag in servers.flags:
            console.print(f"[yellow]{flag.name}[/yellow]: {flag.detail}", soft_wrap=True)
    if used and options.power.power and options.power.idle_s and not servers.up:
        console.print(f"measuring the idle power of GPU {', '.join(map(str, used))} for {2 * options.power.idle_s:g} s")
        servers.idle = idle_before_start(used, options.power.idle_s)  # before anything runs on them
    gate_nonce = int(clock.unix_s)
    shared = Shared(options, console, site, judge)
    servers.starts = max([servers.starts, *(trial.start or 0 for run in measured.values() for trial in run.trials)])
    begin_s, turns_done, starting_s = time.monotonic(), 0, 0.0
    for pair in range(design.most_pairs if enough else design.pairs):
        missing = [kind for kind in turns.order(kinds, pair) if (kind, pair) not in done]
        if missing and enough and runs and enough():
            break
        for kind in missing:
            take_s = time.monotonic()
            deployment, fresh = servers.take(kind, serve, design)
            starting_s += time.monotonic() - take_s
            info = deployment.info()
            result = measured.setdefault(kind, _new_run(info, clock, options))
            result.config["pairs"] = asdict(design)
            result.flags += [flag for flag in servers.flags if flag not in result.flags]
            if fresh and kind == "disaggregated":  # each start has connections and KV caches of its own
                servers.gates[kind] = check_outputs(info, gate_nonce, servers.reference, deployment)[0]
                record_gate(result, servers.gates[kind], console)
            elif kind in servers.gates and result.gate is None:
                record_gate(result, servers.gates[kind])
            elif kind == "single" and servers.reference is None:
                servers.reference = check_outputs(info, gate_nonce, None, deployment)[1]
            try:
                measure(result, info, [pair], deployment, shared, idle=fresh)
                check_again(result, info, console, deployment)
            finally:
                for trial in result.trials:
                    if trial.index == pair:
                        trial.start = servers.starts
                for device in result.devices:
                    before = servers.idle.get(device.label, Idle({}, {}))
                    device.idle_power_w = before.power_w | device.idle_power_w
                    device.idle_utilization_pct = before.utilization_pct | device.idle_utilization_pct
                    servers.idle[device.label] = Idle(dict(device.idle_power_w), dict(device.idle_utilization_pct))
                _save(result, folders[kind], runs)
            turns_done += 1
        if 0 < turns_done < left:
            spent_s = time.monotonic() - begin_s - (starting_s if design.resident else 0.0)  # those start once
            remaining_s = spent_s / turns_done * (left - turns_done)
            console.print(f"about {span(round(remaining_s))} left")
            publisher.put(publisher.TimeLeft(remaining_s))


def bench(
    url: str,
    trials: int,
    options: Options,
    out: Path,
    console: Console,
    site: Site,
    runs: dict[Path, Run],
    judge: Judge | None = None,
) -> None:
    """Measure the server at `url`, started by pdbench or not; `runs` gets the run by its folder when it is saved.

    A deployment of `pdbench serve` with the same --log-dir is recognised, and its model, devices and events with it.
    """
    _check_options(site, options, console)
    site.check_gpus(options.serve, running=True)
    check_writable(out)
    info = deployments.find(Path(options.serve.log_dir), url)
    flags: list[Flag] = []
    if info is None:
        model = offered_model(url, options.serve.model, verify_tls=options.load.tls_verify)
        info = DeploymentInfo(name="bench", url=url, model_name=model)
        proxied = get(url, "/metrics", timeout_s=3.0) or b""
        where = f"--log-dir {deployments.proxy_log_folder(url) or 'FOLDER'} names the log folder of its `pdbench serve`"
        if options.power.power or clocks.requested_options(options.power):
            if b"pdbench_proxy_" in proxied and not options.serve.single_gpus:
                # The process that listens is the proxy: its CPU use is not the server's.
                detail = f"{url} is a pdbench proxy: the devices of its servers are not measured; {where}"
                flags = [Flag("devices-unknown", detail)]
            else:
                flags = site.assign_devices(info, options)
        if flags:
            options = replace(options, power=replace(options.power, power=False))
        if b'pdbench_proxy_instance_ready{role="prefill"' in proxied:
            detail = f"{url} is a pdbench proxy that logs elsewhere: phases are not measured; {where}"
            flags.append(Flag("event-log-missing", detail))
    folder = out / f"{info.name}_results"
    if folder.exists():
        check_writable(folder)
    _check_lengths(options.load, info.config.get("max_model_len"))
    for flag in flags:
        console.print(f"  [yellow]{flag.name}[/yellow]: {escape(flag.detail)}")
    publisher.put(publisher.Flags("bench", flags))
    clocks.check(options.power, [info.local_gpus()])
    options = replace(options, load=plan.resolved(options.load))
    _say_replaced(console, [folder], "another --out keeps them")
    clock = Clock.start()
    run = _new_run(info, clock, options)
    run.flags += flags
    servers = RunningServers(info, Path(options.serve.log_dir), verify_tls=options.load.tls_verify)
    if info.name == "disaggregated":
        record_gate(run, check_outputs(info, int(clock.unix_s), None, servers)[0], console)
    shared = Shared(options, console, site, judge)
    try:
        measure(run, info, list(range(trials)), servers, shared)
        check_again(run, info, console, servers)
    finally:
        _save(run, folder, runs)


def served_models(url: str, points: Iterable[Options]) -> dict[str | None, str]:
    """The model that `bench` would measure at `url`, by the option --model.

    Raises UserError when nothing answers there, before many loads are sent.
    """
    models: dict[str | None, str] = {}
    for model, verify_tls, log_dir in {
        (options.serve.model, options.load.tls_verify, options.serve.log_dir) for options in points
    }:
        offered = offered_model(url, model, verify_tls=verify_tls)
        info = deployments.find(Path(log_dir), url)
        models[model] = info.model_name if info else offered
    return models


def _check_options(site: Site, options: Options, console: Console) -> None:
    """Raises UserError for what cannot be done here. A large file is not read in silence."""
    words = f"reading {options.load.trace or options.load.prompt_file}, which is large"
    timer = threading.Timer(SILENCE_S, console.print, [words], {"markup": False, "soft_wrap": True})
    if options.load.trace or options.load.prompt_file:
        timer.start()
    try:
        site.check_options(options.load, options.power)
    finally:
        timer.cancel()


def _say_replaced(console: Console, folders: Iterable[Path], remedy: str) -> None:
    """What was measured before and will be replaced, if anything."""
    if older := [str(folder) for folder in folders if results_files(folder)]:
        console.print(f"replaces the earlier results in {', '.join(older)} ({remedy})", markup=False, soft_wrap=True)


def _check_lengths(load: LoadConfig, max_model_len: int | None) -> None:
    """Raises UserError when prompt and output are longer together than the model takes; distributions may still be."""
    longest = (load.input_tokens or 1) + load.output_tokens
    if load.trace:
        plan.rows_too_long(load, max_model_len)
    elif max_model_len is not None and longest > max_model_len:
        if load.input_tokens is None:  # texts, whose length in tokens only the tokenizer knows
            raise UserError(
                f"{load.output_tokens} output tokens (--output-tokens) leave no room for a prompt in the {max_model_len} tokens that the model takes: "
                "ask for fewer, or serve with a --max-model-len that holds both"
            )
        raise UserError(
            f"--input-tokens {load.input_tokens} and --output-tokens {load.output_tokens} are {longest} tokens and the model takes "
            f"{max_model_len}: ask for fewer, or serve with --max-model-len {longest}"
        )


def _new_run(info: DeploymentInfo, clock: Clock, options: Options) -> Run:
    config = options.plain() | {"serve": info.config or None, "url": info.url, "model": info.model_name}
    config |= {"inputs": plan.describe_files(options.load), "contents": contents_of(options.load)}
    config["gpus"] = len({(server.host, gpu) for server in info.servers for gpu in server.gpus}) or None
    run = Run(
        name=info.name,
        clock=clock,
        config=documents.as_read_back(config),
        host=machines.host_facts(),
        versions=machines.versions(),
    )
    too_long = plan.rows_too_long(options.load, info.config.get("max_model_len"))
    if too_long:
        run.flags.append(Flag("rows-too-long", too_long))
    if sharing := info.config.get("sharing"):
        run.flags.append(Flag("gpu-shared", sharing))
    return run


def _save(run: Run, folder: Path, runs: dict[Path, Run]) -> None:
    """Nothing measured: nothing written, so that the results of an earlier run stay.

    Raises WriteError when `folder` cannot be written; the run is then saved where there is room, as it cannot be had again.
    """
    if not run.requests:
        return
    # A second Ctrl-C does not cost what the first one let us keep: it counts afterwards.
    pending: list[int] = []

    def deliver() -> None:
        if pending:
            signal.raise_signal(pending[0])

    with ExitStack() as restoring:
        restoring.callback(deliver)
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda received, _: pending.append(received))
            restoring.callback(signal.signal, number, before)
        place, problem = save_somewhere(lambda path: save_run(run, path), folder)
        if problem:
            runs.pop(folder, None)  # an earlier saving of it
        runs[place] = run
        if problem:
            raise problem
