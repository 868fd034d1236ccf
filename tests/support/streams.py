"""Scripted streams with their truth: what servers and gateways send, byte for byte, on a schedule, and what a client has to see.

Piece i of a stream is written FIRST_S + i * GAP_S after its request, what follows the last token right after it. `Truth` names the pieces with the first token, the first
answer token and the last token; `tokens` is how many there are. The cases are in stream_cases.py.
"""

import json
import time
from dataclasses import dataclass, field

from tests.support.servers import Peer

FIRST_S = 0.06
GAP_S = 0.04


@dataclass(frozen=True, kw_only=True)
class Truth:
    """`error` is pdbench's class of failure, None for a good answer. `tokens` None: nobody can know it from the stream.

    `first`, `answer` and `last` are pieces; `in_first` of the tokens come with the first one (of each of `choices`). `cached` and `reasoning` are counts.
    """

    error: str | None = None
    tokens: int | None = None
    first: int | None = 0
    answer: int | None = None
    last: int | None = None
    in_first: int = 1
    choices: int = 1
    prompt: int | None = None
    cached: int | None = None
    reasoning: int | None = None
    text: str | None = None
    note: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        return None if self.error or self.first is None else (FIRST_S + self.first * GAP_S) * 1e3

    @property
    def ttfo_ms(self) -> float | None:
        answer = self.first if self.answer is None else self.answer
        return None if self.error or answer is None or answer < 0 else (FIRST_S + answer * GAP_S) * 1e3

    @property
    def mean_tbt_ms(self) -> float | None:
        """None where it is not defined: all tokens at once, or their number unknown."""
        if self.error or self.tokens is None or self.first is None or self.last is None or self.last <= self.first:
            return None
        return self.choices * (self.last - self.first) * GAP_S * 1e3 / (self.tokens - self.in_first)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`pieces` are the body's, cut as they are written. `frame`: chunked, length, or close. `late_end`: the end waits too.

    The request has n = `choices`; `early` comes before the response's head.
    """

    name: str
    group: str
    pieces: list[bytes]
    truth: Truth
    chat: bool = False
    frame: str = "chunked"
    status: bytes = b"200 OK"
    kind: bytes = b"text/event-stream; charset=utf-8"
    headers: list[bytes] = field(default_factory=list)
    length: int | None = None
    end: str = "close"
    max_tokens: int = 128
    forced: bool = False
    late_end: bool = False
    choices: int = 1
    early: bytes = b""

    def answer(self, peer: Peer) -> bool:
        """Write the stream on its schedule; for a ScriptedServer. `peer.written_s` has the instants, the request's first."""
        begin_s = time.monotonic()
        peer.written_s = [begin_s]
        head = b"HTTP/1.1 " + self.status + b"\r\n"
        if self.kind:
            head += b"Content-Type: " + self.kind + b"\r\n"
        for line in self.headers:
            head += line + b"\r\n"
        if self.frame == "chunked":
            head += b"Transfer-Encoding: chunked\r\n"
        elif self.frame == "length":
            head += b"Content-Length: %d\r\n" % (self.length if self.length is not None else sum(map(len, self.pieces)))
        else:
            head = head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Connection: close\r\n"
        peer.write(self.early + head + b"\r\n")
        for index, piece in enumerate(self.pieces):
            last = self.truth.last if self.truth.last is not None and not self.late_end else index
            time.sleep(
                max(0.0, begin_s + FIRST_S + min(index, last) * GAP_S - time.monotonic()) + (index > last) * 1e-3
            )
            peer.written_s.append(time.monotonic())
            peer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.frame == "chunked" else piece)
        if self.end == "reset":
            time.sleep(GAP_S)
            peer.reset()
            return False
        if self.end == "hang":
            time.sleep(1.0)
            return False
        if self.frame == "chunked" and self.end != "cut":
            peer.write(b"0\r\n\r\n")
        return self.frame in ("chunked", "length") and self.end == "close" and self.length is None


def as_json(document: object) -> bytes:
    """As compact as servers write it."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def sse(*documents: object) -> bytes:
    """Events: JSON documents, or bytes as the data itself."""
    return b"".join(
        b"data: " + (document if isinstance(document, bytes) else as_json(document)) + b"\n\n" for document in documents
    )


def text(text: object = "tok ", finish: object = None, **more: object) -> dict:
    """A completion chunk; `ids=`, `usage=` and so on are added, `ids` to the choice."""
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    for name in ("token_ids", "logprobs", "index", "message", "error"):
        if name in more:
            choice[name] = more.pop(name)
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], **more}


def delta(finish: object = None, *, choice: dict | None = None, top: dict | None = None, **fields: object) -> dict:
    """A chat chunk."""
    entry = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish, **(choice or {})}
    return {
        "id": "chat-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [entry],
        **(top or {}),
    }


def usage(completion: object, prompt: object = 5, **more: object) -> dict:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, **more}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": counts}


def words(*texts: str, finish: str = "stop", **fields: object) -> list[bytes]:
    """A chat stream whose deltas have each text under the one given field name."""
    name = str(fields.get("name", "content"))
    return [*(sse(delta(**{name: value})) for value in texts), sse(delta(finish))]
