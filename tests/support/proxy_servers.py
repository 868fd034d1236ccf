"""A scripted vLLM instance for the proxy's tests: a process that can be killed and paused, with thousands of streams at once.

A request says how it is to be answered, {"decode": {"tokens": 20, "delay": 0.01}}; requests and aborts are logged as JSON lines.
{"until": PATH} keeps an answer, a stream's last token, until that file exists: for what must be seen while requests are in flight.
Try: python -m tests.support.proxy_servers --port 8100 --log requests.jsonl
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import httptools

from tests.support.servers import SSE_HEAD, chunk, event, token

# The i-th token of every answer has this id plus i.
FIRST_ID = 100
# What ends a stream that is not of completions.
LAST_EVENTS = {"/v1/responses": b"response.completed", "/v1/messages": b"message_stop"}
MODEL = {"created": 1, "model": "m"}


def prompt_ids(body):
    """The prompt's tokens: those given, five of any text."""
    return body["prompt"] if isinstance(body.get("prompt"), list) else [1, 2, 3, 4, 5]


def answered(body):
    """How many of the answer's tokens are at the end of the prompt."""
    return sum(number >= FIRST_ID for number in prompt_ids(body) if isinstance(number, int))


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def wait_for(path):
    """Return when `path` names a file; at once if there is none to wait for."""
    while path and not Path(path).exists():
        await asyncio.sleep(0.01)


class Connection(asyncio.Protocol):
    def __init__(self, options, health):
        self.log, self.same_answer, self.max_model_len = options.log, options.same_answer, options.max_model_len
        self.health = health
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.headers, self.body, self.task, self.request_id = b"", {}, b"", None, None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.task is not None and not self.task.done():
            self.task.cancel()
            self.note({"event": "abort", "at_s": time.monotonic(), "request_id": self.request_id})

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

    def note(self, record):
        with Path(self.log).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def write(self, *pieces):
        self.transport.write(b"".join(pieces))

    def respond(self, status, document):
        body = json.dumps(document).encode()
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.write(head, body)

    async def answer(self, request):
        path = request["path"]
        if path == "/health":
            return self.respond(self.health["status"], {})
        if self.same_answer:
            document = token(" t0", [FIRST_ID], "length", **MODEL)
            document["choices"][0]["prompt_token_ids"] = [1, 2]
            if '"stream":true' not in request["body"].replace(" ", ""):
                return self.respond(200, document)
            return self.write(SSE_HEAD, chunk(event(document) + event(b"[DONE]")), chunk(b""))
        if path == "/v1/models":
            model = {"id": "m", "object": "model", "max_model_len": self.max_model_len}
            return self.respond(200, {"object": "list", "data": [model]})
        self.note({"event": "request", "at_s": time.monotonic(), **request})
        body = json.loads(request["body"])
        limit = body.get("max_output_tokens", body.get("max_tokens", 3))
        script = {
            "tokens": limit,
            "delay": 0.0,
            "first": 0.0,
            "status": 200,
            "die": -1,
            "end": "done",
        }
        # `user` can carry the script past a proxy that looks at every field.
        scripts = json.loads(body.get("user") or "{}") | body
        script |= scripts.get("prefill" if limit == 1 else "decode", {})
        self.health["status"] = script.get("health", self.health["status"])
        await asyncio.sleep(script["first"])
        if script["die"] == 0:
            return self.transport.abort()
        if script["status"] != 200:
            return self.respond(script["status"], {"error": {"message": "scripted", "code": script["status"]}})
        if script["end"] == "garbage":
            return self.write(b"HTTP/1.1 two hundred\r\n\r\n")
        if script["end"] == "empty-body":
            kind = b"text/event-stream" if body.get("stream") else b"application/json"
            return self.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: 0\r\n\r\n" % kind)
        if body.get("stream"):
            return await self.stream(script, body, path)
        await asyncio.sleep(script["delay"] * script["tokens"])
        await wait_for(script.get("until"))
        if script["end"] == "cut-off":
            self.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
            await asyncio.sleep(0.05)
            return self.transport.abort()
        return self.respond(200, self.completion(script, body, path))

    def completion(self, script, body, path):
        numbers = range(answered(body), answered(body) + script["tokens"])
        text = script.get("text", "".join(f" t{number}" for number in numbers))
        ids = [FIRST_ID + number for number in numbers] if body.get("return_token_ids") else None
        document = token(text, ids, script.get("finish", "length"), **MODEL, usage=usage(5, script["tokens"]))
        if ids is not None:
            document["choices"][0]["prompt_token_ids"] = prompt_ids(body)
        if "chat" in path:
            document["object"] = "chat.completion"
            document["choices"][0]["message"] = {"role": "assistant", "content": text}
        if body.get("kv_transfer_params"):
            params = {"remote_engine_id": "e", "remote_block_ids": [1, 2], "received": body["kv_transfer_params"]}
            document["kv_transfer_params"] = params
        return document

    async def stream(self, script, body, path):
        self.write(SSE_HEAD)
        count, before = script["tokens"], answered(body)
        merged = script.get("merged", 1)  # that many tokens are in the first event
        for i in range(merged - 1, count):
            if i >= merged:
                await asyncio.sleep(script["delay"])
            if i == count - 1:
                await wait_for(script.get("until"))
            numbers = range(before, before + merged) if i == merged - 1 else range(before + i, before + i + 1)
            text, ids = "".join(f" t{number}" for number in numbers), [FIRST_ID + number for number in numbers]
            if numbers[0] == 0:
                text, ids[0] = script.get("text", text), script.get("id", ids[0])
            finish = "length" if i == count - 1 else None
            payload = token(text, ids if body.get("return_token_ids") else None, finish, **MODEL)
            if body.get("return_token_ids"):
                payload["choices"][0]["prompt_token_ids"] = prompt_ids(body) if i == merged - 1 else None
            if "chat" in path:
                choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
                payload |= {"object": "chat.completion.chunk", "choices": [choice]}
            data = event(payload)
            if path in LAST_EVENTS:
                data = b"event: delta\n" + event({"type": "delta", "delta": text})
            half = len(data) // 2
            if i + 1 == script["die"]:
                self.write(b"%x\r\n" % len(data), data[:half])
                await asyncio.sleep(0.05)
                return self.transport.abort()
            if script.get("cut"):
                self.write(chunk(data[:half]))
                await asyncio.sleep(0.01)
                data = data[half:]
            self.write(chunk(data))
        if (body.get("stream_options") or {}).get("include_usage"):
            totals = usage(len(prompt_ids(body)), count)
            self.write(chunk(event({"id": "cmpl", "object": "text_completion", "choices": [], "usage": totals})))
        if script["end"] == "done" and path in LAST_EVENTS:
            self.write(chunk(b"event: %b\n" % LAST_EVENTS[path] + event({"type": LAST_EVENTS[path].decode()})))
        elif script["end"] == "done":
            self.write(chunk(event(b"[DONE]")))
        return self.write(b"0\r\n", script.get("trailer", "").encode(), b"\r\n")


async def main():
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", required=True)
    parser.add_argument("--same-answer", action="store_true", help="answer every request alike, valid or not")
    parser.add_argument("--max-model-len", type=int, help="the context that /v1/models lists")
    options = parser.parse_args()
    health = {"status": 200}
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(options, health), "127.0.0.1", options.port, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
