"""The actors' own behaviour, without Ray: leases, outboxes, samples and events in pieces, a client that is stopped."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pdbench.cluster.actors import Batch, ClientHost, NodeAgent, Secrets
from pdbench.config import LoadConfig
from pdbench.load.clients import Final, Partial, Ready
from pdbench.power.sampler import merge_records
from pdbench.records import Clock
from tests.support.cluster_hosts import wait_until
from tests.support.servers import ScriptedServer, stream, tokens

LEASE_S = 86400.0
"""An agent made here lives in the process of the tests, and a lease that runs out ends its process."""

HOLDER = """
import sys, time
from functools import partial
from pdbench.cluster.actors import InstanceHost, Secrets
from pdbench.config import ServeConfig
from pdbench.serving.vllm import Command
class Host(InstanceHost):
    def own_gpus(self):
        return ()
def plan(config, gpus):
    return Command("server-0", "server", (sys.executable, "-S", "-c", "import time; time.sleep(600)"), {}, "http://127.0.0.1:1")
host = Host(1.5)
host.plan(ServeConfig(log_dir=sys.argv[1]), plan, "127.0.0.1")
host.start(Secrets({"PDBENCH_KV_SECRET": "x" * 16}))
print(host.state()["pid"], flush=True)
time.sleep(600)
"""


def test_an_actor_that_nobody_asks_ends_its_server_and_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert holder.stdout is not None
    guard = psutil.Process(int(holder.stdout.readline()))
    family = [guard, *guard.children(recursive=True)]
    assert holder.wait(60) == 1
    wait_until(lambda: not any(one.is_running() for one in family), "guard and server ended", 30)


def test_a_message_stays_until_it_is_confirmed() -> None:
    agent = NodeAgent(LEASE_S)
    agent.tell("first")
    agent.tell("second")
    assert agent.pulse(0)[1] == agent.pulse(0)[1] == [(1, "first"), (2, "second")]
    assert agent.pulse(1)[1] == [(2, "second")]
    assert agent.pulse(2)[1] == []


def test_samples_and_events_come_in_pieces_and_make_one_whole(tmp_path: Path) -> None:
    log = tmp_path / "proxy.events.jsonl"
    log.write_text(json.dumps({"event": "request", "request_id": "old"}) + "\n")
    agent = NodeAgent(LEASE_S)
    agent.follow([str(log)])
    begin_s = time.monotonic()
    agent.start_sampler({}, {"prefill": [psutil.Process().pid]}, 0.02)
    batches: list[Batch] = []
    confirmed = 0

    def take() -> None:
        nonlocal confirmed
        for number, message in agent.pulse(confirmed)[1]:
            confirmed = number
            batches.append(msgspec.msgpack.decode(message, type=Batch))

    for index in range(3):
        time.sleep(0.2)
        with log.open("a") as file:
            file.write(json.dumps({"event": "request", "request_id": f"r{index}", "received_s": 5.0}) + "\n")
            file.write('{"event": "requ')  # a line that is being written
        take()
        with log.open("a") as file:
            file.write('est"}\n')
    agent.stop_sampler()
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


def message_of(host: ClientHost, kind: type) -> Any:
    """The first message of this kind that the client sends."""
    messages: list[Any] = []

    def arrived() -> bool:
        messages[:] = [message for _, (_, message) in host.pulse(0)[1] if isinstance(message, kind)]
        return bool(messages)

    wait_until(arrived, kind.__name__, 60)
    return messages[0]


def test_client_warms_up_waits_for_the_start_and_sends_its_result() -> None:
    with ScriptedServer(stream(tokens(3))) as server:
        host = ClientHost(LEASE_S)
        clock = Clock.start()
        config = LoadConfig(requests=4, warmup=1, client_processes=2, concurrency=2, output_tokens=3)
        host.start(config, server.url, "m", clock, 0, 1, Secrets({}))
        message_of(host, Ready)
        begin_s = clock.now() + 0.1
        host.begin(begin_s)
        assert message_of(host, Final).result.begin_s == begin_s
        requests = [request for _, (_, message) in host.pulse(0)[1] for request in results(message)]
        measured = [request.id[-6:] for request in requests if not request.warmup]
        assert sorted(measured) == ["000001", "000003"]
        host.close()


def results(message: Any) -> list[Any]:
    return message.result.requests if isinstance(message, Partial | Final) else []
