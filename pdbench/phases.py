"""Joins what the proxy and the connectors report to the client's records: a request's phases, each measured where it happens.

The client names its request in X-Request-Id, the proxy logs that name beside its transfer id, the connectors log the latter.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pdbench.records import Clock, Interval, RequestRecord


def read_events(paths: list[str], clock: Clock) -> list[dict[str, Any]]:
    """All events of these logs, their instants (fields that end in `_s` and are not durations) on the run's clock."""
    lines = (path.read_text(errors="replace").splitlines() for path in map(Path, paths) if path.exists())
    return events_of(itertools.chain.from_iterable(lines), clock)


def events_of(lines: Iterable[str], clock: Clock) -> list[dict[str, Any]]:
    """The events of an event log's lines, their instants on the run's clock."""
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed
        if isinstance(event, dict) and event.get("event") in ("request", "kv_transfer"):
            events.append(move_event(event, clock.of_monotonic))
    return events


def move_event(event: dict[str, Any], move: Callable[[float], float]) -> dict[str, Any]:
    """The event with every instant moved."""
    for name, value in event.items():
        if name.endswith("_s") and name not in _DURATIONS and isinstance(value, (int, float)):
            event[name] = move(value)
    return event


_DURATIONS = ("wait_s", "wire_s")


def join(requests: list[RequestRecord], events: list[dict[str, Any]]) -> None:
    """Fill each request's `phases` from the events that name it; a phase that nobody reported is None."""
    proxied = {
        event["request_id"]: event for event in events if event["event"] == "request" and event.get("request_id")
    }
    received = _transfers(events)
    for request in requests:
        event = proxied.get(request.id)
        if event is None:
            continue
        kv_begin, kv_end = received.get(event.get("transfer_id") or "", (None, None))
        if event.get("prefill_sent_s") is not None and "queue" in request.phases:
            # The answer came from decode, whose queue is where a request waits for its KV: not the wait of the single instance.
            request.phases["decode_queue"] = request.phases.pop("queue")
        last_token = request.token_s[-1] if request.token_s else None
        request.phases |= {
            "prefill": _interval(event.get("prefill_sent_s"), event.get("prefill_done_s")),
            "kv_transfer": _interval(kv_begin, kv_end),
            "decode": _interval(kv_end if kv_end is not None else event.get("decode_sent_s"), last_token),
        }


def _transfers(events: list[dict[str, Any]]) -> dict[str, tuple[float | None, float | None]]:
    """When each transfer's first byte came and when all was there, over all ranks of decode; no end where one of them failed."""
    ranks: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "kv_transfer" and event.get("side") == "receive":
            ranks.setdefault(event["transfer_id"], []).append(event)
    found: dict[str, tuple[float | None, float | None]] = {}
    for transfer_id, ends in ranks.items():
        begun = [end["first_byte_s"] for end in ends if end.get("first_byte_s") is not None]
        failed = any(end.get("error") for end in ends)
        found[transfer_id] = (min(begun, default=None), None if failed else max(end["end_s"] for end in ends))
    return found


def _interval(start_s: float | None, end_s: float | None) -> Interval | None:
    return None if start_s is None or end_s is None or end_s < start_s else (start_s, end_s)
