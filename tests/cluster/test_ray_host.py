"""A node's actor, without Ray: its lease, its outbox, samples and events in pieces, a client that is started and stopped."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pdbench.cluster.ray_host import RayHost
from pdbench.config import LoadConfig
from pdbench.host import Batch
from pdbench.load.clients import Final, Partial, Ready
from pdbench.load.plan import TrialLoad
from pdbench.power.sampler import merge_records
from pdbench.records import Clock
from pdbench.serving.deployment import ServerInfo
from pdbench.serving.process import Secrets
from tests.support.processes import ROOT, wait_until
from tests.support.servers import ScriptedServer, stream, tokens

LEASE_S = 86400.0
"""A host made here lives in the process of the tests, and a lease that runs out ends its process."""

HOLDER = """
import sys, time
from pdbench.cluster.ray_host import RayHost
from pdbench.serving.process import Secrets
from pdbench.serving.vllm import Command
host = RayHost(1.5, "127.0.0.1")
argv = (sys.executable, "-S", "-c", "import time; time.sleep(600)")
command = Command("server-0", "server", argv, {}, "http://127.0.0.1:1", secret_names=("PDBENCH_KV_SECRET",))
pids = host.start([command], sys.argv[1], Secrets(PDBENCH_KV_SECRET="x" * 16))
print(pids["server-0"], flush=True)
time.sleep(600)
"""


def test_host_without_heartbeats_ends_its_server_and_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    supervisor = psutil.Process(int(holder.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    assert holder.wait(60) == 1
    wait_until(lambda: not any(process.is_running() for process in family), 30, "supervisor and server ended")
    holder.stdout.close()


def test_message_stays_until_it_is_confirmed() -> None:
    host = RayHost(LEASE_S, "127.0.0.1")
    first, second = Batch(missing_logs=["first"]), Batch(missing_logs=["second"])
    host.send(first)
    host.send(second)
    assert host.heartbeat(0)[1] == host.heartbeat(0)[1] == [(1, first), (2, second)]
    assert host.heartbeat(1)[1] == [(2, second)]
    assert host.heartbeat(2)[1] == []


def test_samples_and_events_in_pieces_make_one_whole(tmp_path: Path) -> None:
    log = tmp_path / "proxy.events.jsonl"
    log.write_text(json.dumps({"event": "request", "request_id": "old"}) + "\n")
    host = RayHost(LEASE_S, "127.0.0.1")
    begin_s = time.monotonic()
    server = ServerInfo(
        name="prefill-0", role="prefill", url="http://127.0.0.1:1", pids=[psutil.Process().pid], event_log=str(log)
    )
    host.start_measuring([server], 0.02)
    batches: list[Batch] = []
    confirmed = 0

    def take() -> None:
        nonlocal confirmed
        for number, message in host.heartbeat(confirmed)[1]:
            confirmed = number
            assert isinstance(message, Batch)
            batches.append(message)

    for index in range(3):
        time.sleep(0.2)
        with log.open("a") as file:
            file.write(json.dumps({"event": "request", "request_id": f"r{index}", "received_s": 5.0}) + "\n")
            file.write('{"event": "requ')  # a line that is being written
        take()
        with log.open("a") as file:
            file.write('est"}\n')
    host.stop_measuring()
    with log.open("a") as file:
        file.write(json.dumps({"event": "request", "request_id": "late"}) + "\n")
    take()
    events = [event for batch in batches for event in batch.events]
    assert [event.request_id for event in events if event.request_id] == ["r0", "r1", "r2"]
    assert len(events) == 6
    pieces = [msgspec.structs.replace(piece, host="10.0.0.1") for batch in batches for piece in batch.devices]
    assert len(pieces) > 2
    (whole,) = merge_records(pieces, lambda node_s: node_s - begin_s)
    instants = [sample.t_s for sample in whole.samples]
    assert instants == sorted(set(instants)) and 0 <= instants[0] < instants[-1] <= time.monotonic() - begin_s
    assert whole.host == "10.0.0.1" and whole.role == "prefill"
    assert whole.sampling["missed_ticks"] is not None and whole.statistics["memory_used_mib"]["max"]


def message_of(host: RayHost, kind: type) -> Any:
    """The first message of this kind that the client sends."""
    messages: list[Any] = []

    def arrived() -> bool:
        messages[:] = [message for message in client_messages(host) if isinstance(message, kind)]
        return bool(messages)

    wait_until(arrived, 60, kind.__name__)
    return messages[0]


def client_messages(host: RayHost) -> list[Any]:
    return [message[1] for _, message in host.heartbeat(0)[1] if isinstance(message, tuple)]


def test_client_warms_up_waits_for_the_start_and_sends_its_result() -> None:
    with ScriptedServer(stream(tokens(3))) as server:
        host = RayHost(LEASE_S, "127.0.0.1")
        clock = Clock.start()
        config = LoadConfig(requests=4, warmup=1, client_processes=2, concurrency=2, output_tokens=3)
        host.start_client(TrialLoad(config, server.url, "m", clock), 1)
        message_of(host, Ready)
        begin_s = clock.now() + 0.1
        host.begin_load(begin_s)
        assert message_of(host, Final).result.begin_s == begin_s
        results = [message.result for message in client_messages(host) if isinstance(message, Partial | Final)]
        measured = [request.id[-6:] for result in results for request in result.requests if not request.warmup]
        assert sorted(measured) == ["000001", "000003"]
        host.close()


def test_secrets_are_not_in_their_text() -> None:
    assert "hidden" not in f"{Secrets(HF_TOKEN='hidden')!r} {Secrets(HF_TOKEN='hidden')}"
