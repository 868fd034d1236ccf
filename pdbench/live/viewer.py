"""The viewer process: takes a measurement's messages from a pipe and serves them as a page that moves, and as metrics.

Started by the publisher: python -m pdbench.live.viewer page=FD metrics=FD pipe=FD, sockets that listen and the pipe's end.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdbench.live import pages
from pdbench.live.prometheus import Metrics
from pdbench.live.publisher import decode
from pdbench.live.state import State
from pdbench.report import text

TICK_S = 1.0
LINGER_S = {"ended": (1.0, 30.0), "lost": (60.0, 600.0)}
"""How long the viewer stays after the end, or when the measurement was killed: without an open page, with one at most."""
_LOADING_S, _QUEUED = 10.0, 30
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Viewer:
    """The state, and the pages that follow it: one queue of events per open page."""

    def __init__(self, state: State, metrics: Metrics) -> None:
        self.state, self.metrics = state, metrics
        self.inbox: deque[bytes] = deque()
        self._pages: dict[asyncio.Queue[str | None], str] = {}
        self._version = -1
        self.page_sent_s = -inf

    def look(self, closed: bool) -> None:
        """Take what came, add a point, tell the pages."""
        now_s = time.monotonic()
        while self.inbox:
            batch = decode(self.inbox.popleft())
            for message in batch.messages:
                self.state.take(message, batch.at_s)
        self.state.lost = closed and self.state.end is None
        grown = self.state.tick(now_s)
        self.metrics.update(self.state)
        whole, self._version = self._version != self.state.version, self.state.version
        for language in set(self._pages.values()):
            with text.language(language):
                events = [self._figures() if whole else self._points(grown), self._status()]
            for page in [page for page, of in self._pages.items() if of == language]:
                try:
                    for event in events:
                        page.put_nowait(event)
                except asyncio.QueueFull:  # it does not read: it will ask for all of it when it is back
                    del self._pages[page]
                    page.get_nowait()
                    page.put_nowait(None)

    async def events(self, language: str) -> AsyncIterator[str]:
        """Everything until now, then what comes."""
        page: asyncio.Queue[str | None] = asyncio.Queue(_QUEUED)
        self._pages[page] = language
        with text.language(language):
            first = "retry: 1000\n\n" + self._figures() + self._status()
        try:
            yield first
            while (event := await page.get()) is not None:
                yield event
        finally:
            self._pages.pop(page, None)

    def close(self) -> None:
        """End all streams."""
        for page in self._pages:
            with suppress(asyncio.QueueFull):
                page.put_nowait(None)

    @property
    def watched(self) -> bool:
        """Is a page open, or about to ask for its events?"""
        return bool(self._pages) or time.monotonic() - self.page_sent_s < _LOADING_S

    def _figures(self) -> str:
        drawn = [pages.figure(chart) for chart, _keys in pages.charts(self.state)]
        return _event("figures", drawn)

    def _points(self, grown: list[tuple[str, str]]) -> str:
        """The last point of each line that grew, by chart and in the order of its lines."""
        lines, new = self.state.lines, set(grown)
        points = {
            chart.key: [[lines[key].x[-1], lines[key].y[-1]] if key in new else None for key in keys]
            for chart, keys in pages.charts(self.state)
        }
        return _event("points", points)

    def _status(self) -> str:
        return _event("status", pages.status(self.state))


def _event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


class TokenRequired:
    """403 for every request without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Request(scope).query_params.get("token", "")
            if not secrets.compare_digest(given.encode(), self._token.encode()):
                words = "403: open the whole address that pdbench printed, its token included\n"
                await PlainTextResponse(words, 403, _HEADERS)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def page_app(viewer: Viewer, token: str) -> Starlette:
    one_at_a_time = asyncio.Lock()

    def language(request: Request) -> str:
        return "zh" if request.query_params.get("lang") == "zh" else "en"

    async def page(request: Request) -> Response:
        viewer.page_sent_s = time.monotonic()
        return HTMLResponse(pages.live_page(language(request)), headers=_HEADERS)

    async def events(request: Request) -> Response:
        return StreamingResponse(viewer.events(language(request)), media_type="text/event-stream", headers=_HEADERS)

    async def report(request: Request) -> Response:
        end = viewer.state.end
        if end is None or not end.folders:
            return PlainTextResponse("404: there is no report yet\n", 404, _HEADERS)
        async with one_at_a_time:  # all pages ask at the same moment; the second finds it made
            body = await asyncio.to_thread(pages.report, tuple(end.folders), language(request))
        return HTMLResponse(body, headers=_HEADERS)

    routes = [Route("/", page), Route("/events", events), Route("/report", report)]
    return Starlette(routes=routes, middleware=[Middleware(TokenRequired, token=token)])


def metrics_app(viewer: Viewer) -> Starlette:
    async def metrics(_request: Request) -> Response:
        body, kind = viewer.metrics.page()
        return Response(body, headers={"Content-Type": kind})

    return Starlette(routes=[Route("/metrics", metrics)])


async def serve(pipe: Connection, sockets: dict[str, socket.socket], token: str) -> None:
    """Until the measurement has ended and no page is left that shows it."""
    state = State()
    viewer, closed = Viewer(state, Metrics()), threading.Event()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                viewer.inbox.append(pipe.recv_bytes())
        closed.set()

    threading.Thread(target=receive, daemon=True).start()
    apps = {"page": page_app(viewer, token), "metrics": metrics_app(viewer)}
    servers = []
    for name, sock in sockets.items():
        config = uvicorn.Config(apps[name], log_level="critical", access_log=False, lifespan="off", loop="asyncio")
        servers.append(_Server(config))
        servers[-1].task = asyncio.create_task(servers[-1].serve(sockets=[sock]))
    gone_s = None
    while True:
        await asyncio.sleep(TICK_S if not closed.is_set() else TICK_S / 4)
        was_closed = closed.is_set()
        viewer.look(was_closed)
        if not was_closed:
            continue
        if gone_s is None:
            gone_s = time.monotonic()
            _leave_terminal()
        patience_s = LINGER_S["lost" if state.lost and "page" in sockets else "ended"][viewer.watched]
        if time.monotonic() - gone_s > patience_s:
            break
    viewer.close()
    for server in servers:
        server.should_exit = server.force_exit = True
    await asyncio.wait([server.task for server in servers], timeout=2)


def _leave_terminal() -> None:
    """What reads the command's output need not wait for the viewer, too."""
    with Path(os.devnull).open("wb") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)


class _Server(uvicorn.Server):
    """Signals are this process's own."""

    task: "asyncio.Task[None]"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Servers and clients on the same cores come first, also where pdbench was started with real-time priority.
    with suppress(OSError):  # some sandboxes know no other policy than the usual one
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(10)
    numbers = {name: int(number) for name, _, number in (argument.partition("=") for argument in arguments)}
    pipe = Connection(numbers.pop("pipe"), writable=False)
    sockets = {name: socket.socket(fileno=number) for name, number in numbers.items()}
    asyncio.run(serve(pipe, sockets, os.environ.pop("PDBENCH_LIVE_TOKEN")))


if __name__ == "__main__":
    main(sys.argv[1:])
