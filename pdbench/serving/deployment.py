"""A deployment: all servers of one way to serve, on one host or on several; up together, watched, and down together."""

import functools
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

import msgspec
import psutil

from pdbench import documents
from pdbench.config import DeploymentKind, ServeConfig
from pdbench.errors import NOT_JSON, StartError, UserError
from pdbench.events import LogLine
from pdbench.files import check_name, lock_for_us, write_whole
from pdbench.http import host_port, split_url
from pdbench.records import Clock
from pdbench.serving import machine, plan, sharing, vllm
from pdbench.serving.plan import ServerSpec
from pdbench.serving.process import Secrets, ServerState
from pdbench.serving.vllm import Command, Setup

INFO_FILE = "running.json"
_POLL_S = 0.25
T = TypeVar("T")
S = TypeVar("S", ServerSpec, Command)
States = dict[str, ServerState]


class ServerHost(Protocol):
    """Where servers run: this host, or a node of a cluster. `address` is None for this host."""

    address: str | None

    def setup(self, kind: DeploymentKind, config: ServeConfig) -> Setup: ...
    def plan(
        self, specs: Sequence[ServerSpec], config: ServeConfig, setup: Setup, servers: Sequence[Command] = ()
    ) -> list[Command]: ...
    def port_owner(self, address: str, port: int) -> str | None: ...
    def start(self, commands: Sequence[Command], log_dir: str, secrets: Secrets) -> dict[str, int]: ...
    def state(self, name: str) -> ServerState: ...
    def log_lines(self, name: str) -> list[LogLine]: ...
    def to_run_clock(self, clock: Clock) -> Callable[[float], float]: ...


class ServerSite(Protocol):
    """What gives a deployment its hosts."""

    def reserve(self, specs: Sequence[ServerSpec]) -> AbstractContextManager[dict[str, ServerHost]]:
        """A host for each server, by name; at the block's end everything that was started there has ended."""

    def check(self) -> None:
        """Raises UserError when a host is lost."""


class ServerInfo(msgspec.Struct, kw_only=True):
    """A running server: `host` is None for this host, `pids` the roots of its process trees, `event_log` what it writes, if any."""

    name: str
    role: str
    url: str
    host: str | None = None
    pids: list[int] = []
    gpus: list[int] = []
    event_log: str | None = None


class DeploymentInfo(msgspec.Struct, kw_only=True):
    """What a measurement must know of running servers. Saved beside their logs, where `pdbench bench` finds it again."""

    name: str
    url: str
    model_name: str
    model_path: str | None = None
    owner_pid: int | None = None
    owner_start: int | None = None  # see `_start_of`: a process's id may be another's later
    servers: list[ServerInfo] = []
    config: dict[str, Any] = {}

    def instances(self, role: str = "server") -> list[ServerInfo]:
        """The servers without the proxy; of servers that pdbench did not start, the one at `url`, as `role`."""
        servers = [server for server in self.servers if server.role != "proxy"]
        return servers or [ServerInfo(name="server", role=role, url=self.url)]

    def urls(self, role: str) -> list[str]:
        return [server.url for server in self.servers if server.role == role]

    def local_gpus(self) -> dict[str, list[int]]:
        """Role (see `gpu_roles`) -> GPU indices of this host; a role without GPUs is left out."""
        gpus: dict[str, list[int]] = {}
        for gpu, role in gpu_roles(server for server in self.servers if server.host is None).items():
            gpus.setdefault(role, []).append(gpu)
        return gpus


def gpu_roles(servers: Iterable[ServerInfo]) -> dict[int, str]:
    """Each GPU of one host with its role, both roles ("prefill+decode") where they share it: a meter cannot separate them."""
    roles: dict[int, dict[str, None]] = {}
    for server in servers:
        for gpu in server.gpus:
            roles.setdefault(gpu, {})[server.role] = None
    return {gpu: "+".join(of_gpu) for gpu, of_gpu in roles.items()}


