"""Passing decode's events on to a client: whole events only, so that an error event can always follow the last one."""

from collections.abc import Callable

from pdbench.proxy.client import ClientConnection
from pdbench.proxy.messages import Headers, RequestError
from pdbench.proxy.upstream import UpstreamRequest

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
MAX_HELD_BYTES = 16 * 2**20


class EventStream:
    """The streamed answer to a client, made of decode's events; `edit` may change them, whole ones at a time."""

    def __init__(
        self, client: ClientConnection, headers: Headers, edit: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._decode: UpstreamRequest | None = None
        self._held = b""
        self._last = b""
        self._client = client
        self._edit = edit
        self._head = client.begin_stream(200, headers)
        self._chunked = client.chunked
        self._write = client.transport.write

    def open(self, event: bytes) -> None:
        """Write the head and a first event that does not come from decode."""
        self._write(self._head + self._frame(event))
        self._head = b""

    def follow(self, decode: UpstreamRequest) -> None:
        """Pass on the part of decode's body that is there, and the rest as it arrives."""
        self._decode = decode
        first = self._whole_events(decode.body)
        decode.chunks = []
        if first and self._edit is not None:
            first = self._edit(first)
        self._last = first
        if self._head or first:
            self._write(self._head + self._frame(first) if first else self._head)
        self._head = b""
        decode.consume = self.pass_on
        self._client.on_pause, self._client.on_leave = decode.pause, decode.end

    def pass_on(self, body: bytes) -> None:
        """Pass on a piece of decode's body."""
        # Nearly every piece is whole events: then this is one write and nothing else.
        if self._held or not body.endswith(_EVENT_ENDS):
            body = self._whole_events(body)
            if not body:
                return
        if self._edit is not None:
            body = self._edit(body)
        self._last = body
        self._write(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def close(self) -> str | None:
        """End the client's stream after decode has ended; returns what failed, which the client was sent, or None."""
        assert self._decode is not None
        error = self._decode.error
        if error is None and not self._last.rstrip().endswith(b"[DONE]"):
            error = "decode ended the stream without [DONE]"
        if error is None:
            self._client.end_stream(self._held)
        else:
            status = 504 if self._decode.timed_out else 502
            self.fail(RequestError(status, f"decode failed mid-stream: {error}", stage="decode"))
        return error

    def fail(self, error: RequestError) -> None:
        """End the client's stream with an error event."""
        self._client.end_stream(b"data: %b\n\n" % error.body, close=True)

    def _frame(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body

    def _whole_events(self, body: bytes) -> bytes:
        body = self._held + body
        cut = max(body.rfind(end) + len(end) if end in body else 0 for end in _EVENT_ENDS)
        self._held = body[cut:]
        if len(self._held) > MAX_HELD_BYTES:
            assert self._decode is not None
            self._decode.end(f"one event is larger than {MAX_HELD_BYTES} bytes")
        return body[:cut]
