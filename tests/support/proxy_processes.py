"""Proxies and scripted instances as processes, and a small client that sees the raw answer."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from tests.support.processes import ROOT, ending_with_tests, lines_of, wait_until


class Answer(NamedTuple):
    """An answer as it came: `complete` is False when the connection broke before its end."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True
    request_id: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of the server-sent events, decoded except for [DONE]."""
        payloads = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [payload if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


class Server:
    """A process that listens on `port` of this host and logs JSON lines."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in lines_of(self.log)] if self.log.exists() else []

    def requests(self) -> list[dict[str, Any]]:
        """The requests that an instance got."""
        return [line for line in self.lines() if line["event"] == "request"]

    def received(self, request_id: str) -> tuple[dict[str, str], Any]:
        """The headers and JSON of the request with this id. Waits for it: decode may answer before prefill has the request."""

        def matching() -> list[dict[str, Any]]:
            return [request for request in self.requests() if request["headers"].get("x-request-id") == request_id]

        wait_until(matching)
        return matching()[-1]["headers"], json.loads(matching()[-1]["body"])

    def aborted(self) -> list[str]:
        """The ids of the requests whose connection was closed before the instance had answered."""
        return [line["request_id"] for line in self.lines() if line["event"] == "abort"]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, data: bytes) -> Answer:
        """Send raw bytes on a new connection and read one answer."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection)

    def request(self, method: str, target: str, body: Any = None, **headers: str) -> Answer:
        """One request on a new connection, with a random id if `headers` has none."""
        request_id = headers.setdefault("X_Request_Id", uuid4().hex)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {target} HTTP/1.1", "Host: test", "Content-Type: application/json", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(data)}"] if data else []
        return self.send("\r\n".join([*lines, "", ""]).encode() + data)._replace(request_id=request_id)

    def complete(self, stream: bool = False, **fields: Any) -> Answer:
        return self.request("POST", "/v1/completions", {"model": "m", "prompt": "Hi", "stream": stream, **fields})

    def event(self, request_id: str) -> dict[str, Any]:
        """What the proxy logged of a request, which it does when prefill and decode have both ended."""

        def matching() -> list[dict[str, Any]]:
            return [line for line in self.lines() if line["request_id"] == request_id]

        wait_until(matching)
        return matching()[-1]

    def instances(self) -> list[dict[str, Any]]:
        """The proxy's instances, as /instances lists them."""
        return self.request("GET", "/instances").json["instances"]

    def in_flight(self) -> int:
        """Requests in flight at all instances, as the proxy counts them."""
        return sum(instance["in_flight"] for instance in self.instances())

    def wait_all_healthy(self) -> None:
        wait_until(lambda: all(instance["healthy"] for instance in self.instances()))

    def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        wait_until(lambda: self.in_flight() == 0)

    def is_ready(self) -> bool:
        return self.request("GET", "/health").status == 200


def read_answer(connection: socket.socket) -> Answer:
    """Read one answer to its end or to the end of the connection."""
    response = HTTPResponse(connection)
    try:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        try:
            return Answer(response.status, headers, response.read())
        except IncompleteRead as error:
            return Answer(response.status, headers, error.partial, complete=False)
    finally:
        response.close()


@contextmanager
def _running(log: Path, argv: list[str], errors: Path, **environment: str) -> Iterator[Server]:
    """A process that prints its port, or a URL that ends with it, on its first line."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path} | environment
    with errors.open("w") as file:
        command = ending_with_tests([sys.executable, *argv])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=env)
    try:
        assert process.stdout is not None
        yield Server(process, int(process.stdout.readline().rsplit(":", 1)[-1]), log)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def instance(folder: Path, name: str, *options: str, port: int = 0) -> Iterator[Server]:
    """A scripted instance (tests/support/proxy_servers.py)."""
    log = folder / f"{name}.jsonl"
    argv = ["-m", "tests.support.proxy_servers", "--log", str(log), "--port", str(port), *options]
    with _running(log, argv, folder / f"{name}.stderr") as server:
        yield server


@contextmanager
def proxy(
    folder: Path,
    *options: str,
    prefill: list[Server] | None = None,
    decode: list[Server],
    ready: bool = True,
    program: Sequence[str] = ("pdbench", "proxy"),
    **environment: str,
) -> Iterator[Server]:
    """A proxy over these instances; fails if it has written a traceback."""
    log, errors = folder / "proxy.jsonl", folder / "proxy.stderr"
    argv = ["-m", *program, "--port", "0", "--event-log", str(log), *options]
    for server in prefill or []:
        argv += ["--prefill", server.url]
    for server in decode:
        argv += ["--decode", server.url]
    if not prefill:
        argv += ["--connector", "none"]
    with _running(log, argv, errors, **environment) as server:
        if ready:
            wait_until(server.is_ready)
        yield server
    assert "Traceback" not in errors.read_text(), errors.read_text()
