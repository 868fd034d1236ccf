"""The scripted OpenAI server: real sockets, a script per request that writes raw bytes, and the payloads that vLLM sends."""

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


class Peer:
    """One request as a script sees it, and its connection. `fields` are the headers, names in lower case."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = self.body = b""
        self.method = self.path = ""
        self.fields: dict[str, str] = {}
        self.written_s: list[float] = []

    def read_request(self) -> bool:
        """The next request; False when the client has gone."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self.sock.recv(65536)
            if not piece:
                return False
            data += piece
        self.head, _, body = data.partition(b"\r\n\r\n")
        first, *fields = self.head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = first.split(" ", 2)
        self.fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        length = int(self.fields.get("content-length", 0))
        pieces, size = [body], len(body)
        while size < length:
            pieces.append(self.sock.recv(1 << 20))
            size += len(pieces[-1])
        self.body = b"".join(pieces)
        return True

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def write(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        for piece in pieces:
            self.sock.sendall(piece)
            if pause_s:
                time.sleep(pause_s)

    def respond(self, document: object, status: bytes = b"200 OK") -> None:
        """A whole JSON response."""
        body = json.dumps(document).encode()
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self.write(head + body)

    def reset(self) -> None:
        """Close with RST: what a killed process leaves."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class ScriptedServer:
    """Listens until the `with` block ends; `answer(peer)` is called for every request and returns True to keep the connection."""

    def __init__(
        self,
        answer: Callable[[Peer], object],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer, self.tls = answer, tls
        self.requests: list[Peer] = []
        self.connections = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()  # else it might accept on the descriptor's next owner: another server's connections
        self._listener.close()

    def serve_forever(self) -> None:
        self._accepting.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            while True:
                peer = Peer(sock)
                if not peer.read_request():
                    break
                self.requests.append(peer)
                if not self.answer(peer):
                    break
        except (OSError, ValueError):
            pass
        finally:
            sock.close()


def event(payload: dict | bytes) -> bytes:
    """One server-sent event, its JSON compact as vLLM writes it."""
    if isinstance(payload, dict):
        payload = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
    return b"data: %b\n\n" % payload


def chunk(body: bytes) -> bytes:
    """One HTTP chunk; an empty one ends the body."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def token(text: str = "x", ids: Sequence[int] | None = (1,), finish: str | None = None, **more: object) -> dict:
    """A completion chunk as vLLM sends it; `ids` None leaves token_ids out."""
    choice = {"index": 0, "text": text, "finish_reason": finish}
    if ids is not None:
        choice["token_ids"] = list(ids)
    return {"id": "cmpl", "object": "text_completion", "choices": [choice], **more}


def usage(prompt_tokens: int, completion_tokens: int, **more: object) -> dict:
    """The last chunk with include_usage: no choices."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}, **more}


def stream(payloads: Sequence[dict | bytes], *, pause_s: float = 0.0, done: bool = True) -> Callable[[Peer], bool]:
    """A whole answer: every payload in an event and chunk of its own, [DONE], end of body."""

    def answer(peer: Peer) -> bool:
        peer.write(SSE_HEAD)
        peer.write(*(chunk(event(payload)) for payload in payloads), pause_s=pause_s)
        peer.write((chunk(event(b"[DONE]")) if done else b"") + chunk(b""))
        return True

    return answer


def refusal(status: bytes, message: str) -> Callable[[Peer], bool]:
    """An error in the OpenAI form with this status ("400 Bad Request"); the connection is kept, as vLLM keeps it."""

    def answer(peer: Peer) -> bool:
        peer.respond({"error": {"message": message}}, status)
        return True

    return answer


def tokens(count: int, **more: object) -> list[dict]:
    """`count` tokens, one per chunk, the last one finishing, then usage."""
    return [
        *(token(f"t{i} ", [i], "length" if i == count - 1 else None) for i in range(count)),
        usage(5, count, **more),
    ]


def completions(pause_s: float = 0.0) -> Callable[[Peer], bool]:
    """Answers as vLLM does: health, models, and completions of the asked length, whole or as a stream."""

    def answer(peer: Peer) -> bool:
        if peer.method == "GET":
            peer.respond({"object": "list", "data": [{"id": "m", "object": "model"}]})
            return True
        body = peer.json
        payloads = tokens(body["max_tokens"])
        if body.get("stream"):
            return stream(payloads, pause_s=pause_s)(peer)
        text = "".join(choice["text"] for payload in payloads for choice in payload["choices"])
        peer.respond({"choices": [{"index": 0, "text": text}], "usage": payloads[-1]["usage"]})
        return True

    return answer
