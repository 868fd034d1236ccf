"""What a proxy costs: CPU per token and per request, time added, memory; pdbench's beside its peers and a C relay.

Servers and client share one core, the proxy has the other. Each peer is installed into a virtual environment under --peers
(kept for the next run if you name a folder); one that cannot be installed is skipped with a message.
Try: python benchmarks/proxy_cost.py            (about 7 minutes; --rounds 1 is quicker and rougher)
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop
from proxy_cost_client import close, connect, first_token_ms, many_requests, steady

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import free_port

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
STAGE_S = 0.005
CONTENDERS = (
    "floor", "pdbench p2p-nccl", "pdbench builtin-p2p-nccl", "pdbench none", "quart", "vllm-router", "sglang-router",
)  # fmt: skip


def pinned(argv, core, **options):
    """Start a process on one core."""
    return subprocess.Popen(
        argv, preexec_fn=lambda: os.sched_setaffinity(0, {core}), stderr=subprocess.DEVNULL, **options
    )


def ours(connector, prefill, decode, port):
    """pdbench's proxy."""
    roles = ["--decode", f"http://127.0.0.1:{decode}"]
    if connector != "none":
        roles += ["--prefill", f"http://127.0.0.1:{prefill}"]
    return [sys.executable, "-m", "pdbench", "proxy", "--port", str(port), "--connector", connector, *roles]


