"""One trial over N client processes: each makes the same plan, sends every N-th request of it and reports what it measured.

All start at one instant of the run's clock, so the merged records are those of one process that was never late.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from pdbench.errors import UserError
from pdbench.load import plan, request_fields, self_check
from pdbench.load.generator import ClientResult, OnProgress, Progress, interruption, run_client
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, Flag, RequestRecord, Trial
from pdbench.supervisor import end_with

_POLL_S = 0.1
_PROBLEM_S = 0.25
_STOP_TIMEOUT_S = 10.0
_EXIT_TIMEOUT_S = 5.0


class Ready(msgspec.Struct, tag=True):
    """The client has warmed up and waits for `begin`."""


class Partial(msgspec.Struct, tag=True):
    result: ClientResult


class Final(msgspec.Struct, tag=True):
    result: ClientResult


class Failure(msgspec.Struct, tag=True):
    message: str


# A Partial holds what was measured since the last one; after a Final or a Failure, nothing follows.
Message = Ready | Progress | Partial | Final | Failure
_encode, _decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Message).decode


OnBegin = Callable[[], object]
"""Called between the warm-up and the load."""
Problem = Callable[[], str | None]
"""Asked a few times a second; what it says ends the load with what was measured."""


class ClientHandle(Protocol):
    """A started client process, on this host or on another."""

    name: str

    @property
    def lost(self) -> str | None:
        """Why nothing more can come from it; None while something may."""

    def take_messages(self) -> list[Message]:
        """The messages that came since the last call; does not wait."""

    def begin(self, begin_s: float) -> None:
        """Let a ready client start at this instant of the run's clock; does not wait."""

    def stop(self) -> None:
        """Ask the client to end with what it measured; does not wait."""


@dataclass(frozen=True)
class LoadResult:
    """One trial: all its requests (warm-up ones marked), its measured window with the client's self-check, and its flags."""

    requests: list[RequestRecord]
    trial: Trial
    flags: list[Flag]


def run_load(
    load: TrialLoad,
    on_progress: OnProgress | None = None,
    on_begin: OnBegin = lambda: None,
    problem: Problem = lambda: None,
) -> LoadResult:
    """Send one trial from this host and wait for all responses; `plan.check` has passed its options.

    Raises UserError for options that cannot be used. Ctrl-C or SIGTERM ends the trial with what was measured and a flag
    "interrupted"; a lost client process ends it with a flag "client-lost".
    """

    def begin() -> float:
        on_begin()
        return load.clock.now()

    if load.config.client_processes == 1:
        with interruption() as interrupted, _stopped_by(problem, interrupted) as stopped:
            result = run_client(load, begin=begin, interrupted=interrupted, on_progress=on_progress)
        result.interrupted = interrupted.is_set() and not stopped.is_set()
        return merge(load, [result])
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(LocalClient(index, load)))
            for index in range(load.config.client_processes)
        ]

        def wait(seconds: float) -> None:
            multiprocessing.connection.wait([client.pipe for client in clients if not client.ended], seconds)

        results = collect(
            clients, clock=load.clock, wait=wait, on_progress=on_progress, on_begin=on_begin, problem=problem
        )
        return merge(load, results)


@contextlib.contextmanager
def _stopped_by(problem: Problem, interrupted: threading.Event) -> Iterator[threading.Event]:
    """Sets `interrupted` when there is a `problem()` inside the block, and the event that it gives."""
    stopped, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(_PROBLEM_S):
            if not interrupted.is_set() and problem():
                stopped.set()
                interrupted.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield stopped
    finally:
        ended.set()
        thread.join()


