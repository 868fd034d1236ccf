"""A request's instants: one JSON line each for the harness, and a Server-Timing header for the client.

Instants are time.monotonic() seconds, None where a stage was not reached. No content of a request is ever written.
Try: pdbench proxy --event-log events.jsonl ...; tail -f events.jsonl
"""

import os
from pathlib import Path

import msgspec

from pdbench.errors import UserError
from pdbench.events import ProxyEvent


def stages(event: ProxyEvent) -> dict[str, float]:
    """Seconds of the stages that were measured: queue, prefill, first_byte, decode, total."""
    spans = {
        "queue": (event.received_s, event.admitted_s),
        "prefill": (event.prefill_sent_s, event.prefill_done_s),
        "first_byte": (event.decode_sent_s, event.first_byte_s),
        "decode": (event.first_byte_s, event.last_byte_s),
        "total": (event.received_s, event.last_byte_s),
    }
    return {name: b - a for name, (a, b) in spans.items() if a is not None and b is not None}


def server_timing(event: ProxyEvent) -> bytes:
    """The stages measured so far as a Server-Timing header's value, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * span_s:.3f}" for name, span_s in stages(event).items()).encode()


class EventLog:
    """A file that gets one line a request. Every line is one write to a file opened for appending, so that several
    workers may share it."""

    def __init__(self, path: str | None) -> None:
        self._handle: int | None = None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise UserError(
                    f"the event log {path} cannot be written ({error.strerror}): name another file"
                ) from None

    def write(self, event: ProxyEvent) -> None:
        """Append one line."""
        if self._handle is not None:
            os.write(self._handle, msgspec.json.encode(event) + b"\n")
