"""HTTP/1.1 messages: a client's request, the errors that answer it, and the bytes for clients and instances."""

import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NamedTuple

import msgspec

Headers = list[tuple[bytes, bytes]]
Fields = dict[str, msgspec.Raw]

# Headers of one connection, not of the message (RFC 9110, 7.6.1), and those that the proxy writes.
_RESPONSE_HEADERS_NOT_FORWARDED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-connection te trailer transfer-encoding upgrade "
    b"content-length".split()
)
_REQUEST_HEADERS_NOT_FORWARDED = _RESPONSE_HEADERS_NOT_FORWARDED.union(
    b"proxy-authorization host expect accept-encoding x-request-id x-pdbench-pair authorization".split()
)
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_LIST_OF_PROMPTS = re.compile(rb'\s*\[\s*["\[]')
_LIST_OF_MESSAGES = re.compile(rb"\s*\[\s*\{")
_PREFIX_BYTES = 1024


class Dialect(NamedTuple):
    """How a path's requests and streams look: the fields of the prompt and of the limit on output tokens, whether vLLM calls the
    request what X-Request-Id says, what ends a stream (one of these, else [DONE]), and what stands before an error event's data."""

    prompt: str
    limit: str
    names_request: bool = True
    ends: tuple[bytes, ...] = ()
    error_event: bytes = b""

    def is_end(self, events: bytes) -> bool:
        """Is the last of these a stream's last event?"""
        return any(end in events for end in self.ends) if self.ends else events.rstrip().endswith(b"[DONE]")


_ANSWER_ENDS = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")
DIALECTS = {
    b"/v1/completions": Dialect("prompt", "max_tokens"),
    b"/v1/chat/completions": Dialect("messages", "max_tokens"),
    b"/v1/responses": Dialect("input", "max_output_tokens", False, _ANSWER_ENDS, b"event: error\n"),
    b"/v1/messages": Dialect("messages", "max_tokens", True, (b"event: message_stop",), b"event: error\n"),
}
_decode_fields = msgspec.json.Decoder(Fields).decode


@dataclass(slots=True)
class ClientRequest:
    """One request of a client, read to its end; the handler fills the last two from its JSON body (`parse_fields`)."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes
    received_s: float
    keep_alive: bool
    http_1_0: bool
    request_id: bytes
    fields: Fields = field(default_factory=dict)
    tokens: int = 0

    @property
    def path(self) -> bytes:
        return self.target.split(b"?", 1)[0]

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.path]


class RequestError(Exception):
    """Why a request gets no instance's answer: HTTP status, message, and stage (request, queue, prefill, decode)."""

    def __init__(self, status: int, message: str, *, stage: str = "request", headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.stage = stage
        self.headers = headers or []
        if status in (429, 503):
            self.headers.append((b"retry-after", b"1"))

    @property
    def body(self) -> bytes:
        """The error in OpenAI's form, with the stage that failed."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.status, "stage": self.stage}
        return msgspec.json.encode({"error": error})


class StageError(RequestError):
    """Prefill or decode failed at the instance in `slot` before a byte was passed on: another instance may be tried."""

    def __init__(self, stage: str, slot: int, message: str, *, timed_out: bool = False) -> None:
        super().__init__(504 if timed_out else 502, message, stage=stage)
        self.slot = slot


def parse_fields(body: bytes) -> Fields:
    """The body's top-level fields, their values undecoded; raises RequestError(400) if it is not a JSON object."""
    try:
        body.decode()  # values stay undecoded, and bytes in them that are not UTF-8 would fail at an instance
        return _decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(400, "the body is not a JSON object: send one with content-type application/json") from None


def prompt_tokens(prompt: bytes) -> int:
    """An estimate of a prompt's tokens for balancing: exact for one list of ids, four bytes per token for text."""
    if prompt[:1] == b"[" and b'"' not in prompt[:64] and b"{" not in prompt[:64]:
        return prompt.count(b",") + 1
    return len(prompt) // 4 + 1


class _Message(msgspec.Struct):
    role: str | None = None


_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_message = msgspec.json.Decoder(_Message).decode


def prefix(prompt: bytes) -> bytes:
    """A prompt's beginning by which prefix-affinity chooses: of messages those up to the first user's, which all turns of a conversation
    begin with, however short they are."""
    if _LIST_OF_MESSAGES.match(prompt):
        first: list[bytes] = []
        try:
            for message in _decode_list(prompt):
                first.append(bytes(message))
                if _decode_message(message).role == "user":
                    return b",".join(first)[:_PREFIX_BYTES]
        except (msgspec.MsgspecError, RecursionError):
            pass  # an instance says what is wrong with it
    return prompt[:_PREFIX_BYTES]


def value_of(fields: Fields, name: str) -> bytes:
    """A field's JSON; null where there is none. (A Raw never equals bytes.)"""
    return bytes(fields.get(name, b"null"))


def is_single_sequence(fields: Fields) -> bool:
    """Whether one KV transfer carries the request: one prompt, one continuation, no use of the prompt's logits."""

    def number(name: str) -> float:
        if name not in fields:
            return 0
        text = bytes(fields[name]).strip(b'" ').lower()  # vLLM takes "2" and "true", too
        if text in (b"true", b"t", b"yes", b"y", b"on"):
            return 1
        try:
            return float(text)
        except ValueError:
            return 0

    several = _is_batch(bytes(fields.get("prompt", b""))) or number("n") > 1 or number("best_of") > 1
    needs_prompt_logits = number("echo") or value_of(fields, "prompt_logprobs") != b"null"
    return not (several or needs_prompt_logits or number("use_beam_search"))


def _is_batch(prompt: bytes) -> bool:
    """Is it a list of prompts, and not of a single one, which some clients always send so?"""
    if not _LIST_OF_PROMPTS.match(prompt):
        return False
    try:
        return len(_decode_list(prompt)) > 1
    except (msgspec.MsgspecError, RecursionError):
        return True


def is_stateful(fields: Fields) -> bool:
    """Whether the request is of a conversation that one instance keeps (/v1/responses)."""
    return value_of(fields, "previous_response_id") != b"null" or value_of(fields, "background") == b"true"


def header(headers: Headers, name: bytes) -> bytes | None:
    """The value of the header `name` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def upstream_bytes(request: ClientRequest, host: bytes, body: bytes, authorization: bytes | None) -> bytes:
    """A whole request to an instance. Its framing is the proxy's, so that a client's framing tricks end here."""
    start = (request.method, request.target, host, request.request_id)
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\nX-Request-Id: %b" % start]
    lines += [b"%b: %b" % pair for pair in request.headers if pair[0] not in _REQUEST_HEADERS_NOT_FORWARDED]
    if authorization is not None:
        lines.append(b"Authorization: " + authorization)
    if request.method == b"POST" or body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def response_head(status: int, headers: Headers, *, length: int | None, chunked: bool, keep_alive: bool) -> bytes:
    """The head of an answer to a client; its body has a known length, or is chunked, or lasts until the close."""
    lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"Unknown"))]
    lines += [b"%b: %b" % pair for pair in headers if pair[0] not in _RESPONSE_HEADERS_NOT_FORWARDED]
    if length is not None:
        lines.append(b"content-length: %d" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked")
    lines.append(b"connection: keep-alive" if keep_alive else b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def response(status: int, body: bytes, headers: Headers, *, keep_alive: bool) -> bytes:
    """A whole answer to a client; its body is JSON unless `headers` name another content type."""
    if header(headers, b"content-type") is None:
        headers = [(b"content-type", b"application/json"), *headers]
    return response_head(status, headers, length=len(body), chunked=False, keep_alive=keep_alive) + body
