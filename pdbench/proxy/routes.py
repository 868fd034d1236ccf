"""The paths that the proxy serves, in one table, and their handlers; openapi.json describes the same paths."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from pdbench.errors import UserError
from pdbench.proxy.client import ClientConnection
from pdbench.proxy.handler import ProxyContext, RequestHandler, check_answer
from pdbench.proxy.instances import Instance, InstanceTable, State, choose, parse_address
from pdbench.proxy.messages import ClientRequest, RequestError, header

_OPENAPI = (Path(__file__).parent / "openapi.json").read_bytes()
# A proxy in front of this one names its client in these; the connection's address is then that proxy's.
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


async def serve(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    try:
        parts = request.path.split(b"/")
        if len(parts) > 2 and parts[1] == b"instances":
            parts[2] = b"{id}"
        route = ROUTES.get(b"/".join(parts))
        if route is None:
            raise RequestError(404, f"no such path; the proxy serves {b', '.join(ROUTES).decode()}")
        access, methods = route
        if request.method not in methods:
            text = f"this path takes {b' or '.join(methods).decode()}"
            raise RequestError(405, text, headers=[(b"allow", b", ".join(methods))])
        if access == "administrator":
            _check_administrator(context, request, client)
        elif access == "client" and context.api_key and not _has_key(request, context.api_key):
            raise RequestError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        await methods[request.method](context, request, client)
    except RequestError as error:
        client.respond(error.status, error.body, error.headers)


def _has_key(request: ClientRequest, key: bytes) -> bool:
    return hmac.compare_digest(header(request.headers, b"authorization") or b"", b"Bearer " + key)


def _check_administrator(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    """Raises RequestError unless the request has the administrator's key or, if none is set, comes from this host."""
    if header(request.headers, b"origin") is not None:
        raise RequestError(403, "/instances is closed to browsers")  # any page could have sent it
    if context.admin_key:
        if not _has_key(request, context.admin_key):
            text = "/instances needs the key of PDBENCH_PROXY_ADMIN_KEY: send it as Authorization: Bearer KEY"
            raise RequestError(401, text)
        return
    peer = client.transport.get_extra_info("peername")[0].partition("%")[0].removeprefix("::ffff:")  # IPv4 at --host ::
    forwarded = any(header(request.headers, name) is not None for name in _FORWARDED)
    if forwarded or not ipaddress.ip_address(peer).is_loopback:
        text = "/instances is open to the proxy's own host only: set PDBENCH_PROXY_ADMIN_KEY to use it from others"
        raise RequestError(403, text)


async def _complete(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    if context.draining:
        raise RequestError(503, "the proxy is shutting down", stage="queue")
    await RequestHandler(context, request, client).run()


async def _pass_through(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    """Any ready decode instance answers."""
    decode = choose("least-work", "decode", context.table, b"", set())
    if decode is None:
        raise RequestError(503, "no decode instance is ready", stage="decode")
    upstream = context.send(request, decode, "decode", request.body, context.config.request_timeout_s)
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
    needs_prefill = context.protocol.has_prefill and context.config.fallback == "none"
    ready = not context.draining and table.ready("decode") and (not needs_prefill or table.ready("prefill"))
    client.respond(200 if ready else 503, b'{"ready":true}' if ready else b'{"ready":false}')


async def _metrics(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    client.respond(200, context.telemetry.render(), [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


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
        "state": table.state(instance).name.lower(),
        "healthy": table.healthy(instance),
        "in_flight": requests,
        "prompt_tokens_in_flight": tokens,
    }


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


async def _change_instance(context: ProxyContext, request: ClientRequest, client: ClientConnection) -> None:
    name = request.path.split(b"/")[2].decode("latin-1")
    instance = next((instance for instance in context.table.all() if instance.id == name), None)
    if instance is None:
        raise RequestError(404, f"no instance {name[:40]!r}: GET /instances lists them")
    if request.method == b"DELETE":
        state = State.REMOVED if request.target.endswith(b"?now=true") else State.LEAVING
        context.table.set_state(instance, state)
        client.respond(202, msgspec.json.encode({"id": instance.id, "state": state.name.lower()}))
    else:
        context.table.set_state(instance, State.DRAINING if request.path.endswith(b"/drain") else State.SERVING)
        client.respond(200, msgspec.json.encode(_describe(context.table, instance)))


Handler = Callable[[ProxyContext, ClientRequest, ClientConnection], Awaitable[None]]
# Who may use a path: "client" needs the proxy's API key where one is set, "open" needs nothing.
Route = tuple[Literal["client", "administrator", "open"], dict[bytes, Handler]]
ROUTES: dict[bytes, Route] = {
    b"/v1/completions": ("client", {b"POST": _complete}),
    b"/v1/chat/completions": ("client", {b"POST": _complete}),
    b"/v1/responses": ("client", {b"POST": _complete}),
    b"/v1/messages": ("client", {b"POST": _complete}),
    b"/v1/models": ("client", {b"GET": _pass_through}),
    b"/version": ("client", {b"GET": _pass_through}),
    b"/tokenize": ("client", {b"POST": _pass_through}),
    b"/detokenize": ("client", {b"POST": _pass_through}),
    b"/metrics": ("client", {b"GET": _metrics}),
    b"/openapi.json": ("client", {b"GET": _openapi}),
    b"/health": ("open", {b"GET": _health}),
    b"/health/live": ("open", {b"GET": _live}),
    b"/instances": ("administrator", {b"GET": _list_instances, b"POST": _add_instance}),
    b"/instances/{id}": ("administrator", {b"DELETE": _change_instance}),
    b"/instances/{id}/drain": ("administrator", {b"POST": _change_instance}),
    b"/instances/{id}/resume": ("administrator", {b"POST": _change_instance}),
}
