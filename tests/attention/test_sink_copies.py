"""Copies of the sink blocks change which program does the work, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention import sink_copies as module
from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.sink_copies import COPIES, original_position, spread_first_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

BLOCK = 4


def dense(query, key, value, keep, length):
    """Attention under a block map, token by token."""
    pairs = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, : query.shape[2], :length]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=pairs)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, BLOCK - 1), st.integers(0, 2**31))
def test_output_and_gradients_stay(rows, sinks, ragged, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = sinks + rows
    length = blocks * BLOCK - ragged
    keep = torch.rand(2, 1, rows, blocks, generator=generator) < 0.5
    keep[..., 0] = True  # no row without a key
    full = keep & (torch.rand(keep.shape, generator=generator) < 0.5)
    query = torch.randn(2, 1, rows * BLOCK, 8, dtype=torch.float64, generator=generator)
    tensors = [torch.randn(2, 1, length, 8, dtype=torch.float64, generator=generator) for _ in range(2)]
    key, value = (x.requires_grad_() for x in tensors)
    wide = spread_first_blocks(key, value, keep, full, count=sinks, block=BLOCK)
    added = COPIES * sinks * BLOCK
    assert wide.keep.shape[3] == COPIES * sinks + blocks and wide.key.shape[2] == added + length
    assert torch.equal(wide.keep.sum(-1), keep.sum(-1))
    assert torch.equal(wide.full, wide.full & wide.keep) and torch.equal(wide.full.sum(-1), full.sum(-1))

    expected, got = (
        dense(query, key, value, keep, length),
        dense(query, wide.key, wide.value, wide.keep, added + length),
    )
    assert torch.allclose(expected, got, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad(expected, (key, value), weight), torch.autograd.grad(got, (key, value), weight), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


@given(st.integers(1, 3), st.integers(0, 50))
def test_a_copy_knows_what_it_is_of(sinks, more):
    length = sinks * BLOCK + more
    tokens = torch.arange(length, dtype=torch.float64).view(1, 1, -1, 1)
    keep = torch.ones(1, 1, 2, -(-length // BLOCK), dtype=torch.bool)
    wide = spread_first_blocks(tokens, tokens, keep, keep, count=sinks, block=BLOCK)
    places = torch.arange(wide.key.shape[2])
    assert torch.equal(original_position(places, count=sinks, block=BLOCK), wide.key.flatten().long())
    assert torch.equal(original_position(places, count=0, block=BLOCK), places)


def test_no_query_block_shares_a_copy_with_more_than_its_part():
    keep = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    tokens = torch.zeros(1, 1, 64 * BLOCK, 1)
    wide = spread_first_blocks(tokens, tokens, keep, keep, count=1, block=BLOCK)
    assert wide.keep[..., :COPIES].sum(2).unique().tolist() == [64 // COPIES]


@pytest.mark.gpu
def test_compiled_gradients_equal_dense_with_copies(device, monkeypatch):
    """All keys kept: whatever path the sinks take, the gradients are those of dense attention."""
    spreads = []
    monkeypatch.setattr(
        "omnisparse_flex.attention.block_sparse.spread_first_blocks",
        lambda *a, **k: spreads.append(1) or spread_first_blocks(*a, **k),
    )
    config = OmniSparseConfig(target_recall=0.9999, budget=1 << 20, lazy_threshold=None, sink_size=64)
    from omnisparse_flex.backend import Backend

    length = module.MIN_KEYS + 100
    shape = ((1, 4, length, 64), (1, 2, length, 64), (1, 2, length, 64))
    tensors = [torch.randn(*x, device=device, dtype=torch.float32, requires_grad=True) for x in shape]

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    weight = torch.randn(shape[0], device=device)
    expected = torch.autograd.grad(plain(*tensors), tensors, weight)
    compiled = torch.compile(plain, backend=Backend(config, min_seq_len=0, kernel="triton"))
    with torch._functorch.config.patch(enable_autograd_cache=False):  # a graph from the cache is not traced again
        got = torch.autograd.grad(compiled(*tensors), tensors, weight)
    assert spreads, "the copies did not run"
    for a, b in zip(expected, got, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max() + 1e-3


@pytest.mark.parametrize(("grad", "least", "expected"), [(True, 256, 1), (False, 256, 0), (True, 257, 0)])
def test_copies_are_made_for_the_backward_of_many_keys_only(grad, least, expected, monkeypatch):
    made = []
    monkeypatch.setattr(module, "MIN_KEYS", least)
    monkeypatch.setattr(
        "omnisparse_flex.attention.block_sparse.spread_first_blocks",
        lambda *a, **k: made.append(1) or spread_first_blocks(*a, **k),
    )
    tensors = [torch.randn(1, 1, 256, 16, requires_grad=grad) for _ in range(3)]
    attend(*tensors, SparseCall(config=OmniSparseConfig(), mask=IndexMask(causal()), target=0.5, lists=True))
    assert len(made) == expected
