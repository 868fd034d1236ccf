"""The instances: choosing among them, changing them at run time, and sharing them among workers."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from pdbench.config import ProxyConfig
from pdbench.errors import UserError
from pdbench.http import get
from pdbench.proxy import messages
from pdbench.proxy.instances import InstanceTable, State, choose, parse_address
from pdbench.proxy.upstream import ConnectionPool, InstanceConnection, UpstreamRequest
from tests.support.processes import ending_with_tests, free_port, wait_until
from tests.support.proxy_processes import instance, proxy


@pytest.fixture
def table():
    """Three ready prefill instances."""
    table = InstanceTable(workers=2)
    for port in (1, 2, 3):
        table.passed(table.add("prefill", parse_address(f"http://127.0.0.1:{port}", 0)))
    return table


class Transport:
    """A socket's transport that notes whether it is read."""

    reading = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def write(self, data):
        pass

    def is_closing(self):
        return False


def test_paused_connection_is_read_again_for_the_next_request(table):
    async def serve_twice():
        pool, first = ConnectionPool(table, ProxyConfig()), table.all()[0]
        connection, transport = InstanceConnection(pool), Transport()
        connection.connection_made(transport)
        pool.release(connection, first)
        request = UpstreamRequest(pool, first, "decode", b"POST / HTTP/1.1", tokens=1, timeout_s=5.0)
        request.consume = lambda _: request.pause(True)
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert request.finished.done() and request.error is None
        request.pause(False)  # the client has caught up
        assert pool.acquire(first) is connection
        assert transport.reading

    asyncio.run(serve_twice())


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.005, 0.02])
def test_starting_workers_obey_sigterm(tmp_path, after_s):
    with instance(tmp_path, "d") as decode:
        with proxy(tmp_path, "--workers", "3", decode=[decode], ready=False) as server:
            time.sleep(after_s)
            server.signal(signal.SIGTERM)
            assert server.process.wait(60) == 0


def test_address_with_and_without_kv():
    address = parse_address("http://gpu-1:8100@10.0.0.7:14579", 1)
    assert (address.url, address.kv) == ("http://gpu-1:8100", "10.0.0.7:14579")
    assert parse_address("http://[::1]:80", 9).url == "http://[::1]:80"
    assert parse_address("http://[::1]:80", 9).kv == "[::1]:9"


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:80", "https://a:1", "http://a", "http://a:x", "http://a:70000", "http://a:1/v1", "http://a:1@b",
     "http://a:1@b:c", "http://a b:1", "http://a:1\r\nX: y", "http://" + "a" * 600 + ":1"],
)  # fmt: skip
def test_invalid_address_is_refused_with_the_right_form(text):
    with pytest.raises(UserError, match=r"http://HOST:PORT|characters"):
        parse_address(text, 0)


def test_least_work_counts_tokens_for_prefill_and_requests_for_decode(table):
    first, second, third = table.all()
    table.count(first, 1, 1000)
    table.count(second, 1, 10)
    table.count(second, 1, 10)
    table.count(third, 1, 2000)
    assert choose("least-work", "prefill", table, b"", set()) == second
    for port, tokens in ((4, 1000), (5, 10), (5, 10)):
        present = [instance for instance in table.all() if instance.address.port == port]
        decode = present[0] if present else table.add("decode", parse_address(f"http://127.0.0.1:{port}", 0))
        table.passed(decode)
        table.count(decode, 1, tokens)
    chosen = choose("least-work", "decode", table, b"", set())
    assert chosen is not None
    assert chosen.address.port == 4


def test_ties_and_round_robin_are_spread(table):
    for policy in ("least-work", "round-robin"):
        chosen = [choose(policy, "prefill", table, b"", set()) for _ in range(6)]
        assert {instance.slot for instance in chosen if instance} == {0, 1, 2}


