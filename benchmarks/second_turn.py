"""What a second turn costs: time to first token and bytes, with and without decode's KV going back to prefill (--return-kv).

A prefill and a decode instance, and in front of them three proxies that the conversations take in turn. A second turn is the first one's
prompt and answer, and new text.
On CPU (tcp, a random Qwen2; two cores do all of it, so the answer's first token competes with prefill):
    python benchmarks/second_turn.py [--conversations 20] [--prompt 512] [--answer 384] [--new 64]        (about 3 minutes)
On two GPUs: the same with --connector p2p-nccl --model FOLDER [--vllm-args="..."]
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from pdbench import events
from pdbench.site import Site
from tests.conftest import serve_config
from tests.support.kv import tiny_qwen2
from tests.support.proxy_processes import proxy

WARM_UP = 1
MODES = {"default": (), "--first-token either": ("--first-token", "either"), "--return-kv": ("--return-kv",)}


def answer(url: str, model: str, prompt: Sequence[int], max_tokens: int, name: str) -> tuple[float, list[int]]:
    """Milliseconds to the first event of a greedy answer, and its tokens."""
    fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"stream": True, "return_token_ids": True}).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": name}
    tokens: list[int] = []
    sent_s, first_s = time.monotonic(), None
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=120) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                first_s = first_s or time.monotonic()
                for choice in json.loads(line[6:]).get("choices", []):
                    tokens += choice.get("token_ids") or []
    assert first_s is not None and len(tokens) == max_tokens, f"{len(tokens)} tokens of {max_tokens}"
    return 1e3 * (first_s - sent_s), tokens


def row(mode: str, ttft_ms: Sequence[tuple[float, float]], log: Sequence[events.Event], ways: Sequence[str]) -> str:
    """A line of the table; `ways` are the transfer ids of its second turns."""
    back, there, computed = 0, 0, 0
    for event in log:
        if isinstance(event, events.PromptEvent) and event.transfer_id in ways and event.server == "prefill-0":
            computed += sum(event.tokens)
        elif isinstance(event, events.TransferEvent) and event.side == "receive" and event.transfer_id in ways:
            back, there = (back + event.bytes, there) if event.direction == "return" else (back, there + event.bytes)
    first, second = ([round(turn, 1) for turn in sorted(turns)] for turns in zip(*ttft_ms, strict=True))
    spread = f"{statistics.median(second):.1f} ({second[len(second) // 10]} to {second[-1 - len(second) // 10]})"
    count = len(ways)
    kib = f"{there / count / 1024:.0f} | {back / count / 1024:.0f}"
    return f"| {mode} | {statistics.median(first):.1f} | {spread} | {computed / count:.0f} | {kib} |"


def main() -> None:
    """One line per proxy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"conversations": 20, "prompt": 512, "answer": 384, "new": 64, "layers": 8}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--connector", choices=("tcp", "p2p-nccl"), default="tcp")
    parser.add_argument("--model", help="model folder (default: a random Qwen2 of --layers)")
    parser.add_argument("--vllm-args", default="--block-size 32", help="more vLLM arguments")
    options = parser.parse_args()
    numbers = random.Random(1)
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        model = options.model or str(tiny_qwen2(folder / "model", options.layers))
        length = options.prompt + 2 * options.answer + options.new
        config = serve_config(
            folder,
            connector=options.connector,
            model=model,
            max_model_len=length,
            return_kv=True,
            enforce_eager=options.connector == "tcp",
            vllm_args=options.vllm_args,
        )
        deployment = stack.enter_context(closing(Site().deployment("disaggregated", config))).start()
        info, log = deployment.info(), Path(config.log_dir)
        kv = (f"{config.kv_ip}:{port}" for port in (config.kv_port, config.kv_port + 1))
        servers = [
            SimpleNamespace(url=f"{url}@{address}")
            for url, address in zip((*info.urls("prefill"), *info.urls("decode")), kv, strict=True)
        ]
        proxies = {}
        for mode, more in MODES.items():
            place = folder / f"proxy-{len(proxies)}"
            place.mkdir()
            pair = {"prefill": servers[:1], "decode": servers[1:]}
            proxies[mode] = stack.enter_context(proxy(place, "--connector", options.connector, *more, **pair))  # type: ignore[arg-type]
        ttft_ms: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        seconds: dict[str, list[str]] = {mode: [] for mode in MODES}
        for number in range(-WARM_UP, options.conversations):
            for mode in sorted(MODES, key=lambda mode: numbers.random()):
                prompt, new = ([numbers.randrange(10, 400) for _ in range(n)] for n in (options.prompt, options.new))
                url, turn = proxies[mode].url, f"conversation{number}-turn"
                first, tokens = answer(url, info.model_name, prompt, options.answer, f"{turn}1")
                second, _ = answer(url, info.model_name, [*prompt, *tokens, *new], 16, f"{turn}2")
                if number >= 0:
                    ttft_ms[mode].append((first, second))
                    seconds[mode].append(f"{turn}2")
        time.sleep(1.0)  # the logs are written by threads
        logged = [
            event for path in log.glob("*.events.jsonl") for event in events.parse(path.read_bytes().splitlines())
        ]
        print(
            "| proxy | TTFT of turn 1, p50, ms | of turn 2, p50 (p10 to p90) | prefill computes, tokens | to decode, KiB | back, KiB |"
        )
        print("|---|---|---|---|---|---|")
        for mode in MODES:
            ways = [line["transfer_id"] for line in proxies[mode].lines() if line["request_id"] in seconds[mode]]
            print(row(mode, ttft_ms[mode], logged, ways), flush=True)


if __name__ == "__main__":
    main()