class Deployment:
    """Servers that run together; `with contextlib.closing(deployment)` ends them all, however the block is left."""

    def __init__(self, kind: DeploymentKind, config: ServeConfig, site: ServerSite, restarts: int = 0) -> None:
        """Starts nothing. Raises UserError for a deployment that cannot be."""
        self.kind, self.config = kind, config
        self.specs = plan.servers(kind, config)
        self.commands: dict[str, Command] = {}
        self._site, self._restarts_left = site, restarts
        self._hosts: dict[str, ServerHost] = {}
        self._setup: Setup | None = None
        self._pids: dict[str, int] = {}
        self._secrets = Secrets(PDBENCH_KV_SECRET=secrets.token_hex(16))
        self._reservation = ExitStack()
        self._claim: IO[bytes] | None = None
        self._on_states: Callable[[States], None] = lambda states: None

    def plan(self) -> None:
        """Reserve hosts and make every command line where it will run. Raises UserError when a host cannot run it."""
        if self.commands:
            return
        self._hosts = self._reservation.enter_context(self._site.reserve(self.specs))
        setup = self._hosts[self.specs[0].name].setup(self.kind, self.config)
        specs = [spec for spec in self.specs if spec.role != "proxy"]
        calls = [functools.partial(host.plan, own, self.config, setup) for host, own in self._by_host(specs).items()]
        planned = {command.name: command for commands in at_once(calls) for command in commands}
        servers = [planned[spec.name] for spec in specs]
        for proxy in self.specs[len(specs) :]:  # its command line names all others
            servers += self._hosts[proxy.name].plan([proxy], self.config, setup, servers)
        self._setup, self.commands = setup, {command.name: command for command in servers}

    def start(self, on_states: Callable[[States], None] | None = None) -> Self:
        """Start all servers at once (those on one GPU in turn) and wait until all are healthy; `on_states` is called as they change.

        Raises StartError with the log's end and the likely cause when one dies or --start-timeout-s passes.
        """
        self._on_states = on_states or self._on_states
        try:
            if self._claim is None:
                self.begin()
            for place, names in enumerate(self.waves()):
                if place > 0:
                    self._launch(names)
                self._wait_healthy(names)
        except UserError as error:
            self.close()
            raise StartError(str(error)) from None
        except BaseException:
            self.close()
            raise
        return self

    def begin(self) -> None:
        """Start the first servers and return at once, to start others beside them; `start` then waits."""
        self.plan()
        self.check_ports()
        self._claim = claim(Path(self.config.log_dir))
        self._launch(self.waves()[0])

    def waves(self) -> list[list[str]]:
        """Servers by their start: all at once, or those on one GPU in turn."""
        return sharing.starts(self.commands.values()) if self.sharing() else [list(self.commands)]

    def sharing(self) -> str | None:
        """What a user must know of servers on one GPU; None where there are none (on a cluster, Ray gives each its own)."""
        if self._setup is None or any(host.address for host in self._hosts.values()):
            return None
        return sharing.words(self.commands.values(), self._setup.connector)

    def check_ports(self) -> None:
        """Raises UserError when a port that a planned server needs is taken, and by whom."""
        ports = []
        for name, command in self.commands.items():
            ports.append((name, self._hosts[name], host_port(command.url)))
            if command.kv_address:
                ports.append((f"{name}'s KV", self._hosts[name], host_port(command.kv_address)))
        if len({address for _, _, address in ports}) < len(ports):
            raise UserError(
                f"two servers would share a port ({sorted(port for _, _, (_, port) in ports)}): choose others with --prefill-port and the like"
            )
        owners = at_once([functools.partial(host.port_owner, *address) for _, host, address in ports])
        for (what, host, (_, port)), owner in zip(ports, owners, strict=True):
            if owner:
                raise UserError(
                    f"port {port} for {what}{_on(host)} is taken by {owner}: end it, or choose another with "
                    "--single-port, --prefill-port, --decode-port, --proxy-port or --kv-port"
                )

    def check(self) -> None:
        """Raises UserError when a host is lost or a server has died; dead servers are restarted first, as --restarts allows."""
        self._site.check()
        dead = self._dead()
        for name, state in list(dead.items())[self._restarts_left :]:
            raise UserError(
                f"{self._death(name, state)}\n{state.log_tail}\nwhole log: {self.config.log_dir}/{name}.log"
            )
        if dead:
            self._restarts_left -= len(dead)
            self._launch(list(dead))
            self._wait_healthy(list(dead))

    def death(self) -> str | None:
        """Which server is dead and what killed it, in one line; None while all live."""
        return next((self._death(name, state) for name, state in self._dead().items()), None)

    def _dead(self) -> States:
        return {name: state for name, state in self._states().items() if state.end}

    def _death(self, name: str, state: ServerState) -> str:
        return f"{name} died{_on(self._hosts[name])} {state.end}: {state.cause or 'its log does not say why'}"

    def log_lines(self, clock: Clock) -> dict[str, list[LogLine]]:
        """Server -> what its log has said until now that is worth a flag."""
        moves = {name: host.to_run_clock(clock) for name, host in self._hosts.items()}
        return {
            name: [msgspec.structs.replace(line, t_s=moves[name](line.t_s)) for line in host.log_lines(name)]
            for name, host in self._hosts.items()
        }

    def info(self) -> DeploymentInfo:
        assert self._setup
        return DeploymentInfo(
            name=self.kind,
            url=self.commands[self.specs[-1].name].url,  # the proxy's, or the only server's
            model_name=self._setup.model_name,
            model_path=self._setup.model if vllm.is_local(self._setup.model) else None,
            owner_pid=os.getpid(),
            owner_start=_start_of(os.getpid()),
            servers=[
                ServerInfo(
                    name=name,
                    role=command.role,
                    url=command.url,
                    host=self._hosts[name].address,
                    pids=[self._pids[name]] if name in self._pids else [],
                    gpus=list(command.gpus),
                    event_log=command.event_log,
                )
                for name, command in self.commands.items()
            ],
            config=self.config.plain()
            | {
                "connector_used": self._setup.connector,
                "max_num_seqs": vllm.sequences_at_once(self.commands.values()),
                "sharing": self.sharing(),
            },
        )

    def close(self) -> None:
        """End all servers; returns when none lives."""
        if self._claim:
            forget(Path(self.config.log_dir))
        self._reservation.close()
        self._hosts, self.commands = {}, {}
        if self._claim:
            self._claim.close()
            self._claim = None

    def _by_host(self, servers: Iterable[S]) -> dict[ServerHost, list[S]]:
        hosts: dict[ServerHost, list[S]] = {}
        for server in servers:
            hosts.setdefault(self._hosts[server.name], []).append(server)
        return hosts

    def _launch(self, names: Sequence[str]) -> None:
        hosts = self._by_host(self.commands[name] for name in names)
        shared = self.config.log_dir, self._secrets
        for pids in at_once([functools.partial(host.start, own, *shared) for host, own in hosts.items()]):
            self._pids |= pids

    def _wait_healthy(self, names: Sequence[str]) -> None:
        deadline_s = time.monotonic() + self.config.start_timeout_s
        while True:
            self.check()
            states = self._states(names)
            self._on_states(states)
            late = next((name for name, state in states.items() if not state.healthy), None)
            if late is None:
                break
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"{late}{_on(self._hosts[late])} is not healthy after {self.config.start_timeout_s:g} s: "
                    f"read {self.config.log_dir}/{late}.log, or raise --start-timeout-s\n{states[late].log_tail}"
                )
            time.sleep(_POLL_S)
        save(self.info(), Path(self.config.log_dir))

    def _states(self, names: Iterable[str] | None = None) -> States:
        states = {name: self._hosts[name].state(name) for name in names or self._hosts}
        # A node's states are as of its last heartbeat: of a server that was restarted since, nothing is known.
        return {name: state if state.pid == self._pids.get(name) else ServerState() for name, state in states.items()}


