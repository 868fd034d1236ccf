"""The route table is what the OpenAPI description describes, and what the proxy answers by."""

import json
from pathlib import Path

import pytest

import pdbench.proxy
from pdbench.proxy.routes import ROUTES, methods_of

DESCRIPTION = json.loads((Path(pdbench.proxy.__file__).parent / "openapi.json").read_text())


def test_openapi_describes_exactly_the_routes():
    described = {
        (method.upper().encode(), path.encode())
        for path, operations in DESCRIPTION["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert described == set(ROUTES)


def test_openapi_references_resolve():
    def check(node):
        if isinstance(node, dict):
            target = DESCRIPTION
            for name in node.get("$ref", "#").split("/")[1:]:
                target = target[name]
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(child)

    check(DESCRIPTION)


@pytest.mark.parametrize(
    ("path", "methods"),
    [(b"/v1/models", (b"GET",)), (b"/instances", (b"GET", b"POST")), (b"/instances/x", (b"DELETE",)),
     (b"/instances/x/drain", (b"POST",)), (b"/instances/x/y", ()), (b"/instances/x/drain/y", ()), (b"/v1/x/drain", ())],
)  # fmt: skip
def test_methods_of_a_path(path, methods):
    assert methods_of(path) == methods
