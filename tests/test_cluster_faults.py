"""Three hosts (namespaces, Ray nodes, own clocks) with scripted servers: what dies, is cut off or killed, and what is left."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_hosts import PORT, Hosts, NotPermittedError, joined_hosts, wait_until

from pdbench.records import Run, load_run

pytest.importorskip("ray", reason="Ray is not installed (requirements/ray.txt)")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
SCRIPT = str(Path(__file__).with_name("cluster_scripted.py"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three joined Ray nodes; the last one is the head."""
    try:
        with joined_hosts(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except NotPermittedError as error:
        pytest.skip(str(error))


def pdbench(hosts: Hosts, command: str, *arguments: str) -> subprocess.Popen[str]:
    """On the third host, with a replica on each of the others."""
    first, second, third = hosts.all
    log = (hosts.folder / f"{command}.log").open("w")
    given = ["--cluster", f"{third.address}:{PORT}", "--log-dir", str(hosts.folder / "logs")]
    if command != "doctor":
        given += ["--place", f"replica-0={first.address}", f"replica-1={second.address}", "--node-timeout-s", "8"]
        given += ["--against", "replicas"]
    return third.popen(sys.executable, SCRIPT, command, *given, *arguments, stdout=log, stderr=log)


def told(hosts: Hosts, command: str) -> str:
    return (hosts.folder / f"{command}.log").read_text()


def running_load(hosts: Hosts, name: str) -> tuple[subprocess.Popen[str], Path]:
    """A run in which requests flow to both replicas, from clients on the second and third host."""
    out = hosts.folder / name
    clients = ["--client-nodes", hosts.all[2].address, hosts.all[1].address, "--client-processes", "2"]
    load = ["--trials", "1", "--concurrency", "4", "--requests", "4000", "--output-tokens", "20", "--out", str(out)]
    process = pdbench(hosts, "run", *load, *clients)
    wait_until(lambda: "proxy: ready" in told(hosts, "run") or process.poll() is not None, "servers ready")
    assert process.poll() is None, told(hosts, "run")
    events = hosts.folder / "logs" / "proxy.events.jsonl"
    wait_until(lambda: events.exists() and len(events.read_text().splitlines()) > 30, "requests flow")
    time.sleep(2.0)
    return process, out / "replicas_results"


def marked(process: subprocess.Popen[str], folder: Path, hosts: Hosts) -> Run:
    """The result of a run that a fault ended."""
    assert process.wait(90) == 1, told(hosts, "run")
    run = load_run(folder)
    assert "node-lost" in {flag.name for flag in run.flags}
    done = [request for request in run.requests if request.error is None and not request.warmup]
    assert done, told(hosts, "run")
    assert all(request.sent_s is not None and request.sent_s < request.token_s[0] for request in done)
    assert {device.host for device in run.devices if device.samples} >= {hosts.all[0].address, hosts.all[1].address}
    return run


def nothing_left(hosts: Hosts) -> bool:
    return not any(host.servers() for host in hosts.all)


def test_the_doctor_sees_every_node_and_link(hosts: Hosts) -> None:
    process = pdbench(hosts, "doctor")
    assert process.wait(120) == 0, told(hosts, "doctor")
    for one in hosts.all:
        assert f"{one.address} clock against the head's" in told(hosts, "doctor")
        for other in hosts.all:
            if one is not other:
                assert f"{one.address} -> {other.address}: " in told(hosts, "doctor")


def test_a_node_that_is_cut_off_for_good_ends_the_run_with_what_was_measured(hosts: Hosts) -> None:
    first, second, third = hosts.all
    process, folder = running_load(hosts, "cut")
    first.cut()
    run = marked(process, folder, hosts)
    assert first.address in next(flag.detail for flag in run.flags if flag.name == "node-lost")
    assert run.trials[0].client["nodes"] == [third.address, second.address]
    wait_until(lambda: nothing_left(hosts), "nothing is left; behind the cut the leases run out")
    first.mend()


def test_a_second_run_starts_at_once_and_a_node_that_dies_ends_it(hosts: Hosts) -> None:
    first, _, third = hosts.all
    first.kill()  # Ray has given the node up while it was cut off: it joins anew
    first.start_ray(third)
    hosts.wait_for_nodes(3)
    process, folder = running_load(hosts, "died")
    first.kill()
    marked(process, folder, hosts)
    wait_until(lambda: nothing_left(hosts), "nothing is left")


def test_the_heads_own_cable_pulled_ends_the_run_with_what_was_measured(hosts: Hosts) -> None:
    first, _, third = hosts.all
    first.start_ray(third)
    hosts.wait_for_nodes(3)
    process, folder = running_load(hosts, "alone")
    third.cut()
    marked(process, folder, hosts)
    wait_until(lambda: nothing_left(hosts), "nothing is left")
    third.mend()


def restarted(hosts: Hosts) -> None:
    """A fresh cluster after the head was cut off from all."""
    for host in hosts.all:
        host.kill()
    hosts.join()


def test_an_actor_that_dies_is_named_and_its_server_goes_with_it(hosts: Hosts) -> None:
    restarted(hosts)
    first = hosts.all[0]
    process = pdbench(hosts, "serve")
    wait_until(lambda: "ready:" in told(hosts, "serve") or process.poll() is not None, "servers ready")
    (actor,) = [one for one in first.processes() if "ray::InstanceHost" in " ".join(one.cmdline())]
    actor.kill()
    assert process.wait(90) == 1
    assert f"replica-0 on node {first.address} is gone" in " ".join(told(hosts, "serve").split())
    wait_until(lambda: nothing_left(hosts), "nothing is left")


def test_pdbench_killed_leaves_nothing(hosts: Hosts) -> None:
    process = pdbench(hosts, "serve")
    wait_until(lambda: "ready:" in told(hosts, "serve") or process.poll() is not None, "servers ready")
    assert process.poll() is None, told(hosts, "serve")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: nothing_left(hosts), "nothing is left")
