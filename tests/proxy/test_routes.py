"""The route table is what the OpenAPI description describes, and what the proxy answers by."""

import json
from pathlib import Path

import pytest

import pdbench.proxy
from pdbench.proxy.messages import RequestError
from pdbench.proxy.routes import ROUTES, find

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


@pytest.mark.parametrize(
    ("path", "methods"),
    [(b"/v1/models", (b"GET",)), (b"/instances", (b"GET", b"POST")), (b"/instances/x", (b"DELETE",)),
     (b"/instances/x/drain", (b"POST",))],
)  # fmt: skip
def test_methods_of_a_path(path, methods):
    assert tuple(find(path)[1]) == methods


@pytest.mark.parametrize("path", [b"/instances/x/y", b"/instances/x/drain/y", b"/v1/x/drain"])
def test_unknown_path_is_a_404(path):
    with pytest.raises(RequestError, match="no such path"):
        find(path)
