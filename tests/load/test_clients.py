"""Collecting what several clients measured: starts, progress, losses, stops. Handles in memory stand for processes and nodes."""

import os
import signal
import threading
import time

import pytest

from pdbench.errors import UserError
from pdbench.load import clients
from pdbench.load.clients import Failure, Final, Message, Partial, Progress, Ready, collect
from pdbench.load.generator import ClientResult
from pdbench.records import Clock, RequestRecord


def result(*names: str, warmup: bool = False, **fields) -> ClientResult:
    requests = [RequestRecord(id=name, planned_s=0.0, warmup=warmup) for name in names]
    return ClientResult(requests=requests, busy_s=b"12345678" * len(names), merged_reads=len(names), **fields)


class Handle:
    """A client that sends `before` at once, `started` after its start, and `stopped` after its stop."""

    def __init__(self, name: str, before: list[Message], started: list[Message], stopped: list[Message]) -> None:
        self.name, self.lost = name, None
        self.began_s: list[float] = []
        self.stops = 0
        self._messages, self._started, self._stopped = before, started, stopped

    def take_messages(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def begin(self, begin_s: float) -> None:
        self.began_s.append(begin_s)
        self._messages += self._started

    def stop(self) -> None:
        self.stops += 1
        self._messages += self._stopped


def gather(*handles: Handle, **options) -> list[ClientResult]:
    return collect(handles, clock=Clock.start(), wait=lambda seconds: time.sleep(0.001), **options)


def names(collected: ClientResult) -> list[str]:
    return [request.id for request in collected.requests]


def test_all_clients_start_at_one_instant_and_partial_results_are_joined():
    first = Handle("0", [Ready()], [Partial(result("a", cpu_s=1.0)), Final(result("b", "c", cpu_s=2.0))], [])
    second = Handle("1", [Ready()], [Final(result("d"))], [])
    collected = gather(first, second)
    assert [names(one) for one in collected] == [["a", "b", "c"], ["d"]]
    assert first.began_s == second.began_s and len(first.began_s) == 1
    assert (collected[0].cpu_s, collected[0].merged_reads, len(collected[0].busy_s)) == (2.0, 3, 24)
    assert not any(one.lost or one.interrupted for one in collected)


def test_progress_is_the_sum_at_the_earliest_instant_and_has_a_total_once_all_have_one():
    told: list[tuple[int, int | None, float]] = []
    first = Handle("0", [Ready()], [Progress(1, 4, at_s=1.0), Progress(2, 4, at_s=2.0), Final(result("a"))], [])
    second = Handle("1", [Ready()], [Progress(3, 5, at_s=1.5), Final(result("b"))], [])
    gather(first, second, on_progress=lambda progress: told.append((progress.done, progress.total, progress.at_s)))
    assert list(dict.fromkeys(told)) == [(1, None, 0.0), (2, None, 0.0), (5, 9, 1.5)]


def test_lost_client_stops_the_others_and_what_it_had_reported_is_kept():
    dead = Handle("client 0", [Ready()], [Partial(result("a")), Failure("the process died")], [])
    alive = Handle("client 1", [Ready()], [Partial(result("b"))], [Final(result("c"))])
    collected = gather(dead, alive)
    assert [names(one) for one in collected] == [["a"], ["b", "c"]]
    assert [one.lost for one in collected] == ["client 0: the process died", None]
    assert alive.stops == 1 and not any(one.interrupted for one in collected)


def test_problem_elsewhere_stops_all_and_a_silent_client_counts_as_lost(monkeypatch):
    monkeypatch.setattr(clients, "_STOP_TIMEOUT_S", 0.2)
    silent = Handle("client 0", [Ready()], [Partial(result("a"))], [])
    alive = Handle("client 1", [Ready()], [], [Final(result("b"))])
    collected = gather(silent, alive, problem=lambda: "node 10.0.0.9 was not heard of" if silent.began_s else None)
    assert [names(one) for one in collected] == [["a"], ["b"]]
    assert "no result within" in collected[0].lost and collected[1].lost is None


def test_nothing_measured_is_an_error_with_the_reason():
    gone = Handle("client 0", [], [], [])
    gone.lost = "client 0 on 10.0.0.1 is gone"
    warm = Handle("client 1", [Ready()], [], [Final(result("w", warmup=True))])
    with pytest.raises(UserError, match=r"client 0 on 10\.0\.0\.1 is gone: no request was measured"):
        gather(gone, warm)
    assert warm.began_s == []


def test_failure_before_the_start_is_an_error():
    with pytest.raises(UserError, match="client 0: no tokenizer"):
        gather(Handle("client 0", [Failure("no tokenizer")], [], []), Handle("client 1", [Ready()], [], []))


def test_interruption_keeps_what_was_measured_and_is_marked():
    handle = Handle("client 0", [Ready()], [Partial(result("a"))], [Final(result("b"))])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    (collected,) = gather(handle)
    assert names(collected) == ["a", "b"] and collected.interrupted and collected.lost is None


def test_interruption_before_anything_was_sent_is_a_keyboard_interrupt():
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        gather(Handle("client 0", [], [], [Failure("the process died")]))
