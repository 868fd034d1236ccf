"""Real vLLM servers on CPU with the KV connector, the tiny model they serve, and how a request goes through two of them."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid

from pdbench.serving.models import tiny_model

TIMEOUT_S = 6.0
PATIENCE_S = 40.0
OUTPUT_TOKENS = 12


def tiny_qwen2(folder):
    """A random Qwen2 of 4 layers with grouped heads of 64, in float32; the tokenizer is the tiny DeepSeek-V2's."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(tiny_model(), folder, ignore=shutil.ignore_patterns("model*", "config.json", "generation*"))
    vocabulary = json.loads((tiny_model() / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.08,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


class Server:
    """One vLLM process group of the fleet."""

    def __init__(self, instance, log_dir):
        index = instance.argv.index("--kv-transfer-config") + 1
        transfer = json.loads(instance.argv[index])
        transfer["kv_connector_extra_config"]["transfer_timeout_s"] = TIMEOUT_S
        self.argv = [*instance.argv[:index], json.dumps(transfer), *instance.argv[index + 1 :]]
        # Chunks of 128 tokens, so that long prompts are prefilled in several; blocks of 32, by itself they have 128 here.
        self.argv += ["--max-num-batched-tokens", "128", "--block-size", "32"]
        self.environment = os.environ | instance.environment | {"PDBENCH_KV_SECRET": "a secret of the tests"}
        self.name, self.url, self.kv_address = instance.name, instance.url, instance.kv_address
        self.log = log_dir / f"{instance.name}.log"
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self):
        limit = time.monotonic() + 300
        while time.monotonic() < limit:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"{self.name} is not healthy: {self.log.read_text()[-3000:]}")

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        try:
            self.signal(signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def complete(self, prompt, max_tokens=OUTPUT_TOKENS, **parameters):
        body = {
            "model": "tiny-qwen2",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if parameters:
            body["kv_transfer_params"] = parameters
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["choices"][0]

    def abandon(self, prompt, after_s, **parameters):
        """Send a request and close the connection, as a client does that loses its patience."""
        body = {
            "model": "tiny-qwen2",
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "kv_transfer_params": parameters,
        }
        data = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            time.sleep(after_s)

    def metric(self, name, label=""):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{") and label in line
        )

    def is_free(self):
        """No request and no block left."""
        return all(
            self.metric(name) == 0 for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        )


def prefill(server, prompt, transfer_id, **more):
    return server.complete(prompt, 1, transfer_id=transfer_id, do_remote_decode=True, **more)


def decode(server, prompt, transfer_id, source, **more):
    host, port = source.kv_address.split(":")
    where = {"remote_host": host, "remote_port": int(port)}
    return server.complete(prompt, transfer_id=transfer_id, do_remote_prefill=True, **where, **more)


_random = random.Random(3)


def prompt_of(tokens):
    return [_random.randrange(10, 400) for _ in range(tokens)]


def new_id():
    return uuid.uuid4().hex


def until(check, patience_s=PATIENCE_S):
    limit = time.monotonic() + patience_s
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.1)
