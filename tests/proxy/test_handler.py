"""One request's way through real sockets and processes: what each instance gets, and what the client gets back."""

import re
from pathlib import Path

import pytest

from tests.support.proxy_processes import proxy, read_answer

PROMPT = {"model": "m", "prompt": "Hi", "max_tokens": 4, "temperature": 0.50, "tools": [{"x": 1}], "logprobs": 2}
# What prefill gets of it.
PREFILL = {
    "model": "m",
    "prompt": "Hi",
    "max_tokens": 1,
    "temperature": 0.50,
    "tools": [{"x": 1}],
    "stream": False,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory):
    """A proxy with pdbench's connector."""
    folder = tmp_path_factory.mktemp("handler")
    with proxy(folder, "--timing-header", prefill=[pair[0]], decode=[pair[1]]) as server:
        yield server


def test_pdbench_protocol_names_one_transfer_to_both_sides(server, pair):
    answer = server.request("POST", "/v1/completions", PROMPT, X_Request_Id="load-7")
    assert answer.status == 200
    assert answer.json["choices"][0]["text"] == " t0 t1 t2 t3"
    assert answer.json["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    prefill, decode = (instance.received("load-7")[1] for instance in pair)
    transfer = prefill.pop("kv_transfer_params")
    assert prefill == PREFILL
    remote = decode.pop("kv_transfer_params")
    assert decode == PROMPT
    assert transfer == {"transfer_id": remote["transfer_id"], "do_remote_decode": True}
    assert remote == {
        "transfer_id": transfer["transfer_id"],
        "do_remote_prefill": True,
        "remote_host": "127.0.0.1",
        "remote_port": 14579,
    }


def test_client_bytes_reach_decode_unchanged(server, pair):
    body = b' {"model" : "m", "prompt":"\\u00e9", "temperature": 1e-1, "max_tokens":2 } '
    assert server.request("POST", "/v1/completions", body).status == 200
    assert pair[1].requests()[-1]["body"].startswith(body.rstrip().decode()[:-1])


def test_event_has_all_instants_in_order(server, pair):
    answer = server.complete(stream=True, max_tokens=2)
    assert answer.complete
    event = server.event(answer.request_id)
    assert event["event"] == "request"
    assert event["prefill"] == pair[0].url
    assert event["decode"] == pair[1].url
    assert (event["status"], event["retries"], event["error"]) == (200, 0, None)
    assert event["received_s"] <= event["admitted_s"] <= event["prefill_sent_s"] <= event["prefill_done_s"]
    assert event["admitted_s"] <= event["decode_sent_s"] <= event["first_byte_s"] <= event["last_byte_s"]
    assert "Hi" not in server.log.read_text()


def test_stream_is_passed_on_to_its_end(server):
    # Prefill's part is in the header where it ended before decode's first byte.
    answer = server.complete(stream=True, max_tokens=5, decode={"first": 1})
    assert answer.complete
    assert [event["choices"][0]["text"] for event in answer.events[:-1]] == [" t0", " t1", " t2", " t3", " t4"]
    assert answer.events[-1] == b"[DONE]"
    assert re.search(r"queue;dur=[\d.]+, prefill;dur=[\d.]+, first_byte;dur=[\d.]+", answer.headers["server-timing"])


def test_events_split_over_packets_are_joined(server):
    answer = server.complete(stream=True, max_tokens=5, decode={"cut": True})
    assert answer.complete
    assert [event["choices"][0]["text"] for event in answer.events[:-1]] == [" t0", " t1", " t2", " t3", " t4"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"n": "2"},
        {"n": 2.0},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
        {"best_of": 3},
        {"echo": True},
        {"echo": "true"},
        {"prompt_logprobs": 1},
    ],
)
def test_request_that_no_transfer_carries_goes_to_decode_only(server, pair, fields):
    answer = server.request("POST", "/v1/completions", {**PROMPT, **fields})
    assert answer.status == 200
    assert pair[1].received(answer.request_id)[1] == {**PROMPT, **fields}
    assert server.event(answer.request_id)["prefill"] is None
    assert not pair[0].log.exists() or answer.request_id not in pair[0].log.read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        *({"prompt": prompt} for prompt in ([1, 2], ["a"], [[1, 2]], "[")),
        {"echo": False},
        {"prompt_logprobs": None},
    ],
)
def test_request_that_one_transfer_carries_is_prefilled(server, pair, fields):
    answer = server.request("POST", "/v1/completions", {**PROMPT, **fields})
    assert answer.status == 200
    assert pair[0].received(answer.request_id)[1]["max_tokens"] == 1


