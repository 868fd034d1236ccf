"""Which bytes of which layers make up a KV block, and how blocks of all layers are gathered into one buffer and back.

A packed buffer holds, layer after layer, the given blocks in order, so that any number of layers is one transfer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate
from math import prod

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

from pdbench.kv.compat import UnsupportedError
from pdbench.kv.ranks import Share

# Copies move whole words of this many bytes where a block's size allows: single bytes per thread would waste a GPU.
_WORDS = ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))
# How many words of a block a program of the GPU's kernel copies at once.
_CHUNK_WORDS = 1024


@dataclass(frozen=True)
class BlockPacker:
    """Views of a worker's KV cache as `parts`, each of shape [blocks, ...] in words; K and V may be parts of their own.

    A block of part i has `heads` runs of `head_words[i]` words in turn, one per KV head; `heads` is 0 where they cannot be told apart, and
    `head_words[i]` where only those of a draft model cannot. The first `target_parts` are the model's own, which `layout` describes;
    `drafts` describes the rest, a draft model's ("" without one).
    """

    parts: tuple[torch.Tensor, ...]
    block_bytes: int
    layout: str
    heads: int = 0
    head_words: tuple[int, ...] = ()
    target_parts: int = 0
    drafts: str = ""

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def gather(self, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Copy the blocks of these numbers into the front of `out` (bytes) and return that front. On the current stream.

        Both are on the cache's device.
        """
        packed = out[: len(index) * self.block_bytes]
        self._copy(packed, index, gather=True)
        return packed

    def scatter(self, packed: torch.Tensor, index: torch.Tensor) -> None:
        """Copy a packed buffer (bytes) into the blocks of these numbers, both on the cache's device. On the current stream."""
        self._copy(packed, index, gather=False)

    def share(self, share: Share, first_head: int) -> BlockPacker:
        """The packer of a share of the heads and layers; `first_head` is the first of the model's heads in this cache."""
        count = len(self.parts) if share.drafts else self.target_parts
        first, last = (count * part // share.parts for part in (share.part, share.part + 1))
        parts = self.parts[first:last]
        if 0 < len(share.heads) < self.heads:
            start = share.heads.start - first_head
            parts = tuple(
                part.view(part.shape[0], -1, self.heads, words).narrow(2, start, len(share.heads)) if words else part
                for part, words in zip(parts, self.head_words[first:last], strict=True)
            )
        elif len(parts) == len(self.parts):
            return self
        return BlockPacker(parts, sum(part[0].numel() * part.element_size() for part in parts), self.layout)

    def warm_up(self) -> None:
        """Run both copies, block 0, which vLLM gives to no request, onto itself, so that no transfer waits for kernels to be loaded."""
        buffer = torch.empty(3 * self.block_bytes, dtype=torch.uint8, device=self.device)
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        for _ in range(3):
            self.scatter(self.gather(index, buffer), index)

    def _copy(self, packed: torch.Tensor, index: torch.Tensor, gather: bool) -> None:
        words = packed.view(self.parts[0].dtype)
        if self.device.type == "cuda" and HAS_TRITON:
            with torch.cuda.device(self.device):
                _copy_kernel[len(index), len(self.parts)](self._table, index, words, gather, _CHUNK_WORDS)
        else:
            _copy_layers(list(self.parts), index, words, gather)

    @cached_property
    def _table(self) -> torch.Tensor:
        """What the kernel must know of each part, all but the address in words: address, from block to block, words of a block, words that
        stand together, from one such run to the next, and the words of a block of all parts before it."""
        rows, words = [], [part[0].numel() for part in self.parts]
        for part, count, before in zip(self.parts, words, accumulate(words, initial=0), strict=False):
            run, step = count, count
            if part.dim() == 4:  # some of the heads
                run, step = part.shape[2] * part.shape[3], part.stride(1)
            rows.append((part.data_ptr(), part.stride(0), count, run, step, before))
        return torch.tensor(rows, dtype=torch.int64, device=self.device)


class BlockNumbers:
    """Numbers of up to `most` blocks on their way to the cache's device, by memory that is made once: to pin new memory takes longer than to
    copy the blocks, and each call of torch may have to wait for the interpreter's lock."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._here = torch.zeros(most, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._there = torch.empty(most, dtype=torch.int64, device=device)
        self._numbers = self._here.numpy()

    def put(self, block_ids: Sequence[int]) -> torch.Tensor:
        """The numbers as a tensor, by the current stream; whatever uses those of the last call must be over."""
        self._numbers[: len(block_ids)] = block_ids
        self._there.copy_(self._here, non_blocking=True)
        return self._there[: len(block_ids)]


@triton.jit
def _copy_kernel(table, index, packed, gather: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy one block of one part, by its row of `BlockPacker._table`, out of or into a packed buffer of as many blocks as programs."""
    block, row = tl.program_id(0), table + tl.program_id(1) * 6
    words, run, step = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    cache = tl.load(row).to(packed.dtype) + tl.load(index + block) * tl.load(row + 1)
    packed += tl.load(row + 5) * tl.num_programs(0) + block * words
    for start in range(0, words, chunk):
        word = start + tl.arange(0, chunk)
        place = cache + word // run * step + word % run
        if gather:
            tl.store(packed + word, tl.load(place, mask=word < words), mask=word < words)
        else:
            tl.store(place, tl.load(packed + word, mask=word < words), mask=word < words)


# Scripted, a loop over all layers runs without the interpreter's lock: otherwise each layer's copy would wait for the engine's
# thread to let go of it, and would make that thread wait in turn.
@torch.jit.script
def _copy_layers(parts: list[torch.Tensor], index: torch.Tensor, packed: torch.Tensor, gather: bool) -> None:
    start = 0
    for part in parts:
        shape = part.size()
        shape[0] = index.numel()
        size = index.numel() * part[0].numel()
        piece = packed.narrow(0, start, size).view(shape)
        if gather:
            torch.index_select(part, 0, index, out=piece)
        else:
            part.index_copy_(0, index, piece)
        start += size


def make_packer(
    kv_caches: dict[str, torch.Tensor], blocks: int, heads: int = 0, drafts: Collection[str] = ()
) -> BlockPacker:
    """The packer of a worker's layers; `blocks` is how many KV blocks vLLM allocated, `heads` how many KV heads are in each (0: unknown).

    `drafts` are a draft model's layers. Raises UnsupportedError for odd layouts.
    """
    seen: dict[int, torch.Size] = {}  # by address: layers may share one cache, and those of several groups share blocks
    own: list[tuple[torch.Tensor, torch.Tensor]] = []  # caches, and one part of each
    drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in sorted(kv_caches, key=lambda name: name in drafts):
        cache = kv_caches[name]
        if not isinstance(cache, torch.Tensor):
            raise UnsupportedError(f"layer {name} has a KV cache that is no single tensor: this model is not supported")
        if cache.data_ptr() in seen:
            heads = heads if cache.shape == seen[cache.data_ptr()] else 0
            continue
        seen[cache.data_ptr()] = cache.shape
        (drafted if name in drafts else own).extend((cache, part) for part in _layer_parts(name, cache, blocks))
    if not own:
        raise UnsupportedError("this model has no KV cache to move")
    target_parts, parts = len(own), [part for _, part in own + drafted]
    head_bytes = [_head_bytes(cache, heads) for cache, _ in own + drafted]
    heads = heads if all(head_bytes[:target_parts]) else 0
    sizes = [part.shape[1] * part.element_size() for part in parts]
    runs = [run if heads and run else size for run, size in zip(head_bytes, sizes, strict=True)]
    word, width = next((word, width) for word, width in _WORDS if all(size % width == 0 for size in runs))
    if all(part.data_ptr() % width == 0 for part in parts):
        parts = [part.view(word) for part in parts]
    else:
        width = 1
    split = heads if all(head_bytes[target_parts:]) else 0
    return BlockPacker(
        parts=tuple(parts),
        block_bytes=sum(sizes),
        layout=_layout(own[0][0], sizes[:target_parts], heads),
        heads=heads,
        head_words=tuple(run // width if run else 0 for run in head_bytes) if heads else (),
        target_parts=target_parts,
        drafts=_layout(drafted[0][0], sizes[target_parts:], split) if drafted else "",
    )


def _layout(first: torch.Tensor, sizes: Sequence[int], heads: int) -> str:
    """What must be equal on both sides of layers whose first cache is `first`: the shape behind the number of blocks, the order in memory."""
    shape: list[int | str] = list(first.shape[1:])[-3:]
    per_block = "per block"
    if heads:  # how many a rank has depends on tensor parallelism
        sizes, per_block = [size // heads for size in sizes], "per block and head"
        shape[_head_axis(first, heads) - first.dim()] = "heads"
    return (
        f"{len(sizes)} parts of {sorted(set(sizes))} bytes {per_block}, {first.dtype}, "
        f"shape ({', '.join(map(str, shape))}), memory order {_memory_order(first)}"
    )


def _head_axis(cache: torch.Tensor, heads: int) -> int:
    """Which dimension of a cache counts the KV heads: of its last three, (heads, tokens, size) or (tokens, heads, size); 0 if unclear."""
    if cache.dim() < 4 or heads < 1:
        return 0
    axes = [axis for axis in (cache.dim() - 3, cache.dim() - 2) if cache.shape[axis] == heads]
    # From the version on that has this module, vLLM's caches are (blocks, heads, tokens, size) whatever their memory's order.
    if cache.dim() == 4 and find_spec("vllm.v1.kv_cache_layout") is not None:
        axes = [axis for axis in axes if axis == 1]
    return axes[0] if len(axes) == 1 else 0


def _head_bytes(cache: torch.Tensor, heads: int) -> int:
    """How many bytes of one head stand together in a block; 0 if the heads cannot be told apart."""
    axis = _head_axis(cache, heads)
    if not axis:
        return 0
    order = _memory_order(cache)
    return prod(cache.shape[dim] for dim in order[order.index(axis) + 1 :]) * cache.element_size()


def _memory_order(cache: torch.Tensor) -> list[int]:
    return sorted(range(cache.dim()), key=lambda dim: (-cache.stride(dim), -cache.shape[dim]))


def _layer_parts(name: str, cache: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """One layer's cache as byte matrices [blocks, bytes], whatever order its memory has behind the block dimension."""
    order = _memory_order(cache)
    memory = cache.permute(order)
    logical = 0 if cache.shape[0] % blocks == 0 and cache.shape[0] != 2 else 1
    outer = memory.shape[: order.index(logical)] if logical < cache.dim() else None
    fits = outer in ((), (2,), (1,), (2, 1)) and cache.shape[logical] % blocks == 0 and memory.is_contiguous()
    if outer is None or not fits:
        raise UnsupportedError(
            f"layer {name} has a KV cache of shape {tuple(cache.shape)} and strides {cache.stride()} for {blocks} blocks, "
            "which PdKvConnector cannot split into blocks: try another --attention-backend"
        )
    return [part.view(torch.uint8) for part in memory.reshape(prod(outer), blocks, -1).unbind(0)]
