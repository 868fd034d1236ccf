"""One response as it grows: HTTP/1.1 bytes with their arrival instant in, one RequestRecord out.

The usual form of a chunk (`on_body`, `_take_chunk`) is taken with as few steps as possible; every other form by `chunks.read`.
How tokens are counted is decided in `counting`. Tokens of one chunk share its instant: spreading them would be a guess.
"""

import zlib
from math import inf
from typing import Any

import httptools
import msgspec

from pdbench.load import chunks, counting, texts
from pdbench.load.chunks import Event, Part, error_text
from pdbench.load.counting import Counter
from pdbench.load.plain import plain_end
from pdbench.load.request_fields import asked_of
from pdbench.load.sse import EventReader, InflatingReader, is_done, looks_like_stream
from pdbench.records import RequestError, RequestRecord

_ERROR_BODY_BYTES = 4096
_LINES = (b"ndjson", b"jsonl", b"json-lines", b"stream+json", b"json-seq")
# How long a connection is kept for what may follow `[DONE]` (the body's end) or a finish reason (usage, `[DONE]`). Its stream is free before.
_AFTER_DONE_S, _AFTER_FINISH_S = 0.25, 5.0


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: Any = None
    logprobs: Any = None
    index: Any = 0


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Any = None
    metrics: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Response:
    """The response to one request. `feed` takes bytes, `closed` the connection's end; `complete` says that the record is final.

    `body` is the request's, which says how many tokens were asked for. `reused` says that its connection had an earlier request, `done` that
    `[DONE]` has come, `freed` that its stream is free already, although its body is open.
    """

    def __init__(self, record: RequestRecord, body: bytes = b"") -> None:
        self.record, self.body = record, body
        self.complete = self.keep_alive = self.begun = self.reused = self.freed = False
        self.merged_reads = 0
        self._parser: Any = httptools.HttpResponseParser(self)
        self._events: EventReader = EventReader()
        self._counter = Counter(record)
        self._texts: list[str] = []
        self._body = self._content_type = self._encoding = b""
        self._chunks = self._status = 0
        self.whole_s: float | None = None  # when the server said last that the answer is whole
        self.done = self._streaming = False
        self._aborted: str | None = None
        self._location = ""
        self._now_s = record.sent_s or 0.0
        self._token_ids = record.canary.token_ids if record.canary else None

    @property
    def asked_tokens(self) -> int | None:
        return asked_of(self.body).tokens

    @property
    def given_up_s(self) -> float:
        """The instant at which nothing more is waited for; infinite while the answer is not whole."""
        return inf if self.whole_s is None else self.whole_s + (_AFTER_DONE_S if self.done else _AFTER_FINISH_S)

    @property
    def told_all_s(self) -> float:
        """Since when the server has said all but `[DONE]`: every choice's finish, and usage; infinite before."""
        counter = self._counter
        if self.whole_s is None:
            return inf
        if self.done or (counter.usage is not None and counter.finished >= asked_of(self.body).choices):
            return self.whole_s
        return inf

    def feed(self, data: bytes, at_s: float) -> None:
        """The next bytes of the connection, which arrived at `at_s` on the run's clock."""
        # Kernel stamps are of the wall clock: where it was stepped back a little, they are too early for a second.
        self._now_s = at_s = max(at_s, self._now_s)
        self.begun = True
        before = self._chunks
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.whole_s is not None and not self.complete:
                self._end()
            elif not self.complete:
                upgrade = isinstance(error, httptools.HttpParserUpgrade)
                self.fail("bad_http", f"not HTTP/1.1: {'it switches protocols' if upgrade else error}", at_s)
            self.keep_alive = False
        if self._chunks > before + 1:
            self.merged_reads += 1

    def closed(self, at_s: float, kind: str, message: str) -> None:
        """The connection is gone; `kind` is closed (by the server, in order), reset, timeout, stall, tls, refused, connect.

        A success if the stream had finished, a failure with its tokens kept if not.
        """
        if self._streaming and not self.complete:
            self._take(self._events.close())
        if self.complete:
            return
        if self.whole_s is not None:
            self._end()
        elif not self.begun and self.reused and kind in ("closed", "reset"):
            self.fail("reset_reused", f"{message}: the server closed an idle connection as it was used again", at_s)
        elif kind == "closed" and self._status:
            self._end_of_body(at_s)
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
        name = name.lower()
        if name == b"content-type":
            self._content_type = value.lower()
        elif name == b"content-encoding":
            self._encoding = value.strip().lower()
        elif name == b"location":
            self._location = f"sent on to {value.decode('latin-1')}, which is not followed: give that server as --url"

    def on_headers_complete(self) -> None:
        if self.complete:
            return  # bytes beyond the body that look like another response
        self._status = self._parser.get_status_code()
        kind = self._content_type
        packed = self._encoding in (b"gzip", b"x-gzip", b"deflate")
        readable = self._good and (packed or self._encoding in (b"", b"identity"))
        self._streaming = readable and (b"event-stream" in kind or any(name in kind for name in _LINES))
        if packed:
            self._events = InflatingReader()

    def on_body(self, body: bytes) -> None:
        events = self._events
        # One whole event is nearly always what comes: its only line ends are the two at its end.
        if (
            self._streaming
            and (not events.pending or (self.whole_s is not None and events.hold and not events.partial))
            and body.startswith((b"data: {", b"data: ["))
            and body.find(b"\n") == len(body) - 2
            and body.endswith(b"\n\n")
            and b"\r" not in body
            and not self.complete
        ):
            if self.whole_s is not None:
                self._take_unusual(body[6:-2])
            else:
                self._take_chunk(body[6:-2])
        elif self._streaming:
            try:
                self._take(self._events.feed(body))
            except zlib.error as error:
                if not self.complete:
                    self.fail("encoded", f"the body is not in {self._encoding.decode('latin-1')}: {error}", self._now_s)
        elif not self.complete:
            self._body += body
            if self._good and not self._encoding and looks_like_stream(self._body):
                self._streaming, body, self._body = True, self._body, b""
                self._take(self._events.feed(body))
            elif len(self._body) > _ERROR_BODY_BYTES:
                self._body = self._body[:_ERROR_BODY_BYTES]

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:
            # What its head says is not the answer's.
            self._status, self._content_type, self._encoding, self._events = 0, b"", b"", EventReader()
        elif not self.complete:
            self.keep_alive = self._parser.should_keep_alive()
            self._end_of_body(self._now_s)

    @property
    def _good(self) -> bool:
        return 200 <= self._status < 300

    # What an event means.

    def _take(self, payloads: list[bytes]) -> None:
        for payload in payloads:
            if self.complete:
                return
            if self.whole_s is not None:
                self._take_unusual(payload)
            else:
                self._take_chunk(payload)

    def _take_chunk(self, payload: bytes) -> None:
        try:
            chunk = _decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._take_unusual(payload)
            return
        choices = chunk.choices
        if choices and len(choices) == 1 and chunk.usage is None and chunk.error is None and chunk.metrics is None:
            choice = choices[0]
            text, token_ids, delta = choice.text, choice.token_ids, choice.delta
            if text is None and delta is not None and delta.reasoning is None and delta.reasoning_content is None:
                text = delta.content
            if text and not choice.finish_reason and choice.logprobs is None and not choice.index:
                if token_ids is None:
                    self.record.token_s.append(self._now_s)
                    self._counter.by_chunks = True
                elif token_ids:
                    if len(token_ids) == 1:
                        self.record.token_s.append(self._now_s)
                    else:
                        self._counter.add_many(len(token_ids), self._now_s)
                    self._counter.by_token_ids = True
                    if self._token_ids is not None:
                        self._token_ids += token_ids
                else:
                    self._take_unusual(payload)
                    return
                self._texts.append(text)
                self._chunks += 1
                return
        self._take_unusual(payload)

    def _take_unusual(self, payload: bytes) -> None:
        """An event in any other form; one that is none of these fails the request unless the answer has already ended."""
        if not payload or payload.isspace():
            return
        if self.whole_s is not None and not self.done:
            self.whole_s = self._now_s
        if is_done(payload):
            self._stop(done=True)
            return
        end = plain_end(payload)
        if end is not None:
            self._take_event(end)
            return
        try:
            for document in chunks.documents(payload):
                for part in document if isinstance(document, list) else [document]:
                    if part is chunks.DONE:
                        self._stop(done=True)
                    elif not self.complete:
                        self._take_event(chunks.read(part))
        except ValueError as error:
            if self.whole_s is not None and not self.done:
                self.record.notes.append("malformed-after-finish")
            elif self.whole_s is None:
                self.fail("bad_json", f"{error} in {payload[:120]!r}", self._now_s)

    def _take_event(self, event: Event) -> None:
        record, counter = self.record, self._counter
        if event.error is not None:
            if not self.done or record.finish_reason is None:
                self.fail("server_error", event.error, self._now_s)
            return
        if not self.done:
            counter.tools |= event.tools
            for part in event.parts:
                self._take_part(part, event)
        if event.usage is not None:
            counter.take_usage(event.usage, alone=not event.parts)
        if event.metrics is not None and record.token_s:
            # vLLM's --enable-per-request-metrics gives durations; they are anchored at the first token's arrival here.
            queue_ms, first_token_ms = (
                event.metrics.get(f"{name}_ms") for name in ("queue_time", "time_to_first_token")
            )
            if isinstance(queue_ms, int | float) and isinstance(first_token_ms, int | float):
                scheduled_s = record.token_s[0] - first_token_ms / 1e3
                record.phases["queue"] = (scheduled_s - queue_ms / 1e3, scheduled_s)
                record.phases["compute"] = (scheduled_s, record.token_s[0])

    def _take_part(self, part: Part, event: Event) -> None:
        counter, record = self._counter, self.record
        if counter.is_repeat(part, event.usage, self._now_s, self._texts):
            return
        if part.finish and part.text and part.tokens is None and len(self._texts) > 1:
            part.message = part.message or part.text == "".join(self._texts)
        if part.message and self._texts:
            part = counting.message_rest(part, self._texts, by_messages=counter.by_messages)
        elif part.message:
            counter.by_messages = True
        if part.text:
            self._texts.append(part.text)
        if self._token_ids is not None:
            self._token_ids += part.token_ids
        if counter.take_part(part, event.usage, self._now_s):
            self._chunks += 1
        if part.finish is not None:
            if chunks.failed(part.finish):
                self._aborted = record.finish_reason = part.finish
            if self._aborted is None and record.finish_reason is None:
                record.finish_reason = part.finish
            if counter.finish(part.choice):
                self._stop()

    def _stop(self, *, done: bool = False) -> None:
        """The answer is whole as far as the server says; what still comes is looked at with more care."""
        self.done, self.whole_s = self.done or done, self._now_s
        self._events.hold = self._events.pending = True

    def _end_of_body(self, at_s: float) -> None:
        if self._streaming:
            self._take(self._events.close())
        if self.complete:
            return
        body = self._body
        if self._encoding and not self._streaming:
            try:
                body = self._events.inflate(body) if isinstance(self._events, InflatingReader) else b""
            except zlib.error:
                body = b""
        if self._good and self._encoding not in (b"", b"identity") and not isinstance(self._events, InflatingReader):
            name = self._encoding.decode("latin-1")
            remedy = "the request says Accept-Encoding: identity: switch compression off in the server or gateway"
            self.fail("encoded", f"the body is compressed ({name}); {remedy}", at_s)
        elif not self._good:
            self.fail(f"http_{self._status}", (self._status < 400 and self._location) or error_text(body), at_s)
        elif not self._streaming:
            self._no_stream(body, at_s)
        elif self.whole_s is not None or self._counter.usage_ended:
            self._end()
        else:
            rest = self._events.rest()
            inside = f", inside {rest[:80]!r}" if rest else ""
            self.fail("truncated", f"the stream ended without a finish{inside}", at_s)

    def _no_stream(self, body: bytes, at_s: float) -> None:
        """A body that is no event stream: the error that it holds, or what it is."""
        try:
            found = [chunks.read(document) for document in chunks.documents(body)]
        except ValueError:
            found = []
        for event in found:
            if event.error is not None:
                self.fail("server_error", event.error, at_s)
                return
        kind = self._content_type.decode("latin-1") or "a response without content-type"
        what = "a whole answer" if any(event.parts for event in found) else "this"
        self.fail("not_a_stream", f"{kind} where an event stream was expected, {what}: {body[:120]!r}", at_s)

    def _end(self) -> None:
        """The stream came to its end: a success unless it was aborted, empty or shorter than it had to be."""
        counter, at_s = self._counter, self._now_s if self.whole_s is None else self.whole_s
        if self._aborted is not None:
            self.fail("aborted", f"finish_reason {self._aborted}", at_s)
            return
        if not self.record.token_s:
            usage = f", usage says {counter.usage}" if counter.usage else ""
            self.fail("empty", f"the stream finished without a token{usage}", at_s)
            return
        asked = asked_of(self.body)
        counter.settle(self._texts, asked)
        if 0 < counter.finished < asked.choices:
            self.fail("truncated", f"{counter.finished} of {asked.choices} choices finished", at_s)
        elif (short := counter.short(asked)) is not None:
            self.fail("short", short, at_s)
        else:
            if self.whole_s is None:
                self.record.notes.append("ended-by-usage")
            self._close(at_s)

    def _close(self, at_s: float) -> None:
        record = self.record
        if not self._counter.settled:
            self._counter.settle(self._texts, asked_of(self.body))
        record.end_s = at_s
        record.text = texts.joined(self._texts)
        if self.begun and record.stamp is None:
            record.stamp = "kernel"
        if record.sent_s is not None:
            record.phases["client"] = (record.planned_s, record.sent_s)
        self.complete = True
        # The parser holds this object: without this the garbage collector would have to find every response.
        self._parser, self._texts, self.body = None, [], b""
