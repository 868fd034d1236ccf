"""The event log of what runs inside vLLM: JSON lines, written by a thread of their own so that no engine step waits for a disk."""

import logging
import queue
import threading
from pathlib import Path

import msgspec

from pdbench.events import Event

logger = logging.getLogger(f"vllm.{__name__}")


class EventLog:
    """Appends events to a file that other processes may append to as well; without a path it drops them."""

    def __init__(self, path: str | None) -> None:
        self._lines: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._write, args=(Path(path),), name="event-log", daemon=True)
            self._thread.start()

    def add(self, event: Event) -> None:
        if self._thread is not None:
            self._lines.put(event)

    def close(self) -> None:
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(timeout=2.0)

    def _write(self, path: Path) -> None:
        try:
            with path.open("ab", buffering=0) as file:
                while (event := self._lines.get()) is not None:
                    file.write(msgspec.json.encode(event) + b"\n")
        except OSError as error:
            logger.error("the event log %s cannot be written (%s): no more lines there", path, error)
            while self._lines.get() is not None:
                pass
