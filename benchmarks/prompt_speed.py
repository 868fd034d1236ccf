"""How long a load's prompts take to make, beside GuideLLM's synthetic ones, with one tokenizer: seconds of CPU on one core, in turns.

The first turn of a process counts, as a load's client has it: the tokenizer is read before. Also printed: how many prompts have exactly
the tokens that were asked for (without special ones, which a server adds).
Try: python benchmarks/prompt_speed.py --guidellm DIR/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pdbench.serving.models import shape_model

PDBENCH = """
import itertools, json, sys, time
from pdbench.config import LoadConfig
from pdbench.load import plan
folder, tokens, count, seed = sys.argv[1], *map(int, sys.argv[2:])
config = LoadConfig(input_tokens=tokens, requests=count, rate=16.0, nonce="a", seed=seed)
tokenizer = plan.find_tokenizer(config, folder)
begin_s = time.process_time()
prompts = [request.text for request in plan.planned_requests(config, tokenizer, 0)]
print(json.dumps([time.process_time() - begin_s, prompts]))
"""
GUIDELLM = """
import itertools, json, sys, time
from guidellm.data.deserializers.synthetic import SyntheticTextDataArgs, _SyntheticTextExamplesIterable
from transformers import AutoTokenizer
folder, tokens, count, seed = sys.argv[1], *map(int, sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = _SyntheticTextExamplesIterable(SyntheticTextDataArgs(prompt_tokens=tokens, output_tokens=1), tokenizer, seed)
begin_s = time.process_time()
rows = [row for _, row in itertools.islice(rows, count)]
took_s = time.process_time() - begin_s
print(json.dumps([took_s, [json.loads(row["conversation_turns"])["turns"][0]["columns"]["text_column"][0] for row in rows]]))
"""


def measure(python: str, script: str, *arguments: object) -> tuple[float, list[str]]:
    """(seconds, prompts) of one process on the last core."""
    command = ["taskset", "-c", str((os.cpu_count() or 1) - 1), python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    took_s, prompts = json.loads(done.stdout.splitlines()[-1])
    return took_s, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", help="the Python of its environment; left out: pdbench alone")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--peer-count", type=int, default=90, help="the peer's prompts, which are scaled to --count")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    import tokenizers

    clients = {"pdbench": (sys.executable, PDBENCH, arguments.count)}
    if arguments.guidellm:
        clients["guidellm"] = (arguments.guidellm, GUIDELLM, arguments.peer_count)
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    with tempfile.TemporaryDirectory() as folder:
        shape_model(Path(folder))
        encoder = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        for turn in range(arguments.turns):
            for name, (python, script, count) in list(clients.items())[:: 1 if turn % 2 else -1]:
                took_s, prompts = measure(python, script, folder, arguments.tokens, count, turn)
                seconds[name].append(took_s * arguments.count / count)
                exact = sum(len(encoder.encode(prompt).ids) == arguments.tokens for prompt in prompts)
                print(
                    f"{name}: {count} prompts of {arguments.tokens} tokens in {took_s:.2f} s of CPU, {exact} exact",
                    flush=True,
                )
    for name, each in seconds.items():
        ratio = statistics.median(each) / statistics.median(seconds["pdbench"])
        print(f"{name}: {statistics.median(each):.2f} s for {arguments.count}, {ratio:.1f} times pdbench's")


if __name__ == "__main__":
    main()
