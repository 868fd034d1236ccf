"""Where a measurement runs: this host, or the nodes of a cluster (pdbench/cluster). Nothing else asks which."""

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol, Self

import msgspec

from pdbench import doctor
from pdbench.config import ClusterConfig, DeploymentKind, LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.doctor import Finding
from pdbench.errors import UserError
from pdbench.events import Event, move
from pdbench.host import Batch, HostLostError, LocalHost
from pdbench.http import split_url
from pdbench.load import clients, plan
from pdbench.load.clients import LoadResult, OnBegin, Problem
from pdbench.load.generator import OnProgress
from pdbench.load.plan import TrialLoad
from pdbench.power.device import gpu_indices
from pdbench.power.sampler import merge_records
from pdbench.power.tenants import gpus_of
from pdbench.records import Clock, DeviceRecord, Flag
from pdbench.serving import machine as machines
from pdbench.serving.deployment import Deployment, DeploymentInfo, ServerHost, ServerInfo, at_once
from pdbench.serving.machine import Machine
from pdbench.serving.plan import ServerSpec, check_named_gpus


class Host(ServerHost, Protocol):
    """A host with devices and event logs: LocalHost, or an actor on a node. Raises HostLostError when it is gone."""

    def start_measuring(self, servers: Sequence[ServerInfo], interval_s: float | None) -> None: ...
    def idle(self, kind: str, seconds: float) -> None: ...
    def latest(self) -> list[DeviceRecord]: ...
    def stop_measuring(self) -> None: ...
    def take(self) -> list[Batch]: ...
    def to_run_clock(self, clock: Clock) -> Callable[[float], float]: ...


class Measurement:
    """The devices and event logs of running servers on all their hosts, while the `with` block runs.

    What a host read before it was lost is kept.
    """

    def __init__(self, hosts: Sequence[tuple[Host, list[ServerInfo]]], power: PowerConfig, clock: Clock) -> None:
        self._hosts, self._clock = hosts, clock
        self._interval_s = power.sample_interval_s if power.power else None
        self._batches: list[tuple[Host, list[Batch]]] = []

    def __enter__(self) -> Self:
        self._on_all(lambda host, servers: host.start_measuring(servers, self._interval_s))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._on_all(lambda host, _: host.stop_measuring())
        finally:
            self._batches = [(host, host.take()) for host, _ in self._hosts]

    def idle(self, kind: str, seconds: float) -> None:
        """Idle power of all devices, measured at the same time."""
        self._on_all(lambda host, _: host.idle(kind, seconds))

    def latest(self) -> list[DeviceRecord]:
        """The last sample of every device, for what is shown meanwhile."""
        return [
            msgspec.structs.replace(device, host=host.address) for host, _ in self._hosts for device in host.latest()
        ]

    def devices(self) -> list[DeviceRecord]:
        """Everything read, on the run's clock; call it after the `with` block."""
        devices = []
        for host, batches in self._batches:
            pieces = [device for batch in batches for device in batch.devices]
            pieces = [msgspec.structs.replace(piece, host=host.address) for piece in pieces]
            devices += merge_records(pieces, host.to_run_clock(self._clock))
        return devices

    def events(self) -> list[Event]:
        """What the event logs got, on the run's clock; call it after the `with` block."""
        return [
            move(event, host.to_run_clock(self._clock))
            for host, batches in self._batches
            for batch in batches
            for event in batch.events
        ]

    def missing_logs(self) -> set[str]:
        """The event logs that were not there when the measurement ended."""
        return {log for _, batches in self._batches for batch in batches for log in batch.missing_logs}

    def host_facts(self) -> dict[str, Any]:
        """What the results say of other hosts."""
        return {}

    def flags(self) -> list[Flag]:
        """What a reader must know of the hosts: who else computed on their GPUs."""
        return [
            Flag(
                "gpu-shared-midway",
                f"gpu{gpu}{f' of {host.address}' if host.address else ''}: process {pid}, none of the servers', computed there {host.to_run_clock(self._clock)(at_s):.0f} s "
                "after the run began: its work and power are in these figures; end it, and measure again",
            )
            for host, batches in self._batches
            for batch in batches
            for at_s, gpu, pid in batch.newcomers
        ]

    def _on_all(self, call: Callable[[Host, list[ServerInfo]], None]) -> None:
        def call_one(host: Host, servers: list[ServerInfo]) -> None:
            with suppress(HostLostError):
                call(host, servers)

        at_once([functools.partial(call_one, *host) for host in self._hosts])


@contextmanager
def stop_on_signals(saved: Callable[[], object] | None = None) -> Iterator[None]:
    """SIGTERM and SIGHUP act as Ctrl-C does, so that what was measured is kept and every `with` ends what it holds.

    With `saved`, which says what was kept (if anything), it ends as a UserError in one line.
    """

    with ExitStack() as restoring:
        for number in (signal.SIGTERM, signal.SIGHUP):
            before = signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
            restoring.callback(signal.signal, number, before)
        # A shell starts its background jobs with SIGINT ignored.
        restoring.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            yield
        except KeyboardInterrupt:
            if saved is None:
                raise
            raise UserError(f"interrupted: {saved() or 'nothing was measured yet'}", exit_code=130) from None


