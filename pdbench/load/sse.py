"""Server-sent events out of bytes that arrive cut anywhere (WHATWG HTML, "Interpreting an event stream"), and what is sent
in their place: events without blank lines between them, JSON lines without `data:`, streams that were compressed."""

import re
import zlib
from typing import Any

import msgspec

_KEEP_ALIVE = {b"ping", b"keepalive", b"keep-alive", b"keep_alive", b"heartbeat"}
_FIELD = re.compile(rb"[a-z_-]+(:|$)")
_valid_json = msgspec.json.Decoder(msgspec.Raw).decode


def is_done(payload: bytes) -> bool:
    """`[DONE]` in the forms that servers write it."""
    return len(payload) < 32 and payload.strip(b" \t\r\n\"'").lower() == b"[done]"


def is_whole(payload: bytes) -> bool:
    """Is it a JSON object or `[DONE]`, which needs no further line?"""
    payload = payload.strip()
    if not payload.startswith(b"{") or not payload.endswith(b"}"):
        return is_done(payload)
    try:
        _valid_json(payload)
    except msgspec.MsgspecError:
        return False
    return True


def _is_error(name: bytes) -> bool:
    return name.endswith((b"error", b"exception", b".failed"))


class EventReader:
    """`pending` says that bytes have come which make no whole event yet, or that every byte has to come here (`hold`)."""

    def __init__(self) -> None:
        self._buffer = self._json = self._name = self._comment = self._taken = b""
        self._data: list[bytes] = []
        self._skip_newline = self._begun = False
        self.hold = self.pending = False

    @property
    def partial(self) -> bool:
        return bool(self._buffer or self._data or self._name or self._json or self._skip_newline)

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that `piece` completes, in order. An event named error comes as `{"error": its text}`."""
        if self._skip_newline and piece:
            # A line ended in \r at the end of the last piece: this \n belongs to it.
            self._skip_newline = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        events: list[bytes] = []
        if b"\n" not in piece and b"\r" not in piece:
            self._buffer += piece
        else:
            lines = (self._buffer + piece).splitlines(keepends=True)
            self._buffer = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
            self._skip_newline = piece.endswith(b"\r")
            if not self._begun:
                self._begun, lines[0] = True, lines[0].removeprefix(b"\xef\xbb\xbf")
            last = len(lines) - 1
            for index, line in enumerate(lines):
                content = line.rstrip(b"\r\n")
                if not content:
                    self._end_event(events)
                elif content.startswith(b"data:"):
                    value = content[6:] if content.startswith(b"data: ") else content[5:]
                    # Without a blank line behind it, a whole object is not kept waiting for one: its instant would be lost.
                    blank_follows = index < last and not lines[index + 1].rstrip(b"\r\n")
                    named = _is_error(self._name) or self._name in _KEEP_ALIVE
                    if self._data or blank_follows or named or not is_whole(value):
                        self._data.append(value)
                    else:
                        events.append(value)
                        self._taken = value
                else:
                    self._take_line(content, events)
        self.pending = bool(self._buffer or self._data or self._skip_newline or self.hold or self._name)
        return events

    def close(self) -> list[bytes]:
        """The data that the body's end completes: a last line without its end, a last event without its blank line."""
        cut = self._buffer
        events = EventReader.feed(self, b"\n") if cut else []
        if _is_error(self._name) or (self._data and is_whole(b"\n".join(self._data))):
            self._end_event(events)
        self._buffer = b"" if events or self._data or self._json else cut
        return events

    def rest(self) -> bytes:
        """What has come but makes no whole event yet, for the error message of a stream that was cut."""
        return b"\n".join([*self._data, self._json + self._buffer])

    def _take_line(self, content: bytes, events: list[bytes]) -> None:
        """A line that is not `data:`: a comment, another field, or what is no server-sent event at all, which is taken for data."""
        stripped = content.strip(b" \t\x1e")  # JSON sequences begin with a record separator
        if content.startswith(b":"):
            self._comment = content[1:].strip()
        elif content.startswith(b"event:"):
            self._name = content[6:].strip().lower()
        elif content.startswith(b"error:") and content[6:].strip() not in (b"", b"null"):
            # llama.cpp names the field so, not the event.
            self._end_event(events)
            self._name, self._data = b"error", [content[6:].strip()]
            self._end_event(events)
        elif self._json or stripped.startswith(b"{") or is_done(stripped):
            self._json += content
            if is_whole(self._json):
                events.append(self._json)
                self._json = b""
        elif stripped[:5].lower() == b"data:":
            self._data.append(stripped[5:].strip())
        elif stripped and not _FIELD.match(stripped):
            events.append(stripped)

    def _end_event(self, events: list[bytes]) -> None:
        name, data = self._name, b"\n".join(self._data)
        if _is_error(name):
            text = data or self._taken or self._comment or name
            events.append(msgspec.json.encode({"error": text.decode("utf-8", "replace")}))
        elif self._data and name not in _KEEP_ALIVE:
            events.append(data)
        self._name = self._comment = self._taken = b""
        self._data = []


class InflatingReader(EventReader):
    """The events of a stream in gzip, in one member or in many, or in deflate. Raises zlib.error for bytes that are neither."""

    def __init__(self) -> None:
        super().__init__()
        self._inflate: Any = None
        self.hold = self.pending = True

    def feed(self, piece: bytes) -> list[bytes]:
        return super().feed(self.inflate(piece))

    def inflate(self, piece: bytes) -> bytes:
        data = b""
        while piece:
            if self._inflate is None:
                # The low four bits of a zlib header are 8; a raw deflate stream that servers flush begins otherwise.
                raw = piece[:1] != b"\x1f" and piece[0] & 15 != 8
                self._inflate = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
            data += self._inflate.decompress(piece)
            piece = self._inflate.unused_data
            if self._inflate.eof:
                self._inflate = None
        return data


def looks_like_stream(body: bytes) -> bool:
    """Does a body without a stream's content type begin as one: with a field of an event, or a line that is a chunk?"""
    body = body.lstrip(b"\xef\xbb\xbf \t\r\n")
    if body.startswith((b"data:", b"event:", b":", b"id:", b"retry:")):
        return True
    first, line_end, _ = body.partition(b"\n")
    return (
        bool(line_end) and first.startswith(b"{") and (b'"delta"' in first or b".chunk" in first or b'"done"' in first)
    )
