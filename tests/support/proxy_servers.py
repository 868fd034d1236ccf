"""A scripted server that speaks like vLLM, for the proxy's tests: real sockets, real processes.

It answers by what the prompt says ("tokens=20 delay=0.01"), logs each request as one JSON line, and tells of aborts.
Try: python tests/support/proxy_servers.py --port 8100 --log requests.jsonl
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import httptools

EVENT = b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"%b","finish_reason":%b}]}\n\n'
CHAT = b'data: {"id":"chat-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'

# The i-th token of every answer has this id plus i.
TOKEN = 100


def prompt_ids(body):
    """The prompt's tokens: those given, five of any text."""
    return body["prompt"] if isinstance(body.get("prompt"), list) else [1, 2, 3, 4, 5]


def already(body):
    """How many of the answer's tokens stand at the end of the prompt."""
    return sum(token >= TOKEN for token in prompt_ids(body) if isinstance(token, int))


class Server(asyncio.Protocol):
    """One connection."""

    def __init__(self, log, health, deaf):
        self.log, self.health, self.deaf = log, health, deaf
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.headers, self.body, self.task, self.request_id = b"", {}, b"", None, None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.task is not None and not self.task.done():
            self.task.cancel()
            self.say({"event": "abort", "at_s": time.monotonic(), "request_id": self.request_id})

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_url(self, url):
        self.url += url

    def on_header(self, name, value):
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        request = {"path": self.url.decode(), "headers": self.headers, "body": self.body.decode()}
        self.url, self.headers, self.body, self.request_id = b"", {}, b"", self.headers.get("x-request-id")
        self.task = asyncio.get_running_loop().create_task(self.answer(request))

    def say(self, record):
        with Path(self.log).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def whole(self, status, document):
        body = json.dumps(document).encode()
        self.transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )

    def any_answer(self, streamed):
        """What fits any request: a token with its ids, as a whole answer or as a stream."""
        choice = {
            "index": 0,
            "text": " t0",
            "finish_reason": "length",
            "token_ids": [TOKEN],
            "prompt_token_ids": [1, 2],
        }
        document = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        if not streamed:
            return self.whole(200, document)
        events = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(document).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        return self.transport.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events))

    async def answer(self, request):
        if request["path"] == "/health":
            return self.whole(self.health["status"], {})
        if self.deaf:
            return self.any_answer('"stream":true' in request["body"].replace(" ", ""))
        self.say({"event": "request", "at_s": time.monotonic(), **request})
        if request["path"] == "/v1/models":
            return self.whole(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
        body = json.loads(request["body"])
        script = {
            "tokens": body.get("max_tokens", 3),
            "delay": 0.0,
            "first": 0.0,
            "status": 200,
            "die": -1,
            "end": "done",
        }
        # `user` can carry the script past a proxy that looks at every field.
        scripts = json.loads(body.get("user") or "{}") | body
        script.update(scripts.get("prefill" if body.get("max_tokens") == 1 else "decode", {}))
        self.health["status"] = script.get("health", self.health["status"])
        await asyncio.sleep(script["first"])
        if script["die"] == 0:
            return self.transport.abort()
        if script["status"] != 200:
            return self.whole(script["status"], {"error": {"message": "scripted", "code": script["status"]}})
        if script["end"] == "garbage":
            self.transport.write(b"HTTP/1.1 two hundred\r\n\r\n")
            return None
        if script["end"] == "empty-body":
            kind = b"text/event-stream" if body.get("stream") else b"application/json"
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: 0\r\n\r\n" % kind)
            return None
        if body.get("stream"):
            return await self.stream(script, body, request["path"])
        await asyncio.sleep(script["delay"] * script["tokens"])
        said = range(already(body), already(body) + script["tokens"])
        text = script.get("text", "".join(f" t{i}" for i in said))
        choice = {
            "index": 0,
            "text": text,
            "message": {"role": "assistant", "content": text},
            "finish_reason": script.get("finish", "length"),
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": [TOKEN + i for i in said], "prompt_token_ids": prompt_ids(body)}
        usage = {"prompt_tokens": 5, "completion_tokens": script["tokens"], "total_tokens": 5 + script["tokens"]}
        kind = "chat.completion" if "chat" in request["path"] else "text_completion"
        document = {"id": "cmpl-1", "object": kind, "created": 1, "model": "m", "choices": [choice], "usage": usage}
        if body.get("kv_transfer_params"):
            document["kv_transfer_params"] = {
                "remote_engine_id": "e",
                "remote_block_ids": [1, 2],
                "asked": body["kv_transfer_params"],
            }
        if script["end"] == "cut-off":
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
            await asyncio.sleep(0.05)
            return self.transport.abort()
        return self.whole(200, document)

    async def stream(self, script, body, path):
        event = CHAT if "chat" in path else EVENT
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        count, before = script["tokens"], already(body)
        for i in range(count):
            if i:
                await asyncio.sleep(script["delay"])
            chunk = event % (b" t%d" % (before + i), b'"length"' if i == count - 1 else b"null")
            if body.get("return_token_ids"):
                ids = b"%d" % (TOKEN + before + i)
                named = json.dumps(prompt_ids(body)).encode() if i == 0 else b"null"
                chunk = chunk[:-5] + b',"prompt_token_ids":%b,"token_ids":[%b]}]}\n\n' % (named, ids)
            if i + 1 == script["die"]:
                self.transport.write(b"%x\r\n%b" % (len(chunk), chunk[: len(chunk) // 2]))
                await asyncio.sleep(0.05)
                return self.transport.abort()
            if script.get("cut"):
                half = len(chunk) // 2
                self.transport.write(b"%x\r\n%b\r\n" % (half, chunk[:half]))
                await asyncio.sleep(0.01)
                chunk = chunk[half:]
            self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if (body.get("stream_options") or {}).get("include_usage"):
            asked = len(prompt_ids(body))
            usage = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (asked, count, asked + count)
            chunk = b'data: {"id":"cmpl-1","object":"text_completion","choices":[],"usage":%b}\n\n' % usage
            self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if script["end"] == "done":
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n")
        self.transport.write(b"0\r\n%b\r\n" % script.get("trailer", "").encode())
        return None


async def main():
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", required=True)
    parser.add_argument("--health", type=int, default=200)
    parser.add_argument("--deaf", action="store_true", help="give every request the same answer")
    options = parser.parse_args()
    loop = asyncio.get_running_loop()
    health = {"status": options.health}
    server = await loop.create_server(
        lambda: Server(options.log, health, options.deaf), "127.0.0.1", options.port, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
