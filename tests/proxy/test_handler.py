"""One request's way through real sockets and processes: what each instance gets, and what the client gets back."""

import re
from pathlib import Path

import pytest

from tests.support.proxy_processes import proxy, read_answer

PROMPT = {"model": "m", "prompt": "Hi", "max_tokens": 4, "temperature": 0.50, "tools": [{"x": 1}], "logprobs": 2}


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
    assert prefill == {**PROMPT, "max_tokens": 1, "stream": False}
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
    [{"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"best_of": 3}, {"echo": True}, {"prompt_logprobs": 1}],
)
def test_request_that_no_transfer_carries_goes_to_decode_only(server, pair, fields):
    answer = server.request("POST", "/v1/completions", {**PROMPT, **fields})
    assert answer.status == 200
    assert pair[1].received(answer.request_id)[1] == {**PROMPT, **fields}
    assert server.event(answer.request_id)["prefill"] is None
    assert answer.request_id not in pair[0].log.read_text()


@pytest.mark.parametrize("fields", [{"n": 1}, {"prompt": [1, 2]}, {"prompt": "["}, {"echo": False}])
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


def test_refusal_of_an_instance_reaches_the_client(server):
    answer = server.complete(max_tokens=4, prefill={"status": 400}, decode={"first": 30})
    assert (answer.status, answer.json["error"]["message"]) == (400, "scripted")
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
        assert prefill == {**PROMPT, "n": 2, "max_tokens": 1, "stream": False}
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
