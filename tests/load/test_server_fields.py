"""The server's own tokenizer and chat template, and fields of requests that servers refuse."""

import json

import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import plan
from pdbench.load.request_fields import request_body
from pdbench.load.tokenizer import Tokenizer, load_tokenizer, server_tokenizer
from tests.load.test_generator import load
from tests.support.servers import Peer, ScriptedServer, refusal, stream, token, usage

TEMPLATE = 11


class TokenizingServer:
    """Answers as vLLM ("vllm"), SGLang or llama.cpp do on /tokenize and /detokenize; `kind` "none" has neither."""

    def __init__(self, tokenizer: Tokenizer, kind: str, *, honest_usage: bool = True) -> None:
        self.tokenizer, self.kind, self.honest_usage = tokenizer, kind, honest_usage
        self.prompts: list[int] = []

    def __call__(self, peer: Peer) -> bool:
        body = peer.json
        if peer.path.endswith("tokenize") and self.kind == "none":
            return refusal(b"404 Not Found", "no such path")(peer)
        if peer.path == "/tokenize":
            return self._tokenize(peer, body)
        if peer.path == "/detokenize":
            name = {"vllm": "prompt", "sglang": "text", "llama": "content"}[self.kind]
            peer.respond({name: self.tokenizer.decode(body["tokens"])})
            return True
        messages = body.get("messages")
        count = self._templated(messages) if messages else self.tokenizer.count(body["prompt"])
        if body["max_tokens"] > 1:
            self.prompts.append(count)
        finish = (
            token(finish="length")
            if not messages
            else {"choices": [{"delta": {"content": "x"}, "finish_reason": "length"}]}
        )
        return stream([finish, usage(count if self.honest_usage else 5, 1)])(peer)

    def _tokenize(self, peer: Peer, body: dict) -> bool:
        if self.kind == "llama":
            text, special = body.get("content"), body.get("add_special", False)
            peer.respond({"tokens": [] if text is None else [0] * special + self.tokenizer.encode(text)})
        elif "messages" in body and self.kind == "vllm":
            ids = [1] * self._templated(body["messages"])
            peer.respond({"count": len(ids), "tokens": ids, "max_model_len": 4096})
        elif "prompt" not in body:
            return refusal(b"400 Bad Request", "prompt: Field required")(peer)
        else:
            ids = [0] * body.get("add_special_tokens", True) + self.tokenizer.encode(body["prompt"])
            peer.respond({"count": len(ids), "tokens": ids, "max_model_len": 4096})
        return True

    def _templated(self, messages: list[dict]) -> int:
        return TEMPLATE + len(self.tokenizer.encode(messages[0]["content"].strip()))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama"])
def test_model_without_tokenizer_json_is_measured_by_the_servers_tokenize(kind, tokenizer, tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    answer = TokenizingServer(tokenizer, kind)
    with ScriptedServer(answer) as server:
        load(server, warmup=0, input_tokens=123, requests=4, tokenizer=str(tmp_path))
        assert answer.prompts == [123] * 4
        (tmp_path / "t.jsonl").write_text(
            '{"timestamp": 0, "input_length": 700, "output_length": 4, "hash_ids": [1, 2]}\n'
        )
        load(server, warmup=0, trace=str(tmp_path / "t.jsonl"), tokenizer=str(tmp_path))
        assert answer.prompts[4:] == [700]


def test_no_tokenizer_anywhere_is_a_user_error(tokenizer, tmp_path):
    with ScriptedServer(TokenizingServer(tokenizer, "none")) as server:
        with pytest.raises(UserError, match=r"and http://127.0.0.1:\d+ has no /tokenize: give --tokenizer FOLDER"):
            load(server, warmup=0, input_tokens=123, tokenizer=str(tmp_path))
        assert server_tokenizer(server.url, "m") is None
    assert server_tokenizer(server.url, "m") is None


@pytest.mark.parametrize("kind", ["vllm", "sglang", "none"])
def test_lengths_on_the_chat_endpoint_are_exact_with_the_template(kind, tokenizer, tokenizer_folder, tmp_path):
    """vLLM's /tokenize takes messages; of other servers the usage of two short answers tells it."""
    answer = TokenizingServer(tokenizer, kind)
    options = {"endpoint": "chat", "tokenizer": tokenizer_folder}
    with ScriptedServer(answer) as server:
        result = load(server, warmup=0, input_tokens=100, requests=5, **options)
        assert answer.prompts == [100] * 5 and "chat-template-unknown" not in {flag.name for flag in result.flags}
        rows = [{"timestamp": 100 * at, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]} for at in range(2)]
        (tmp_path / "t.jsonl").write_text(
            "".join(json.dumps(row | {"input_length": n}) + "\n" for row, n in zip(rows, (600, 5), strict=True))
        )
        load(server, warmup=0, trace=str(tmp_path / "t.jsonl"), trace_block_tokens=512, **options)
        assert answer.prompts[5:] == [600, TEMPLATE + 1]
        with pytest.raises(UserError, match="--input-tokens 11: the chat template alone has 11 tokens"):
            load(server, warmup=0, input_tokens=TEMPLATE, **options)


