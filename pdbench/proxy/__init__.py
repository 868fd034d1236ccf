"""One request's way through prefill and decode: docs/proxy.md."""