class Site:
    """This host; cluster.RaySite overrides what differs on several nodes. `restarts`: of servers that die, in each deployment; `machine` (what this host
    has) and `host_class` are for tests."""

    def __init__(
        self, machine: Machine | None = None, host_class: type[LocalHost] = LocalHost, *, restarts: int = 0
    ) -> None:
        self._machine, self._host_class, self._restarts = machine, host_class, restarts

    def check_options(self, load: LoadConfig, power: PowerConfig) -> None:
        """Raises UserError for what cannot be done here, before servers start, which takes minutes."""
        self.check_load(load)
        plan.check_files(load)

    def check_load(self, load: LoadConfig) -> None:
        """Raises UserError for options that contradict each other; reads no file, so that all loads of a command can be checked first."""
        plan.check(load)

    def check_gpus(self, config: ServeConfig, *, running: bool = False) -> None:
        """Raises UserError for a GPU that an option names and that is not here; `running`: for a server that runs, whatever CUDA_VISIBLE_DEVICES
        leaves to ours."""
        if config.prefill_gpus or config.decode_gpus or config.single_gpus:
            machine = self._machine or machines.inspect()
            ours = [gpu.index for gpu in machine.gpus] if machine.on_gpu else []
            check_named_gpus(config, gpu_indices() if running else ours)

    def check(self) -> None:
        """Raises UserError when a host is lost."""

    @contextmanager
    def reserve(self, specs: Sequence[ServerSpec]) -> Iterator[dict[str, ServerHost]]:
        host = self._host_class(self._machine)
        try:
            yield {spec.name: host for spec in specs}
        finally:
            host.close()

    def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
        """Not started yet; planned already where its hosts are known. Raises UserError when it cannot run here."""
        deployment = Deployment(kind, config, self, self._restarts)
        deployment.plan()
        return deployment

    @property
    def on_gpu(self) -> bool:
        return (self._machine or machines.inspect()).on_gpu

    def kinds(self) -> list[DeploymentKind]:
        """What a run compares by default: with replicas, of which there are as many as prefill and decode instances, so that
        hardware is equal; without them where there is no GPU, and all deployments share the same cores."""
        return ["single", "replicas", "disaggregated"] if self.on_gpu else ["single", "disaggregated"]

    def assign_devices(self, info: DeploymentInfo, options: Options) -> list[Flag]:
        """Enter the devices of a server that pdbench did not start: the GPUs that --single-gpus names, else those of its
        processes; a flag says why they cannot be measured. Raises UserError where it computes on one that is not named."""
        named = list(options.serve.single_gpus)
        present = list(gpu_indices())
        server, url = ServerInfo(name="server", role="server", url=info.url), split_url(info.url)
        is_here = machines.is_this_host(url.host)
        pids = [process.pid for process in machines.listeners(url.port)] if is_here else []
        gpus = gpus_of(pids)
        if named:
            words = " ".join(f"--single-gpus {index}" for index in named)
            if len(set(named)) < len(named):
                raise UserError(f"{words}: name different ones of this host's GPUs, {present}")
            if unnamed := sorted(set(gpus) - set(named)):
                raise UserError(
                    f"{words}: the server at {info.url} computes on GPU {', '.join(map(str, unnamed))}, whose "
                    "power would be missing: name all of its GPUs"
                )
            info.servers = [msgspec.structs.replace(server, gpus=named)]
            return []
        remedy = "power is not measured; --single-gpus names its GPUs"
        if not is_here:
            detail = f"{url.host} is no address of this host: {remedy} where it runs here all the same"
            return [Flag("power-elsewhere", detail)]
        if present and not gpus:
            return [Flag("devices-unknown", f"could not determine the GPUs of {info.url}: {remedy}")]
        info.servers = [msgspec.structs.replace(server, pids=pids, gpus=gpus)]
        return []

    def measurement(self, info: DeploymentInfo, power: PowerConfig, clock: Clock) -> Measurement:
        if any(server.host for server in info.servers):
            raise UserError(f"{info.url} is served by several nodes: measure it with --cluster auto")
        return Measurement([(LocalHost(), info.servers)], power, clock)

    def run_load(self, load: TrialLoad, on_progress: OnProgress, on_begin: OnBegin, problem: Problem) -> LoadResult:
        """One trial; see pdbench.load.clients.run_load."""
        return clients.run_load(load, on_progress, on_begin, problem)

    def findings(self, config: ServeConfig) -> list[Finding]:
        """What `pdbench doctor` reports."""
        return list(doctor.examine(config, self._machine or machines.inspect()))


@contextmanager
def open_site(config: ClusterConfig | None) -> Iterator[Site]:
    """The cluster of --cluster, left at the end with all that was started there; this host without it. Raises UserError."""
    if config is None or config.cluster is None:
        yield Site(restarts=config.restarts if config else 0)
        return
    from pdbench.cluster.site import RaySite

    with RaySite(config) as site:
        yield site
