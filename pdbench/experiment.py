"""Servers up -> correctness check -> load and device samples -> saved -> down. Nothing is judged here."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pdbench import correctness, failures, turns
from pdbench import events as event_logs
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig
from pdbench.errors import UserError
from pdbench.events import Event, ProxyEvent, TransferEvent
from pdbench.files import check_writable
from pdbench.http import get, offered_model
from pdbench.load import plan
from pdbench.load.generator import OnProgress
from pdbench.load.plan import TrialLoad
from pdbench.power import clocks
from pdbench.power.idle import ENGINE_READY, Cooldown, idle_before_start
from pdbench.power.sampler import merge_records
from pdbench.records import Clock, Flag, Gate, RequestRecord, Run, save_run
from pdbench.server_metrics import PrefixCacheReader
from pdbench.serving import deployment as deployments
from pdbench.serving import machine as machines
from pdbench.serving.deployment import DeploymentInfo
from pdbench.serving.watch import RunningServers, Servers, Watch
from pdbench.site import Measurement, Site

DEATH_S = 2.0
"""After a load with failures: how long a server that is about to end may take for it."""


def run(
    kinds: Sequence[DeploymentKind],
    design: PairConfig,
    options: Options,
    out: Path,
    console: Console,
    site: Site,
    runs: dict[Path, Run],
    enough: Callable[[], bool] | None = None,
) -> None:
    """Measure the deployments in pairs; `runs` gets each run by its folder, `out`/KIND_results, when it is saved.

    `enough`, called before every pair but the first, ends a run with --until. What was measured is saved after every turn, and when a server dies
    or the user interrupts; the error then propagates. Raises UserError for what cannot be done here, before anything starts
    where that can be known.
    """
    site.check_options(options.load, options.power)
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--against {','.join(kinds)} names a deployment twice: each once, --pairs repeats them")
    folders = {kind: out / f"{kind}_results" for kind in kinds}
    for folder in (out, *(folder for folder in folders.values() if folder.exists())):
        check_writable(folder)
    _check_lengths(options.load, options.serve.max_model_len)
    planned = [site.deployment(kind, options.serve) for kind in kinds]
    gpus = [deployment.info().local_gpus() for deployment in planned if deployment.commands]
    design = turns.resolve(design, on_gpu=any(gpus) or not gpus)
    serve = turns.side_by_side(kinds, options.serve) if design.resident else dict.fromkeys(kinds, options.serve)
    if design.resident:
        planned = [site.deployment(kind, serve[kind]) for kind in kinds]
    for deployment in planned:
        deployment.check_ports()
    if any(spec.role == "proxy" for deployment in planned for spec in deployment.specs):
        correctness.check_key()
    clocks.check(options.power, gpus)
    measured = turns.saved_runs(folders, serve, design, options) if design.resume else {}
    runs |= {folders[kind]: run for kind, run in measured.items()}
    clock = next((run.clock.resumed() for run in measured.values()), None) or Clock.start()
    done = {(kind, trial.index) for kind, run in measured.items() for trial in run.trials}
    options = next((replace(options, load=turns.saved_load(run)) for run in measured.values()), options)
    options = replace(options, load=plan.resolved(options.load))
    assert design.pairs
    left = max(0, design.pairs * len(kinds) - len(done))
    console.print(turns.announce(kinds, design, options, left, on_gpu=any(gpus)), highlight=False)
    idle: dict[str, dict[str, float | None]] = {}  # of all GPUs that the run will use, before anything runs on them
    used = sorted({gpu for by_role in gpus for indices in by_role.values() for gpu in indices})
    if used and options.power.power and options.power.idle_s:
        console.print(f"idle power of GPU {', '.join(map(str, used))}: {2 * options.power.idle_s:g} s")
        idle = idle_before_start(used, options.power.idle_s)
    gate_nonce = int(clock.unix_s)
    cooldown = _cooldown(options)
    reference: list[str] | None = None
    starts = max((trial.start or 0 for run in measured.values() for trial in run.trials), default=-1) + 1
    with closing(turns.Servers(site, console, serve, design, starts)) as servers:
        begin_s, turns_done = time.monotonic(), 0
        for pair in range(design.most_pairs if enough else design.pairs):
            missing = [kind for kind in turns.order(kinds, pair) if (kind, pair) not in done]
            if missing and enough and runs and enough():
                break
            for kind in missing:
                deployment, fresh = servers.take(kind)
                info = deployment.info()
                run = measured.setdefault(kind, _new_run(info, clock, options))
                run.config["pairs"] = asdict(design)
                if fresh and kind == "disaggregated":  # each start has connections and KV caches of its own
                    _record_gate(run, _check_outputs(info, gate_nonce, reference, deployment)[0], console)
                elif kind == "single" and reference is None:
                    reference = _check_outputs(info, gate_nonce, reference, deployment)[1]
                try:
                    _measure(run, info, options, [pair], console, cooldown, site, deployment, idle=fresh)
                finally:
                    for trial in run.trials:
                        if trial.index == pair:
                            trial.start = servers.starts
                    for device in run.devices:
                        device.idle_power_w = idle.get(device.id, {}) | device.idle_power_w
                    _save(run, folders[kind], runs)
                turns_done += 1
            if 0 < turns_done < left:
                remaining_s = (time.monotonic() - begin_s) / turns_done * (left - turns_done)
                console.print(f"about {turns.duration(remaining_s)} left", highlight=False)


def bench(
    url: str, trials: int, options: Options, out: Path, console: Console, site: Site, runs: dict[Path, Run]
) -> None:
    """Measure the server at `url`, started by pdbench or not; `runs` gets the run by its folder when it is saved.

    A deployment of `pdbench serve` with the same --log-dir is recognised, and its model, devices and events with it.
    """
    site.check_options(options.load, options.power)
    check_writable(out)
    info = deployments.find(Path(options.serve.log_dir), url)
    flags: list[Flag] = []
    if info is None:
        model = options.serve.model or offered_model(url, verify_tls=options.load.tls_verify)
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
    _check_lengths(options.load, info.config.get("max_model_len"))
    for flag in flags:
        console.print(f"  [yellow]{flag.name}[/yellow]: {escape(flag.detail)}", highlight=False)
    clocks.check(options.power, [info.local_gpus()])
    options = replace(options, load=plan.resolved(options.load))
    clock = Clock.start()
    run = _new_run(info, clock, options)
    run.flags += flags
    servers = RunningServers(info, Path(options.serve.log_dir), verify_tls=options.load.tls_verify)
    if info.name == "disaggregated":
        _record_gate(run, _check_outputs(info, int(clock.unix_s), None, servers)[0], console)
    try:
        _measure(run, info, options, list(range(trials)), console, _cooldown(options), site, servers)
    finally:
        _save(run, out / f"{run.name}_results", runs)


def _check_lengths(load: LoadConfig, max_model_len: int | None) -> None:
    """Raises UserError when prompt and output are longer together than the model takes; distributions may still be."""
    longest = (load.input_tokens or 0) + load.output_tokens
    if load.trace:
        _rows_too_long(load, max_model_len)
    elif max_model_len is not None and longest > max_model_len:
        raise UserError(
            f"--input-tokens {load.input_tokens or 0} and --output-tokens {load.output_tokens} are {longest} tokens and the model takes "
            f"{max_model_len}: ask for fewer, or serve with --max-model-len {longest}"
        )


def _cooldown(options: Options) -> Cooldown:
    return Cooldown(options.power.cooldown_s if options.power.power else 0.0)


def _file_words(load: LoadConfig) -> list[str]:
    """What is sent of a trace or prompt file; nothing where the file is another node's."""
    try:
        return plan.describe_files(load)
    except UserError:
        return []


