"""Which bytes of which layers make up a KV block, and how blocks of all layers are gathered into one buffer and back.

A packed buffer holds, layer after layer, the given blocks in order, so that any number of layers is one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch

from pdbench.kv.compat import UnsupportedError

# Copies move whole words of this many bytes where a block's size allows: single bytes per thread would waste a GPU.
_WORDS = ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))


@dataclass(frozen=True)
class BlockPacker:
    """Views of a worker's KV cache as `parts`, each of shape [blocks, words per block]; K and V may be parts of their own."""

    parts: tuple[torch.Tensor, ...]
    block_bytes: int
    layout: str

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> torch.Tensor:
        """Copy blocks into the front of `out` (bytes, on the cache's device) and return that front. On the current stream."""
        packed = out[: len(block_ids) * self.block_bytes]
        _gather(list(self.parts), self._index(block_ids), packed.view(self.parts[0].dtype))
        return packed

    def scatter(self, packed: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Copy a packed buffer (bytes, on the cache's device) into the blocks. On the current stream."""
        _scatter(list(self.parts), self._index(block_ids), packed.view(self.parts[0].dtype))

    def warm_up(self) -> None:
        """Run both copies, block 0 onto itself, so that no transfer waits for kernels to be loaded."""
        buffer = torch.empty(3 * self.block_bytes, dtype=torch.uint8, device=self.device)
        for _ in range(3):
            self.scatter(self.gather([0], buffer), [0])

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(block_ids, dtype=torch.int64)
        if self.device.type == "cpu":
            return index
        return index.pin_memory().to(self.device, non_blocking=True)


# Scripted, a loop over all layers runs without the interpreter's lock: otherwise each layer's copy would wait for the engine's
# thread to let go of it, and would make that thread wait in turn.
@torch.jit.script
def _gather(parts: list[torch.Tensor], index: torch.Tensor, packed: torch.Tensor) -> None:
    start = 0
    for part in parts:
        size = index.numel() * part.size(1)
        torch.index_select(part, 0, index, out=packed.narrow(0, start, size).view(index.numel(), part.size(1)))
        start += size


@torch.jit.script
def _scatter(parts: list[torch.Tensor], index: torch.Tensor, packed: torch.Tensor) -> None:
    start = 0
    for part in parts:
        size = index.numel() * part.size(1)
        part.index_copy_(0, index, packed.narrow(0, start, size).view(index.numel(), part.size(1)))
        start += size


def make_packer(kv_caches: dict[str, torch.Tensor], blocks: int) -> BlockPacker:
    """The packer of a worker's layers; `blocks` is how many KV blocks vLLM allocated. Raises UnsupportedError for odd layouts."""
    layers: dict[int, list[torch.Tensor]] = {}  # by address: layers may share one cache
    for name, cache in kv_caches.items():
        if not isinstance(cache, torch.Tensor):
            raise UnsupportedError(f"layer {name} has a KV cache that is no single tensor: this model is not supported")
        if cache.data_ptr() not in layers:
            layers[cache.data_ptr()] = _layer_parts(name, cache, blocks)
    parts = list(chain.from_iterable(layers.values()))
    if not parts:
        raise UnsupportedError("this model has no KV cache to move")
    sizes = [part.shape[1] * part.element_size() for part in parts]
    word, width = next((word, width) for word, width in _WORDS if all(size % width == 0 for size in sizes))
    if all(part.data_ptr() % width == 0 for part in parts):
        parts = [part.view(word) for part in parts]
    first = next(iter(kv_caches.values()))
    # Equal on both sides, or they do not talk to each other: the shape behind the number of blocks, and the order in memory.
    layout = (
        f"{len(parts)} parts of {sorted(set(sizes))} bytes per block, {first.dtype}, "
        f"shape {tuple(first.shape[1:])[-3:]}, memory order {_memory_order(first)}"
    )
    return BlockPacker(parts=tuple(parts), block_bytes=sum(sizes), layout=layout)


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
