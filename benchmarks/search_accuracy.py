"""How well, and with how much load, tools find the highest rate within an SLO: pdbench search, AIPerf's search, `vllm bench serve` at rates.

Scripted servers (law_server.py, real sockets) have a highest rate that is known: of an M/D/1 prefill by Crommelin's formula, of decode in
a limited number of slots by a long simulation of the same law. Every tool searches each server up to --runs times by its own command. Printed are, per tool
and server, the error of the rate found, how many runs came within 3 %, and the seconds and requests of load. vLLM's
sweep explores rates without looking for one: its ten rates, evenly spaced, are judged by its own goodput and interpolated.
All get the same time, in turns; after --minutes what was found is the table, after every search it is saved in --out. A search that found
nothing stands below the table with its reason.
Try: python benchmarks/search_accuracy.py --minutes 20 --peers ~/peers --out accuracy.json
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stream_tools

sys.path.insert(0, str(Path(__file__).parents[1]))
from pdbench.search.evidence import waits

HERE = Path(__file__).parent
ATTAIN, TOKENS = 0.95, 8
REQUESTS = 500
"""Per load, of every tool."""


@dataclass(frozen=True)
class Server:
    """A law and the SLO on it, in ms."""

    name: str
    prefill_ms: float
    itl_ms: float
    slots: int
    ttft_ms: float
    tbt_ms: float

    def truth(self) -> float:
        """The highest rate, to 0.1 %."""
        low, high = 0.01, 1e3 / self.prefill_ms
        if self.slots < 64:
            high = min(high, self.slots / (self.itl_ms * (TOKENS - 1) / 1e3))
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.attained(middle) >= ATTAIN else (low, middle)
        return low

    def attained(self, rate: float) -> float:
        service_s, limit_s = self.prefill_ms / 1e3, self.ttft_ms / 1e3
        if self.slots >= 64:  # M/D/1: P(wait <= t), Crommelin 1932
            wait_s = limit_s - service_s
            terms = range(int(wait_s // service_s) + 1)
            loads = [rate * (k * service_s - wait_s) for k in terms]
            return (1 - rate * service_s) * sum(
                load**k / math.factorial(k) * math.exp(-load) for k, load in zip(terms, loads, strict=True)
            )
        unit_s = np.cumsum(np.random.default_rng(1).exponential(size=1_000_000)) / rate
        wait_s = waits(unit_s, np.full(len(unit_s), service_s))
        first_s = unit_s + wait_s + service_s
        decode_s = self.itl_ms * (TOKENS - 1) / 1e3
        slot_s = np.zeros(len(first_s))
        for slot in range(self.slots):  # equal durations in order of arrival: every slot takes each slots-th
            slot_s[slot :: self.slots] = waits(
                first_s[slot :: self.slots], np.full(len(first_s[slot :: self.slots]), decode_s)
            )
        tbt_ms = (slot_s + decode_s) / (TOKENS - 1) * 1e3
        return float(((wait_s + service_s <= limit_s) & (tbt_ms <= self.tbt_ms))[50_000:].mean())


SERVERS = (
    Server("prefill, M/D/1", 10.0, 2.0, 64, 30.0, 20.0),
    Server("decode, 4 slots", 2.5, 12.5, 4, 30.0, 20.0),
)


@dataclass(frozen=True)
class Found:
    rate: float
    load_s: float
    requests: int


@contextmanager
def served(server: Server) -> Iterator[str]:
    """The server in a process; its URL."""
    command = [
        sys.executable,
        HERE / "law_server.py",
        "--prefill-ms",
        server.prefill_ms,
        "--itl-ms",
        server.itl_ms,
        "--slots",
        server.slots,
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def run(arguments: list[object], folder: Path, until_s: float) -> None:
    """A command to its end, with all that it started. Raises RuntimeError with its last line where it fails or takes too long."""
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeError("it was not done when the time was up, raise --minutes") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        last = (folder / "output.txt").read_text(errors="replace").strip()[-300:]
        raise RuntimeError(f"exit code {code}: {last}")


def search_pdbench(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool, until_s: float) -> Found:
    slo = f"ttft={server.ttft_ms},tbt={server.tbt_ms}"
    arguments = ["--url", url, "--model", "scripted", "--slo", slo, "--output-tokens", TOKENS, "--requests", REQUESTS]
    run(
        [
            tool.python,
            "-m",
            "pdbench",
            "search",
            *arguments,
            "--seed",
            100 * seed,
            "--no-power",
            "--out",
            folder / "search",
        ],
        folder,
        until_s,
    )
    document = json.loads((folder / "search" / "search.json").read_text())
    (entry,) = document["deployments"]
    if entry["rate_per_s"] is None or entry["high"] is None:
        raise RuntimeError(document["sentence"])
    return Found(entry["rate_per_s"], entry["load_s"], entry["requests"])


def search_aiperf(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool, until_s: float) -> Found:
    """Doubling and bisection on whole rates (its monotonic planner), good requests by its own goodput."""
    arguments = ["--model", "scripted", "--url", url, "--endpoint-type", "completions", "--streaming", "--ui", "none"]
    arguments += ["--tokenizer", tool.tokenizer, "--synthetic-input-tokens-mean", 16, "--output-tokens-mean", TOKENS]
    arguments += ["--extra-inputs", f"max_tokens:{TOKENS}", "--extra-inputs", "ignore_eos:true", "--random-seed", seed]
    arguments += ["--request-rate", 16, "--arrival-pattern", "poisson", "--request-count", REQUESTS]
    arguments += ["--goodput", f"time_to_first_token:{server.ttft_ms} inter_token_latency:{server.tbt_ms}"]
    arguments += ["--search-space", "phases.profiling.rate:4,400:int", "--search-planner", "monotonic-sla"]
    arguments += [
        "--search-metric",
        "good_request_fraction",
        "--search-direction",
        "maximize",
        "--search-max-iterations",
        20,
    ]
    arguments += ["--search-sla", f"good_request_fraction:avg:ge:{ATTAIN}", "--artifact-dir", folder / "aiperf"]
    run([tool.python.parent / "aiperf", "profile", *arguments], folder, until_s)
    history = json.loads(next((folder / "aiperf").rglob("search_history.json")).read_text())
    sent = [next(iter(each["variation_values"].values())) for each in history["iterations"]]
    return Found(
        float(history["boundary_summary"]["feasible_max"]["value"]),
        sum(REQUESTS / rate for rate in sent),
        REQUESTS * len(sent),
    )


def search_vllm(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool, until_s: float) -> Found:
    """Ten rates, evenly spaced up to what one request at a time and all at once would give, as its sweep has them."""
    script = "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser(); "
    script += "add_cli_args(p); main(p.parse_args())"
    common = [
        "--base-url",
        url,
        "--model",
        "scripted",
        "--backend",
        "openai",
        "--endpoint",
        "/v1/completions",
        "--disable-tqdm",
    ]
    common += [
        "--dataset-name",
        "random",
        "--random-input-len",
        8,
        "--random-output-len",
        TOKENS,
        "--num-prompts",
        REQUESTS,
    ]
    common += ["--tokenizer", tool.tokenizer, "--ignore-eos", "--num-warmups", 0, "--save-result", "--seed", seed]
    common += ["--goodput", f"ttft:{server.ttft_ms}", f"tpot:{server.tbt_ms}", "--ready-check-timeout-sec", 0]

    def level(name: str, *more: object) -> tuple[float, float, float]:
        """(rate reached, share of good requests, seconds)."""
        run([tool.python, "-c", script, *common, "--result-filename", folder / name, *more], folder, until_s)
        row = json.loads((folder / name).read_text())
        return row["request_throughput"], row["request_goodput"] / row["request_throughput"], row["duration"]

    serial, batch = level("serial.json", "--max-concurrency", 1), level("batch.json", "--max-concurrency", REQUESTS)
    rates = np.linspace(math.ceil(serial[0]), math.floor(batch[0]), 10)[1:-1]
    levels = [
        (rate, *level(f"{rate:.0f}.json", "--request-rate", f"{rate:.0f}")[1:]) for rate in np.unique(np.round(rates))
    ]
    if serial[1] < ATTAIN:
        raise RuntimeError("one request at a time misses the SLO on this machine")
    rate = 0.0
    for (low, above, _), (high, below, _) in zip([serial, *levels], levels, strict=False):
        if below < ATTAIN:
            rate = low + (high - low) * (above - ATTAIN) / (above - below)
            break
        rate = high
    spent_s = serial[2] + batch[2] + sum(seconds for _, _, seconds in levels)
    return Found(float(rate), spent_s, REQUESTS * (len(levels) + 2))


SEARCHES: dict[str, Callable[..., Found]] = {
    "pdbench": search_pdbench,
    "aiperf": search_aiperf,
    "vllm": search_vllm,
}


Key = tuple[str, str]
"""A tool and a server, by name."""


def table(found: dict[Key, list[Found | str]], truths: dict[str, float]) -> str:
    """A row per tool and server, then why searches found nothing; a text is such a reason."""
    lines = ["| tool | server | true rate /s | median error | largest | within 3 % | load s | requests |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for (tool, server), searches in found.items():
        whole, truth = [each for each in searches if isinstance(each, Found)], truths[server]
        failed = len(searches) - len(whole)
        row = f"| {tool} | {server} | {truth:.2f} |"
        if whole:
            errors = abs(np.array([each.rate / truth - 1 for each in whole])) * 100
            row += f" {np.median(errors):.1f} % | {errors.max():.1f} % | {(errors <= 3).sum()} of {len(whole)}"
            row += f"{f', {failed} failed' if failed else ''} | {np.median([each.load_s for each in whole]):.0f}"
            row += f" | {np.median([each.requests for each in whole]):.0f} |"
        else:
            row += f" | | {failed} failed | | |"
        lines.append(row)
    reasons = {(*key, each): None for key, searches in found.items() for each in searches if isinstance(each, str)}
    return "\n".join(
        [*lines, "", *(f"{tool}, {server}, found nothing: {reason}" for tool, server, reason in reasons)]
    ).rstrip()


def main() -> None:
    """Options, then searches, always by the tool and on the server that had the least time, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument(
        "--minutes", type=float, default=180.0, help="no search begins that may take longer; one takes 1 to 5"
    )
    parser.add_argument("--only", action="append", choices=SEARCHES, help="one tool by its name; may be repeated")
    parser.add_argument(
        "--server", choices=[server.name.split(",")[0] for server in SERVERS], help="one server by its law"
    )
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' virtual environments; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="file for what every run found, as JSON")
    options = parser.parse_args()
    until_s = time.monotonic() + 60 * options.minutes
    servers = [server for server in SERVERS if server.name.startswith(options.server or "")]
    truths = {server.name: server.truth() for server in servers}
    found: dict[Key, list[Found | str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        tools = stream_tools.tools(options.peers or Path(temporary) / "peers", Path(temporary))
        tools = [tool for tool in tools if tool.key in (options.only or SEARCHES)]
        for tool in tools:
            tool.install()
        names = {tool.key: tool.name for tool in tools}
        turns = {(names[tool.key], server.name): (tool, server) for server in servers for tool in tools}
        tried, spent_s, longest_s = dict.fromkeys(turns, 0), dict.fromkeys(turns, 0.0), dict.fromkeys(turns, 0.0)
        while True:
            begin_s = time.monotonic()
            left = [key for key in turns if tried[key] < options.runs and begin_s + longest_s[key] < until_s]
            if not left:
                break
            key = min(left, key=lambda key: spent_s[key])
            (tool, server), seed = turns[key], tried[key] + 1
            tried[key] += 1
            folder = Path(temporary) / tool.key / f"{server.slots}-slots-{seed}"
            folder.mkdir(parents=True)
            result: Found | str
            with served(server) as url:
                try:
                    result = SEARCHES[tool.key](server, url, seed, folder, tool, until_s)
                    words = f"{result.rate:.2f} of {truths[server.name]:.2f}, {result.load_s:.0f} s of load"
                except (RuntimeError, OSError, LookupError, TypeError, ValueError, StopIteration) as error:
                    result = words = " ".join(str(error).split())
                    if not isinstance(error, RuntimeError):
                        result = words = f"{type(error).__name__}: {words}"
            took_s = time.monotonic() - begin_s
            spent_s[key] += took_s
            longest_s[key] = max(took_s, longest_s[key])
            earlier = found.setdefault(key, [])
            if isinstance(result, Found) or time.monotonic() < until_s or not earlier:
                earlier.append(result)  # one that the time cut off is no failure, where others ended
            print(f"{seed}: {key[0]}, {server.name}: {words}, {took_s:.0f} s in all", file=sys.stderr, flush=True)
            if options.out:
                rows = {
                    ", ".join(key): [each if isinstance(each, str) else vars(each) for each in rows]
                    for key, rows in found.items()
                }
                options.out.write_text(json.dumps({"truth": truths, "found": rows}, indent=1) + "\n")
    print(table(found, truths))


if __name__ == "__main__":
    main()
