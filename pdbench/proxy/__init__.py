"""The proxy in front of prefill and decode instances: docs/proxy.md."""
