"""JSON as pdbench saves it: indented, and with its hash where a reader must know that nobody has changed it since."""

from hashlib import blake2b
from typing import Any

import msgspec

_SEAL = b',\n "checksum": "'


def encode(value: object, *, seal: bool = False) -> bytes:
    content = msgspec.json.format(msgspec.json.encode(value), indent=1)
    return sealed(content) if seal else content


def as_read_back(value: object) -> Any:
    """What a reader gets of it: tuples are lists."""
    return msgspec.json.decode(msgspec.json.encode(value))


def sealed(document: bytes) -> bytes:
    """A JSON object with its hash as the last key, by which a reader knows that nobody has changed it since."""
    body = document.rstrip()[:-1].rstrip()
    return b'%b%b%b"\n}\n' % (body, _SEAL, _hash(body))


def is_edited(saved: bytes) -> bool:
    """Was a sealed file changed after it was written? Other line ends are no change; a file without a seal cannot be told."""
    body, seal, rest = saved.replace(b"\r\n", b"\n").rpartition(_SEAL)
    return rest.partition(b'"')[0] != _hash(body) if seal else b'"checksum":' in saved[-100:]


def _hash(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).hexdigest().encode()
