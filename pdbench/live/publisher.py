"""What a measurement tells of itself while it runs. Telling costs an append to a queue; a thread hands the queue to the viewer
process four times a second. A viewer that does not read loses messages; the measurement never waits for it."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from pdbench.config import LiveConfig
from pdbench.errors import UserError
from pdbench.http import netloc
from pdbench.load.generator import Progress
from pdbench.records import DeviceRecord, Flag

_EVERY_S = 0.25
_MOST_MESSAGES = 10_000
_FLUSH_S = 2.0


class Stage(msgspec.Struct, tag=True):
    """What happens, as a text with {0}, {1}, ... and what is put there; `is_problem` marks failures."""

    words: str
    values: list[str] = []
    is_problem: bool = False


class Turn(msgspec.Struct, tag=True):
    """A trial of a deployment begins; `load` is its LoadConfig's, as a run saves it."""

    deployment: str
    trial: int
    load: dict[str, Any]


class TimeLeft(msgspec.Struct, tag=True):
    seconds: float


class Flags(msgspec.Struct, tag=True):
    deployment: str
    flags: list[Flag]


class Devices(msgspec.Struct, tag=True):
    """The last sample of each device."""

    devices: list[DeviceRecord]


Buckets = dict[float, float]
"""Upper bound in seconds -> how many values were at or below it."""


class ServerReading(msgspec.Struct, tag=True):
    """What a server's own metrics say (`figures` as server_metrics names them) and, of a server that others load, its latencies."""

    server: str
    figures: dict[str, float]
    histograms: dict[str, Buckets] = {}


class End(msgspec.Struct, tag=True):
    """The results folders that the command leaves, and why it failed, if it did. Nothing follows."""

    folders: list[str]
    problem: str | None


Message = Stage | Turn | TimeLeft | Progress | Flags | Devices | ServerReading | End


class Batch(msgspec.Struct):
    """What was told until `at_s` of this host's monotonic clock."""

    at_s: float
    messages: list[Message]


_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Batch).decode


class Publisher:
    """Hands messages to a viewer process, which is started with it and outlives it for a few seconds.

    `sources` are called for their messages four times a second, on the publisher's thread.
    """

    def __init__(self, config: LiveConfig, console: Console) -> None:
        self._queue: deque[Message] = deque(maxlen=_MOST_MESSAGES)
        self.sources: list[Callable[[], Sequence[Message]]] = []
        self.folders: dict[str, None] = {}
        self._ended = threading.Event()
        listening = {}
        if config.live:
            listening["page"] = _listen(config.live_host, config.live_port, "--live-port")
        if config.prometheus_port is not None:
            listening["metrics"] = _listen(config.live_host, config.prometheus_port, "--prometheus-port")
        token = secrets.token_urlsafe(16)
        theirs, ours = socket.socketpair()
        self._pipe = Connection(ours.detach(), readable=False)
        sockets = {name: sock.fileno() for name, sock in listening.items()} | {"pipe": theirs.fileno()}
        # A session of its own: the terminal's Ctrl-C is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pdbench.live.viewer", *(f"{name}={number}" for name, number in sockets.items())],
            env=os.environ | {"PDBENCH_LIVE_TOKEN": token},
            stdin=subprocess.DEVNULL,
            pass_fds=list(sockets.values()),
            start_new_session=True,
        )
        for name, sock in listening.items():
            address = f"http://{netloc(*sock.getsockname()[:2])}/"
            words = f"live: {address}?token={token}" if name == "page" else f"metrics for Prometheus: {address}metrics"
            console.print(words, markup=False, soft_wrap=True)
            sock.close()
        theirs.close()
        self._thread = threading.Thread(target=self._run, name="pdbench-live", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        self._queue.append(message)

    def close(self, problem: str | None) -> None:
        """Say how it ended; waits for two seconds at most."""
        self.sources.clear()
        self.put(End(list(self.folders), problem))
        self._ended.set()
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        with suppress(OSError):  # the viewer is gone
            while True:
                ended = self._ended.wait(_EVERY_S)
                messages = [message for source in tuple(self.sources) for message in source()]
                while self._queue:
                    messages.append(_without_texts(self._queue.popleft()))
                if messages:
                    self._pipe.send_bytes(_encode(Batch(time.monotonic(), messages)))
                if ended and not self._queue:
                    break
            self._pipe.close()


def _without_texts(message: Message) -> Message:
    """Prompts and answers are not shown: they are not sent either."""
    if not isinstance(message, Progress):
        return message
    ended = [msgspec.structs.replace(request, prompt=None, text="") for request in message.ended]
    return msgspec.structs.replace(message, ended=ended)


def _listen(host: str, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise UserError(f"cannot listen on {where}: {error.strerror}; give another {option} or --live-host") from None


_publisher: Publisher | None = None
"""The command's one, as a logger is: what happens is told from many places, most often to nobody."""


@contextmanager
def opened(config: LiveConfig, console: Console) -> Iterator[None]:
    """A viewer while the block runs, where --live or --prometheus-port asks for one."""
    global _publisher
    if not config.live and config.prometheus_port is None:
        yield
        return
    _publisher = publisher = Publisher(config, console)
    problem: str | None = None
    try:
        yield
    except BaseException as error:
        problem = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        raise
    finally:
        _publisher = None
        publisher.close(problem)


def is_open() -> bool:
    return _publisher is not None


def put(message: Message) -> None:
    if _publisher:
        _publisher.put(message)


def stage(words: str, *values: object, is_problem: bool = False) -> None:
    put(Stage(words, list(map(str, values)), is_problem))


def leave(folders: Iterable[Path]) -> None:
    """These folders of results are saved and analysed: the report at the end shows them."""
    if _publisher:
        _publisher.folders |= dict.fromkeys(str(folder.absolute()) for folder in folders)


@contextmanager
def source(messages: Callable[[], Sequence[Message]]) -> Iterator[None]:
    """`messages()` is called four times a second while the block runs."""
    publisher = _publisher
    if publisher:
        publisher.sources.append(messages)
    try:
        yield
    finally:
        if publisher and messages in publisher.sources:
            publisher.sources.remove(messages)
