"""The proxy's own description (OpenAPI 3.1), served at /openapi.json. Completions take whatever the instances take.

Try: curl http://127.0.0.1:8000/openapi.json
"""

import msgspec

_ERROR = {
    "description": "an error in OpenAI's form; `stage` names where the request failed",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "code": {"type": "integer"},
                            "stage": {"enum": ["request", "queue", "prefill", "decode"]},
                        },
                    }
                },
            }
        }
    },
}
_ANSWER = {"description": "the instance's answer", "content": {"application/json": {"schema": {"type": "object"}}}}


def _operation(name: str, takes: dict[str, object] | None = None, **answers: str) -> dict[str, object]:
    """One operation that takes an object of the schema `takes`; `answers` maps s200 to what that status means."""
    operation: dict[str, object] = {
        "operationId": name,
        "responses": {status[1:]: {**_ANSWER, "description": text} for status, text in answers.items()}
        | {"default": _ERROR},
    }
    if takes is not None:
        schema = {"type": "object", **takes}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


_COMPLETION: dict[str, object] = {
    "description": "whatever the instances take: at least a model and a prompt or messages"
}
_INSTANCE: dict[str, object] = {
    "required": ["role", "url"],
    "additionalProperties": False,
    "properties": {
        "role": {"enum": ["prefill", "decode"]},
        "url": {
            "type": "string",
            "maxLength": 496,
            "description": "http://HOST:PORT or http://HOST:PORT@KV_HOST:KV_PORT",
        },
    },
}
_ID = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
DESCRIPTION = msgspec.json.encode(
    {
        "openapi": "3.1.0",
        "info": {"title": "pdbench proxy", "version": "1"},
        "paths": {
            "/v1/completions": {"post": _operation("complete", _COMPLETION, s200="a completion")},
            "/v1/chat/completions": {"post": _operation("chat", _COMPLETION, s200="a chat completion")},
            "/v1/models": {"get": _operation("models", s200="the models")},
            "/health": {"get": _operation("ready", s200="ready", s503="not ready")},
            "/health/live": {"get": _operation("live", s200="alive")},
            "/instances": {
                "get": _operation("list", s200="the instances"),
                "post": _operation("add", _INSTANCE, s201="the instance", s409="known already, or no room"),
            },
            "/instances/{id}": {
                "parameters": _ID,
                "delete": _operation("remove", s202="it drains, then it is removed"),
            },
            "/instances/{id}/drain": {"parameters": _ID, "post": _operation("drain", s200="no new requests")},
            "/instances/{id}/resume": {"parameters": _ID, "post": _operation("resume", s200="new requests again")},
        },
    }
)
