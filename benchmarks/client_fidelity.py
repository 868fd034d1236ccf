"""How far load clients are from the truth: clients on one core, on another a server whose every token time is known.

The truth of a run is what the server's log says: request in its kernel -> token handed to its kernel, the server's own lateness
included, so a client is charged for its own error alone. CPU is the client's process tree between first request and last token.
Try: python benchmarks/client_fidelity.py --streams 200 --rounds 5 --clients pdbench,vllm
"""

import argparse
import contextlib
import io
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy
import psutil
from rich.console import Console
from rich.table import Table

from pdbench.load.connection import enable_stamps

HERE = Path(__file__).parent
SERVER_CORE, CLIENT_CORE = 0, 1


@dataclass(frozen=True)
class Load:
    """What every client is asked to send: `rounds` times `streams` requests of `tokens` tokens, `streams` at once."""

    streams: int
    rounds: int
    tokens: int
    ttft_ms: float
    itl_ms: float

    @property
    def requests(self) -> int:
        return self.streams * self.rounds


@dataclass(frozen=True)
class Figures:
    """What a client reports (or the truth): seconds per request to its first token, seconds between tokens."""

    ttft_s: numpy.ndarray
    itl_s: numpy.ndarray
    note: str = ""

    def quantiles_ms(self) -> list[float]:
        ttft, itl = self.ttft_s * 1e3, self.itl_s * 1e3
        return [*numpy.quantile(ttft, [0.5, 0.99]), *numpy.quantile(itl, [0.5, 0.99])]


def pinned(core: int) -> Callable[[], None]:
    """For server and clients alike: a core of its own and, where permitted, real-time priority against the machine's other work."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))

    return prepare


class Server:
    """The scripted server, pinned to its core."""

    def __init__(self, load: Load) -> None:
        command = [sys.executable, HERE / "token_server.py", f"--ttft-ms={load.ttft_ms}", f"--itl-ms={load.itl_ms}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=pinned(SERVER_CORE), text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> list[dict]:
        with urllib.request.urlopen(f"{self.url}/log", timeout=60) as answer:
            return sorted(json.load(answer), key=lambda entry: entry["arrival_s"])


class CpuWatch:
    """CPU seconds of a process tree against time, read every 50 ms, so that start-up can be cut off afterwards."""

    def __init__(self, pid: int) -> None:
        self.readings: list[tuple[float, float]] = []
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        seen: dict[int, float] = {}
        while not self._stop.wait(0.05):
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    times = process.cpu_times()
                    seen[process.pid] = times.user + times.system
            except psutil.Error:
                pass
            self.readings.append((time.monotonic(), sum(seen.values())))

    def between(self, start_s: float, end_s: float) -> float:
        self._stop.set()
        self._thread.join()
        instants, seconds = zip(*self.readings, strict=True)
        return float(numpy.interp(end_s, instants, seconds) - numpy.interp(start_s, instants, seconds))


def run_client(command: list[str], folder: Path) -> CpuWatch:
    """Run one client to its end on the client core; its output goes to a log in `folder`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "client.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=pinned(CLIENT_CORE), env=environment, cwd=HERE.parent
        )
        watch = CpuWatch(process.pid)
        try:
            code = process.wait(timeout=400)
        except BaseException:
            process.kill()
            raise
    if code:
        raise RuntimeError((folder / "client.log").read_text()[-1500:])
    return watch


def pdbench(load: Load, url: str, folder: Path, options: argparse.Namespace) -> tuple[CpuWatch, Figures]:
    """Ours: run_load in a process of its own (this file with --as-client)."""
    out = folder / "records.json"
    watch = run_client(
        [
            sys.executable,
            __file__,
            "--as-client",
            json.dumps([url, vars(load), str(out), options.processes, options.viewers]),
        ],
        folder,
    )
    written = json.loads(out.read_text())
    itl = numpy.concatenate([numpy.diff(record["token_s"]) for record in written["requests"]])
    ttft = numpy.array([record["token_s"][0] - record["sent_s"] for record in written["requests"]])
    client = written["client"]
    note = f"{options.viewers} viewers; " if options.viewers else ""
    note += f"{client['cpu_us_per_token']:.1f} us/token in the loop; {written['bytes_per_token']:.0f} B/token kept"
    return watch, Figures(ttft, itl, f"{note}; {'marked client-limited' if written['limited'] else 'not marked'}")


