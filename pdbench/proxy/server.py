"""The proxy's processes: options, the port, one worker or several, and their end."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import uvloop

from pdbench.config import ProxyConfig
from pdbench.errors import UserError
from pdbench.http import netloc
from pdbench.proxy import routes
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.handler import ProxyContext
from pdbench.proxy.instances import InstanceTable, parse_address
from pdbench.proxy.kv_protocols import PROTOCOLS
from pdbench.proxy.upstream import watch_health
from pdbench.supervisor import end_with

log = logging.getLogger("pdbench.proxy")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RETRY_S = 1.0


def serve(config: ProxyConfig) -> None:
    """Run the proxy until SIGTERM or SIGINT; raises UserError for options that cannot work."""
    logging.basicConfig(level=logging.INFO, format="pdbench proxy: %(message)s", stream=sys.stderr)
    if config.connector != "none" and not config.prefill:
        raise UserError("no prefill instance: add --prefill URL, or --connector none to balance over --decode only")
    if config.connector == "none" and config.prefill:
        raise UserError("--connector none has no prefill: name every instance with --decode")
    if not config.decode:
        raise UserError("no decode instance: add --decode URL")
    protocol, connector = PROTOCOLS[config.connector], f"--connector {config.connector}"
    if config.return_kv and not protocol.is_pdbench:
        raise UserError(f"{connector} cannot bring KV back to prefill: leave --return-kv out")
    if config.disaggregate_above and not protocol.decode_can_prefill:
        raise UserError(f"{connector} cannot let decode compute a prompt: leave --disaggregate-above out")
    if config.workers > 256:
        raise UserError(f"--workers {config.workers} is more than 256: name fewer")
    table = InstanceTable(config.workers)
    roles = [("prefill", url) for url in config.prefill] + [("decode", url) for url in config.decode]
    for index, (role, url) in enumerate(roles):
        table.add(role, parse_address(url, config.kv_port + index))
    event_log = None
    if config.event_log is not None:
        try:
            Path(config.event_log).parent.mkdir(parents=True, exist_ok=True)
            # Several workers share the file: every line is one write to a file opened for appending.
            event_log = os.open(config.event_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            text = f"cannot write the event log {config.event_log} ({error.strerror}): name another file"
            raise UserError(text) from None
    # A stream takes up to three descriptors; the usual soft limit of 1,024 would end at 300 streams.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    listeners = _listen(config)
    text = f"pdbench proxy: listening on http://{netloc(*listeners[0].getsockname()[:2])}"
    if config.workers == 1:
        _say(text)
        uvloop.run(_work(ProxyContext(config, table, event_log, None), listeners[0]))
    else:
        _supervise(config, table, event_log, listeners, text)


def _say(text: str) -> None:
    with suppress(OSError):  # an output that takes no more (a full disk) ends no proxy
        print(text, flush=True)


def _listen(config: ProxyConfig) -> list[socket.socket]:
    """One listening socket per worker, all on one port."""
    # They belong to the parent: the connections in a dead worker's backlog wait for its replacement.
    listeners: list[socket.socket] = []
    port = config.port
    try:
        family, *_, address = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM)[0]
        for _ in range(config.workers):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if config.workers > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.listen(4096)
            port = listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        where = f"{config.host}:{config.port}"
        raise UserError(f"cannot listen on {where} ({error}): free the port or name another") from None
    return listeners


def _supervise(
    config: ProxyConfig, table: InstanceTable, event_log: int | None, listeners: list[socket.socket], text: str
) -> None:
    """Fork workers, replace one that dies, forward signals, wait for all. Prints `text` once signals are handled."""
    signals = {*STOP_SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # they wait for sigwait
    workers: dict[int, int] = {}
    starting, stopping, parent = list(range(config.workers)), False, os.getpid()
    served = False

    def work(index: int) -> None:
        table.worker = index
        try:
            os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent; a second signal would end requests at once
            end_with(parent, signal.SIGTERM)  # a parent that is killed leaves no worker behind
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the worker has its own handlers
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            uvloop.run(_work(ProxyContext(config, table, event_log, metrics_dir), listeners[index]))
            os._exit(0)
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            os._exit(1)

    _say(text)
    with tempfile.TemporaryDirectory(prefix="pdbench-proxy-", ignore_cleanup_errors=True) as metrics_dir:
        while starting or workers:
            refused: list[int] = []
            for index in starting:
                try:
                    process_id = os.fork()
                except OSError as error:  # too many processes, or no memory
                    if not served:
                        raise UserError(
                            f"cannot start a worker process ({error.strerror}): allow more processes"
                        ) from None
                    log.error("worker %d cannot be started (%s): trying again", index, error.strerror)
                    refused.append(index)
                    continue
                if process_id == 0:
                    work(index)
                workers[process_id], served = index, True
            starting = refused
            came = signal.sigtimedwait(signals, _RETRY_S) if starting else signal.sigwaitinfo(signals)
            if came and (number := came.si_signo) in STOP_SIGNALS:
                stopping, starting = True, []
                for process_id in workers:
                    os.kill(process_id, number)
            while workers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                index = workers.pop(ended[0])
                if not stopping:
                    log.error("worker %d ended (%s): restarting it", index, os.waitstatus_to_exitcode(ended[1]))
                    table.forget_worker(index)
                    starting.append(index)
            if starting:
                time.sleep(0.2)


async def _work(context: ProxyContext, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight then get the drain timeout, or until a second signal."""
    config = context.config
    clients: set[ClientConnection] = set()
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, lambda: (stop_now if stop.is_set() else stop).set())
    limits_s = (config.prefill_timeout_s, config.decode_timeout_s, config.idle_timeout_s, config.request_timeout_s)
    tick_s = min(1.0, min(limits_s) / 4)

    async def tick() -> None:
        while True:
            await asyncio.sleep(tick_s)
            context.pool.tick(tick_s)
            for client in list(clients):
                client.tick(tick_s)

    context.pool.relay.start()
    background = [asyncio.create_task(tick())]
    if context.table.worker == 0:
        background.append(asyncio.create_task(watch_health(context.pool, context.upstream_key)))
    connection = partial(ClientConnection, partial(routes.serve, context), config, clients)
    server = await loop.create_server(connection, sock=listener, backlog=4096)
    gc.collect()
    gc.freeze()
    await stop.wait()
    server.close()
    context.draining = True
    before = context.requests
    for client in list(clients):
        client.last_request = True
        if not client.busy:
            client.transport.close()
    end_s = loop.time() + config.drain_timeout_s
    while any(client.busy for client in clients) and not stop_now.is_set() and loop.time() <= end_s:
        await asyncio.sleep(0.02)
    cut_off = context.requests
    for client in list(clients):
        client.transport.abort()
    await asyncio.sleep(0.05)  # the aborted requests are logged
    text = "stopped: %d requests were in flight, %d of them ended, %d were cut off"
    log.info(text, before, before - cut_off, cut_off)
    for task in background:
        task.cancel()
    for request in list(context.pool.active):
        request.end("the proxy is shutting down")
