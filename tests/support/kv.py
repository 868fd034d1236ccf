"""The KV connector in tests: workers without vLLM's engine, stepped over real sockets; and real vLLM servers on CPU."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import time
import urllib.request
import uuid
from bisect import bisect_right
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import ClassVar

import psutil
import torch

from pdbench.kv.compat import SECRET_VARIABLE, Options
from pdbench.kv.ranks import Identity
from pdbench.kv.scheduler import Fetch, PrefillEnd, PrefillProgress, StepPlan, Transfer
from pdbench.kv.worker import KvWorker
from pdbench.serving.models import tiny_model
from pdbench.supervisor import Child, supervised
from tests.support.processes import wait_until

BLOCK, BLOCKS, LAYERS = 4, 64, 3
SECRET = "a secret of the tests"
PATIENCE_S = 40.0

# Workers without vLLM's engine


@dataclass
class Instance:
    """One worker with a small cache, driven like vLLM's engine drives it: one plan per step."""

    role: str
    port: int = 0
    timeout_s: float = 5.0
    rank: int = 0
    ranks: int = 1
    staging_mib: int = 128
    event_log: str | None = None
    layout: tuple = (BLOCKS, BLOCK, 8)
    kv_heads: int = 1
    transport: str = "tcp"
    device: str = "cpu"
    host: str = "127.0.0.1"
    layers: tuple = tuple(f"layer.{i}" for i in range(LAYERS))
    drafts: tuple = ()
    return_kv: bool = False
    cache: dict = field(init=False)
    sent: list = field(default_factory=list)
    received: list = field(default_factory=list)
    failed: list = field(default_factory=list)

    def __post_init__(self):
        self.cache = {name: torch.randn(self.layout, device=self.device) for name in self.layers}
        options = Options(
            kv_ip=self.host,
            port=self.port,
            transport=self.transport,
            transfer_timeout_s=self.timeout_s,
            event_log=self.event_log,
            staging_mib=self.staging_mib,
            return_kv=self.return_kv,
        )
        identity = Identity(
            self.transport, self.ranks, self.rank, BLOCK, layout="", model="model", kv_heads=self.kv_heads
        )
        produces = self.role == "prefill"
        self.worker = KvWorker(options, identity, self.cache, self.layout[0], produces, drafts=self.drafts)

    def step(self, **plan):
        """One engine step on the instance's device; keeps what the worker reported."""
        step_plan = StepPlan(**{"idle": not plan.get("prefilled")} | plan)
        with torch.cuda.device(self.device) if self.device != "cpu" else nullcontext():
            self.worker.before_forward(step_plan)
            self.worker.load(step_plan)
            reports = self.worker.after_forward(step_plan)
        self.sent += reports.sent
        self.received += reports.received
        self.failed += reports.failed
        return reports

    def compute(self, transfer, blocks, replace=False):
        """One step that completes these blocks of a prefill."""
        self.step(prefilled=[PrefillProgress(request_id=transfer.request_id, blocks=blocks, replace=replace)])

    def end(self, transfer, kept=True, error=None):
        """One step after a prefill is over."""
        self.step(ended=[PrefillEnd(request_id=transfer.request_id, kept=kept, error=error)])

    def until(self, condition):
        """Step without requests until `condition()`."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{self.role}: sent {self.sent} received {self.received}"
            self.step()

    def blocks(self, block_ids):
        return torch.stack([cache[block_ids] for cache in self.cache.values()])


@contextmanager
def instances(*makers):
    """What the makers make, closed in the end; a list, or the only one."""
    started = []
    try:
        for maker in makers:
            started.append(maker())
        yield started if len(started) > 1 else started[0]
    finally:
        for instance in started:
            instance.worker.close()


def new_transfer(tokens, request_id=None, transfer_id=None, fingerprint="same"):
    request_id = request_id or uuid.uuid4().hex
    transfer_id = transfer_id or f"t-{request_id}"
    ends = [*range(BLOCK, tokens, BLOCK), tokens]
    return Transfer(request_id=request_id, transfer_id=transfer_id, tokens=tokens, fingerprint=fingerprint, ends=ends)


def prefill(instance, transfer, blocks, chunks=None, ended=True, error=None):
    """Expect and compute a prompt in chunks (token counts after each), then end it."""
    instance.step(expected=[transfer])
    count = 0
    for computed_tokens in chunks or [transfer.tokens]:
        stop = bisect_right(transfer.ends, computed_tokens)
        instance.compute(transfer, blocks[count:stop], replace=count == 0)
        count = stop
    if ended:
        instance.end(transfer, error=error)


def fetch(instance, transfer, blocks, port, start=0, host="127.0.0.1", idle=True):
    transfer = dataclasses.replace(transfer, host=host, port=port)
    tokens = transfer.tokens - start * BLOCK
    instance.step(idle=idle, fetches=[Fetch(transfer=transfer, start_block=start, blocks=blocks, tokens=tokens)])


def cancel(instance, transfer, port):
    transfer = dataclasses.replace(transfer, host="127.0.0.1", port=port)
    instance.step(cancelled=[(transfer, "the client went away")])


def settled(p, d, transfer, failed=False):
    """Both sides ended the transfer once; decode with the outcome given."""
    name = transfer.request_id
    d.until(lambda: name in d.received)
    p.until(lambda: name in p.sent)
    assert (name in d.failed) == failed
    assert d.received.count(name) == 1 and p.sent.count(name) == 1


def moves(p, d, here, there):
    """One more transfer goes over the pair's connection."""
    transfer = new_transfer(BLOCK * len(here))
    prefill(p, transfer, here)
    fetch(d, transfer, there, p.port)
    settled(p, d, transfer)
    assert torch.equal(p.blocks(here), d.blocks(there))


