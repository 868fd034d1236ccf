"""What a request's body says about the answer's length."""

from typing import Any

import msgspec

from pdbench.load.chunks import count
from pdbench.load.texts import bytes_of


class Asked(msgspec.Struct, gc=False):
    """The fields of the body as they were sent."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    n: Any = None
    best_of: Any = None
    stop: Any = None
    echo: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def choices(self) -> int:
        return max(1, count(self.n) or 1)

    @property
    def counted_choices(self) -> int:
        """The most choices that usage counts: those of which the best are sent, too."""
        return max(self.choices, count(self.best_of) or 1)

    @property
    def end_tokens(self) -> int:
        """The most tokens that end a choice and are not sent: one, or a stop string's, of a byte at least."""
        stops = self.stop if isinstance(self.stop, list) else [self.stop]
        return max((bytes_of([stop]) for stop in stops if isinstance(stop, str) and stop), default=1)

    @property
    def limit(self) -> int | None:
        """The most tokens of a choice; None without a limit."""
        most = count(self.max_tokens) or count(self.max_completion_tokens)
        return most if most is not None and most > 0 else None

    @property
    def tokens(self) -> int | None:
        """The most tokens that usage counts; None without a limit."""
        return None if self.limit is None else self.limit * self.counted_choices

    @property
    def fewest(self) -> int | None:
        """The fewest tokens that all choices together must have; None where any number will do."""
        least, most = count(self.min_tokens) or 0, self.limit
        if self.ignore_eos and most is not None:
            return most * self.choices
        return (least if most is None else min(least, most)) * self.choices if least > 0 else None


_decode = msgspec.json.Decoder(Asked).decode


def asked_of(body: bytes) -> Asked:
    """What a request's body asked for; nothing where it is not JSON."""
    try:
        return _decode(body)
    except msgspec.MsgspecError:
        return Asked()
