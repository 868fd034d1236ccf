"""One client process's share of a trial: warm-up, its planned requests, the drain; a ClientResult comes back."""

import contextlib
import gc
import hashlib
import itertools
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from pdbench.errors import UserError
from pdbench.load import plan, request_fields
from pdbench.load.client import Client
from pdbench.load.connection import files_left
from pdbench.load.plan import PlannedRequest, TrialLoad
from pdbench.records import Canary, Flag, RequestRecord

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 3.0
"""After the first Ctrl-C: a key pressed twice, or a SIGTERM that follows, is the same wish."""
_SHORT_PROMPT = 200
_LOOKAHEAD = 64
_PROGRESS_S = 0.25
_STEADY_SAMPLE_S = 0.25
_STEADY_TIMEOUT_S = 600.0
_STEADY_WITHIN = 0.1
STALL_S = 0.25
"""The loop turns every 50 ms, whatever comes: one that takes this long was stopped, or had no core."""


class Progress(msgspec.Struct, tag=True):
    """How far the load is, a few times a second: requests ended of `total` (None where time ends the trial), those in flight,
    tokens so far (of a chunk with several, one until its answer has ended), and the requests that ended since the last progress. Everything that ended before `at_s` (run's clock) is reported."""

    done: int
    total: int | None
    in_flight: int = 0
    tokens: int = 0
    ended: list[RequestRecord] = []
    at_s: float = 0.0


OnProgress = Callable[[Progress], None]


class ClientResult(msgspec.Struct, kw_only=True):
    """What one client process measured: all of it, or what came since its last partial result.

    `streams` is how many requests it may have in flight (None: no bound). `busy_s` (one turn of its loop each) and
    `read_delays_s` are raw float64 arrays. `cpu_s`, `wall_s` and `stalled_s` (in which its loop stood still) count from `begin_s`. `lost`
    says why the rest never came.
    """

    requests: list[RequestRecord] = []
    streams: int | None = None
    begin_s: float = 0.0
    busy_s: bytes = b""
    read_delays_s: bytes = b""
    merged_reads: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    stalled_s: float = 0.0
    real_time: bool = False
    interrupted: bool = False
    steady_window: tuple[float, float] | None = None
    fields_refused: list[str] = []
    flags: list[Flag] = []
    addresses: list[str] = []
    lost: str | None = None


def run_client(
    load: TrialLoad,
    client: int = 0,
    *,
    begin: Callable[[], float],
    interrupted: threading.Event,
    on_progress: OnProgress | None = None,
    on_partial: Callable[[ClientResult], None] | None = None,
) -> ClientResult:
    """Send this client's requests of the plan, every N-th of N clients', over its share of the streams.

    `begin` is called after the warm-up and returns the common start on the run's clock. Whoever sets `interrupted` ends the load with
    what was measured. `on_partial` takes, before each progress, what was measured since its last call; the returned result then holds
    the rest. Raises UserError for a load or a URL that cannot be used.
    """
    with contextlib.suppress(OSError, ValueError):  # one descriptor per stream: take what the system allows
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    config, clock = load.config, load.clock
    clients = config.client_processes
    tokenizer, flags = plan.load_tokenizer_for(load)
    warmup = plan.warmup_requests(config, tokenizer, load.trial, client, clients)
    # Planned beforehand unless it is endless, so that making prompts does not delay their sending.
    planned = plan.planned_requests(config, tokenizer, load.trial, client, clients)
    total = None
    if not plan.is_endless(config):
        requests = list(planned)
        if not requests and not plan.request_count(config, load.trial):
            raise UserError("the load has no request: its time (--duration-s, --stages) ends before the first arrival")
        planned, total = iter(requests), len(requests)
    streams = plan.streams(config)
    if streams is not None:
        streams = streams // clients + (client < streams % clients)
        room, needed = files_left(), 0 if config.open_loop else min(streams, total or streams)
        if room < needed:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            words = f"{needed} streams in a process, and `ulimit -n` {most} has room for {room}"
            raise UserError(f"{words}: raise it, or lower --concurrency")
    with Client(load.url, config, zero_s=clock.monotonic_s) as sender, _undelayed() as real_time:
        result = ClientResult(streams=streams, real_time=real_time, addresses=sender.addresses, flags=flags)
        loop = _Loop(load, sender, interrupted, result)
        loop.drive(iter(warmup), streams or len(warmup), clock.now())
        loop.result.begin_s = begin_s = begin()
        loop.total, loop.on_progress, loop.on_partial = total, on_progress, on_partial
        loop.drive(planned, streams, begin_s, warmup=False)
        return loop.take_result()


