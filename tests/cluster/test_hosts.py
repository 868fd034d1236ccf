"""Three hosts: prefill (real vLLM, CPU) on the first, decode on the second, client, proxy and pdbench on the third; then faults.

The hosts are network namespaces with addresses and monotonic clocks of their own (1000 and 2000 s ahead), a Ray node in each. The
deployment is started once; the last test of this file ends it.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdbench.events import TransferEvent
from pdbench.records import Run, load_run
from tests.support.cluster import PATIENCE_S, PORT, Hosts
from tests.support.processes import wait_until

pytest.importorskip("ray", reason="Ray is not installed (requirements/ray.txt)")
pytestmark = [pytest.mark.cluster, pytest.mark.vllm, pytest.mark.timeout(600)]
NODE_TIMEOUT_S = 20
CUT_S = 2.5  # of a connection that opens meanwhile, the third SYN, after 3 s, is within the proxy's 5 s


def options(hosts: Hosts) -> list[str]:
    first, second, third = hosts.all
    given = ["--cluster", f"{third.address}:{PORT}", "--node-timeout-s", str(NODE_TIMEOUT_S)]
    given += ["--place", f"prefill={first.address}", f"decode={second.address}"]
    return [*given, "--log-dir", str(hosts.folder / "logs")]


def pdbench(hosts: Hosts, *arguments: str) -> subprocess.Popen[str]:
    """On the third host; its output goes into a file that `output` reads."""
    log = (hosts.folder / f"{arguments[0]}.log").open("w")
    command = [sys.executable, "-m", "pdbench", *arguments, *options(hosts)]
    return hosts.all[2].popen(*command, stdout=log, stderr=log)


def output(hosts: Hosts, command: str) -> str:
    return (hosts.folder / f"{command}.log").read_text()


def bench(hosts: Hosts, name: str, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    out = hosts.folder / name
    given = ["--url", f"http://{hosts.all[2].address}:8000", "--warmup", "1", "--out", str(out), *arguments]
    return pdbench(hosts, "bench", *given), out / "disaggregated_results"


def result(process: subprocess.Popen[str], folder: Path, hosts: Hosts, code: int = 0) -> Run:
    assert process.wait(240) == code, output(hosts, "bench")
    return load_run(folder)


@pytest.fixture(scope="module")
def serving(joined: Hosts) -> subprocess.Popen[str]:
    """`pdbench serve --cluster` that is ready."""
    joined.repair()
    process = pdbench(joined, "serve", "--restarts", "1", "--connector", "tcp")
    wait_until(lambda: "ready:" in output(joined, "serve") or process.poll() is not None, 300, "servers ready")
    assert process.poll() is None, output(joined, "serve")
    return process


def flowing(hosts: Hosts, process: subprocess.Popen[str]) -> None:
    """Until the gate is over and some requests of `bench` came back."""
    events = hosts.folder / "logs" / "proxy.events.jsonl"
    wait_until(lambda: "gate passed" in " ".join(output(hosts, "bench").split()), PATIENCE_S, "the gate passes")
    before = len(events.read_text().splitlines())
    wait_until(lambda: len(events.read_text().splitlines()) > before + 5, PATIENCE_S, "requests flow")
    assert process.poll() is None, output(hosts, "bench")


def test_gate_passes_and_kv_crosses_the_cable(hosts: Hosts, serving: subprocess.Popen[str]) -> None:
    first = hosts.all[0]
    before = first.sent_bytes()
    run = result(
        *bench(
            hosts, "whole", "--requests", "6", "--output-tokens", "16", "--concurrency", "2", "--client-processes", "2"
        ),
        hosts,
    )
    assert run.gate is not None and run.gate.passed, run.gate
    assert run.gate.external_kv_tokens == run.gate.prompt_tokens
    sent = sum(event.bytes for event in run.events if isinstance(event, TransferEvent) and event.side == "send")
    assert 0 < sent <= first.sent_bytes() - before
    assert [request.error for request in run.requests] == [None] * len(run.requests)
    assert sum(not request.warmup for request in run.requests) == 6


def test_roles_have_their_nodes_and_instants_are_on_the_heads_clock(
    hosts: Hosts, serving: subprocess.Popen[str]
) -> None:
    run = load_run(hosts.folder / "whole" / "disaggregated_results")
    addresses = [host.address for host in hosts.all]
    nodes = run.host["nodes"]
    assert [nodes[address]["roles"] for address in addresses] == [["prefill-0"], ["decode-0"], ["proxy"]]
    assert {(device.role, device.host) for device in run.devices} >= {
        ("prefill", addresses[0]),
        ("decode", addresses[1]),
    }
    assert run.trials[0].client["nodes"] == [addresses[2]] * 2
    uncertainty_s = 0.0
    for host in hosts.all:
        clock = nodes[host.address]["clock"]
        assert clock["offset_s"] == pytest.approx(-host.ahead_s, abs=max(clock["uncertainty_ms"], 1e-6) / 1e3)
        uncertainty_s = max(uncertainty_s, clock["uncertainty_ms"] / 1e3)
    for request in run.requests:
        if not request.warmup:
            prefill, transfer = request.phases["prefill"], request.phases["kv_transfer"]
            assert prefill is not None and transfer is not None and request.sent_s is not None
            assert request.sent_s <= prefill[0] <= transfer[1] + uncertainty_s
            # Prefill's own token may have opened the stream; decode's first one needs the KV.
            assert transfer[1] <= request.token_s[1] + uncertainty_s
    for device in run.devices:
        instants = [sample.t_s for sample in device.samples]
        assert instants == sorted(instants)
        assert instants[0] <= min(request.planned_s for request in run.requests) + uncertainty_s


def test_secrets_are_in_no_command_line_and_no_log(hosts: Hosts, serving: subprocess.Popen[str]) -> None:
    secrets = set()
    lines = []
    for host in hosts.all:
        for process in host.processes():
            lines.append(" ".join(process.cmdline()))
            if "PDBENCH_KV_SECRET" in (environment := process.environ()):
                secrets.add(environment["PDBENCH_KV_SECRET"])
    assert len(secrets) == 1
    secret = secrets.pop()
    assert not any(secret in line for line in lines)
    for path in hosts.folder.rglob("*"):
        if path.is_file() and path.suffix in (".log", ".out", ".err", ".json", ".jsonl"):
            assert secret not in path.read_text(errors="replace"), path


def test_short_cut_loses_nothing(hosts: Hosts, serving: subprocess.Popen[str]) -> None:
    second = hosts.all[1]
    process, folder = bench(hosts, "healed", "--duration-s", "14", "--output-tokens", "48")
    flowing(hosts, process)
    second.cut()
    time.sleep(CUT_S)
    second.reconnect()
    assert process.poll() is None, output(hosts, "bench")
    run = result(process, folder, hosts)
    assert [request.error for request in run.requests] == [None] * len(run.requests)
    assert "node-lost" not in {flag.name for flag in run.flags}
    decode = next(device for device in run.devices if device.role == "decode")
    assert decode.sampling["missed_ticks"] is not None
    # The sampler beat on through the cut, and what it had is here: no gap as long as the cut.
    assert max(b.t_s - a.t_s for a, b in zip(decode.samples, decode.samples[1:], strict=False)) < CUT_S


@pytest.mark.slow  # tests/kv/test_vllm.py restarts prefill, tests/serving/test_deployment.py a deployment's server
def test_restarted_prefill_sends_its_kv(hosts: Hosts, serving: subprocess.Popen[str]) -> None:
    for process in hosts.all[0].processes():
        if "api_server" in " ".join(process.cmdline()) and "supervisor.py" not in " ".join(process.cmdline()):
            process.kill()
    wait_until(
        lambda: "prefill-0: ready again" in output(hosts, "serve") or serving.poll() is not None, 300, "started again"
    )
    assert serving.poll() is None, output(hosts, "serve")
    run = result(*bench(hosts, "again", "--requests", "3", "--output-tokens", "8"), hosts)
    assert run.gate is not None and run.gate.passed and run.gate.external_kv_tokens == run.gate.prompt_tokens
    assert [request.error for request in run.requests] == [None] * len(run.requests)


def test_node_that_dies_ends_the_run_with_what_was_measured(hosts: Hosts, serving: subprocess.Popen[str]) -> None:
    first, second, third = hosts.all
    process, folder = bench(hosts, "died", "--requests", "400", "--output-tokens", "64")
    flowing(hosts, process)
    second.kill()
    assert process.wait(150) == 1, output(hosts, "bench")
    run = load_run(folder)
    assert "node-lost" in {flag.name for flag in run.flags}
    done = [request for request in run.requests if request.error is None and not request.warmup]
    assert done and any(request.phases.get("kv_transfer") for request in done)
    assert any(device.role == "decode" and device.samples for device in run.devices)
    assert serving.wait(150) == 1
    assert "10.213.77.2" in output(hosts, "serve")
    wait_until(lambda: first.servers() == [] and third.servers() == [], PATIENCE_S, "nothing of ours is left")
