"""The first token from prefill: the client sees the stream that decode alone would have given, one step earlier."""

import json
import socket
from typing import Any

import pytest

from tests.support.processes import wait_until
from tests.support.proxy_processes import instance, proxy

GREEDY = {"max_tokens": 4, "temperature": 0, "stream": True}
TEXTS = [" t0", " t1", " t2", " t3"]


@pytest.fixture(scope="module")
def early(pair, tmp_path_factory):
    """A proxy that passes prefill's token on."""
    with proxy(tmp_path_factory.mktemp("early"), prefill=[pair[0]], decode=[pair[1]]) as server:
        yield server


@pytest.fixture(scope="module")
def late(pair, tmp_path_factory):
    """A proxy that does not."""
    options = ("--first-token", "decode")
    with proxy(tmp_path_factory.mktemp("late"), *options, prefill=[pair[0]], decode=[pair[1]]) as server:
        yield server


@pytest.fixture(scope="module")
def either(pair, tmp_path_factory):
    """A proxy that asks both at once and opens the stream with the token that comes first."""
    options = ("--first-token", "either")
    with proxy(tmp_path_factory.mktemp("either"), *options, prefill=[pair[0]], decode=[pair[1]]) as server:
        yield server


def script(**roles: Any) -> dict[str, str]:
    """What the instances are to do, in a field that is harmless."""
    return {"user": json.dumps(roles)}


def read_first(connection: socket.socket) -> None:
    """Read up to the first token."""
    received = b""
    while b" t0" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece


def texts(answer) -> list[str]:
    """The text of every event that has one."""
    return [event["choices"][0]["text"] for event in answer.events if isinstance(event, dict) and event.get("choices")]


@pytest.mark.parametrize("prompt", ["Hi", [1, 2, 3, 4, 5]], ids=["text", "ids"])
@pytest.mark.parametrize("ids", [True, False], ids=["with token ids", "without"])
@pytest.mark.parametrize("usage", [True, False], ids=["with usage", "without"])
def test_stream_equals_that_of_decode_alone(early, late, prompt, ids, usage):
    fields = GREEDY | {"prompt": prompt, "return_token_ids": ids, "stream_options": {"include_usage": usage}}
    seen, expected = early.complete(**fields), late.complete(**fields)
    assert seen.complete
    assert seen.headers["content-type"] == expected.headers["content-type"]
    assert texts(seen) == TEXTS
    stripped = [
        [{**event, "usage": event.get("usage")} if isinstance(event, dict) else event for event in answer.events]
        for answer in (seen, expected)
    ]
    for event in stripped[0][:1]:
        for name in ("logprobs", "stop_reason"):
            assert event["choices"][0].pop(name) is None
    assert stripped[0] == stripped[1]


def test_decode_continues_after_prefills_token(early, pair):
    answer = early.complete(**GREEDY)
    assert texts(answer) == TEXTS
    prefill, decode = (server.received(answer.request_id)[1] for server in pair)
    assert prefill["return_token_ids"] is True
    remote = decode.pop("kv_transfer_params")
    assert remote["prefilled_tokens"] == 5
    assert remote["transfer_id"] == prefill["kv_transfer_params"]["transfer_id"]
    assert decode == {"model": "m", "prompt": [1, 2, 3, 4, 5, 100], **GREEDY, "max_tokens": 3}
    event = early.event(answer.request_id)
    assert event["prefill_done_s"] <= event["first_token_s"] <= event["decode_sent_s"] <= event["first_byte_s"]


def test_default_max_tokens_is_one_less_for_decode(early, pair):
    answer = early.complete(stream=True, temperature=0, **script(decode={"tokens": 1}))
    assert pair[1].received(answer.request_id)[1]["max_tokens"] == 15


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"temperature": None},
        {"max_tokens": 1},
        {
            "max_tokens": None,
            **script(decode={"tokens": 2}),
        },  # only the context bounds it: is there room for a second token?
        {"max_tokens": "4", **script(decode={"tokens": 2})},
        {"max_tokens": 4.5, **script(decode={"tokens": 2})},
        {"max_tokens": -1},
        {"stream": False},
        {"stream": None},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 1},
        {"min_tokens": 2},
        {"logprobs": 1},
        {"stop": ["x"]},
        {"stop": "x"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"bad_words": ["x"]},
        {"suffix": "x"},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"a_field_of_tomorrow": 1},
        {"a_deep_field": json.loads("[" * 900 + "]" * 900)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_inexact_request_gets_its_first_token_from_decode(early, pair, fields):
    asked = {"prompt": "Hi", **GREEDY, **fields}
    answer = early.complete(**asked)
    assert answer.status == 200
    prefill, decode = (server.received(answer.request_id)[1] for server in pair)
    assert "prefilled_tokens" not in decode.pop("kv_transfer_params")
    assert decode == {"model": "m", **asked}
    assert "return_token_ids" not in prefill
    assert early.event(answer.request_id)["first_token_s"] is None


def test_chat_and_unset_temperature_are_dispatched_concurrently(early, pair):
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **GREEDY}
    answer = early.request("POST", "/v1/chat/completions", chat)
    assert answer.status == 200
    assert pair[1].received(answer.request_id)[1]["messages"] == chat["messages"]
    answer = early.complete(stream=True, max_tokens=4)
    assert answer.status == 200
    assert pair[1].received(answer.request_id)[1]["prompt"] == "Hi"


