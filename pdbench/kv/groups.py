"""Which blocks of a model's KV cache groups hold a prompt, and in which order they travel. Pure.

vLLM gives layers of one kind a block table of their own: full attention keeps all of the prompt, a sliding window only its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Group:
    """Layers that share a block table; its blocks have `block_size` tokens, and with a `window` only those of the last tokens are kept."""

    block_size: int
    window: int = 0


class Place(NamedTuple):
    """A block's place: entry `entry` of the block table of group `group`; the prompt's first `end` tokens reach to its end."""

    end: int
    group: int
    entry: int


def transfer_order(groups: Sequence[Group], tokens: int) -> list[Place]:
    """The blocks that a prompt's continuation needs, by their ends: those that one chunk of it completes are next to each other.

    Decode computes the last token again, so a window is the one of that token, with the token itself.
    """
    places = [
        Place(min((index + 1) * group.block_size, tokens), number, index)
        for number, group in enumerate(groups)
        for index in range(
            max(0, tokens - group.window) // group.block_size if group.window else 0, -(-tokens // group.block_size)
        )
    ]
    return sorted(places) if len(groups) > 1 else places


def describe(groups: Sequence[Group]) -> str:
    """What of the groups must be equal on both sides, as the end of the cache's layout; nothing for one group of full attention."""
    if len(groups) == 1 and not groups[0].window:
        return ""
    texts = [f"window {group.window}" if group.window else "full" for group in groups]
    return (
        f", groups of blocks ({', '.join(f'{text} by {g.block_size}' for text, g in zip(texts, groups, strict=True))})"
    )
