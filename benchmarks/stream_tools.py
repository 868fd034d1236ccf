"""How stream_conformance.py installs and runs each tool, and where in its files the figures of single requests stand."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
START_LIMIT_S, CASE_LIMIT_S = 60.0, 0.6


class Group(NamedTuple):
    """What one command asks for: the chat or completions endpoint, and how long answers may or must be."""

    chat: bool
    forced: bool
    max_tokens: int


class Seen(NamedTuple):
    """A request's figures as a tool reports them; None: it reports none."""

    ok: bool
    tokens: int | None = None
    ttft_ms: float | None = None
    tbt_ms: float | None = None


@dataclass
class Tool:
    """A tool in its environment; `run` asks for the cases in their order, one at a time, and returns what it saw of each."""

    key: str
    python: Path
    tokenizer: Path
    package: str | None = None

    @property
    def name(self) -> str:
        distribution = {"vllm": "vllm", "pdbench": "pdbench"}.get(self.key, self.package)
        script = f"import importlib.metadata as m; print(next((m.version(n) for n in ('{distribution}', '{distribution}-cpu') if _has(m, n)), '?'))"
        helper = "def _has(m, n):\n    try:\n        m.version(n); return True\n    except m.PackageNotFoundError: return False\n"
        done = subprocess.run([self.python, "-c", helper + script], capture_output=True, text=True, cwd="/")
        return f"{self.key} {done.stdout.strip()}"

    def install(self) -> None:
        """Make the environment if there is none; raises RuntimeError with pip's last line."""
        home = self.python.parents[1]
        if self.package is None or (home / "installed").exists():
            return
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
        done = subprocess.run([self.python, "-m", "pip", "install", "-q", self.package], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (home / "installed").touch()

    def run(self, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
        """What the tool saw of each case."""
        prompts = folder / "prompts.jsonl"
        key = {"aiperf": "text"}.get(self.key, "prompt")
        prompts.write_text("".join(json.dumps({key: f"case-{number} "}) + "\n" for number in numbers))
        return globals()[f"run_{self.key.replace('-', '_')}"](self, url, group, numbers, folder)

    def command(self, folder: Path, *arguments: object) -> None:
        """Run it to its end; raises RuntimeError with its last lines where it fails."""
        environment = {**os.environ, "NO_COLOR": "1"}
        if self.key != "pdbench":
            environment.pop("PYTHONPATH", None)
        limit_s = START_LIMIT_S + CASE_LIMIT_S * len((folder / "prompts.jsonl").read_text().splitlines())
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"no end after {limit_s:.0f} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
        if code:
            raise RuntimeError(f"exit code {code}: {(folder / 'output.txt').read_text()[-500:]}")


def tools(peers: Path, temporary: Path) -> list[Tool]:
    """pdbench and vLLM of this environment, then the peers of theirs."""
    tokenizer = make_tokenizer(temporary / "tokenizer")
    here = Path(sys.executable)
    own = [Tool(key, here, tokenizer) for key in ("pdbench", "vllm")]
    return own + [
        Tool(key, peers / key / "bin" / "python", tokenizer, key) for key in ("aiperf", "guidellm", "inference-perf")
    ]


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per word, for the tools that count tokens in the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    words = Tokenizer(models.WordLevel({"[UNK]": 0} | {f"w{i}": i for i in range(1, 1000)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "eos_token": "[UNK]", "pad_token": "[UNK]",
                "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}", "model_max_length": 4096}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def run_pdbench(tool: Tool, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
    arguments = [
        "--url",
        url,
        "--model",
        "scripted",
        "--prompt-file",
        folder / "prompts.jsonl",
        "--requests",
        len(numbers),
    ]
    arguments += ["--warmup", 0, "--output-tokens", group.max_tokens, "--out", folder / "run", "--verbatim-prompts"]
    arguments += [
        "--endpoint",
        "chat" if group.chat else "completions",
        "--ignore-eos" if group.forced else "--no-ignore-eos",
    ]
    tool.command(folder, tool.python, "-m", "pdbench", "bench", *arguments)
    sys.path.insert(0, str(ROOT))
    from pdbench.analysis.run_analysis import load_analysis

    requests = load_analysis(next((folder / "run").rglob("*_results.json")).parent).requests

    def known(value: float) -> float | None:
        return None if value != value else float(value)

    return {
        number: Seen(
            bool(requests.ok[row]), known(requests.output_tokens[row]), known(requests.ttft_ms[row]), known(requests.mean_tbt_ms[row])
        )
        for row, number in enumerate(numbers)
    }  # fmt: skip


def run_vllm(tool: Tool, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
    script = "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser(); "
    script += "add_cli_args(p); main(p.parse_args())"
    end = ["openai-chat", "/v1/chat/completions"] if group.chat else ["openai", "/v1/completions"]
    # Its custom datasets need pandas: these prompts name no case, the server gives the next one.
    arguments = ["--base-url", url, "--model", "scripted", "--backend", end[0], "--endpoint", end[1], "--disable-tqdm"]
    arguments += ["--dataset-name", "random", "--random-input-len", 8, "--random-output-len", group.max_tokens]
    arguments += [
        "--num-prompts",
        len(numbers),
        "--max-concurrency",
        1,
        "--num-warmups",
        0,
        "--ready-check-timeout-sec",
        0,
    ]
    arguments += [
        "--save-result",
        "--save-detailed",
        "--result-filename",
        folder / "vllm.json",
        "--tokenizer",
        tool.tokenizer,
    ]
    tool.command(folder, tool.python, "-c", script, *arguments, *(["--ignore-eos"] if group.forced else []))
    rows = json.loads((folder / "vllm.json").read_text())
    seen = {}
    for row, number in enumerate(numbers):
        tokens, ttft_s, gaps_s = rows["output_lens"][row], rows["ttfts"][row], rows["itls"][row]
        # Its TPOT: (latency - TTFT) / (tokens - 1).
        tbt_ms = sum(gaps_s) / (tokens - 1) * 1e3 if tokens > 1 else None
        seen[number] = Seen(not rows["errors"][row], tokens, ttft_s * 1e3, tbt_ms)
    return seen


def run_aiperf(tool: Tool, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
    arguments = [
        "profile",
        "--model",
        "scripted",
        "--url",
        url,
        "--endpoint-type",
        "chat" if group.chat else "completions",
    ]
    arguments += [
        "--streaming",
        "--concurrency",
        1,
        "--request-count",
        len(numbers),
        "--ui",
        "none",
        "--export-level",
        "records",
    ]
    arguments += [
        "--input-file",
        folder / "prompts.jsonl",
        "--custom-dataset-type",
        "single_turn",
        "--tokenizer",
        tool.tokenizer,
    ]
    arguments += ["--artifact-dir", folder / "aiperf", "--extra-inputs", f"max_tokens:{group.max_tokens}"]
    arguments += ["--extra-inputs", "ignore_eos:true"] if group.forced else []
    tool.command(folder, tool.python.parent / "aiperf", *arguments)
    lines = next((folder / "aiperf").rglob("profile_export.jsonl")).read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["metadata"]["request_start_ns"])
    asked = [json.loads(line)["case"] for line in (folder / "served.jsonl").read_text().splitlines()]
    seen = {}
    for number, row in zip(dict.fromkeys(asked), rows, strict=False):
        figures = {name: figure["value"] for name, figure in row["metrics"].items()}
        seen[number] = Seen(
            not row.get("error"), figures.get("output_sequence_length"), figures.get("time_to_first_token"),
            figures.get("inter_token_latency"),
        )  # fmt: skip
    return seen


def run_guidellm(tool: Tool, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
    path = "/v1/chat/completions" if group.chat else "/v1/completions"
    extras = {"body": {"max_tokens": group.max_tokens, "ignore_eos": group.forced}}
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": "scripted",
        "request_format": path,
        "validate_backend": False,
    }
    arguments = ["--backend", json.dumps(backend | {"extras": extras}), "--profile", "kind=synchronous"]
    arguments += ["--constraint", f"kind=max_requests,count={len(numbers)}", "--disable-console"]
    arguments += [
        "--data",
        f"kind=json_file,path={folder / 'prompts.jsonl'}",
        "--tokenizer",
        f"kind=hf_auto,model={tool.tokenizer}",
    ]
    arguments += ["--output", f"kind=json,path={folder / 'guidellm.json'}"]
    tool.command(folder, tool.python.parent / "guidellm", "run", *arguments)
    requests = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]["requests"]
    rows = [
        (row, kind == "successful") for kind in ("successful", "errored", "incomplete") for row in requests[kind] or []
    ]
    rows.sort(key=lambda entry: entry[0]["request_start_time"] or 0.0)
    asked = [json.loads(line)["case"] for line in (folder / "served.jsonl").read_text().splitlines()]
    return {
        number: Seen(ok, row["output_tokens"], row["time_to_first_token_ms"], row["inter_token_latency_ms"])
        for number, (row, ok) in zip(dict.fromkeys(asked), rows, strict=False)
    }


def run_inference_perf(tool: Tool, url: str, group: Group, numbers: list[int], folder: Path) -> dict[int, Seen]:
    # None of its data sets takes prompts from a file: the server gives the next case.
    length = {"min": 8, "max": 8, "mean": 8, "std_dev": 0, "total_count": len(numbers)}
    output = dict.fromkeys(("min", "max", "mean"), group.max_tokens) | {"std_dev": 0, "total_count": len(numbers)}
    data = {"type": "random", "input_distribution": length, "output_distribution": output}
    if group.chat:
        data = {"type": "mock"}  # the one of its generated data sets that is chat
    stages = [{"num_requests": len(numbers), "concurrency_level": 1}]
    document = {
        "api": {"type": "chat" if group.chat else "completion", "streaming": True},
        "data": data,
        "load": {"type": "concurrent", "stages": stages, "num_workers": 1, "worker_max_concurrency": 1},
        "server": {"type": "vllm", "model_name": "scripted", "base_url": url, "ignore_eos": group.forced},
        "tokenizer": {"pretrained_model_name_or_path": str(tool.tokenizer)},
        "report": {"request_lifecycle": {"per_request": True, "per_request_fields": {"computed_metrics": True}}},
        "storage": {"local_storage": {"path": str(folder / "report")}},
    }
    (folder / "config.yml").write_text(json.dumps(document))
    tool.command(folder, tool.python.parent / "inference-perf", "--config_file", folder / "config.yml")
    rows = json.loads(next((folder / "report").rglob("*per_request*.json")).read_text())
    rows.sort(key=lambda row: row["start_time"])
    asked = [json.loads(line)["case"] for line in (folder / "served.jsonl").read_text().splitlines()]
    seen = {}
    for number, row in zip(dict.fromkeys(asked), rows, strict=False):
        figures = row.get("computed_metrics") or {}
        ttft_s, tbt_s = figures.get("time_to_first_token"), figures.get("time_per_output_token")
        seen[number] = Seen(
            not row["error"], figures.get("output_tokens"), ttft_s and ttft_s * 1e3, tbt_s and tbt_s * 1e3
        )
    return seen
