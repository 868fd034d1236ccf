"""Passing decode's events on to a client, whole events only, so that an error can always be said after the last one.

Try: curl -N http://127.0.0.1:8000/v1/completions -d '{"model": "M", "prompt": "Hi", "stream": true}'
"""

from collections.abc import Callable

from pdbench.proxy import wire
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.upstream import Leg

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
HELD_LIMIT_BYTES = 16 * 2**20


class EventStream:
    """One streamed answer on its way from a decode leg to the client; `edit` may change whole events of the leg."""

    def __init__(
        self, client: ClientConnection, headers: wire.Headers, edit: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._leg: Leg | None = None
        self._held = b""
        self._last = b""
        self._client = client
        self._edit = edit
        self._head = client.begin_stream(200, headers)
        self._chunked = client.chunked
        self._write = client.transport.write

    def open(self, event: bytes) -> None:
        """Write the head and a first event that does not come from the leg."""
        self._write(self._head + self._frame(event))
        self._head = b""

    def follow(self, leg: Leg) -> None:
        """Pass on what the leg has and what it will get."""
        self._leg = leg
        first = self._whole_events(leg.body)
        leg.chunks = []
        if first and self._edit is not None:
            first = self._edit(first)
        self._last = first
        if self._head or first:
            self._write(self._head + self._frame(first) if first else self._head)
        self._head = b""
        leg.take = self.pass_on
        self._client.on_pause, self._client.on_leave = leg.pause, leg.abort

    def pass_on(self, body: bytes) -> None:
        """One piece of decode's body: nearly always whole events, then one write and no more."""
        if self._held or not body.endswith(_EVENT_ENDS):
            body = self._whole_events(body)
            if not body:
                return
        if self._edit is not None:
            body = self._edit(body)
        self._last = body
        self._write(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def close(self) -> str | None:
        """End the client's stream once the leg has ended; returns what went wrong, which the client was told, or None."""
        assert self._leg is not None
        error = self._leg.error
        if error is None and not self._last.rstrip().endswith(b"[DONE]"):
            error = "decode ended the stream without [DONE]"
        if error is None:
            self._client.end_stream(self._held)
        else:
            self.fail(504 if self._leg.timed_out else 502, f"decode failed mid-stream: {error}", "decode")
        return error

    def fail(self, status: int, message: str, stage: str | None) -> None:
        """End the client's stream with an error event."""
        event = wire.error_body(status, message, stage=stage)
        self._client.end_stream(b"data: %b\n\n" % event, close=True)

    def _frame(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body

    def _whole_events(self, body: bytes) -> bytes:
        body = self._held + body
        cut = max(body.rfind(end) + len(end) if end in body else 0 for end in _EVENT_ENDS)
        self._held = body[cut:]
        if len(self._held) > HELD_LIMIT_BYTES:
            assert self._leg is not None
            self._leg.abort(f"one event is larger than {HELD_LIMIT_BYTES} bytes")
        return body[:cut]
