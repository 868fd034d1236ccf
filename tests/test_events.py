"""The events of proxy and connector: their clock, and the join with the client's requests."""

import json

import msgspec
import pytest

from pdbench import events
from pdbench.events import ProxyEvent, TransferEvent
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
    assert rounded == {"prefill": (0.2, 0.5), "kv_transfer": (0.51, 0.52), "decode": (0.52, 0.7)}
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
    transfer |= {"wire_s": 0.5}
    request = {"event": "request", "request_id": "r1", "received_s": 11.0, "admitted_s": 12.0, "status": 200}
    read = parsed([json.dumps(transfer), json.dumps(request)])
    moved = {"asked_s": 1.0, "first_byte_s": 2.0, "end_s": 3.0, "reported_s": 4.0}
    assert [msgspec.to_builtins(event) for event in read] == [
        msgspec.to_builtins(
            TransferEvent(**({key: value for key, value in transfer.items() if key != "event"} | moved))
        ),
        msgspec.to_builtins(ProxyEvent(request_id="r1", received_s=1.0, admitted_s=2.0, status=200)),
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


@pytest.mark.parametrize(("has_prefill", "name"), [(True, "decode_queue"), (False, "queue")])
def test_decodes_queue_is_never_the_requests_queue(has_prefill: bool, name: str) -> None:
    request = RequestRecord(id="r1", planned_s=0.0, phases={"queue": (0.1, 0.2)})
    events.join([request], [], has_prefill)
    assert request.phases == {name: (0.1, 0.2)}
