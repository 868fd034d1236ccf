"""The events of proxy and connector: their clock, and the join with the client's requests."""

import json

import msgspec
import pytest

from pdbench import events
from pdbench.events import PromptEvent, ProxyEvent, TransferEvent
from pdbench.records import Clock, RequestRecord

CLOCK = Clock(monotonic_s=10.0, unix_s=0.0)


def parsed(lines: list[str]) -> list[events.Event]:
    """The events of these lines on the run's clock."""
    return [events.move(event, CLOCK.of_monotonic) for event in events.parse(lines)]


def test_events_join_the_client_by_request_and_transfer_id() -> None:
    proxy = {
        "event": "request",
        "request_id": "r1",
        "transfer_id": "t1",
        "received_s": 10.1,
        "prefill_sent_s": 10.2,
        "prefill_done_s": 10.5,
    }
    receive = {
        "event": "kv_transfer",
        "side": "receive",
        "transfer_id": "t1",
        "first_byte_s": 10.51,
        "end_s": 10.52,
        "error": None,
    }
    send = receive | {"side": "send", "end_s": 99.0}
    lines = [*map(json.dumps, (proxy, send, receive)), '{"event": "requ']
    found = parsed(lines)
    joined = RequestRecord(id="r1", planned_s=0.0, sent_s=0.05, token_s=[0.6, 0.7])
    alone = RequestRecord(id="r2", planned_s=0.0, sent_s=0.05, token_s=[0.6])
    events.join([joined, alone], found)
    rounded = {name: None if span is None else tuple(round(x, 6) for x in span) for name, span in joined.phases.items()}
    proxied = {"send": (0.05, 0.1), "proxy": (0.1, 0.2)}
    assert rounded == {**proxied, "prefill": (0.2, 0.5), "kv_transfer": (0.51, 0.52), "decode": (0.52, 0.7)}
    assert alone.phases == {}