def _rows_too_long(load: LoadConfig, max_model_len: int | None) -> str | None:
    """See plan.rows_too_long; None where the trace is another node's file."""
    return plan.rows_too_long(load, max_model_len) if load.trace and Path(load.trace).exists() else None


def _new_run(info: DeploymentInfo, clock: Clock, options: Options) -> Run:
    run = Run(
        name=info.name,
        clock=clock,
        config=options.plain()
        | {
            "serve": info.config or None,
            "url": info.url,
            "model": info.model_name,
            "inputs": _file_words(options.load),
        },
        host=machines.host_facts(),
        versions=machines.versions(),
    )
    too_long = _rows_too_long(options.load, info.config.get("max_model_len"))
    if too_long:
        run.flags.append(Flag("rows-too-long", too_long))
    return run


def _check_outputs(
    info: DeploymentInfo, nonce: int, reference: list[str] | None, servers: Servers
) -> tuple[Gate, list[str]]:
    """The correctness check. Raises UserError, which names the server that died, if one did."""
    try:
        return correctness.run(info, nonce, reference)
    except UserError:
        if Watch(servers.death).problem_within(DEATH_S):
            servers.check()
        raise


def _record_gate(run: Run, gate: Gate, console: Console) -> None:
    """Print the correctness check of one start; in the run, the first failed one stays."""
    if run.gate is None or run.gate.passed:
        run.gate = gate
    if not gate.passed:
        run.flags.append(Flag("gate-failed", gate.detail))
    style, word = ("green", "passed") if gate.passed else ("bold red", "FAILED")
    console.print(f"  correctness gate [{style}]{word}[/{style}]: {gate.detail}", highlight=False)


