"""What a fault costs a client of the proxy: servers are killed and paused, clients leave; one table row each.

Try: python benchmarks/proxy_faults.py            (about 30 seconds)
"""

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import wait_until
from tests.support.proxy_processes import instance, proxy

WAITS = {"first": 0.3}
PACED = {"delay": 0.01}
OPTIONS = ("--prefill-timeout-s", "2", "--health-interval-s", "60")
threads = ThreadPoolExecutor(4)


def row(fault, seen, waited_s, lost):
    """One line of the table."""
    print(f"| {fault} | {seen} | {1000 * waited_s:.0f} ms | {lost} |", flush=True)


def describe(answer):
    """What the client saw, in a few words."""
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        last = answer.events[-1]
        if last == b"[DONE]":
            return f"200, whole stream of {len(answer.events) - 1} tokens"
        return f"200, {len(answer.events) - 1} tokens, then error event {last['error']['code']} ({last['error']['stage']}), closed"
    if answer.status == 200:
        return "200, whole answer"
    return f"{answer.status}, stage {answer.json['error']['stage']}"


def before_the_answer(folder, fault, break_it, *options, prefills=1, decodes=1, lost="nothing", **fields):
    """A fault before a byte was passed on; the time runs from the request."""
    with instances(folder, prefills, decodes) as (prefill, decode):
        with proxy(
            folder, *OPTIONS, "--decode-policy", "round-robin", *options, prefill=prefill, decode=decode
        ) as server:
            server.wait_all_healthy()
            break_it(prefill, decode)
            answers = []
            for _ in range(max(prefills, decodes)):
                start_s = time.monotonic()
                answer = server.complete(max_tokens=20, **fields)
                answers.append((time.monotonic() - start_s, answer))
            waited_s, answer = max(answers, key=lambda pair: pair[0])
            row(fault, describe(answer), waited_s, lost)


@contextlib.contextmanager
def instances(folder, prefills, decodes):
    """Some prefill and decode instances that live as long as the block."""
    with contextlib.ExitStack() as stack:
        yield [
            [stack.enter_context(instance(folder, f"{role}-{time.monotonic_ns()}-{i}")) for i in range(count)]
            for role, count in (("prefill", prefills), ("decode", decodes))
        ]


def mid_stream(folder, fault, number, lost):
    """A fault while tokens flow; the time runs from the fault."""
    with instances(folder, 1, 1) as (prefill, decode):
        with proxy(folder, *OPTIONS, "--decode-timeout-s", "2", prefill=prefill, decode=decode) as server:
            future = threads.submit(server.complete, True, max_tokens=1000, decode=PACED)
            wait_until(server.in_flight)
            time.sleep(0.5)
            start_s = time.monotonic()
            decode[0].signal(number)
            answer = future.result()
            row(fault, describe(answer), time.monotonic() - start_s, lost)


def client_leaves(folder):
    """The time from the client's close to the end of decode's work."""
    with instances(folder, 1, 1) as (prefill, decode):
        with proxy(folder, *OPTIONS, prefill=prefill, decode=decode) as server:
            waits = []
            for _ in range(50):
                connection = server.connect()
                body = b'{"model":"m","prompt":"Hi","stream":true,"max_tokens":500,"decode":{"delay":0.01}}'
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % len(body) + body)
                assert connection.recv(1000)
                start_s = time.monotonic()
                connection.close()
                wait_until(lambda: decode[0].lines()[-1]["event"] == "abort")
                waits.append(decode[0].lines()[-1]["at_s"] - start_s)
            assert server.in_flight() == 0
            row("client leaves mid-stream (median of 50)", "-", statistics.median(waits), "decode stops")
            row("client leaves mid-stream (worst of 50)", "-", max(waits), "decode stops")


def shutdown(folder):
    """SIGTERM with a stream in flight."""
    with instances(folder, 1, 1) as (prefill, decode):
        with proxy(folder, *OPTIONS, prefill=prefill, decode=decode) as server:
            future = threads.submit(server.complete, True, max_tokens=50, decode=PACED)
            wait_until(server.in_flight)
            start_s = time.monotonic()
            server.signal(signal.SIGTERM)
            answer = future.result()
            row("SIGTERM to the proxy mid-stream", describe(answer), time.monotonic() - start_s, "nothing")


def main():
    """The table."""
    with contextlib.suppress(PermissionError):
        # Before whatever else the machine does: processes started from here inherit it.
        os.nice(-15)
    print("| fault | what the client saw | how long | what was lost |\n|---|---|---|---|")
    kill = signal.SIGKILL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before_the_answer(folder, "the one prefill is dead", lambda p, d: p[0].kill(), decode=WAITS, lost="the request")
        before_the_answer(folder, "one of two prefills is dead", lambda p, d: p[0].kill(), prefills=2, decode=WAITS)
        before_the_answer(folder, "the one prefill is dead, --fallback recompute", lambda p, d: p[0].kill(),
                          "--fallback", "recompute", decode=WAITS)  # fmt: skip
        before_the_answer(folder, "prefill stalls (SIGSTOP; limit 2 s)", lambda p, d: p[0].signal(signal.SIGSTOP),
                          decode={"first": 30}, lost="the request")  # fmt: skip
        before_the_answer(folder, "prefill stalls, --fallback recompute", lambda p, d: p[0].signal(signal.SIGSTOP),
                          "--fallback", "recompute", decode={"first": 2.8}, lost="the time waited",
                          prefill={"first": 30})  # fmt: skip
        before_the_answer(folder, "prefill answers 500", lambda p, d: None, prefill={"status": 500}, decode=WAITS,
                          lost="the request")  # fmt: skip
        before_the_answer(folder, "the one decode is dead", lambda p, d: d[0].kill(), lost="the request")
        before_the_answer(folder, "one of two decodes is dead", lambda p, d: d[0].kill(), decodes=2)
        before_the_answer(folder, "decode ends with 200 and no body", lambda p, d: None, decode={"end": "empty-body"},
                          lost="the request")  # fmt: skip
        before_the_answer(folder, "decode's answer is cut off (not a stream)", lambda p, d: None,
                          decode={"end": "cut-off"}, lost="the request")  # fmt: skip
        mid_stream(folder, "decode killed mid-stream", kill, "tokens after the kill")
        mid_stream(folder, "decode stalls mid-stream (SIGSTOP; limit 2 s)", signal.SIGSTOP, "tokens after the stall")
        client_leaves(folder)
        shutdown(folder)
    threads.shutdown()


if __name__ == "__main__":
    main()