class _Loop:
    """The sending loop's state: what was sent, what came back, when to stop."""

    def __init__(self, load: TrialLoad, client: Client, interrupted: threading.Event, result: ClientResult) -> None:
        self.load, self.config, self.client = load, load.config, client
        self.interrupted, self.result = interrupted, result
        self.total: int | None = None
        self.on_progress: OnProgress | None = None
        self.on_partial: Callable[[ClientResult], None] | None = None
        self._run_id = f"{int(load.clock.unix_s * 1e3):x}-{load.trial}"
        self._canaries = {place: number for number, place in enumerate(load.canaries)}
        self._in_flight: dict[str, tuple[RequestRecord, PlannedRequest, tuple[str, ...]]] = {}
        self._freed: set[str] = set()  # of these, the answers are whole
        self._progress_at_s = self._sample_at_s = 0.0
        self._samples: list[tuple[float, int, int]] = []

    def drive(
        self, planned: Iterator[PlannedRequest], streams: int | None, begin_s: float, *, warmup: bool = True
    ) -> None:
        """Send `planned` from `begin_s` on, at most `streams` at once (None: no bound), and wait for all responses."""
        client = self.client
        client.take_counters()
        self._done, self._instants_ended, self._tokens_beyond, self._told = 0, 0, 0, len(self.result.requests)
        self._answered = False
        self._began_s, self._began_cpu_s = time.monotonic(), time.thread_time()
        free_s = deque([begin_s] * (streams or 0))
        ahead = deque(itertools.islice(planned, 1))
        self.result.stalled_s, turned_s = 0.0, client.clock.now()
        while ahead or self._in_flight:
            if self.interrupted.is_set():
                for record in client.abandon("interrupted", "the load was stopped"):
                    self._ended(record)
                self._freed.clear()
                break
            now_s = client.clock.now()
            if now_s - turned_s > STALL_S:
                self.result.stalled_s += now_s - turned_s
            turned_s = now_s
            if ahead and not warmup and self._stop_sending(now_s, begin_s):
                ahead.clear()
            next_s = now_s + 1.0
            while ahead and (streams is None or free_s):
                arrival_s = ahead[0].arrival_s
                earliest_s = begin_s if arrival_s is None else begin_s + arrival_s
                due_s = earliest_s if streams is None else max(earliest_s, free_s[0])
                if due_s > now_s:
                    next_s = due_s
                    break
                if streams is not None:
                    free_s.popleft()
                self._send(ahead.popleft(), due_s if arrival_s is None else earliest_s, due_s, warmup)
                if not ahead:
                    ahead.extend(itertools.islice(planned, 1))
            ended = client.poll(next_s)
            free_s.extend(client.freed_s.values())
            self._freed |= client.freed_s.keys()
            client.freed_s.clear()
            for record in ended:
                was_free = record.id in self._freed
                self._freed.discard(record.id)
                if self._ended(record) and not was_free:
                    free_s.append(record.end_s if record.end_s is not None else now_s)
            if 0 < len(ahead) <= _LOOKAHEAD:
                ahead.extend(itertools.islice(planned, 1))
            if self.on_progress and now_s >= self._progress_at_s:
                self._progress_at_s = now_s + _PROGRESS_S
                self.on_progress(self._progress())
        if self.on_progress:
            self.on_progress(self._progress())

    def _progress(self) -> Progress:
        now_s = self.client.clock.now()
        ended = self.result.requests[self._told :]
        self._told += len(ended)
        if self.on_partial and ended:  # it carries the requests
            self.on_partial(self.take_result())
            self._told, ended = 0, []
        tokens = self._arrived() + self._tokens_beyond
        return Progress(self._done, self.total, len(self._in_flight) - len(self._freed), tokens, ended, now_s)

    def _arrived(self) -> int:
        """The instants at which tokens came so far."""
        return self._instants_ended + sum(len(record.token_s) for record, _, _ in self._in_flight.values())

    def take_result(self) -> ClientResult:
        """What was measured since the last call."""
        result = self.result
        self.result = msgspec.structs.replace(result, requests=[])
        result.busy_s, result.read_delays_s, result.merged_reads = self.client.take_counters()
        result.cpu_s, result.wall_s = time.thread_time() - self._began_cpu_s, time.monotonic() - self._began_s
        result.interrupted = self.interrupted.is_set()
        return result

    def _send(self, planned: PlannedRequest, planned_s: float, due_s: float, warmup: bool) -> None:
        config, load = self.config, self.load
        record = RequestRecord(
            id=f"{self._run_id}-{'w' if warmup else ''}{planned.index:06d}",
            planned_s=planned_s,
            due_s=due_s,
            prompt_tokens=planned.prompt_tokens,
            shared_prompt_tokens=planned.shared_tokens,
            trial=load.trial,
            warmup=warmup,
        )
        if not warmup and planned.index in self._canaries:
            record.canary = Canary(number=self._canaries[planned.index])
        refused, greedy = self.result.fields_refused, record.canary is not None
        self._in_flight[record.id] = record, planned, tuple(refused)
        body = request_fields.request_body(
            config, load.model, planned.prompt, planned.output_tokens, refused, greedy=greedy
        )
        self.client.start(record, body)
        # After the sending, which a long prompt's hash would delay.
        text = planned.text
        record.prompt_sha256 = hashlib.sha256(text.encode()).hexdigest()
        if config.save_prompts or len(text) <= _SHORT_PROMPT:
            record.prompt = text

    def _ended(self, record: RequestRecord) -> bool:
        """Keep a record; False where its request was sent again without a field that the server refuses."""
        _, planned, refused = self._in_flight.pop(record.id)
        error, refuses = record.error, []
        if error and error.kind in ("http_400", "http_422"):
            refuses = request_fields.refused_fields(self.config, error.message, refused)
        if refuses:
            known = self.result.fields_refused
            self.result.fields_refused = known + [name for name in refuses if name not in known]
            assert record.due_s is not None
            self._send(planned, record.planned_s, record.due_s, record.warmup)
            return False
        self.result.requests.append(record)
        self._instants_ended += len(record.token_s)
        self._tokens_beyond += max(0, (record.output_tokens or 0) - len(record.token_s))
        self._answered |= not record.warmup and record.error is None
        self._done += 1
        return True

    def _stop_sending(self, now_s: float, begin_s: float) -> bool:
        """Has the load's time passed, or has it held steady for long enough?"""
        config = self.config
        # Before the first answer has ended the load only fills, however steady its tokens come.
        if config.steady_s is not None and self._answered and now_s >= self._sample_at_s:
            self._sample_at_s = now_s + _STEADY_SAMPLE_S
            self._samples.append((now_s, self._arrived(), len(self._in_flight) - len(self._freed)))
            start_s = steady_since(self._samples, config.steady_s)
            if start_s is not None:
                self.result.steady_window = (start_s, now_s)
                return True
        limit_s = config.duration_s or (_STEADY_TIMEOUT_S if config.steady_s is not None else None)
        return limit_s is not None and now_s - begin_s >= limit_s


