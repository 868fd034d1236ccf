"""How well, and with how much load, tools find the highest rate within an SLO: pdbench search, AIPerf's search, `vllm bench serve` at rates.

Scripted servers (law_server.py, real sockets) have a highest rate that is known: of an M/D/1 prefill by Crommelin's formula, of decode in
a limited number of slots by a long simulation of the same law. Every tool searches each server --runs times by its own command. Printed are, per tool
and server, the error of the rate found, how many runs came within 3 %, and the seconds and requests of load. vLLM's
sweep explores rates without looking for one: its ten rates, evenly spaced, are judged by its own goodput and interpolated.
Try: python benchmarks/search_accuracy.py --runs 10 --peers ~/peers                        (about three hours)
"""

import argparse
import json
import math
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
    Server("prefill, M/D/1", 20.0, 3.0, 64, 60.0, 30.0),
    Server("decode, 4 slots", 5.0, 25.0, 4, 60.0, 40.0),
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


def run(arguments: list[object], folder: Path, limit_s: float) -> None:
    """A command to its end. Raises RuntimeError with its last line where it fails."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr + done.stdout).strip()[-300:]}")


def search_pdbench(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool) -> Found:
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
        HERE.parent,
        3600,
    )
    (entry,) = json.loads((folder / "search" / "search.json").read_text())["deployments"]
    return Found(entry["rate_per_s"], entry["load_s"], entry["requests"])


def search_aiperf(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool) -> Found:
    """Doubling and bisection on whole rates (its monotonic planner), good requests by its own goodput."""
    arguments = ["--model", "scripted", "--url", url, "--endpoint-type", "completions", "--streaming", "--ui", "none"]
    arguments += ["--tokenizer", tool.tokenizer, "--synthetic-input-tokens-mean", 16, "--output-tokens-mean", TOKENS]
    arguments += ["--extra-inputs", f"max_tokens:{TOKENS}", "--extra-inputs", "ignore_eos:true", "--random-seed", seed]
    arguments += ["--request-rate", 8, "--arrival-pattern", "poisson", "--request-count", REQUESTS]
    arguments += ["--goodput", f"time_to_first_token:{server.ttft_ms} inter_token_latency:{server.tbt_ms}"]
    arguments += ["--search-space", "phases.profiling.rate:8,200:int", "--search-planner", "monotonic-sla"]
    arguments += [
        "--search-metric",
        "good_request_fraction",
        "--search-direction",
        "maximize",
        "--search-max-iterations",
        20,
    ]
    arguments += ["--search-sla", f"good_request_fraction:avg:ge:{ATTAIN}", "--artifact-dir", folder / "aiperf"]
    run([tool.python.parent / "aiperf", "profile", *arguments], folder, 3600)
    history = json.loads(next((folder / "aiperf").rglob("search_history.json")).read_text())
    sent = [next(iter(each["variation_values"].values())) for each in history["iterations"]]
    return Found(
        float(history["boundary_summary"]["feasible_max"]["value"]),
        sum(REQUESTS / rate for rate in sent),
        REQUESTS * len(sent),
    )


def search_vllm(server: Server, url: str, seed: int, folder: Path, tool: stream_tools.Tool) -> Found:
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
        run([tool.python, "-c", script, *common, "--result-filename", folder / name, *more], folder, 3600)
        row = json.loads((folder / name).read_text())
        return row["request_throughput"], row["request_goodput"] / row["request_throughput"], row["duration"]

    serial, batch = level("serial.json", "--max-concurrency", 1), level("batch.json", "--max-concurrency", REQUESTS)
    rates = np.linspace(math.ceil(serial[0]), math.floor(batch[0]), 10)[1:-1]
    levels = [
        (rate, *level(f"{rate:.0f}.json", "--request-rate", f"{rate:.0f}")[1:]) for rate in np.unique(np.round(rates))
    ]
    rate = 0.0
    for (low, above, _), (high, below, _) in zip([(0.0, 1.0, 0.0), *levels], levels, strict=False):
        if below < ATTAIN:
            rate = low + (high - low) * (above - ATTAIN) / (above - below)
            break
        rate = high
    spent_s = serial[2] + batch[2] + sum(seconds for _, _, seconds in levels)
    return Found(float(rate), spent_s, REQUESTS * (len(levels) + 2))


def main() -> None:
    """Options, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", action="append", help="one tool by its name; may be repeated")
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' virtual environments; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="file for what every run found, as JSON")
    options = parser.parse_args()
    searches: dict[str, Callable[..., Found]] = {
        "pdbench": search_pdbench,
        "aiperf": search_aiperf,
        "vllm": search_vllm,
    }
    rows, everything = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        tools = stream_tools.tools(options.peers or Path(temporary) / "peers", Path(temporary))
        for tool in (tool for tool in tools if tool.key in (options.only or searches)):
            if tool.key not in searches:
                continue
            tool.install()
            for server in SERVERS:
                truth, found = server.truth(), []
                for seed in range(1, options.runs + 1):
                    folder = Path(temporary) / tool.key / f"{server.name}-{seed}"
                    folder.mkdir(parents=True)
                    begin_s = time.monotonic()
                    with served(server) as url:
                        try:
                            found.append(searches[tool.key](server, url, seed, folder, tool))
                        except (
                            RuntimeError,
                            OSError,
                            KeyError,
                            TypeError,
                            StopIteration,
                            subprocess.TimeoutExpired,
                        ) as error:
                            print(f"{tool.key}, {server.name}: {type(error).__name__}: {error}", file=sys.stderr)
                            continue
                    print(
                        f"{tool.key}, {server.name}: {found[-1]} of {truth:.2f}, {time.monotonic() - begin_s:.0f} s",
                        file=sys.stderr,
                    )
                errors = np.array([each.rate / truth - 1 for each in found]) * 100
                everything[f"{tool.name}, {server.name}"] = [vars(each) | {"truth": truth} for each in found]
                if found:
                    rows.append(
                        f"| {tool.name} | {server.name} | {truth:.2f} | {np.median(abs(errors)):.1f} % | {abs(errors).max():.1f} % "
                        f"| {(abs(errors) <= 3).sum()} of {len(found)} | {np.median([each.load_s for each in found]):.0f} "
                        f"| {np.median([each.requests for each in found]):.0f} |"
                    )
    print("| tool | server | true rate /s | median error | largest | within 3 % | load s | requests |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    print("\n".join(rows))
    if options.out:
        options.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
