"""How long a GPU takes to gather KV blocks of all layers into one buffer and to put them back, beside torch's copy layer by layer.

On a host with a GPU: python benchmarks/kv_blocks.py
"""

import random
import statistics
from collections.abc import Callable

import torch

from pdbench.kv.blocks import BlockPacker, _copy_layers, make_packer
from pdbench.kv.ranks import Share

LAYERS, BLOCK_TOKENS, BLOCKS = 27, 16, 20_000  # DeepSeek-V2-Lite: 9.9 GB of KV cache
TOKENS = (512, 2048, 8192)
REPEATS = 30


def cache(heads: int, size: int) -> dict[str, torch.Tensor]:
    """Layers in bfloat16, (blocks, tokens, size), or with heads (blocks, tokens, heads, size)."""
    shape = (BLOCKS, BLOCK_TOKENS, heads, size) if heads else (BLOCKS, BLOCK_TOKENS, size)
    return {str(layer): torch.empty(shape, dtype=torch.bfloat16, device="cuda") for layer in range(LAYERS)}


def microseconds(act: Callable[[], object]) -> float:
    """Median time of `act` by the GPU's clock."""
    times = []
    for _ in range(REPEATS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # until all of it is launched
        begun.record()
        act()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) * 1e3)
    return statistics.median(times)


def row(name: str, packer: BlockPacker, tokens: int, gather: bool) -> None:
    """Print a line; `o/torch` is below 1 where our kernel is faster."""
    count = tokens // BLOCK_TOKENS
    index = torch.tensor(random.Random(tokens).sample(range(1, BLOCKS), count), device="cuda")
    buffer, other = (torch.empty(count * packer.block_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    words, parts = buffer.view(packer.parts[0].dtype), list(packer.parts)
    copy_us = microseconds(lambda: other.copy_(buffer))
    ours_us = microseconds(lambda: packer.gather(index, buffer) if gather else packer.scatter(buffer, index))
    torch_us = microseconds(lambda: _copy_layers(parts, index, words, gather))
    print(
        f"{name:20} {'gather' if gather else 'scatter':8} {tokens:6} {ours_us:9.0f} {torch_us:9.0f} {copy_us:9.0f} "
        f"{ours_us / torch_us:8.2f} {buffer.numel() / ours_us / 1e3:8.0f}"
    )


def main() -> None:
    print(f"{torch.cuda.get_device_name()}; {LAYERS} layers, medians of {REPEATS}, microseconds")
    print(f"{'cache':20} {'':8} {'tokens':>6} {'ours':>9} {'torch':>9} {'one copy':>9} {'o/torch':>8} {'GB/s':>8}")
    for name, heads, size in (("MLA", 0, 576), ("2 of 4 heads of 144", 4, 144)):
        packer = make_packer(cache(heads, size), BLOCKS, heads)
        if heads:
            packer = packer.share(Share(0, 0, range(1, 3), 0, 1), 0)
        for tokens in TOKENS:
            row(name, packer, tokens, gather=True)
            row(name, packer, tokens, gather=False)
        del packer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
