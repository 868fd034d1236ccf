"""Real vLLM on CPU for the tests marked `vllm`: prefill + decode + proxy and a fleet, started once a session; and a
pair of scripted instances for the proxy's tests."""

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from pdbench.config import DeploymentKind, ServeConfig
from pdbench.serving.deployment import Deployment, DeploymentInfo
from pdbench.serving.machine import Machine, inspect
from pdbench.serving.vllm import Command
from pdbench.site import Site
from tests.support.cluster import Hosts, NotPermittedError, joined_hosts
from tests.support.processes import ROOT, free_port
from tests.support.proxy_processes import Server, instance
from tests.support.served import Served

if TYPE_CHECKING:
    from tests.support.kv import Server as VllmServer

# The same examples in every run, however slow the machine is; with PDBENCH_FUZZ_INPUTS other ones each time.
settings.register_profile(
    "tests",
    deadline=None,
    database=None,
    derandomize="PDBENCH_FUZZ_INPUTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("tests")

OWN_SERVERS = {
    "tests/kv/test_caches.py",
    "tests/kv/test_nixl.py",
    "tests/kv/test_speculative.py",
    "tests/plan/test_vllm_scheduler.py",
}
"""Files whose tests start vLLM for themselves."""


@functools.cache
def shares_servers(file: str) -> bool:
    """Do tests of this file use vLLM servers or a cluster of the whole session?"""
    text = (ROOT / file).read_text()
    return ("mark.vllm" in text or "mark.cluster" in text) and file not in OWN_SERVERS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ./run_tests.sh's processes: files that share servers come first and go to one of them, one test after the other; the others
    take the other files meanwhile."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "servers" if shares_servers(file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        items.sort(key=lambda item: shares_servers(item.nodeid.partition("::")[0]), reverse=True)


def commands(kind: DeploymentKind, config: ServeConfig, machine: Machine | None = None) -> list[Command]:
    """How the servers of a deployment would be started, on `machine` or this one."""
    return list(Site(machine).deployment(kind, config).commands.values())


def serve_config(
    log_dir: Path, prefill: int = 1, decode: int = 1, tensor_parallel: int = 1, **options: object
) -> ServeConfig:
    """Options of a deployment whose ports are all free."""
    # Instances of a role count up from their first port.
    first = free_port(count=2 + (prefill + decode) * (1 + tensor_parallel))
    kv = first + 2 + prefill + decode
    return ServeConfig(
        single_port=first,
        proxy_port=first + 1,
        prefill_port=first + 2,
        decode_port=first + 2 + prefill,
        kv_port=kv,
        prefill_instances=prefill,
        decode_instances=decode,
        tensor_parallel=tensor_parallel,
        log_dir=str(log_dir),
        start_timeout_s=280.0,
        **options,  # type: ignore[arg-type]
    )


def start(kind: DeploymentKind, config: ServeConfig) -> Deployment:
    """The deployment up and healthy; the caller closes it."""
    return Site().deployment(kind, config).start()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing one takes a second or two, and tests/report/test_pictures.py looks at them."""
    monkeypatch.setattr("pdbench.report.mpl.picture", lambda draw, *arguments: b"")


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a scripted libnvidia-ml.so.1, for tests.support.fake_nvml's children."""
    from tests.support.fake_nvml import build

    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Prefill, decode and proxy with the tiny model, started when a test needs them (about 40 s on 2 cores)."""
    folder = tmp_path_factory.mktemp("served")
    with Served(serve_config(folder / "logs"), folder) as servers:
        yield servers


@pytest.fixture
def disaggregated(served: Served) -> DeploymentInfo:
    """Prefill, decode and proxy that run."""
    return served.info()


@pytest.fixture
def single(disaggregated: DeploymentInfo) -> DeploymentInfo:
    """One vLLM instance that runs: prefill's, which computes the whole answer of a request without transfer parameters."""
    (url,) = disaggregated.urls("prefill")
    model, path = disaggregated.model_name, disaggregated.model_path
    return DeploymentInfo(name="single", url=url, model_name=model, model_path=path)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list["VllmServer"]]:
    """Real vLLM with the connector, in processes that a test may stop, kill and start again: prefill-0, prefill-1, decode-0
    (recomputes what fails) and decode-1 (fails it). A tiny Qwen2: without chunked prefill and prefix caching, as vLLM on CPU
    runs MLA, there would be less to show."""
    from tests.support.kv import Server, tiny_qwen2  # torch takes seconds

    folder = tmp_path_factory.mktemp("fleet")
    model = str(tiny_qwen2(folder / "tiny-qwen2"))
    config = serve_config(folder, 2, 2, connector="tcp", model=model, return_kv=True)
    planned = commands("disaggregated", config)[:4]
    failing = replace(config, kv_load_failure_policy="fail")
    planned[3] = commands("disaggregated", failing, inspect())[3]
    servers = [Server(command, folder) for command in planned]
    try:
        for server in servers:
            server.wait_healthy()
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts in one Ray cluster, for the tests marked `cluster`; where namespaces are not permitted they are skipped."""
    try:
        with joined_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
            yield hosts
    except NotPermittedError as error:
        pytest.skip(str(error))


@pytest.fixture
def hosts(joined: Hosts) -> Hosts:
    """The three hosts, whole again after what a test before did to them; the last one is the head."""
    joined.repair()
    return joined


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A scripted prefill and a scripted decode instance."""
    folder = tmp_path_factory.mktemp("instances")
    with instance(folder, "prefill") as prefill, instance(folder, "decode") as decode:
        yield prefill, decode
