"""Prefill, decode and the proxy on real vLLM (CPU), started as a user starts them by hand, for all tests of a session."""

import dataclasses
import signal
import subprocess
from pathlib import Path
from typing import Self

from pdbench.config import ServeConfig
from pdbench.serving import deployment as deployments
from pdbench.serving.deployment import DeploymentInfo
from tests.support.processes import ROOT, ending_with_tests, left, marked


def flags(config: ServeConfig) -> list[str]:
    """The options that differ from their defaults, as flags."""
    given = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            given += [f"--{field.name.replace('_', '-')}", str(value)]
    return given


class Served:
    """`./start_disaggregated_servers.sh`, once somebody asks for its servers; again when a test has ended them."""

    def __init__(self, config: ServeConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            assert self.process.wait(60) == 0
        assert left(self.folder) == []

    def info(self) -> DeploymentInfo:
        """Of servers that are ready."""
        if self.process is None or self.process.poll() is not None:
            command = ending_with_tests([str(ROOT / "start_disaggregated_servers.sh"), *flags(self.config)])
            with (self.folder / "errors").open("w") as errors:
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=marked(self.folder), cwd=self.folder
                )
            assert self.process.stdout is not None
            assert any("ready:" in line for line in self.process.stdout), self.errors()
        info = deployments.find(Path(self.config.log_dir), f"http://127.0.0.1:{self.config.proxy_port}")
        assert info is not None
        return info

    def errors(self) -> str:
        return (self.folder / "errors").read_text()
