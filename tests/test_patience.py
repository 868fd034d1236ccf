"""Calls that may hang: given up after a while, while a library's own time-out is its answer."""

import errno
import threading

import pytest

from pdbench import nvml
from pdbench.patience import NoAnswerError, within


def test_call_that_hangs_is_given_up() -> None:
    held = threading.Event()
    with pytest.raises(NoAnswerError):
        within(0.05, held.wait)
    held.set()


def test_time_out_of_the_library_itself_is_no_hang() -> None:
    """A library's ETIMEDOUT had read as a driver that did not answer within 20 s."""

    def refused() -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        within(20.0, refused)
    with pytest.raises(TimeoutError, match="Connection timed out"):
        nvml.bounded(refused)()