def as_client(url: str, load: dict, out: str, processes: int, viewers: int) -> None:
    """The process that is measured: one trial, its records written once it has ended; with `viewers`, live pages that follow it."""
    from pdbench.config import LiveConfig, LoadConfig
    from pdbench.live import publisher
    from pdbench.load.clients import run_load
    from pdbench.load.plan import TrialLoad
    from pdbench.records import Clock

    streams, rounds, tokens = load["streams"], load["rounds"], load["tokens"]
    config = LoadConfig(
        concurrency=streams, requests=streams * rounds, output_tokens=tokens, warmup=streams, client_processes=processes
    )
    # As a command is started: a viewer would inherit what `pinned` gave; the client takes its own priority.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with contextlib.ExitStack() as watching:
        if viewers:
            printed = io.StringIO()
            watching.enter_context(publisher.opened(LiveConfig(live=True), Console(file=printed, width=300)))
            page = printed.getvalue().split()[-1].replace("/?", "/events?")
            publisher.put(publisher.Turn("bench", 0, vars(config)))
            for _ in range(viewers):
                follower = subprocess.Popen(["curl", "--silent", "--retry", "9", page], stdout=subprocess.DEVNULL)
                watching.callback(follower.kill)
        result = run_load(TrialLoad(config, url, "scripted", Clock.start()), publisher.put)
    measured = [record for record in result.requests if not record.warmup]
    kept = sum(len(record.token_s) for record in result.requests)
    written = {
        "requests": [{"sent_s": record.sent_s, "token_s": record.token_s} for record in measured],
        "client": result.trial.client,
        "limited": any(flag.name == "client-limited" for flag in result.flags),
        "bytes_per_token": size_of(result.requests, set()) / kept,
    }
    Path(out).write_text(json.dumps(written))


def size_of(kept: Any, seen: set[int]) -> int:
    """The bytes of a value and all in it that is not `seen`. The process grows by more: imports, sockets, steps of a mebibyte."""
    if id(kept) in seen:
        return 0
    seen.add(id(kept))
    if isinstance(kept, dict):
        parts = [*kept, *kept.values()]
    elif isinstance(kept, msgspec.Struct):
        parts = [getattr(kept, name) for name in kept.__struct_fields__]
    else:
        parts = kept if isinstance(kept, list | tuple) else []
    return sys.getsizeof(kept) + sum(size_of(part, seen) for part in parts)


def bare(load: Load, url: str, folder: Path, options: argparse.Namespace) -> tuple[CpuWatch, Figures]:
    """No client but the floor: a loop that receives with kernel stamps and throws the bytes away; its CPU alone counts."""
    watch = run_client([sys.executable, __file__, "--as-bare", json.dumps([url, vars(load)])], folder)
    return watch, Figures(numpy.array([]), numpy.array([]), "receives, records nothing")