def test_roles_take_independent_turns(table):
    for port in (4, 5, 6):
        table.passed(table.add("decode", parse_address(f"http://127.0.0.1:{port}", 0)))
    for policy in ("least-work", "round-robin"):
        for counted in ("prefill", "decode"):
            chosen = [choose(policy, role, table, b"", set()) for _ in range(6) for role in ("prefill", "decode")]
            assert len({instance.slot for instance in chosen if instance and instance.role == counted}) == 3


def test_counted_pairs_visit_every_prefill_with_every_decode(table):
    for port in (4, 5):
        table.passed(table.add("decode", parse_address(f"http://127.0.0.1:{port}", 0)))

    def chosen(pair):
        return tuple(choose("least-work", role, table, b"", set(), pair).address.port for role in ("prefill", "decode"))

    assert sorted(chosen(pair) for pair in range(6)) == [(p, d) for p in (1, 2, 3) for d in (4, 5)]
    table.set_state(table.all()[0], State.DRAINING)
    assert len({chosen(pair) for pair in range(6)}) == 4  # of those that are ready


def test_prefix_affinity_holds_until_the_instance_is_overloaded(table):
    chosen = {
        prefix: choose("prefix-affinity", "prefill", table, prefix, set()) for prefix in (b"a", b"b", b"c", b"d", b"e")
    }
    assert len({instance.slot for instance in chosen.values() if instance}) > 1
    first = chosen[b"a"]
    assert first is not None
    assert all(choose("prefix-affinity", "prefill", table, b"a", set()) == first for _ in range(5))
    for _ in range(9):
        table.count(first, 1, 1)
    assert choose("prefix-affinity", "prefill", table, b"a", set()) != first


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s" * 300}]])
def test_turns_of_a_short_conversation_have_one_prefix(system):
    turns, prefixes = [*system, {"role": "user", "content": "Hi"}], set()
    for _ in range(3):
        prefixes.add(messages.prefix(json.dumps(turns).encode()))
        turns += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "And then?"}]
    assert len(prefixes) == 1
    assert messages.prefix(b'[{"role": "user", "content": "Ho"}]') not in prefixes


@pytest.mark.parametrize(
    "prompt", [b'"Hi"', b"[1, 2]", b'[["Hi"]]', b"[{]", b'[{"role": 1}]', b'[{"role": "system"}]', b"null"]
)
def test_prefix_of_what_has_no_users_message_is_its_beginning(prompt):
    assert messages.prefix(prompt) == prompt
    assert messages.prefix(prompt + b" " * 2000) == (prompt + b" " * 2000)[:1024]


def test_prefixes_are_spread_over_instances_whose_long_names_begin_alike():
    table, host = InstanceTable(), f"node-1.{'gpus.' * 12}example.com"
    for port in (8100, 8101, 8102):
        table.passed(table.add("decode", parse_address(f"http://{host}:{port}", 0)))
    chosen = {choose("prefix-affinity", "decode", table, b"prompt %d" % number, set()) for number in range(50)}
    assert len(chosen) == 3


def test_only_ready_instances_are_chosen(table):
    first, second, third = table.all()
    table.set_state(first, State.DRAINING)
    for _ in range(3):
        table.failed(second, 3)
    assert choose("least-work", "prefill", table, b"", set()) == third
    assert choose("least-work", "prefill", table, b"", {third.slot}) is None
    table.passed(second)
    table.set_state(first, State.SERVING)
    assert len(table.ready("prefill")) == 3


def test_refilled_slot_ignores_counts_of_the_old_instance(table):
    first = table.all()[0]
    table.count(first, 1, 5)
    table.set_state(first, State.REMOVED)
    new = table.add("prefill", parse_address("http://127.0.0.1:9", 0))
    assert new.slot == first.slot
    table.count(first, -1, -5)
    table.failed(first, 1)
    assert table.load(new) == (0, 0)


def test_load_is_summed_over_workers_and_forgotten_with_a_dead_one(table):
    first = table.all()[0]
    for worker in (0, 1):
        table.worker = worker
        table.count(first, 1, 10)
    assert table.load(first) == (2, 20)
    table.forget_worker(1)
    assert table.load(first) == (1, 10)


