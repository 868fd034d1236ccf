"""Which rank sends what to which, for all widths: every head of every rank arrives once, and no rank of prefill sends nothing."""

import itertools

import pytest
import torch

from pdbench.kv.blocks import make_packer
from pdbench.kv.ranks import held, shares

WIDTHS, LAYERS, BLOCKS, TOKENS, SIZE = (1, 2, 4, 8), 8, 4, 3, 2
CASES = list(itertools.product(range(1, 17), WIDTHS, WIDTHS))


def divisible(heads, ranks):
    return heads % ranks == 0 or ranks % heads == 0


@pytest.mark.parametrize(("heads", "prefill", "decode"), CASES)
def test_every_head_and_layer_of_every_rank_arrives_exactly_once(heads, prefill, decode):
    if not (divisible(heads, prefill) and divisible(heads, decode)):
        with pytest.raises(ValueError, match="cannot be divided among"):
            shares(heads, prefill, decode)
        return
    arrived = {
        (reader, head, part / share.parts): 0
        for share in shares(heads, prefill, decode)
        for reader in range(decode)
        for head in held(heads, decode, reader)
        for part in range(share.parts)
    }
    for share in shares(heads, prefill, decode):
        assert set(share.heads) <= set(held(heads, prefill, share.rank)) & set(held(heads, decode, share.reader))
        for head in share.heads:
            arrived[share.reader, head, share.part / share.parts] += 1
    assert set(arrived.values()) == {1}
    # None is forgotten, whose blocks would then wait for nobody; and equal widths stay pairs.
    assert {share.rank for share in shares(heads, prefill, decode)} == set(range(prefill))
    if prefill == decode:
        assert all(share.rank == share.reader for share in shares(heads, prefill, decode))


def test_widths_that_are_no_multiples_are_refused():
    with pytest.raises(ValueError, match="multiple of the other"):
        shares(6, 2, 3)


def rank_caches(model, ranks, rank, order):
    """One rank's layers of shape [blocks, heads, tokens, size], `order` in memory."""
    heads = held(model.shape[2], ranks, rank)
    layers = model[:, :, heads.start : heads.stop]
    return {
        f"layer.{i}": layer.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
        for i, layer in enumerate(layers)
    }


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_bytes_of_all_ranks_arrive_where_they_belong(heads, order):
    model = torch.randn(LAYERS, BLOCKS, heads, TOKENS, SIZE)
    for prefill, decode in itertools.product(WIDTHS, WIDTHS):
        here = [
            make_packer(rank_caches(model, prefill, rank, order), BLOCKS, len(held(heads, prefill, rank)))
            for rank in range(prefill)
        ]
        caches = [rank_caches(torch.zeros_like(model), decode, rank, order) for rank in range(decode)]
        there = [make_packer(cache, BLOCKS, len(held(heads, decode, rank))) for rank, cache in enumerate(caches)]
        assert len({packer.layout for packer in here + there}) == 1
        for share in shares(heads, prefill, decode):
            source = here[share.rank].share(share, held(heads, prefill, share.rank).start)
            target = there[share.reader].share(share, held(heads, decode, share.reader).start)
            buffer = torch.empty(2 * source.block_bytes, dtype=torch.uint8)
            target.scatter(source.gather(torch.tensor([2, 1]), buffer), torch.tensor([0, 3]))
        for rank, cache in enumerate(caches):
            expected = rank_caches(model, decode, rank, order)
            for name in cache:
                assert torch.equal(cache[name][[0, 3]], expected[name][[2, 1]])
                assert not cache[name][[1, 2]].any()
