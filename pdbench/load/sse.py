"""Server-sent events out of bytes that arrive cut anywhere (WHATWG HTML, "Interpreting an event stream").

Try: python -c "from pdbench.load.sse import EventReader; print(EventReader().feed(b'data: a\\n\\nda'))"
"""


class EventReader:
    """Incremental reader: `feed` returns the data of every event that is whole by now; the rest waits for more bytes."""

    __slots__ = ("_buffer", "_data", "_swallow_newline")

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._swallow_newline = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the next bytes; the events they complete, in order."""
        # One event in one piece is nearly always what comes: its only line ends are the two at its end.
        if (
            not self._buffer
            and not self._data
            and piece.startswith(b"data: ")
            and piece.find(b"\n") == len(piece) - 2
            and piece.endswith(b"\n\n")
            and b"\r" not in piece
        ):
            self._swallow_newline = False
            return [piece[6:-2]]
        return self._feed_any(piece)

    def _feed_any(self, piece: bytes) -> list[bytes]:
        if self._swallow_newline and piece:
            # A line ended in \r at the end of the last piece: this \n belongs to it.
            self._swallow_newline = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        if b"\n" not in piece and b"\r" not in piece:
            self._buffer += piece
            return []
        lines = (self._buffer + piece).splitlines(keepends=True)
        self._buffer = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        self._swallow_newline = piece.endswith(b"\r")
        events = []
        for line in lines:
            content = line.rstrip(b"\r\n")
            if not content:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif content.startswith(b"data:"):
                self._data.append(content[6:] if content.startswith(b"data: ") else content[5:])
        return events

    def rest(self) -> bytes:
        """What has come but makes no whole event yet, for the error message of a stream that was cut."""
        return b"\n".join([*self._data, self._buffer])