@pytest.mark.parametrize("key", ["kv_transfer_params", "kv_\\u0074ransfer_params"])
def test_client_kv_transfer_params_are_dropped(server, pair, key):
    body = b'{"model":"m","prompt":"Hi","%b":{"remote_host":"10.0.0.1"}}' % key.encode()
    answer = server.request("POST", "/v1/completions", body)
    assert answer.status == 200
    for instance in pair:
        instance.received(answer.request_id)
        assert "10.0.0.1" not in instance.log.read_text()


def test_prefill_request_drops_fields_that_contradict_one_token(server, pair):
    fields = {"stream_options": {"include_usage": True}, "min_tokens": 3, "max_completion_tokens": 9}
    answer = server.complete(stream=True, **fields)
    assert answer.status == 200
    prefill = pair[0].received(answer.request_id)[1]
    assert "stream_options" not in prefill
    assert "min_tokens" not in prefill
    assert (prefill["max_tokens"], prefill["max_completion_tokens"]) == (1, 1)


ANSWER_FIELDS = {
    "stop": ["\n\n"],
    "stop_token_ids": [7],
    "include_stop_str_in_output": True,
    "logprobs": True,
    "top_logprobs": 5,
    "return_token_ids": True,
    "structured_outputs": {"json": {}},
    "guided_regex": "a+",
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SHOWN_FIELDS = {"response_format": {"type": "json_object"}, "tool_choice": "required"}


def test_prefill_request_drops_what_concerns_the_answer_alone(server, pair):
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "tools": [TOOL], "n": 1}
    body = {**chat, **ANSWER_FIELDS, **SHOWN_FIELDS, "seed": 3, "chat_template_kwargs": {"thinking": False}}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    prefill, decode = (instance.received(answer.request_id)[1] for instance in pair)
    assert prefill.pop("kv_transfer_params") and decode.pop("kv_transfer_params")
    kept = {**chat, "seed": 3, "chat_template_kwargs": {"thinking": False}}
    assert prefill == {**kept, "max_tokens": 1, "stream": False, "ignore_eos": True, "tool_choice": "none"}
    assert decode == body


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_tool_choice_that_asks_for_no_call_stays(server, pair, choice):
    body = {"model": "m", "messages": [], "max_tokens": 2, "tools": [TOOL], "tool_choice": choice}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert pair[0].received(answer.request_id)[1]["tool_choice"] == choice


def test_fields_that_a_template_may_show_stay_where_prompts_are_not_compared(pair, tmp_path: Path):
    body = {"model": "m", "messages": [], "max_tokens": 2, "tools": [TOOL], **ANSWER_FIELDS, **SHOWN_FIELDS}
    with proxy(tmp_path, "--connector", "nixl", prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.request("POST", "/v1/chat/completions", body)
        prefill = pair[0].received(answer.request_id)[1]
    assert {name: prefill.get(name) for name in SHOWN_FIELDS} == SHOWN_FIELDS
    assert not ANSWER_FIELDS.keys() & prefill.keys()


OTHER_APIS = {
    "/v1/responses": {"model": "m", "input": "Hi", "max_output_tokens": 4, "stream": True},
    "/v1/messages": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True},
}


@pytest.mark.parametrize("path", OTHER_APIS)
def test_other_apis_are_prefilled_with_one_token_and_decoded_to_their_own_end(server, pair, path):
    answer = server.request("POST", path, OTHER_APIS[path])
    assert answer.complete and [event["type"] for event in answer.events[:4]] == ["delta"] * 4
    assert answer.events[-1]["type"] in ("response.completed", "message_stop")
    assert server.event(answer.request_id)["error"] is None
    prefill, decode = (instance.received(answer.request_id)[1] for instance in pair)
    assert prefill.pop("kv_transfer_params")["transfer_id"] == decode.pop("kv_transfer_params")["transfer_id"]
    limit = "max_output_tokens" if "input" in decode else "max_tokens"
    assert prefill == {**OTHER_APIS[path], "stream": False, limit: 1, "ignore_eos": True}
    assert decode == OTHER_APIS[path]


@pytest.mark.parametrize("path", OTHER_APIS)
def test_other_api_without_its_last_event_ends_in_an_error_event(server, path):
    answer = server.request("POST", path, {**OTHER_APIS[path], "decode": {"end": "none"}})
    last = answer.body.rstrip().split(b"\n")[-2:]
    assert last[0] == b"event: error" and b"decode ended the stream without event: " in last[1]


@pytest.mark.parametrize("fields", [{"previous_response_id": "resp_1"}, {"background": True}])
def test_conversation_that_an_instance_keeps_is_decodes(server, fields):
    answer = server.request("POST", "/v1/responses", {**OTHER_APIS["/v1/responses"], **fields})
    event = server.event(answer.request_id)
    assert (event["status"], event["prefill"], event["decode_alone"]) == (200, None, "stateful")


