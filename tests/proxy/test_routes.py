"""The route table is what the OpenAPI description describes."""

import json
from pathlib import Path

import pdbench.proxy
from pdbench.proxy.routes import ROUTES

DESCRIPTION = json.loads((Path(pdbench.proxy.__file__).parent / "openapi.json").read_text())


def test_openapi_describes_exactly_the_routes():
    described = {
        (method.upper().encode(), path.encode())
        for path, operations in DESCRIPTION["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert described == {(method, path) for path, (_, methods) in ROUTES.items() for method in methods}


def test_openapi_references_resolve():
    def check(node):
        if isinstance(node, dict):
            target = DESCRIPTION
            for name in node.get("$ref", "#").split("/")[1:]:
                target = target[name]
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(child)

    check(DESCRIPTION)
