"""Deployments of scripted servers on this host: started, watched, restarted, ended, and found again."""

import dataclasses
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pdbench import http, turns
from pdbench.config import ClusterConfig, DeploymentKind, PairConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.files import hold
from pdbench.serving import deployment as deployments
from pdbench.serving.deployment import DeploymentInfo, ServerInfo, States
from pdbench.site import Site, open_site
from tests.conftest import serve_config
from tests.support.processes import ROOT, left, marked, wait_until
from tests.support.scripted_vllm import SERVER, Scripted


def scripted(**scripts: str) -> Site:
    scripts = {name.replace("_", "-"): script for name, script in scripts.items()}
    return Site(host_class=type("Host", (Scripted,), {"scripts": scripts}))


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return serve_config(tmp_path / "logs")


def test_servers_are_healthy_after_start_and_gone_after_close(config: ServeConfig) -> None:
    changes: list[States] = []
    with closing(scripted().deployment("replicas", config)) as deployment:
        info = deployment.start(changes.append).info()
        assert [server.name for server in info.servers] == ["replica-0", "replica-1", "proxy"]
        assert all(state.healthy for state in changes[-1].values())
        assert info.url == f"http://127.0.0.1:{config.proxy_port}"
        pids = [pid for server in info.servers for pid in server.pids]
        assert all(map(psutil.pid_exists, pids)) and len(set(pids)) == 3
        found = deployments.find(Path(config.log_dir), info.url)
        assert found is not None and found.servers == info.servers
        deployment.check()
    assert not any(map(psutil.pid_exists, pids))
    assert deployments.find(Path(config.log_dir), info.url) is None


def test_servers_and_proxy_answer_at_an_ipv6_address(config: ServeConfig) -> None:
    with closing(scripted().deployment("replicas", dataclasses.replace(config, host="::1"))) as deployment:
        info = deployment.start().info()
        assert info.url == f"http://[::1]:{config.proxy_port}"
        assert http.get(info.url, "/health") is not None


def test_servers_that_listen_on_all_addresses_are_found_at_each(config: ServeConfig) -> None:
    with closing(scripted().deployment("replicas", dataclasses.replace(config, host="0.0.0.0"))) as deployment:
        info = deployment.start().info()
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            url = f"http://{host}:{config.proxy_port}"
            found = deployments.find(Path(config.log_dir), url)
            assert http.get(url, "/health") is not None and found is not None and found.servers == info.servers
        assert deployments.find(Path(config.log_dir), f"http://203.0.113.1:{config.proxy_port}") is None
        assert deployments.find(Path(config.log_dir), "http://127.0.0.1:1") is None


def test_ctrl_c_ends_served_servers(config: ServeConfig, tmp_path: Path) -> None:
    code = (
        "import sys; from pdbench import cli, site; from tests.support.scripted_vllm import Scripted\n"
        "site.Site.__init__.__defaults__ = (None, Scripted); cli.main(sys.argv[1:])"
    )
    ports = ("--single-port", str(config.single_port), "--log-dir", config.log_dir)
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--single", *ports],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=marked(tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as serving:
        assert serving.stdout is not None
        assert any("ready:" in line for line in serving.stdout)
        wait_until(lambda: len(left(tmp_path)) == 3)  # itself, a supervisor, a server
        serving.send_signal(signal.SIGINT)
        assert serving.stdout.read() == "stopping\n"
        assert serving.wait(30) == 0
    assert left(tmp_path) == []


