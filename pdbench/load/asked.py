"""What a request's body says about the answer's length."""

from typing import Any

import msgspec

from pdbench.load.chunks import count


class Asked(msgspec.Struct, gc=False):
    """The fields of the body as they were sent."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    n: Any = None
    echo: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def choices(self) -> int:
        return max(1, count(self.n) or 1)

    @property
    def tokens(self) -> int | None:
        """The most tokens of all choices together; None without a limit."""
        most = count(self.max_tokens) or count(self.max_completion_tokens)
        return most * self.choices if most is not None and most > 0 else None

    @property
    def fewest(self) -> int | None:
        """The fewest tokens that all choices together must have; None where any number will do."""
        least, most = count(self.min_tokens) or 0, self.tokens
        if self.ignore_eos and most is not None:
            return most
        least *= self.choices
        return (least if most is None else min(least, most)) if least > 0 else None


_decode = msgspec.json.Decoder(Asked).decode


def asked_of(body: bytes) -> Asked:
    """What a request's body asked for; nothing where it is not JSON."""
    try:
        return _decode(body)
    except msgspec.MsgspecError:
        return Asked()
