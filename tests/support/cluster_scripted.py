"""pdbench's command line with scripted servers in vLLM's place: `python cluster_scripted.py run --cluster ...`; faults need no model."""

import functools
import json
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pdbench import cli
from pdbench.cluster import deployment
from pdbench.serving.vllm import Command

TOKEN_S = 0.02


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.whole(b"")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = asked["max_tokens"]
        usage = {"prompt_tokens": 5, "completion_tokens": count}
        if not asked.get("stream"):
            self.whole(json.dumps({"choices": [{"index": 0, "text": "x" * count}], "usage": usage}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index in range(count):
            time.sleep(TOKEN_S)
            finish = "length" if index == count - 1 else None
            self.event({"choices": [{"index": 0, "text": "x", "token_ids": [index], "finish_reason": finish}]})
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def whole(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def event(self, payload: dict) -> None:
        self.chunk(b"data: " + json.dumps(payload).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask a name server for the host's name, for seconds


def plan(config, gpus, *, seat):
    """The server on its node, in the place of vLLM."""
    argv = (sys.executable, __file__, "--answer", config.host, str(seat.port))
    return Command(name=seat.name, role=seat.role, argv=argv, environment={}, url=f"http://{config.host}:{seat.port}")


if __name__ == "__main__":
    if sys.argv[1] == "--answer":
        Server((sys.argv[2], int(sys.argv[3])), Handler).serve_forever()
    else:
        from tests.support import cluster_scripted

        deployment._planner = lambda seat, connector: functools.partial(cluster_scripted.plan, seat=seat)
        cli.main(sys.argv[1:])
