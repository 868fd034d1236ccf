"""One trial of a load: warm-up, the planned requests, the drain; records, measured window and the client's truth come back.

Try: python -c "
from pdbench.config import LoadConfig; from pdbench.records import Clock; from pdbench.load.generator import run_load
print(run_load(LoadConfig(requests=4), url='http://127.0.0.1:8000', model='m', clock=Clock.start()).trial)"
"""

import contextlib
import gc
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdbench.config import LoadConfig
from pdbench.load import plan, truth
from pdbench.load.client import Client
from pdbench.load.plan import Planned
from pdbench.load.truth import Part
from pdbench.records import Clock, Flag, RequestRecord, Trial

Progress = Callable[[int, int | None], None]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AHEAD = 64
_PROGRESS_S = 0.1
_ENDED_S = 1.0
_STEADY_SAMPLE_S = 0.25
_STEADY_AT_MOST_S = 600.0


@dataclass(frozen=True)
class LoadResult:
    """One trial: all its requests (warm-up ones marked), its measured window with the client's truth, what readers must know."""

    requests: list[RequestRecord]
    trial: Trial
    flags: list[Flag]


def run_load(
    config: LoadConfig,
    *,
    url: str,
    model: str,
    clock: Clock,
    trial: int = 0,
    tokenizer_path: str | None = None,
    on_progress: Progress | None = None,
    run_parts: Callable[..., list[Part]] | None = None,
) -> LoadResult:
    """Send one trial of `config` to the server at `url` and wait for all answers.

    The tokenizer is config.tokenizer, by itself `tokenizer_path`, by itself `model` (folder or hub name).
    `on_progress(done, of)` is called about ten times a second; `of` is None where time ends the trial. Raises UserError for
    options that cannot be used. Ctrl-C or SIGTERM ends the trial with what was measured and a flag "interrupted".
    `run_parts`, called as `processes.run_parts`, may send it from elsewhere; by itself from processes of this host.
    """
    plan.check(config)
    if tokenizer_path and not config.tokenizer:
        config = replace(config, tokenizer=tokenizer_path)
    if run_parts is None:
        run_parts = _run_parts
    return merge(
        config, run_parts(config, url=url, model=model, clock=clock, trial=trial, on_progress=on_progress), trial
    )


def _run_parts(config: LoadConfig, **arguments: Any) -> list[Part]:
    if config.client_processes > 1:
        from pdbench.load import processes

        return processes.run_parts(config, **arguments)
    return [run_part(config, **arguments)]


def merge(config: LoadConfig, parts: Sequence[Part], trial: int) -> LoadResult:
    """One result out of the parts of a split client, in the order of the one schedule."""
    requests = sorted((record for part in parts for record in part.requests), key=_schedule_order)
    measured = [record for record in requests if not record.warmup]
    streams, open_loop = plan.streams(config), plan.is_open_loop(config)
    client = truth.describe(parts, measured, streams=streams, open_loop=open_loop)
    start_s, end_s, client["window"] = truth.window(parts, open_loop)
    if config.phase == "decode" and (decoding := truth.decode_window(measured)):
        start_s, end_s, client["window"] = decoding
    if steady := parts[0].steady_window:
        start_s, end_s = steady
        client["window"] = f"the {config.steady_s:g} s through which the load held steady"
    found = truth.flags(client)
    if any(part.interrupted for part in parts):
        found.append(Flag("interrupted", "stopped by Ctrl-C: the figures are of what was measured until then"))
    elif config.phase == "decode" and not truth.decode_window(measured):
        found.append(Flag("phases-mixed", "the batch never decoded all at once: ask for more --output-tokens"))
    elif config.steady_s is not None and not steady:
        found.append(
            Flag("not-steady", f"the load never held steady for {config.steady_s:g} s: lower it or run longer")
        )
    if any(part.token_ids_refused for part in parts):
        found.append(Flag("token-ids-refused", "the server refuses return_token_ids: tokens are counted by chunks"))
    return LoadResult(requests, Trial(index=trial, start_s=start_s, end_s=end_s, client=client), found)


