"""Where requests go: the URL of an OpenAI-compatible server taken apart once, and the model that it offers.

Try: python -c "from pdbench.load.target import offered_model; print(offered_model('http://127.0.0.1:8000'))"
"""

import http.client
import json
import os
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from pdbench.errors import UserError

_ANSWER_S = 10.0


@dataclass(frozen=True)
class Target:
    """A server: `base` is the path before /v1, `authority` what its Host field says, `tls` None for http."""

    host: str
    port: int
    authority: str
    base: str
    tls: ssl.SSLContext | None

    def authorization(self) -> dict[str, str]:
        """The field that carries OPENAI_API_KEY, none when that is not set. Raises UserError when it cannot be sent."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that cannot be sent: set it anew")
        return {"Authorization": f"Bearer {key}"} if key else {}


def read_url(url: str, *, verify_tls: bool = True) -> Target:
    """Take `url` apart (http or https, IPv6 in brackets, with a path before /v1 or none). Raises UserError when it is none."""
    if "@" in url:
        raise UserError("--url holds a user or password, which is not sent: leave it out; OPENAI_API_KEY takes a key")
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        (parts.hostname or "").encode("idna")
    except ValueError as error:  # of which UnicodeError is one
        raise UserError(f"--url {url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url {url} is not http://HOST:PORT or https://HOST:PORT")
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if not verify_tls:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port, parts.netloc, base, tls)


def offered_model(url: str, *, verify_tls: bool = True) -> str:
    """The first model that the server offers. Raises UserError when nothing answers or none is told."""
    target = read_url(url, verify_tls=verify_tls)
    if target.tls is None:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=_ANSWER_S)
    else:
        connection = http.client.HTTPSConnection(target.host, target.port, timeout=_ANSWER_S, context=target.tls)
    asked = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        connection.request("GET", f"{target.base}/v1/models", headers=target.authorization())
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"no OpenAI-compatible server answers at {asked} ({error or type(error).__name__}): start one with `pdbench serve`, or "
            "give --url http://HOST:PORT"
        ) from None
    finally:
        connection.close()
    if status in (401, 403):
        raise UserError(f"{asked} answers {status}: set OPENAI_API_KEY to a key that the server takes")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{asked} answers {status} and names no model: give --model NAME") from None