@pytest.mark.parametrize(("prompt", "tokens"), [(b"[1,2,3]", 3), (b'"abcdefgh"', 3), (b"", 1), (b'["ab", "cd"]', 4)])
def test_prompt_tokens(prompt, tokens):
    assert messages.prompt_tokens(prompt) == tokens


def test_instances_are_added_drained_and_removed_at_run_time(tmp_path):
    with instance(tmp_path, "first") as first, instance(tmp_path, "second") as second, ThreadPoolExecutor() as threads:
        with proxy(tmp_path, "--health-interval-s", "0.1", decode=[first]) as server:
            answer = server.request("POST", "/instances", {"role": "decode", "url": second.url})
            assert answer.status == 201
            name = answer.json["id"]
            server.wait_all_healthy()
            assert server.request("POST", "/instances", {"role": "decode", "url": second.url}).status == 409
            assert server.request("POST", "/instances/decode-0/drain").json["state"] == "draining"
            running = threads.submit(server.complete, stream=True, decode={"until": str(tmp_path / "end")})
            wait_until(server.in_flight)
            assert server.request("DELETE", f"/instances/{name}").json["state"] == "leaving"
            assert server.complete().status == 503
            assert server.request("POST", "/instances/decode-0/resume").json["state"] == "serving"
            assert server.complete().status == 200
            (tmp_path / "end").touch()
            assert running.result().events[-1] == b"[DONE]"
            wait_until(lambda: len(server.instances()) == 1)
            assert [len(first.requests()), len(second.requests())] == [1, 1]
            removed = server.request("DELETE", "/instances/decode-0?now=true")
            assert (removed.status, removed.json["state"]) == (202, "removed")
            assert server.request("GET", "/health").status == 503