@pytest.mark.parametrize(
    "prefill", [{"finish": "stop"}, {"text": ""}, {"text": "\ufffd"}], ids=["ends the answer", "no text", "half a character"]
)  # fmt: skip
def test_token_without_text_is_left_to_decode(early, pair, prefill):
    answer = early.complete(**GREEDY, **script(prefill=prefill))
    assert texts(answer) == TEXTS
    decode = pair[1].received(answer.request_id)[1]
    assert decode["prompt"] == "Hi"
    assert decode["kv_transfer_params"]["do_remote_prefill"] is True


def test_dead_decode_is_replaced_after_the_first_token(tmp_path, pair):
    options = ("--decode-policy", "round-robin", "--health-interval-s", "60")
    with instance(tmp_path, "decode-2") as second, instance(tmp_path, "decode-3") as third:
        with proxy(tmp_path, *options, prefill=[pair[0]], decode=[second, third]) as server:
            server.wait_all_healthy()
            second.kill()
            answers = [server.complete(**GREEDY) for _ in range(2)]
            assert [texts(answer) for answer in answers] == [TEXTS, TEXTS]
            assert sorted(server.event(answer.request_id)["retries"] for answer in answers) == [0, 1]
            assert "prefilled_tokens" not in third.requests()[0]["body"]
            third.kill()
            answer = server.complete(**GREEDY)
            assert texts(answer)[:1] == [" t0"]
            assert answer.events[-1]["error"]["stage"] == "decode"


def test_refusal_of_decode_after_the_first_token_is_an_error_event(early):
    answer = early.complete(**GREEDY, **script(decode={"status": 400}))
    assert texts(answer)[:1] == [" t0"]
    assert answer.events[-1]["error"]["code"] == 400
    assert "scripted" in answer.events[-1]["error"]["message"]
    assert early.event(answer.request_id)["stage"] == "decode"


def test_client_leaving_at_the_first_token_lets_decode_fetch_the_kv(early, pair):
    body = json.dumps(
        {"model": "m", "prompt": "Hi", **GREEDY, **script(decode={"first": 0.2, "tokens": 50, "delay": 0.05})}
    )
    with early.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nX-Request-Id: left\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        read_first(connection)
    assert early.event("left")["status"] == 499
    wait_until(lambda: "left" in pair[1].aborted())
    (asked,) = (line["at_s"] for line in pair[1].requests() if line["headers"]["x-request-id"] == "left")
    (ended,) = (line["at_s"] for line in pair[1].lines() if line["event"] == "abort" and line["request_id"] == "left")
    assert ended - asked >= 0.2, "decode was not given the time to fetch the KV"
    early.wait_idle()


@pytest.mark.parametrize("mode", ["prefill", "either"])
def test_answer_that_the_context_does_not_hold_is_decodes_to_refuse(pair, tmp_path, mode):
    with (
        instance(tmp_path, "short", "--max-model-len", "8") as short,
        proxy(tmp_path, "--first-token", mode, prefill=[pair[0]], decode=[short]) as server,
    ):
        refused = server.complete(**GREEDY, **script(decode=LATER | {"status": 400}))  # 5 tokens and 4
        assert (refused.status, refused.json["error"]["message"]) == (400, "scripted")
        answer = server.complete(**GREEDY | {"max_tokens": 3}, **script(decode=LATER))
        assert texts(answer) == TEXTS[:3] and server.event(answer.request_id)["first_token_s"] is not None


# Long enough for prefill's token to come first on a busy machine.
LATER = {"first": 1.0}


@pytest.mark.parametrize(
    ("decode", "ids", "expected"),
    [
        ({}, True, TEXTS),
        ({}, False, TEXTS),
        ({"cut": True}, True, TEXTS),
        ({"merged": 3}, True, [" t0", " t1 t2", " t3"]),
        ({"merged": 4}, False, [" t0", " t1 t2 t3"]),
        ({"id": 999}, False, TEXTS),  # a client that sees no ids gets decode's text
    ],
    ids=["with token ids", "without", "events in pieces", "merged tokens", "all tokens merged", "another id"],
)
def test_either_opens_with_prefills_token_and_drops_decodes(either, late, pair, decode, ids, expected):
    fields = GREEDY | {"return_token_ids": ids, "stream_options": {"include_usage": True}}
    seen, alone = either.complete(**fields, **script(decode=LATER | decode)), late.complete(**fields)
    event = either.event(seen.request_id)
    assert event["decode_sent_s"] < event["prefill_done_s"] <= event["first_token_s"] < event["first_byte_s"]
    assert not event["first_tokens_differ"]
    assert "prefilled_tokens" not in pair[1].received(seen.request_id)[1]["kv_transfer_params"]
    assert seen.complete and texts(seen) == expected
    assert seen.events[-2:] == alone.events[-2:], "usage and [DONE]"
    for name, values in (("token_ids", [100, 101, 102, 103]), ("prompt_token_ids", [1, 2, 3, 4, 5])):
        choices = [choice for event in seen.events[:-1] for choice in event["choices"]]
        assert [i for choice in choices for i in choice.get(name) or []] == (values if ids else [])