# Real vLLM

TRANSFER_TIMEOUT_S = 6.0
RETURN_WAIT_S = 10.0
OUTPUT_TOKENS = 12
WINDOW = 64
# Chunks of 128 tokens, so that long prompts are prefilled in several; blocks of 32, where vLLM on CPU has 128.
SMALL_CHUNKS = ("--max-num-batched-tokens", "128", "--block-size", "32")
_random = random.Random(3)


def prompt_of(tokens):
    """Random tokens: the same ones in every run of a test (tests/kv/conftest.py), whichever ran before it."""
    return [_random.randrange(10, 400) for _ in range(tokens)]


def seed_prompts(name):
    _random.seed(name)


def new_id():
    return uuid.uuid4().hex


def tiny_qwen2(folder, layers=4):
    """A random Qwen2 with grouped heads of 64."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _tiny(folder, Qwen2ForCausalLM, Qwen2Config, num_hidden_layers=layers)


def tiny_gemma3(folder):
    """A random Gemma-3 of 6 layers, of which all but the third and sixth see only the last 64 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = 2 * ["sliding_attention", "sliding_attention", "full_attention"]
    more = {"layer_types": layers, "sliding_window": WINDOW, "head_dim": 64, "query_pre_attn_scalar": 64}
    return _tiny(folder, Gemma3ForCausalLM, Gemma3TextConfig, num_hidden_layers=6, **more)


