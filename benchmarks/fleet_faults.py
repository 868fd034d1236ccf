"""Several prefill and several decode instances under load: does every pair hand over, is the load spread, what do clients see of a kill?

Starts `pdbench serve --restarts 2`, with other options of it behind `--`, and sends loads through its proxy: many requests at a time;
requests that arrive at random while a decode instance is killed, then while a prefill instance is; many at a time again, on the servers
that were started in their place. One table, one JSON file; exit code 1 where a check fails.
On four GPUs:
    python benchmarks/fleet_faults.py --out fleet -- recipes/gpu-1p1d-graphs.toml --load-format dummy --model MODEL
On CPU, to try the benchmark itself:
    python benchmarks/fleet_faults.py --out fleet --at-once 4 --requests 32 --rate 2 --input-tokens 64 --output-tokens 32
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from pdbench import events
from pdbench.config import LoadConfig
from pdbench.http import get
from pdbench.load.clients import run_load
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, RequestRecord
from pdbench.serving import deployment as deployments
from pdbench.serving.deployment import DeploymentInfo, ServerInfo

PATIENCE_S = 240.0


class Fleet:
    """`pdbench serve` that runs, and the loads that are sent through it; `results` by load, `problems` in words."""

    def __init__(self, options: argparse.Namespace, info: DeploymentInfo) -> None:
        self.options, self.info = options, info
        self.results: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.names = {server.url: server.name for server in info.servers}
        roles = [[server.name for server in info.servers if server.role == role] for role in ("prefill", "decode")]
        self.prefills, self.decodes = roles

    def send(self, name: str, victim: str | None = None, **load: Any) -> None:
        """One load. With a `victim`, that server is killed when a third of the load has been sent, and awaited."""
        options, kills, returns = self.options, [], []
        load |= {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
        config = LoadConfig(tokenizer=self.info.model_path, seed=len(self.results) + 1, **load)
        sent = TrialLoad(config, self.info.url, self.info.model_name, Clock.start(), trial=len(self.results))
        before = self.server(victim) if victim else None

        def strike() -> None:
            assert before
            kills.append(kill(before))
            returns.append(self.wait_until_back(before))

        timer = threading.Timer(options.seconds / 3, strike)

        def begin() -> None:
            if before:
                timer.start()

        requests = [request for request in run_load(sent, on_begin=begin).requests if not request.warmup]
        timer.cancel()
        if before:
            timer.join()
        time.sleep(1.0)  # the logs are written by threads
        self.results[name] = self.measured(name, requests, victim, kills[0] if kills else None)
        if before and not kills:
            self.problems.append(f"{name}: the load was over before the kill")
        elif before and not returns:
            raise TimeoutError(f"{victim} did not come back")
        elif before:
            self.results[name]["back after s"] = round(returns[0] - kills[0], 1)

    def measured(
        self, name: str, requests: Sequence[RequestRecord], victim: str | None, kill_s: float | None
    ) -> dict[str, Any]:
        """What clients saw, and what the servers' logs say of the same requests."""
        logged: list[events.Event] = []
        for path in (self.options.out / "logs").glob("*.events.jsonl"):
            logged += events.parse(path.read_bytes().splitlines())
        ids = {request.id for request in requests}
        ways = {e.request_id: e for e in logged if isinstance(e, events.ProxyEvent) and e.request_id in ids}
        arrived = {
            e.transfer_id for e in logged if isinstance(e, events.TransferEvent) and e.side == "receive" and not e.error
        }
        pairs = Counter(
            (self.name(way.prefill), self.name(way.decode)) for way in ways.values() if way.transfer_id in arrived
        )
        failed = [request for request in requests if request.error]
        unharmed = [r for r in failed if victim is None or (w := ways.get(r.id)) is None or victim not in self.of(w)]
        if unharmed:
            self.problems.append(
                f"{name}: {len(unharmed)} failed that were not at a killed server: {unharmed[0].error}"
            )
        missing = [pair for pair in itertools.product(self.prefills, self.decodes) if not pairs[pair]]
        if missing and not victim:
            self.problems.append(f"{name}: nothing was handed over by {' and '.join(map(' to '.join, missing))}")
        at_decode = {server: self.at_once(ways.values(), server) for server in self.decodes}
        if not victim and max(at_decode.values()) > 1.5 * min(at_decode.values()) + 1:
            self.problems.append(f"{name}: load is not spread over decode instances: {at_decode} requests at a time")
        good = [request for request in requests if not request.error]
        gaps = [(b - a) * 1e3 for request in good for a, b in pairwise(request.token_s)]
        ttfts = sorted((r.token_s[0] - r.sent_s) * 1e3 for r in good if r.token_s and r.sent_s is not None)
        struck = [w for w in ways.values() if kill_s and victim in self.of(w) and is_under_way(w, kill_s)]
        return {
            "requests": len(requests),
            "failed": len(failed),
            "errors": Counter(f"{r.error.kind}: {r.error.message[:120]}" for r in failed if r.error),
            "at the victim when it was killed": len(struck) if victim else None,
            "of them failed": sum(w.request_id in {r.id for r in failed} for w in struck) if victim else None,
            "retried": sum(way.retries > 0 for way in ways.values()),
            "ttft_ms_p50": round(ttfts[len(ttfts) // 2], 1) if ttfts else None,
            "ttft_ms_max": round(ttfts[-1], 1) if ttfts else None,
            "gap_ms_max": round(max(gaps), 1) if gaps else None,
            "handed over": {" to ".join(pair): count for pair, count in sorted(pairs.items())},
            "requests at a time, mean": at_decode,
            "prompts": Counter(self.name(way.prefill) for way in ways.values()),
        }

    def at_once(self, ways: Any, server: str) -> float:
        """Mean requests in flight at a decode instance while the load ran."""
        spans = [
            (w.decode_sent_s, w.last_byte_s, self.name(w.decode)) for w in ways if w.decode_sent_s and w.last_byte_s
        ]
        seconds = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
        return round(sum(end - begin for begin, end, name in spans if name == server) / seconds, 1)

    def name(self, url: str | None) -> str:
        return self.names.get(url or "", "none")

    def of(self, way: events.ProxyEvent) -> tuple[str, str]:
        return self.name(way.prefill), self.name(way.decode)

    def server(self, name: str) -> ServerInfo:
        info = deployments.find(self.options.out / "logs", self.info.url)
        assert info is not None, "pdbench serve has ended: read its log"
        return next(server for server in info.servers if server.name == name)

    def wait_until_back(self, before: ServerInfo) -> float:
        """When the proxy sends requests to the restarted server. Raises TimeoutError."""
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            answer = get(self.info.url, "/instances", timeout_s=2.0)
            listed = json.loads(answer)["instances"] if answer else []
            healthy = {instance["url"] for instance in listed if instance["healthy"]}
            if self.server(before.name).pids != before.pids and before.url in healthy:
                return time.monotonic()
            time.sleep(0.2)
        raise TimeoutError(f"{before.name} did not come back")


def is_under_way(way: events.ProxyEvent, instant_s: float) -> bool:
    return (way.received_s or 0) <= instant_s and (way.last_byte_s is None or way.last_byte_s >= instant_s)


def kill(server: ServerInfo) -> float:
    """SIGKILL to all its processes but the supervisor; when that was."""
    for process in psutil.Process(server.pids[0]).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return time.monotonic()


@contextmanager
def serving(options: argparse.Namespace) -> Any:
    """`pdbench serve` until the block's end; what it says of itself."""
    logs = options.out / "logs"
    command = [sys.executable, "-m", "pdbench", "serve", *options.serve, "--restarts", "2", "--log-dir", str(logs)]
    command += ["--prefill-instances", str(options.prefill), "--decode-instances", str(options.decode)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (options.out / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            url = next((line.split()[1] for line in process.stdout if line.startswith("ready:")), None)
            info = deployments.find(logs, url) if url else None
            if info is None:
                raise SystemExit(f"pdbench serve did not start: read {log.name} and {logs}")
            threading.Thread(target=lambda: log.writelines(process.stdout or ()), daemon=True).start()
            yield info
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per figure, one column per load."""
    rows: dict[str, list[str]] = {}
    for number, measured in enumerate(results.values()):
        for what, value in measured.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, each in parts:
                row = rows.setdefault(f"{what}: {part}" if part else what, ["-"] * len(results))
                row[number] = "-" if each is None else str(each)
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    return "\n".join([*lines, *(f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items())])


def main() -> int:
    """Measure, save, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fleet_results"))
    parser.add_argument("--prefill", type=int, default=2, help="prefill instances")
    parser.add_argument("--decode", type=int, default=2, help="decode instances")
    parser.add_argument("--at-once", type=int, default=64, help="requests at a time per decode instance")
    parser.add_argument("--requests", type=int, default=500, help="requests of the loads with many at a time")
    parser.add_argument("--rate", type=float, default=16.0, help="requests per second while servers are killed")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long these loads last")
    parser.add_argument("--input-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("serve", nargs="*", help="behind --: a recipe and options of pdbench serve")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, begin_s = options.out / "fleet_faults.json", time.monotonic()
    with serving(options) as info:
        fleet = Fleet(options, info)
        print(f"served after {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
        many = {"concurrency": options.at_once * options.decode, "requests": options.requests}
        arriving = {"rate": options.rate, "requests": round(options.rate * options.seconds), "warmup": 0}
        decode, prefill = fleet.decodes[-1], fleet.prefills[-1]
        loads: list[tuple[str, str | None, dict[str, Any]]] = [
            (f"{many['concurrency']} at a time", None, many),
            (f"{decode} killed", decode, arriving),
            (f"{prefill} killed", prefill, arriving),
            (f"{many['concurrency']} at a time, again", None, many),
        ]
        for name, victim, load in loads:
            try:
                fleet.send(name, victim, **load)
            except (AssertionError, TimeoutError) as error:
                fleet.problems.append(f"{name}: {error}")
                break
            finally:
                saved = {"results": fleet.results, "problems": fleet.problems}
                path.write_text(
                    json.dumps(saved | {"options": {k: str(v) for k, v in vars(options).items()}}, indent=1)
                )
            print(f"{name}: over after {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
    print(table(fleet.results))
    print("\n".join(["", *(fleet.problems or ["all checks passed"])]))
    return 1 if fleet.problems else 0


if __name__ == "__main__":
    sys.exit(main())
