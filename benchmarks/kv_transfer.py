"""How fast KV moves, and what it costs decode: pdbench's connector beside vLLM's own, in one table and one JSON file.

On a host with two GPUs (starts and stops its servers; the columns of NIXL, by reading and by writing, and of Mooncake come when their libraries can be
imported; Mooncake moves KV over NVLink as CUDA's copies between processes):
    python benchmarks/kv_transfer.py --out kv-transfer --connectors p2p-nccl,nixl,nixl-push,mooncake --limit-s 1200
With tensor parallelism on both sides (four GPUs), beside a single instance as wide:
    python benchmarks/kv_transfer.py --out kv-transfer-tp2 --connectors p2p-nccl --tensor-parallel 2 --requests 500
With the vLLM that still has P2pNcclConnector (0.10.2 - 0.23), into the same table:
    python benchmarks/kv_transfer.py --out kv-transfer --connectors builtin-p2p-nccl --requests 1000
On CPU, to try the benchmark itself:
    python benchmarks/kv_transfer.py --cpu --connectors tcp --requests 16 --concurrency 4 --model MODEL_FOLDER --out kv-transfer
The table again, from what was saved: python benchmarks/kv_transfer.py --out kv-transfer --connectors ''
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from kv_servers import CONNECTORS, Pair, Timed, available, metrics, start, wait_healthy

from pdbench.config import LoadConfig
from pdbench.http import get
from pdbench.load.clients import run_load
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock

KV_BYTES_PER_TOKEN = 27 * 576 * 2  # DeepSeek-V2-Lite: layers x (kv_lora_rank 512 + rope 64) x bfloat16
COPY_TOKENS = (512, 2048, 8192)

_random = random.Random(0)


def new_prompt(tokens: int, vocabulary: int) -> list[int]:
    """Random tokens: no prompt has a prefix that is cached."""
    return [_random.randrange(10, vocabulary) for _ in range(tokens)]


def quantile(values: list[float], q: float) -> float | None:
    """The q-th quantile (nearest rank), None of nothing."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


def plain_copies() -> dict[str, float | None]:
    """GB/s (1e9 bytes) of torch's copy from GPU 0 to GPU 1, for the KV bytes of each prompt length; None without two GPUs."""
    code = f"""
import json, torch
rates = {{}}
for tokens in {COPY_TOKENS}:
    count = tokens * {KV_BYTES_PER_TOKEN}
    a, b = (torch.empty(count, dtype=torch.uint8, device=f"cuda:{{i}}") for i in (0, 1))
    times = []
    for _ in range(30):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(); b.copy_(a); ended.record(); ended.synchronize()
        times.append(begun.elapsed_time(ended))
    rates[tokens] = count / sorted(times)[15] / 1e6
print(json.dumps(rates))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if ran.returncode != 0:
        print(f"plain copies were not measured: {ran.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {str(tokens): None for tokens in COPY_TOKENS}
    return dict(json.loads(ran.stdout))


def transfers(pair: Pair, requests: list[Timed], ranks: int) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The (send, receive) lines of the connector's event logs for each of these requests, one per rank, where all ranks have theirs;
    empty for connectors that write none."""
    sides: list[dict[str, list[dict[str, Any]]]] = [{}, {}]
    for role, side in zip(("prefill", "decode"), sides, strict=True):
        log = pair.folder / f"{pair.connector}-{role}.jsonl"
        for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
            if line["error"] is None:
                side.setdefault(line["transfer_id"], []).append(line)
    both = [tuple(side.get(timed.transfer_id or "", []) for side in sides) for timed in requests]
    return [(send, receive) for send, receive in both if len(send) == len(receive) == ranks]


def wire_seconds(sends: list[dict[str, Any]], receives: list[dict[str, Any]]) -> list[float]:
    """Seconds on the wire of each of the receiving ranks, by the side that waited less for the other."""
    by_rank = {send["rank"]: send["wire_s"] for send in sends}
    return [min(receive["wire_s"], by_rank[receive["rank"]]) for receive in receives]