def run_part(
    config: LoadConfig,
    *,
    url: str,
    model: str,
    clock: Clock,
    trial: int,
    part: int = 0,
    parts: int = 1,
    begin: Callable[[], float] | None = None,
    stop_signals: Sequence[signal.Signals] = STOP_SIGNALS,
    interrupted: threading.Event | None = None,
    on_progress: Progress | None = None,
    on_part: Callable[[Part], None] | None = None,
) -> Part:
    """One process's part: every `parts`-th request of the plan from `part` on, over its share of the streams.

    `begin` is called after the warm-up and returns the common start on the run's clock. One of `stop_signals`, or whoever sets
    `interrupted`, ends it with what was measured. `on_part` is given, about once a second,
    what ended since: requests with their due instants, without the client's own figures but its CPU.
    """
    _raise_descriptor_limit()
    tokens = plan.find_tokenizer(config, model)
    warmup = plan.warmup_requests(config, tokens, trial)[part::parts]
    planned, total = _own_share(config, plan.planned_requests(config, tokens, trial), part, parts)
    streams = plan.streams(config)
    share = None if streams is None else streams // parts + (part < streams % parts)
    client = Client(
        url,
        endpoint=config.endpoint,
        zero_s=clock.monotonic_s,
        timeout_s=config.request_timeout_s,
        read_timeout_s=config.read_timeout_s,
        verify_tls=config.tls_verify,
    )
    interrupted = interrupted or threading.Event()
    with client, stopping(stop_signals, interrupted.set), _no_garbage_collection(), _real_time() as real_time:
        load = _Load(config, client, model, f"{int(clock.unix_s * 1e3):x}-{trial}", trial, interrupted)
        load.drive(iter(warmup), share or len(warmup), clock.now(), warmup=True)
        begin_s = clock.now() if begin is None else begin()
        client.reset_counters()
        began_cpu_s, began_s = time.thread_time(), time.monotonic()
        load.on_progress, load.total = on_progress, total
        if on_part is not None:
            load.on_ended = lambda ended: on_part(_piece(load, share, ended, begin_s, time.thread_time() - began_cpu_s))
        if not interrupted.is_set():
            load.drive(planned, share, begin_s)
        cpu_s, wall_s = time.thread_time() - began_cpu_s, time.monotonic() - began_s
        return Part(
            requests=load.records,
            due_s=load.due_s,
            streams=share,
            begin_s=begin_s,
            busy_s=client.busy_s.tobytes(),
            read_delays_s=client.clock.read_delays_s.tobytes(),
            merged_reads=client.merged_reads,
            cpu_s=cpu_s,
            wall_s=wall_s,
            real_time=real_time,
            interrupted=interrupted.is_set(),
            steady_window=load.steady_window,
            token_ids_refused=load.token_ids_refused,
        )


def _piece(load: "_Load", share: int | None, ended: list[RequestRecord], begin_s: float, cpu_s: float) -> Part:
    return Part(
        requests=ended,
        due_s={record.id: load.due_s[record.id] for record in ended},
        streams=share,
        begin_s=begin_s,
        busy_s=b"",
        read_delays_s=b"",
        merged_reads=0,
        cpu_s=cpu_s,
        wall_s=load.client.clock.now() - begin_s,
    )