def _measure(
    run: Run,
    info: DeploymentInfo,
    options: Options,
    trials: list[int],
    console: Console,
    cooldown: Cooldown,
    site: Site,
    servers: Servers,
    *,
    idle: bool = True,
) -> None:
    """Run `trials` against `info` and add requests, devices, events and flags to `run`; before them, `idle`: the idle power."""
    streams, taken = plan.streams(options.load), info.config.get("max_num_seqs")
    line = f"  load: {plan.describe(options.load)}"
    if streams and taken and streams > taken:
        line += f"; the servers work on {taken} at once (--max-num-seqs), the others wait in their queue"
    console.print(line, markup=False, highlight=False)
    measurement = site.measurement(info, options.power, run.clock)
    gpus = info.local_gpus()
    locks: list[clocks.ClockLock] = []
    try:
        with clocks.locked_clocks(options.power, gpus) as locks, measurement:
            if idle and options.power.power and options.power.idle_s and any(server.gpus for server in info.servers):
                measurement.idle(ENGINE_READY, options.power.idle_s)
            for trial in trials:
                start_c = cooldown.wait(sorted({gpu for indices in gpus.values() for gpu in indices}))
                _run_trial(run, info, options, trial, console, site, servers)
                run.trials[-1].start_temperature_c = start_c
                servers.check()
    finally:
        devices = measurement.devices()
        run.devices = merge_records(run.devices + devices)
        run.config["clocks_held"] = [asdict(lock) for lock in locks]
        run.host |= measurement.host_facts()
        flagged = {flag.name for flag in run.flags}
        run.flags += [flag for flag in measurement.flags() if flag.name not in flagged]
        run.flags += [flag for flag in clocks.clock_flags(locks, devices) if flag not in run.flags]
        run.roles = {}
        for device in run.devices:
            run.roles.setdefault(device.role or "host", []).append(device.id)
        events, requests = measurement.events(), [request for request in run.requests if request.trial in trials]
        has_prefill = {"proxy", "prefill"} <= {server.role for server in info.servers}
        has_prefill |= info.name == "bench" and any(flag.name == "event-log-missing" for flag in run.flags)
        event_logs.join(requests, events, has_prefill)
        run.events += events
        run.flags += [flag for flag in _event_log_flags(info, requests, events, measurement) if flag not in run.flags]
    site.check()


