"""Small HTTP requests about servers: health, metrics, models. Load goes through pdbench.load, forwarding through pdbench.proxy."""

import http.client
import json
import os
import re
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from pdbench.errors import NOT_JSON, OptionError, UserError, in_line

_LARGEST_BYTES = 64 << 20
_INTERFACE = re.compile(r"(/v1(/(chat/)?completions)?)?/*$")
"""What users write behind a base URL, which pdbench appends anyway."""


@dataclass(frozen=True)
class ServerUrl:
    """The parts of an http or https URL: `base` is the path before /v1, `authority` what the Host header says, `tls` None for http."""

    host: str
    port: int
    authority: str
    base: str = ""
    tls: ssl.SSLContext | None = None

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.tls:
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=self.tls)
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)


def split_url(url: str, *, verify_tls: bool = True, option: str = "--url") -> ServerUrl:
    """Take `url` apart (IPv6 in brackets, with or without a path before /v1). Raises UserError, naming `option`, when it is not http or https."""
    if "@" in url:
        raise OptionError(
            f"{option} holds a user or password, which is not sent: leave it out; OPENAI_API_KEY takes a key"
        )
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        (parts.hostname or "").encode("idna")
    except ValueError as error:  # UnicodeError is a subclass
        raise OptionError(f"{option} {url}: {error}; write it as http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OptionError(f"{option} {url} is not http://HOST:PORT or https://HOST:PORT")
    if parts.query or parts.fragment:
        raise OptionError(f"{option} {url}: what follows ? or # is not sent: leave it out")
    if not parts.path.isascii() or any(letter.isspace() for letter in parts.path):
        raise OptionError(
            f"{option} {url}: its path holds spaces or letters beyond ASCII: write {quote(parts.path, safe='/%')}"
        )
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if not verify_tls:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return ServerUrl(parts.hostname, port, parts.netloc, _INTERFACE.sub("", parts.path), tls)


def netloc(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_port(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or of a URL with a port; brackets of IPv6 taken off."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), int(port)


def authorization() -> dict[str, str]:
    """The header that carries OPENAI_API_KEY, none when it is not set. Raises UserError when it cannot be sent."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds characters that cannot be sent: set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def request(
    url: str | ServerUrl, path: str, *, timeout_s: float = 10.0, verify_tls: bool = True, body: bytes | None = None
) -> tuple[int, bytes]:
    """Status and body of a GET of `path` below the URL's base, or of a POST of JSON. Raises OSError when no answer comes, whatever
    the reason."""
    server = split_url(url, verify_tls=verify_tls) if isinstance(url, str) else url
    connection = server.connect(timeout_s)
    try:
        headers = authorization() | ({} if body is None else {"Content-Type": "application/json"})
        connection.request("GET" if body is None else "POST", server.base + path, body, headers)
        response = connection.getresponse()
        until_s, answer = time.monotonic() + timeout_s, b""
        while piece := response.read1():
            answer += piece
            if len(answer) > _LARGEST_BYTES or time.monotonic() > until_s:
                raise OSError("an answer without end")
        return response.status, answer
    except OSError:  # that of a certificate is a ValueError, too
        raise
    except (http.client.HTTPException, ValueError) as error:  # ValueError: a chunk whose size is no number
        raise OSError(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()


def get(url: str | ServerUrl, path: str, timeout_s: float = 10.0, *, verify_tls: bool = True) -> bytes | None:
    """The body of a GET that answers 200, else None."""
    try:
        status, body = request(url, path, timeout_s=timeout_s, verify_tls=verify_tls)
    except OSError:
        return None
    return body if status == 200 else None


def offered_model(url: str, model: str | None = None, *, verify_tls: bool = True) -> str:
    """`model`, by default the one that the server offers. Raises UserError when nothing answers, or it names none or several."""
    server = split_url(url, verify_tls=verify_tls)
    address = f"{'https' if server.tls else 'http'}://{server.authority}{server.base}/v1/models"
    try:
        status, body = request(server, "/v1/models")
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"the certificate of {address} is not trusted ({error.verify_message}): SSL_CERT_FILE=FILE names its authority's, "
            "--no-tls-verify takes any"
        ) from None
    except OSError as error:
        if model and not isinstance(error, ConnectionRefusedError | socket.gaierror):
            return model  # it may know no such path
        raise UserError(
            f"no OpenAI-compatible server answers at {address} ({error or type(error).__name__}): start one with "
            "`pdbench serve`, or give --url http://HOST:PORT"
        ) from None
    if model:
        return model
    if status in (401, 403):
        raise UserError(f"{address} answers {status}: set OPENAI_API_KEY to a key that the server takes")
    if status == 503:
        raise UserError(
            f"{address} answers 503, its servers are not ready: try again once they are, or give --model NAME"
        )
    try:
        # Adapters have a parent; names of one model have a root in common.
        offered = [each for each in json.loads(body)["data"] if not each.get("parent")]
        names = [str(each["id"]) for each in offered if each["id"] is not None]
        name, several = names[0], len({str(each.get("root") or each["id"]) for each in offered}) > 1
    except (*NOT_JSON, LookupError, TypeError, AttributeError):
        raise UserError(f"{address} answers {status} and names no model: give --model NAME") from None
    if not (name.isprintable() and 0 < len(name) <= 500):  # it stands in terminals, pages and pictures
        raise UserError(f"{address} names a model {name[:40]!a}, which cannot be shown: give --model NAME")
    if several:
        raise UserError(f"{address} offers several models ({in_line(*names)}): say which by --model NAME")
    return name