class _Load:
    """The sending loop's state: what was sent, what came back, when to stop."""

    def __init__(
        self, config: LoadConfig, client: Client, model: str, run_id: str, trial: int, interrupted: threading.Event
    ) -> None:
        self.config, self.client, self.model, self.run_id, self.trial = config, client, model, run_id, trial
        self.interrupted = interrupted
        self.records: list[RequestRecord] = []
        self.due_s: dict[str, float] = {}
        self.on_progress: Progress | None = None
        self.on_ended: Callable[[list[RequestRecord]], None] | None = None
        self.total: int | None = None
        self.steady_window: tuple[float, float] | None = None
        self.token_ids_refused = False
        self._asked_again: set[str] = set()
        self._in_flight: dict[str, Planned] = {}
        self._progress_at_s = self._sample_at_s = self._ended_at_s = 0.0
        self._told = 0
        self._samples: list[tuple[float, int, int]] = []
        self._tokens_ended = 0

    def drive(self, planned: Iterator[Planned], streams: int | None, begin_s: float, *, warmup: bool = False) -> None:
        """Send `planned` from `begin_s` on, at most `streams` at once (None: no bound), and wait for all answers."""
        client = self.client
        free_s = deque([begin_s] * (streams or 0))
        ahead: deque[Planned] = deque()
        upcoming = next(planned, None)
        while upcoming is not None or client.in_flight:
            now_s = client.clock.now()
            if upcoming is not None and self._stop_sending(now_s, begin_s, warmup):
                upcoming = None
            next_s = now_s + 1.0
            while upcoming is not None and (streams is None or free_s):
                arrival_s = begin_s if upcoming.arrival_s is None else begin_s + upcoming.arrival_s
                due_s = max(arrival_s, free_s[0]) if streams is not None else arrival_s
                if due_s > now_s:
                    next_s = due_s
                    break
                if streams is not None:
                    free_s.popleft()
                self._send(upcoming, arrival_s if upcoming.arrival_s is not None else due_s, due_s, warmup)
                upcoming = ahead.popleft() if ahead else next(planned, None)
            for record in client.poll(next_s):
                if self._ended(record):
                    free_s.append(record.end_s if record.end_s is not None else now_s)
            if len(ahead) < _AHEAD and upcoming is not None and (following := next(planned, None)) is not None:
                ahead.append(following)
            if self.interrupted.is_set():
                upcoming = None
                for record in client.abandon("interrupted", "Ctrl-C"):
                    self._ended(record)
        self._report(force=True)

    def _send(self, planned: Planned, planned_s: float, due_s: float, warmup: bool) -> None:
        identity = f"{self.run_id}-{'w' if warmup else ''}{planned.index:06d}"
        record = RequestRecord(id=identity, planned_s=planned_s, trial=self.trial, warmup=warmup)
        record.prompt_tokens = planned.prompt.tokens
        self.due_s[identity] = due_s
        self._in_flight[identity] = planned
        self._start(record, planned)

    def _start(self, record: RequestRecord, planned: Planned) -> None:
        token_ids = self.config.token_ids and not self.token_ids_refused
        self.client.start(record, plan.request_body(self.config, self.model, planned.prompt, token_ids=token_ids))

    def _ended(self, record: RequestRecord) -> bool:
        """Keep a record; False where its request was sent again because the server does not know return_token_ids."""
        planned = self._in_flight[record.id]
        error = record.error
        if (
            error
            and error.kind in ("http_400", "http_422")
            and "return_token_ids" in error.message
            and self.config.token_ids
            and record.id not in self._asked_again
        ):
            self.token_ids_refused = True
            self._asked_again.add(record.id)
            again = RequestRecord(id=record.id, planned_s=record.planned_s, trial=record.trial, warmup=record.warmup)
            again.prompt_tokens = planned.prompt.tokens
            self._start(again, planned)
            return False
        del self._in_flight[record.id]
        self.records.append(record)
        self._tokens_ended += len(record.token_s)
        self._report()
        return True

    def _report(self, *, force: bool = False) -> None:
        now_s = self.client.clock.now()
        if self.on_progress and (force or now_s >= self._progress_at_s):
            self._progress_at_s = now_s + _PROGRESS_S
            self.on_progress(sum(not record.warmup for record in self.records), self.total)
        if self.on_ended and not force and now_s >= self._ended_at_s:
            self._ended_at_s = now_s + _ENDED_S
            ended, self._told = self.records[self._told :], len(self.records)
            self.on_ended(ended)

    def _stop_sending(self, now_s: float, begin_s: float, warmup: bool) -> bool:
        if warmup:
            return False
        config = self.config
        if config.steady_s is not None and now_s >= self._sample_at_s:
            self._sample_at_s = now_s + _STEADY_SAMPLE_S
            tokens = self._tokens_ended + self.client.tokens_in_flight()
            self._samples.append((now_s, tokens, self.client.in_flight))
            start_s = truth.steady_since(self._samples, config.steady_s)
            if start_s is not None:
                self.steady_window = (start_s, now_s)
                return True
        bound_s = config.duration_s or (_STEADY_AT_MOST_S if config.steady_s is not None else None)
        return bound_s is not None and now_s - begin_s >= bound_s


def _own_share(
    config: LoadConfig, planned: Iterator[Planned], part: int, parts: int
) -> tuple[Iterator[Planned], int | None]:
    """This process's requests and their number; made beforehand unless they are endless."""
    own = (request for request in planned if request.index % parts == part)
    if (config.duration_s or config.steady_s) and (not plan.is_open_loop(config) or config.duration_s is None):
        return own, None
    made = list(own)
    return iter(made), len(made)


def _schedule_order(record: RequestRecord) -> tuple[bool, str]:
    return (not record.warmup, record.id)


def _raise_descriptor_limit() -> None:
    """One descriptor a stream: take what the system allows."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def stopping(numbers: Sequence[signal.Signals], stop: Callable[[], None]) -> Iterator[None]:
    """While inside, the first of these signals calls `stop`; a second one does what it did before. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(*_: object) -> None:
        restore()
        stop()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def _real_time() -> Iterator[bool]:
    """Real-time priority for this thread where the system permits it, so that servers on the same cores do not delay the client.

    The loop sleeps whenever it has nothing to do, and what it starts does not inherit the priority.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield False
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, *before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A full collection walks every record kept and stops the loop for milliseconds; nothing here makes cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
