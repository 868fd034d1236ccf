"""Scripted prefill and decode servers of benchmarks/proxy_cost.py: one process, exact paces, as little work as possible.

Every stream gets one token at each tick of its pace, all streams of a pace at once, as an engine's step gives them. A
decode request with a pdbench transfer id starts when its prefill has ended, as with real KV.
Try: python benchmarks/proxy_cost_servers.py  (prints the ports of prefill and decode)
"""

import asyncio
import json

import httptools
import uvloop

_EVENT = (
    b'data: {"id":"cmpl-9f86d081884c7d659a2feaa0c55ad015","object":"text_completion","created":1700000000,"model":"m",'
    b'"choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null}],'
    b'"usage":null}\n\n'
)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_INFO = json.dumps({"data": [{"id": "m"}], "model_path": "m", "is_generation": True, "status": "ready"}).encode()
_PREFILLED = json.dumps({"choices": [{"text": " t"}], "kv_transfer_params": {"remote_engine_id": "e"}}).encode()


class Engine:
    """The streams of one pace and the tick they share."""

    def __init__(self, pace_s):
        self.pace_s = pace_s
        self.streams = {}
        self.task = None

    def add(self, transport, tokens):
        """Add a stream of so many tokens; its first is sent at the next tick."""
        self.streams[transport] = tokens
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self.run())

    async def run(self):
        """Tick by the clock, so that a late tick does not shift those after it."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while self.streams:
            due_s = max(due_s + self.pace_s, loop.time() - self.pace_s)
            await asyncio.sleep(due_s - loop.time())
            for transport, left in list(self.streams.items()):
                if transport.is_closing() or left == 1:
                    del self.streams[transport]
                else:
                    self.streams[transport] = left - 1
                if not transport.is_closing():
                    transport.write(_CHUNK if left > 1 else _CHUNK + _LAST)
        self.task = None


class Server(asyncio.Protocol):
    """One connection to the prefill or the decode server."""

    engines: dict = {}  # noqa: RUF012
    prefills: dict = {}  # noqa: RUF012

    def __init__(self, role):
        self.role = role
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.body = b"", b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_url(self, url):
        self.url += url

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        url, body = self.url, self.body
        self.url, self.body = b"", b""
        if not url.startswith(b"/v1/completions"):
            return self.whole(_INFO)
        fields = json.loads(body)
        transfer = (fields.get("kv_transfer_params") or {}).get("transfer_id")
        prefilled = self.prefills.setdefault(transfer, asyncio.Event()) if transfer else None
        asyncio.get_running_loop().create_task(self.answer(fields, transfer, prefilled))
        return None

    def whole(self, body):
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    async def answer(self, fields, transfer, prefilled):
        """Prefill takes `stage_s`; decode takes `stage_s` to its first token, then ticks."""
        stage_s = fields.get("stage_s", 0)
        if self.role == "prefill":
            await asyncio.sleep(stage_s)
            self.whole(_PREFILLED)
            if prefilled is not None:
                prefilled.set()
            return
        if prefilled is not None:
            await prefilled.wait()
            del self.prefills[transfer]
        await asyncio.sleep(stage_s)
        tokens, pace_s = fields["max_tokens"], fields.get("pace_s", 0.01)
        if tokens == 1:
            self.transport.write(_HEAD + _CHUNK + _LAST)
            return
        self.transport.write(_HEAD)
        self.engines.setdefault(pace_s, Engine(pace_s)).add(self.transport, tokens)


async def main():
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    ports = []
    for role in ("prefill", "decode"):
        server = await loop.create_server(lambda role=role: Server(role), "127.0.0.1", 0, backlog=4096)
        ports.append(server.sockets[0].getsockname()[1])
    print(*ports, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