def collect(
    clients: Sequence[ClientHandle],
    *,
    clock: Clock,
    wait: Callable[[float], object],
    on_progress: OnProgress | None = None,
    on_begin: OnBegin = lambda: None,
    problem: Problem = lambda: None,
    start_after_s: float = 0.05,
) -> list[ClientResult]:
    """Start all clients at one instant, after `on_begin`, once each has warmed up; returns what each measured, in their order.

    `wait(seconds)` returns when a message may have come, after `seconds` at most; the start is `start_after_s` after the
    last client was ready. Ctrl-C, SIGTERM, a lost client, or a `problem()` elsewhere stop the clients, which then have ten
    seconds for their results. Of a client that is gone, what it had reported until then is returned, with `lost` set.
    Raises UserError when a client fails before the start, or nothing was measured; KeyboardInterrupt when that is because
    of Ctrl-C.
    """
    parts: list[list[ClientResult]] = [[] for _ in clients]
    progress: dict[int, Progress] = {}
    pending = set(range(len(clients)))
    lost: dict[int, str] = {}
    ready = 0
    begin_s: float | None = None
    stop_by_s = inf
    with interruption() as interrupted:
        while pending and time.monotonic() < stop_by_s:
            wait(_POLL_S)
            for index in sorted(pending):
                client = clients[index]
                gone = client.lost  # before its messages are taken: none can follow then
                for message in client.take_messages():
                    if isinstance(message, Ready):
                        ready += 1
                    elif isinstance(message, Progress):
                        progress[index] = message
                        if on_progress:
                            on_progress(_together(list(progress.values()), len(clients)))
                    elif isinstance(message, Failure):
                        gone = f"{client.name}: {message.message}"
                        if begin_s is None and not interrupted.is_set():
                            raise UserError(gone)
                    else:
                        parts[index].append(message.result)
                        if on_progress and (ended := [each for each in message.result.requests if not each.warmup]):
                            on_progress(_together(list(progress.values()), len(clients), ended))
                        if isinstance(message, Final):
                            pending.discard(index)
                if gone and index in pending:
                    lost[index] = gone
                    pending.discard(index)
            if begin_s is None and ready == len(clients):
                on_begin()
                begin_s = clock.now() + start_after_s
                for client in clients:
                    client.begin(begin_s)
            if stop_by_s == inf and (interrupted.is_set() or lost or problem()):
                stop_by_s = time.monotonic() + _STOP_TIMEOUT_S
                for client in clients:
                    client.stop()
    for index in pending:
        lost[index] = f"{clients[index].name}: no result within {_STOP_TIMEOUT_S:g} s of its stop"
    results = [
        msgspec.structs.replace(  # what counts from the start is in the last one
            reported[-1] if reported else ClientResult(begin_s=begin_s or clock.now()),
            requests=[request for part in reported for request in part.requests],
            busy_s=b"".join(part.busy_s for part in reported),
            read_delays_s=b"".join(part.read_delays_s for part in reported),
            merged_reads=sum(part.merged_reads for part in reported),
            interrupted=interrupted.is_set(),  # a client is also stopped because of another's loss
            lost=lost.get(index),
        )
        for index, reported in enumerate(parts)
    ]
    requests = [request for result in results for request in result.requests]
    if interrupted.is_set():
        if not requests:
            raise KeyboardInterrupt
    elif lost and all(request.warmup for request in requests):
        raise UserError(f"{problem() or lost[min(lost)]}: no request was measured")
    return results


def _together(progress: Sequence[Progress], clients: int, ended: list[RequestRecord] | None = None) -> Progress:
    """The progress of all clients at the earliest one's instant; a total only where each has told its own."""
    totals = [each.total for each in progress if each.total is not None]
    done, in_flight, tokens = (sum(getattr(p, name) for p in progress) for name in ("done", "in_flight", "tokens"))
    at_s = min(each.at_s for each in progress) if len(progress) == clients else 0.0
    return Progress(done, sum(totals) if len(totals) == clients else None, in_flight, tokens, ended or [], at_s)


