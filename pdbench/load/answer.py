"""One answer as it grows: HTTP/1.1 response bytes with their arrival instant in, one RequestRecord out.

Tokens are counted by `token_ids` where the server gives them, by `usage` where every chunk carries it, else by chunks with
text; the record's `counted_by` says which. Tokens of one chunk share its instant and are never spread by guess.
Try: pytest tests/test_load_answer.py
"""

from typing import Any

import httptools
import msgspec

from pdbench.load.sse import EventReader
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


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Metrics(msgspec.Struct, gc=False):
    queue_time_ms: float | None = None
    time_to_first_token_ms: float | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Answer:
    """The answer to one request. `feed` takes bytes, `closed` the connection's end; `complete` says that the record is final."""

    __slots__ = (
        "_body",
        "_chunks",
        "_content_type",
        "_counts",
        "_events",
        "_finished",
        "_now_s",
        "_parser",
        "_pieces",
        "_status",
        "bytes_seen",
        "complete",
        "keep_alive",
        "merged_reads",
        "record",
        "streaming",
        "user_stamps",
    )

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.complete = False
        self.keep_alive = False
        self.bytes_seen = 0
        self.merged_reads = 0
        self.user_stamps = 0
        self.streaming = False
        self._parser: Any = httptools.HttpResponseParser(self)
        self._events = EventReader()
        self._pieces: list[str] = []
        self._body = b""
        self._chunks = 0
        self._content_type = b""
        self._counts: set[str] = set()
        self._finished = False
        self._now_s = 0.0
        self._status = 0

    def feed(self, data: bytes, at_s: float) -> None:
        """The next bytes of the connection, which arrived at `at_s` on the run's clock."""
        self._now_s = at_s
        self.bytes_seen += len(data)
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
            self._succeed(self._now_s)
        elif kind == "closed" and self._status:
            self._now_s = at_s
            self._end_of_body()
        elif kind == "closed":
            self.fail("reset", f"{message} without an answer", at_s)
        else:
            self.fail(kind, message, at_s)

    def fail(self, kind: str, message: str, at_s: float) -> None:
        """End the record with a failure's class; what has arrived is kept."""
        line = " ".join(message.split())[:300]
        self.record.error = RequestError(kind=kind, message=line)
        self._close(at_s)

    # What the HTTP parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value.lower()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self.streaming = self._status == 200 and b"event-stream" in self._content_type

    def on_body(self, body: bytes) -> None:
        if self.complete:
            return
        if not self.streaming:
            self._body = (self._body + body)[:_ERROR_BODY_BYTES]
            return
        payloads = self._events.feed(body)
        for payload in payloads:
            if payload == b"[DONE]":
                self._finished = True
            elif not self.complete:
                self._take_chunk(payload)

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
        if chunk.error is not None:
            self.fail("server_error", _error_text(chunk.error), self._now_s)
            return
        for choice in chunk.choices or ():
            self._take_choice(choice, chunk.usage)
        if chunk.usage is not None:
            record, usage = self.record, chunk.usage
            record.prompt_tokens = record.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens
            record.output_tokens = record.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        if chunk.metrics is not None:
            self._take_metrics(chunk.metrics)

    def _take_choice(self, choice: _Choice, usage: _Usage | None) -> None:
        text = choice.text
        if text is None and choice.delta is not None:
            delta = choice.delta
            text = (delta.reasoning or delta.reasoning_content or "") + (delta.content or "")
        if text:
            self._pieces.append(text)
        token_s = self.record.token_s
        if choice.token_ids is not None:
            count = len(choice.token_ids)
            self._counts.add("token_ids")
        elif usage is not None and usage.completion_tokens is not None:
            count = max(0, usage.completion_tokens - len(token_s))
            self._counts.add("usage")
        else:
            count = 1 if text else 0
            if text:
                self._counts.add("chunks")
        if count:
            self._chunks += 1
        if count == 1:
            token_s.append(self._now_s)
        elif count:
            token_s.extend([self._now_s] * count)
        if choice.finish_reason:  # some servers say "" until the end
            self.record.finish_reason = choice.finish_reason
            self._finished = True

    def _take_metrics(self, metrics: _Metrics) -> None:
        """vLLM's --enable-per-request-metrics gives durations; they are anchored at the first token's arrival here."""
        queue_ms, first_token_ms = metrics.queue_time_ms, metrics.time_to_first_token_ms
        if queue_ms is not None and first_token_ms is not None and self.record.token_s:
            scheduled_s = self.record.token_s[0] - first_token_ms / 1e3
            self.record.phases["queue"] = (scheduled_s - queue_ms / 1e3, scheduled_s)

    def _end_of_body(self) -> None:
        if self._status != 200:
            self.fail(f"http_{self._status}", _error_text(self._body), self._now_s)
        elif not self.streaming:
            kind = self._content_type.decode("latin-1") or "an answer without content-type"
            self.fail("not_a_stream", f"{kind} where an event stream was expected: {self._body[:120]!r}", self._now_s)
        elif not self._finished:
            rest = self._events.rest()
            self.fail(
                "truncated",
                f"the stream ended without a finish{f', inside {rest[:80]!r}' if rest else ''}",
                self._now_s,
            )
        elif not self.record.token_s and not self.record.output_tokens:
            self.fail("empty", "the stream finished without a token", self._now_s)
        else:
            self._succeed(self._now_s)

    def _succeed(self, at_s: float) -> None:
        if self.record.output_tokens is None:
            self.record.output_tokens = len(self.record.token_s)
        self._close(at_s)

    def _close(self, at_s: float) -> None:
        record = self.record
        record.end_s = at_s
        record.text = "".join(self._pieces)
        if self._counts:
            record.counted_by = self._counts.pop() if len(self._counts) == 1 else "mixed"
        if self.bytes_seen:
            record.stamp = "user" if self.user_stamps else "kernel"
        if record.sent_s is not None:
            record.phases["client"] = (record.planned_s, record.sent_s)
        self.complete = True
        # The parser holds this object: without this the garbage collector would have to find every answer.
        self._parser, self._pieces = None, []


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
