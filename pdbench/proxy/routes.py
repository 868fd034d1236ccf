"""The paths that the proxy serves, in one table, and their handlers; openapi.json describes the same paths."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from pdbench.errors import UserError
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.handler import ProxyContext, RequestHandler, check_answer
from pdbench.proxy.instances import DRAINING, LEAVING, SERVING, STATES, Instance, InstanceTable, choose, parse_address
from pdbench.proxy.kv_protocols import Message
from pdbench.proxy.messages import ClientRequest, RequestError, header, method_refused

_OPENAPI = (Path(__file__).parent / "openapi.json").read_bytes()
# A proxy in front of this one names its client in these; the connection's address is then that proxy's.
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


async def serve(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    """Answer one request; raises RequestError."""
    route = ROUTES.get((request.method, _pattern(request.path)))
    if route is None:
        allowed = methods_of(request.path)
        if allowed:
            raise method_refused(allowed)
        paths = ", ".join(dict.fromkeys(pattern.decode() for _, pattern in ROUTES))
        raise RequestError(404, f"no such path; the proxy serves {paths}")
    if route.access == "administrator":
        _check_administrator(context, request, client)
    elif route.access == "client" and context.api_key is not None and not _has_key(request, context.api_key):
        raise RequestError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
    await route.handler(context, request, client)


def methods_of(path: bytes) -> tuple[bytes, ...]:
    """The methods of a path; none if the proxy does not serve it."""
    return tuple(method for method, pattern in ROUTES if pattern == _pattern(path))


def _pattern(path: bytes) -> bytes:
    parts = path.split(b"/")
    if len(parts) > 2 and parts[1] == b"instances":
        parts[2] = b"{id}"
    return b"/".join(parts)


def _has_key(request: ClientRequest, key: bytes) -> bool:
    return hmac.compare_digest(request.authorization or b"", b"Bearer " + key)


def _check_administrator(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    """Raises RequestError unless the request has the administrator's key or, if none is set, comes from this host."""
    if header(request.headers, b"origin") is not None:
        raise RequestError(403, "/instances is closed to browsers")  # any page could have sent it
    if context.admin_key is not None:
        if not _has_key(request, context.admin_key):
            text = "/instances needs the key of PDBENCH_PROXY_ADMIN_KEY: send it as Authorization: Bearer KEY"
            raise RequestError(401, text)
        return
    peer = client.transport.get_extra_info("peername")[0]
    forwarded = any(header(request.headers, name) is not None for name in _FORWARDED)
    if forwarded or not ipaddress.ip_address(peer.partition("%")[0]).is_loopback:
        text = "/instances is open to the proxy's own host only: set PDBENCH_PROXY_ADMIN_KEY to use it from others"
        raise RequestError(403, text)


async def _complete(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    if context.draining:
        raise RequestError(503, "the proxy is shutting down", stage="queue", retry_after_s=1)
    await RequestHandler(context, request, client).run()


async def _pass_through(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    """Any ready decode instance answers."""
    decode = choose("least-work", "decode", context.table, b"", set())
    if decode is None:
        raise RequestError(503, "no decode instance is ready", stage="decode", retry_after_s=1)
    message = Message(request.body, request.request_id)
    timeout_s = context.config.request_timeout_s
    upstream = context.send(request, decode, "decode", message, tokens=0, timeout_s=timeout_s)
    try:
        await asyncio.shield(upstream.finished)
        status = check_answer(upstream)
    finally:
        upstream.end("the client left")
    client.respond(status, upstream.body, upstream.headers)


async def _live(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    client.respond(200, b"{}")


async def _health(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    table = context.table
    needs_prefill = context.protocol.prefill is not None and context.config.fallback == "none"
    ready = not context.draining and table.ready("decode") and (not needs_prefill or table.ready("prefill"))
    client.respond(200 if ready else 503, b'{"ready":true}' if ready else b'{"ready":false}')


async def _metrics(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    client.respond(200, context.metrics.render(), [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


async def _openapi(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    client.respond(200, _OPENAPI)


class _NewInstance(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["prefill", "decode"]
    url: str


def _describe(table: InstanceTable, instance: Instance) -> dict[str, object]:
    requests, tokens = table.load(instance)
    return {
        "id": instance.id,
        "role": instance.role,
        "url": instance.address.url,
        "kv_address": instance.address.kv,
        "state": STATES.get(table.state(instance), "removed"),
        "healthy": table.healthy(instance),
        "in_flight": requests,
        "prompt_tokens_in_flight": tokens,
    }


def _instance(context: ProxyContext, request: ClientRequest) -> Instance:
    name = request.path.split(b"/")[2].decode("latin-1")
    instance = next((instance for instance in context.table.all() if instance.id == name), None)
    if instance is None:
        raise RequestError(404, f"no instance {name[:40]!r}: GET /instances lists them")
    return instance


async def _list_instances(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    table = context.table
    client.respond(200, msgspec.json.encode({"instances": [_describe(table, instance) for instance in table.all()]}))


async def _add_instance(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    try:
        new = msgspec.json.decode(request.body, type=_NewInstance)
        address = parse_address(new.url, context.config.kv_port)
    except UserError as error:
        raise RequestError(400, str(error)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        text = f'send {{"role": "prefill" or "decode", "url": "http://HOST:PORT"}} ({error})'
        raise RequestError(400, text) from None
    try:
        instance = context.table.add(new.role, address)
    except UserError as error:
        raise RequestError(409, str(error)) from None
    client.respond(201, msgspec.json.encode(_describe(context.table, instance)))


async def _remove_instance(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    instance = _instance(context, request)
    if request.target.endswith(b"?now=true"):
        context.table.remove(instance)
    else:
        context.table.set_state(instance, LEAVING)
    client.respond(202, msgspec.json.encode({"id": instance.id, "state": "leaving"}))


async def _drain_or_resume(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    instance = _instance(context, request)
    context.table.set_state(instance, DRAINING if request.path.endswith(b"/drain") else SERVING)
    client.respond(200, msgspec.json.encode(_describe(context.table, instance)))


class Route(NamedTuple):
    """A handler and who may use it: "client" needs the proxy's API key where one is set, "open" needs nothing."""

    handler: Callable[[ProxyContext, ClientRequest, ClientConnection], Awaitable[None]]
    access: Literal["client", "administrator", "open"]


ROUTES: dict[tuple[bytes, bytes], Route] = {
    (b"POST", b"/v1/completions"): Route(_complete, "client"),
    (b"POST", b"/v1/chat/completions"): Route(_complete, "client"),
    (b"GET", b"/v1/models"): Route(_pass_through, "client"),
    (b"GET", b"/version"): Route(_pass_through, "client"),
    (b"POST", b"/tokenize"): Route(_pass_through, "client"),
    (b"POST", b"/detokenize"): Route(_pass_through, "client"),
    (b"GET", b"/metrics"): Route(_metrics, "client"),
    (b"GET", b"/openapi.json"): Route(_openapi, "client"),
    (b"GET", b"/health"): Route(_health, "open"),
    (b"GET", b"/health/live"): Route(_live, "open"),
    (b"GET", b"/instances"): Route(_list_instances, "administrator"),
    (b"POST", b"/instances"): Route(_add_instance, "administrator"),
    (b"DELETE", b"/instances/{id}"): Route(_remove_instance, "administrator"),
    (b"POST", b"/instances/{id}/drain"): Route(_drain_or_resume, "administrator"),
    (b"POST", b"/instances/{id}/resume"): Route(_drain_or_resume, "administrator"),
}
