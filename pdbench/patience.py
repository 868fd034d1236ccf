"""Calls into libraries that may hang, given up after a while."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


class NoAnswerError(Exception):
    """The call has not ended in time. No TimeoutError: that may be a library's own, which answered."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; NoAnswerError after `seconds`. Its thread cannot be ended, but is waited for no longer."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="pdbench-patience", daemon=True).start()
    if not wait([done], seconds).done:
        raise NoAnswerError(f"no answer within {seconds:g} s")
    return done.result()
