"""One deployment's turn: its load with device samples, and what of it goes into the run."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Protocol

from msgspec import structs
from rich.console import Console
from rich.markup import escape

from pdbench import correctness, failures
from pdbench import events as event_logs
from pdbench.analysis.meter import with_mean_power
from pdbench.canaries import Canaries, References
from pdbench.config import Options
from pdbench.errors import UserError
from pdbench.events import Event, ProxyEvent, ServerSeries, TransferEvent
from pdbench.http import split_url
from pdbench.live import publisher, terminal
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.load.plan import TrialLoad
from pdbench.power import clocks
from pdbench.power.idle import ENGINE_READY, Cooldown
from pdbench.power.sampler import merge_records
from pdbench.power.tenants import cores_contended, cores_used
from pdbench.records import DeviceRecord, Flag, Gate, RequestRecord, Run
from pdbench.server_metrics import ServerMetrics, engine_facts, join_series
from pdbench.serving.deployment import DeploymentInfo
from pdbench.serving.machine import is_this_host
from pdbench.serving.watch import Servers, Watch
from pdbench.site import Measurement, Site

DEATH_S = 2.0
"""After a load with failures: how long a server that is about to end may take for it."""

SLEPT_S = 0.1


class Judge(Protocol):
    """Looks on while a load runs, and may end it before its last request."""

    def on_progress(self, progress: Progress) -> None: ...

    def decided(self) -> str | None:
        """Why the load may end; None while it may not."""


def check_outputs(
    info: DeploymentInfo, nonce: int, reference: list[RequestRecord] | None, servers: Servers
) -> tuple[Gate, list[RequestRecord]]:
    """The correctness check. Raises UserError, which names the server that died, if one did."""
    try:
        return correctness.run(info, nonce, reference)
    except UserError:
        if Watch(servers.death).problem_within(DEATH_S):
            servers.check()
        raise


def record_gate(run: Run, gate: Gate, console: Console | None = None) -> None:
    """Print the correctness check of one start (without `console`: it was printed then); in the run, the first failed one stays."""
    if run.gate is None or run.gate.passed:
        run.gate = structs.replace(gate, canaries=run.gate.canaries if run.gate else {})
    if not gate.passed:
        run.flags.append(Flag("gate-failed", gate.detail))
    words = "Correctness check passed: {0}" if gate.passed else "CORRECTNESS CHECK FAILED: {0}"
    publisher.stage(words, gate.detail, is_problem=not gate.passed)
    style, word = ("green", "passed") if gate.passed else ("bold red", "FAILED")
    if console:
        console.print(f"  correctness gate [{style}]{word}[/{style}]: {gate.detail}", soft_wrap=True)


def check_again(run: Run, info: DeploymentInfo, console: Console, servers: Servers) -> None:
    """The correctness check of prefill and decode once more, after a load. Its prompts are new to their caches: prefill is the reference."""
    if info.name == "disaggregated":
        gate = check_outputs(info, time.time_ns(), None, servers)[0]
        if gate.passed:
            console.print("  correctness after the load: [green]passed[/green]")
        else:
            record_gate(run, structs.replace(gate, detail=f"after the load: {gate.detail}"), console)


@dataclass(frozen=True)
class Shared:
    """What the turns of one command have in common. `references`: the answers that canaries are compared with, of all deployments that
    have the same trials."""

    options: Options
    console: Console
    site: Site
    judge: Judge | None
    references: References = field(default_factory=dict)

    @cached_property
    def cooldown(self) -> Cooldown:
        return Cooldown(self.options.power.cooldown_s if self.options.power.power else 0.0)


def measure(
    run: Run, info: DeploymentInfo, trials: list[int], servers: Servers, shared: Shared, *, idle: bool = True
) -> None:
    """Run `trials` against `info` and add requests, devices, events and flags to `run`; before them, `idle`: the idle power."""
    options, console, site = shared.options, shared.console, shared.site
    streams, taken = plan.streams(options.load), info.config.get("max_num_seqs")
    line = f"  load: {plan.describe(options.load)}"
    if streams and taken and streams > taken:
        line += f"; the servers work on {taken} at once (--max-num-seqs), the others wait in their queue"
    if not run.requests:  # all turns of a run have the same
        console.print(line, markup=False, soft_wrap=True)
    measurement = site.measurement(info, options.power, run.clock)
    gpus, canaries = info.local_gpus(), Canaries(info, shared.references)
    locks: list[clocks.ClockLock] = []
    try:
        with clocks.locked_clocks(options.power, gpus) as locks, measurement:
            if idle and options.power.power and options.power.idle_s and any(server.gpus for server in info.servers):
                measurement.idle(ENGINE_READY, options.power.idle_s)
            run.engines |= engine_facts(info, verify_tls=options.load.tls_verify)
            for trial in trials:
                start_c = shared.cooldown.wait(sorted({gpu for indices in gpus.values() for gpu in indices}))
                with publisher.source(lambda: [publisher.Devices(measurement.latest())]):
                    _run_trial(run, info, trial, servers, measurement.latest, canaries, shared)
                run.trials[-1].start_temperature_c = start_c
                servers.check()
    finally:
        devices = measurement.devices()
        run.devices = [with_mean_power(device) for device in merge_records(run.devices + devices)]
        run.config["clocks_held"] = [asdict(lock) for lock in locks]
        run.host |= measurement.host_facts()
        flagged = {flag.name for flag in run.flags}
        run.flags += [flag for flag in measurement.flags() if flag.name not in flagged]
        run.flags += [flag for flag in clocks.clock_flags(locks, devices) if flag not in run.flags]
        run.roles = {}
        for device in run.devices:
            run.roles.setdefault(device.role or "host", []).append(device.label)
        events, requests = measurement.events(), [request for request in run.requests if request.trial in trials]
        has_prefill = {"proxy", "prefill"} <= {server.role for server in info.servers}
        has_prefill |= info.name == "bench" and any(flag.name == "event-log-missing" for flag in run.flags)
        event_logs.join(requests, events, has_prefill)
        canaries.report(run, requests, events)
        run.events += events
        run.flags += [flag for flag in _event_log_flags(info, requests, events, measurement) if flag not in run.flags]
        publisher.put(publisher.Flags(run.name, run.flags[:]))
    site.check()


def _roots_here(info: DeploymentInfo) -> list[int] | None:
    """The roots of the servers' processes on this host; None where not all are known: another host's, or those behind a foreign server."""
    foreign = info.name == "bench" and is_this_host(split_url(info.url).host)
    if foreign or any(server.host for server in info.servers):
        return None
    return [pid for server in info.servers for pid in server.pids]


def _event_log_flags(
    info: DeploymentInfo, requests: Sequence[RequestRecord], events: Sequence[Event], measurement: Measurement
) -> Iterator[Flag]:
    """One for each server whose event log is gone, or which has no event of the requests that it must have seen."""
    proxied = {event.request_id for event in events if isinstance(event, ProxyEvent)}
    sides = {event.side for event in events if isinstance(event, TransferEvent) and event.direction == "handoff"}
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
    run: Run,
    info: DeploymentInfo,
    trial: int,
    servers: Servers,
    devices: Callable[[], list[DeviceRecord]],
    canaries: Canaries,
    shared: Shared,
) -> None:
    begin_s, options, console, judge = time.monotonic(), shared.options, shared.console, shared.judge
    watch = Watch(servers.death)
    publisher.put(publisher.Turn(run.name, trial, asdict(options.load)))
    publisher.stage("{0}: trial {1}", run.name, trial + 1)
    with terminal.progress(f"{run.name}, trial {trial + 1}", console, devices) as on_progress:
        config = replace(options.load, tokenizer=options.load.tokenizer or info.model_path)
        load = canaries.choose(TrialLoad(config, info.url, info.model_name, run.clock, trial))
        load_s = inf
        metrics = ServerMetrics(
            info,
            run.clock,
            options.power.metrics_interval_s,
            verify_tls=config.tls_verify,
            on_reading=lambda server, figures: publisher.put(publisher.ServerReading(server, figures)),
        )
        roots, asleep_s = _roots_here(info), _asleep_s()
        cores = cores_used(roots or ())

        def begin() -> None:
            nonlocal cores, load_s
            cores = cores_used(roots or ())
            if not watch.died:  # a server that hangs would take its time to answer
                metrics.begin()
                servers.log_lines(run.clock)  # what is new until now is the warm-up's
            load_s = run.clock.now()

        def progressed(progress: Progress) -> None:
            on_progress(progress)
            if judge:
                judge.on_progress(progress)

        def problem() -> str | None:
            return watch.problem() or (judge.decided() if judge else None)

        with metrics:
            try:
                result = shared.site.run_load(load, progressed, begin, problem)
            except UserError:  # a client's, which may be because a server dies
                if watch.problem_within(DEATH_S):
                    raise UserError(f"{watch.died}: no request was measured") from None
                raise
            after = cores_used(roots or ())
            if after.total > cores.total:
                result.trial.cpu_steal_pct = 100 * (after.steal - cores.steal) / (after.total - cores.total)
            if roots is not None:
                result.flags.extend(cores_contended(cores, after))
            if (slept_s := _asleep_s() - asleep_s) > SLEPT_S:
                detail = f"this host slept {slept_s:.1f} s during the load, and its clock stood still: latencies lack that time"
                result.flags.append(Flag("host-slept", f"{detail}; keep it awake, and measure again"))
            measured = [request for request in result.requests if not request.warmup]
            failed = failures.describe(measured)
            died = watch.problem_within(DEATH_S if failed else 0.0)
            result.trial.prefix_cache = {} if died else metrics.end()
        lines = servers.log_lines(run.clock)
    interrupted = any(flag.name == "interrupted" for flag in result.flags)
    if measured or not (interrupted or died):  # a trial that was ended during its warm-up is none
        run.requests += result.requests
        run.trials.append(result.trial)
        series = {each.server: each for each in metrics.series()}
        for server in info.servers:
            new = [line for line in lines.get(server.name, ()) if line.t_s >= load_s]
            if new:
                series.setdefault(server.name, ServerSeries(server=server.name, role=server.role)).lines = new
        run.servers = join_series([*run.servers, *series.values()])
    if died:
        console.print(f"[bold red]{escape(died)}[/bold red]", soft_wrap=True)
        publisher.stage(died, is_problem=True)
        result.flags.append(
            Flag("server-died", f"trial {trial + 1}: {died}; the figures are of what was measured until then")
        )
    for flag in result.flags:
        if flag in run.flags and flag.detail[:1].isdigit():  # another trial's count may be the same
            flag = Flag(flag.name, f"trial {trial + 1}: {flag.detail}")
        run.flags += [flag] if flag not in run.flags else []
    publisher.put(publisher.Flags(run.name, result.flags))
    if interrupted:
        raise KeyboardInterrupt
    checked = canaries.judge(load, measured, servers_live=not died)
    for flag in result.flags:
        if flag.name == "client-lost":
            raise UserError(f"{died}; {flag.detail}" if died else flag.detail)
    if not measured:
        servers.check()
        raise UserError(f"trial {trial + 1} sent no request: give a higher --rate or a longer --duration-s")
    publisher.stage("{0}: trial {1} is measured", run.name, trial + 1)
    if failed:
        publisher.stage(failed, is_problem=True)
    line = f"  {run.name}, trial {trial + 1}: {len(measured)} requests, {time.monotonic() - begin_s:.1f} s, "
    console.print(line + (f"[red]{escape(failed)}[/red]" if failed else "none failed"), soft_wrap=True)
    if checked:
        style = "bold red" if "WRONG" in checked else "default"
        console.print(f"  [{style}]{checked}[/{style}]", soft_wrap=True)
    if failed and all(request.error for request in measured):
        servers.check()
        error = measured[0].error
        assert error is not None
        raise UserError(
            f"every request to {info.url} failed, the first with {error.kind}: {error.message}; {failures.remedy(error.kind)}"
        )


def _asleep_s() -> float:
    """How long this host has been suspended since it started; the monotonic clock leaves it out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
