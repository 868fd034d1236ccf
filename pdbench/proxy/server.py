"""Starting the proxy: the shared table of instances, the port, the workers, and their end.

Try: pdbench proxy --workers 2 --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
"""

import asyncio
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time

import uvloop

from pdbench.config import ProxyConfig
from pdbench.errors import UserError
from pdbench.proxy.instances import InstanceTable, parse_address
from pdbench.proxy.worker import Worker

log = logging.getLogger("pdbench.proxy")
ENDING = (signal.SIGTERM, signal.SIGINT)


def serve(config: ProxyConfig) -> None:
    """Run the proxy until SIGTERM or SIGINT; raises UserError for options that cannot work."""
    logging.basicConfig(level=logging.INFO, format="pdbench proxy: %(message)s", stream=sys.stderr)
    if config.connector != "none" and not config.prefill:
        raise UserError("no prefill instance: add --prefill URL, or --connector none to balance over --decode alone")
    if config.connector == "none" and config.prefill:
        raise UserError("--connector none has no prefill: name every instance with --decode")
    if not config.decode:
        raise UserError("no decode instance: add --decode URL")
    if not 1 <= config.workers <= 256:
        raise UserError(f"--workers {config.workers} is not between 1 and 256")
    table = InstanceTable(config.workers)
    for index, (role, url) in enumerate(
        [("prefill", url) for url in config.prefill] + [("decode", url) for url in config.decode]
    ):
        table.add(role, parse_address(url, config.kv_port + index))
    # A stream takes up to three descriptors; the usual soft limit of 1,024 would end at 300 streams.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listeners = _listen(config)
    host, port = listeners[0].getsockname()[:2]
    where = f"pdbench proxy: listening on http://{f'[{host}]' if ':' in host else host}:{port}"
    if config.workers == 1:
        print(where, flush=True)
        _work(config, table, listeners[0], None)
    else:
        _supervise(config, table, listeners, where)


def _listen(config: ProxyConfig) -> list[socket.socket]:
    """One listening socket a worker, all on one port; made here, so that a dead worker's clients wait for its heir."""
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
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error}): free the port or name another"
        ) from None
    return listeners


def _work(config: ProxyConfig, table: InstanceTable, listener: socket.socket, metrics_folder: str | None) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config, table, listener, metrics_folder))


async def _run(config: ProxyConfig, table: InstanceTable, listener: socket.socket, metrics_folder: str | None) -> None:
    await Worker(config, table, metrics_folder).run(listener)


def _supervise(config: ProxyConfig, table: InstanceTable, listeners: list[socket.socket], where: str) -> None:
    """Fork the workers and start one anew that dies; pass the first signal on, and wait for all. Prints `where` when it is heard."""
    stopping = False
    workers: dict[int, int] = {}

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process_id in workers:
            os.kill(process_id, number)

    def fork(index: int) -> None:
        """A worker, unless the end has come: the signal for it finds a worker in the table, or not begun."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        process_id = None if stopping else os.fork()
        if process_id == 0:
            for number in ENDING:
                signal.signal(number, signal.SIG_DFL)  # until the worker has handlers of its own
        elif process_id is not None:
            workers[process_id] = index
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        if process_id != 0:
            return
        table.worker = index
        code = 1
        try:
            _work(config, table, listeners[index], metrics_folder)
            code = 0
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            os._exit(code)

    for number in ENDING:
        signal.signal(number, stop)
    print(where, flush=True)
    metrics_folder = tempfile.mkdtemp(prefix="pdbench-proxy-")
    try:
        for index in range(config.workers):
            fork(index)
        while workers:
            process_id, status = os.wait()
            index = workers.pop(process_id)
            if not stopping:
                log.error("worker %d ended (%s): starting it anew", index, os.waitstatus_to_exitcode(status))
                table.forget_worker(index)
                time.sleep(0.2)
                fork(index)
    finally:
        shutil.rmtree(metrics_folder, ignore_errors=True)