def as_bare(url: str, load: dict) -> None:
    """The process behind `bare`: warm-up and rounds as the clients', one epoll loop, recvmsg, no parsing but for the end."""
    body = json.dumps({"max_tokens": load["tokens"]}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    epoll, socks = select.epoll(), {}
    for _ in range(load["streams"]):
        sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        enable_stamps(sock)
        epoll.register(sock, select.EPOLLIN)
        socks[sock.fileno()] = sock
        sock.send(request)
    left = load["streams"] * load["rounds"]
    ended = 0
    while ended < load["streams"] * (load["rounds"] + 1):
        for descriptor, _ in epoll.poll():
            data = socks[descriptor].recvmsg(65536, 128)[0]
            if data.endswith(b"\r\n0\r\n\r\n"):
                ended += 1
                if left:
                    left -= 1
                    socks[descriptor].send(request)


def vllm(load: Load, url: str, folder: Path, options: argparse.Namespace) -> tuple[CpuWatch, Figures]:
    """`vllm bench serve` by its own entry point."""
    script = "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser(); "
    script += "add_cli_args(p); main(p.parse_args())"
    arguments = f"--base-url {url} --model scripted --backend openai --endpoint /v1/completions --dataset-name random"
    arguments += (
        f" --random-input-len 16 --random-output-len {load.tokens} --num-prompts {load.requests} --disable-tqdm"
    )
    arguments += (
        f" --max-concurrency {load.streams} --num-warmups {load.streams} --ignore-eos --save-result --save-detailed"
    )
    out = folder / "vllm.json"
    command = [
        sys.executable,
        "-c",
        script,
        *arguments.split(),
        "--tokenizer",
        options.tokenizer,
        "--result-filename",
        str(out),
    ]
    watch = run_client(command, folder)
    written = json.loads(out.read_text())
    return watch, Figures(
        numpy.array(written["ttfts"]), numpy.concatenate([numpy.array(itls) for itls in written["itls"]])
    )


def aiperf(load: Load, url: str, folder: Path, options: argparse.Namespace) -> tuple[CpuWatch, Figures]:
    """AIPerf, from the environment that --aiperf names."""
    arguments = (
        f"profile --model scripted --url {url} --endpoint-type completions --streaming --concurrency {load.streams}"
    )
    arguments += f" --request-count {load.requests} --warmup-request-count {load.streams} --isl 16 --osl {load.tokens}"
    arguments += " --ui none --export-level records"
    command = [options.aiperf, *arguments.split(), "--tokenizer", options.tokenizer, "--artifact-dir", str(folder)]
    watch = run_client(command, folder)
    rows = [json.loads(line) for line in next(folder.rglob("profile_export.jsonl")).read_text().splitlines()]
    rows = [row["metrics"] for row in rows if row["metadata"]["benchmark_phase"] == "profiling"]
    ttft = numpy.array([row["time_to_first_token"]["value"] for row in rows]) / 1e3
    itl = numpy.concatenate([row["inter_chunk_latency"]["value"] for row in rows]) / 1e3
    return watch, Figures(ttft, itl, "ITL is its inter-chunk latency")


def truth_of(log: list[dict], load: Load) -> tuple[Figures, float, float]:
    """The measured requests' true figures, and the interval in which they ran (instants of the monotonic clock)."""
    log = log[-load.requests :]
    ttft = numpy.array([entry["sends_s"][0] - entry["arrival_s"] for entry in log])
    itl = numpy.concatenate([numpy.diff(entry["sends_s"]) for entry in log])
    late_ms = max(entry["sends_s"][0] - entry["due_s"] for entry in log) * 1e3
    note = f"the server itself was up to {late_ms:.1f} ms late"
    return Figures(ttft, itl, note), log[0]["arrival_s"], max(entry["sends_s"][-1] for entry in log)


CLIENTS = {"bare": bare, "pdbench": pdbench, "vllm": vllm, "aiperf": aiperf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="requests per stream")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per request")
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--clients", default="bare,pdbench,vllm,aiperf")
    parser.add_argument("--processes", type=int, default=1, help="--client-processes of ours")
    parser.add_argument(
        "--viewers", default="0", help="live pages (--live) that follow ours; 0,20: without and with, in turns"
    )
    parser.add_argument("--turns", type=int, default=1, help="how often every client is measured")
    parser.add_argument("--tokenizer", default="", help="folder that vllm and aiperf need; default: the tiny model's")
    parser.add_argument("--aiperf", default="aiperf", help="its executable, in an environment of its own")
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    parser.add_argument("--as-bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_client:
        return as_client(*json.loads(options.as_client))
    if options.as_bare:
        return as_bare(*json.loads(options.as_bare))
    if not options.tokenizer:
        from pdbench.serving.models import tiny_model

        options.tokenizer = str(tiny_model())
    load = Load(options.streams, options.rounds, options.tokens, options.ttft_ms, options.itl_ms)
    rate = load.streams / load.itl_ms * 1e3
    table = Table(
        title=f"{load.streams} streams, {rate:,.0f} tokens/s asked, {load.requests * load.tokens:,} tokens; error = reported - true, ms"
    )
    for column in (
        "client",
        "TTFT p50",
        "error",
        "TTFT p99",
        "error",
        "ITL p50",
        "error",
        "ITL p99",
        "error",
        "CPU us/token",
        "note",
    ):
        table.add_column(column, justify="left" if column in ("client", "note") else "right")
    pages = [int(count) for count in options.viewers.split(",")]
    for name in options.clients.split(",") * options.turns:
        for viewers in pages if name == "pdbench" else [0]:
            options.viewers = viewers
            add_rows(table, name, load, options)
    Console(width=200).print(table)
    return None


def add_rows(table: Table, name: str, load: Load, options: argparse.Namespace) -> None:
    """One client's run: its row and that of the truth it ran against."""
    with Server(load) as server, tempfile.TemporaryDirectory() as folder:
        try:
            watch, reported = CLIENTS[name](load, server.url, Path(folder), options)
        except (FileNotFoundError, RuntimeError, StopIteration, KeyError) as error:
            table.add_row(name, *["-"] * 9, f"skipped: {str(error).strip().splitlines()[-1][:100]}")
            return
        truth, start_s, end_s = truth_of(server.log(), load)
    true_ms = truth.quantiles_ms()
    cells = ["-"] * 8
    if len(reported.ttft_s):
        pairs = zip(reported.quantiles_ms(), true_ms, strict=True)
        cells = [
            cell for reported_ms, exact_ms in pairs for cell in (f"{reported_ms:.2f}", f"{reported_ms - exact_ms:+.2f}")
        ]
    cpu_us = watch.between(start_s, end_s) / (load.requests * load.tokens) * 1e6
    table.add_row(name, *cells, f"{cpu_us:.1f}", reported.note)
    table.add_row(
        "  the truth", *[cell for true in true_ms for cell in (f"{true:.2f}", "")], "", truth.note, style="dim"
    )


if __name__ == "__main__":
    main()
