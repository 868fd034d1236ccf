"""The paths that the proxy serves, and the methods of each.

Try: python -c "from pdbench.proxy.paths import methods_of; print(methods_of(b'/v1/models'))"
"""

COMPLETIONS = frozenset((b"/v1/completions", b"/v1/chat/completions"))
PASSED_THROUGH = {b"/v1/models": b"GET", b"/version": b"GET", b"/tokenize": b"POST", b"/detokenize": b"POST"}
METHODS = (b"GET", b"POST", b"DELETE")
_OWN = frozenset((b"/health", b"/health/live", b"/metrics", b"/openapi.json"))


def methods_of(path: bytes) -> tuple[bytes, ...]:
    """The methods that may be asked of a path; none if the proxy does not serve it."""
    if path in COMPLETIONS:
        return (b"POST",)
    if path in PASSED_THROUGH:
        return (PASSED_THROUGH[path],)
    if path in _OWN:
        return (b"GET",)
    match path.split(b"/")[1:]:
        case [b"instances"]:
            return (b"GET", b"POST")
        case [b"instances", _]:
            return (b"DELETE",)
        case [b"instances", _, b"drain" | b"resume"]:
            return (b"POST",)
    return ()
