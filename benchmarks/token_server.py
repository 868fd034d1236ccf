"""A scripted token server that knows its own lateness: every stream's first token after TTFT, then one every ITL.

It keeps when each request reached its kernel and when each token was handed to it; GET /log gives (and forgets) them.
Try: python benchmarks/token_server.py --ttft-ms 20 --itl-ms 10
"""

import argparse
import heapq
import json
import select
import socket
import struct
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
SO_TIMESTAMPING = 37


def chunked(payload: object) -> bytes:
    data = b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def token_chunk(finish: str | None) -> bytes:
    """One token in the shape and size of vLLM's chunks."""
    choice = {
        "index": 0,
        "text": " tok",
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": [42],
    }
    whole = {"id": "cmpl-8f2b1c3d4e5f60718293a4b5c6d7e8f9", "object": "text_completion", "created": 1763800000}
    return chunked(whole | {"model": "scripted", "choices": [choice]})


class Stream:
    """One connection and the answer that runs on it."""

    __slots__ = ("arrival_s", "buffer", "left", "sends_s", "sock", "total")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.left = self.total = 0
        self.arrival_s = 0.0
        self.sends_s: list[float] = []


class TokenServer:
    """The loop: reads requests, sends what is due, waits for whatever is next."""

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self.ttft_s, self.itl_s = ttft_s, itl_s
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.streams: dict[int, Stream] = {}
        self.due: list[tuple[float, int]] = []
        self.log: list[dict] = []
        self.token, self.last_token = token_chunk(None), token_chunk("length")

    def serve(self) -> None:
        while True:
            wait_s = max(0.0, self.due[0][0] - time.monotonic()) if self.due else 0.1
            if wait_s:
                select.select([self.epoll.fileno()], [], [], wait_s)
            for descriptor, _ in self.epoll.poll(0):
                if descriptor == self.listener.fileno():
                    self.accept()
                else:
                    self.read(self.streams[descriptor])
            self.send_due()

    def accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, 1 << 3 | 1 << 4)
        self.streams[sock.fileno()] = Stream(sock)
        self.epoll.register(sock, select.EPOLLIN)

    def read(self, stream: Stream) -> None:
        try:
            data, ancillary, _, _ = stream.sock.recvmsg(1 << 20, 128)
        except OSError:
            data, ancillary = b"", []
        if not data:
            self.epoll.unregister(stream.sock)
            del self.streams[stream.sock.fileno()]
            stream.sock.close()
            return
        now_s, unix_s = time.monotonic(), time.time()
        stream.arrival_s = now_s
        if ancillary:
            seconds, nanoseconds = struct.unpack_from("qq", ancillary[0][2])
            stream.arrival_s = now_s - (unix_s - seconds - nanoseconds * 1e-9)
        stream.buffer += data
        head, found, body = stream.buffer.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if found and len(body) >= length:
            stream.buffer = b""
            self.answer(stream, head, body)

    def answer(self, stream: Stream, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST"):
            asked = json.loads(body)
            stream.left = stream.total = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
            stream.sends_s = []
            stream.sock.send(HEAD)
            heapq.heappush(self.due, (self.first_s(stream), stream.sock.fileno()))
            return
        plain: object = {"object": "list", "data": [{"id": "scripted", "object": "model", "root": "scripted"}]}
        if head.startswith(b"GET /log"):
            plain, self.log = self.log, []
        data = json.dumps(plain).encode()
        stream.sock.setblocking(True)
        fields = b"Content-Type: application/json\r\nContent-Length: %d" % len(data)
        stream.sock.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (fields, data))

    def first_s(self, stream: Stream) -> float:
        """When a request's first token is due."""
        return stream.arrival_s + self.ttft_s

    def next_s(self, stream: Stream, due_s: float) -> float:
        """When the token after the one that was due at `due_s` is due."""
        return due_s + self.itl_s

    def send_due(self) -> None:
        due, streams, monotonic = self.due, self.streams, time.monotonic
        # A bounded batch, so that new requests are seen also under full load.
        for _ in range(64):
            if not due or due[0][0] > monotonic():
                return
            due_s, descriptor = due[0]
            stream = streams.get(descriptor)
            if stream is None or not stream.left:
                heapq.heappop(due)
                continue
            stream.left -= 1
            stream.sends_s.append(monotonic())
            try:
                if stream.left:
                    stream.sock.send(self.token)
                    heapq.heapreplace(due, (self.next_s(stream, due_s), descriptor))
                else:
                    self.finish(stream)
                    heapq.heappop(due)
            except OSError:  # the client has gone; its connection is closed when that is read
                stream.left = 0
                heapq.heappop(due)

    def finish(self, stream: Stream) -> None:
        usage = {"prompt_tokens": 16, "completion_tokens": stream.total, "total_tokens": 16 + stream.total}
        tail = chunked({"id": "cmpl", "object": "text_completion", "choices": [], "usage": usage}) + chunked(b"[DONE]")
        stream.sock.send(self.last_token)
        stream.sock.send(tail + b"0\r\n\r\n")
        lateness = stream.arrival_s + self.ttft_s
        self.log.append({"arrival_s": stream.arrival_s, "sends_s": stream.sends_s, "due_s": lateness})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    options = parser.parse_args()
    server = TokenServer(options.ttft_ms / 1e3, options.itl_ms / 1e3)
    print(server.listener.getsockname()[1], flush=True)
    server.serve()


if __name__ == "__main__":
    main()