def test_kv_that_may_return_is_asked_for_at_once(late, pair, tmp_path):
    """Where prefill may wait for decode's word, decode is sent the request whoever opens the stream."""
    with proxy(tmp_path, "--return-kv", prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.complete(**GREEDY, **script(decode=LATER))
        event = server.event(answer.request_id)
    assert texts(answer) == TEXTS and event["decode_sent_s"] < event["prefill_done_s"]
    prefill, decode = (instance.received(answer.request_id)[1]["kv_transfer_params"] for instance in pair)
    assert prefill == {"transfer_id": decode["transfer_id"], "do_remote_decode": True, "return_kv": True}
    other = late.complete(**GREEDY)
    assert "return_kv" not in pair[0].received(other.request_id)[1]["kv_transfer_params"]


def test_decode_that_is_faster_opens_the_stream(either):
    answer = either.complete(**GREEDY, **script(prefill={"first": 2.0}, decode={"delay": 0.1}))
    assert texts(answer) == TEXTS and answer.complete
    event = either.event(answer.request_id)
    assert event["first_token_s"] is None and event["first_byte_s"] < event["prefill_done_s"]


@pytest.mark.parametrize(
    ("decode", "ids"),
    [({"text": " x0"}, False), ({"text": "", "cut": True}, True), ({"id": 999, "delay": 0.1}, True)],
    ids=["text", "no text yet", "id"],
)
def test_decode_with_another_first_token_is_asked_to_continue_from_prefills(either, late, pair, decode, ids):
    fields = GREEDY | {"return_token_ids": ids, "stream_options": {"include_usage": True}}
    seen, alone = either.complete(**fields, **script(decode=LATER | decode)), late.complete(**fields)
    assert seen.complete and texts(seen) == TEXTS
    assert seen.events[-2:] == alone.events[-2:], "usage and [DONE]"
    assert either.event(seen.request_id)["first_tokens_differ"]
    again = pair[1].received(seen.request_id)[1]
    assert again["prompt"] == [1, 2, 3, 4, 5, 100] and again["max_tokens"] == 3
    assert "kv_transfer_params" not in again, "a transfer id serves once, and decode has the prompt in its prefix cache"
    if "delay" in decode:
        wait_until(lambda: seen.request_id in pair[1].aborted(), what="the other token's request was ended")
    either.wait_idle()


def test_failed_prefill_ends_the_request_that_waits_at_decode(either, pair):
    answer = either.complete(**GREEDY, **script(prefill={"status": 500}, decode={"first": 30}))
    assert answer.status == 502 and answer.json["error"]["stage"] == "prefill"
    wait_until(lambda: answer.request_id in pair[1].aborted(), what="decode's request was ended")
    either.wait_idle()


def test_failed_decode_is_replaced_after_the_first_token_of_either(tmp_path, pair):
    """It refuses to connect, dies before its first byte, or has no other to replace it."""
    options = ("--first-token", "either", "--decode-policy", "round-robin", "--health-interval-s", "60")
    with instance(tmp_path, "decode-2") as second, instance(tmp_path, "decode-3") as third:
        with proxy(tmp_path, *options, prefill=[pair[0]], decode=[second, third]) as server:
            server.wait_all_healthy()
            answer = server.complete(**GREEDY, **script(decode=LATER | {"die": 0}))
            assert texts(answer)[:1] == [" t0"] and answer.events[-1]["error"]["stage"] == "decode"
            second.kill()
            answers = [server.complete(**GREEDY, **script(decode=LATER)) for _ in range(2)]
            assert [texts(answer) for answer in answers] == [TEXTS, TEXTS]
            server.wait_idle()


def test_client_leaving_at_the_first_token_of_either_ends_decode(either, pair):
    body = json.dumps({"model": "m", "prompt": "Hi", **GREEDY, **script(decode={"first": 30})}).encode()
    with either.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nX-Request-Id: left-either\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        read_first(connection)
    assert either.event("left-either")["status"] == 499
    wait_until(lambda: "left-either" in pair[1].aborted(), what="decode's request was ended")
    either.wait_idle()


@pytest.mark.parametrize("decode", [{"status": 400}, {"status": 500}, {"end": "empty-body"}], ids=str)
def test_answer_of_decode_that_is_no_stream_is_an_error_event_of_either(either, decode):
    answer = either.complete(**GREEDY, **script(decode=LATER | decode))
    assert texts(answer) == [" t0"] and answer.events[-1]["error"]["stage"] == "decode"
