"""Does the proxy's memory stay flat? One line after each tenth of the requests, so that a short run is useful too.

One-token streams over 16 kept connections, against the servers of benchmarks/proxy_cost.py.
Try: python benchmarks/proxy_memory.py --requests 20000      (a million: half an hour)
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import uvloop
from proxy_cost import family, memory_bytes, ours, wait_ready
from proxy_cost_client import many_requests

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import free_port

CONCURRENCY = 16


async def watch(options):
    """Send the requests in ten parts, printing requests, seconds and the proxy's resident memory."""
    argv = [sys.executable, str(Path(__file__).with_name("proxy_cost_servers.py"))]
    servers = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    port, proxy = free_port(), None
    try:
        prefill, decode = map(int, servers.stdout.readline().split())
        proxy = subprocess.Popen(ours(options.connector, prefill, decode, port), stdout=subprocess.DEVNULL)
        await wait_ready(port, proxy)
        begin_s, sent = time.monotonic(), 0
        print("requests, seconds, resident KiB", flush=True)
        for part in (options.requests // 50, *[options.requests // 10] * 10):
            await many_requests(port, part, CONCURRENCY)
            sent += part
            print(f"{sent}, {time.monotonic() - begin_s:.0f}, {memory_bytes(proxy) // 1024}", flush=True)
    finally:
        for process in (proxy, servers):
            for member in family(process) if process is not None and process.poll() is None else []:
                member.kill()


def main():
    """Options, then the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--connector", default="p2p-nccl", help="as of pdbench proxy")
    uvloop.run(watch(parser.parse_args()))


if __name__ == "__main__":
    main()
