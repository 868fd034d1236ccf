"""Passing decode's events on to a client, whole events only, so that an error can always be said after the last one.

Try: curl -N http://127.0.0.1:8000/v1/completions -d '{"model": "M", "prompt": "Hi", "stream": true}'
"""

from pdbench.proxy import wire
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.upstream import Leg

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
HELD_LIMIT_BYTES = 16 * 2**20


class EventStream:
    """One streamed answer on its way from a decode leg to the client."""

    def __init__(self, leg: Leg, client: ClientConnection, headers: wire.Headers) -> None:
        self._leg = leg
        self._held = b""
        self._last = b""
        self._client = client
        head = client.begin_stream(200, leg.headers + headers)
        self._chunked = client.chunked
        self._write = client.transport.write
        first = self._whole_events(leg.body)
        leg.chunks = []
        self._last = first
        self._write(head + self._frame(first) if first else head)
        leg.take = self.pass_on
        client.on_pause, client.on_leave = leg.pause, leg.abort

    def pass_on(self, body: bytes) -> None:
        """One piece of decode's body: nearly always whole events, then one write and no more."""
        if self._held or not body.endswith(_EVENT_ENDS):
            body = self._whole_events(body)
            if not body:
                return
        self._last = body
        self._write(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def close(self) -> str | None:
        """End the client's stream once the leg has ended; returns what went wrong, which the client was told, or None."""
        error = self._leg.error
        if error is None and not self._last.rstrip().endswith(b"[DONE]"):
            error = "decode ended the stream without [DONE]"
        if error is None:
            self._client.end_stream(self._held)
        else:
            status = 504 if self._leg.timed_out else 502
            event = wire.error_body(status, f"decode failed mid-stream: {error}", stage="decode")
            self._client.end_stream(b"data: %b\n\n" % event, close=True)
        return error

    def _frame(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body

    def _whole_events(self, body: bytes) -> bytes:
        body = self._held + body
        cut = max(body.rfind(end) + len(end) if end in body else 0 for end in _EVENT_ENDS)
        self._held = body[cut:]
        if len(self._held) > HELD_LIMIT_BYTES:
            self._leg.abort(f"one event is larger than {HELD_LIMIT_BYTES} bytes")
        return body[:cut]
