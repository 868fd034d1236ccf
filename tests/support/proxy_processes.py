"""Proxies and scripted instances as processes for the proxy's tests, and a small client that sees the raw bytes.

Try: pytest tests/test_proxy_faults.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

HERE = Path(__file__).parent


class Answer(NamedTuple):
    """An answer as it came: `complete` is False when the connection broke before its end."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True
    request_id: str = ""

    @property
    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The server-sent events' data, parsed, but for [DONE]."""
        datas = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [data if data == b"[DONE]" else json.loads(data) for data in datas]


class Server:
    """A process that listens on `port` of this host."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def requests(self) -> list[dict[str, Any]]:
        """The requests that an instance got."""
        return [line for line in self.lines() if line["event"] == "request"]

    def asked(self, request_id: str) -> tuple[dict[str, str], Any]:
        """The headers and JSON of the request with this id; waits for it: decode may answer before prefill is asked."""

        def found() -> list[dict[str, Any]]:
            return [request for request in self.requests() if request["headers"].get("x-request-id") == request_id]

        wait_until(found, f"the request {request_id} is here")
        return found()[-1]["headers"], json.loads(found()[-1]["body"])

    def aborted(self) -> list[str]:
        """The ids of the requests that an instance was told to stop."""
        return [line["request_id"] for line in self.lines() if line["event"] == "abort"]

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, data: bytes) -> Answer:
        """Send raw bytes on a connection of their own and read one answer."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection)

    def ask(self, method: str, target: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own, with an id of its own if none is given."""
        request_id = headers.setdefault("X_Request_Id", uuid4().hex)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {target} HTTP/1.1", "Host: test", "Content-Type: application/json", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(data)}"] if data else []
        return self.send("\r\n".join([*lines, "", ""]).encode() + data)._replace(request_id=request_id)

    def complete(self, stream: bool = False, **fields: Any) -> Answer:
        """A completion."""
        return self.ask("POST", "/v1/completions", {"model": "m", "prompt": "Hi", "stream": stream, **fields})

    def event(self, request_id: str) -> dict[str, Any]:
        """What the proxy logged of a request, which it does when prefill and decode have both ended."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines() if line["request_id"] == request_id]

        wait_until(found, f"the event of {request_id}")
        return found()[-1]

    def in_flight(self) -> int:
        """Requests in flight at all instances, as the proxy counts them."""
        return sum(instance["in_flight"] for instance in self.ask("GET", "/instances").json["instances"])


def read_answer(connection: socket.socket) -> Answer:
    """Read one answer to its end or to the end of the connection."""
    reader = connection.makefile("rb")
    try:
        status = int(reader.readline().split(b" ")[1])
        headers = {}
        while (line := reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            length = int(headers["content-length"])
            body = reader.read(length)
            return Answer(status, headers, body, len(body) == length)
        if headers.get("transfer-encoding") != "chunked":
            return Answer(status, headers, reader.read())
        body = b""
        while True:
            line = reader.readline()
            if not line.endswith(b"\r\n"):
                return Answer(status, headers, body, complete=False)
            size = int(line, 16)
            piece = reader.read(size + 2)
            if len(piece) != size + 2:
                return Answer(status, headers, body + piece, complete=False)
            if size == 0:
                return Answer(status, headers, body)
            body += piece[:-2]
    finally:
        reader.close()


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = 30.0) -> None:
    """Wait until `condition` holds; fails the test after the limit."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def _end(process: "subprocess.Popen[str]") -> None:
    for number in (signal.SIGCONT, signal.SIGTERM):
        process.send_signal(number)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def instance(folder: Path, name: str, *options: str, port: int = 0) -> Iterator[Server]:
    """A scripted instance (tests/support/proxy_servers.py)."""
    log = folder / f"{name}.jsonl"
    argv = [sys.executable, str(HERE / "proxy_servers.py"), "--log", str(log), "--port", str(port), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, int(process.stdout.readline()), log)
    finally:
        _end(process)


@contextmanager
def proxy(
    folder: Path,
    *options: str,
    prefill: list[Server] | None = None,
    decode: list[Server],
    ready: bool = True,
    **env: str,
) -> Iterator[Server]:
    """A proxy over these instances; `env` are environment variables."""
    log = folder / "proxy.jsonl"
    argv = [sys.executable, "-m", "pdbench", "proxy", "--port", "0", "--event-log", str(log)]
    for server in prefill or []:
        argv += ["--prefill", server.url]
    for server in decode:
        argv += ["--decode", server.url]
    if not prefill:
        argv += ["--connector", "none"]
    errors = folder / "proxy.stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*argv, *options], stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | env
        )
    try:
        assert process.stdout is not None
        server = Server(process, int(process.stdout.readline().rsplit(":", 1)[1]), log)
        if ready:
            wait_until(lambda: server.ask("GET", "/health").status == 200, "the proxy is ready")
        yield server
    finally:
        _end(process)
        assert "Traceback" not in errors.read_text(), errors.read_text()
