"""One request's way through prefill and decode."""