def steady_since(samples: Sequence[tuple[float, int, int]], span_s: float) -> float | None:
    """The start of the last `span_s` (or a sample more) if the load held steady through it, else None.

    `samples` are (instant, tokens received so far, requests in flight). Steady: both halves of the span have token rates and
    mean requests in flight within a tenth of each other (or one request).
    """
    if not samples or samples[-1][0] - samples[0][0] < span_s:
        return None
    begin = max(index for index, sample in enumerate(samples) if sample[0] <= samples[-1][0] - span_s)
    recent = samples[begin:]
    middle = len(recent) // 2
    first, second = recent[: middle + 1], recent[middle:]
    if len(first) < 3 or len(second) < 3:
        return None
    rates = [(half[-1][1] - half[0][1]) / (half[-1][0] - half[0][0]) for half in (first, second)]
    in_flight = [sum(sample[2] for sample in half) / len(half) for half in (first, second)]
    steady_rate = min(rates) > 0 and abs(rates[1] - rates[0]) <= _STEADY_WITHIN * max(rates)
    steady_in_flight = abs(in_flight[1] - in_flight[0]) <= max(1.0, _STEADY_WITHIN * max(in_flight))
    return recent[0][0] if steady_rate and steady_in_flight else None


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets. Later ones do what they did before, but none at once, also after the block: what was
    measured is about to be kept. Main thread only."""
    interrupted = threading.Event()
    before: dict[int, Any] = {}
    first_s = 0.0

    def on_signal(number: int, _frame: object) -> None:
        nonlocal first_s
        if not interrupted.is_set():
            first_s = time.monotonic()
            interrupted.set()
        elif time.monotonic() - first_s > AGAIN_S:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        yield interrupted
    finally:
        if not interrupted.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _undelayed() -> Iterator[bool]:
    """No garbage collection in this process, and real-time priority for its threads where the system permits it (True)."""
    collecting = gc.isenabled()
    # A full collection walks every record kept and stops the loop for milliseconds; nothing here makes cycles.
    gc.disable()
    # So that servers on the same cores do not delay the client: its loop sleeps whenever it has nothing to do, and what it
    # starts does not inherit the priority. Threads beside it too, one below: while one that holds the interpreter waits for a core
    # that other processes use, the loop stands still.
    own, before = threading.get_native_id(), {}
    for thread in threading.enumerate():
        if number := thread.native_id:
            with contextlib.suppress(OSError):
                was = os.sched_getscheduler(number), os.sched_getparam(number)
                priority = os.sched_param(2 if number == own else 1)
                os.sched_setscheduler(number, os.SCHED_RR | os.SCHED_RESET_ON_FORK, priority)
                before[thread] = was
    try:
        yield threading.current_thread() in before
    finally:
        if collecting:
            gc.enable()
        for thread, (scheduler, parameter) in before.items():
            if thread.is_alive() and thread.native_id:
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(thread.native_id, scheduler, parameter)
