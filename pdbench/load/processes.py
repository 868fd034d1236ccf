"""One schedule over N client processes: each makes the same plan, sends every N-th request of it, and hands its part back.

All start at one instant of the host's monotonic clock, so the merged records are those of one process that was never late.
Try: pdbench bench --url http://127.0.0.1:8000 --model NAME --rate 200 --requests 2000 --client-processes 2
"""

import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load.generator import STOP_SIGNALS, Progress, run_part, stopping
from pdbench.load.truth import Part
from pdbench.records import Clock

_START_AFTER_S = 0.05
_encode, _decode = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Part)


def run_parts(
    config: LoadConfig, *, url: str, model: str, clock: Clock, trial: int, on_progress: Progress | None = None
) -> list[Part]:
    """The parts of `config.client_processes` processes. Raises UserError when one of them fails or dies.

    Ctrl-C or SIGTERM ends them with what was measured; raises KeyboardInterrupt when that is nothing, as while they start.
    """
    if config.steady_s is not None:
        raise UserError("--steady-s needs --client-processes 1: only one process sees the whole load; use --duration-s")
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers: list[BaseProcess] = []
    for part in range(config.client_processes):
        ours, theirs = context.Pipe()
        arguments = (theirs, config, url, model, clock, trial, part)
        worker: BaseProcess = context.Process(target=work, args=arguments, name=f"pdbench-client-{part}", daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        for worker in workers:
            worker.terminate()

    try:
        with stopping(STOP_SIGNALS, stop):
            return _collect(pipes, clock, on_progress)
    except _GoneError:
        if stopped.is_set():  # it had not begun
            raise KeyboardInterrupt from None
        raise
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join(timeout=5.0)
            if worker.is_alive():
                worker.kill()
                worker.join()


class _GoneError(UserError):
    """A client process ended without a word."""


def _collect(pipes: list[Connection], clock: Clock, on_progress: Progress | None) -> list[Part]:
    """Wait until all have warmed up, start them together, then gather progress and parts."""
    for pipe in pipes:
        _receive(pipe, "ready")
    begin_s = clock.now() + _START_AFTER_S
    for pipe in pipes:
        pipe.send(begin_s)
    parts: dict[int, Part] = {}
    progress: dict[int, tuple[int, int | None]] = {}
    while len(parts) < len(pipes):
        for ready in wait([pipe for index, pipe in enumerate(pipes) if index not in parts]):
            assert isinstance(ready, Connection)
            index = pipes.index(ready)
            kind, value = _receive(ready)
            if kind == "part":
                parts[index] = _decode.decode(value)
            else:
                progress[index] = value
                totals = [of for _, of in progress.values()]
                total = None if None in totals or len(totals) < len(pipes) else sum(of or 0 for of in totals)
                if on_progress:
                    on_progress(sum(done for done, _ in progress.values()), total)
    return [parts[index] for index in range(len(pipes))]


def _receive(pipe: Connection, expected: str | None = None) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise _GoneError("a client process died: free memory or lower --client-processes") from None
    if kind == "error":
        raise UserError(value)
    assert expected is None or kind == expected, f"{kind} where {expected} was due"
    return kind, value


def work(
    pipe: Connection,
    config: LoadConfig,
    url: str,
    model: str,
    clock: Clock,
    trial: int,
    part: int,
    pieces: bool = False,
) -> None:
    """A client process. The terminal's Ctrl-C reaches it too, but only its parent's SIGTERM counts, so that it stops once.

    With `pieces` it also tells, about once a second, what ended since, for a parent that may lose it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: interrupted.set())  # until the part is handed back

    def begin() -> float:
        pipe.send(("ready", None))
        return float(pipe.recv())

    def progress(done: int, of: int | None) -> None:
        pipe.send(("progress", (done, of)))

    try:
        arguments: dict[str, Any] = {
            "url": url,
            "model": model,
            "clock": clock,
            "trial": trial,
            "on_progress": progress,
            "on_part": (lambda piece: pipe.send(("piece", _encode.encode(piece)))) if pieces else None,
        }
        made = run_part(
            config,
            **arguments,
            part=part,
            parts=config.client_processes,
            begin=begin,
            stop_signals=(),
            interrupted=interrupted,
        )
        pipe.send(("part", _encode.encode(made)))
    except UserError as error:
        pipe.send(("error", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has given up
