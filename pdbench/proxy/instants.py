"""A request's instants: one JSON line each for the harness, and a Server-Timing header for the client.

Instants are time.monotonic() seconds, None where a stage was not reached. No content of a request is ever written.
Try: pdbench proxy --event-log events.jsonl ...; tail -f events.jsonl
"""

import os
from pathlib import Path

import msgspec

from pdbench.errors import UserError


class Instants(msgspec.Struct, kw_only=True, tag="request", tag_field="event"):
    """One request's way. `received_s`: it was read whole; `first_token_s`: prefill's token was
    passed on as the client's first; `first_byte_s`: of decode's body; `error`: what failed."""

    request_id: str
    transfer_id: str | None = None
    received_s: float
    admitted_s: float | None = None
    prefill_sent_s: float | None = None
    prefill_done_s: float | None = None
    first_token_s: float | None = None
    decode_sent_s: float | None = None
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    prefill: str | None = None
    decode: str | None = None
    retries: int = 0
    status: int = 0
    stage: str | None = None
    error: str | None = None

    def stages(self) -> dict[str, float]:
        """Seconds of the stages that were measured: queue, prefill, first_byte, decode, total."""
        spans = {
            "queue": (self.received_s, self.admitted_s),
            "prefill": (self.prefill_sent_s, self.prefill_done_s),
            "first_byte": (self.decode_sent_s, self.first_byte_s),
            "decode": (self.first_byte_s, self.last_byte_s),
            "total": (self.received_s, self.last_byte_s),
        }
        return {name: b - a for name, (a, b) in spans.items() if a is not None and b is not None}

    def server_timing(self) -> bytes:
        """The stages measured so far as a Server-Timing header's value, in milliseconds."""
        return ", ".join(f"{name};dur={1000 * span_s:.3f}" for name, span_s in self.stages().items()).encode()


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

    def write(self, instants: Instants) -> None:
        """Append one line."""
        if self._handle is not None:
            os.write(self._handle, msgspec.json.encode(instants) + b"\n")
