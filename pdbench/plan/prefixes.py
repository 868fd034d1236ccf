"""An engine's prefix cache as vLLM keeps it: KV blocks that no request holds any more stay until their place is needed, the oldest go first."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

PIECE = 4
"""KV blocks of a part that are kept together where the parts of requests have different lengths."""


class Prefix:
    """KV blocks of a part of prompts that begin alike, and what follows it. `blocks` of them are in the cache, held by `users` requests."""

    __slots__ = ("blocks", "following", "users")

    def __init__(self, blocks: int = 0) -> None:
        self.following: dict[Hashable, Prefix] = {}
        self.blocks, self.users = blocks, 0


class PrefixCache:
    """Of one instance. `shared` are the blocks of each request that others may have, of `shared_tokens` prompt tokens each; `block` is the
    tokens of a KV block.

    A part of a prompt (a block of a trace, a shared prefix) is kept as one entry and evicted from its end. Where the parts of requests have different
    lengths, they are cut into pieces, of which all is held while any request that has a beginning of it runs.
    """

    def __init__(
        self, shared: Sequence[Sequence[Hashable]], shared_tokens: Sequence[int], prompts: Sequence[int], block: int
    ) -> None:
        self.shared, self.shared_tokens, self.prompts, self.block = shared, shared_tokens, prompts, block
        self.piece = PIECE if len({*shared_tokens}) > 1 else max(shared_tokens, default=1)
        self.root = Prefix()
        self.held: dict[int, list[tuple[Prefix, int]]] = {}  # request -> its parts, with the KV blocks it has of each
        self.unheld: OrderedDict[Prefix, None] = OrderedDict()  # what is evicted first comes first
        self.unheld_blocks = 0
        self.saved_blocks = 0  # by how many KV blocks those that requests hold are fewer than the sum over requests

    def take(self, request: int) -> int:
        """A request begins to run; how many KV blocks of its prompt are there. It holds all its parts from now on."""
        hits, known = 0, True
        self.held[request] = parts = self._parts(
            self.shared[request], self.shared_tokens[request], self.prompts[request]
        )
        for part, blocks in parts:
            if known:
                hits += min(part.blocks, blocks)
                known = part.blocks >= blocks
            before = part.blocks
            if not part.users and before:
                del self.unheld[part]
                self.unheld_blocks -= before
                before = 0
            part.users += 1
            part.blocks = max(part.blocks, blocks)
            self.saved_blocks += blocks - (part.blocks - before)
        return hits

    def release(self, request: int, blocks: int) -> None:
        """A request that has so many full KV blocks leaves, its last ones are evicted before its first ones. Nothing if it left before."""
        parts = self.held.pop(request, None)
        if parts is None:
            return
        if (own := blocks - sum(each for _, each in parts)) > 0:
            self._keep(Prefix(own))
        for part, each in reversed(parts):
            part.users -= 1
            self.saved_blocks -= each
            if not part.users:
                self.saved_blocks += part.blocks
                self._keep(part)

    def warm(self, shared: Sequence[Hashable], shared_tokens: int) -> None:
        """A request of the warm-up left its shared blocks."""
        for part, blocks in reversed(self._parts(shared, shared_tokens, shared_tokens * len(shared))):
            if part.blocks:
                del self.unheld[part]
                self.unheld_blocks -= part.blocks
            part.blocks = max(part.blocks, blocks)
            self._keep(part)

    def shrink(self, room: float) -> None:
        """Evict until what no request holds takes at most `room` KV blocks."""
        while self.unheld_blocks > room:
            part = next(iter(self.unheld))
            evicted = min(part.blocks, self.unheld_blocks - max(int(room), 0))
            part.blocks -= evicted
            self.unheld_blocks -= evicted
            if not part.blocks:
                del self.unheld[part]

    def held_by_others(self, request: int) -> int:
        """KV blocks that a request which does not run would have without taking any."""
        found = 0
        for part, blocks in self._parts(self.shared[request], self.shared_tokens[request], self.prompts[request]):
            found += min(part.blocks, blocks) if part.users else 0
            if part.blocks < blocks:
                break
        return found

    def _keep(self, part: Prefix) -> None:
        if part.blocks:
            self.unheld[part] = None
            self.unheld_blocks += part.blocks

    def _parts(self, shared: Sequence[Hashable], shared_tokens: int, prompt_tokens: int) -> list[tuple[Prefix, int]]:
        """The parts of a prompt, with the KV blocks that end in each: one that reaches into the next part is equal only where that is."""
        part, parts, begin = self.root, list[tuple[Prefix, int]](), 0
        for place, name in enumerate(shared, 1):
            end = min(place * shared_tokens, prompt_tokens) // self.block
            while True:
                after = part.following.get(name)
                if after is None:
                    after = part.following[name] = Prefix()
                cut = min(end, begin + self.piece)
                parts.append((after, cut - begin))
                part, begin = after, cut
                if begin == end:
                    break
                name = None  # the next piece of it
        return parts