def test_unknown_chat_template_is_flagged(tokenizer, tokenizer_folder):
    answer = TokenizingServer(tokenizer, "none", honest_usage=False)
    with ScriptedServer(answer) as server:
        result = load(server, warmup=0, input_tokens=100, endpoint="chat", tokenizer=tokenizer_folder, requests=2)
    assert answer.prompts == [100 + TEMPLATE] * 2
    assert "chat-template-unknown" in {flag.name for flag in result.flags}


REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "ignore_eos": "[{'type': 'extra_forbidden', 'loc': ('body', 'ignore_eos'), 'msg': 'Extra inputs are not permitted'}]",
    "stream_options": "Unrecognized request argument supplied: stream_options",
    "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model.",
    "return_token_ids": "unknown field return_token_ids",
}


def refusing(*fields: str):
    def answer(peer: Peer) -> bool:
        for field in fields:
            if field in peer.json:
                return refusal(b"400 Bad Request", REFUSALS[field])(peer)
        return stream([token(finish="length"), usage(5, 1)])(peer)

    return answer


@pytest.mark.parametrize("fields", [*((name,) for name in REFUSALS), tuple(REFUSALS)])
def test_refused_fields_are_left_out_and_flagged(fields):
    with ScriptedServer(refusing(*fields)) as server:
        result = load(server, warmup=0, requests=3, output_tokens=7, phase="prefill")
        last = server.requests[-1].json
    assert [record.error for record in result.requests] == [None] * 3
    assert not set(fields) & last.keys()
    assert last.get("max_completion_tokens") == (1 if "max_tokens" in fields else None)
    (flag,) = (
        (flag for flag in result.flags if flag.name == "fields-refused") if fields != ("return_token_ids",) else (None,)
    )
    if flag:
        assert all(name in flag.detail for name in set(fields) - {"return_token_ids"})
    assert ("token-ids-refused" in {flag.name for flag in result.flags}) == ("return_token_ids" in fields)


def test_field_of_extra_body_that_is_refused_is_not_said_to_be_left_out():
    with ScriptedServer(refusing("ignore_eos")) as server:
        result = load(server, warmup=0, requests=2, output_tokens=7, extra_body='{"ignore_eos": true}')
    assert [record.error.kind for record in result.requests] == ["http_400"] * 2
    assert not any(flag.name == "fields-refused" for flag in result.flags)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("'max_tokens' is too large: 5000. This model's maximum context length is 4096 tokens", {}),
        ("max_tokens must be at least 16", {}),
        ("ignore_eos is an unknown field", {"ignore_eos": True}),
        ("top_k is an unknown field", {"extra_body": '{"top_k": 1}'}),
    ],
)
def test_errors_about_values_and_fields_that_the_user_gave_stay_errors(message, options):
    with ScriptedServer(refusal(b"400 Bad Request", message)) as server:
        result = load(server, warmup=0, requests=2, **options)
        assert len(server.requests) == 2
    assert [record.error.kind for record in result.requests] == ["http_400"] * 2


def test_fields_are_dropped_and_renamed_on_request():
    config = LoadConfig(
        drop_fields=("ignore_eos,stream_options", "temperature"),
        max_tokens_field="max_completion_tokens",
        ignore_eos=True,
        token_ids=False,
    )
    body = json.loads(request_body(config, "m", "Hi", 7))
    assert body == {"model": "m", "prompt": "Hi", "max_completion_tokens": 7, "stream": True}
    with pytest.raises(UserError, match="--drop-fields stream"):
        plan.check(LoadConfig(drop_fields=("stream",)))


def test_special_tokens_before_a_prompt_are_known(tokenizer, tokenizer_folder):
    assert (tokenizer.start, tokenizer.added) == ((0,), 1)
    loaded = load_tokenizer(tokenizer_folder)
    assert loaded is not None and loaded.for_chat(9).count(" a \n") == 9 + len(loaded.encode("a"))