def install(name, folder):
    """Create a peer's virtual environment if there is none; returns its bin folder, None if pip fails."""
    home = folder / name
    packages = {"quart": ["quart", "aiohttp", "uvloop"]}.get(name, [name])
    if not (home / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
    done = home / "installed"
    if not done.exists():
        command = [home / "bin" / "python", "-m", "pip", "install", "-q", *packages]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        done.touch()
    return home / "bin"


def peer(name, folder, prefill, decode, port):
    """A peer's command line, None if it cannot be installed."""
    programs = install(name, folder)
    if programs is None:
        return None
    prefill_url, decode_url = f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"
    if name == "quart":
        return [programs / "python", HERE / "proxy_quart.py", prefill_url, decode_url, str(port)]
    program, mode = {
        "vllm-router": ([programs / "vllm-router"], "--vllm-pd-disaggregation"),
        "sglang-router": ([programs / "python", "-m", "sglang_router.launch_router"], "--pd-disaggregation"),
    }[name]
    instances = ["--prefill", prefill_url, "--decode", decode_url, "--policy", "round_robin"]
    return [
        *program,
        mode,
        *instances,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--prometheus-port",
        str(free_port()),
    ]


def floor(folder, decode, port):
    """The C relay, compiled here; None without gcc."""
    binary = folder / "floor"
    built = subprocess.run(["gcc", "-O2", "-o", binary, HERE / "proxy_floor.c"], capture_output=True)
    return [binary, str(port), str(decode)] if built.returncode == 0 else None


def family(process):
    """A process and those it started."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def cpu_s(process):
    """CPU seconds of all threads of a process and its children, from the scheduler's own nanoseconds."""
    total = 0
    for member in family(process):
        for task in Path(f"/proc/{member.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_bytes(process):
    """Resident memory of a process and its children."""
    return sum(member.memory_info().rss for member in family(process))


async def wait_ready(port, process):
    """Wait until requests are answered with tokens; raises TimeoutError or RuntimeError."""
    end = time.monotonic() + 40
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}")
        with contextlib.suppress(OSError, ConnectionError, TimeoutError):
            streams = await connect(port, 1)
            try:
                _, _, tokens = await asyncio.wait_for(streams[0].request(max_tokens=1), 5)
            finally:
                close(streams)
            if tokens == 1:
                return
        await asyncio.sleep(0.3)
    raise TimeoutError("gave no tokens within 40 s")


async def paced_cpu(process, port, count, tokens, pace_s):
    """CPU of the proxy per token while all streams run, in us, and the gaps between tokens in ms."""
    spent = []

    async def during(streams):
        while not all(stream.arrivals for stream in streams):
            await asyncio.sleep(0.05)
        await asyncio.sleep(20 * pace_s)
        before = cpu_s(process) if process else 0, sum(stream.tokens for stream in streams)
        while max(stream.tokens for stream in streams) < tokens - 10:
            await asyncio.sleep(0.05)
        after = cpu_s(process) if process else 0, sum(stream.tokens for stream in streams)
        spent.append(1e6 * (after[0] - before[0]) / max(after[1] - before[1], 1))

    gaps, passed = await steady(port, count, tokens, pace_s, during)
    if passed != count * tokens:
        raise RuntimeError(f"{passed} of {count * tokens} tokens arrived")
    return spent[0], gaps


async def request_cost(process, port, requests):
    """CPU of the proxy per one-token request in ms, and the growth of its memory over the requests in KiB."""
    await many_requests(port, requests // 4, 16)
    before, held = cpu_s(process), memory_bytes(process)
    await many_requests(port, requests, 16)
    return 1e3 * (cpu_s(process) - before) / requests, (memory_bytes(process) - held) / 1024


async def stream_memory_kib(process, port, count):
    """Memory of the proxy per stream with `count` open at once, in KiB; raises RuntimeError if tokens are missing."""
    held = memory_bytes(process)
    peak = []

    async def during(streams):
        while not all(stream.arrivals for stream in streams):
            await asyncio.sleep(0.05)
        peak.append(memory_bytes(process))

    _, passed = await steady(port, count, 60, 0.25, during)
    if passed != count * 60:
        raise RuntimeError(f"{passed} of {count * 60} tokens arrived")
    return (peak[0] - held) / 1024 / count


def percentile(values, share):
    """The value below which a share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def measure(process, port, options, first_round):
    """One contender in one round: raw figures, None where one failed, with the reason on stderr."""

    async def attempt(name, coroutine):
        try:
            return await asyncio.wait_for(coroutine, 120 if options.requests <= 20000 else 7200)
        except (OSError, RuntimeError, TimeoutError) as error:
            print(f"  {name}: {type(error).__name__} {error}", file=sys.stderr)
            return None

    await first_token_ms(port, 20, STAGE_S)
    idle = await attempt("idle", first_token_ms(port, 80, STAGE_S))
    steady_run = await attempt("200 streams", paced_cpu(process, port, 200, 300, 0.02))
    fast_run = await attempt("20,000 tokens/s", paced_cpu(process, port, 200, 400, 0.01))
    figures = {
        "us/token": steady_run[0] if steady_run and process else None,
        "TTFT": idle and statistics.median(idle),
        "TBT": fast_run and percentile(fast_run[1], 0.99),
    }
    if process is not None:
        requests = await attempt("requests", request_cost(process, port, options.requests))
        figures["ms/request"], figures["growth KiB"] = requests or (None, None)
        if first_round:
            figures["KiB/stream"] = await attempt("2,000 streams", stream_memory_kib(process, port, 2000))
    return figures


def median_of(rounds, name):
    """The median of a figure over the rounds in which it was measured, or None."""
    values = [figures[name] for figures in rounds if figures.get(name) is not None]
    return statistics.median(values) if values else None


COLUMNS = {
    "us/token": "CPU us/token",
    "floors": "x floor",
    "ms/request": "CPU ms/request",
    "TTFT": "TTFT p50 ms (idle)",
    "TBT": "TBT p99 ms (20,000 tokens/s)",
    "KiB/stream": "KiB/stream (2,000 open)",
    "growth KiB": "growth KiB",
}


def show(rounds):
    """The table, from every contender's figures in every round."""
    floor_us = median_of(rounds.get("floor", []), "us/token")
    print(f"| proxy | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, figures in rounds.items():
        row = {column: median_of(figures, column) for column in COLUMNS}
        row["floors"] = row["us/token"] / floor_us if row["us/token"] and floor_us else None
        cells = ["-" if cell is None else f"{cell:.2f}" for cell in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")


async def contend(argv, port, options, first_round):
    """Start a contender, measure it, end it; raises RuntimeError or TimeoutError if it does not serve."""
    process = pinned([str(part) for part in argv], CORES[-1], stdout=subprocess.DEVNULL)
    try:
        await wait_ready(port, process)
        return await measure(process, port, options, first_round)
    finally:
        for member in family(process) if process.poll() is None else []:
            member.kill()
        process.wait()


async def command(name, folder, prefill, decode, port):
    """A contender's command line, None if it cannot run here."""
    if name == "floor":
        return floor(folder, decode, port)
    if name.startswith("pdbench"):
        return ours(name.split(" ")[1], prefill, decode, port)
    return await asyncio.to_thread(peer, name, folder, prefill, decode, port)


async def compare(options, folder):
    """Every contender in turn, round after round, against the same servers."""
    os.sched_setaffinity(0, {CORES[0]})
    with contextlib.suppress(PermissionError):
        # Before other work on this machine; servers and contenders inherit it.
        os.nice(-15)
    servers = pinned([sys.executable, str(HERE / "proxy_cost_servers.py")], CORES[0], stdout=subprocess.PIPE, text=True)
    prefill, decode = map(int, servers.stdout.readline().split())
    rounds = {"no proxy": []} | {name: [] for name in options.only or CONTENDERS}
    try:
        await wait_ready(decode, None)
        for number in range(options.rounds):
            rounds["no proxy"].append(await measure(None, decode, options, False))
            for name in list(rounds)[1:]:
                port = free_port()
                argv = await command(name, folder, prefill, decode, port)
                try:
                    if argv is None:
                        raise RuntimeError("it cannot be installed here")
                    rounds[name].append(await contend(argv, port, options, number == 0))
                    print(f"  round {number + 1}, {name}: {rounds[name][-1]}", file=sys.stderr)
                except (RuntimeError, TimeoutError, OSError) as error:
                    print(f"{name}: skipped, {error}", file=sys.stderr)
                    del rounds[name]
    finally:
        servers.kill()
        servers.wait()
    show(rounds)


def main():
    """Options, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the table has their medians")
    parser.add_argument("--requests", type=int, default=1000, help="requests of the CPU and memory growth figures")
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' virtual environments; default: a temporary one"
    )
    parser.add_argument("--only", action="append", help="one contender by its name in the table; may be repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.peers or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        uvloop.run(compare(options, folder))


if __name__ == "__main__":
    main()
