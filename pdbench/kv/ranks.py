"""Which rank of a prefill instance sends what to which rank of a decode instance, for tensor parallelism of any two widths. Pure.

vLLM gives each rank an equal share of the KV heads, in order; with more ranks than heads consecutive ranks hold copies of one head. MLA's
cache is one head in this sense: every rank has a copy.
"""

from dataclasses import dataclass, replace

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """What a worker is; all but `rank`, `tensor_parallel` and `drafts` must be equal on both sides.

    `layout` describes every layer's block, `model` its configuration; `kv_heads` are the whole model's (MLA: 1), 0 where ranks do not
    share them out evenly: then tensor parallelism must be equal, too. `drafts` describes the layers of a draft model: these travel
    only where both sides have the same.
    """

    transport: str
    tensor_parallel: int
    rank: int
    block_size: int
    layout: str
    model: str
    kv_heads: int
    drafts: str = ""

    @property
    def heads(self) -> range:
        """Those of the KV heads that it holds; empty where that is not known."""
        return held(self.kv_heads, self.tensor_parallel, self.rank) if self.kv_heads else range(0)


@dataclass(frozen=True)
class Share:
    """What prefill's rank `rank` sends to decode's rank `reader`: `heads` of the model (none named: all that it has), in the `part`-th of
    `parts` shares of the layers, those of a draft model only with `drafts`."""

    rank: int
    reader: int
    heads: range
    part: int
    parts: int
    drafts: bool = True


def held(heads: int, ranks: int, rank: int) -> range:
    """The KV heads in the cache of one of `ranks` ranks. Raises ValueError where vLLM has no such division."""
    if heads % ranks and ranks % heads:
        raise ValueError(f"{heads} KV heads cannot be divided among {ranks} ranks")
    first = rank * heads // ranks
    return range(first, first + max(1, heads // ranks))


def shares(heads: int, prefill: int, decode: int) -> list[Share]:
    """All that travels between `prefill` and `decode` ranks: each head of each of decode's ranks once, something from each of prefill's.

    Where prefill holds more copies of a head than decode, each copy sends a share of the layers. Raises ValueError.
    """
    if prefill % decode and decode % prefill:
        raise ValueError(f"one of {prefill} prefill and {decode} decode ranks must be a multiple of the other")
    copies, readers = max(1, prefill // heads), max(1, decode // heads)
    parts = max(1, copies // readers)
    result = []
    for reader in range(decode):
        wanted = held(heads, decode, reader)
        for rank in range(prefill):
            ours = held(heads, prefill, rank)
            common = range(max(ours.start, wanted.start), min(ours.stop, wanted.stop))
            # Copies serve their readers in order: as many readers each, or as many copies for each reader.
            if common and rank % copies // parts == reader % readers * copies // readers // parts:
                result.append(Share(rank, reader, common, rank % copies % parts, parts))
    return result


def matching_shares(prefill: Identity, decode: Identity, parts: int) -> list[Share]:
    """What these two instances' ranks, with caches of `parts` parts, send to each other. Raises ValueError where that is not exact."""
    for name in Identity.__struct_fields__:
        ours, theirs = getattr(prefill, name), getattr(decode, name)
        if ours != theirs and name not in ("rank", "tensor_parallel", "drafts"):
            text = f"{name} is {theirs} on the decode side and {ours} on the prefill side"
            raise ValueError(f"{text}; they must be equal")
    drafts = prefill.drafts == decode.drafts
    widths = (prefill.tensor_parallel, decode.tensor_parallel)
    if widths[0] == widths[1]:
        # Whole caches, whatever they hold.
        return [Share(rank, rank, range(0), 0, 1, drafts) for rank in range(widths[0])]
    text = f"tensor_parallel is {widths[1]} on the decode side and {widths[0]} on the prefill side"
    if not prefill.kv_heads:
        raise ValueError(f"{text}; they must be equal for this model, whose KV heads differ from layer to layer")
    try:
        found = shares(prefill.kv_heads, *widths)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    if found[0].parts > parts:
        raise ValueError(f"{text}: {found[0].parts} copies cannot share {parts} layers")
    return [replace(share, drafts=drafts) for share in found]
