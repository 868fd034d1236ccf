"""One response as it grows: HTTP/1.1 bytes with their arrival instant in, one RequestRecord out.

Tokens are counted by `token_ids` where the server gives them, by `usage` where every chunk carries it, else by chunks with
text. Tokens of one chunk share its instant: spreading them would be a guess. The usual form of a chunk (`on_body`,
`_take_chunk`) is taken with as few steps as possible; every other form in `_take_unusual`.
"""

from typing import Any

import httptools
import msgspec

from pdbench.records import RequestError, RequestRecord

_ERROR_BODY_BYTES = 4096


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Metrics(msgspec.Struct, gc=False):
    queue_time_ms: float | None = None
    time_to_first_token_ms: float | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Response:
    """The response to one request. `feed` takes bytes, `closed` the connection's end; `complete` says that the record is final."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.complete = self.keep_alive = False
        self.merged_reads = 0
        self._parser: Any = httptools.HttpResponseParser(self)
        self._events = EventReader()
        self._texts: list[str] = []
        self._body = self._content_type = b""
        self._chunks = self._status = 0
        self._begun = self._finished = self._streaming = False
        self._by_token_ids = self._by_usage = self._by_text = False
        self._now_s = 0.0

    def feed(self, data: bytes, at_s: float) -> None:
        """The next bytes of the connection, which arrived at `at_s` on the run's clock."""
        self._now_s = at_s
        self._begun = True
        before = self._chunks
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.complete:
                self.fail("bad_http", f"not HTTP/1.1: {error}", at_s)
        if self._chunks > before + 1:
            self.merged_reads += 1

    def closed(self, at_s: float, kind: str, message: str) -> None:
        """The connection is gone; `kind` is closed (by the server, in order), reset, timeout, stall, tls, refused, connect.

        A success if the stream had finished, a failure with its tokens kept if not.
        """
        if self.complete:
            return
        if self._finished:
            self._close(self._now_s)
        elif kind == "closed" and self._status:
            self._now_s = at_s
            self._end_of_body()
        elif kind == "closed":
            self.fail("reset", f"{message} without a response", at_s)
        else:
            self.fail(kind, message, at_s)

    def fail(self, kind: str, message: str, at_s: float) -> None:
        """End the record with a failure's class; what has arrived is kept."""
        self.record.error = RequestError(kind=kind, message=" ".join(message.split())[:300])
        self._close(at_s)

    # What the HTTP parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value.lower()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._streaming = self._status == 200 and b"event-stream" in self._content_type

    def on_body(self, body: bytes) -> None:
        # One whole event is nearly always what comes: its only line ends are the two at its end.
        if (
            self._streaming
            and not self._events.pending
            and body.startswith(b"data: {")
            and body.find(b"\n") == len(body) - 2
            and body.endswith(b"\n\n")
            and b"\r" not in body
            and not self.complete
        ):
            self._take_chunk(body[6:-2])
        elif self._streaming:
            for payload in self._events.feed(body):
                if payload == b"[DONE]":
                    self._finished = True
                elif not self.complete:
                    self._take_chunk(payload)
        else:
            self._body = (self._body + body)[:_ERROR_BODY_BYTES]

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:
            self._status = 0
        elif not self.complete:
            self.keep_alive = self._parser.should_keep_alive()
            self._end_of_body()

    # What an event means.

    def _take_chunk(self, payload: bytes) -> None:
        try:
            chunk = _decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.fail("bad_json", f"{error} in {payload[:120]!r}", self._now_s)
            return
        choices = chunk.choices
        if choices and len(choices) == 1 and chunk.usage is None and chunk.error is None and chunk.metrics is None:
            choice = choices[0]
            text, token_ids, delta = choice.text, choice.token_ids, choice.delta
            if text is None and delta is not None and delta.reasoning is None and delta.reasoning_content is None:
                text = delta.content
            if text and not choice.finish_reason and (token_ids is None or len(token_ids) == 1):
                self.record.token_s.append(self._now_s)
                self._texts.append(text)
                self._chunks += 1
                if token_ids is None:
                    self._by_text = True
                else:
                    self._by_token_ids = True
                return
        self._take_unusual(chunk)

    def _take_unusual(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            self.fail("server_error", _error_text(chunk.error), self._now_s)
            return
        record, usage, metrics = self.record, chunk.usage, chunk.metrics
        for choice in chunk.choices or ():
            text = choice.text
            if text is None and choice.delta is not None:
                delta = choice.delta
                text = (delta.reasoning or delta.reasoning_content or "") + (delta.content or "")
            if text:
                self._texts.append(text)
            count = 0
            if choice.token_ids is not None:
                count = len(choice.token_ids)
                self._by_token_ids = True
            elif usage is not None and usage.completion_tokens is not None:
                count = max(0, usage.completion_tokens - len(record.token_s))
                self._by_usage = True
            elif text:
                count = 1
                self._by_text = True
            if count:
                self._chunks += 1
                record.token_s.extend([self._now_s] * count)
            if choice.finish_reason:  # some servers say "" until the end
                record.finish_reason = choice.finish_reason
                self._finished = True
        if usage is not None:
            record.prompt_tokens = record.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens
            record.output_tokens = record.output_tokens if usage.completion_tokens is None else usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                record.cached_prompt_tokens = usage.prompt_tokens_details.cached_tokens
        if metrics is not None and record.token_s:
            # vLLM's --enable-per-request-metrics gives durations; they are anchored at the first token's arrival here.
            queue_ms, first_token_ms = metrics.queue_time_ms, metrics.time_to_first_token_ms
            if queue_ms is not None and first_token_ms is not None:
                scheduled_s = record.token_s[0] - first_token_ms / 1e3
                record.phases["queue"] = (scheduled_s - queue_ms / 1e3, scheduled_s)

    def _end_of_body(self) -> None:
        if self._status != 200:
            self.fail(f"http_{self._status}", _error_text(self._body), self._now_s)
        elif not self._streaming:
            kind = self._content_type.decode("latin-1") or "a response without content-type"
            self.fail("not_a_stream", f"{kind} where an event stream was expected: {self._body[:120]!r}", self._now_s)
        elif not self._finished:
            rest = self._events.rest()
            inside = f", inside {rest[:80]!r}" if rest else ""
            self.fail("truncated", f"the stream ended without a finish{inside}", self._now_s)
        elif not self.record.token_s and not self.record.output_tokens:
            self.fail("empty", "the stream finished without a token", self._now_s)
        else:
            self._close(self._now_s)

    def _close(self, at_s: float) -> None:
        record = self.record
        if record.error is None and record.output_tokens is None:
            record.output_tokens = len(record.token_s)
        record.end_s = at_s
        record.text = "".join(self._texts)
        ways = {"token_ids": self._by_token_ids, "usage": self._by_usage, "chunks": self._by_text}
        used = [way for way, was_used in ways.items() if was_used]
        if used:
            record.counted_by = used[0] if len(used) == 1 else "mixed"
        if self._begun and record.stamp is None:
            record.stamp = "kernel"
        if record.sent_s is not None:
            record.phases["client"] = (record.planned_s, record.sent_s)
        self.complete = True
        # The parser holds this object: without this the garbage collector would have to find every response.
        self._parser, self._texts = None, []


def _error_text(error: Any) -> str:
    """The message in an error of the OpenAI form ({"error": {"message": ..}} or its inside), else the text itself."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            error = error.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            error = error[key]
    return str(error) or "no message"


class EventReader:
    """Server-sent events out of bytes that arrive cut anywhere (WHATWG HTML, "Interpreting an event stream").

    `pending` says that bytes have come which make no whole event yet.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._skip_newline = self.pending = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that `piece` completes, in order."""
        if self._skip_newline and piece:
            # A line ended in \r at the end of the last piece: this \n belongs to it.
            self._skip_newline = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        events = []
        if b"\n" not in piece and b"\r" not in piece:
            self._buffer += piece
        else:
            lines = (self._buffer + piece).splitlines(keepends=True)
            self._buffer = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
            self._skip_newline = piece.endswith(b"\r")
            for line in lines:
                content = line.rstrip(b"\r\n")
                if not content and self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
                elif content.startswith(b"data:"):
                    self._data.append(content[6:] if content.startswith(b"data: ") else content[5:])
        self.pending = bool(self._buffer or self._data or self._skip_newline)
        return events

    def rest(self) -> bytes:
        """What has come but makes no whole event yet, for the error message of a stream that was cut."""
        return b"\n".join([*self._data, self._buffer])