def _event_log_flags(
    info: DeploymentInfo, requests: Sequence[RequestRecord], events: Sequence[Event], measurement: Measurement
) -> Iterator[Flag]:
    """One for each server whose event log is gone, or which has no event of the requests that it must have seen."""
    proxied = {event.request_id for event in events if isinstance(event, ProxyEvent)}
    sides = {event.side for event in events if isinstance(event, TransferEvent)}
    answered = [request.id for request in requests if request.error is None and request.token_s]
    gone = measurement.missing_logs()
    for server in info.servers:
        if server.event_log is None:
            continue
        lost = len(answered) if server.event_log in gone else 0
        if server.role == "proxy":
            # The last ones may not be written yet.
            lost = max(lost, sum(request not in proxied for request in answered))
        elif sides and ("send" if server.role == "prefill" else "receive") not in sides:
            lost = len(answered)
        if lost > 0.1 * len(answered):
            what = f"{server.name} logged nothing of {lost} of {len(answered)} requests in {server.event_log}"
            yield Flag("event-log-missing", f"{what}: their phases are not measured; start the servers again")


def _run_trial(
    run: Run, info: DeploymentInfo, options: Options, trial: int, console: Console, site: Site, servers: Servers
) -> None:
    begin_s = time.monotonic()
    watch = Watch(servers.death)
    with _progress(f"trial {trial + 1}", console) as on_progress:
        config = replace(options.load, tokenizer=options.load.tokenizer or info.model_path)
        load = TrialLoad(config, info.url, info.model_name, run.clock, trial)
        caches = PrefixCacheReader(info, verify_tls=config.tls_verify)

        def begin() -> None:
            if not watch.died:  # a server that hangs would take its time to answer
                caches.start()

        result = site.run_load(load, on_progress, begin, watch.problem)
        measured = [request for request in result.requests if not request.warmup]
        failed = failures.describe(measured)
        died = watch.problem_within(DEATH_S if any(request.error for request in measured) else 0.0)
        result.trial.prefix_cache = {} if died else caches.stop()
    interrupted = any(flag.name == "interrupted" for flag in result.flags)
    if measured or not (interrupted or died):  # a trial that was ended during its warm-up is none
        run.requests += result.requests
        run.trials.append(result.trial)
    if died:
        console.print(f"[bold red]{escape(died)}[/bold red]", highlight=False, soft_wrap=True)
        result.flags.append(
            Flag("server-died", f"trial {trial + 1}: {died}; the figures are of what was measured until then")
        )
    run.flags += [flag for flag in result.flags if flag not in run.flags]
    if interrupted:
        raise KeyboardInterrupt
    for flag in result.flags:
        if flag.name == "client-lost":
            raise UserError(flag.detail)
    if not measured:
        servers.check()
        raise UserError(f"trial {trial + 1} sent no request: give a higher --rate or a longer --duration-s")
    line = f"  trial {trial + 1}: {len(measured)} requests, {time.monotonic() - begin_s:.1f} s, "
    console.print(line + (f"[red]{escape(failed)}[/red]" if failed else "none failed"), highlight=False, soft_wrap=True)
    if all(request.error for request in measured):
        servers.check()
        error = measured[0].error
        assert error is not None
        raise UserError(
            f"every request to {info.url} failed, the first with {error.kind}: {error.message}; read the servers' logs"
        )


@contextmanager
def _progress(title: str, console: Console) -> Iterator[OnProgress]:
    """A status line about a load; where there is no terminal, a line every ten seconds."""
    line, ended, begin_s = f"{title}: warm-up", threading.Event(), time.monotonic()
    with console.status(line) as status:

        def on_progress(done: int, total: int | None) -> None:
            nonlocal line
            line = f"{title}: {done} of {total or '?'} requests"
            status.update(line)

        def print_lines() -> None:
            while not ended.wait(turns.PROGRESS_EVERY_S):
                console.print(f"  {line}, {time.monotonic() - begin_s:.0f} s", highlight=False)

        thread = threading.Thread(target=print_lines, daemon=True)
        if not console.is_terminal:
            thread.start()
        try:
            yield on_progress
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join()


def _save(run: Run, folder: Path, runs: dict[Path, Run]) -> None:
    """Nothing measured: nothing written, so that the results of an earlier run stay."""
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
        save_run(run, folder)
        runs[folder] = run