def own_counters(pair: Pair) -> tuple[float, float]:
    """Bytes moved and seconds taken by the counters that vLLM's NIXL and Mooncake connectors keep, on whichever side does the work."""
    pages = [metrics(url) for url in pair.urls]
    names = [
        ("nixl_bytes_transferred", "mooncake_bytes_transferred"),
        ("nixl_xfer_time_seconds", "mooncake_xfer_time_seconds"),
    ]
    moved, seconds = (sum(page.get(f"vllm:{name}_sum", 0.0) for page in pages for name in each) for each in names)
    return moved, seconds


class Measurement:
    """All stages for one connector; `results` is what they measured, by name."""

    def __init__(self, pair: Pair, options: argparse.Namespace, until_s: float) -> None:
        self.pair, self.options, self.until_s = pair, options, until_s
        self.results: dict[str, Any] = {}
        self.proxy_url = self.late_url = ""  # the second one lets decode compute the first token

    async def run(self) -> None:
        """Stage after stage, while there is time; a stage that fails is recorded and the next one starts."""
        stages: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = [
            ("warm-up", self.warm_up),
            ("handoff", self.handoff),
            ("ttft", self.ttft),
            ("tbt", self.tbt_beside_transfers),
            ("load", self.load),
            ("arrivals", self.arrivals_without_kv),
        ]
        stages = [stage for stage in stages if stage[0] in ("warm-up", *self.options.stages.split(","))]
        with proxy(self.pair) as self.proxy_url, proxy(self.pair, "--first-token", "decode") as self.late_url:
            for name, stage in stages:
                if time.monotonic() > self.until_s:
                    self.results[f"{name} skipped"] = "no time was left"
                    continue
                begun_s = time.monotonic()
                try:
                    await stage()
                except Exception as error:
                    self.results[f"{name} failed"] = f"{type(error).__name__}: {error}"
                print(f"{self.pair.connector}: {name} {time.monotonic() - begun_s:.1f} s", file=sys.stderr)

    def prompt(self, tokens: int) -> list[int]:
        return new_prompt(tokens, self.options.vocabulary)

    async def warm_up(self) -> None:
        """Every shape once or more: kernels are compiled and the pair is connected."""
        for tokens in {512, 2048, self.options.long}:
            for _ in range(3):
                timed = await self.pair.ask(self.prompt(tokens), 8)
                if timed.error:
                    raise RuntimeError(timed.error)
            await self.pair.ask_single(self.prompt(tokens), 8)

    async def handoff(self) -> None:
        """One request at a time: bytes, wire rate and handoff of each length, from both sides' event logs. All ranks together move a
        request's bytes in the time of the slowest, and it is handed over when the last of them has said so. Either side's clock may count a wait
        for the other's launch as time on the wire: the shorter of the two is the wire's."""
        before = await asyncio.to_thread(own_counters, self.pair)
        for tokens in (512, 2048, self.options.long):
            requests = [await self.pair.ask(self.prompt(tokens), 2) for _ in range(self.options.repeat)]
            await asyncio.sleep(0.5)
            both = transfers(self.pair, requests, self.options.tensor_parallel)
            sizes = [sum(rank["bytes"] for rank in ranks) for _, ranks in both]
            on_wire = [(ranks, wire_seconds(sends, ranks)) for sends, ranks in both]
            rates = [size / max(seconds) / 1e9 for size, (_, seconds) in zip(sizes, on_wire, strict=True)]
            by_rank = [rank["bytes"] / took / 1e9 for each in on_wire for rank, took in zip(*each, strict=True)]
            handoffs = [
                (max(rank["reported_s"] for rank in ranks) - max(rank["ready_s"] for rank in sends)) * 1e3
                for sends, ranks in both
            ]
            # Of the slowest rank: how long its KV was copied on either side; and when, from the last one's KV being ready, the others were over.
            parts = {
                "gather": [max(rank["copy_s"] for rank in sends) for sends, _ in both],
                "scatter": [max(rank["copy_s"] for rank in ranks) for _, ranks in both],
            }
            for what, at, side in (
                ("sent", "first_byte_s", 0),
                ("at_decode", "first_byte_s", 1),
                ("in_blocks", "end_s", 1),
            ):
                parts[what] = [
                    max(rank[at] for rank in pair[side]) - max(rank["ready_s"] for rank in pair[0]) for pair in both
                ]
            self.results[f"wire {tokens}"] = {
                "gb_per_s_p50": quantile(rates, 0.5),
                "rank_gb_per_s_p50": quantile(by_rank, 0.5),
                "handoff_ms_p50": quantile(handoffs, 0.5),
                "handoff_ms_p99": quantile(handoffs, 0.99),
                "wire_ms_p50": quantile([max(seconds) * 1e3 for _, seconds in on_wire], 0.5),
                **{
                    f"{what}_ms_p50": quantile([1e3 * each for each in seconds], 0.5) for what, seconds in parts.items()
                },
                "bytes": sizes[0] if sizes else None,
                "transfers": len(both),
                "ttft_ms_p50": quantile([timed.ttft_ms for timed in requests if timed.ttft_ms is not None], 0.5),
                "failed": sum(timed.error is not None for timed in requests),
            }
        after = await asyncio.to_thread(own_counters, self.pair)
        moved, seconds = (b - a for a, b in zip(before, after, strict=True))
        if seconds > 0:
            self.results["own rate"] = {"gb_per_s": moved / seconds / 1e9}

    async def ttft(self) -> None:
        """One at a time, through the proxy and by the decode server alone in turn."""
        for tokens in (512, 2048, self.options.long):
            sides: dict[str, list[float]] = {"disaggregated": [], "single": []}
            for _ in range(3):
                for side, url in (("disaggregated", self.proxy_url), ("single", self.pair.single_url)):
                    done = await self.driven(url, 1, max(1, self.options.repeat // 3), tokens, 4)
                    sides[side] += done["ttfts"]
            self.results[f"ttft {tokens}"] = {f"{side}_ms_p50": quantile(ttfts, 0.5) for side, ttfts in sides.items()}

    async def tbt_beside_transfers(self) -> None:
        """Eight streams decode without a break; their gaps while KV arrives for others, and while it does not."""
        for name, busy in (("without", False), ("with", True)):
            # Where decode takes no request of its own, these streams have been through prefill, too.
            ask = self.pair.ask if len(self.pair.urls) > 2 else self.pair.ask_single
            streams = [asyncio.create_task(ask(self.prompt(64), self.options.stream_tokens)) for _ in range(8)]
            await asyncio.sleep(0.5)
            arrived = 0
            while busy and not any(stream.done() for stream in streams):
                await self.pair.ask(self.prompt(2048), 1)
                arrived += 1
            done = await asyncio.gather(*streams)
            # The first and last tokens, when not all eight run, are left out.
            gaps = [gap for timed in done for gap in timed.tbt_ms[20:-20]]
            self.results[f"tbt {name} transfers"] = {
                "p50_ms": quantile(gaps, 0.5),
                "p99_ms": quantile(gaps, 0.99),
                "transfers": arrived,
            }

    async def load(self) -> None:
        """2048 tokens in, 128 out: one at a time and many at a time; and as many streams that decode while no KV arrives."""
        many, repeat = self.options.concurrency, min(self.options.repeat, 10)
        for name, url, concurrency, requests, tokens, output in (
            ("load 1 at a time", self.proxy_url, 1, repeat, 2048, 128),
            (f"load {many} at a time", self.proxy_url, many, self.options.requests, 2048, 128),
            (
                f"load {many} at a time, decode's first token",
                self.late_url,
                many,
                self.options.requests // 4,
                2048,
                128,
            ),
            (f"decode alone, {many} streams", self.pair.single_url, many, many, 64, self.options.stream_tokens // 3),
        ):
            decode = self.pair.single_url if url == self.pair.single_url else self.pair.urls[1]
            before, cpu_s = await asyncio.to_thread(metrics, decode), self.pair.cpu_s()
            done = await self.driven(url, concurrency, requests, tokens, output)
            ttfts, gaps, seconds = done.pop("ttfts"), done.pop("gaps"), done.pop("second_gaps")
            self.results[name] = done | {
                "tbt_p50_ms": quantile(gaps, 0.5),
                "tbt_p99_ms": quantile(gaps, 0.99),
                "ttft_p50_ms": quantile(ttfts, 0.5),
                "second_token_p50_ms": quantile(seconds, 0.5),
                "second_token_p99_ms": quantile(seconds, 0.99),
            }
            after, cpu_s = await asyncio.to_thread(metrics, decode), self.pair.cpu_s() - cpu_s
            self.results[name] |= {  # an engine that the load ended has no counters
                "decode_steps": after["vllm:iteration_tokens_total_count"]
                - before["vllm:iteration_tokens_total_count"],
                "servers_cpu_ms_per_request": 1e3 * cpu_s / done["sent"],
            }

    async def arrivals_without_kv(self) -> None:
        """As many requests per second as the loaded pair served, at the single instance (decode alone), which has all but the last token of
        their prompts in its prefix cache: what arrivals cost the streams that decode beside them when no KV travels."""
        rate = self.results[f"load {self.options.concurrency} at a time"]["requests_per_s"]
        if rate is None:
            raise ValueError(f"--requests {self.options.requests} is not more than --concurrency: no rate to repeat")
        prompts = [self.prompt(2049) for _ in range(min(self.options.requests, 60))]
        for prompt in prompts:
            await self.pair.ask_single(prompt, 2)
        arriving = []
        for index in range(min(self.options.requests, 400)):
            await asyncio.sleep(_random.expovariate(rate))
            arriving.append(asyncio.create_task(self.pair.ask_single(prompts[index % len(prompts)], 128)))
        done = await asyncio.gather(*arriving)
        gaps = [gap for timed in done if timed.error is None for gap in timed.tbt_ms[2:]]
        self.results["arrivals without KV"] = {
            "requests": len(done),
            "failed": sum(timed.error is not None for timed in done),
            "requests_per_s": rate,
            **{f"tbt_p{100 * q:g}_ms": quantile(gaps, q) for q in (0.5, 0.99, 0.998)},
        }

    async def driven(self, url: str, concurrency: int, requests: int, tokens: int, output: int) -> dict[str, Any]:
        """A load of pdbench's client, after a warm-up of the same concurrency; latencies in ms of the requests that succeeded."""
        config = LoadConfig(
            concurrency=concurrency,
            requests=requests,
            warmup=2 * concurrency if requests > concurrency else 0,
            input_tokens=tokens,
            output_tokens=output,
            seed=_random.randrange(1 << 30),
            tokenizer=self.options.model,
        )
        result = await asyncio.to_thread(run_load, TrialLoad(config, url, "m", Clock.start(), trial=concurrency))
        measured = [request for request in result.requests if not request.warmup]
        good = [request for request in measured if request.error is None]
        return {
            "sent": len(result.requests),
            "requests": len(measured),
            "failed": len(measured) - len(good),
            "first_error": next((str(request.error) for request in measured if request.error), None),
            # Requests that are all sent at once have no rate.
            "requests_per_s": result.trial.client["achieved_rate_per_s"] if requests > concurrency else None,
            "flags": [f"{flag.name}: {flag.detail}" for flag in result.flags],
            "ttfts": [(r.token_s[0] - r.sent_s) * 1e3 for r in good if r.sent_s is not None],
            "gaps": [(b - a) * 1e3 for r in good for a, b in pairwise(r.token_s)],
            "second_gaps": [(r.token_s[1] - r.token_s[0]) * 1e3 for r in good if len(r.token_s) > 1],
        }


@contextmanager
def proxy(pair: Pair, *options: str) -> Iterator[str]:
    """pdbench's proxy in front of the pair; its URL."""
    command = [sys.executable, "-m", "pdbench", "proxy", "--port", "0", "--connector", pair.connector, *options]
    for side, url, kv in zip(("--prefill", "--decode"), pair.urls[:2], pair.kv, strict=True):
        command += [side, f"{url}@{kv}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            while get(url, "/health", timeout_s=2.0) is None:
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def judged(
    measured: dict[str, Any], copies: dict[str, float | None], options: argparse.Namespace
) -> list[tuple[str, float | None, float | None, float | None]]:
    """Per row: what, value, lower and upper bound; None where it was not measured, or has no such bound."""

    def get(name: str, key: str) -> float | None:
        value = measured.get(name, {}).get(key) if isinstance(measured.get(name), dict) else None
        return float(value) if value is not None else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    def difference(a: float | None, b: float | None) -> float | None:
        return a - b if a is not None and b is not None else None

    many = f"load {options.concurrency} at a time"

    def of_rank(name: str) -> float | None:
        """GB/s between two GPUs, as the plain copy has it; of one rank where what was saved names no ranks."""
        return get(name, "rank_gb_per_s_p50") or get(name, "gb_per_s_p50")

    share = ratio(of_rank("wire 2048"), copies.get("2048"))
    long = ratio(of_rank(f"wire {options.long}"), copies.get("8192"))
    extra = {
        tokens: difference(get(f"ttft {tokens}", "disaggregated_ms_p50"), get(f"ttft {tokens}", "single_ms_p50"))
        for tokens in (512, 2048, options.long)
    }
    late = get(f"{many}, decode's first token", "tbt_p99_ms")
    alone = get(f"decode alone, {options.concurrency} streams", "tbt_p99_ms")
    arriving = get("arrivals without KV", "tbt_p99_ms")
    # One gap in 127 is a handoff, which the gaps without KV lack: p99 of all is about p99.8 of the others.
    tail = ratio(get(many, "tbt_p99_ms"), get("arrivals without KV", "tbt_p99.8_ms"))
    cost = ratio(get("tbt with transfers", "p50_ms"), get("tbt without transfers", "p50_ms"))
    at_once = f"{options.concurrency} at a time"
    return [
        ("wire GB/s, 2048 tokens", get("wire 2048", "gb_per_s_p50"), None, None),
        ("wire GB/s of one rank, 2048 tokens", of_rank("wire 2048"), None, None),
        ("wire / plain copy, 2048 tokens", share, 0.9, None),
        (f"wire / plain copy, {options.long} tokens", long, 0.9, None),
        ("handoff p50 ms, 2048 tokens", get("wire 2048", "handoff_ms_p50"), None, 2),
        ("handoff p99 ms, 2048 tokens", get("wire 2048", "handoff_ms_p99"), None, None),
        *(
            (f"of it {what} p50 ms", get("wire 2048", f"{what}_ms_p50"), None, None)
            for what in ("gather", "wire", "scatter")
        ),
        *(
            (f"from KV ready until {what} p50 ms, 2048 tokens", get("wire 2048", f"{name}_ms_p50"), None, None)
            for name, what in (
                ("sent", "the first byte leaves"),
                ("at_decode", "it is at decode"),
                ("in_blocks", "all is in decode's blocks"),
            )
        ),
        ("TTFT p50 ms without a proxy, 2048 tokens", get("wire 2048", "ttft_ms_p50"), None, None),
        *((f"TTFT p50 ms more than single, {n} tokens", extra[n], None, 1 if n == 512 else None) for n in extra),
        (f"failed of {options.requests}, {at_once}", get(many, "failed"), None, 0),
        (f"TBT p99, {at_once} / p99.8 of as many arrivals without KV", tail, None, 1.15),
        (f"TBT p99 ms, {at_once}", get(many, "tbt_p99_ms"), None, None),
        (f"TBT p99 ms, {at_once}, decode's first token", late, None, None),
        ("TBT p99 ms, as many arrivals without KV", arriving, None, None),
        (f"TBT p99 ms, {options.concurrency} streams and no transfers", alone, None, None),
        *(
            (
                f"first to second token p50 ms, {n} at a time",
                get(f"load {n} at a time", "second_token_p50_ms"),
                None,
                None,
            )
            for n in (1, options.concurrency)
        ),
        ("TBT p50 with / without transfers", cost, 0.95, 1.05),
        (f"requests per second, {at_once}", get(many, "requests_per_s"), None, None),
        (f"CPU ms of both servers per request, {at_once}", get(many, "servers_cpu_ms_per_request"), None, None),
        ("GB/s by vLLM's own counters, all lengths", get("own rate", "gb_per_s"), None, None),
    ]


def table(results: dict[str, Any], options: argparse.Namespace) -> str:
    """One column per connector; a value that misses its target is marked with '!'."""
    names = [name for name in CONNECTORS if name in results["connectors"]]
    columns = {name: judged(results["connectors"][name], results["plain_copy_gb_per_s"], options) for name in names}
    lines = ["| | target | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for index in range(len(next(iter(columns.values()), []))):
        cells = []
        for name in names:
            what, value, least, most = columns[name][index]
            missed = value is not None and not (least or -inf) <= value <= (inf if most is None else most)
            cells.append("not measured" if value is None else f"{value:.3g}{' !' if missed else ''}")
        bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        lines.append(f"| {what} | {', '.join(bounds)} | " + " | ".join(cells) + " |")
    copies = ", ".join(f"{tokens} tokens {rate:.0f}" for tokens, rate in results["plain_copy_gb_per_s"].items() if rate)
    for name in names:  # why something was not measured, and the first request that failed
        measured = results["connectors"][name]
        lines += [f"{name}: {what}: {why}" for what, why in measured.items() if isinstance(why, str)]
        errors = [value.get("first_error") for value in measured.values() if isinstance(value, dict)]
        lines += [f"{name}: first failed request: {error}" for error in errors if error]
    return "\n".join([*lines, "", f"plain copy GPU to GPU, GB/s: {copies or 'not measured'}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kv-transfer_results"))
    parser.add_argument("--connectors", default="p2p-nccl,nixl", help="some of " + ",".join(CONNECTORS))
    parser.add_argument("--model", help="model folder (default: DeepSeek-V2-Lite's shape, made in --out)")
    parser.add_argument("--requests", type=int, default=2000, help="requests of the stage with many at a time")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=30, help="requests of each length in the stages one at a time")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the longest prompt")
    parser.add_argument("--stream-tokens", type=int, default=1500, help="output tokens of the streams beside transfers")
    parser.add_argument(
        "--stages", default="handoff,ttft,tbt,load,arrivals", help="which to measure; arrivals needs load"
    )
    parser.add_argument("--limit-s", type=float, default=480.0, help="no stage starts later than this")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each side")
    parser.add_argument("--cpu", action="store_true", help="serve on CPU, to try the benchmark itself")
    parser.add_argument("--vllm-args", default="--load-format dummy", help="more vLLM arguments for both servers")
    return parser.parse_args()


def main() -> None:
    """Measure, save, print."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    begun_s = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kv_transfer.json"
    if options.model is None:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from pdbench.serving.models import shape_model

        options.model = str(shape_model(options.out / "model"))
    options.vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"] - 10
    wanted = [name for name in options.connectors.split(",") if name]
    results = json.loads(path.read_text()) if path.exists() else {"connectors": {}, "plain_copy_gb_per_s": {}}
    if wanted and not options.cpu:
        results["plain_copy_gb_per_s"] = plain_copies()
    for name in wanted:
        if not available(name):
            print(f"{name}: its library cannot be imported here, left out", file=sys.stderr)
            continue
        for log in options.out.glob(f"{name}-*.jsonl"):
            log.unlink()
        arguments, width = options.vllm_args.split(), options.tensor_parallel
        pair = start(name, options.model, options.out, options.cpu, arguments, tensor_parallel=width)
        try:
            failure = wait_healthy(pair, max(10.0, options.limit_s - (time.monotonic() - begun_s)))
            if failure is not None:
                print(failure, file=sys.stderr)
                continue
            print(f"{name}: servers up after {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
            measurement = Measurement(pair, options, begun_s + options.limit_s)
            results["connectors"][name] = measurement.results  # saved as far as it came, whatever ends it
            asyncio.run(measurement.run())
        finally:
            pair.stop()
            results["options"] = {key: str(value) for key, value in vars(options).items()}
            path.write_text(json.dumps(results, indent=1))
    print(table(results, options))
    print(f"\n{path}: saved after {time.monotonic() - begun_s:.0f} s")


if __name__ == "__main__":
    main()