def test_requests_at_prefill_count_at_the_decode_that_was_chosen_for_them(tmp_path):
    with (
        instance(tmp_path, "p") as prefill,
        instance(tmp_path, "d0") as first,
        instance(tmp_path, "d1") as second,
        ThreadPoolExecutor() as threads,
        proxy(tmp_path, prefill=[prefill], decode=[first, second]) as server,
    ):
        fields = {"stream": True, "max_tokens": 4, "temperature": 0}
        held = json.dumps({"decode": {"until": str(tmp_path / "decoded")}})
        running = [threads.submit(server.complete, user=held, **fields)]
        wait_until(lambda: sorted(each["in_flight"] for each in server.instances()) == [0, 0, 1])
        held = json.dumps({"prefill": {"until": str(tmp_path / "prefilled")}})
        running += [threads.submit(server.complete, user=held, **fields) for _ in range(3)]
        wait_until(lambda: [each["in_flight"] for each in server.instances()] == [3, 2, 2])
        for name in ("prefilled", "decoded"):
            (tmp_path / name).touch()
        assert all(future.result().events[-1] == b"[DONE]" for future in running)
        server.wait_idle()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"role":"x","url":"http://a:1"}', b'{"role":"decode","url":"a"}']
)
def test_invalid_instance_is_refused(dead, body):
    answer = dead.request("POST", "/instances", body)
    assert answer.status == 400
    assert "http://HOST:PORT" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [("GET", "/instances/x", 405), ("DELETE", "/instances", 405), ("POST", "/instances/decode-0/dance", 404),
     ("POST", "/instances/x/drain/y", 404), ("GET", "/instances/x/drain", 405), ("DELETE", "/instances/prefill-9", 404),
     ("GET", "/instances/decode-0", 405)],
)  # fmt: skip
def test_unknown_instance_path_or_method_is_refused(dead, method, target, status):
    assert dead.request(method, target).status == status


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A proxy over an instance that is dead."""
    folder = tmp_path_factory.mktemp("dead")
    with instance(folder, "gone") as gone:
        gone.kill()
    with proxy(folder, decode=[gone], ready=False) as server:
        yield server


def test_health_without_instances_is_live_but_not_ready(dead):
    assert dead.request("GET", "/health").status == 503
    assert dead.request("GET", "/health/live").status == 200
    assert dead.complete().status == 503


def test_ctrl_c_in_a_terminal_lets_requests_of_workers_end(tmp_path):
    """It is sent to all processes of the group, and the parent forwards its own."""
    with instance(tmp_path, "d") as decode, ThreadPoolExecutor() as threads:
        with proxy(tmp_path, "--workers", "2", decode=[decode]) as server:
            running = threads.submit(server.complete, stream=True, decode={"until": str(tmp_path / "end")})
            wait_until(server.in_flight)
            processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
            group = [each for each in processes if os.getpgid(each.pid) == os.getpgid(server.process.pid)]
            for process in reversed(group):
                process.send_signal(signal.SIGINT)
            time.sleep(0.2)  # the signals have come before the request's end
            (tmp_path / "end").touch()
            assert running.result().events[-1] == b"[DONE]"
            assert server.process.wait(60) == 0


def test_workers_end_when_their_parent_is_killed(tmp_path):
    with instance(tmp_path, "d") as decode:
        with proxy(tmp_path, "--workers", "2", decode=[decode]) as server:
            workers = psutil.Process(server.process.pid).children()
            server.kill()
            _, alive = psutil.wait_procs(workers, 60)
            assert len(workers) == 2 and not alive


def test_workers_share_port_and_instances(tmp_path):
    with instance(tmp_path, "p") as prefill, instance(tmp_path, "d") as decode, ThreadPoolExecutor(16) as threads:
        options = ("--workers", "3", "--health-interval-s", "0.2")
        with proxy(tmp_path, *options, prefill=[prefill], decode=[decode]) as server:
            children = [child.pid for child in psutil.Process(server.process.pid).children()]
            assert len(children) == 3
            held = {"until": str(tmp_path / "end")}
            futures = [threads.submit(server.complete, True, decode=held) for _ in range(12)]
            # Requests at prefill count too, so the sum passes through 12 while streams begin: six equal answers end that.
            wait_until(lambda: {server.in_flight() for _ in range(6)} == {12})
            (tmp_path / "end").touch()
            assert all(future.result().events[-1] == b"[DONE]" for future in futures)
            metrics = {server.request("GET", "/metrics").body.count(b"_requests_total{") for _ in range(6)}
            assert metrics == {1}
            wait_until(lambda: b'requests_total{status="200"} 12' in server.request("GET", "/metrics").body)
            assert server.request("POST", "/instances/decode-1/drain").status == 200
            assert {server.request("GET", "/health").status for _ in range(6)} == {503}
            assert server.request("POST", "/instances/decode-1/resume").status == 200
            os.kill(children[0], signal.SIGKILL)

            def replaced() -> bool:
                pids = {child.pid for child in psutil.Process(server.process.pid).children()}
                return len(pids) == 3 and children[0] not in pids

            wait_until(replaced)
            assert {server.complete().status for _ in range(9)} == {200}
            server.signal(signal.SIGTERM)
            assert server.process.wait(60) == 0


NO_FORKS = """
import errno, os, sys
from pdbench.__main__ import main
fork, calls = os.fork, []
def refusing():
    calls.append(1)
    if len(calls) in {refused}:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()
os.fork = refusing
sys.exit(main())
"""


@pytest.mark.parametrize(("refused", "starts"), [({2, 3}, True), ({1}, False)])
def test_worker_that_cannot_be_started_is_tried_again(tmp_path, refused, starts):
    """Not where it is the first: then nothing would serve."""
    port, code = free_port(), NO_FORKS.replace("{refused}", str(refused))
    command = [sys.executable, "-c", code, "proxy", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    command += ["--port", str(port), "--workers", "2"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(ending_with_tests(command), stderr=log)
    if starts:
        wait_until(lambda: (tmp_path / "log").read_text().count("worker 1 cannot be started") == 2)
        wait_until(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 2)
        assert get(f"http://127.0.0.1:{port}", "/metrics")
        running.terminate()
        assert running.wait(20) == 0
    else:
        assert running.wait(20) != 0
        assert (
            "cannot start a worker process (Resource temporarily unavailable): allow more"
            in (tmp_path / "log").read_text()
        )
