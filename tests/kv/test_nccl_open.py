"""How an NCCL link opens, and what is left when it does not: a scripted NCCL and GPU, since a real one opens well."""

import socket
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pdbench.kv import nccl
from pdbench.kv.control import Channel, ChannelClosedError
from pdbench.kv.threads import Threads


class Event:
    """A CUDA event that has always passed."""

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, _):
        return 0.1


class Library:
    """NCCL: `hangs` holds ncclCommInitRank until it is set, as a peer does that never comes."""

    def __init__(self):
        self.hangs, self.opened, self.sent, self.aborted = threading.Event(), threading.Event(), [], []
        self.hangs.set()

    def ncclGetUniqueId(self):  # noqa: N802 (NCCL's own names)
        return SimpleNamespace(internal=b"id")

    def ncclCommInitRank(self, *_):  # noqa: N802 (NCCL's own names)
        self.opened.set()
        assert self.hangs.wait(10)
        return "comm"

    def ncclSend(self, _, count, *__):  # noqa: N802 (NCCL's own names)
        self.sent.append(count)

    def ncclCommAbort(self, comm):  # noqa: N802 (NCCL's own names)
        self.aborted.append(comm)


@pytest.fixture
def library(monkeypatch):
    """The scripted NCCL, on a machine that seems to have a GPU."""
    made = Library()
    monkeypatch.setattr(nccl, "NCCLLibrary", lambda: made)
    monkeypatch.setattr(nccl, "cudaStream_t", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    return made


@pytest.fixture
def channel():
    """One end of a connection whose other end says nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, 5.0)


def opened(channel, threads):
    return nccl.NcclLink(channel, SimpleNamespace(device=torch.device("cpu")), 1000, True, threads)


def test_the_buffer_is_made_when_the_communicator_stands(library, channel):
    threads = Threads()
    link = opened(channel, threads)
    assert library.sent == [1]  # NCCL connects with it
    assert link._staging.numel() == 1000
    link.close()
    link.close()
    threads.join(5)
    assert library.aborted == ["comm"]
    with pytest.raises(ChannelClosedError):
        link.send({}, 10)


def test_an_opening_that_hangs_is_given_up_and_its_late_communicator_given_back(library, channel, monkeypatch):
    threads, before = Threads(), set(threading.enumerate())
    monkeypatch.setattr(nccl, "OPEN_TIMEOUT_S", 0.1)
    library.hangs.clear()
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or torch.zeros(size))
    with pytest.raises(ChannelClosedError, match=r"no NCCL communicator in 0\.1 s"):
        opened(channel, threads)
    assert library.opened.is_set() and sizes == [1]
    with pytest.raises(ChannelClosedError):
        channel.send({})
    library.hangs.set()
    threads.join(5)
    assert library.aborted == ["comm"] and library.sent == []
    assert not set(threading.enumerate()) - before


def test_a_buffer_that_does_not_fit_gives_the_communicator_back(library, channel, monkeypatch):
    def empty(size, **_):
        if size > 1:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(size)

    threads = Threads()
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError):
        opened(channel, threads)
    threads.join(5)
    assert library.aborted == ["comm"]
