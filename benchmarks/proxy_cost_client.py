"""The client of benchmarks/proxy_cost.py: streams over kept connections, one arrival instant per read.

Try: python benchmarks/proxy_cost.py --rounds 1
"""

import asyncio
import itertools
import json
import time


class Stream(asyncio.Protocol):
    """One connection; `request` sends a request and waits for its last byte."""

    def __init__(self):
        self.done = None
        self.arrivals = []
        self.tokens = 0
        self.tail = b""

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("closed before the end"))

    def data_received(self, data):
        self.arrivals.append(time.monotonic())
        self.tokens += data.count(b'"text"')
        self.tail = (self.tail + data)[-5:] if len(data) < 5 else data[-5:]
        if self.tail == b"0\r\n\r\n" and not self.done.done():
            self.done.set_result(None)

    async def request(self, **fields):
        """Returns (sent, arrivals, tokens); raises ConnectionError when the stream breaks."""
        self.arrivals, self.tokens, self.tail = [], 0, b""
        self.done = asyncio.get_running_loop().create_future()
        body = json.dumps({"model": "m", "prompt": "Hi " * 64, "stream": True, **fields}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        sent = time.monotonic()
        self.transport.write(head % len(body) + body)
        await self.done
        return sent, self.arrivals, self.tokens


async def connect(port, count):
    """`count` connections to a port of this host."""
    loop = asyncio.get_running_loop()
    streams = []
    for _ in range(count):
        _, stream = await loop.create_connection(Stream, "127.0.0.1", port)
        streams.append(stream)
    return streams


def close(streams):
    """Close them all."""
    for stream in streams:
        stream.transport.abort()


async def first_token_ms(port, requests, stage_s):
    """Times to the first token of requests one after another, in milliseconds."""
    (stream,) = await connect(port, 1)
    times = []
    for _ in range(requests):
        # The head of a stream may come before the first token: the last read of a one-token answer brings it.
        sent, arrivals, _ = await stream.request(max_tokens=1, stage_s=stage_s)
        times.append(1000 * (arrivals[-1] - sent))
    close([stream])
    return times


async def many_requests(port, requests, concurrency):
    """One-token requests over `concurrency` kept connections."""
    streams = await connect(port, concurrency)
    left = iter(range(requests))

    async def send(stream):
        for _ in left:
            await stream.request(max_tokens=1)

    await asyncio.gather(*(send(stream) for stream in streams))
    close(streams)


async def steady(port, count, tokens, pace_s, during):
    """`count` streams at once; `during(streams)` runs beside them. Returns the gaps between reads in ms and the tokens."""
    streams = await connect(port, count)
    beside = asyncio.create_task(during(streams))
    answers = await asyncio.gather(*(stream.request(max_tokens=tokens, pace_s=pace_s) for stream in streams))
    await beside
    close(streams)
    gaps = [1000 * (b - a) for _, arrivals, _ in answers for a, b in itertools.pairwise(arrivals[5:])]
    return gaps, sum(tokens for _, _, tokens in answers)
