"""The warm-up covers the batch sizes that the load will reach, so that nothing is met for the first time inside the window."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.analysis.run_analysis import analyze
from pdbench.config import LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.load import plan
from pdbench.records import Run
from pdbench.site import Site
from tests.load.test_generator import load
from tests.support.servers import Peer, ScriptedServer, refusal, stream, tokens


def compiling_server(sleep_s: float, slept: list[str]) -> Callable[[Peer], bool]:
    """Sleeps the first time that it has k requests in flight, for every k, as a server does that compiles for a batch size; `slept`
    gets the ids of those requests."""
    lock, in_flight, met = threading.Lock(), [0], set[int]()
    answer = stream(tokens(4), pause_s=0.1)  # the warm-up's requests are sent one after another: they must meet

    def serve(peer: Peer) -> bool:
        if peer.method == "GET":
            return refusal(b"404 Not Found", "no metrics")(peer)
        with lock:
            in_flight[0] += 1
            # The end of one answer may be read before it is counted here: nine at once of eight streams.
            new = in_flight[0] not in met and in_flight[0] <= 8
            met.add(in_flight[0])
        if new:
            slept.append(peer.fields.get("x-request-id", ""))
            time.sleep(sleep_s)
        answered = answer(peer)
        with lock:
            in_flight[0] -= 1
        return answered

    return serve


def bench(out: Path, slept: list[str], **options: object) -> Run:
    runs: dict[Path, Run] = {}
    with ScriptedServer(compiling_server(1.0, slept)) as server:
        sent = LoadConfig(concurrency=8, requests=48, **options)
        measured = Options(ServeConfig(model="m"), sent, PowerConfig(power=False))
        experiment.bench(server.url, 1, measured, out, Console(quiet=True), Site(), runs)
    (run,) = runs.values()
    return run


def test_default_warm_up_meets_every_batch_size_before_the_load(tmp_path: Path) -> None:
    slept: list[str] = []
    run = bench(tmp_path, slept)
    assert run.config["load"]["warmup"] == 8 == sum(request.warmup for request in run.requests)
    assert set(slept) - {""} <= {request.id for request in run.requests if request.warmup}
    assert "cold-start" not in [flag.name for flag in analyze(run).flags]


def test_too_small_a_warm_up_is_flagged(tmp_path: Path) -> None:
    (flag,) = [flag for flag in analyze(bench(tmp_path, [], warmup=2)).flags if flag.name == "cold-start"]
    assert flag.detail.startswith("trial 1: the first 8 requests took ") and flag.detail.endswith("--warmup 8")


def test_batches_grow_during_the_warm_up() -> None:
    with ScriptedServer(stream(tokens(3), pause_s=0.2)) as server:
        result = load(server, concurrency=4, requests=4, warmup=6)
    warmup = sorted((request for request in result.requests if request.warmup), key=lambda request: request.sent_s)
    planned_s, sent_s = ([getattr(request, name) for request in warmup] for name in ("planned_s", "sent_s"))
    assert all(after - before > 0.005 for before, after in pairwise(planned_s[:4])) and len(sent_s) == 6
    assert (
        sent_s[3] < min(request.end_s for request in warmup[:4]) < sent_s[4]
    )  # four at once; a fifth waits for a free stream


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 2),
        ({"concurrency": 1}, 2),
        ({"concurrency": 100}, 100),
        ({"concurrency": 100, "warmup": 0}, 0),
        ({"rate": 0.5}, 2),
        ({"rate": 8.0}, 16),
        ({"rate": 8.0, "concurrency": 5}, 5),
        ({"rate": 1000.0}, 64),
        ({"rate": 1.0, "ramp_to": 10.0}, 20),
        ({"stages": "1:10,12:5,3:10"}, 24),
        ({"trace": "any.csv"}, 16),
        ({"trace": "any.csv", "concurrency": 4}, 4),
    ],
)
def test_warm_up_size(options: dict, size: int) -> None:
    assert plan.warmup_size(LoadConfig(**options)) == size


def test_resolved_load_says_what_will_be_done() -> None:
    closed = plan.resolved(LoadConfig(concurrency=16, nonce="ab"))
    assert (closed.warmup, closed.requests) == (16, 16)
    assert plan.describe(closed) == "16 at a time, 16 requests, at most 64 tokens out, after a warm-up of 16, nonce ab"
    assert plan.resolved(closed) == closed
    ramp = plan.resolved(LoadConfig(rate=1.0, ramp_to=4.0, concurrency=3, nonce="ab"))
    assert ramp.requests is None
    assert plan.describe(ramp) == (
        "1 to 4 requests/s over 60 s, Poisson arrivals, at most 3 at a time, to its end, at most 64 tokens out, after a warm-up of 3, nonce ab"
    )  # fmt: skip
    assert len(str(plan.resolved(LoadConfig()).nonce)) == 8