def test_responses_are_refused_where_the_request_id_carries_the_transfer(pair, tmp_path: Path):
    options = ("--connector", "builtin-p2p-nccl")
    with proxy(tmp_path, *options, prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.request("POST", "/v1/responses", OTHER_APIS["/v1/responses"])
        assert (answer.status, "use /v1/chat/completions" in answer.json["error"]["message"]) == (404, True)
        assert server.request("POST", "/v1/messages", OTHER_APIS["/v1/messages"]).status == 200


@pytest.mark.parametrize(
    ("prompt", "alone", "tokens"),
    [
        (list(range(1, 65)), "short", 64),
        (list(range(1, 66)), None, 65),
        ("x" * 200, "short", 51),
        ("x" * 300, None, 76),
        (["a", "b"], "several-sequences", 3),
    ],
)
def test_short_prompts_are_decodes_alone(pair, tmp_path: Path, prompt, alone, tokens):
    with proxy(tmp_path, "--disaggregate-above", "64", prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.complete(stream=True, prompt=prompt, max_tokens=3, temperature=0)
        assert answer.complete
        event = server.event(answer.request_id)
        assert (event["decode_alone"], event["prompt_tokens"]) == (alone, tokens)
        assert (event["prefill"] is None) == (event["prefill_sent_s"] is None) == (alone is not None)
        assert ("kv_transfer_params" in pair[1].received(answer.request_id)[1]) == (alone is None)


def test_correctness_check_goes_through_prefill_however_short_it_is(pair, tmp_path: Path):
    with proxy(tmp_path, "--disaggregate-above", "64", prefill=[pair[0]], decode=[pair[1]]) as server:
        body = {"model": "m", "prompt": "Hi", "max_tokens": 3}
        answer = server.request("POST", "/v1/completions", body, X_Pdbench_Disaggregate="always")
        assert server.event(answer.request_id)["decode_alone"] is None


def test_prompt_that_decode_computes_because_prefill_failed_says_so(pair, tmp_path: Path):
    options = ("--fallback", "recompute", "--retries", "0")
    with proxy(tmp_path, *options, prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.complete(max_tokens=4, prefill={"status": 500}, decode={"first": 1})
        event = server.event(answer.request_id)
        assert (answer.status, event["decode_alone"]) == (200, "prefill-failed")


def test_what_prefill_refuses_is_decodes_to_answer(server, pair):
    answer = server.complete(max_tokens=4, prefill={"status": 400}, decode={"first": 0.5, "status": 422})
    assert (answer.status, answer.json["error"]["message"]) == (422, "scripted")
    answer = server.complete(max_tokens=4, prefill={"status": 400}, decode={"first": 0.5})
    event = server.event(answer.request_id)
    assert (answer.status, event["decode_alone"], event["retries"]) == (200, "prefill-refused", 0)
    assert "kv_transfer_params" not in pair[1].received(answer.request_id)[1]


def test_refusal_of_an_instance_reaches_the_client(server):
    answer = server.complete(max_tokens=4, decode={"status": 422}, prefill={"first": 30})
    assert (answer.status, answer.json["error"]["message"]) == (422, "scripted")


def test_requests_share_one_connection(server):
    body = b'{"model":"m","prompt":"Hi","max_tokens":2,"stream":true}'
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(request)
            assert read_answer(connection).events[-1] == b"[DONE]"


def test_trailers_of_an_instance_are_dropped(server):
    for _ in range(3):
        answer = server.complete(stream=True, max_tokens=2, decode={"trailer": "X-Trace: mine\r\n"})
        assert answer.events[-1] == b"[DONE]"
        assert "x-trace" not in answer.headers


def test_trailers_of_a_client_are_not_headers(server, pair):
    body = b'{"model":"m","prompt":"Hi","max_tokens":2}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: trailing\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.send(head + b"%x\r\n%b\r\n0\r\nAuthorization: Bearer late\r\n\r\n" % (len(body), body)).status == 200
    for instance in pair:
        assert "authorization" not in instance.received("trailing")[0]


def test_http_1_0_gets_a_stream_without_chunks(server):
    body = b'{"model":"m","prompt":"Hi","max_tokens":2,"stream":true}'
    answer = server.send(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert "transfer-encoding" not in answer.headers
    assert answer.events[-1] == b"[DONE]"


def test_chunked_and_100_continue_bodies_are_read(server):
    body = b'{"model":"m","prompt":"Hi","max_tokens":2}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert server.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)).status == 200
    with server.connect() as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head % len(body))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_answer(connection).status == 200


def test_models_health_and_metrics_are_served(server):
    assert server.request("GET", "/v1/models").json["data"][0]["id"] == "m"
    assert server.request("GET", "/health").status == server.request("GET", "/health/live").status == 200
    server.complete()
    metrics = server.request("GET", "/metrics").body.decode()
    assert re.search(r'pdbench_proxy_requests_total\{status="200"\} [1-9]', metrics)
    assert 'pdbench_proxy_stage_seconds_count{stage="prefill"}' in metrics
    assert 'pdbench_proxy_instance_in_flight{role="decode"' in metrics


def test_builtin_protocol_puts_both_addresses_into_the_request_id(pair, tmp_path: Path):
    with proxy(
        tmp_path, "--connector", "builtin-p2p-nccl", "--kv-port", "7000", prefill=[pair[0]], decode=[pair[1]]
    ) as server:
        assert server.request("POST", "/v1/completions", {**PROMPT, "n": 2}, X_Request_Id="mine").status == 200
        event = server.event("mine")
        assert event["prefill_done_s"] <= event["decode_sent_s"]
        request_id = pair[1].requests()[-1]["headers"]["x-request-id"]
        pattern = r"___prefill_addr_127\.0\.0\.1:7000___decode_addr_127\.0\.0\.1:7001_[0-9a-f]{32}"
        assert re.fullmatch(pattern, request_id)
        prefill, decode = (instance.received(request_id)[1] for instance in pair)
        assert prefill == {**PREFILL, "n": 2}
        assert decode == {**PROMPT, "n": 2}

        before = len(pair[1].requests())
        answer = server.complete(max_tokens=4, prefill={"status": 500})
        assert (answer.status, answer.json["error"]["stage"]) == (502, "prefill")
        assert len(pair[1].requests()) == before, "decode must never hear of a request that was not prefilled"


def test_nixl_protocol_hands_prefills_parameters_to_decode(pair, tmp_path: Path):
    with proxy(tmp_path, "--connector", "nixl", prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.request("POST", "/v1/completions", PROMPT)
        assert answer.status == 200
        request, handed = (instance.received(answer.request_id)[1]["kv_transfer_params"] for instance in pair)
        assert request["do_remote_decode"] is True
        assert request["do_remote_prefill"] is False
        assert handed == {"remote_engine_id": "e", "remote_block_ids": [1, 2], "received": request}


def test_nixl_push_protocol_gives_both_requests_one_name_that_no_client_can_choose(pair, tmp_path: Path):
    with proxy(tmp_path, "--connector", "nixl-push", prefill=[pair[0]], decode=[pair[1]]) as server:
        for _ in range(2):
            assert server.request("POST", "/v1/completions", PROMPT, X_Request_Id="mine").status == 200
        prefill, decode = ([request["headers"]["x-request-id"] for request in each.requests()[-2:]] for each in pair)
        assert prefill == decode and len(set(prefill)) == 2
        assert all(re.fullmatch(r"mine-[0-9a-f]{32}", name) for name in prefill)
        request, handed = (each.received(prefill[1])[1]["kv_transfer_params"] for each in pair)
        assert handed == {"remote_engine_id": "e", "remote_block_ids": [1, 2], "received": request}
        event = server.event("mine")
        assert event["prefill_done_s"] <= event["decode_sent_s"]

        answer = server.request("POST", "/v1/responses", OTHER_APIS["/v1/responses"])  # vLLM chooses its name
        event = server.event(answer.request_id)
        assert (event["status"], event["prefill"], event["decode_alone"]) == (200, None, "unnamed")


def test_mooncake_protocol_names_prefill_to_decode(pair, tmp_path: Path):
    with proxy(tmp_path, "--connector", "mooncake", prefill=[pair[0]], decode=[pair[1]]) as server:
        answer = server.complete(stream=True)
        request, handed = (instance.received(answer.request_id)[1]["kv_transfer_params"] for instance in pair)
        address = handed.pop("remote_engine_id")
        assert handed.pop("remote_bootstrap_addr") == f"http://{address}" and address.startswith("127.0.0.1:")
        assert request == {"transfer_id": handed["transfer_id"], "do_remote_decode": True, "do_remote_prefill": False}
        assert handed == {"transfer_id": request["transfer_id"], "do_remote_decode": False, "do_remote_prefill": True}
        assert server.event(answer.request_id)["first_token_s"] is None, "decode computes the first token"


def test_openai_client_works_unchanged(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
        assert whole.choices[0].message.content == " t0 t1 t2"
        events = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, stream=True
        )
        assert "".join(event.choices[0].delta.content for event in events) == " t0 t1 t2"
        assert [model.id for model in client.models.list()] == ["m"]
        with pytest.raises(openai.APIError, match="decode failed mid-stream"):
            for _ in client.completions.create(
                model="m", prompt="Hi", max_tokens=4, stream=True, extra_body={"decode": {"die": 3}}
            ):
                pass