def receive(rank: int, first_byte_s: float, end_s: float, error: str | None = None) -> TransferEvent:
    return TransferEvent(
        side="receive", transfer_id="t1", rank=rank, first_byte_s=first_byte_s, end_s=end_s, error=error
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_transfer_lasts_until_its_last_rank_has_all(order: int) -> None:
    proxy = ProxyEvent(request_id="r1", transfer_id="t1", prefill_sent_s=0.1, decode_sent_s=0.5)
    ranks = [receive(0, 1.0, 3.0), receive(1, 1.9, 2.0)][::order]
    request = RequestRecord(id="r1", planned_s=0.0, token_s=[4.0])
    events.join([request], [proxy, *ranks])
    assert (request.phases["kv_transfer"], request.phases["decode"]) == ((1.0, 3.0), (3.0, 4.0))
    events.join([request], [proxy, receive(0, 1.0, 3.0, "gone"), receive(1, 1.9, 2.0)][::order])
    assert (request.phases["kv_transfer"], request.phases["decode"]) == (None, (0.5, 4.0))


def test_every_instant_of_an_event_is_on_the_runs_clock_and_no_duration_is() -> None:
    transfer = {"event": "kv_transfer", "side": "receive", "transfer_id": "t1", "bytes": 11, "error": None}
    transfer |= {"asked_s": 11.0, "ready_s": None, "first_byte_s": 12.0, "end_s": 13.0, "reported_s": 14.0}
    transfer |= {"wire_s": 0.5, "copy_s": 0.25}
    request = {"event": "request", "request_id": "r1", "received_s": 11.0, "admitted_s": 12.0, "status": 200}
    steps = {"begin_s": [12.0, 13.0], "end_s": [13.0, 14.0], "tokens": [11, 12]}
    prompt = {"event": "prompt", "server": "s", "request_id": "r", "arrived_s": 11.0, **steps, "first_token_s": 14.0}
    read = parsed([json.dumps(transfer), json.dumps(request), json.dumps(prompt)])
    moved = {"asked_s": 1.0, "first_byte_s": 2.0, "end_s": 3.0, "reported_s": 4.0}
    assert [msgspec.to_builtins(event) for event in read] == [
        msgspec.to_builtins(
            TransferEvent(**({key: value for key, value in transfer.items() if key != "event"} | moved))
        ),
        msgspec.to_builtins(ProxyEvent(request_id="r1", received_s=1.0, admitted_s=2.0, status=200)),
        prompt
        | {"arrived_s": 1.0, "begin_s": [2.0, 3.0], "end_s": [3.0, 4.0], "first_token_s": 4.0}
        | {"transfer_id": None, "prompt_tokens": 0, "taken_s": None, "error": None},
    ]


def test_a_phase_nobody_reported_is_none() -> None:
    proxy = {"event": "request", "request_id": "r1", "transfer_id": "t1", "received_s": 10.1, "decode_sent_s": 10.6}
    request = RequestRecord(id="r1", planned_s=0.0, sent_s=0.05, token_s=[0.7])
    events.join([request], parsed([json.dumps(proxy)]))
    assert request.phases["prefill"] is None
    assert request.phases["kv_transfer"] is None
    assert request.phases["decode"] is None  # the instance computed the prompt too


def test_decode_begins_when_it_was_sent_where_no_transfer_is_reported() -> None:
    way = ProxyEvent(request_id="r1", prefill_sent_s=0.1, prefill_done_s=0.4, decode_sent_s=0.5)
    request = RequestRecord(id="r1", planned_s=0.0, sent_s=0.05, token_s=[0.7])
    events.join([request], [way])
    assert request.phases["decode"] == (0.5, 0.7)


@pytest.mark.parametrize(
    ("has_prefill", "names"), [(True, ("decode_queue", "decode_step")), (False, ("queue", "compute"))]
)
def test_decodes_queue_is_never_the_requests_queue(has_prefill: bool, names: tuple[str, str]) -> None:
    request = RequestRecord(id="r1", planned_s=0.0, phases={"queue": (0.1, 0.2), "compute": (0.2, 0.3)})
    events.join([request], [], has_prefill)
    assert request.phases == dict(zip(names, [(0.1, 0.2), (0.2, 0.3)], strict=True))


def test_what_decode_said_of_its_first_token_is_dropped_where_prefills_came_first() -> None:
    request = RequestRecord(
        id="r1", planned_s=0.0, token_s=[0.3, 0.5], phases={"queue": (0.1, 0.2), "compute": (0.2, 0.3)}
    )
    way = ProxyEvent(request_id="r1", prefill_sent_s=0.1, prefill_done_s=0.25, first_token_s=0.26, decode_sent_s=0.26)
    events.join([request], [way])
    assert not {"queue", "compute", "decode_queue", "decode_step"} & request.phases.keys()


def prompt(server: str, request_id: str, *instants: float, **fields: object) -> PromptEvent:
    """A prompt that arrived, began its steps at all but the last of these instants, and had its first token at the last."""
    arrived_s, *begin_s, first_token_s = instants
    steps = {"begin_s": begin_s, "end_s": [*begin_s[1:], first_token_s], "tokens": [16] * len(begin_s)}
    return PromptEvent(
        server=server, request_id=request_id, arrived_s=arrived_s, first_token_s=first_token_s, **steps, **fields
    )


OVERLAPPING = ("prefill", "kv_transfer", "decode", "decode_alone", "compute_1")


def parts(request: RequestRecord, *of_events: events.Event) -> list[str]:
    """The phases that follow each other without a gap from the sending of the request to its first token."""
    events.join([request], of_events)
    names, at_s = [], request.sent_s
    while at_s != request.token_s[0]:
        (name,) = [
            name
            for name, span in request.phases.items()
            if span and span[0] == at_s < span[1] <= request.token_s[0] and name not in OVERLAPPING
        ]
        names.append(name)
        at_s = request.phases[name][1]
    return names


def request_at(*token_s: float) -> RequestRecord:
    return RequestRecord(id="run-000007", planned_s=0.0, sent_s=0.1, token_s=list(token_s))


@pytest.mark.parametrize("name", ["cmpl-run-000007-0", "chatcmpl-run-000007", "cmpl-run-000007-0-8f3a01cc"])
def test_ttft_of_a_single_instance_is_in_parts(name: str) -> None:
    request = request_at(0.9, 1.0)
    others = prompt("single-0", "cmpl-run-000008-0", 0.1, 0.2, 0.3)
    assert parts(request, others, prompt("single-0", name, 0.2, 0.5, 0.6, 0.8)) == [
        "api_server",
        "queue",
        "compute",
        "reply",
    ]
    assert (request.phases["compute_1"], request.phases["compute_2"]) == ((0.5, 0.6), (0.6, 0.8))


def test_ttft_behind_a_load_balancer_has_the_proxys_part_and_the_last_instances_prompt() -> None:
    request = request_at(0.9)
    way = ProxyEvent(request_id="run-000007", received_s=0.15, decode_sent_s=0.4, first_byte_s=0.85, retries=1)
    tries = [prompt(f"replica-{i}", "cmpl-run-000007-0", at, at + 0.05, at + 0.2) for i, at in ((1, 0.5), (0, 0.2))]
    assert parts(request, way, *tries) == ["send", "proxy", "api_server", "queue", "compute", "reply"]
    assert request.phases["compute"] == (0.55, 0.7)


DISAGGREGATED = {"request_id": "run-000007", "transfer_id": "t1", "received_s": 0.15, "prefill_sent_s": 0.2}
PREFILLED = prompt("prefill-0", "cmpl-run-000007-0-abc", 0.25, 0.3, 0.4, transfer_id="t1")


def test_ttft_that_decode_ends_has_handoff_and_decodes_first_step() -> None:
    request = request_at(0.9, 1.0)
    decoded = prompt("decode-0", "cmpl-run-000007-0-def", 0.25, 0.7, 0.8, transfer_id="t1")
    way = ProxyEvent(**DISAGGREGATED, decode_sent_s=0.2)
    moved = TransferEvent(side="receive", transfer_id="t1", first_byte_s=0.5, end_s=0.55, reported_s=0.6)
    before = ["send", "proxy", "api_server", "queue", "compute", "handoff"]
    back = TransferEvent(
        side="receive", transfer_id="t1", direction="return", first_byte_s=0.26, end_s=0.28, reported_s=0.29
    )
    assert parts(request, decoded, PREFILLED, way, moved, back) == [*before, "decode_wait", "decode_step", "reply"]
    assert request.phases["kv_transfer"] == (0.5, 0.55)
    assert request.phases["queue"] == (0.25, 0.3)
    request.phases.clear()
    assert parts(request, decoded, PREFILLED, way) == [*before, "decode_step", "reply"], "another connector"


def test_ttft_that_prefill_ends_is_prefills() -> None:
    request = request_at(0.5, 1.0)
    way = ProxyEvent(**DISAGGREGATED, prefill_done_s=0.42, first_token_s=0.45, decode_sent_s=0.45)
    decoded = prompt("decode-0", "cmpl-run-000007-0-def", 0.5, 0.7, 0.8, transfer_id="t1")
    assert parts(request, decoded, PREFILLED, way) == ["send", "proxy", "api_server", "queue", "compute", "reply"]
    assert request.phases["decode_step"] == (0.7, 0.8)


def test_prompt_that_decode_computes_alone_has_a_queue_and_compute_of_its_own() -> None:
    request = request_at(0.9)
    alone = prompt("decode-0", "cmpl-run-000007-0", 0.25, 0.3, 0.8)
    way = ProxyEvent(request_id="run-000007", received_s=0.15, decode_sent_s=0.2, decode_alone="prefill-failed")
    lost = prompt("prefill-0", "cmpl-run-000007-0", 0.16, 0.17, 0.18)
    assert parts(request, alone, lost, way) == ["send", "proxy", "api_server", "queue", "compute", "reply"]
    assert request.phases["decode"] is None and request.phases["decode_alone"] == (0.2, 0.9)


@pytest.mark.parametrize(
    "name",
    [
        "cmpl-___prefill_addr_10.0.0.1:14579___decode_addr_10.0.0.2:14580_t1-0",
        "cmpl-run-000007-t1-0-764cb09f",
        "chatcmpl-run-000007-t1",
    ],
)
def test_prompts_are_found_by_the_transfer_in_their_names(name: str) -> None:
    request = request_at(0.9)
    way = ProxyEvent(**DISAGGREGATED, decode_sent_s=0.45)
    of_both = [prompt("prefill-0", name, 0.25, 0.3, 0.4), prompt("decode-0", name, 0.5, 0.6, 0.8)]
    events.join([request], [*of_both, way])
    assert (request.phases["queue"], request.phases["handoff"]) == ((0.25, 0.3), (0.4, 0.6))
