"""The threads of one worker: started in one place, so that the end of the worker can wait for them.

A thread that still runs a kernel's C++ code when Python exits aborts the whole process.
Try: python -m pytest tests/test_kv_faults.py -k thread
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class Threads:
    """Daemon threads; `start` and `join` may be called from any of them."""

    def __init__(self) -> None:
        self._started: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def start(self, name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Start `target` in a thread called `name`. Raises RuntimeError when the machine has no more threads."""
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        with self._lock:
            thread.start()
            self._started = {other for other in self._started if other.is_alive()} | {thread}
        return thread

    def join(self, timeout_s: float) -> None:
        """Wait for all others to end, for `timeout_s` in all: one that hangs in a dead peer's connection is left behind."""
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            with self._lock:
                others = [thread for thread in self._started if thread.is_alive()]
            others = [thread for thread in others if thread is not threading.current_thread()]
            if not others:
                return
            others[0].join(left_s)