class LocalClient:
    """A client process of this host; the handle that `collect` takes."""

    lost = None

    def __init__(self, index: int, load: TrialLoad) -> None:
        self.name = f"client {index}"
        self.ended = False
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        name = f"pdbench-client-{index}"
        self._process = context.Process(target=_client_process, args=(theirs, load, index), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def take_messages(self) -> list[Message]:
        messages: list[Message] = []
        try:
            while not self.ended and self.pipe.poll():
                messages.append(_decode(self.pipe.recv_bytes()))
                self.ended = isinstance(messages[-1], Final | Failure)
        except (EOFError, OSError):
            self.ended = True
            messages.append(Failure("the process died: free memory or lower --client-processes"))
        return messages

    def begin(self, begin_s: float) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(begin_s)

    def stop(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.pipe.close()
        self._process.join(_EXIT_TIMEOUT_S if self.ended else 0.0)
        self._process.kill()
        self._process.join()


def _client_process(pipe: Connection, load: TrialLoad, index: int) -> None:
    """The terminal's Ctrl-C reaches this process too, but only its parent's SIGTERM counts, so that it stops once."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with(parent.pid, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: interrupted.set())
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send_messages() -> None:
        with contextlib.suppress(OSError):  # the parent has given up
            while (data := outbox.get()) is not None:
                pipe.send_bytes(data)

    # A thread, because the parent may take its time to read and the load must not wait for it.
    sender = threading.Thread(target=send_messages, daemon=True)
    sender.start()

    def put(message: Message) -> None:
        outbox.put(_encode(message))

    def begin() -> float:
        put(Ready())
        while not pipe.poll(_POLL_S):
            if interrupted.is_set():
                return load.clock.now()
        return float(pipe.recv())

    try:
        result = run_client(
            load,
            index,
            begin=begin,
            interrupted=interrupted,
            on_progress=put,
            on_partial=lambda partial: put(Partial(partial)),
        )
        put(Final(result))
    except UserError as error:
        put(Failure(str(error)))
    except EOFError:
        return  # the parent has given up
    outbox.put(None)
    sender.join()


def merge(load: TrialLoad, results: Sequence[ClientResult]) -> LoadResult:
    """One result of all clients', in the order of the one plan."""
    config = load.config
    requests = [request for result in results for request in result.requests]
    requests.sort(key=lambda request: (not request.warmup, request.id))
    measured = [request for request in requests if not request.warmup]
    client = self_check.describe(results, measured, streams=plan.streams(config), open_loop=config.open_loop)
    flags = self_check.flags(client)
    start_s, end_s, window = self_check.window(results, config.open_loop)
    decode_window = self_check.decode_window(measured) if config.phase == "decode" else None
    steady_window = results[0].steady_window
    if steady_window:
        start_s, end_s = steady_window
        window = f"the {config.steady_s:g} s through which the load held steady"
    elif decode_window:
        start_s, end_s, window = decode_window
    lost = [result.lost for result in results if result.lost]
    if any(result.interrupted for result in results):
        detail = f"trial {load.trial + 1}: stopped early: the figures are of what was measured until then; comparisons leave this trial out"
        flags.append(Flag("interrupted", detail))
    elif lost:
        flags.append(Flag("client-lost", f"{'; '.join(lost)}: the figures are of what was measured until then"))
    elif config.phase == "decode" and not decode_window:
        flags.append(Flag("phases-mixed", "the batch never decoded all at once: raise --output-tokens"))
    elif config.steady_s is not None and not steady_window:
        detail = f"the load never held steady for {config.steady_s:g} s: lower it or run longer"
        flags.append(Flag("not-steady", detail))
    if config.prompt_file and (repeats := len(measured) - len({each.prompt_sha256 for each in measured})):
        detail = f"{len(measured)} requests from {len(measured) - repeats} prompts: {repeats} repeat"
        flags.append(Flag("prompts-repeat", detail))
    flags += request_fields.refusal_flags({name for result in results for name in result.fields_refused})
    flags += dict.fromkeys(flag for result in results for flag in result.flags)
    client["window"] = window
    return LoadResult(requests, Trial(index=load.trial, start_s=start_s, end_s=end_s, client=client), flags)
