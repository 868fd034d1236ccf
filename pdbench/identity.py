"""What must stay the same, beside options and machine, for measurements to be put together: the model that a server offers, the contents of
input files."""

from collections.abc import Mapping
from typing import Any


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What was measured before that is not what would be measured now, with the remedy; empty where nothing known of both differs."""
    model, offered = before.get("model"), now.get("model")
    if model and offered and model != offered:
        return f"was measured of {model}, the server offers {offered}: serve {model} again"
    contents = now.get("contents") or {}
    for option, digest in (before.get("contents") or {}).items():
        if contents.get(option, digest) != digest:
            file = f"--{option.replace('_', '-')}"
            return f"was measured with other contents of {file} ({digest}, now {contents[option]}): put that file back"
    return ""
