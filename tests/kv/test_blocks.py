"""Blocks of all layers gathered into one buffer and back, for every cache layout that vLLM makes; with -m gpu by the GPU's kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.kv.blocks import make_packer
from pdbench.kv.compat import UnsupportedError
from pdbench.kv.ranks import Share

BLOCKS = 10


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    with torch.device(request.param):
        yield request.param


def filled(shape, dtype=torch.float32, order=None):
    """A cache of random bytes; `order` permutes its memory behind the same logical shape."""
    order = order or tuple(range(len(shape)))
    memory = torch.empty([shape[dim] for dim in order], dtype=dtype)
    memory.view(torch.uint8).random_(0, 256)
    return memory.permute([order.index(dim) for dim in range(len(shape))])


LAYOUTS = {
    "mla": {"shape": (BLOCKS, 16, 576), "dtype": torch.bfloat16},
    "mla fp8": {"shape": (BLOCKS, 16, 656), "dtype": torch.uint8},
    "heads first": {"shape": (BLOCKS, 4, 16, 64)},
    "tokens first in memory": {"shape": (BLOCKS, 4, 16, 64), "order": (0, 2, 1, 3)},
    "k and v apart": {"shape": (2, BLOCKS, 16, 4, 32), "dtype": torch.float16},
    "k and v apart, heads first in memory": {"shape": (2, BLOCKS, 16, 4, 32), "order": (0, 1, 3, 2, 4)},
    "k and v within a block": {"shape": (BLOCKS, 2, 16, 4, 32)},
    "k and v within a block, logically outside": {"shape": (2, BLOCKS, 16, 4, 32), "order": (1, 0, 2, 3, 4)},
    "blocks in kernel-sized halves": {"shape": (2 * BLOCKS, 8, 4, 32)},
    "one head": {"shape": (BLOCKS, 1, 16, 64)},
    "odd bytes": {"shape": (BLOCKS, 3, 5), "dtype": torch.uint8},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_blocks_arrive_where_they_belong_and_nowhere_else(layout, device):
    here = {f"layer.{i}": filled(**layout) for i in range(3)}
    there = {name: filled(**layout) for name in here}
    before = {name: cache.clone() for name, cache in there.items()}
    source, target = make_packer(here, BLOCKS), make_packer(there, BLOCKS)
    assert source.layout == target.layout
    staging = torch.empty(64 << 10, dtype=torch.uint8)
    while staging.numel() < 4 * source.block_bytes:
        staging = torch.empty(2 * staging.numel(), dtype=torch.uint8)
    packed = source.gather(torch.tensor([7, 2, 9]), staging)
    assert packed.numel() == 3 * source.block_bytes
    target.scatter(packed, torch.tensor([0, 5, 3]))
    blocks_first = (lambda c: c.transpose(0, 1)) if layout["shape"][0] == 2 else (lambda c: c)
    for name in here:
        shape = (BLOCKS, -1)
        got, sent, old = (
            blocks_first(c[name]).contiguous().view(torch.uint8).reshape(shape) for c in (there, here, before)
        )
        assert torch.equal(got[[0, 5, 3]], sent[[7, 2, 9]])
        rest = [1, 2, 4, 6, 7, 8, 9]
        assert torch.equal(got[rest], old[rest])


def test_layers_of_different_sizes_travel_together(device):
    here = {"attention": filled((BLOCKS, 16, 576)), "indexer": filled((BLOCKS, 16, 33), torch.uint8)}
    there = {"attention": filled((BLOCKS, 16, 576)), "indexer": filled((BLOCKS, 16, 33), torch.uint8)}
    source, target = make_packer(here, BLOCKS), make_packer(there, BLOCKS)
    staging = torch.empty(4 * source.block_bytes, dtype=torch.uint8)
    target.scatter(source.gather(torch.tensor([1, 2]), staging), torch.tensor([3, 4]))
    for name in here:
        assert torch.equal(here[name][[1, 2]].view(torch.uint8), there[name][[3, 4]].view(torch.uint8))


def test_layers_that_share_a_cache_travel_once():
    cache = filled((BLOCKS, 16, 64))
    assert make_packer({"a": cache, "b": cache}, BLOCKS).block_bytes == make_packer({"a": cache}, BLOCKS).block_bytes


def test_layouts_differ_when_the_caches_do():
    texts = {make_packer({"a": filled(**layout)}, BLOCKS).layout for layout in LAYOUTS.values()}
    assert len(texts) == len(LAYOUTS)


@pytest.mark.parametrize("head", [0, 2])
def test_some_of_the_heads_go_where_these_are(head, device):
    """A prefill rank with all four heads, a decode rank with two of them."""
    here, there = filled((BLOCKS, 4, 16, 64), order=(0, 2, 1, 3)), filled((BLOCKS, 2, 16, 64), order=(0, 2, 1, 3))
    source = make_packer({"a": here}, BLOCKS, heads=4).share(Share(0, 0, range(head, head + 2), 0, 1), 0)
    target = make_packer({"a": there}, BLOCKS, heads=2)
    before = there.clone()
    target.scatter(
        source.gather(torch.tensor([7, 2]), torch.empty(4 * source.block_bytes, dtype=torch.uint8)),
        torch.tensor([0, 5]),
    )
    assert torch.equal(there[[0, 5]].view(torch.uint8), here[[7, 2], head : head + 2].view(torch.uint8))
    assert torch.equal(there[1:5].view(torch.uint8), before[1:5].view(torch.uint8))


@pytest.mark.parametrize(
    "cache",
    [filled((3, 16, 64)), filled((BLOCKS, 16, 64))[:, :, ::2], filled((16, BLOCKS, 64)), [filled((BLOCKS, 4))]],
    ids=["other block count", "not contiguous", "blocks inside", "no tensor"],
)
def test_odd_caches_are_refused(cache):
    with pytest.raises(UnsupportedError):
        make_packer({"layer": cache}, BLOCKS)


def test_no_cache_is_refused():
    with pytest.raises(UnsupportedError, match="no KV cache"):
        make_packer({}, BLOCKS)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS, unique=True), st.randoms())
def test_any_blocks_move_into_any_others(blocks, random):
    targets = random.sample(range(BLOCKS), len(blocks))
    here, there = filled((BLOCKS, 2, 8)), filled((BLOCKS, 2, 8))
    source, target = make_packer({"a": here}, BLOCKS), make_packer({"a": there}, BLOCKS)
    staging = torch.empty(BLOCKS * source.block_bytes, dtype=torch.uint8)
    target.scatter(source.gather(torch.tensor(blocks), staging), torch.tensor(targets))
    assert torch.equal(there[targets].view(torch.uint8), here[blocks].view(torch.uint8))


def test_draft_model_of_other_heads_travels_whole_or_not_at_all():
    caches = {"draft": filled((BLOCKS, 1, 16, 32)), "layer": filled((BLOCKS, 4, 16, 64))}
    packer = make_packer(caches, BLOCKS, heads=4, drafts={"draft"})
    draft_bytes, layer_bytes = (caches[name][0].numel() * 4 for name in ("draft", "layer"))
    assert packer.heads == 4 and packer.parts[0].data_ptr() == caches["layer"].data_ptr()
    assert packer.layout == make_packer({"layer": caches["layer"]}, BLOCKS, heads=4).layout
    for drafts, travels in ((True, draft_bytes), (False, 0)):
        assert packer.share(Share(0, 0, range(0), 0, 1, drafts), 0).block_bytes == layer_bytes + travels
        assert packer.share(Share(0, 0, range(1, 2), 0, 1, drafts), 0).block_bytes == layer_bytes / 4 + travels
