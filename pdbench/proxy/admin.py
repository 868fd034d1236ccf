"""What the proxy answers itself: its health, its figures, and the instances, which may be changed while it runs.

Try: curl -X POST http://127.0.0.1:8000/instances -d '{"role": "decode", "url": "http://127.0.0.1:8201"}'
"""

import hmac
import ipaddress
from typing import Literal

import msgspec

from pdbench.errors import UserError
from pdbench.proxy import wire
from pdbench.proxy.ask import Ask
from pdbench.proxy.errors import RefusedError
from pdbench.proxy.instances import DRAINING, LEAVING, SERVING, WANTED, Instance, InstanceTable, parse_address


class NewInstance(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /instances; `url` as on the command line, with or without @KV_HOST:KV_PORT."""

    role: Literal["prefill", "decode"]
    url: str


def bearer_matches(authorization: bytes | None, key: bytes) -> bool:
    """Whether the Authorization header carries the key; takes as long for a near miss as for a far one."""
    return hmac.compare_digest(authorization or b"", b"Bearer " + key)


FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
"""What a proxy in front of this one says of whom it speaks for: then the connection's own address tells nothing."""


def check_administrator(ask: Ask, peer: str, admin_key: bytes | None) -> None:
    """Raises RefusedError unless the request may change instances: by the administrator's key, or from this host if there is
    none. A browser's request is refused, since any page could have sent it, and without a key one that was forwarded."""
    if wire.header(ask.headers, b"origin") is not None:
        raise RefusedError(403, "instances are not changed from a browser")
    if admin_key is not None:
        if not bearer_matches(ask.authorization, admin_key):
            raise RefusedError(
                401, "instances need the key of PDBENCH_PROXY_ADMIN_KEY: send it as Authorization: Bearer KEY"
            )
        return
    forwarded = any(wire.header(ask.headers, name) is not None for name in FORWARDED)
    if forwarded or not ipaddress.ip_address(peer.partition("%")[0]).is_loopback:
        raise RefusedError(
            403, "instances are changed from the proxy's host alone, or with PDBENCH_PROXY_ADMIN_KEY set"
        )


def instances_answer(ask: Ask, table: InstanceTable, kv_port: int) -> tuple[int, bytes]:
    """Status and body for /instances: GET lists, POST adds, POST /instances/ID/drain and /resume, DELETE /instances/ID
    drains and then removes (?now=true removes at once; requests in flight run on)."""
    parts = ask.path.decode("latin-1").split("/")[2:]
    if not parts and ask.method == b"GET":
        return 200, msgspec.json.encode({"instances": [describe(table, instance) for instance in table.all()]})
    if not parts:
        return 201, msgspec.json.encode(describe(table, _add(ask, table, kv_port)))
    instance = table.find(parts[0])
    if instance is None:
        raise RefusedError(404, f"no instance {parts[0][:40]!r}: GET /instances lists them")
    if ask.method == b"DELETE":
        if ask.target.endswith(b"?now=true"):
            table.remove(instance)
        else:
            table.want(instance, LEAVING)
        return 202, msgspec.json.encode({"id": instance.id, "state": "leaving"})
    table.want(instance, DRAINING if parts[1] == "drain" else SERVING)
    return 200, msgspec.json.encode(describe(table, instance))


def _add(ask: Ask, table: InstanceTable, kv_port: int) -> Instance:
    try:
        new = msgspec.json.decode(ask.body, type=NewInstance)
        address = parse_address(new.url, kv_port)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(
            400, f'send {{"role": "prefill" or "decode", "url": "http://HOST:PORT"}} ({error})'
        ) from None
    except UserError as error:
        raise RefusedError(400, str(error)) from None
    try:
        return table.add(new.role, address)
    except UserError as error:
        raise RefusedError(409, str(error)) from None


def describe(table: InstanceTable, instance: Instance) -> dict[str, object]:
    """One instance with its state and load, as /instances shows it."""
    requests, tokens = table.load(instance)
    return {
        "id": instance.id,
        "role": instance.role,
        "url": instance.address.url,
        "kv_address": instance.address.kv,
        "state": WANTED.get(table.wanted(instance), "removed"),
        "healthy": table.healthy(instance),
        "in_flight": requests,
        "prompt_tokens_in_flight": tokens,
    }
