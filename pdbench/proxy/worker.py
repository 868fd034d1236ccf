"""One process of the proxy: takes connections, routes requests, ends in good order.

Try: pdbench proxy --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
"""

import asyncio
import gc
import logging
import math
import os
import re
import signal
import socket

from pdbench.config import ProxyConfig
from pdbench.proxy import health
from pdbench.proxy.admin import bearer_matches, check_administrator, instances_answer
from pdbench.proxy.admission import Admission
from pdbench.proxy.ask import Ask
from pdbench.proxy.client import ClientConnection, Limits
from pdbench.proxy.dialects import DIALECTS
from pdbench.proxy.errors import RefusedError, method_refused
from pdbench.proxy.instances import InstanceTable
from pdbench.proxy.instants import EventLog
from pdbench.proxy.metrics import CONTENT_TYPE, Metrics
from pdbench.proxy.openapi import DESCRIPTION
from pdbench.proxy.paths import COMPLETIONS, PASSED_THROUGH, methods_of
from pdbench.proxy.upstream import Pool
from pdbench.proxy.way import Services, Way, pass_through

log = logging.getLogger("pdbench.proxy")
_ID = re.compile(rb"[\x21-\x7e]{1,256}")


def key_from_environment(name: str) -> bytes | None:
    """A secret of the environment; never an option, since a process list shows options."""
    return os.environ.get(name, "").encode() or None


class Worker:
    """The proxy within one process, on one listening socket."""

    def __init__(self, config: ProxyConfig, table: InstanceTable, metrics_folder: str | None) -> None:
        share = table.workers
        self._config = config
        self._table = table
        self._clients: set[ClientConnection] = set()
        self._draining = False
        self._admin_key = key_from_environment("PDBENCH_PROXY_ADMIN_KEY")
        upstream_key = key_from_environment("PDBENCH_UPSTREAM_API_KEY")
        self._services = Services(
            config=config,
            dialect=DIALECTS[config.connector],
            table=table,
            pool=Pool(table, config.connect_timeout_s, config.unhealthy_after),
            admission=Admission(
                math.ceil(config.max_in_flight / share), math.ceil(config.queue_size / share), config.queue_timeout_s
            ),
            event_log=EventLog(config.event_log),
            metrics=Metrics(table, metrics_folder),
            api_key=key_from_environment("PDBENCH_PROXY_API_KEY"),
            upstream_key=b"Bearer " + upstream_key if upstream_key else None,
        )
        self._limits = Limits(
            head_bytes=int(config.max_header_kib * 2**10),
            body_bytes=int(config.max_body_mib * 2**20),
            idle_s=config.idle_timeout_s,
            request_s=config.request_timeout_s,
        )
        self._max_connections = math.ceil(config.max_connections / share)

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, then let requests in flight end within the drain timeout; a second signal ends
        them at once."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        hurry = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
        background = [asyncio.create_task(self._tick())]
        if self._table.worker == 0:
            background.append(asyncio.create_task(health.watch(self._config, self._table, self._services.pool)))
        server = await loop.create_server(self._accept, sock=listener, backlog=4096)
        gc.collect()
        gc.freeze()
        await stop.wait()
        server.close()
        await self._drain(hurry)
        for task in background:
            task.cancel()
        self._services.pool.close()

    def _accept(self) -> ClientConnection:
        return ClientConnection(self.handle, self._clients, self._limits, self._max_connections)

    async def handle(self, ask: Ask, client: ClientConnection) -> None:
        """Route one request; the answer has been written when this returns."""
        if not _ID.fullmatch(ask.request_id):
            ask.request_id = os.urandom(16).hex().encode()
        try:
            await self._route(ask, client)
        except RefusedError as refusal:
            client.refuse(refusal)

    async def _route(self, ask: Ask, client: ClientConnection) -> None:
        path, allowed = ask.path, methods_of(ask.path)
        if not allowed:
            raise RefusedError(
                404, "the proxy serves /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics"
            )
        if ask.method not in allowed:
            raise method_refused(allowed)
        if path == b"/health/live":
            return client.respond(200, b"{}")
        if path == b"/health":
            ready = self._is_ready()
            return client.respond(200 if ready else 503, b'{"ready":true}' if ready else b'{"ready":false}')
        if path.startswith(b"/instances"):
            peer = client.transport.get_extra_info("peername")
            check_administrator(ask, peer[0], self._admin_key)
            return client.respond(*instances_answer(ask, self._table, self._config.kv_port))
        key = self._services.api_key
        if key is not None and not bearer_matches(ask.authorization, key):
            raise RefusedError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        if path in COMPLETIONS:
            if self._draining:
                raise RefusedError(503, "the proxy is shutting down", stage="queue", retry_after_s=1)
            return await Way(self._services, ask, client).run()
        if path in PASSED_THROUGH:
            return await pass_through(self._services, ask, client)
        if path == b"/metrics":
            return client.respond(200, self._services.metrics.render(), [(b"content-type", CONTENT_TYPE)])
        return client.respond(200, DESCRIPTION)

    def _is_ready(self) -> bool:
        config, table = self._config, self._table
        needs_prefill = self._services.dialect.HAS_PREFILL and config.fallback == "none"
        return bool(not self._draining and table.ready("decode") and (not needs_prefill or table.ready("prefill")))

    async def _tick(self) -> None:
        config = self._config
        shortest_s = min(
            config.prefill_timeout_s, config.decode_timeout_s, config.idle_timeout_s, config.request_timeout_s
        )
        tick_s = min(1.0, shortest_s / 4)
        while True:
            await asyncio.sleep(tick_s)
            self._services.pool.tick(tick_s)
            for client in list(self._clients):
                client.tick(tick_s)

    async def _drain(self, hurry: asyncio.Event) -> None:
        self._draining = True
        admission = self._services.admission
        waiting = admission.in_flight + admission.waiting
        for client in list(self._clients):
            client.last_request = True
            if not client.busy:
                client.transport.close()
        end_s = asyncio.get_running_loop().time() + self._config.drain_timeout_s
        while any(client.busy for client in self._clients) and not hurry.is_set():
            if asyncio.get_running_loop().time() > end_s:
                break
            await asyncio.sleep(0.02)
        aborted = admission.in_flight + admission.waiting
        for client in list(self._clients):
            client.transport.abort()
        # The aborted requests' tasks log their end.
        await asyncio.sleep(0.05)
        log.info(
            "stopped: %d requests were in flight, %d of them ended, %d were cut off",
            waiting,
            waiting - aborted,
            aborted,
        )