def test_resident_servers_without_gpus_all_start_before_one_is_waited_for(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    # None listens until single-0, prefill-0 and decode-0 have begun.
    wait = f"import pathlib, time\nbegun = pathlib.Path({str(begun)!r})\n(begun / sys.argv[2]).touch()\n"
    wait += "while len(list(begun.iterdir())) < 3:\n    time.sleep(0.02)\n"
    host = type("Host", (Scripted,), {"server": f"import sys\n{wait}{SERVER}"})
    kinds: tuple[DeploymentKind, ...] = ("single", "disaggregated")
    serve = {kind: dataclasses.replace(serve_config(tmp_path / kind), start_timeout_s=120.0) for kind in kinds}
    with closing(turns.Servers(Site(host_class=host), Console(quiet=True))) as servers:
        deployment, fresh = servers.take("single", serve, PairConfig(resident=True))
        assert fresh and deployment.kind == "single" and servers.are_up(serve)


def test_server_that_dies_while_others_start_is_reported_when_it_is_waited_for(config: ServeConfig) -> None:
    with closing(scripted(single_0="exit 3").deployment("single", config)) as deployment:
        deployment.begin()
        with pytest.raises(UserError, match="single-0 died with exit code 3"):
            deployment.start()


def test_server_that_dies_at_start_is_reported_with_cause_and_log(config: ServeConfig) -> None:
    site = scripted(single_0="echo 'error: unrecognized arguments: --nonsense'; exit 2")
    deployment = site.deployment("single", config)
    with pytest.raises(UserError) as raised:
        deployment.start()
    first, *rest = str(raised.value).splitlines()
    assert first.startswith("single-0 died with exit code 2: this vLLM does not know") and "--vllm-args" in first
    assert rest == ["error: unrecognized arguments: --nonsense", f"whole log: {config.log_dir}/single-0.log"]


def test_server_that_is_never_healthy_is_ended_after_the_timeout(config: ServeConfig) -> None:
    site = scripted(single_0="echo loading; exec sleep 7004")
    deployment = site.deployment("single", dataclasses.replace(config, start_timeout_s=1.0))
    deployment.begin()
    log = Path(config.log_dir) / "single-0.log"
    wait_until(lambda: log.exists() and "loading" in log.read_text(), 30)
    with pytest.raises(
        UserError, match=f"single-0 is not healthy after 1 s: read {log}, or raise --start-timeout-s\nload"
    ):
        deployment.start()
    lines = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not any("7004" in (line or []) for line in lines)


def test_empty_log_of_a_late_server_is_called_empty(config: ServeConfig) -> None:
    site = scripted(single_0="exec sleep 7005")
    with pytest.raises(UserError, match=r"single-0\.log, or raise --start-timeout-s\n\(its log is empty\)"):
        site.deployment("single", dataclasses.replace(config, start_timeout_s=0.2)).start()


def test_dead_server_is_restarted_as_often_as_is_allowed(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site.__init__, "__defaults__", (None, Scripted))
    with open_site(ClusterConfig(restarts=1)) as site, closing(site.deployment("single", config)) as deployment:
        (before,) = deployment.start().info().servers
        kill_server(before.pids[0])

        def after_restart() -> bool:
            return deployment.info().servers[0].pids != before.pids

        wait_until(lambda: after_restart() or deployment.check(), 30)
        (after,) = deployment.info().servers
        assert (after.url, after.name) == (before.url, before.name)
        assert (Path(config.log_dir) / "single-0.died.log").exists()
        kill_server(after.pids[0])

        def reported() -> bool:
            try:
                deployment.check()
            except UserError as error:
                return "single-0 died with exit code 137" in str(error)
            return False

        wait_until(reported, 30)


def kill_server(supervisor: int) -> None:
    (server,) = psutil.Process(supervisor).children()
    server.send_signal(signal.SIGKILL)


def test_two_servers_never_share_a_port(config: ServeConfig) -> None:
    deployment = scripted().deployment("replicas", dataclasses.replace(config, proxy_port=config.prefill_port))
    with pytest.raises(UserError, match="two servers would share a port"):
        deployment.check_ports()


def test_log_folder_belongs_to_one_deployment(tmp_path: Path) -> None:
    claim = deployments.claim(tmp_path / "logs")
    with pytest.raises(UserError, match="--log-dir"):
        deployments.claim(tmp_path / "logs")
    claim.close()
    with hold(tmp_path / "logs"):  # by --out
        deployments.claim(tmp_path / "logs").close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give --log-dir a folder that you may write"):
        deployments.claim(tmp_path / "file" / "logs")


def test_servers_of_another_process_stay_known(tmp_path: Path) -> None:
    info = DeploymentInfo(name="single", url="http://127.0.0.1:1", model_name="m", owner_pid=os.getppid())
    deployments.save(info, tmp_path)
    deployments.forget(tmp_path)
    assert deployments.find(tmp_path, info.url) == info
    info.owner_pid = os.getpid()
    deployments.save(info, tmp_path)
    deployments.forget(tmp_path)
    assert deployments.find(tmp_path, info.url) is None
    deployments.forget(tmp_path)


def test_servers_of_a_process_whose_id_another_has_now_are_not_taken_for_running(config: ServeConfig) -> None:
    folder = Path(config.log_dir)
    with closing(scripted().deployment("single", config)) as deployment:
        info = deployment.start().info()
        assert deployments.find(folder, info.url) is not None and info.owner_start is not None
        info.owner_start -= 1
        deployments.save(info, folder)
        assert deployments.find(folder, info.url) is None


def server(name: str, port: int, **more: object) -> ServerInfo:
    role = name.rpartition("-")[0] or name
    return ServerInfo(name=name, role=role, url=f"http://127.0.0.1:{port}", **more)  # type: ignore[arg-type]


def test_server_that_is_asked_directly_is_known_with_its_own_devices(tmp_path: Path) -> None:
    servers = [
        server("prefill-0", 1, gpus=[0, 1], pids=[11]),
        server("prefill-1", 2, gpus=[2, 3], pids=[12], event_log="log"),
        server("decode-0", 3, gpus=[4, 5], pids=[13]),
        server("proxy", 4, pids=[14]),
    ]
    info = DeploymentInfo(
        name="disaggregated", url="http://127.0.0.1:4", model_name="m", owner_pid=os.getpid(), servers=servers
    )
    deployments.save(info, tmp_path)
    assert deployments.find(tmp_path, "http://localhost:4") == info
    found = deployments.find(tmp_path, "http://localhost:2")
    assert found is not None and (found.name, found.model_name, found.url) == ("bench", "m", "http://127.0.0.1:2")
    assert found.servers == [server("prefill-1", 2, gpus=[2, 3], pids=[12])]
    assert found.local_gpus() == {"prefill": [2, 3]}
    assert deployments.find(tmp_path, "http://localhost:5") is None


def test_server_on_another_node_is_not_asked_directly(tmp_path: Path) -> None:
    servers = [server("prefill-0", 1, host="10.0.0.1", gpus=[0]), server("proxy", 4, host="10.0.0.2")]
    info = DeploymentInfo(
        name="disaggregated", url="http://127.0.0.1:4", model_name="m", owner_pid=os.getpid(), servers=servers
    )
    deployments.save(info, tmp_path)
    assert deployments.find(tmp_path, "http://127.0.0.1:1") is None
    assert info.local_gpus() == {}
