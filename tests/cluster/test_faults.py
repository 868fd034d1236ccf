"""Three hosts (namespaces, Ray nodes, own clocks) with scripted servers: what dies, is cut off or killed, and what is left."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.records import Run, load_run
from tests.support.cluster import PATIENCE_S, PORT, Hosts
from tests.support.processes import wait_until

pytest.importorskip("ray", reason="Ray is not installed (requirements/ray.txt)")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SCRIPT = str(Path(__file__).parents[1] / "support" / "scripted_vllm.py")


def pdbench(hosts: Hosts, command: str, *arguments: str) -> subprocess.Popen[str]:
    """On the third host, with a replica on each of the others."""
    first, second, third = hosts.all
    log = (hosts.folder / f"{command}.log").open("w")
    given = ["--cluster", f"{third.address}:{PORT}", "--log-dir", str(hosts.folder / "logs")]
    if command != "doctor":
        given += ["--place", f"replica-0={first.address}", f"replica-1={second.address}", "--node-timeout-s", "8"]
        given += ["--against", "replicas"]
    return third.popen(sys.executable, SCRIPT, command, *given, *arguments, stdout=log, stderr=log)


def output(hosts: Hosts, command: str) -> str:
    return (hosts.folder / f"{command}.log").read_text()


def running_load(hosts: Hosts, name: str) -> tuple[subprocess.Popen[str], Path]:
    """A run in which requests flow to both replicas, from clients on the third and the second host."""
    out = hosts.folder / name
    events = hosts.folder / "logs" / "proxy.events.jsonl"
    events.unlink(missing_ok=True)
    clients = ["--client-nodes", hosts.all[2].address, hosts.all[1].address, "--client-processes", "2"]
    load = ["--trials", "1", "--concurrency", "8", "--requests", "40000", "--output-tokens", "20", "--out", str(out)]
    process = pdbench(hosts, "run", *load, *clients)
    wait_until(
        lambda: "proxy: ready" in output(hosts, "run") or process.poll() is not None, PATIENCE_S, "servers ready"
    )
    assert process.poll() is None, output(hosts, "run")
    wait_until(lambda: events.exists() and len(events.read_text().splitlines()) > 80, PATIENCE_S, "requests flow")
    return process, out / "replicas_results"


def marked(process: subprocess.Popen[str], folder: Path, hosts: Hosts) -> Run:
    """The result of a run that a fault ended: requests of both clients, samples of both nodes."""
    assert process.wait(120) == 1, output(hosts, "run")
    run = load_run(folder)
    assert "node-lost" in {flag.name for flag in run.flags}
    done = [request for request in run.requests if request.error is None and not request.warmup]
    assert {int(request.id[-6:]) % 2 for request in done} == {0, 1}, output(hosts, "run")
    assert len({request.id for request in run.requests}) == len(run.requests)
    assert all(request.sent_s is not None and request.sent_s < request.token_s[0] for request in done)
    assert {device.host for device in run.devices if device.samples} >= {hosts.all[0].address, hosts.all[1].address}
    return run


def nothing_left(hosts: Hosts) -> bool:
    return not any(host.servers() for host in hosts.all)


def test_doctor_reports_every_node_and_link(hosts: Hosts) -> None:
    process = pdbench(hosts, "doctor")
    assert process.wait(120) == 0, output(hosts, "doctor")
    for host in hosts.all:
        assert f"{host.address} clock against the head's" in output(hosts, "doctor")
        for other in hosts.all:
            if host is not other:
                assert f"{host.address} -> {other.address}: " in output(hosts, "doctor")


def test_killed_pdbench_leaves_nothing_and_a_dead_actor_ends_the_next_run(hosts: Hosts) -> None:
    process, _ = running_load(hosts, "killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: nothing_left(hosts), PATIENCE_S, "nothing is left")
    first = hosts.all[0]
    process, folder = running_load(hosts, "actor")
    # The actor that holds the server; the node's agent has none.
    (supervisor,) = [process for process in first.processes() if "supervisor.py" in " ".join(process.cmdline())]
    actor = supervisor.parent()
    assert actor is not None and "RayHost" in " ".join(actor.cmdline())
    actor.kill()
    run = marked(process, folder, hosts)
    (lost,) = [flag.detail for flag in run.flags if flag.name == "node-lost"]
    assert f"replica-0 on node {first.address} is gone" in lost
    wait_until(lambda: nothing_left(hosts), PATIENCE_S, "nothing is left")


def test_node_cut_off_for_good_ends_the_run_and_its_clients_reports_are_kept(hosts: Hosts) -> None:
    second, third = hosts.all[1:]
    process, folder = running_load(hosts, "cut")
    second.cut()
    second.harmed = True
    run = marked(process, folder, hosts)
    assert second.address in next(flag.detail for flag in run.flags if flag.name == "node-lost")
    assert run.trials[0].client["nodes"] == [third.address, second.address]
    wait_until(lambda: nothing_left(hosts), PATIENCE_S, "nothing is left; behind the cut the leases run out")
    second.give_up()  # as it would in a minute; the next file's tests have the cluster repaired


RESERVE = """import sys
from pdbench.cluster.site import RaySite
from pdbench.config import ClusterConfig
from pdbench.serving.plan import ServerSpec
with RaySite(ClusterConfig(cluster=sys.argv[1], place=("spread",))) as site:
    print("looked", flush=True)
    sys.stdin.readline()
    with site.reserve([ServerSpec("replica", index, 1) for index in range(3)]) as hosts:
        print("servers on", *sorted(host.node.address for host in hosts.values()))
"""


def test_node_that_joins_after_pdbench_has_looked_gets_a_server(joined: Hosts) -> None:
    """It is the second host's, as it ended in the test before: its cluster is repaired here."""
    head = joined.all[2]
    joined.all[1].harmed = True
    joined.all[1].kill()
    command = [sys.executable, "-c", RESERVE, f"{head.address}:{PORT}"]
    process = head.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stdout.readline() == "looked\n"
    joined.repair()
    out, error = process.communicate("\n", PATIENCE_S)
    assert " ".join(["servers on", *(host.address for host in joined.all)]) in out.splitlines(), error


@pytest.mark.slow
def test_cut_of_the_head_ends_the_run(hosts: Hosts) -> None:
    third = hosts.all[2]
    process, folder = running_load(hosts, "alone")
    third.cut()
    third.harmed = True
    marked(process, folder, hosts)
    wait_until(lambda: nothing_left(hosts), PATIENCE_S, "nothing is left")
