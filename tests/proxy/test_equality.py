"""What a client sees of prefill, decode and proxy is what a single instance of real vLLM (CPU) answers: every field of the API that changes
an answer, and every refusal."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from pdbench.serving.deployment import DeploymentInfo

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]
PROMPT = "Which instance computes this prompt, and which one answers? " * 3
IDS = [10 + 7 * index % 200 for index in range(70)]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "one token": {"max_tokens": 1},
    "one token, to the end": {"max_tokens": 1, "ignore_eos": False},
    "no limit given": {
        "max_tokens": None,
        "prompt": IDS * 6,
        "ignore_eos": False,
        "stop_token_ids": [*range(0, 512, 2)],
    },
    "ids of tokens": {"prompt": IDS, "return_token_ids": True},
    "a batch": {"prompt": [PROMPT, PROMPT + "No."]},
    "a batch of one": {"prompt": [IDS]},
    "log-probabilities": {"logprobs": 3, "return_tokens_as_token_ids": True},
    "log-probabilities of the prompt": {"prompt_logprobs": 1, "prompt": IDS[:9]},
    "echo": {"echo": True, "logprobs": 1},
    "choices": {"n": 2},
    "a seed": {"temperature": 0.9, "seed": 7},
    "choices and a seed": {"temperature": 0.9, "seed": 7, "n": 2},
    "min_tokens": {"min_tokens": 4, "ignore_eos": False},
    "stop at any first token": {"stop_token_ids": [*range(512)], "ignore_eos": False},
    "a stop string": {"stop": ["e", "a", "o", "i", " "], "include_stop_str_in_output": True},
    "special tokens shown": {"skip_special_tokens": False, "ignore_eos": False},
    "a first token that is special": {"allowed_token_ids": [0, 1, 2], "return_token_ids": True},
    "the same, shown": {"allowed_token_ids": [0, 1, 2], "skip_special_tokens": False},
    "a first token that is a byte": {"allowed_token_ids": [*range(160, 259)], "return_token_ids": True},
    "a choice": {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    "beyond the context": {"prompt": IDS * 200},
    "output beyond the context": {"max_tokens": 100000},
    "output just beyond the context": {"prompt": IDS, "max_tokens": 512 - len(IDS) + 1},
    "output up to the context": {"prompt": IDS, "max_tokens": 512 - len(IDS)},
    "no tokens": {"max_tokens": 0},
    "a negative limit": {"max_tokens": -3},
    "a temperature that is none": {"temperature": -1},
    "an unknown model": {"model": "nobody"},
    "an empty prompt": {"prompt": ""},
    "an empty list": {"prompt": []},
    "a token that is none": {"prompt": [10**9]},
    "too many log-probabilities": {"logprobs": 999},
    "a prompt of another type": {"prompt": {"a": 1}},
    "usage without a stream": {"stream_options": {"include_usage": True}, "stream": False},
}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_tokens": 1},
    "the newer limit": {"max_tokens": None, "max_completion_tokens": 3},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2},
    "choices": {"n": 2},
    "tools": {"tools": [TOOL], "tool_choice": "none"},
    "a call that no parser reads": {"tools": [TOOL], "tool_choice": "auto"},
    "JSON": {"response_format": {"type": "json_object"}},
    "no messages": {"messages": []},
    "an unknown role": {"messages": [{"role": 7, "content": "Hi"}]},
    "beyond the context": {"messages": [{"role": "user", "content": "word " * 5000}]},
}
STREAMS: dict[str, dict[str, Any]] = {
    "whole": {"stream": False},
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "usage with every token": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}  # fmt: skip
# What differs between two requests to one instance, or says which one computed the prompt.
UNEQUAL = {
    "id",
    "created",
    "kv_transfer_params",
    "metrics",
    "system_fingerprint",
    "prompt_tokens_details",
    "request_id",
    "timestamp",
}


def plain(value: Any) -> Any:
    """The answer without what differs from request to request; what is null is as if it were left out."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in UNEQUAL and each is not None}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def joined(events: list[dict[str, Any]]) -> dict[int | None, Any]:
    """A stream's events by choice (None: of no choice), as one: vLLM puts tokens into one event that its server has not yet sent."""

    def add(whole: Any, part: Any) -> Any:
        if isinstance(whole, dict) and isinstance(part, dict):
            return whole | {key: add(whole[key], value) if key in whole else value for key, value in part.items()}
        return whole + part if isinstance(whole, list) and isinstance(part, list) else part

    streams: dict[int | None, Any] = {}
    for event in events:
        choice = event.pop("choices", None) or [{}]
        content = choice[0].get("delta", choice[0])
        for name in content.keys() & {"text", "content"}:
            content[name] = [content[name]] if content[name] else []
        index = choice[0].pop("index", None)
        streams[index] = add(streams.get(index, {}), event | choice[0])
    for stream in streams.values():
        content = stream.get("delta", stream)
        content |= {name: "".join(content[name]) for name in content.keys() & {"text", "content"}}
    return dict(sorted(streams.items(), key=lambda item: -1 if item[0] is None else item[0]))


def answer(running: DeploymentInfo, path: str, body: bytes) -> tuple[int, Any]:
    """Status and document or events, those of each choice together; of a failure of the server (500, from the proxy 502) only that it is one."""
    request = urllib.request.Request(running.url + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            status, data = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, data = error.code, error.read()
    if data.startswith(b"data: "):
        *events, last = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
        return status, [*joined([plain(json.loads(event)) for event in events]).items(), last]
    return (status, plain(json.loads(data))) if status < 500 else (500, None)


def equal(single: DeploymentInfo, disaggregated: DeploymentInfo, path: str, body: dict[str, Any]) -> None:
    data = json.dumps({"model": single.model_name, **body}).encode()
    assert answer(disaggregated, path, data) == answer(single, path, data)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("case", COMPLETIONS)
def test_completion(single: DeploymentInfo, disaggregated: DeploymentInfo, case: str, stream: str) -> None:
    equal(
        single, disaggregated, "/v1/completions", {"prompt": PROMPT, **GREEDY, **STREAMS[stream], **COMPLETIONS[case]}
    )


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("case", CHATS)
def test_chat(single: DeploymentInfo, disaggregated: DeploymentInfo, case: str, stream: str) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    equal(
        single,
        disaggregated,
        "/v1/chat/completions",
        {"messages": messages, **GREEDY, **STREAMS[stream], **CHATS[case]},
    )


FIRST_TOKENS: dict[str, dict[str, Any]] = {
    "any": {},
    "special, skipped": {"allowed_token_ids": [0, 1, 2]},
    "special, shown": {"allowed_token_ids": [0, 1, 2], "skip_special_tokens": False},
    "pieces of characters": {"allowed_token_ids": [*range(160, 259)]},
    "the end, where that is chosen": {"allowed_token_ids": [0, 1, 2], "ignore_eos": False},
    "a stop": {"stop_token_ids": [*range(3, 256)], "ignore_eos": False},
}


@pytest.mark.parametrize("ids", [True, False], ids=["with ids", "without"])
@pytest.mark.parametrize("case", FIRST_TOKENS)
def test_first_tokens_with_and_without_text(
    single: DeploymentInfo, disaggregated: DeploymentInfo, case: str, ids: bool
) -> None:
    """Prefill's token opens a stream only where its own text is not empty; the client sees no difference."""
    fields = GREEDY | STREAMS["stream"] | FIRST_TOKENS[case] | {"return_token_ids": ids}
    for number in range(10):
        prompt = f"{number} first tokens, of which prefill sends some, and decode the others."
        equal(single, disaggregated, "/v1/completions", {"prompt": prompt, **fields})
