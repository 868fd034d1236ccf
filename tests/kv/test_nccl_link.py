"""What an NCCL link leaves behind when it cannot open, or is closed: with a scripted NCCL and GPU, since a real one opens."""

import socket
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from pdbench.kv import transports
from pdbench.kv.channel import Blocks, Channel, ChannelClosedError
from pdbench.kv.transports import NcclLink
from pdbench.kv.worker import Threads

HEADER = Blocks("t", 0, 1, 100)


class Event:
    """A CUDA event that has always passed."""

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 0.1


class Pass(Event):
    """A forward pass; `seen` is what had been launched when somebody waited for it."""

    def __init__(self, launched):
        self.launched, self.seen = launched, []

    def synchronize(self):
        self.seen.append(list(self.launched()))


class Library:
    """NCCL; ncclCommInitRank waits for `peer_came`, as it does for a peer."""

    def __init__(self):
        self.peer_came, self.opened, self.sent, self.aborted = threading.Event(), threading.Event(), [], []
        self.peer_came.set()
        self.streams = [None]

    @contextmanager
    def on_stream(self, stream):
        """torch.cuda.stream; the last of `streams` is the current one."""
        self.streams.append(stream)
        yield
        self.streams.pop()

    def ncclGetUniqueId(self):  # noqa: N802 (NCCL's own names)
        return SimpleNamespace(internal=b"id")

    def ncclCommInitRank(self, *_):  # noqa: N802 (NCCL's own names)
        self.opened.set()
        assert self.peer_came.wait(60)
        return "comm"

    def ncclSend(self, _, count, *__):  # noqa: N802 (NCCL's own names)
        self.sent.append(count)

    def ncclCommAbort(self, comm):  # noqa: N802 (NCCL's own names)
        self.aborted.append(comm)


@pytest.fixture
def library(monkeypatch):
    """The scripted NCCL, on a machine that seems to have a GPU."""
    library = Library()
    monkeypatch.setattr(transports.pynccl, "NCCLLibrary", lambda: library)
    monkeypatch.setattr(transports.pynccl, "cudaStream_t", lambda _: None)
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", library.on_stream)
    return library


@pytest.fixture
def ends():
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield Channel(ours, 5.0), Channel(theirs, 5.0)


@pytest.fixture
def channel(ends):
    """One end of a connection whose other end says nothing."""
    return ends[0]


def opened(channel, threads):
    packer = SimpleNamespace(
        device=torch.device("cpu"), block_bytes=100, gather=lambda index, out: out[: 100 * len(index)]
    )
    context = SimpleNamespace(packer=packer, staging_bytes=1000, piece_blocks=4, start_thread=threads.start)
    return NcclLink(context, context.packer, channel, sends=True)


def test_header_and_send_come_after_the_pass_and_before_the_copy_is_over(library, ends, monkeypatch):
    threads = Threads()
    link = opened(ends[0], threads)
    assert ends[1].receive() == {"type": "nccl", "id": b"id".hex()}
    passed = Pass(lambda: library.sent)
    ready_s = link.pack([3], passed)
    assert passed.seen == [[1]] and library.sent == [
        1
    ]  # a send that waits for its header must not wait for a pass, too
    sent = []
    monkeypatch.setattr(library, "ncclSend", lambda *_: sent.append(ends[1].receive(Blocks)))
    link.begin_send(HEADER)  # `copied` comes after it
    assert sent == [HEADER], "decode prepares while prefill launches"
    assert link.copied() == link.end_send(HEADER) == pytest.approx(1e-4)
    assert ready_s <= link.sent_s <= time.monotonic()
    link.close()
    threads.join(60)


def test_memory_that_a_closed_link_may_still_use_is_its_streams(library, channel, monkeypatch):
    """The allocator gives memory of another stream to the model at once, while a copy of block numbers waits behind NCCL."""
    threads, empty, current = Threads(), torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, **more: current.append(library.streams[-1]) or empty(*sizes, **more)
    )
    link = opened(channel, threads)
    assert current and all(stream is link.stream for stream in current)
    link.close()
    threads.join(60)


def test_header_does_not_wait_for_a_decode_that_reads_nothing(library, channel):
    """vLLM's engine may wait for it, where it preempts a request whose blocks are on their way."""
    threads = Threads()
    link = opened(channel, threads)
    begun_s = time.monotonic()
    with pytest.raises(ChannelClosedError, match="took no data"):
        for _ in range(1_000_000):
            link.begin_send(HEADER)
    assert time.monotonic() - begun_s < channel.timeout_s
    link.close()
    threads.join(60)


def test_close_aborts_the_communicator_once(library, channel):
    threads = Threads()
    link = opened(channel, threads)
    link.close()
    link.close()
    threads.join(60)
    assert library.aborted == ["comm"]
    with pytest.raises(ChannelClosedError):
        link.begin_send(HEADER)


def test_close_aborts_where_no_thread_can_start(library, channel, monkeypatch):
    link = opened(channel, Threads())

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    link.close()
    assert library.aborted == ["comm"]


def test_open_that_hangs_is_given_up_and_its_late_communicator_aborted(library, channel, monkeypatch):
    threads, before = Threads(), set(threading.enumerate())
    monkeypatch.setattr(transports, "NCCL_OPEN_TIMEOUT_S", 0.1)
    library.peer_came.clear()
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or torch.zeros(size))
    with pytest.raises(ChannelClosedError, match=r"no NCCL communicator in 0\.1 s"):
        opened(channel, threads)
    assert library.opened.is_set() and sizes == [1, 4]  # the thread that hangs holds no large buffer
    with pytest.raises(ChannelClosedError):
        channel.send({})
    library.peer_came.set()
    threads.join(60)
    assert library.aborted == ["comm"] and library.sent == []
    assert not set(threading.enumerate()) - before


def test_buffer_that_does_not_fit_aborts_the_communicator(library, channel, monkeypatch):
    def empty(size, **_):
        if size > 4:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(size)

    threads = Threads()
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError):
        opened(channel, threads)
    threads.join(60)
    assert library.aborted == ["comm"]