def _on(host: ServerHost) -> str:
    return f" on node {host.address}" if host.address else ""


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that run at the same time. Raises the first call's error that failed."""
    if len(calls) == 1:
        return [calls[0]()]
    pool = ThreadPoolExecutor(max(1, len(calls)))
    try:
        return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for hosts that do not answer


def claim(folder: Path) -> IO[bytes]:
    """The folder for one deployment's logs, until the file is closed or this process ends, in whatever way; `--out` may name it, too.

    Raises UserError while another has it (the logs and events of one would be the other's), or when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".servers.lock").open("ab")
    except OSError as error:
        raise cannot_write(folder, error) from None
    if not lock_for_us(lock):
        lock.close()
        raise UserError(f"servers that run log into {folder}: end them, or give another --log-dir")
    return lock


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; give --log-dir a folder that you may write")


def save(info: DeploymentInfo, folder: Path) -> None:
    write_whole(folder / INFO_FILE, documents.encode(info))


def forget(folder: Path) -> None:
    """This process's servers are down; those of another process, which may still run, stay known."""
    if (info := _load(folder)) is not None and info.owner_pid == os.getpid():
        (folder / INFO_FILE).unlink(missing_ok=True)


def find(folder: Path, url: str) -> DeploymentInfo | None:
    """The deployment of `folder` when it still runs and answers at `url`, or the one of its servers that does; else None."""
    info = _load(folder)
    if info is None or info.owner_pid is None:
        return None
    start = _start_of(info.owner_pid)
    if start is None or info.owner_start not in (None, start):
        return None
    for name in (info.name, *(server.role for server in info.servers)):
        check_name(name, f"a deployment or role in {folder / INFO_FILE}")
    if _same_address(info.url, url):
        return info
    for server in info.servers:
        if server.host is None and _same_address(server.url, url):
            # As any other server that is asked directly: without events, which are of the deployment's requests.
            server.event_log = None
            return msgspec.structs.replace(info, name="bench", url=server.url, servers=[server])
    return None


def proxy_log_folder(url: str) -> Path | None:
    """Where the pdbench proxy of this host that listens at `url` logs; None where this user cannot see its process."""
    server = split_url(url)
    for process in machine.listeners(server.port) if machine.is_this_host(server.host) else ():
        with suppress(psutil.Error, ValueError, IndexError):
            arguments = process.cmdline()
            log = arguments[arguments.index("--event-log") + 1]
            return Path(process.cwd(), log).parent
    return None


def _start_of(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since it booted (which no setting of a clock moves); None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _same_address(listening: str, asked: str) -> bool:
    """Does a server that listens there answer here? One that listens on all addresses does on each of this host's."""
    server, client = split_url(listening), split_url(asked)
    if server.host in vllm.ALL_ADDRESSES:
        return server.port == client.port and machine.is_this_host(client.host)
    hosts = {each.host.replace("localhost", "127.0.0.1") for each in (server, client)}
    return server.port == client.port and len(hosts) == 1


def _load(folder: Path) -> DeploymentInfo | None:
    try:
        return msgspec.json.decode((folder / INFO_FILE).read_bytes(), type=DeploymentInfo)
    except (OSError, *NOT_JSON):
        return None