def tiny_mistral(folder):
    """A random Mistral of 4 layers that all see only the last 64 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    more = {"sliding_window": WINDOW, "head_dim": 64, "num_hidden_layers": 4}
    return _tiny(folder, MistralForCausalLM, MistralConfig, **more)


def tiny_gpt_oss(folder):
    """A random gpt-oss of 4 layers with attention sinks, every other of which sees only the last 64 tokens."""
    from transformers import GptOssConfig, GptOssForCausalLM

    layers = 2 * ["sliding_attention", "full_attention"]
    more = {"layer_types": layers, "sliding_window": WINDOW, "head_dim": 64, "num_local_experts": 4}
    return _tiny(folder, GptOssForCausalLM, GptOssConfig, num_hidden_layers=4, num_experts_per_tok=2, **more)


def _tiny(folder, model, config, **settings):
    """A random model in float32; the tokenizer is the tiny DeepSeek-V2's."""
    shutil.copytree(tiny_model(), folder, ignore=shutil.ignore_patterns("model*", "config.json", "generation*"))
    vocabulary = json.loads((tiny_model() / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"max_position_embeddings": 2048, "initializer_range": 0.08}
    made = model(config(**{"vocab_size": vocabulary} | sizes | more | settings))
    if made.config.tie_word_embeddings:  # else each token's own embedding outweighs all that it attends to
        made.get_input_embeddings().weight.data *= 0.02
    made.save_pretrained(folder)
    return folder


class Server:
    """One vLLM process group that serves the tiny Qwen2 with the connector; `command` is of pdbench.serving.vllm. `fields`: more of
    every request's body."""

    fields: ClassVar[dict[str, object]] = {}

    def __init__(self, command, log_dir, arguments=SMALL_CHUNKS, timeout_s=TRANSFER_TIMEOUT_S, **transfer_options):
        index = command.argv.index("--kv-transfer-config") + 1
        transfer = json.loads(command.argv[index]) | transfer_options
        transfer["kv_connector_extra_config"] |= {
            "transfer_timeout_s": timeout_s,
            "return_wait_s": RETURN_WAIT_S,
        }
        self.argv = [*command.argv[:index], json.dumps(transfer), *command.argv[index + 1 :]]
        self.argv += arguments
        # Dev mode: tests empty prefix caches.
        self.environment = os.environ | command.environment | {SECRET_VARIABLE: SECRET, "VLLM_SERVER_DEV_MODE": "1"}
        self.name, self.url, self.kv_address = command.name, command.url, command.kv_address
        self.log = log_dir / f"{command.name}.log"
        self.start()

    def start(self):
        """It ends with this process, however that ends: engines that a killed test run left would compute on."""
        with self.log.open("ab") as log:
            self.process = Child(supervised(self.argv, 1.0), self.environment, log.fileno())

    def wait_healthy(self):
        def is_healthy():
            assert self.process.exit_code() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                return False
            return True

        wait_until(is_healthy, 300, f"{self.name} healthy")

    def signal(self, number):
        """To all its processes but the supervisor, which ends also those that are stopped."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.close()

    def complete(self, prompt, max_tokens=OUTPUT_TOKENS, cache_salt=None, **parameters):
        """The answer's choice; `parameters` are kv_transfer_params. Without them the server computes all of it.

        With a `cache_salt` its prefix cache knows only prompts of the same salt; to one that hands over to itself, a prompt is then new."""
        data = self._body(prompt, max_tokens, parameters, {"cache_salt": cache_salt} if cache_salt else {})
        request = urllib.request.Request(f"{self.url}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["choices"][0]

    def prefill(self, prompt, transfer_id, **parameters):
        return self.complete(prompt, 1, transfer_id=transfer_id, do_remote_decode=True, **parameters)

    def decode(self, prompt, transfer_id, source, **parameters):
        """Decode with the KV of `source`, the prefill server."""
        host, port = source.kv_address.split(":")
        parameters |= {"remote_host": host, "remote_port": int(port)}
        return self.complete(prompt, transfer_id=transfer_id, do_remote_prefill=True, **parameters)

    def abandon(self, prompt, after_s, **parameters):
        """Send a request and close the connection, as a client does that is interrupted."""
        data = self._body(prompt, OUTPUT_TOKENS, parameters)
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            time.sleep(after_s)

    def _body(self, prompt, max_tokens, parameters, more=()):
        body = {
            "model": self.argv[self.argv.index("--served-model-name") + 1],
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return json.dumps(
            body | self.fields | dict(more) | ({"kv_transfer_params": parameters} if parameters else {})
        ).encode()

    def metric(self, name, label=""):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{") and label in line
        )

    def external_tokens(self):
        """Prompt tokens that came from another instance, by vLLM's own count."""
        return self.metric("prompt_tokens_by_source_total", "external_kv_transfer")

    def is_free(self):
        """No request and no block is left."""
        return all(
            self.metric(name) == 0 for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        )


def wait_free(*servers):
    wait_until(lambda: all(server.is_free() for server in servers), PATIENCE_S, "all requests and blocks freed")
